"""The commands of one `map` that run as tasks of Celery's workers."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from types import MappingProxyType

from celery import Celery, states
from celery.exceptions import (
    SoftTimeLimitExceeded,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from kombu.exceptions import EncodeError, OperationalError

from errand_boy._map.result import Result
from errand_boy.errors import HelperDiedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from errand_boy._map.batch import Batch
    from errand_boy._map.command import Job
    from errand_boy._timers import Timer

TASK = "errand_boy.run_command"

_MOST_OUTPUT = 1 << 24  # bytes of each output, unless said otherwise
_ENCODING = "latin-1"  # for bytes in JSON strings
_NOT_STARTED = 126  # as a return code
_MESSAGES = 2  # from Redis for each task: subscribed and unsubscribed
_SHORTEST = 0.01  # seconds between checks while results come
_GROWTH = 1.5  # factor for that time if there were none
_READY = states.READY_STATES
_TOLD = _READY | {states.STARTED}
_MOST_AWAY = 60.0  # seconds for which the result backend may be away
_CHECK = 10.0  # seconds between checks for workers that have gone
_ANSWER = 1.0  # seconds that workers have to answer
_MOST_SILENCES = 3  # unanswered checks in a row, after which a worker counts as gone
# Settings with these values are not sent: run_command has the same defaults.
_DEFAULTS = {"umask": -1, "start_new_session": False, "restore_signals": True}
_REFUSED = {"uid": "user", "gid": "group", "gids": "extra_groups", "process_group": "process_group"}
_ENDS = (WorkerLostError, TimeLimitExceeded, SoftTimeLimitExceeded, TaskRevokedError, Terminated)
_USAGE = (  # the fields of resource.struct_rusage, in its order
    *("ru_utime", "ru_stime", "ru_maxrss", "ru_ixrss", "ru_idrss", "ru_isrss", "ru_minflt"),
    *("ru_majflt", "ru_nswap", "ru_inblock", "ru_oublock", "ru_msgsnd", "ru_msgrcv", "ru_nsignals"),
    *("ru_nvcsw", "ru_nivcsw"),
)


class Cluster:
    """The workers of a Celery `app`, for errand_boy.map's `on`, which also takes `app` itself.

    `send`: options of Celery's apply_async, such as `queue` or `soft_time_limit`. `interval`: the
    longest time in seconds between two checks for results.
    """

    def __init__(
        self, app: Any, *, send: Mapping[str, Any] | None = None, interval: float = 0.1
    ) -> None:
        if not isinstance(app, Celery):
            raise TypeError(f"on must be a Celery app or an errand_boy.celery.Cluster, not {app!r}")
        self.app = app
        self.send: dict[str, Any] = dict(send or {})
        self.interval: float = interval


class RemoteResult(Result):
    """A Result made from the Outcome of a task.

    `is_again`: Celery has run the command again, because a worker disappeared.
    """

    is_again = False
    _outcome: Mapping[str, Any] = MappingProxyType({})

    @property
    def started(self) -> float:
        """When the command started, in seconds since 1970, by the clock of its host."""
        return self._outcome.get("started") or super().started

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What the command used, and the children that it has waited for."""
        used = self._outcome.get("rusage")
        return None if used is None else resource.struct_rusage(used.get(n, 0) for n in _USAGE)

    @property
    def cause(self) -> str | None:
        """Why the command ended."""
        return self._outcome.get("cause")

    @property
    def peak_memory(self) -> int | None:
        """The peak memory of the command, in bytes."""
        return self._outcome.get("peak_memory")

    @property
    def limits_by(self) -> str | None:
        """What enforces its limits."""
        return self._outcome.get("limits_by")


class _Sent:
    """A job that has been sent as a task. `worker` and its process are known once it runs."""

    __slots__ = ("begun", "is_again", "job", "misses", "worker")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.worker: tuple[str, int] | None = None
        self.begun = 0.0
        self.misses = 0  # checks in a row in which no worker knew the task
        self.is_again = False


