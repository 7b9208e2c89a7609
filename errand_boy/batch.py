"""Many commands at once: their pipes, their waiting and their reaping are the helper's work."""

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
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized

from errand_boy import helper as _helper
from errand_boy import protocol
from errand_boy._native import lib
from errand_boy.connection import Connection
from errand_boy.errors import HelperDiedError, ProtocolError
from errand_boy.outgoing import Request, take
from errand_boy.popen import environment, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any, TypeAlias

    from errand_boy.client import Client
    from errand_boy.helper import Helper

    Command: TypeAlias = "Sequence[Any] | str | bytes | os.PathLike[Any] | Mapping[str, Any]"

_CHUNK = 1 << 18  # bytes
_RECHECK = 0.005  # seconds for which a helper that fitted this process is taken to fit it
_LEAST_AHEAD = 64  # commands
_PER_CPU = 4  # workers
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_HEADER = protocol.HEADER
_LIST = struct.Struct("<BII")
_END_OF_INPUT = _HEADER.pack(0, lib.EB_STDIN)
_KILL = _HEADER.pack(8, lib.EB_SIGNAL) + struct.pack("<ii", 0, signal.SIGKILL)


class Result(subprocess.CompletedProcess):  # type: ignore[type-arg]
    """What became of one command of `map`.

    `args`, `returncode`, `stdout` and `stderr` are those of subprocess.CompletedProcess, and

    `error`: None, or why there is no ordinary end: the OSError for which the command could not be
    started (`returncode` is then 127 if it was not found, else 126), subprocess.TimeoutExpired, or
    HelperDiedError (`returncode` is then -9, and may not be the command's).
    `duration`: seconds from the request to the end.
    `rusage`: a resource.struct_rusage, or None if it did not end by itself or by a signal.
    `truncated`: whether output is missing, for `max_output`.
    `stdout_file`, `stderr_file`: where all output is, if it was spooled; temporary files.
    """

    error: Exception | None = None
    duration = 0.0
    truncated = False
    stdout_file: Any = None
    stderr_file: Any = None
    _usage: tuple[int, ...] = ()

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What the command, and the children it waited for, have used."""
        return protocol.rusage(self._usage) if self._usage else None

    def check_returncode(self) -> None:
        """Raise `error`, or CalledProcessError if the return code is not 0."""
        if self.error is not None:
            raise self.error
        super().check_returncode()


class _Output:
    """One stream's output so far."""

    __slots__ = ("file", "most", "parts", "room", "spool", "truncated")

    def __init__(self, most: int | None, spool: bool) -> None:
        self.parts: list[bytes] = []
        self.most = most
        self.room = sys.maxsize if most is None else most
        self.spool = spool
        self.truncated = False
        self.file: Any = None

    def add(self, data: bytes) -> None:
        if self.file is not None:
            self.file.write(data)
        elif len(data) > self.room and self.spool:
            from tempfile import TemporaryFile  # noqa: PLC0415

            self.file = TemporaryFile()
            self.file.writelines([*self.parts, data])
        if len(data) > self.room:
            data = data[: self.room]
            self.truncated = not self.spool
        if data:
            self.parts.append(data)
            self.room -= len(data)


class _Job:
    __slots__ = (
        "args",
        "begun",
        "frame",
        "index",
        "input",
        "outputs",
        "shell",
        "status",
        "streams",
        "timed_out",
        "timeout",
        "usage",
        "window",
    )

    def __init__(self, index: int, args: Any, frame: bytes) -> None:
        self.index = index
        self.args = args
        self.frame = frame
        self.input: memoryview | None = None
        self.timeout: float | None = None
        self.outputs: tuple[_Output | None, _Output | None] = (None, None)
        self.shell = False
        self.streams = 0  # outputs that have not ended
        self.begun = 0.0
        self.status: int | None = None
        self.usage: tuple[int, ...] = ()
        self.window = lib.EB_WINDOW
        self.timed_out = False


