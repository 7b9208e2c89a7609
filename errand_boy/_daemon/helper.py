"""One helper process, from the server's side."""

from __future__ import annotations

import fcntl
import math
import os
import selectors
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

from errand_boy._daemon.loop import Loop
from errand_boy._daemon.peer import Credentials
from errand_boy._daemon.report import FILE_SIZE, Report
from errand_boy._daemon.strangers import DescriptorsError, receive
from errand_boy._memory import open_memory
from errand_boy._native import lib
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PROGRAM = os.path.join(os.path.dirname(os.path.dirname(__file__)), "errand-boy-helper")
_FIRST_FD = 3  # the first descriptor that a helper gets, after the standard streams
_LONGEST_WORD = 100 << 10  # bytes; a word of a command line has at most 128 KiB
_READ = 1 << 10  # bytes; a millisecond's work if the frames are small
_MOST_READ = 1 << 16  # bytes of one frame
_MOST_LAST_READS = 256
_LATELY = 0.5  # seconds for which a reading of its memory is used
_LONGEST_READING = 0.01  # seconds for reading a helper's last frames
_LONGEST = 4 << 10  # bytes of a frame, without the live commands in a report
_LONGEST_LIVE = 18 + 255  # bytes for each of these

ID = struct.Struct("<I")
_ADOPT = struct.Struct("<IB")

OnFrame = Callable[["Helper", int, bytes], None]
Unserved = list[tuple[int, socket.socket]]
Keep = Callable[[int], int]  # keeps a descriptor open in the server's successor, and returns it
OnExit = Callable[["Helper", int, Unserved], None]


class Process(NamedTuple):
    """A helper's process. `figures` is the file in which it counts what it does."""

    pid: int
    sock: socket.socket  # our end of its control socket
    figures: int
    program: tuple[int, ...]  # the file that it executes


def installed_program() -> tuple[int, ...]:
    """Return the identity of the file that a new helper would execute. Raises OSError."""
    info = os.stat(_PROGRAM)
    return info.st_dev, info.st_ino, info.st_mtime_ns


def start(options: Sequence[str], credentials: Credentials | None) -> Process:
    """Start a helper's process, which becomes the user of `credentials`. Raises OSError."""
    program = installed_program()
    with ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        with theirs:
            # The file of its figures. The server reads it if the helper is killed.
            figures = open_memory("errand-boy-figures")
            undo.callback(os.close, figures)
            os.ftruncate(figures, FILE_SIZE)
            arguments = ["--counters", *options]
            title = f"errand-boy: helper of {os.getpid()}"
            pid = spawn(title, arguments, credentials, (theirs.fileno(), figures))
        undo.pop_all()
    with suppress(OSError):  # it has ended already
        ours.send(frames.OPENING, socket.MSG_NOSIGNAL)
    return Process(pid, ours, figures, program)


