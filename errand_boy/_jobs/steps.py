"""A client's operations on jobs, as generators that yield what they wait for.

A generator yields a Wait, and is continued after it. Those of `follow` and `attach` also yield
events. `blocking` waits by blocking its thread, `aio` in its loop.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

from errand_boy._descriptors import above_standard
from errand_boy._jobs import follow, ring as _ring
from errand_boy._jobs.follow import CaughtUp, Follower, Frames, Over
from errand_boy._native import lib
from errand_boy._options import request
from errand_boy._options.ends import Ends
from errand_boy._options.spawn_frame import acquire, check
from errand_boy._wire import frames as _frames
from errand_boy._wire.connection import SEND_FLAGS, Connection
from errand_boy.errors import (
    HelperDiedError,
    JobError,
    JobLostError,
    NoDaemonError,
    NoJobError,
    NotServedError,
    ProtocolError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, TypeAlias, TypeVar

    class Client(Protocol):
        """The client of a daemon."""

        path: str

        def new_socket(self, blocking: bool) -> socket.socket:
            """Return a new connection over which nothing has been sent yet."""

    T = TypeVar("T")
    Steps: TypeAlias = Generator["Wait", None, T]
    Entry: TypeAlias = dict[str, Any]

EVERYBODY = -1
LIVE = ("running", "starting")

_JOB = struct.Struct("<IB")
_CHUNK = 1 << 16  # bytes
_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between attempts
_PATIENCE = 30.0  # seconds without progress
_WITH_FS = lib.EB_WITH_CWD | lib.EB_WITH_UMASK
_MOST_WORDS = 2000  # bytes of a command in the journal
_MOST_CWD = 1000
_IDS = ("user", "group", "extra_groups")


class Wait(NamedTuple):
    """A wait for a descriptor (-1: none), for at most some seconds (None: no limit)."""

    fd: int
    writing: bool = False
    seconds: float | None = None


def pause(seconds: float) -> Steps[None]:
    """Wait for some seconds."""
    yield Wait(-1, seconds=seconds)


# -- the daemon --


def connect(client: Client) -> Steps[socket.socket]:
    """Return a new connection. Raises NoDaemonError, RefusedError and OSError."""
    while True:
        try:
            return client.new_socket(blocking=False)
        except BlockingIOError:  # its backlog is full
            yield from pause(_PAUSE)


def ask(
    client: Client, operation: int, value: Mapping[str, Any]
) -> Steps[tuple[Any, socket.socket, int]]:
    """Ask the daemon; return its answer, the connection, and the descriptor that came, or -1.

    Raises JobError, NoJobError, NoDaemonError, RefusedError and OSError.
    """
    text = json.dumps({name: it for name, it in value.items() if it is not None}).encode("ascii")
    payload = _JOB.pack(lib.EB_VERSION, operation) + text
    if len(payload) > lib.EB_MAX_JOB:
        most = lib.EB_MAX_JOB
        raise OSError(
            errno.E2BIG, f"name, log and stop take {len(payload)} bytes: more than {most}"
        )
    sock = yield from connect(client)
    fd = -1
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it said why
            yield from send(sock, b"\0" + _frames.frame(lib.EB_JOB, [payload]))
        kind, data, fd = yield from _answer(sock, client.path)
        if kind == lib.EB_REFUSED:
            raise _frames.refusal(data.decode("utf-8", "replace"), greeted=False)
        if kind != lib.EB_JOB_REPLY:
            raise ProtocolError(errno.EPROTO, f"frame {kind} in answer to JOB")
        reply = json.loads(data)
        if "error" in reply:
            raise (NoJobError if reply["missing"] else JobError)(errno.EINVAL, reply["error"])
    except BaseException:
        sock.close()
        if fd >= 0:
            os.close(fd)
        raise
    return reply, sock, fd


def _answer(sock: socket.socket, path: str) -> Steps[tuple[int, bytes, int]]:
    """Read exactly one frame; return its kind and payload, and the descriptor with it, or -1."""
    data, fd = b"", -1
    size = _frames.HEADER.size
    while len(data) < size:
        try:
            part, fds = _receive(sock, size - len(data))
        except BlockingIOError:
            yield Wait(sock.fileno())
            continue
        except ConnectionResetError:
            part, fds = b"", []
        if fds:
            fd = fds[0]
        if not part:
            raise NoDaemonError(errno.ECONNRESET, "the daemon ended before it answered", path)
        data += part
        if len(data) == _frames.HEADER.size:
            size += _frames.HEADER.unpack(data)[0]
    kind: int = data[_frames.HEADER.size - 1]
    return kind, data[_frames.HEADER.size :], fd


def _receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    fds = array.array("i")
    space = socket.CMSG_SPACE(fds.itemsize)
    data, messages, _, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, above_standard(*fds)


def send(sock: socket.socket, data: bytes) -> Steps[None]:
    """Send all of `data`. Raises OSError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest, SEND_FLAGS) :]
        except BlockingIOError:
            yield Wait(sock.fileno(), writing=True)