class _Line:
    """A connection, and the command that runs over it."""

    __slots__ = ("connection", "fd", "job", "lender", "rest", "sock", "unsent")

    def __init__(self, lender: Any, connection: Connection) -> None:
        self.lender = lender
        self.connection = connection
        self.sock = connection.sock
        self.fd = connection.sock.fileno()
        self.job: _Job | None = None
        self.rest = b""  # of a frame that has not come whole
        self.unsent = b""


class _Here:
    """Commands by a helper of this process's own."""

    def __init__(self) -> None:
        self._checked = -1.0
        self._helper: Helper | None = None

    def changed(self, now: float) -> bool:
        """Have a helper that fits this process; return whether it is another than before."""
        if self._helper is _helper.owner.current and now - self._checked < _RECHECK:
            return False
        _helper.owner.start()
        before, self._helper = self._helper, _helper.owner.current
        self._checked = now
        return before is not self._helper

    def prepare(self, request: Request) -> tuple[bytes, list[int]]:
        """Return the frame of a request, and its descriptors."""
        assert self._helper is not None
        pid, flags = (self._helper.pid, 0) if self._helper.shares_fs else (0, _WITH_FS)
        return _prepare(request, self._helper.caller, pid, flags)

    def connect(self) -> _Line:
        for _ in range(_helper.PATIENCE):
            self.changed(time.monotonic())
            helper = self._helper
            assert helper is not None
            try:
                connection: Connection | None = helper.idle.pop()
            except IndexError:
                connection = helper.connect()
            if connection is not None and connection.is_ours():
                return _Line(helper, connection)
            self._checked = -1.0
            if connection is not None:
                connection.close()
            else:
                _helper.owner.dismiss(helper)
        raise _helper.ends_at_once()