class Helper:
    """A helper process, of this process's user or of the user of `credentials`.

    The helper becomes that user by itself, and gets no connection before it has reported this. From
    then on it belongs to that user, who may do anything with it. So the server trusts nothing that
    comes from it, and kills it if it breaks the rules, or if it has connections and does not answer
    for `patience` seconds.

    `on_frame` is called with each of its frames; `on_exit` once, with its exit status and the ids
    and sockets of the connections that it had not received yet.
    """

    def __init__(
        self,
        loop: Loop,
        process: Process,
        credentials: Credentials | None,
        on_frame: OnFrame,
        on_exit: OnExit,
        patience: float,
    ) -> None:
        self.pid, self._sock, self._figures, self._program = process
        self.credentials = credentials
        self.connections: set[int] = set()
        self.is_ready = credentials is None
        self.is_full = False  # it has run its maximum of commands, and is to be replaced
        self.draining = False
        self.gone = False  # its socket has ended, but it has not been waited for
        self.unsent = 0  # connections that wait to be sent to it
        self.started = time.monotonic()
        self.report = Report()  # its last one
        self._loop = loop
        self._on_frame = on_frame
        self._exited = on_exit
        self._patience = patience
        self._asked_at = 0.0  # when the oldest question was sent, by time.monotonic(), or 0.0
        self._watchdog = loop.call_later(patience / 3, self._watch_over)
        self._questions: deque[Callable[[Report | None], None]] = deque()
        self._inbox = bytearray()
        self._wanted = _READ
        self._outbox: deque[tuple[bytes, socket.socket | None]] = deque()
        self._sock.setblocking(False)
        self.uid = os.geteuid() if credentials is None else credentials.uid
        self._private_kib: int | None = None
        self._private_at = -math.inf  # of time.monotonic()
        loop.watch(self._sock, selectors.EVENT_READ, self._on_control, self.uid)

    def adopt(self, connection: int, flags: int, sock: socket.socket) -> None:
        """Have the helper serve `sock`, and take ownership of it."""
        self.connections.add(connection)
        self.send(lib.EB_ADOPT, _ADOPT.pack(connection, flags), sock)

    def ask(self, callback: Callable[[Report | None], None]) -> None:
        """Ask for a report; call `callback` with it, or with None if the helper ends."""
        self._questions.append(callback)
        self._asked_at = self._asked_at or time.monotonic()
        self.send(lib.EB_QUERY)

    def send(self, kind: int, payload: bytes = b"", passed: socket.socket | None = None) -> None:
        """Send a frame and the socket `passed`, and take ownership of it; never wait."""
        self._outbox.append((frames.HEADER.pack(len(payload), kind) + payload, passed))
        self.unsent += passed is not None
        if self.is_ready and len(self._outbox) == 1:
            self._flush()

    def drain(self) -> None:
        """Have the helper end when its commands have ended."""
        if not self.draining:
            self.draining = True
            self.send(lib.EB_DRAIN)
            self._release()

    def forget(self, connection: int) -> None:
        """Forget a connection that has ended."""
        self.connections.remove(connection)
        self._release()

    def _release(self) -> None:
        """Let the helper end if it is draining and its last connection has ended."""
        if self.draining and not self.connections:
            with suppress(OSError):  # it has ended already
                self._sock.shutdown(socket.SHUT_WR)

    def _flush(self) -> None:
        while self._outbox:
            frame, passed = self._outbox[0]
            rights = []
            if passed is not None:
                fd = struct.pack("i", passed.fileno())
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)]
            try:
                # The kernel sends a frame this small in full or not at all (unix_stream_sendmsg).
                self._sock.sendmsg([frame], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._watch(selectors.EVENT_READ | selectors.EVENT_WRITE)
                return
            except (BrokenPipeError, ConnectionResetError):
                self.gone = True  # at its end, unsent connections go to another helper
                return
            except OSError as error:
                # For example too many descriptors in flight. The client's connection is closed.
                self._loop.log.warning("cannot reach a helper", pid=self.pid, error=error.strerror)
            self._outbox.popleft()
            if passed is not None:
                self.unsent -= 1
                self._loop.closer.close(passed)
        self._watch(selectors.EVENT_READ)

    def _watch(self, events: int) -> None:
        if self._loop.is_watched(self._sock):  # no longer after its end
            self._loop.watch(self._sock, events, self._on_control, self.uid)

    def _on_control(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ and not self._read(self._wanted):
            self._watch(0)

    def _read(self, size: int) -> bool:
        """Handle up to `size` bytes of frames; return False at the end of the stream."""
        try:
            data = receive(self._sock, size)
        except BlockingIOError:
            return True
        except DescriptorsError:
            self._kill("it sent descriptors")
            return False
        except OSError:
            return False
        self._inbox += data
        self._wanted = _READ
        header = frames.HEADER.size
        at = 0
        while len(self._inbox) - at >= header:
            length, kind = frames.HEADER.unpack_from(self._inbox, at)
            if length > self._longest():
                self._kill("it sent a long frame")
                return False
            if len(self._inbox) - at < header + length:
                self._wanted = min(header + length - len(self._inbox) + at, _MOST_READ)
                break
            payload = bytes(self._inbox[at + header : at + header + length])
            at += header + length
            try:
                self._act(kind, payload)
            except struct.error:
                self._kill(f"it sent a malformed frame of kind {kind}")
                return False
        del self._inbox[:at]
        return bool(data)

    def _longest(self) -> int:
        """Return the longest payload in bytes that its next frame may have."""
        if not self.is_ready:
            return int(lib.EB_MAX_FRAME)
        # Each live command in a report has a connection, whose end would have been reported.
        return _LONGEST + (len(self.connections) * _LONGEST_LIVE if self._questions else 0)

    def _act(self, kind: int, payload: bytes) -> None:
        if not self.is_ready:
            self._on_ids(kind, payload)
        elif kind == lib.EB_REPORT:
            self.report = Report.decode(payload)
            if self._questions:
                answer = self._questions.popleft()
                self._asked_at = time.monotonic() if self._questions else 0.0
                answer(self.report)
        else:
            self._on_frame(self, kind, payload)

    def _on_ids(self, kind: int, payload: bytes) -> None:
        """Begin to use the helper if it has become the right user."""
        ids = [number for (number,) in ID.iter_unpack(payload)] if kind == lib.EB_IDS else []
        uid, gid, groups = self.credentials or Credentials.own()
        if ids[:6] != [uid] * 3 + [gid] * 3 or tuple(sorted(ids[6:])) != groups:
            self._kill(f"it does not have the ids of user {uid}")
            return
        self.is_ready = True
        self._flush()

    def _watch_over(self) -> None:
        """Check that it responds: it may sleep in a close(), or somebody may have stopped it."""
        self._watchdog = self._loop.call_later(self._patience / 3, self._watch_over)
        if self._asked_at and time.monotonic() - self._asked_at > self._patience:
            if not self.gone:
                self._kill(f"it has not answered for {self._patience:g} seconds")
        elif self.connections and not self._questions:
            self.ask(lambda report: None)

    def _kill(self, reason: str) -> None:
        self._loop.complaints.warning("a helper is killed", pid=self.pid, reason=reason)
        self.gone = True
        os.kill(self.pid, signal.SIGKILL)  # safe: the pool waits for it after `on_exit`

    def on_exit(self, status: int) -> None:
        """Handle the helper's end; a negative `status` is a signal's number."""
        self._watchdog.cancel()
        if self._loop.is_watched(self._sock):
            self._watch(0)
            self._loop.call(self._read_rest)  # whatever is in it, the rest is done
        self._loop.closer.close(self._sock)
        self.report = self.counted()
        os.close(self._figures)
        self._exited(self, status, self.unserved())
        while self._questions:  # break reference cycles with those who asked
            self._questions.popleft()(None)

    def _read_rest(self) -> None:
        """Read its last frames, but not for long: another process may have a copy of the socket."""
        end = time.monotonic() + _LONGEST_READING
        for _ in range(_MOST_LAST_READS):
            if not self._read(_READ) or time.monotonic() > end:
                break

    def private_kib(self) -> int | None:
        """Return its private memory in KiB, maybe half a second old; None if it has just ended.

        The kernel walks the page tables for it, and thousands of clients may ask.
        """
        now = time.monotonic()
        if now - self._private_at > _LATELY:
            self._private_at = now
            self._private_kib = _private_kib(self.pid)
        return self._private_kib

    def counted(self) -> Report:
        """Return the counts in its file of figures, also after its end."""
        return Report.read(self._figures)

    def unserved(self) -> Unserved:
        """Return the connections that have not been sent to it."""
        return [
            (_ADOPT.unpack_from(frame, frames.HEADER.size)[0], passed)
            for frame, passed in self._outbox
            if passed is not None
        ]

    def state(self, keep: Keep) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `restore`."""
        return {
            "process": [
                self.pid,
                keep(self._sock.fileno()),
                keep(self._figures),
                self._program,
            ],
            "connections": list(self.connections),
            "is_ready": self.is_ready,
            "is_full": self.is_full,
            "draining": self.draining,
            "gone": self.gone,
            "started": self.started,
            "asked_at": self._asked_at,
            "questions": len(self._questions),
            "inbox": self._inbox.hex(),
            "outbox": [
                (frame.hex(), None if passed is None else keep(passed.fileno()))
                for frame, passed in self._outbox
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`."""
        self.connections.update(state["connections"])
        self.is_ready = state["is_ready"]
        self.is_full = state["is_full"]
        self.draining = state["draining"]
        self.gone = state["gone"]
        self.started = state["started"]
        self.report = self.counted()
        self._asked_at = state["asked_at"]
        # Whoever asked has gone, but the answers still come.
        self._questions.extend([lambda report: None] * state["questions"])
        self._inbox += bytes.fromhex(state["inbox"])
        for frame, fd in state["outbox"]:
            passed = None if fd is None else socket.socket(fileno=fd)
            self._outbox.append((bytes.fromhex(frame), passed))
            self.unsent += passed is not None
        if self.is_ready and not self.gone:
            self._flush()

    @property
    def is_outdated(self) -> bool:
        """Whether another program has been installed since the helper was started."""
        try:
            return self._program != installed_program()
        except OSError:  # there is none to replace it
            return False


def spawn(
    title: str, options: Sequence[str], credentials: Credentials | None, fds: Sequence[int]
) -> int:
    """Start the helper's program, with `fds` as descriptors 3, 4 and so on; return the pid.

    The helper becomes the user of `credentials`. Raises OSError.
    """
    arguments = [title, *options]
    if credentials is not None:
        uid, gid, groups = credentials
        arguments += [f"--uid={uid}", f"--gid={gid}"]
        arguments += [f"--groups={word}" for word in _words(groups)]
    with ExitStack() as copies:
        actions = []
        for number, fd in enumerate(fds, _FIRST_FD):
            # Move the descriptors away from the numbers that they will get.
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD + len(fds))
            copies.callback(os.close, copy)
            actions.append((os.POSIX_SPAWN_DUP2, copy, number))
        # It gets its own session, so that commands get no signals from the terminal.
        return os.posix_spawn(
            _PROGRAM,
            arguments,
            # Other users must not see this process's environment.
            os.environ if credentials is None or credentials.uid == os.geteuid() else {},
            file_actions=actions,
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP],
        )


def _private_kib(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def _words(groups: Sequence[int]) -> Iterator[str]:
    """Yield the groups, separated by commas, in words short enough for a command line."""
    most = _LONGEST_WORD // len("4294967295,")
    for i in range(0, len(groups), most):
        yield ",".join(map(str, groups[i : i + most]))
