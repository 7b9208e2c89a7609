"""An attachment to a job, without I/O waits: its output, and the input that is sent to it."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Generator, Sequence

from errand_boy._jobs import follow
from errand_boy._jobs.follow import CaughtUp, Credit, Missed, Output, Over
from errand_boy._jobs.modes import Past
from errand_boy._jobs.steps import Course, Wait
from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.connection import SEND_FLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NO_WINDOW = (0, 0, 0, 0)
MOST_UNSENT = 1 << 16  # bytes of input
_MOST_COME = 64  # pieces of output


class Attached:
    """The terminal of a job, or its standard streams, for a client that is attached to it.

    `is_over`: the job is over, and all of its output has been read. `lost_input`: how many bytes of
    what was written may not have reached the command, since its keeper was killed, a connection
    broke, or the attachment was closed before it had sent them.
    """

    def __init__(
        self,
        course: Course,
        read_only: bool,
        window: Sequence[int] | None,
        *,
        has_terminal: bool,
        history: bool | None,
    ) -> None:
        self.read_only = read_only
        self.is_over: bool = False
        self.lost_input: int = 0
        self.has_terminal = has_terminal
        self._window = _four(window)
        if history is None:
            history = not has_terminal
        self._past = None if history else Past()  # the earlier output, until all of it has come
        self._course = course
        self._course.greeting = self._greeting()
        self._steps: Generator[Any, None, None] = self._course.events()
        self._waits: Wait | None = None
        self._come: deque[Output | Missed] = deque()
        self._unsent = bytearray()  # input
        self._room = int(lib.EB_WINDOW)  # bytes of input that may be on their way
        self._outbox = b""
        self._framed = 0  # bytes of input in the outbox
        self._ends_input = False
        self._connections = 0

    def close(self) -> None:
        """Detach."""
        if not self.is_over:
            self.lost_input += len(self._unsent) + self._framed
        self._steps.close()
        self._course.close()
        self.is_over = True

    @property
    def closed(self) -> bool:
        """Whether the attachment is closed."""
        return self.is_over

    def fileno(self) -> int:
        """Return the descriptor, or -1 if there is none yet."""
        sock = self._course.sock
        return -1 if sock is None else sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether to wait until the descriptor is writable, because input is waiting."""
        return bool(self._outbox)

    @property
    def is_full(self) -> bool:
        """Whether `write` would have to wait."""
        return len(self._unsent) >= MOST_UNSENT

    @property
    def room(self) -> int:
        """How many bytes `write` accepts without waiting."""
        return max(0, MOST_UNSENT - 1 - len(self._unsent))

    @property
    def winsize(self) -> tuple[int, ...]:
        """The rows and columns of the screen that shows the terminal."""
        return self._window[:2]

    @winsize.setter
    def winsize(self, size: Sequence[int]) -> None:
        self._window = _four(size)
        self._course.greeting = self._greeting()
        self._outbox += follow.winsize(self._window)
        self._send()

    def redraw(self) -> None:
        """Have the program redraw its terminal, if it redraws when the size changes."""
        if self._past is None:  # else it will
            self._outbox += self._greeting()
            self._send()

    def end_input(self) -> None:
        """End standard input for all who are attached; on a terminal, type ^D."""
        self._check_writes()
        self._ends_input = True
        self._send()

    def send_signal(self, sig: int) -> None:
        """Send a signal to the job's command."""
        self._outbox += follow.signal(0, sig)
        self._send()

    # -- for the code that waits --

    @property
    def is_begun(self) -> bool:
        """Whether it is attached now or was before."""
        is_served = self._course.has_begun and self._course.follower.is_served
        return (is_served and self._past is None) or self.is_over

    def _feed(self, data: bytes) -> None:
        self._check_writes()
        self._unsent += data
        self._send()

    def _check_writes(self) -> None:
        if self.read_only:
            raise ValueError("attached to read only")

    def _greeting(self) -> bytes:
        """Return an ATTACH. It has no window while earlier output is still to come.

        Otherwise output that is redrawn for the window would be taken for earlier output.
        """
        flags = 0 if self.read_only else int(lib.EB_ATTACH_WRITES)
        if self._past is not None:
            return follow.attach(flags, _NO_WINDOW)
        if self.has_terminal and self._window != _NO_WINDOW:
            flags |= lib.EB_ATTACH_REDRAWS
        return follow.attach(flags, self._window)

    def _catch_up(self) -> None:
        """Show what the earlier output has left on the screen, and set the window."""
        past, self._past = self._past, None
        if past is None:
            return
        self._course.greeting = self._greeting()
        if self.has_terminal and (shown := past.shown(self._window[0])):
            self._come.append(Output(1, time.time(), shown))
        self.redraw()

    def _next_wait(self) -> Wait | None:
        """Move data; return what to wait for, or None if something has arrived."""
        come = len(self._come)
        self._send()
        self._advance()
        waits = self._waits
        if len(self._come) > come or self.is_over or waits is None:
            return None
        if waits.fd >= 0 and self._outbox:
            waits = waits._replace(writing=True)
        return waits

    def _take(self, size: int = -1) -> Output | Missed | None:
        """Return the next output, at most `size` bytes, or None if there is none."""
        if not self._come:
            return None
        event = self._come.popleft()
        if isinstance(event, Output) and 0 <= size < len(event.data):
            self._come.appendleft(event._replace(data=event.data[size:]))
            return event._replace(data=event.data[:size])
        return event

    def _advance(self) -> None:
        """Receive what is there, without waiting."""
        if len(self._come) >= _MOST_COME:  # by `write`, whose caller should read
            raise BlockingIOError(errno.EAGAIN, "read the output before you write more input")
        self._waits = None
        while (event := self._next_event()) is not None:
            if isinstance(event, Wait):
                self._waits = event
                return
            if isinstance(event, CaughtUp):
                self._catch_up()
                if self._come:
                    return
            elif isinstance(event, Over):
                if self._course.entry["state"] == "lost":
                    self._lose_sent()
                    self.lost_input += len(self._unsent)
                break
            elif isinstance(event, Credit):
                self._room += event.size
                self._send()
            elif self._past is not None:
                if isinstance(event, Output):
                    self._past.feed(event.data)
            elif isinstance(event, (Output, Missed)):
                self._come.append(event)
                return
        self.is_over = True

    def _next_event(self) -> Any:
        try:
            event = next(self._steps, None)
        except BaseException:
            self._lose_sent()
            self.close()
            raise
        if self._connections != self._course.connections:
            self._connections = self._course.connections
            self._lose_sent()
        return event

    def _lose_sent(self) -> None:
        """Give up the input for which no credit has come, as its connection has ended."""
        self.lost_input += int(lib.EB_WINDOW) - self._room
        self._outbox, self._framed, self._room = b"", 0, int(lib.EB_WINDOW)

    def _send(self) -> None:
        """Send as much input as there is room for."""
        sock = self._course.sock
        if sock is None or not self._course.has_begun:
            return
        if self._unsent and self._room and not self._outbox:
            data = bytes(self._unsent[: min(self._room, MOST_UNSENT)])
            del self._unsent[: len(data)]
            self._room -= len(data)
            self._framed = len(data)
            self._outbox += frames.frame(lib.EB_STDIN, [data])
        if self._ends_input and not self._unsent:
            self._ends_input = False
            self._outbox += frames.frame(lib.EB_STDIN, [])
        if not self._outbox:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._outbox = self._outbox[sock.send(self._outbox, SEND_FLAGS) :]
            if not self._outbox:
                self._framed = 0


def _four(size: Sequence[int] | None) -> tuple[int, int, int, int]:
    rows, columns, *pixels = size or (0, 0)
    xpixel, ypixel = pixels or (0, 0)
    return rows, columns, xpixel, ypixel