def entries(client: Client, **wanted: Any) -> Steps[list[Entry]]:
    """Return the daemon's entries of jobs, by LIST."""
    found: list[Entry] = []
    after = None
    while True:
        reply, sock, fd = yield from ask(client, lib.EB_JOB_LIST, {**wanted, "after": after})
        sock.close()
        if fd >= 0:
            os.close(fd)
        found += reply["jobs"]
        after = reply["next"]
        if after is None:
            return found


def entry(client: Client, job: str | int, uid: int | None) -> Steps[Entry]:
    """Return the daemon's entry of one job."""
    found = yield from entries(client, job=job, uid=uid, all=True)
    return found[0]


def user(wanted: int | str | None) -> int | None:
    """Return the number of the user whose jobs are meant; "all" has one too. Raises ValueError."""
    if wanted == "all":
        return EVERYBODY
    if isinstance(wanted, str):
        raise ValueError(f"uid must be a number or 'all', not {wanted!r}")
    return wanted


def remove(client: Client, job: int, uid: int) -> Steps[None]:
    """Remove a job that is over."""
    with contextlib.suppress(JobError):  # the daemon decides
        yield from _settled(client, (yield from entry(client, job, uid)))
    _, sock, _ = yield from ask(client, lib.EB_JOB_REMOVE, {"job": job, "uid": uid})
    sock.close()


# -- the start --


