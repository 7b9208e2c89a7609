"""Many commands at once: their pipes, their waiting and their reaping are the helper's work."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from heapq import heappop, heappush

import errand_boy
from errand_boy import _helper, _request, _wire
from errand_boy._connection import Connection
from errand_boy._frame import MOST_ATTEMPTS, Caller, acquire
from errand_boy._native import lib
from errand_boy._request import Request
from errand_boy.errors import ErrandBoyError, HelperDiedError, ProtocolError, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from errand_boy._client import Client
    from errand_boy._helper import Helper

    Command: TypeAlias = "Sequence[Any] | str | bytes | os.PathLike[Any] | Mapping[str, Any]"

NOT_NOW = object()  # from an iterator of commands: none yet, though more may come

_CHUNK = 1 << 17  # bytes, above those of any single frame of output
_RECHECK = 0.005  # seconds for which what else a helper must fit is taken to be unchanged
_LEAST_AHEAD = 64  # commands
_PER_CPU = 4  # workers
_GRACE = 1000  # milliseconds from SIGTERM to SIGKILL
_MOST_PROGRAMS = 1000  # of which a template keeps what their requests have in common

# lib's attributes take several times as long to look up.
_SPAWN, _STDIN, _SIGNAL = lib.EB_SPAWN, lib.EB_STDIN, lib.EB_SIGNAL
_STDOUT, _STDERR, _EXITED, _CREDIT = lib.EB_STDOUT, lib.EB_STDERR, lib.EB_EXITED, lib.EB_CREDIT
_WINDOW, _MOST = lib.EB_WINDOW, lib.EB_MAX_FRAME
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_DONTWAIT = socket.MSG_DONTWAIT
_WITH_FS = lib.EB_WITH_CWD | lib.EB_WITH_UMASK
_HEADER = _wire.HEADER
_HEADER_SIZE = _HEADER.size
_BEGINNING = struct.Struct("<IBBII")  # of a SPAWN frame, up to its arguments
_ARGV = lib.EB_TAG_ARGV
_USAGE_SIZE = _wire.EXITED.size
_TOOK = struct.Struct("<Q")  # at the end of a brief command's EXITED
_END_OF_INPUT = _HEADER.pack(0, _STDIN)
_PLAIN = (list, tuple)
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


class Result(subprocess.CompletedProcess):  # type: ignore[type-arg]
    """What became of one command of `map`.

    `args`, `returncode`, `stdout` and `stderr` are those of subprocess.CompletedProcess, and

    `index`: which command it was, from 0.
    `error`: None, or why there is no ordinary end: the OSError or ValueError for which the command
    could not be started (`returncode` is then 127 if it was not found, else 126),
    subprocess.TimeoutExpired, UnicodeError (the output is then bytes), or HelperDiedError
    (`returncode` is then -9, and may not be the command's).
    `started`: seconds since 1970, and `duration`: seconds from the start to the end.
    `rusage`: a resource.struct_rusage, or None if it did not end by itself or by a signal.
    `truncated`: whether output is missing, for `max_output`.
    `stdout_file`, `stderr_file`: where all output is, if it was spooled; temporary files.
    """

    index = 0
    error: Exception | None = None
    duration = 0.0
    truncated = False
    stdout_file: Any = None
    stderr_file: Any = None
    _begun = 0.0  # of the monotonic clock
    _usage = b""  # an EXITED's

    @property
    def started(self) -> float:
        """When the command was started."""
        return time.time() - time.monotonic() + self._begun

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What the command, and the children it waited for, have used."""
        return _wire.rusage(_wire.EXITED.unpack_from(self._usage)[1:]) if self._usage else None

    def check_returncode(self) -> None:
        """Raise `error`, or CalledProcessError if the return code is not 0."""
        if self.error is not None:
            raise self.error
        super().check_returncode()


class _Output:
    """One stream's output so far."""

    __slots__ = ("data", "file", "room", "spool", "truncated")

    def __init__(self, most: int | None, spool: bool) -> None:
        self.data: bytes | bytearray = b""
        self.room = sys.maxsize if most is None else most
        self.spool = spool
        self.truncated = False
        self.file: Any = None

    def add(self, data: bytes) -> None:
        size = len(data)
        if self.file is not None:
            self.file.write(data)
        elif size > self.room and self.spool:
            from tempfile import TemporaryFile  # noqa: PLC0415

            self.file = TemporaryFile()
            self.file.writelines([self.data, data])
        if size > self.room:
            data = data[: self.room]
            self.truncated = not self.spool
        self.room -= len(data)
        if not self.data:
            self.data = data
        elif isinstance(self.data, bytearray):
            self.data += data
        else:
            self.data = bytearray(self.data + data)

    def text(self, encoding: str, errors: str) -> str:
        """Return it as subprocess has text, but for a character that was cut."""
        from codecs import getincrementaldecoder  # noqa: PLC0415

        whole = self.file is None and not self.truncated
        text = getincrementaldecoder(encoding)(errors).decode(bytes(self.data), whole)
        return text.replace("\r\n", "\n").replace("\r", "\n")


class _Job:
    __slots__ = (
        "args",
        "argv",
        "attempts",
        "begun",
        "given",
        "index",
        "input",
        "options",
        "outputs",
        "pid",
        "shell",
        "status",
        "streams",
        "timed_out",
        "timeout",
        "unasked",
        "usage",
        "window",
    )

    def __init__(self, index: int, args: Any) -> None:
        self.index = index
        self.args = args
        self.argv: Sequence[Any] = ()
        self.options: Mapping[str, Any] | None = None  # its own
        self.input: memoryview | None = None
        self.shell = False
        self.timeout: float | None = None
        self.attempts = 0
        self.begun = 0.0
        self.usage = b""

    def begin(self, streams: int) -> None:
        """Be as before anything was sent or received."""
        self.attempts += 1
        self.outputs: list[_Output | None] = [None, None]
        self.streams = streams  # outputs that have not ended
        self.status: int | None = None
        self.window = _WINDOW
        self.given = 0  # bytes of the input
        self.unasked = 0  # bytes of the request that the socket has not taken
        self.timed_out = False
        self.pid = 0  # unless it is brief


class Channel:
    """A connection, and the command that runs over it."""

    __slots__ = ("connection", "fd", "generation", "job", "rest", "sock", "unsent")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sock = connection.sock
        self.fd = connection.sock.fileno()
        self.generation = 0
        self.job: _Job | None = None
        self.rest = b""  # of a frame that has not come whole
        self.unsent = b""


class LocalSource:
    """Commands by a helper of this process's own."""

    _helper: Helper | None = None
    _ids: tuple[Any, ...] = ()
    _checked = 0.0

    def changed(self) -> bool:
        """Have a helper that fits this process; return whether it is another than before."""
        # Ids are compared at each start. The rest (capabilities, limits, session, ...) takes 15 µs.
        ids = (os.getresuid(), os.getresgid(), os.getgroups())
        helper, now = _helper.runner.current, time.monotonic()
        if (
            self._helper is helper is not None
            and ids == self._ids
            and now - self._checked < _RECHECK
        ):
            return False
        while helper is None or not helper.fits(None):
            _helper.runner.start()
            before, helper = helper, _helper.runner.current
            if helper is not before:  # it has just been found to fit
                break
        if helper is not None:
            helper.owns_children = True
        before, self._helper = self._helper, helper
        self._ids, self._checked = ids, now
        return before is not helper

    def state(self) -> tuple[Caller | None, int, int]:
        """Return what a request's `prepare` is given of the helper, and the flags it needs."""
        helper = self._helper
        assert helper is not None
        return (helper.caller, helper.pid, 0) if helper.shares_fs else (helper.caller, 0, _WITH_FS)

    def connect(self) -> Channel | None:
        """Return a new line; None if the helper has gone."""
        helper = self._helper
        if helper is None:
            return None
        try:
            connection: Connection | None = helper.idle.pop()
        except IndexError:
            connection = helper.connect()
        if connection is None:
            _helper.runner.dismiss(helper)
            return None
        if connection.is_ours():
            return Channel(connection)
        connection.close()
        return None


class DaemonSource:
    """Commands by a daemon."""

    _ids: tuple[int, int] | None = None

    def __init__(self, client: Client) -> None:
        self._client = client

    def changed(self) -> bool:
        """Return whether the daemon may see another user than before."""
        before, self._ids = self._ids, (os.geteuid(), os.getegid())
        return before != self._ids

    def state(self) -> tuple[Caller | None, int, int]:
        return None, 0, _WITH_FS

    def connect(self) -> Channel | None:
        return Channel(self._client.connection())


class _Template:
    """What the requests of commands with the same options have in common."""

    __slots__ = ("fds", "options", "path", "programs")

    def __init__(self, options: bytes, fds: list[int], path: list[bytes]) -> None:
        self.options = options
        self.fds = fds
        self.path = path
        self.programs: dict[Any, bytes] = {}

    def frame(self, argv: Sequence[Any]) -> bytes:
        """Return a SPAWN frame. Raises ValueError, TypeError and OSError (E2BIG)."""
        program = argv[0]
        common = self.programs.get(program)
        if common is None:
            common = self._common(os.fsencode(program))
            if len(self.programs) < _MOST_PROGRAMS:
                self.programs[program] = common
        try:
            if type(program) is bytes:
                text = b"\0".join(argv) + b"\0"
            else:
                text = "\0".join(argv).encode(_ENCODING, _ERRORS) + b"\0"
        except TypeError:
            text = b"\0".join([os.fsencode(arg) for arg in argv]) + b"\0"
        if text.count(0) != len(argv):
            raise ValueError("embedded null byte")
        # ARGV's own header, then the others.
        size = 9 + len(text) + len(common)
        if size > _MOST:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        return _BEGINNING.pack(size, _SPAWN, _ARGV, len(text) + 4, len(argv)) + text + common

    def _common(self, name: bytes) -> bytes:
        return _request.programs(name, lambda: self.path) + self.options


def _kill(pid: int) -> bytes:
    return _HEADER.pack(8, _SIGNAL) + struct.pack("<ii", pid, signal.SIGKILL)


def _unwatched(*_: Any) -> None:
    pass


class Batch:
    """The commands of one `map`: those that run, and the results that nobody has taken yet.

    A driver sets `watch` and `unwatch`, and waits for what they name to be readable, or writable
    too where `watch` says so, for `patience()` seconds at most; it then calls `on_ready` for what
    is ready, and `on_time`. `fill` starts commands, `take` takes a result, and there is none to
    come any more when `pending` says so after that.
    """

    def __init__(
        self,
        place: LocalSource | DaemonSource,
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
        if max_output is not None and max_output < 0:
            raise ValueError("max_output must not be negative")
        if stdout is not None or stderr is not None:
            capture_output = False
        elif capture_output:
            stdout = stderr = subprocess.PIPE
        self.watch: Callable[[int, bool], Any] = _unwatched
        self.unwatch: Callable[[int], Any] = _unwatched
        self.on_result: Callable[[Result], Any] | None = None  # called before its turn
        self._owner = os.getpid()
        self._place = place
        self._commands = iter(commands)
        self._most = max_workers
        self._ordered = ordered
        self._text = bool(text or encoding or errors)
        self._nothing: Any = "" if self._text else b""
        self._encoding = encoding or "locale"
        self._errors = errors or "strict"
        self._input = input
        self._timeout = timeout
        self._max_output = max_output
        self._spool = spool
        self._shell = shell
        self._stdout = stdout
        self._stderr = stderr
        self._captured = (stdout == subprocess.PIPE, stderr == subprocess.PIPE)
        self._streams = sum(self._captured)
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
        self._templates: dict[tuple[bool, bool], _Template] = {}
        self._cwd_fd = -1
        self._ahead = max(_LEAST_AHEAD, 4 * max_workers)
        self._given = 0  # commands taken from the iterator
        self._taken = 0  # results that the caller has
        self._failure: Exception | None = None  # of the iterator's, for when its turn comes
        self._exhausted = False
        self._lines: dict[int, Channel] = {}
        self._idle: list[Channel] = []
        self._generation = 0  # of lines
        self._live = 0
        self._waiting: deque[_Job] = deque()  # to be started again, elsewhere
        self._ends: list[tuple[float, int, Channel, _Job]] = []  # a heap of deadlines
        self._serial = itertools.count()
        self._results: dict[int, Result] = {}
        self._done: deque[Result] = deque()
        # recv() would allocate as much each time, which may be a system call or three.
        self._buffer = memoryview(bytearray(_CHUNK))

    # -- the driver's side --

    def fill(self) -> None:
        """Start what may be started."""
        if self._owner != os.getpid():
            text = "another process started the commands, before a fork"
            raise ChildProcessError(errno.ECHILD, text)
        while self._live < self._most:
            job = self._waiting.popleft() if self._waiting else self._next()
            if job is None:
                return
            self._start(job)

    def pending(self) -> bool:
        """Return whether there is anything to wait for.

        Raises what the iterator of commands raised, once the results of those before it are taken.
        """
        if self._live:
            return True
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return not self._exhausted

    def take(self) -> Result | None:
        """Return a result if one is ready."""
        if not self._ordered:
            if not self._done:
                return None
            result = self._done.popleft()
        elif self._taken in self._results:
            result = self._results.pop(self._taken)
        else:
            return None
        self._taken += 1
        return result

    def finished(self) -> Iterator[Result]:
        """Take all results that are there, out of their turn."""
        while self._done:
            yield self._done.popleft()
        for index in sorted(self._results):
            yield self._results.pop(index)

    def patience(self) -> float | None:
        """Return for how many seconds `on_time` need not be called; None: for ever."""
        ends = self._ends
        while ends and ends[0][2].job is not ends[0][3]:
            heappop(ends)
        return max(0.0, ends[0][0] - time.monotonic()) if ends else None

    def on_time(self) -> None:
        """End the commands whose time is up."""
        ends = self._ends
        while ends and (ends[0][2].job is not ends[0][3] or ends[0][0] <= time.monotonic()):
            _, _, line, job = heappop(ends)
            if line.job is not job:
                continue
            job.timed_out = True
            if job.status is None:
                self._send(line, _kill(-job.pid) + _kill(job.pid))  # it may lead no group
            else:  # it has left others that hold its output
                self._over(line, self._ended(job), keep=False)

    def on_ready(self, fd: int) -> None:
        """Move data over a line."""
        line = self._lines.get(fd)
        if line is None:
            return
        if line.unsent and self._send(line, b"") and not line.unsent:
            self.watch(fd, False)
        try:
            size = line.sock.recv_into(self._buffer, 0, _DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(line, error)
            return
        if size:
            self._receive(line, self._buffer[:size])
        else:
            self._lost(line, None)

    def stop(self) -> None:
        """Take no more commands; what runs may end."""
        self._exhausted = True
        self._waiting.clear()

    def close(self) -> None:
        """End what still runs: its process group gets SIGTERM, and SIGKILL a second later."""
        for line in list(self._lines.values()):
            self.unwatch(line.fd)
            if line.job is None and not line.rest and line.generation == self._generation:
                line.connection.give_back()
            else:
                line.connection.close()
        self._lines.clear()
        self._idle.clear()
        self._forget_templates()

    # -- starting --

    def _next(self) -> _Job | None:
        """Return the next command, unless there is none, or enough of them are ahead."""
        while not self._exhausted and self._given - self._taken < self._ahead:
            try:
                command: Any = next(self._commands)
                if command is NOT_NOW:
                    return None
                job = self._job(command)
            except StopIteration:
                self._exhausted = True
                return None
            except Exception as error:  # those before it have their results first
                self._exhausted = True
                self._failure = error
                return None
            self._given += 1
            return job
        return None

    def _job(self, command: Command) -> _Job:
        given: dict[str, Any] = {}
        plain = type(command) in _PLAIN  # else the checks take a microsecond
        if not plain and isinstance(command, Mapping):
            given = dict(command)
            try:
                args = given.pop("args")
            except KeyError:
                raise TypeError("a command's mapping needs args") from None
        else:
            args = command
        job = _Job(self._given, args)
        job.shell = given.pop("shell", self._shell) if given else self._shell
        job.timeout = given.pop("timeout", self._timeout) if given else self._timeout
        input = given.pop("input", self._input) if given else self._input
        if input is not None:
            if self._text:
                input = input.encode(self._encoding, self._errors)
            job.input = memoryview(input).cast("B")
        if given:
            unknown = given.keys() - self._options.keys()
            if unknown:
                raise TypeError(f"a command's mapping has no option {', '.join(sorted(unknown))}")
            job.options = {**self._options, **given}
        if plain and not job.shell:
            job.argv = args
        else:
            job.argv = _request.arguments(args, job.shell)
        return job

    def _template(self, options: Mapping[str, Any], with_input: bool, brief: bool) -> _Template:
        group = options["process_group"]
        settings, flags = _request.settings(
            **{**options, "process_group": -1 if group is None else group},
            default_group=0,  # its own, so that nothing of it is left where it is ended
        )
        stdin = subprocess.PIPE if with_input else subprocess.DEVNULL
        _, streams, standard = _request.made_by_helper(stdin, self._stdout, self._stderr)
        common = _wire.number(lib.EB_TAG_ON_CLOSE, _GRACE) + settings + streams
        if brief:
            common += _wire.option(lib.EB_TAG_BRIEF)
        flags |= lib.EB_WITHOUT_STANDARD
        start, helper, with_fs = self._place.state()
        flags |= with_fs
        request = Request(common, standard, (), flags)
        spawn_frame = acquire()
        try:
            spawn_frame.prepare(request, start, helper, 0, None)
            tail, fds = bytes(spawn_frame.rest[_HEADER_SIZE:]), spawn_frame.fds
            if flags & lib.EB_WITH_CWD:
                if self._cwd_fd < 0:
                    self._cwd_fd = os.dup(fds[-1])
                fds[-1] = self._cwd_fd
        finally:
            spawn_frame.done()
        return _Template(tail, fds, _request.exec_path(options["env"]))

    def _forget_templates(self) -> None:
        self._templates.clear()
        if self._cwd_fd >= 0:
            os.close(self._cwd_fd)
            self._cwd_fd = -1

    def _template_of(self, job: _Job) -> _Template:
        # The time of one that waits for its turn in a daemon begins with the news of its start.
        key = job.input is not None, job.timeout is None
        if job.options is not None:
            return self._template(job.options, *key)
        template = self._templates.get(key)
        if template is None:
            template = self._templates[key] = self._template(self._options, *key)
        return template

    def _start(self, job: _Job) -> None:
        while job.attempts < MOST_ATTEMPTS:
            if self._place.changed():
                self._renew()
            job.begin(self._streams)
            job.begun = time.monotonic()
            template = None
            try:
                template = self._template_of(job)
                data = template.frame(job.argv)
                line = self._idle.pop() if self._idle else self._place.connect()
            except (OSError, ValueError, IndexError) as error:
                if isinstance(error, ErrandBoyError):
                    raise
                if template is None and job.options is None and isinstance(error, ValueError):
                    raise  # it is wrong for all of them
                if not self._put_off(job, error):
                    self._finish(job, self._failed(job, error))
                return
            if line is None:
                continue
            if line.fd not in self._lines:
                line.generation = self._generation
                self._lines[line.fd] = line
                self.watch(line.fd, False)
            line.job = job
            self._live += 1
            if job.input is not None:
                size = len(data)
                data += self._input_frames(job)
                job.unasked = size
            if self._send(line, data, template.fds):
                return
            line.job = None
            self._live -= 1
            self._drop(line)
        raise _helper.ends_at_once()

    def _put_off(self, job: _Job, error: Exception) -> bool:
        """Go on with fewer at once, if it is descriptors that are short."""
        if not self._live or getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
            return False
        self._most = self._live
        self._waiting.append(job)
        return True

    def _renew(self) -> None:
        """Let go of what belongs to a former helper, or to who this process was."""
        self._generation += 1
        while self._idle:
            self._drop(self._idle.pop())
        self._forget_templates()

    def _input_frames(self, job: _Job) -> bytes:
        """Return as much of the input as may be sent now."""
        assert job.input is not None
        now = job.input[job.given : job.given + job.window]
        frames = _HEADER.pack(len(now), _STDIN) + now if now else b""
        job.window -= len(now)
        job.given += len(now)
        return frames if job.given < len(job.input) else frames + _END_OF_INPUT

    def _send(self, line: Channel, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send, or keep what the socket does not take; return whether there is still a helper."""
        if line.unsent:
            data = line.unsent + data
        try:
            if fds:
                # Never kept for later: nothing else is on its way over a line when a job begins.
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
                sent = line.sock.sendmsg([data], rights, _FLAGS)
            else:
                sent = line.sock.send(data, _FLAGS)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            return False
        job = line.job
        if sent == len(data):
            line.unsent = b""
            if job is not None:
                job.unasked = 0
            return True
        if not line.unsent:
            self.watch(line.fd, True)
        line.unsent = data[sent:]
        if job is not None:
            job.unasked = max(0, job.unasked - sent)
        return True

    # -- receiving --

    def _receive(self, line: Channel, data: memoryview) -> None:
        if line.rest:
            data = memoryview(line.rest + data)
        at, end, job = 0, len(data), line.job
        while end - at >= _HEADER_SIZE:
            length, kind = _HEADER.unpack_from(data, at)
            begin = at + _HEADER_SIZE
            at = begin + length
            if at > end:
                at = begin - _HEADER_SIZE
                break
            if job is None:
                self._stray(line, kind, bytes(data[begin:at]))
            elif kind in (_STDOUT, _STDERR):
                if length == 0:
                    job.streams -= 1
                else:
                    number = kind - _STDOUT
                    output = job.outputs[number]
                    if output is None:
                        output = job.outputs[number] = _Output(self._max_output, self._spool)
                    output.add(bytes(data[begin:at]))
            elif kind == _EXITED:
                job.usage = bytes(data[begin:at])
                job.status = int.from_bytes(job.usage[:4], "little")
            else:
                self._frame(line, job, kind, bytes(data[begin:at]))
                job = line.job
            if job is not None and job.status is not None and (not job.streams or job.timed_out):
                self._over(line, self._ended(job), keep=not job.streams)
                job = None
        line.rest = bytes(data[at:]) if at < end else b""

    def _stray(self, line: Channel, kind: int, payload: bytes) -> None:
        """Take a frame that belongs to no command."""
        if kind == lib.EB_HELLO:
            line.connection.greet(payload)
        elif kind == lib.EB_REFUSED:
            reason = payload.decode("utf-8", "replace")
            if not line.connection.greeted:  # so it is the daemon who speaks
                raise RefusedError(errno.EACCES, f"the daemon refused: {reason}")
            raise ProtocolError(errno.EPROTO, f"the helper refused: {reason}")
        elif kind == lib.EB_UNREAD:  # its end follows
            if line in self._idle:
                self._idle.remove(line)
            self._drop(line)
        elif line.fd in self._lines:  # else what is left of a command that was timed out
            raise ProtocolError(errno.EPROTO, f"frame {kind} while no command runs")

    def _frame(self, line: Channel, job: _Job, kind: int, payload: bytes) -> None:
        if kind == _CREDIT:
            job.window += int.from_bytes(payload, "little")
            if job.input is not None and job.given < len(job.input):
                self._send(line, self._input_frames(job))
        elif kind == lib.EB_FAILED:
            failed = _wire.reply(kind, payload)
            assert isinstance(failed, _wire.Failed)
            options = self._options if job.options is None else job.options
            self._over(
                line, self._failed(job, _wire.spawn_error(failed, job.argv[0], options["cwd"]))
            )
        elif kind == lib.EB_SPAWNED:
            job.pid = int.from_bytes(payload[:4], "little")
            job.begun = time.monotonic()
            if job.timeout is not None:
                end = job.begun + job.timeout
                heappush(self._ends, (end, next(self._serial), line, job))
        elif kind == lib.EB_UNREAD:
            line.job = None
            self._live -= 1
            self._drop(line)
            self._waiting.append(job)
        else:
            self._stray(line, kind, payload)

    def _ended(self, job: _Job) -> Result:
        assert job.status is not None
        status = job.status
        result = Result(job.args, os.waitstatus_to_exitcode(status) if status else 0)
        result._usage = job.usage
        if self._streams:
            self._put_output(result, job)
        if job.timed_out:
            result.error = subprocess.TimeoutExpired(
                job.args, job.timeout or 0, result.stdout, result.stderr
            )
        return result

    def _failed(self, job: _Job, error: Exception) -> Result:
        """Return the result of a command that was not started."""
        if isinstance(error, OSError) and error.errno == errno.E2BIG and not error.filename:
            error = OSError(error.errno, error.strerror, job.argv[0])
        if isinstance(error, IndexError):
            error = ValueError("a command needs at least one argument")
        result = Result(job.args, 127 if isinstance(error, FileNotFoundError) else 126)
        self._put_output(result, job)
        result.error = error
        return result

    def _put_output(self, result: Result, job: _Job) -> None:
        for number, output in enumerate(job.outputs):
            if not self._captured[number]:
                continue
            data = self._nothing
            if output is not None:
                data = output.data
                if output.file is not None:
                    output.file.seek(0)
                    setattr(result, "stderr_file" if number else "stdout_file", output.file)
                result.truncated = result.truncated or output.truncated
                if self._text:
                    try:
                        data = output.text(self._encoding, self._errors)
                    except UnicodeError as error:
                        result.error = error
                if isinstance(data, bytearray):
                    data = bytes(data)
            if number:
                result.stderr = data
            else:
                result.stdout = data

    def _over(self, line: Channel, result: Result, keep: bool = True) -> None:
        job = line.job
        assert job is not None
        line.job = None
        self._live -= 1
        if keep and not line.unsent and line.generation == self._generation:
            self._idle.append(line)
        else:
            self._drop(line)
        self._finish(job, result)

    def _finish(self, job: _Job, result: Result) -> None:
        result.index = job.index
        now = time.monotonic()
        if len(job.usage) > _USAGE_SIZE:
            result.duration = _TOOK.unpack_from(job.usage, _USAGE_SIZE)[0] / 1e6
        else:
            result.duration = now - job.begun
        result._begun = now - result.duration
        if self._ordered:
            self._results[job.index] = result
        else:
            self._done.append(result)
        if self.on_result is not None:
            self.on_result(result)

    def _drop(self, line: Channel) -> None:
        if self._lines.pop(line.fd, None) is not None:
            self.unwatch(line.fd)
        line.connection.close()

    def _lost(self, line: Channel, error: OSError | None) -> None:
        job, line.job = line.job, None
        if job is None and line in self._idle:
            self._idle.remove(line)
        self._drop(line)
        if job is None:
            return
        self._live -= 1
        # The kernel says ECONNRESET where the other side has closed with bytes that it never read:
        # the request, unless more than that had been sent.
        only_asked = job.input is None and not job.timed_out
        reset = isinstance(error, ConnectionResetError) and only_asked
        if reset or job.unasked or not line.connection.greeted:
            self._waiting.append(job)
            return
        result = Result(job.args, -signal.SIGKILL)
        self._put_output(result, job)
        result.error = HelperDiedError(
            errno.EPIPE, "errand-boy's helper ended: the command may have been started"
        )
        self._finish(job, result)


def waiter(batch: Batch) -> Callable[[float | None], Iterable[int]]:
    """Watch what `batch` says; return a function that waits, and returns what is ready."""
    watched: dict[int, bool] = {}
    if hasattr(select, "poll"):
        poll = select.poll()
        only_in, both = select.POLLIN, select.POLLIN | select.POLLOUT
        batch.watch = lambda fd, writing: poll.register(fd, both if writing else only_in)
        batch.unwatch = poll.unregister
        return lambda rest: [fd for fd, _ in poll.poll(None if rest is None else rest * 1000)]

    def wait(rest: float | None) -> Iterable[int]:
        writing = [fd for fd, wanted in watched.items() if wanted]
        readable, writable, _ = select.select(list(watched), writing, [], rest)
        return {*readable, *writable}

    # eventlet has taken it away.
    batch.watch = watched.__setitem__
    batch.unwatch = watched.pop
    return wait


def drive(batch: Batch, check: bool = False) -> Generator[Result, None, None]:
    """Run a batch, and yield its results."""
    wait = waiter(batch)
    try:
        while True:
            batch.fill()
            while (result := batch.take()) is not None:
                if check:
                    result.check_returncode()
                yield result
                batch.fill()
            if not batch.pending():
                return
            for fd in wait(batch.patience()):
                batch.on_ready(fd)
            batch.on_time()
    finally:
        batch.close()


def make(commands: Iterable[Command], client: Client | None = None, **options: Any) -> Batch:
    """Return the batch for `map`'s arguments."""
    return Batch(LocalSource() if client is None else DaemonSource(client), commands, **options)


def map(
    commands: Iterable[Command],
    *,
    check: bool = False,
    progress: bool = False,
    client: Client | None = None,
    **options: Any,
) -> Generator[Result, None, None]:
    """Run commands, many at once, and yield a Result for each.

    `commands`: argument lists, or with ``shell=True`` strings, or mappings with `args` and, for
    that command, `input`, `timeout`, `shell`, `cwd`, `env`, `umask`, `start_new_session`,
    `process_group`, `restore_signals`. They are taken as results are: an endless iterator will do.
    What it raises is raised when the results of the commands before that have been taken.

    `max_workers`: how many run at once; by default four for each CPU.
    `ordered`: results come in the order of the commands, else as the commands end.
    `capture_output`, `stdout`, `stderr`, `text`, `encoding`, `errors`, `input`, `timeout`: as
    subprocess.run has them, but that output is captured unless `stdout` or `stderr` is given or
    `capture_output` is false, and that standard input is /dev/null without `input`.
    `shell`, `cwd`, `env`, `umask`, `start_new_session`, `process_group`, `restore_signals`: as
    Popen has them, for the commands whose mappings say nothing else.
    `max_output`: bytes of each output that are kept; with `spool`, all of a longer one is in a
    temporary file.
    `check`: raise at the first Result that is no success. Else a command that can't be started is a
    Result too. `progress`: show a bar on a terminal, if tqdm is installed.

    Each command leads a process group of its own, unless `process_group` or `start_new_session`
    says otherwise; after its `timeout` that group is killed. Closing the iterator ends what runs:
    its process group gets SIGTERM, and SIGKILL a second later; and so does the end of this process.

    The environment, the limits and so on are those of the first command's start, the working
    directory and umask too if it is a daemon that runs them. A change of this process's ids goes
    for the next command, one of its capabilities for those that are started 5 ms later. In a
    process forked from this one, the iterator raises ChildProcessError.

    Raises HelperError if there is no helper; by a daemon, NoDaemonError and RefusedError.
    """
    if client is None:  # but for ERRAND_BOY_SOCKET, there is none
        client = getattr(errand_boy.Popen, "_client", None)
    results = drive(make(commands, client, **options), check)
    if progress and sys.stderr is not None and sys.stderr.isatty():
        total = len(commands) if isinstance(commands, Sized) else None
        with contextlib.suppress(ImportError):
            return _with_bar(results, total)
    return results


def _with_bar(
    results: Generator[Result, None, None], total: int | None
) -> Generator[Result, None, None]:
    from tqdm import tqdm  # noqa: PLC0415

    def counted() -> Generator[Result, None, None]:
        with tqdm(total=total, unit="command") as bar, contextlib.closing(results):
            for result in results:
                bar.update()
                yield result

    return counted()