class _There:
    """Commands by a daemon."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._first = True

    def changed(self, now: float) -> bool:
        first, self._first = self._first, False
        return first

    def prepare(self, request: Request) -> tuple[bytes, list[int]]:
        return _prepare(request, None, 0, _WITH_FS)

    def connect(self) -> _Line:
        return _Line(self._client, self._client.connection())


_WITH_FS = lib.EB_WITH_CWD | lib.EB_WITH_UMASK


def _prepare(request: Request, start: Any, helper: int, flags: int) -> tuple[bytes, list[int]]:
    outgoing = take()
    try:
        outgoing.prepare(request, start, helper, flags, None)
        fds = outgoing.fds
        if flags & lib.EB_WITH_CWD:
            fds[-1] = os.dup(fds[-1])
        return bytes(outgoing.frame), fds
    finally:
        outgoing.done()


class Batch:
    """The commands of one `map`: those that run, and the results that nobody has taken yet.

    A driver waits for `lines` to be readable, or writable if they have unsent bytes, and calls
    `on_ready`; `fill` starts commands; `deadline` is when `on_time` wants to be called.
    """

    def __init__(
        self,
        place: _Here | _There,
        commands: Iterable[Command],
        *,
        max_workers: int | None = None,
        capture_output: bool = True,
        stdout: Any = None,
        stderr: Any = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        input: Any = None,
        timeout: float | None = None,
        ordered: bool = True,
        max_output: int | None = None,
        spool: bool = False,
        shell: bool = False,
        cwd: Any = None,
        env: Mapping[Any, Any] | None = None,
        umask: int = -1,
        start_new_session: bool = False,
        process_group: int | None = None,
        restore_signals: bool = True,
    ) -> None:
        if max_workers is None:
            max_workers = _PER_CPU * len(os.sched_getaffinity(0))
        if max_workers < 1:
            raise ValueError("max_workers must be at least 1")
        if capture_output:
            if stdout is not None or stderr is not None:
                raise ValueError("capture_output excludes stdout and stderr")
            stdout = stderr = subprocess.PIPE
        self._place = place
        self._commands = iter(commands)
        self._most = max_workers
        self._ordered = ordered
        self._text = bool(text or encoding or errors)
        self._encoding = encoding or "locale"
        self._errors = errors or "strict"
        self._input = input
        self._timeout = timeout
        self._max_output = max_output
        self._spool = spool
        self._shell = shell
        self._stdout = stdout
        self._stderr = stderr
        self._options: dict[str, Any] = {
            "cwd": cwd,
            "env": env,
            "umask": umask,
            "start_new_session": start_new_session,
            "process_group": process_group,
            "restore_signals": restore_signals,
        }
        if self._text and self._encoding == "locale":
            import locale  # noqa: PLC0415

            self._encoding = locale.getpreferredencoding(False)
        self._common: tuple[bytes, list[bytes]] | None = None  # of commands without own options
        self._fds: list[int] = []
        self._own_fds: list[int] = []
        self._ahead = max(_LEAST_AHEAD, 4 * max_workers)
        self._given = 0  # commands taken from the iterator
        self._taken = 0  # results that the caller has
        self._exhausted = False
        self.lines: dict[int, _Line] = {}
        self._idle: list[_Line] = []
        self._waiting: deque[_Job] = deque()  # to be started again, elsewhere
        self._results: dict[int, Result] = {}
        self._done: deque[Result] = deque()

    # -- the driver's side --

    def fill(self) -> None:
        """Start what may be started."""
        while len(self.lines) - len(self._idle) < self._most:
            job = self._waiting.popleft() if self._waiting else self._next()
            if job is None:
                return
            self._start(job)

    def pending(self) -> bool:
        """Return whether there is anything to wait for."""
        return len(self.lines) > len(self._idle)

    def results(self) -> Iterator[Result]:
        """Take the results that are ready."""
        while self._done:
            self._taken += 1
            yield self._done.popleft()
        while self._ordered and self._taken in self._results:
            result = self._results.pop(self._taken)
            self._taken += 1
            yield result

    def deadline(self) -> float | None:
        """Return when (time.monotonic) the next command's time is up."""
        ends = [
            job.begun + job.timeout
            for line in self.lines.values()
            if (job := line.job) is not None and job.timeout is not None and not job.timed_out
        ]
        return min(ends) if ends else None

    def on_time(self) -> None:
        """End the commands whose time is up."""
        now = time.monotonic()
        for line in list(self.lines.values()):
            job = line.job
            if job is None or job.timeout is None or job.timed_out:
                continue
            if now >= job.begun + job.timeout:
                job.timed_out = True
                self._send(line, _KILL)

    def on_ready(self, fd: int) -> None:
        """Move data over a line."""
        line = self.lines.get(fd)
        if line is None:
            return
        if line.unsent:
            self._send(line, b"")
        try:
            data = line.sock.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(line)
            return
        self._receive(line, data)

    def close(self) -> None:
        """End what still runs: its process group, or it alone, gets SIGTERM, and SIGKILL later."""
        for line in self.lines.values():
            if line.job is None and not line.rest:
                line.lender.release(line.connection)
            else:
                line.connection.close()
        self.lines.clear()
        self._idle.clear()
        self._close_own_fds()

    # -- starting --

    def _next(self) -> _Job | None:
        if self._exhausted or self._given - self._taken >= self._ahead:
            return None
        try:
            command = next(self._commands)
        except StopIteration:
            self._exhausted = True
            return None
        index = self._given
        self._given += 1
        try:
            return self._job(index, command)
        except (OSError, ValueError, TypeError) as error:
            if not isinstance(error, OSError):
                raise
            args = command["args"] if isinstance(command, Mapping) else command
            self._finish(_Job(index, args, b""), _failed(args, error))
            return self._next()

    def _job(self, index: int, command: Command) -> _Job:
        if self._place.changed(time.monotonic()):
            self._common = None
        options, input, timeout, shell = self._options, self._input, self._timeout, self._shell
        if isinstance(command, Mapping):
            given = dict(command)
            args = given.pop("args")
            input = given.pop("input", input)
            timeout = given.pop("timeout", timeout)
            shell = given.pop("shell", shell)
            unknown = given.keys() - options.keys()
            if unknown:
                raise TypeError(f"a command's mapping has no option {', '.join(sorted(unknown))}")
            tail, path = self._template({**options, **given}, input is not None)
        else:
            args = command
            if self._common is None:
                self._common = self._template(options, input is not None)
            tail, path = self._common
        argv = _arguments(args, shell)
        job = _Job(index, args, _spawn(argv, path, tail))
        if input is not None:
            if isinstance(input, str):
                input = input.encode(self._encoding if self._text else "utf-8", self._errors)
            job.input = memoryview(input)
        job.timeout = timeout
        wanted = (self._stdout == subprocess.PIPE, self._stderr == subprocess.PIPE)
        job.outputs = (
            _Output(self._max_output, self._spool) if wanted[0] else None,
            _Output(self._max_output, self._spool) if wanted[1] else None,
        )
        job.streams = sum(wanted)
        job.shell = shell
        return job

    def _template(self, options: Mapping[str, Any], with_input: bool) -> tuple[bytes, list[bytes]]:
        """Return the options that a SPAWN has besides its arguments, and where programs are."""
        parts: list[bytes] = [protocol.option(lib.EB_TAG_BRIEF)]
        flags = lib.EB_WITHOUT_STANDARD
        flags |= lib.EB_RESTORE_SIGNALS if options["restore_signals"] else 0
        env = options["env"]
        if env is None:
            flags |= lib.EB_WITH_ENVIRONMENT
        else:
            parts.append(protocol.strings(lib.EB_TAG_ENV, environment(env)))
        if options["cwd"] is not None:
            parts.append(protocol.string(lib.EB_TAG_CWD, os.fsencode(options["cwd"])))
        if options["umask"] >= 0:
            parts.append(protocol.number(lib.EB_TAG_UMASK, options["umask"]))
            flags |= lib.EB_UMASK_GIVEN
        group = options["process_group"]
        if options["start_new_session"]:
            parts.append(protocol.option(lib.EB_TAG_SETSID))
        elif group is not None and group >= 0:
            parts.append(protocol.number(lib.EB_TAG_PGROUP, group))
        elif isinstance(self._place, _There):
            parts.append(protocol.number(lib.EB_TAG_PGROUP, 0))
        else:
            flags |= lib.EB_WITH_PGROUP
        streams = 1 if with_input else 0
        nulls = 0 if with_input else 1
        standard = [-1, -1, -1]
        for number, wanted in ((1, self._stdout), (2, self._stderr)):
            if wanted == subprocess.PIPE:
                streams |= 1 << number
            elif wanted == subprocess.DEVNULL:
                nulls |= 1 << number
            elif wanted == subprocess.STDOUT and number == 2:
                if streams & 2:
                    streams |= 8
                elif nulls & 2:
                    nulls |= 4
                else:
                    standard[2] = standard[1]
            elif wanted is None:
                standard[number] = number
            else:
                standard[number] = wanted if isinstance(wanted, int) else wanted.fileno()
        if streams:
            parts.append(protocol.option(lib.EB_TAG_STREAMS, bytes([streams])))
        parts.append(protocol.option(lib.EB_TAG_NULL, bytes([nulls])))
        request = Request(b"".join(parts), (standard[0], standard[1], standard[2]), (), flags)
        frame, fds = self._place.prepare(request)
        self._close_own_fds()
        self._fds = fds
        if isinstance(self._place, _There):
            self._own_fds = fds[-1:]
        path = [os.fsencode(directory) for directory in os.get_exec_path(env)]
        return frame[_HEADER.size :], path

    def _close_own_fds(self) -> None:
        while self._own_fds:
            os.close(self._own_fds.pop())

    def _start(self, job: _Job) -> None:
        while True:
            line = self._idle.pop() if self._idle else self._place.connect()
            self.lines[line.fd] = line
            line.job = job
            job.begun = time.monotonic()
            data = job.frame
            if job.input is not None:
                data += self._input_frames(job)
            if self._send(line, data, self._fds):
                return
            self._drop(line)

    def _input_frames(self, job: _Job) -> bytes:
        assert job.input is not None
        now, rest = job.input[: job.window], job.input[job.window :]
        frames = _HEADER.pack(len(now), lib.EB_STDIN) + now if now else b""
        job.window -= len(now)
        job.input = rest if rest else None
        return frames if rest else frames + _END_OF_INPUT

    def _send(self, line: _Line, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send, or keep what the socket does not take; return whether there is still a helper."""
        data = line.unsent + data
        try:
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
                sent = line.sock.sendmsg([data], rights, _FLAGS)
            else:
                sent = line.sock.send(data, _FLAGS)
        except BlockingIOError:
            # Never with descriptors: they go first over a line on which nothing is on its way.
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            return False
        line.unsent = data[sent:]
        return True

    # -- receiving --

    def _receive(self, line: _Line, data: bytes) -> None:
        if line.rest:
            data = line.rest + data
        at, end = 0, len(data)
        while end - at >= 5:
            length, kind = _HEADER.unpack_from(data, at)
            stop = at + 5 + length
            if stop > end:
                break
            self._frame(line, kind, data[at + 5 : stop])
            at = stop
        line.rest = data[at:]

    def _frame(self, line: _Line, kind: int, payload: bytes) -> None:
        job = line.job
        if kind == lib.EB_HELLO:
            line.connection.greet(payload)
            return
        if kind == lib.EB_REFUSED:
            reason = payload.decode("utf-8", "replace")
            raise ProtocolError(errno.EPROTO, f"the helper refused: {reason}")
        if job is None:
            raise ProtocolError(errno.EPROTO, f"frame {kind} while no command runs")
        if kind in (lib.EB_STDOUT, lib.EB_STDERR):
            output = job.outputs[kind - lib.EB_STDOUT]
            if not payload:
                job.streams -= 1
            elif output is not None:
                output.add(payload)
        elif kind == lib.EB_EXITED:
            job.status, *usage = protocol.EXITED.unpack(payload)
            job.usage = tuple(usage)
        elif kind == lib.EB_CREDIT:
            job.window += int.from_bytes(payload, "little")
            if job.input is not None:
                self._send(line, self._input_frames(job))
        elif kind == lib.EB_FAILED:
            failed = protocol.reply(kind, payload)
            assert isinstance(failed, protocol.Failed)
            self._over(line, _failed(job.args, failure(failed, *_names(job, self._options))))
            return
        if job.status is not None and (job.streams == 0 or job.timed_out):
            self._over(line, self._ended(job), keep=job.streams == 0)

    def _ended(self, job: _Job) -> Result:
        assert job.status is not None
        result = Result(job.args, os.waitstatus_to_exitcode(job.status))
        result._usage = job.usage
        self._put_output(result, job)
        if job.timed_out:
            result.error = subprocess.TimeoutExpired(
                job.args, job.timeout or 0, result.stdout, result.stderr
            )
        return result

    def _put_output(self, result: Result, job: _Job) -> None:
        for name, output in zip(("stdout", "stderr"), job.outputs, strict=True):
            if output is None:
                continue
            data: Any = b"".join(output.parts)
            if self._text:
                data = data.decode(self._encoding, self._errors)
                data = data.replace("\r\n", "\n").replace("\r", "\n")
            setattr(result, name, data)
            result.truncated = result.truncated or output.truncated
            if output.file is not None:
                output.file.seek(0)
                setattr(result, f"{name}_file", output.file)

    def _over(self, line: _Line, result: Result, keep: bool = True) -> None:
        job = line.job
        assert job is not None
        line.job = None
        if keep and not line.unsent:
            self._idle.append(line)
        else:
            self._drop(line)
        self._finish(job, result)

    def _finish(self, job: _Job, result: Result) -> None:
        result.duration = time.monotonic() - job.begun if job.begun else 0.0
        if self._ordered:
            self._results[job.index] = result
        else:
            self._done.append(result)

    def _drop(self, line: _Line) -> None:
        self.lines.pop(line.fd, None)
        if line in self._idle:
            self._idle.remove(line)
        line.connection.close()

    def _lost(self, line: _Line) -> None:
        job = line.job
        self._drop(line)
        if job is None:
            return
        if not line.connection.greeted:
            self._waiting.append(job)  # nobody has read the request
            return
        error = HelperDiedError(
            errno.EPIPE, "errand-boy's helper ended: the command may have been started"
        )
        result = Result(job.args, -signal.SIGKILL)
        result.error = error
        self._put_output(result, job)
        self._finish(job, result)


def _arguments(args: Any, shell: bool) -> list[bytes]:
    if isinstance(args, (str, bytes, os.PathLike)):
        args = [args]
    argv = [os.fsencode(arg) for arg in args]
    return [b"/bin/sh", b"-c", *argv] if shell else argv


def _names(job: _Job, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the program and the directory, for an error."""
    args = job.args
    if isinstance(args, Mapping):
        options = {**options, **args}
        args = args["args"]
    if job.shell:
        return "/bin/sh", options["cwd"]
    program = args if isinstance(args, (str, bytes, os.PathLike)) else next(iter(args))
    return program, options["cwd"]


def _spawn(argv: list[bytes], path: list[bytes], tail: bytes) -> bytes:
    if not argv:
        raise ValueError("a command needs at least one argument")
    name = argv[0]
    programs = [name] if b"/" in name else [os.path.join(part, name) for part in path]
    parts = (
        protocol.strings(lib.EB_TAG_ARGV, argv),
        protocol.strings(lib.EB_TAG_EXECUTABLES, programs),
        tail,
    )
    return protocol.frame(lib.EB_SPAWN, parts)


def _failed(args: Any, error: OSError) -> Result:
    result = Result(args, 127 if error.errno == errno.ENOENT else 126)
    result.error = error
    return result


def drive(batch: Batch, check: bool = False) -> Iterator[Result]:
    """Run a batch, and yield its results."""
    poll = select.poll()
    watched: dict[int, int] = {}
    try:
        while True:
            batch.fill()
            for result in batch.results():
                if check:
                    result.check_returncode()
                yield result
                batch.fill()
            if not batch.pending():
                return
            for fd, line in batch.lines.items():
                events = select.POLLIN | select.POLLOUT if line.unsent else select.POLLIN
                if watched.get(fd) != events:
                    poll.register(fd, events)
                    watched[fd] = events
            deadline = batch.deadline()
            rest = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            for fd, _ in poll.poll(rest):
                batch.on_ready(fd)
                if fd not in batch.lines:
                    poll.unregister(fd)
                    del watched[fd]
            if deadline is not None:
                batch.on_time()
    finally:
        batch.close()


def map(
    commands: Iterable[Command],
    *,
    check: bool = False,
    progress: bool = False,
    client: Client | None = None,
    **options: Any,
) -> Iterator[Result]:
    """Run commands, many at once, and yield a Result for each.

    `commands`: argument lists, or with ``shell=True`` strings, or mappings with `args` and, for
    that command, `input`, `timeout`, `shell`, `cwd`, `env`, `umask`, `start_new_session`,
    `process_group`, `restore_signals`. They are taken as results are: an endless iterator will do.

    `max_workers`: how many run at once; by default four for each CPU.
    `ordered`: results come in the order of the commands, else as the commands end.
    `capture_output`, `stdout`, `stderr`, `text`, `encoding`, `errors`, `input`, `timeout`: as
    subprocess.run has them; standard input is /dev/null without `input`.
    `max_output`: bytes of each output that are kept; with `spool`, all of a longer one is in a
    temporary file.
    `check`: raise at the first Result that is no success. Else a command that can't be started is a
    Result too. `progress`: show a bar on a terminal, if tqdm is installed.

    The environment, the limits and so on are those of the first command's start. Closing the
    iterator ends what runs. Raises HelperError if there is no helper.
    """
    place = _Here() if client is None else _There(client)
    results = drive(Batch(place, commands, **options), check)
    if progress and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm  # noqa: PLC0415

            total = len(commands) if isinstance(commands, Sized) else None
            return iter(tqdm(results, total=total, unit="command"))
    return results