class Start:
    """The request for a new job. Raises TypeError, ValueError and OSError for bad arguments."""

    def __init__(
        self,
        args: Any,
        name: str | None = None,
        *,
        ring: int | None = None,
        log: str | bytes | os.PathLike[Any] | None = None,
        log_size: int | None = None,
        log_count: int | None = None,
        notify: str | Sequence[Any] | None = None,
        stdin: Any = None,
        stderr: Any = None,
        shell: bool = False,
        executable: Any = None,
        **options: Any,
    ) -> None:
        get = options.get
        argv = request.arguments(args, shell, executable)
        self.program = argv[0] if executable is None else executable
        self.options = options
        self.cwd, self.env = get("cwd"), get("env")
        sys.audit("subprocess.Popen", self.program, argv, self.cwd, self.env)
        if get("tree") is None:
            options["tree"] = "all"  # so that a killed keeper leaves nothing behind
        if get("tree") == "cgroup" or get("dies_with_caller"):
            raise ValueError("tree='cgroup' and dies_with_caller can't be given for a job")
        if stderr not in (None, subprocess.PIPE, subprocess.STDOUT):
            raise ValueError("stderr of a job must be None, PIPE or STDOUT")
        if (get("limits") or {}).get("output") is not None:
            raise ValueError("limits: output can't be given for a job: `ring` bounds what is kept")
        ends = Ends(get("stop"), get("tree"), get("drain"))
        ids = request.ids(*(options.pop(name, None) for name in _IDS))
        _, self.request = request.streamed(
            request.command(argv, self.program, self.env),
            subprocess.DEVNULL if stdin is None else stdin,
            subprocess.PIPE,
            subprocess.PIPE if stderr is None else stderr,
            brief=False,
            **options,
            **ids,
        )
        self._notify = notify
        if notify is not None:
            self._notification("", 0)  # to raise its errors now
        self.wanted: Entry = {
            "name": name,
            "ring": ring,
            "log": None if log is None else os.path.abspath(os.fsdecode(log)),
            "log_size": log_size,
            "log_count": log_count,
            "argv": list(_words(map(os.fsdecode, argv))),
            "cwd": os.fsdecode(self.cwd or os.getcwd())[:_MOST_CWD],
            "pty": bool(get("pty")),
            "stop": list(ends.steps) if ends.is_given else None,
            "whom": ends.tree,
        }

    def _notification(self, name: str, number: int) -> bytes:
        notify = self._notify
        assert notify is not None
        argv = request.arguments(notify, isinstance(notify, str))
        environment = {
            **(os.environ if self.env is None else self.env),
            "ERRAND_BOY_JOB": str(number),
            "ERRAND_BOY_NAME": name,
        }
        what, _, _ = request.settings(env=environment, cwd=self.cwd or os.getcwd(), process_group=0)
        command = request.command(argv, argv[0], self.env)
        frame = _frames.frame(
            lib.EB_NOTIFY, [command, what, _frames.option(lib.EB_TAG_NULL, b"\7")]
        )
        size = len(frame) - _frames.HEADER.size
        if size > lib.EB_MAX_NOTIFY:
            raise ValueError(
                f"notify: with its environment it takes {size} bytes, more than "
                f"{lib.EB_MAX_NOTIFY}: give the job a smaller env="
            )
        return frame

    def begin(self, name: str, number: int) -> bytes:
        """Return the bytes to send before the request."""
        return b"" if self._notify is None else self._notification(name, number)

    def error(self, failed: _frames.Failed) -> OSError:
        """Return the exception for a failed start."""
        log = self.wanted["log"]
        if failed.stage == lib.EB_STAGE_LOG:
            return OSError(failed.errno, os.strerror(failed.errno), log)
        return request.spawn_error(failed, self.program, self.cwd, self.options)


def _words(words: Any) -> Generator[str, None, None]:
    """Yield as many words of a command as a journal has room for."""
    room = _MOST_WORDS
    for word in words:
        encoded = json.dumps(word)
        if len(encoded) > room:
            yield word[: room // 12] + "…"
            return
        room -= len(encoded) + 2
        yield word


def start(client: Client, wanted: Start) -> Steps[Entry]:
    """Start a job; return its entry. Raises what Popen and `ask` raise."""
    reply, sock, _ = yield from ask(client, lib.EB_JOB_START, wanted.wanted)
    connection = Connection(sock)
    sock.setblocking(False)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, NotServedError):
            yield from _request_start(connection, wanted, reply)
        pid = yield from _outcome(client, sock, wanted)
    finally:
        connection.close()
    return {**wanted.wanted, **reply, "pid": pid, "state": "running", "started": time.time()}


def _request_start(connection: Connection, wanted: Start, reply: Entry) -> Steps[None]:
    """Send the request to the keeper, which may send a reason if it refuses."""
    yield from send(connection.sock, _frames.OPENING + wanted.begin(reply["name"], reply["id"]))
    spawn_frame = acquire()
    try:
        spawn_frame.connection = connection
        check(spawn_frame.prepare(wanted.request, None, 0, _WITH_FS, connection))
        for fd, writing in spawn_frame.sending():
            yield Wait(fd, writing)
    except OSError as error:
        request.name_program(error, wanted.program)
        raise
    finally:
        spawn_frame.done()