class Tasks:
    """Runs the commands of `batch` as tasks of a Cluster."""

    queues = False

    def __init__(self, cluster: Cluster, batch: Batch) -> None:
        if batch.with_pids:
            raise ValueError("memsuspend is not possible for Celery's tasks")
        if batch.outputs != (subprocess.PIPE, subprocess.PIPE):
            raise ValueError(
                "with on= output is captured: stdout, stderr and capture_output can't be given"
            )
        self._app = cluster.app
        self._send = cluster.send
        self._longest = cluster.interval
        self._interval = _SHORTEST
        self._batch = batch
        self._sent: dict[str, _Sent] = {}
        self._revoked: set[str] = set()
        self._timer: Timer | None = None
        self._checked = 0.0
        self._away_since = 0.0  # when the result backend stopped answering
        self._owed = 0  # messages of Redis about tasks, to be read and dropped

    def start(self, job: Job) -> None:
        """Send a command. Raises ConnectionError if there is no broker."""
        job.begin()
        job.limited = None  # the worker enforces its limits
        try:
            args, options = self._arguments(job)
            task = self._app.signature(TASK, (args,), options)
            id = task.apply_async(**self._send).id
        except (TypeError, ValueError, EncodeError) as error:
            self._finish(job, self._batch.jobs.without_end(job, _NOT_STARTED, error))
            return
        except (OperationalError, RuntimeError) as error:
            text = f"Celery's broker or result backend can't be reached: {str(error).strip()}"
            raise ConnectionError(text) from error
        self._owed += _MESSAGES
        self._sent[id] = _Sent(job)
        if self._timer is None:
            self._interval = _SHORTEST
            self._timer = self._batch.timers.after(self._interval, self._look)

    def on_ready(self, fd: int) -> None:
        """Do nothing: there is no descriptor."""

    def running(self) -> list[Job]:
        """Return the commands that are known to run, in the order of their starts."""
        live = [sent for sent in self._sent.values() if sent.worker is not None]
        return [sent.job for sent in sorted(live, key=lambda sent: sent.begun)]

    def signal_group(self, job: Job, number: int) -> None:
        """Do nothing: nobody calls this."""

    def stop(self, now: bool) -> None:
        """Revoke the tasks that have not begun; if `now`, also those that run."""
        if now:
            self._revoke(list(self._sent))
            return
        # Only a task's worker knows whether it has begun: it reports its result, or REVOKED.
        self._revoked.update(id for id, sent in self._sent.items() if sent.worker is None)
        if self._revoked:
            self._app.control.revoke(list(self._revoked))

    def abandon(self, index: int) -> None:
        """Revoke a command, and end it if it runs."""
        self._revoke([id for id, sent in self._sent.items() if sent.job.index == index])

    def close(self) -> None:
        """Revoke the remaining tasks, and end those that run."""
        self._revoke(list(self._sent))
        self._look_away()

    def _arguments(self, job: Job) -> tuple[Any, dict[str, Any]]:
        """Return run_command's arguments for a command."""
        args = job.args
        if isinstance(args, (str, bytes, os.PathLike)):
            args = os.fsdecode(args)
        else:
            args = [os.fsdecode(arg) for arg in args]
        options = {}
        for name, value in (self._batch.options if job.options is None else job.options).items():
            if value is None or value == _DEFAULTS.get(name):
                continue
            if name in _REFUSED:
                raise ValueError(f"{_REFUSED[name]} is not possible with on=")
            options[name] = value
        if options.get("env") is not None:
            env = options["env"].items()
            options["env"] = {os.fsdecode(name): os.fsdecode(value) for name, value in env}
        if options.get("cwd") is not None:
            options["cwd"] = os.fsdecode(options["cwd"])
        share = self._batch.share
        timeout = share.seconds if share is not None and job.timeout is None else job.timeout
        if timeout is not None:
            job.timeout = timeout
            options["timeout"] = timeout
            options.setdefault("stop", [signal.SIGKILL])  # as on this machine
        if job.input is not None:
            options["input"] = job.input.decode(_ENCODING)
        most = self._batch.jobs.max_output
        options["max_output"] = _MOST_OUTPUT if most is None else most
        return args, {**options, "shell": job.shell, "encoding": _ENCODING}

    # -- the course of a task --

    def _look(self) -> None:
        """Take the available results, and set a timer for the next check."""
        self._timer = None
        backend = self._app.backend
        had_some = False
        for id, meta in self._metas(backend):
            sent = self._sent.get(id)
            if sent is None:  # another result has caused its end
                continue
            if meta["status"] in _READY:
                had_some = True
                del self._sent[id]
                backend.forget(id)
                self._over(id, sent, meta)
            else:
                self._on_begun(sent, meta["result"])
        now = time.monotonic()
        if now >= self._checked + _CHECK:
            self._checked = now
            self._look_for_lost(now)
        if self._timer is None and self._sent:
            longer = min(self._interval * _GROWTH, self._longest)
            self._interval = _SHORTEST if had_some else longer
            self._timer = self._batch.timers.after(self._interval, self._look)

    def _metas(self, backend: Any) -> list[tuple[str, Mapping[str, Any]]]:
        """Return what the result backend knows about the tasks. Raises ConnectionError."""
        ids = list(self._sent)
        try:
            consumer = getattr(backend, "result_consumer", None)
            while self._owed and consumer is not None:
                self._owed -= 1
                consumer.drain_events(timeout=0)
            if hasattr(backend, "mget"):
                # Ask for all at once. Messages could be lost with a connection.
                metas = backend.get_many(ids, interval=0, max_iterations=1, READY_STATES=_TOLD)
            else:
                metas = [(id, backend.get_task_meta(id)) for id in ids]
            found = [(id, meta) for id, meta in metas if meta["status"] in _TOLD]
        except Exception as error:  # each backend raises its own
            now = time.monotonic()
            if not self._away_since:
                self._away_since = now
            elif now > self._away_since + _MOST_AWAY:
                text = f"Celery's result backend can't be reached: {str(error).strip()}"
                raise ConnectionError(text) from error
            return []
        self._away_since = 0.0
        return found

    def _on_begun(self, sent: _Sent, told: Any) -> None:
        worker = told["hostname"], told["pid"]
        if sent.worker != worker:
            sent.is_again = sent.worker is not None  # Celery has given it to another
            sent.worker = worker
            sent.begun = time.monotonic()
            sent.misses = 0

    def _over(self, id: str, sent: _Sent, meta: Mapping[str, Any]) -> None:
        job, jobs = sent.job, self._batch.jobs
        told = meta["result"]
        if meta["status"] == states.SUCCESS:
            result = self._result(job, told)
            # The broker may not say that it ran before, and its last start may not have been seen.
            moved = sent.worker not in (None, (told["worker"], told["pid"]))
            result.is_again = sent.is_again or moved or told["redelivered"]
            job.runs += result.is_again
            self._finish(job, result)
        elif meta["status"] == states.REVOKED and id in self._revoked:
            self._batch.abandoned(job)
        else:
            error = told if isinstance(told, Exception) else TaskRevokedError(str(told))
            code = -signal.SIGKILL if isinstance(error, _ENDS) else _NOT_STARTED
            self._finish(job, jobs.without_end(job, code, error))
        self._revoked.discard(id)

    def _result(self, job: Job, outcome: Mapping[str, Any]) -> RemoteResult:
        result = RemoteResult(job.args, outcome["returncode"])
        result._outcome = outcome
        result.host = outcome["host"]
        result.truncated = outcome["truncated"]
        for number, name in enumerate(("stdout", "stderr")):
            if outcome[name]:
                self._batch.jobs.write(job, number, outcome[name].encode(_ENCODING))
        self._batch.jobs.put_output(result, job)
        text = outcome["error"]
        if outcome["cause"] == "timeout":
            result.error = subprocess.TimeoutExpired(
                job.args, job.timeout or 0, result.stdout, result.stderr
            )
        elif text is not None:
            died = outcome["returncode"] < 0
            result.error = (HelperDiedError if died else OSError)(*_told(outcome))
        return result

    def _finish(self, job: Job, result: Result) -> None:
        now = time.monotonic()
        result.duration = now - job.begun
        if isinstance(result, RemoteResult):
            result.duration = result._outcome["duration"]
            share = self._batch.share
            if share is not None and result.cause in ("exit", "signal"):
                share.count(result.duration)
        result._begun = now - result.duration
        self._batch.finish(job, result)

    # -- the end of a task --

    def _revoke(self, ids: list[str]) -> None:
        if not ids:
            return
        self._app.control.revoke(ids, terminate=True)
        for id in ids:
            self._batch.abandoned(self._sent.pop(id).job)

    def _look_away(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_for_lost(self, now: float) -> None:
        """Give up the tasks of workers that have gone, which nobody else reports.

        Leave out those that Celery itself gives to other workers.
        """
        if self._app.conf.task_acks_late:
            return
        old: dict[str, list[str]] = {}
        for id, sent in self._sent.items():
            if sent.worker is not None and sent.begun < now - _CHECK:
                old.setdefault(sent.worker[0], []).append(id)
        if not old:
            return
        ask = self._app.control.inspect(list(old), timeout=_ANSWER, limit=len(old))
        ids = [id for tasks in old.values() for id in tasks]
        known = {id for tasks in (ask.query_task(ids) or {}).values() for id in tasks}
        for id in ids:
            entry = self._sent.get(id)
            if entry is None:
                continue
            entry.misses = 0 if id in known else entry.misses + 1
            if entry.misses < _MOST_SILENCES:
                continue
            del self._sent[id]
            self._app.control.revoke(id, terminate=True)  # in case the worker is there after all
            assert entry.worker is not None
            text = f"the worker {entry.worker[0]} disappeared, and its command with it"
            without = self._batch.jobs.without_end
            self._finish(entry.job, without(entry.job, -signal.SIGKILL, WorkerLostError(text)))


def _told(outcome: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of the OSError that an Outcome has as text."""
    number, text = outcome["errno"], outcome["error"].partition(": ")[2]
    text = text.removeprefix(f"[Errno {number}] ")
    why, colon, name = text.partition(": ")
    return (number, why, name[1:-1]) if colon and name[0] == name[-1] == "'" else (number, text)
