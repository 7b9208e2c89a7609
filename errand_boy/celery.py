"""Commands on Celery's workers: a task that runs one, and a map over a whole cluster.

Add ``include=["errand_boy.celery"]`` to the workers' app. Then ``run_command.delay(["ls"]).get()``
is an Outcome, and ``map(app, commands)`` yields one for each command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

try:
    from celery import group, shared_task
except ModuleNotFoundError as _error:
    if _error.name != "celery":
        raise
    _text = "errand_boy.celery needs Celery: pip install 'errand-boy[celery]'"
    raise ModuleNotFoundError(_text, name="celery") from None
from billiard.process import current_process
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Ignore, SoftTimeLimitExceeded, TimeLimitExceeded
from celery.worker.request import Request as _TaskRequest
from celery.worker.state import revoked

from errand_boy import _native
from errand_boy._map.celery_runner import TASK, Cluster
from errand_boy._map.map import with_bar
from errand_boy._native import lib
from errand_boy._options import ends as _ends, request as _request
from errand_boy._options.request import Request
from errand_boy._process import helper as _helper
from errand_boy._process.streamed import CancelledError, StreamedCommand, tracker, verdict
from errand_boy._spool import Spool
from errand_boy._wire.frames import Failed
from errand_boy._wire.stream import Ended
from errand_boy.errors import HelperDiedError, HelperError

__all__ = ["Cluster", "Outcome", "map", "run_command"]

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from errand_boy._types.celery import Task, TaskParameters

Command: TypeAlias = "Sequence[str] | str | Mapping[str, Any]"


class Outcome(TypedDict):
    """How a command ended: the result of the task, in types of JSON.

    - `args`: the command.
    - `returncode`: as in subprocess; 127 or 126 if the command could not be started; None from
      `map` if the task has failed or was revoked.
    - `stdout`, `stderr`: text.
    - `truncated`: whether output is missing because of `max_output`.
    - `stdout_file`, `stderr_file`: files on the worker's host with the full output, if it was
      longer, or None.
    - `started`: seconds since 1970, and `duration`: seconds from the request to the end.
    - `cause`, `peak_memory`, `limits_by`: as in Popen; None if the command was not started or its
      end is not known.
    - `rusage`: the fields of resource.struct_rusage by name (seconds, KiB, counts).
    - `host`, `worker`, `pid`: the worker's host, its name in Celery, and the process that ran the
      task; None if `returncode` is None.
    - `error`: None, or a text that says why the command did not end normally: it could not be
      started, its time was up, or its helper died (`returncode` is then -9, and may not be the
      command's).
    - `errno`: the number of that error if it has one, or None.
    - `redelivered`: whether the broker gave the task to a worker before, which may have run it.
    - `index`: the command's place among those of `map`, from 0, or None.
    """

    args: Any
    returncode: int | None
    stdout: str | None
    stderr: str | None
    truncated: bool
    stdout_file: str | None
    stderr_file: str | None
    started: float | None
    duration: float
    cause: str | None
    peak_memory: int | None
    limits_by: str | None
    rusage: dict[str, float] | None
    host: str | None
    worker: str | None
    pid: int | None
    error: str | None
    errno: int | None
    redelivered: bool
    index: int | None


class _Command:
    """A command whose whole process group is ended with it."""

    def __init__(
        self,
        request: Request,
        streams: int,
        grace: float,
        spools: list[Spool],
        input: bytes | None,
        options: Mapping[str, Any],
    ) -> None:
        self._ends = _ends.of(options, "group")
        self._options = options
        self._limited = tracker(options)
        self._streamed = StreamedCommand(
            _helper.runner, request, streams, False, spools, input, self._on_started, self._limited
        )
        self._grace = grace
        self._pidfd = -1
        self.timers = self._streamed.timers
        self.cancel = self._streamed.cancel  # makes `run` in another thread raise Ignore
        self.timed_out = False

    def time_up(self) -> None:
        """End the command by its `stop`; by default SIGTERM, and SIGKILL after `grace` seconds."""
        self.timed_out = True
        if self._ends is not None and self._ends.is_given:
            self._step(self._ends.course(self._send), None)
            return
        self._signal_group(signal.SIGTERM)
        self._signal_group(signal.SIGCONT)  # a stopped process would not notice
        self.timers.after(self._grace, self._kill)

    def run(self) -> Ended | Failed:
        """Run the command until it ends and its output ends.

        Raises OSError if it can't be started, HelperError, HelperDiedError and Ignore. Any
        exception, also from outside, ends the process group.
        """
        try:
            return self._streamed.run()
        except BaseException as error:
            if self._streamed.has_exited:
                self._signal_group(signal.SIGKILL)
            self._streamed.abandon()
            if isinstance(error, CancelledError):
                raise Ignore from None
            raise
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)

    def verdict(self, end: Ended, begun: float) -> dict[str, Any]:
        """Return the items of an Outcome about the end."""
        return verdict(end, begun, self._limited, self.timed_out)

    def _send(self, number: int) -> None:
        assert self._ends is not None
        if self._ends.tree == "group":
            self._signal_group(number)
        elif self._streamed.pid:
            _ends.signaller(self._streamed.stream, self._ends, self._options)(number)

    def _step(self, course: Any, has_ended: bool | None) -> None:
        try:
            seconds = next(course) if has_ended is None else course.send(has_ended)
        except StopIteration:
            seconds = None
        if seconds is None:
            self._streamed.kill()  # the signal has been sent
        else:
            go_on = partial(self._go_on, course)
            self.timers.after(seconds, go_on)

    def _go_on(self, course: Any) -> None:
        self._step(course, self._streamed.has_exited)

    def _on_started(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self._pidfd = _native.pidfd_open(self._streamed.pid)
        if self.timed_out:
            self._kill()

    def _kill(self) -> None:
        if self._streamed.has_exited:
            self._signal_group(signal.SIGKILL)
        if self._streamed.pid:
            self._streamed.kill(-self._streamed.pid)

    def _signal_group(self, number: int) -> None:
        if self._ends is not None and self._ends.tree == "all":
            if self._streamed.pid and not self._streamed.has_exited:
                self._streamed.signal(lib.EB_WHOLE_TREE, number)
        elif not self._streamed.has_exited:
            # The helper has not waited for the leader, so no other group can have its number.
            if self._streamed.pid:
                self._streamed.signal(-self._streamed.pid, number)
        elif self._pidfd >= 0:
            _ends.signal_left(self._pidfd, number)


_live: dict[str, _Command] = {}  # the commands of this process's tasks, by task id
_acknowledging = threading.Lock()


class _CommandRequest(_TaskRequest):  # type: ignore[misc]  # Celery has no types
    """A request for `run_command`, which can be terminated in a pool of threads too.

    The worker's main thread then acknowledges it, and so does the thread whose command has ended.
    Celery checks whether that has been done already, but without a lock, and a second
    acknowledgement ends the worker.
    """

    def acknowledge(self) -> None:
        with _acknowledging:
            super().acknowledge()

    def terminate(self, pool: Any, signal: Any = None) -> None:
        if not isinstance(pool, ThreadPool):
            super().terminate(pool, signal)
        elif not self.time_start:
            self._terminate_on_ack = pool, signal
        else:
            command = _live.get(self.id)
            if command is not None:  # else the task checks `revoked` when it starts
                command.cancel()
            self._announce_revoked("terminated", True, signal, False)


if TYPE_CHECKING:

    def _task(function: object) -> Task[Outcome]: ...

else:
    _task = shared_task(bind=True, name=TASK, Request=_CommandRequest, track_started=True)


@_task
def run_command(
    self: Any,
    args: Sequence[str] | str,
    *,
    shell: bool = False,
    input: str | None = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    grace: float = 1.0,
    max_output: int = 1 << 20,
    output_dir: str | None = None,
    encoding: str = "utf-8",
    errors: str = "replace",
    check: bool = False,
    retries: int = 0,
    retry_delay: float = 1.0,
    **options: Any,
) -> Outcome:
    """Run a command on the worker that takes the task, through errand-boy; return its Outcome.

    The command leads its own session and process group.

    - `args`, `shell`, `cwd`, `env`, `encoding`, `errors`: as in subprocess.run.
    - `input`: the standard input; without it, /dev/null.
    - `timeout`: seconds after which the process group gets SIGTERM. It also gets SIGTERM from a
      soft time limit, from revoke(terminate=True) and at the end of the worker process. In pools
      other than prefork, run_command itself enforces both time limits of the task.
    - `grace`: seconds from any SIGTERM to SIGKILL.
    - `max_output`: how many bytes of each output the result holds.
    - `output_dir`: a directory on the worker's host. A longer output is there in full, in a file
      named after the task.
    - `retries`: how often a command that fails is run again, after `retry_delay` seconds.
    - `check`: if the command can't be started, exceeds its time or does not return 0, fail the task
      with the exception of subprocess.run(check=True).
    - `options`: those of `errand_boy.Options`, in types of JSON.
    """
    argv = _request.arguments(args, shell)
    streams, request = _request_for(argv, input is not None, cwd, env, grace, options)
    name = self.request.id or "command"
    spools, paths = [], []
    for stream in ("stdout", "stderr"):
        path = Path(output_dir, f"{name}.{stream}") if output_dir else None
        spools.append(Spool(max_output, None if path is None else partial(FileIO, path, "w")))
        paths.append(path)
    data = None if input is None else input.encode(encoding, errors)
    command = _Command(request, streams, grace, spools, data, options)
    begun = time.monotonic()
    if timeout is not None:
        command.timers.at(begun + timeout, command.time_up)
    if self.request.id and current_process().name == "MainProcess":
        _keep_limits(self, command, begun)
    error: Exception | None = None
    code: int | None = None
    end: Ended | Failed | None = None
    _live[name] = command
    try:
        if self.request.id in revoked:
            raise Ignore
        end = command.run()
        if isinstance(end, Failed):
            raise _request.spawn_error(end, argv[0], cwd, options)
        code = end.returncode
    except HelperDiedError as died:
        code, error = -signal.SIGKILL, died
    except HelperError:
        raise
    except OSError as failed:
        code, error = 127 if failed.errno == errno.ENOENT else 126, failed
    finally:
        _live.pop(name, None)
        for spool in spools:
            spool.close()
    known = command.verdict(end, begun) if isinstance(end, Ended) else {}
    stdout, stderr = (spool.data.decode(encoding, errors) for spool in spools)
    if command.timed_out:
        error = subprocess.TimeoutExpired(args, timeout or 0)
    if error is None and code:
        wrong: Exception | None = subprocess.CalledProcessError(code, args, stdout, stderr)
    else:
        wrong = error
    if wrong is not None and self.request.retries < retries and not self.request.called_directly:
        raise self.retry(exc=wrong, countdown=retry_delay, max_retries=retries)
    if wrong is not None and check:
        raise wrong
    return Outcome(
        args=args,
        returncode=code,
        stdout=stdout,
        stderr=stderr,
        truncated=any(spool.truncated for spool in spools),
        stdout_file=str(paths[0]) if spools[0].file else None,
        stderr_file=str(paths[1]) if spools[1].file else None,
        started=time.time() - time.monotonic() + begun,
        duration=time.monotonic() - begun,
        cause=known.get("cause"),
        peak_memory=known.get("peak_memory"),
        limits_by=known.get("limits_by"),
        rusage={name: getattr(known["rusage"], name) for name in _USAGE} if known else None,
        host=socket.gethostname(),
        worker=self.request.hostname,
        pid=os.getpid(),
        error=None if error is None else f"{type(error).__name__}: {error}",
        errno=getattr(error, "errno", None),
        redelivered=bool((self.request.delivery_info or {}).get("redelivered")),
        index=None,
    )


_USAGE = (
    *("ru_utime", "ru_stime", "ru_maxrss", "ru_minflt", "ru_majflt", "ru_inblock", "ru_oublock"),
    *("ru_nvcsw", "ru_nivcsw"),
)


def _request_for(
    argv: list[str],
    with_input: bool,
    cwd: Any,
    env: Mapping[str, str] | None,
    grace: float,
    options: Mapping[str, Any],
) -> tuple[int, Request]:
    if not argv:
        raise ValueError("a command needs at least one argument")
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    return _request.streamed(
        _request.command(argv, argv[0], env),
        *(pipe if with_input else null, pipe, pipe),
        on_close=_request.milliseconds(grace, "grace"),
        brief=False,
        cwd=cwd,
        env=env,
        start_new_session=True,
        **options,
    )


def _keep_limits(task: Any, command: _Command, begun: float) -> None:
    """Enforce the task's time limits. Celery does so only in processes."""
    hard, soft = task.request.timelimit or (None, None)
    hard, soft = hard or task.time_limit, soft or task.soft_time_limit

    def soft_up() -> None:
        raise SoftTimeLimitExceeded(soft)

    def hard_up() -> None:
        raise TimeLimitExceeded(hard)

    if soft:
        command.timers.at(begun + soft, soft_up)
    if hard:
        command.timers.at(begun + hard, hard_up)


def map(
    app: Any,
    commands: Iterable[Command],
    *,
    ordered: bool = False,
    progress: bool = False,
    within: float | None = None,
    interval: float = 0.1,
    send: Mapping[str, Any] | None = None,
    **options: Unpack[TaskParameters],
) -> Iterator[Outcome]:
    """Run commands on all of `app`'s workers, and yield an Outcome for each.

    - `commands`: argument lists; strings, with ``shell=True``; or mappings with `args` and options
      of `run_command` for that command. All of them are sent at once.
    - `options`: options of `run_command` for all commands.
    - `ordered`: yield outcomes in the order of the commands; if false, as the commands end.
    - `progress`: show a bar on a terminal, if tqdm is installed.
    - `within`: seconds after which celery.exceptions.TimeoutError is raised if an outcome is
      missing.
    - `interval`: seconds between polls, for result backends that must be polled.
    - `send`: options of Celery's apply_async, such as `queue` or `soft_time_limit`.

    Outcomes are removed from the result backend as they are yielded. Closing the iterator revokes
    the remaining tasks, and ends the running commands.
    """
    tasks = []
    for command in commands:
        given = dict(command) if isinstance(command, Mapping) else {"args": command}
        args = given.pop("args")
        args = args if isinstance(args, str) else list(args)
        kwargs = {**options, **given}
        tasks.append(app.signature(run_command.name, (args,), kwargs, dict(send or {})))
    outcomes = _outcomes(app, tasks, ordered, within, interval)
    return with_bar(outcomes, tasks) if progress else outcomes


def _outcomes(
    app: Any, tasks: list[Any], ordered: bool, within: float | None, interval: float
) -> Generator[Outcome, None, None]:
    if not tasks:
        return
    sent = group(tasks, app=app).apply_async()
    left = {result.id: index for index, result in enumerate(sent.results)}
    early: dict[int, Outcome] = {}
    following = 0
    try:
        for id, meta in sent.iter_native(timeout=within, interval=interval):
            index = left.pop(id)
            outcome = _outcome(tasks[index].args[0], index, meta)
            app.backend.forget(id)
            if not ordered:
                yield outcome
                continue
            early[index] = outcome
            while following in early:
                yield early.pop(following)
                following += 1
    finally:
        if left:
            app.control.revoke(list(left), terminate=True)


def _outcome(args: Any, index: int, meta: Mapping[str, Any]) -> Outcome:
    result = meta["result"]
    if meta["status"] == "SUCCESS":
        result["index"] = index
        return result  # type: ignore[no-any-return]
    return Outcome(
        args=args,
        returncode=None,
        stdout=None,
        stderr=None,
        truncated=False,
        stdout_file=None,
        stderr_file=None,
        started=None,
        duration=0.0,
        cause=None,
        peak_memory=None,
        limits_by=None,
        rusage=None,
        host=None,
        worker=None,
        pid=None,
        error=f"{type(result).__name__}: {result}" if result else meta["status"],
        errno=None,
        redelivered=False,
        index=index,
    )