def _outcome(client: Client, sock: socket.socket, wanted: Start) -> Steps[int]:
    """Return the command's pid. On an exception from outside, kill the command."""
    frames = Frames()
    try:
        while data := (yield from _some(sock)):
            for kind, payload in frames.receive(data):
                answer = _frames.reply(kind, payload)
                if isinstance(answer, _frames.Failed):
                    raise wanted.error(answer)
                if isinstance(answer, _frames.Spawned):
                    return answer.pid
                raise ProtocolError(errno.EPROTO, f"frame {kind} in answer to SPAWN")
    except BaseException:
        with contextlib.suppress(OSError):
            sock.send(follow.signal(0, signal.SIGKILL), SEND_FLAGS)
        raise
    if not frames.greeted:  # maybe the daemon ended before it handed the connection over
        try:
            (yield from connect(client)).close()
        except NoDaemonError as error:
            text = f"{error.strerror}; the one there was ended before it had the command started"
            raise NoDaemonError(error.errno, text, error.filename) from None
    raise HelperDiedError(errno.EPIPE, "the job's keeper ended before the command ran")


def _some(sock: socket.socket) -> Steps[bytes]:
    """Return some bytes, or b"" at the end of the connection."""
    while True:
        try:
            return sock.recv(_CHUNK)
        except BlockingIOError:
            yield Wait(sock.fileno())
        except ConnectionResetError:
            return b""


# -- an existing job --


class Course:
    """Follows a job over a connection to its keeper, and over a new one if that breaks.

    `entry` is the last entry of the job. `sock` is the connection, if there is one, and `has_begun`
    is whether FOLLOW and the greeting have been sent over it.
    """

    def __init__(self, client: Client, job: int, uid: int, follower: Follower) -> None:
        self._client = client
        self._wanted = {"job": job, "uid": uid}
        self.follower = follower
        self.entry: Entry = {}
        self.sock: socket.socket | None = None
        self.has_begun: bool = False
        self.connections: int = 0
        self.greeting = b""  # sent over each connection after FOLLOW

    def close(self) -> None:
        """Stop following."""
        sock, self.sock = self.sock, None
        self.has_begun = False
        if sock is not None:
            sock.close()

    def events(self) -> Generator[Any, None, None]:
        """Yield events and Waits, up to Over, or up to CaughtUp if the follower does not go on.

        Raises NoJobError, HelperDiedError and what `ask` raises.
        """
        seconds, since = _PAUSE, time.monotonic()
        while True:
            with _told_that_it_goes_on(self.entry):
                asked = ask(self._client, lib.EB_JOB_OPEN, self._wanted)
                self.entry, sock, fd = yield from asked
            if self.entry["state"] not in LIVE:
                sock.close()
                yield from self._rest(fd)
                yield Over() if self.follower.goes_on else CaughtUp()
                return
            self.sock = sock
            self.connections += 1
            try:
                for event in self._connected(sock):
                    if not isinstance(event, Wait):
                        seconds, since = _PAUSE, time.monotonic()
                    yield event
                    if isinstance(event, Over):
                        return
                    if isinstance(event, CaughtUp) and not self.follower.goes_on:
                        return
            finally:
                self.close()
            if time.monotonic() - since > _PATIENCE:
                raise HelperDiedError(errno.EPIPE, "the job's keeper does not answer")
            yield from pause(seconds)
            seconds = min(2 * seconds, _LONGEST_PAUSE)

    def _connected(self, sock: socket.socket) -> Generator[Any, None, None]:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # read on
            yield from send(sock, self.follower.begin() + self.greeting)
        self.has_begun = True
        while data := (yield from _some(sock)):
            yield from self.follower.receive(data)

    def _rest(self, fd: int) -> Generator[Any, None, None]:
        """Yield the rest of the output from the ring file with descriptor `fd`."""
        if self.follower.quiet:
            if fd >= 0:
                os.close(fd)
            return
        if fd < 0:  # the file was in memory, and the machine went down
            yield from self.follower.miss(self.entry.get("bytes", ()))
            return
        try:
            ring = _ring.RingFile(fd)
            if ring.is_empty and any(self.entry.get("bytes", ())):
                raise _ring.RingError("it has been removed")
            yield from self.follower.replay(ring)
            # The file may lack what could not be written.
            yield from self.follower.miss(self.entry.get("bytes", ()))
        except _ring.RingError as error:
            # Raises NoJobError if the job has been removed.
            yield from entry(self._client, self.entry["id"], self.entry["uid"])
            raise JobError(errno.EIO, f"the output of job {self.entry['id']}: {error}") from None
        finally:
            os.close(fd)


