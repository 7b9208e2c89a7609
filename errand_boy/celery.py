"""Commands on Celery's workers: a task that runs one, and a map over a whole cluster.

Add ``include=["errand_boy.celery"]`` to the workers' app. Then ``run_command.delay(["ls"]).get()``
is an Outcome, and ``map(app, commands)`` yields one for each command. docs/celery.md has the rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from billiard.process import current_process
from celery import group, shared_task
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Ignore, SoftTimeLimitExceeded, TimeLimitExceeded
from celery.worker.request import Request as _TaskRequest
from celery.worker.state import revoked

from errand_boy import _helper, _request, _wire
from errand_boy._connection import Connection
from errand_boy._frame import MOST_ATTEMPTS, acquire
from errand_boy._native import lib
from errand_boy._request import Request
from errand_boy.errors import HelperDiedError, HelperError, NotServedError, ProtocolError

__all__ = ["Outcome", "map", "run_command"]

Command: TypeAlias = "Sequence[str] | str | Mapping[str, Any]"

_CHUNK = 1 << 16  # bytes; twice as many would be a mapping of their own each time
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_PROCESS_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP


class Outcome(TypedDict):
    """What became of a command; it is the result of the task, and so made of JSON's types.

    `args`: the command. `returncode`: as subprocess has it; 127 or 126 if the command could not be
    started, None from `map` if the task has failed or was revoked.
    `stdout`, `stderr`: text. `truncated`: whether some of it is missing, for `max_output`.
    `stdout_file`, `stderr_file`: where all of a longer output is, on the worker's host, or None.
    `duration`: seconds from the request to the end.
    `rusage`: the fields of resource.struct_rusage by name (seconds, KiB, counts), or None.
    `host`: of the worker; `worker`: its name with Celery; None where `returncode` is.
    `error`: None, or why there is no ordinary end, as text: the command could not be started, its
    time was up, its helper has died (`returncode` is then -9, and may not be the command's).
    `index`: the command's place among those of `map`, from 0, or None.
    """

    args: Any
    returncode: int | None
    stdout: str | None
    stderr: str | None
    truncated: bool
    stdout_file: str | None
    stderr_file: str | None
    duration: float
    rusage: dict[str, float] | None
    host: str | None
    worker: str | None
    error: str | None
    index: int | None


class _Output:
    """One stream's output so far."""

    def __init__(self, most: int, path: Path | None) -> None:
        self.data = bytearray()
        self.truncated = False
        self.path: Path | None = None  # once there is a file
        self._most = most
        self._wanted = path
        self._file: Any = None

    def add(self, data: bytes) -> None:
        room = self._most - len(self.data)
        if len(data) > room and self._wanted is None:
            self.truncated = True
        elif len(data) > room and self._file is None:
            self._file = self._wanted.open("wb")  # type: ignore[union-attr]
            self.path = self._wanted
            self._file.write(self.data)
        if self._file is not None:
            self._file.write(data)
        self.data += data[: max(room, 0)]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Command:
    """A command, and the connection over which its helper streams its output and tells its end."""

    def __init__(
        self, args: Any, cwd: Any, options: bytes, flags: int, grace: float, outputs: list[_Output]
    ) -> None:
        self._request = Request(options, (-1, -1, -1), (), flags)
        self._args = args
        self._cwd = cwd
        self._grace = grace
        self._outputs = outputs
        self._connection: Connection | None = None
        self._lock = threading.Lock()  # of _connection, _cancelled
        self._cancelled = False
        self._received = b""
        self._unsent = b""
        self._input: memoryview | None = None
        self._window = lib.EB_WINDOW
        self._streams = len(outputs)  # that have not ended
        self._killed = False
        self._pid = 0
        self._pidfd = -1
        self.status: int | None = None
        self.usage: tuple[int, ...] = ()
        self.timed_out = False
        # When to do what, at time.monotonic().
        self._alarms: list[tuple[float, Callable[[], None]]] = []

    # -- from outside --

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Have `action` called at `when` (time.monotonic) if the command still runs."""
        self._alarms.append((when, action))

    def cancel(self) -> None:
        """End the command, in another thread than runs it; `run` raises Ignore there."""
        with self._lock:
            self._cancelled = True
            if self._connection is not None:
                # It wakes that thread, and makes the helper end the process group.
                with contextlib.suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)

    def time_up(self) -> None:
        """Send SIGTERM to the process group, and after the grace SIGKILL."""
        self.timed_out = True
        self._signal_group(signal.SIGTERM)
        self._signal_group(signal.SIGCONT)  # stopped, it would not notice
        self.at(time.monotonic() + self._grace, self._kill)

    def run(self, input: bytes | None) -> None:
        """Run it to its end, and that of its output.

        Raises OSError if it can't be started, HelperError, HelperDiedError, Ignore. Any exception,
        also one that comes in from outside, ends the process group.
        """
        try:
            for _ in range(MOST_ATTEMPTS):
                self._input = None if input is None else memoryview(input)
                try:
                    self._start()
                    while not self._over():
                        self._wait()
                        self._receive()
                    break
                except NotServedError:
                    if self._connection is not None:
                        self._connection.discard()
            else:
                raise _helper.ends_at_once()
            self._give_back()
        except BaseException:
            self._abandon()
            raise
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
            for output in self._outputs:
                output.close()
        if self._cancelled:
            raise Ignore

    # -- the course of it --

    def _start(self) -> None:
        spawn_frame = acquire()
        try:
            connection = _helper.runner.acquire(self._request, spawn_frame)
            with self._lock:
                self._connection = connection
                if self._cancelled:
                    raise Ignore
            while spawn_frame.rest:
                try:
                    spawn_frame.count_sent(connection.send_some(spawn_frame.rest, spawn_frame.fds))
                except BlockingIOError:
                    _await(connection.sock.fileno(), False, True, None)
        finally:
            if self._connection is None and spawn_frame.connection is not None:
                spawn_frame.connection.close()
            spawn_frame.done()
        connection.pool.owns_children = True

    def _over(self) -> bool:
        # What left the group may keep the output open.
        return self.status is not None and (self._streams == 0 or self._killed)

    def _wait(self) -> None:
        """Wait for the helper or for the next alarm, and let that ring."""
        assert self._connection is not None
        now = time.monotonic()
        first = min(self._alarms, key=lambda alarm: alarm[0], default=None)
        if first is not None and first[0] <= now:
            self._alarms.remove(first)
            first[1]()
            return
        rest = None if first is None else first[0] - now
        _await(self._connection.sock.fileno(), True, bool(self._unsent), rest)
        self._send(b"")

    def _send(self, data: bytes) -> None:
        assert self._connection is not None
        self._unsent += data
        if self._unsent:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                sent = self._connection.sock.send(self._unsent, _FLAGS)
                self._unsent = self._unsent[sent:]

    def _send_input(self) -> None:
        if self._input is None:
            return
        now, rest = self._input[: self._window], self._input[self._window :]
        self._window -= len(now)
        if now:
            self._send(_wire.frame(lib.EB_STDIN, [bytes(now)]))
        if not rest:
            self._send(_wire.frame(lib.EB_STDIN, []))
        self._input = rest if rest else None

    def _receive(self) -> None:
        assert self._connection is not None
        connection = self._connection
        try:
            data = connection.sock.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            if not self._pid:  # see docs/protocol.md
                raise NotServedError from None
            data = b""
        if not data:
            if self._cancelled:
                raise Ignore
            if not connection.greeted:
                raise NotServedError
            raise HelperDiedError(
                errno.EPIPE, "errand-boy's helper ended: the command may have been started"
            )
        self._received += data
        header = _wire.HEADER.size
        while len(self._received) >= header:
            length, kind = _wire.HEADER.unpack_from(self._received)
            if len(self._received) < header + length:
                break
            payload = self._received[header : header + length]
            self._received = self._received[header + length :]
            self._on_frame(connection, kind, payload)

    def _on_frame(self, connection: Connection, kind: int, payload: bytes) -> None:
        if kind == lib.EB_HELLO:
            connection.greet(payload)
        elif kind == lib.EB_SPAWNED:
            self._pid, _ = struct.unpack("<iB", payload)
            with contextlib.suppress(OSError):  # it has ended already
                self._pidfd = os.pidfd_open(self._pid)
            if self.timed_out:
                self._signal_group(signal.SIGKILL)
            self._send_input()
        elif kind in (lib.EB_STDOUT, lib.EB_STDERR):
            if payload:
                self._outputs[kind - lib.EB_STDOUT].add(payload)
            else:
                self._streams -= 1
        elif kind == lib.EB_CREDIT:
            self._window += int.from_bytes(payload, "little")
            self._send_input()
        elif kind == lib.EB_EXITED:
            self.status, *usage = _wire.EXITED.unpack(payload)
            self.usage = tuple(usage)
        elif kind == lib.EB_FAILED:
            failed = _wire.reply(kind, payload)
            assert isinstance(failed, _wire.Failed)
            self._give_back()
            raise _wire.spawn_error(failed, self._args[0], self._cwd)
        elif kind == lib.EB_REFUSED:
            reason = payload.decode("utf-8", "replace")
            raise ProtocolError(errno.EPROTO, f"the helper refused: {reason}")
        else:
            raise ProtocolError(errno.EPROTO, f"frame {kind} while a command runs")

    # -- its end --

    def _signal_group(self, number: int) -> None:
        if self.status is None:
            # The helper has not waited for the leader, so that the group's number is its own.
            payload = struct.pack("<ii", -self._pid, number)
            if self._pid:
                self._send(_wire.frame(lib.EB_SIGNAL, [payload]))
        elif self._pidfd >= 0:
            # Another group may have the number by now. Before Linux 6.9 there is no such call, and
            # the leader's end is the end.
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, number, None, _PROCESS_GROUP)

    def _kill(self) -> None:
        self._killed = True
        self._signal_group(signal.SIGKILL)

    def _give_back(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._cancelled or self._unsent or (self.status is not None and self._streams):
            connection.close()
        else:
            connection.give_back()

    def _abandon(self) -> None:
        """Close the connection: the helper sends SIGTERM to the group, and SIGKILL later."""
        if self.status is not None:
            self._signal_group(signal.SIGKILL)
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._received = self._unsent = b""


def _await(fd: int, readable: bool, writable: bool, timeout: float | None) -> None:
    """Wait, as the process's select module does: under gevent and eventlet others go on."""
    if not hasattr(select, "poll"):  # eventlet has taken it away; its select knows no limit
        select.select([fd] if readable else [], [fd] if writable else [], [], timeout)
        return
    poll = select.poll()
    poll.register(fd, readable * select.POLLIN | writable * select.POLLOUT)
    poll.poll(None if timeout is None else max(0, timeout) * 1000)


_live: dict[str, _Command] = {}  # those of this process's tasks, by id


class _CommandRequest(_TaskRequest):  # type: ignore[misc]  # Celery has no types
    """A request for `run_command`, that can be terminated in a pool of threads too."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        if not isinstance(pool, ThreadPool):
            super().terminate(pool, signal)
        elif not self.time_start:
            self._terminate_on_ack = pool, signal
        else:
            command = _live.get(self.id)
            if command is not None:  # else it looks at `revoked` when it starts
                command.cancel()
            self._announce_revoked("terminated", True, signal, False)


@shared_task(  # type: ignore[untyped-decorator]
    bind=True, name="errand_boy.run_command", Request=_CommandRequest
)
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
) -> Outcome:
    """Run a command on the worker that takes the task, through errand-boy; return its Outcome.

    `args`, `shell`, `cwd`, `env`, `encoding`, `errors`: as subprocess.run has them. Standard input
    is `input`, or else /dev/null. The command leads a session and process group of its own.

    `timeout`: seconds after which the process group gets SIGTERM; `grace`: seconds from any SIGTERM
    to SIGKILL. A soft time limit, revoke(terminate=True) and the end of the worker process send
    SIGTERM too. In a pool other than prefork, both time limits of the task are kept here.
    `max_output`: bytes of each output that the result holds; with `output_dir`, a directory on the
    worker's host, all of a longer one is kept there, in a file named after the task.
    `retries`: how often a command without success is run again, after `retry_delay` seconds.
    `check`: fail the task if the command can't be started, is timed out or returns other than 0,
    with the exception of subprocess.run(check=True).
    """
    argv = _request.arguments(args, shell)
    options, flags = _options(argv, input is not None, cwd, env, grace)
    name = self.request.id or "command"
    paths = [Path(output_dir, f"{name}.{end}") if output_dir else None for end in _ENDS]
    outputs = [_Output(max_output, path) for path in paths]
    command = _Command(argv, cwd, options, flags, grace, outputs)
    begun = time.monotonic()
    if timeout is not None:
        command.at(begun + timeout, command.time_up)
    if self.request.id and current_process().name == "MainProcess":
        _keep_limits(self, command, begun)
    error: Exception | None = None
    code: int | None = None
    _live[name] = command
    try:
        if self.request.id in revoked:
            raise Ignore
        command.run(None if input is None else input.encode(encoding, errors))
    except HelperDiedError as died:
        code, error = -signal.SIGKILL, died
    except HelperError:
        raise
    except OSError as failed:
        code, error = 127 if failed.errno == errno.ENOENT else 126, failed
    finally:
        _live.pop(name, None)
    if command.status is not None:
        code = os.waitstatus_to_exitcode(command.status)
    stdout, stderr = (output.data.decode(encoding, errors) for output in outputs)
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
        truncated=any(output.truncated for output in outputs),
        stdout_file=_text(outputs[0].path),
        stderr_file=_text(outputs[1].path),
        duration=time.monotonic() - begun,
        rusage=_rusage(command.usage),
        host=socket.gethostname(),
        worker=self.request.hostname,
        error=None if error is None else f"{type(error).__name__}: {error}",
        index=None,
    )


_ENDS = ("stdout", "stderr")
_USAGE = (
    *("ru_utime", "ru_stime", "ru_maxrss", "ru_minflt", "ru_majflt", "ru_inblock", "ru_oublock"),
    *("ru_nvcsw", "ru_nivcsw"),
)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _rusage(usage: tuple[int, ...]) -> dict[str, float] | None:
    if not usage:
        return None
    found = _wire.rusage(usage)
    return {name: getattr(found, name) for name in _USAGE}


def _options(
    argv: list[str], with_input: bool, cwd: Any, env: Mapping[str, str] | None, grace: float
) -> tuple[bytes, int]:
    """Return what a request asks for, encoded, and its flags."""
    if not argv:
        raise ValueError("a command needs at least one argument")
    milliseconds = round(grace * 1000)
    if not 0 <= milliseconds <= 0xFFFFFFFF:
        raise ValueError("grace is out of range")
    settings, flags = _request.settings(env=env, cwd=cwd, start_new_session=True)
    streams = _wire.option(lib.EB_TAG_STREAMS, bytes([0b111 if with_input else 0b110]))
    if not with_input:
        streams += _wire.option(lib.EB_TAG_NULL, bytes([0b001]))
    ending = _wire.number(lib.EB_TAG_ON_CLOSE, milliseconds)
    command = _request.command(argv, argv[0], env)
    return command + settings + streams + ending, flags | lib.EB_WITHOUT_STANDARD


def _keep_limits(task: Any, command: _Command, begun: float) -> None:
    """Keep the task's time limits, which Celery does only for processes."""
    hard, soft = task.request.timelimit or (None, None)
    hard, soft = hard or task.time_limit, soft or task.soft_time_limit

    def soft_up() -> None:
        raise SoftTimeLimitExceeded(soft)

    def hard_up() -> None:
        raise TimeLimitExceeded(hard)

    if soft:
        command.at(begun + soft, soft_up)
    if hard:
        command.at(begun + hard, hard_up)


def map(
    app: Any,
    commands: Iterable[Command],
    *,
    ordered: bool = False,
    progress: bool = False,
    within: float | None = None,
    interval: float = 0.1,
    send: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Run commands on all of `app`'s workers, and yield an Outcome for each.

    `commands`: argument lists, or with ``shell=True`` strings, or mappings with `args` and options
    of `run_command` for that command. `options` are those for all. They are all sent at once.
    `ordered`: outcomes come in the order of the commands, else as the commands end.
    `progress`: show a bar on a terminal, if tqdm is installed.
    `within`: seconds after which celery.exceptions.TimeoutError is raised if an outcome is missing.
    `interval`: seconds between looks, for result backends that can't tell by themselves.
    `send`: options of Celery's apply_async, such as `queue` or `soft_time_limit`.

    Each outcome is forgotten by the result backend when it comes. Closing the iterator revokes what
    is left, and ends what runs.
    """
    tasks = []
    for command in commands:
        given = dict(command) if isinstance(command, Mapping) else {"args": command}
        args = given.pop("args")
        args = args if isinstance(args, str) else list(args)
        kwargs = {**options, **given}
        tasks.append(app.signature(run_command.name, (args,), kwargs, dict(send or {})))
    outcomes = _outcomes(app, tasks, ordered, within, interval)
    if progress and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm  # noqa: PLC0415

            return iter(tqdm(outcomes, total=len(tasks), unit="command"))
    return outcomes


def _outcomes(
    app: Any, tasks: list[Any], ordered: bool, within: float | None, interval: float
) -> Iterator[Outcome]:
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
        duration=0.0,
        rusage=None,
        host=None,
        worker=None,
        error=f"{type(result).__name__}: {result}" if result else meta["status"],
        index=index,
    )