def until_over(
    client: Client, job: int, uid: int, timeout: float | None, args: Any
) -> Steps[Entry]:
    """Return the entry of a job when it is over. Raises TimeoutExpired and JobLostError."""
    deadline = None if timeout is None else time.monotonic() + timeout
    found = yield from entry(client, job, uid)
    if found["state"] not in LIVE:
        return known((yield from _settled(client, found)))
    course = Course(client, job, uid, Follower(quiet=True))
    for event in course.events():
        if isinstance(event, Wait) and not (yield from wait_until(event, deadline)):
            course.close()
            raise subprocess.TimeoutExpired(args, timeout or 0)
    return known((yield from last_entry(client, course.entry)))


def last_entry(client: Client, found: Entry) -> Steps[Entry]:
    """Return the entry of a job of whose end its keeper has told; `found` is an earlier one."""
    give_up = time.monotonic() + _PATIENCE
    while True:
        with _told_that_it_goes_on(found):
            found = yield from entry(client, found["id"], found["uid"])
        if found["state"] not in LIVE:
            return (yield from _settled(client, found))
        if time.monotonic() > give_up:
            raise JobLostError(errno.EPIPE, f"the end of job {found['id']} is not in its journal")
        yield from pause(_PAUSE)  # its keeper could not note the end, and is about to end itself


def _settled(client: Client, found: Entry) -> Steps[Entry]:
    """Return the entry of a job that is over.

    If it is lost, a supervisor that lives gets a moment to end the command.
    """
    give_up = time.monotonic() + _LONGEST_PAUSE
    while "left" in found and time.monotonic() < give_up:
        yield from pause(_PAUSE)
        found = yield from entry(client, found["id"], found["uid"])
    return found


@contextlib.contextmanager
def _told_that_it_goes_on(found: Entry) -> Generator[None, None, None]:
    """If the daemon has ended since it told of a job, say that the job has not ended with it."""
    try:
        yield
    except NoDaemonError as error:
        if not found:
            raise
        text = (
            f"{error.strerror}; job {found['id']} does not depend on it: ask again when one listens"
        )
        raise NoDaemonError(error.errno, text, error.filename) from None


def known(found: Entry) -> Entry:
    """Return `found`, the entry of a job that is over. Raises JobLostError if it was lost."""
    if found["state"] == "lost":
        killed = "its keeper was killed, or could not write its journal"
        why = {"reboot": "the machine went down"}.get(found.get("why", ""), killed)
        left = f"; its command still runs as process {found['pid']}" if "left" in found else ""
        raise JobLostError(errno.EPIPE, f"job {found['id']} is lost: {why}{left}")
    return found


def wait_until(wait: Wait, deadline: float | None) -> Steps[bool]:
    """Wait, but not beyond `deadline`; return False if the deadline has passed."""
    if deadline is None:
        yield wait
        return True
    rest = max(0.0, deadline - time.monotonic())
    if wait.seconds is None or rest < wait.seconds:
        wait = wait._replace(seconds=rest)
    yield wait
    return time.monotonic() < deadline
