"""Runs one streamed command to its end, in the calling thread."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO

from errand_boy._native import lib
from errand_boy._options.spawn_frame import MOST_ATTEMPTS, acquire
from errand_boy._process import helper
from errand_boy._process.child import ready
from errand_boy._timers import Timers
from errand_boy._wire import frames
from errand_boy._wire.connection import SEND_FLAGS, Connection
from errand_boy._wire.frames import Failed
from errand_boy._wire.stream import Ended, Event, Lost, Output, Started, Stream
from errand_boy.errors import NotServedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._options.request import Request
    from errand_boy._process.tracker import Tracker
    from errand_boy._spool import Spool

_CHUNK = 1 << 16  # bytes; malloc would map twice as many anew each time


class CancelledError(Exception):
    """The command was cancelled."""


def tracker(options: Mapping[str, Any]) -> Tracker | None:
    """Return the Tracker for the `limits` of a streamed command, or None."""
    if options.get("limits") is None:
        return None
    from errand_boy._options.limits import Bounds  # noqa: PLC0415  only those who need it pay
    from errand_boy._process.tracker import Tracker  # noqa: PLC0415

    return Tracker(Bounds(options["limits"]))


def verdict(end: Ended, begun: float, limited: Tracker | None, is_late: bool) -> dict[str, Any]:
    """Return the attributes of Verdict as a dictionary; `is_late`: the time was up."""
    cause = "timeout" if is_late else None
    peak = None
    if limited is not None:
        cause = cause or limited.cause(end.returncode, end.tree)
        peak = limited.peak_memory(end.tree)
    rusage = frames.rusage(end.usage, end.tree)
    return {
        "cause": cause or ("exit" if end.returncode >= 0 else "signal"),
        "duration": end.brief[0] / 1e6 if end.brief else time.monotonic() - begun,
        "rusage": rusage,
        "peak_memory": rusage.ru_maxrss * 1024 if peak is None else peak,
        "limits_by": None if limited is None else "rlimits",
    }


class StreamedCommand:
    """A command whose output comes over the connection to its helper.

    `pool` provides the connection. `streams` and `brief` are those of `request`. The output goes to
    `outputs`. `on_started` is called when the command runs, unless it is brief. `timers` ring while
    it runs. `limited` counts the output.
    """

    def __init__(
        self,
        pool: Any,
        request: Request,
        streams: int,
        brief: bool,
        outputs: Sequence[Spool],
        input: bytes | None = None,
        on_started: Callable[[], Any] | None = None,
        limited: Tracker | None = None,
    ) -> None:
        self._pool = pool
        self._request = request
        self._streams = streams
        self._brief = brief
        self._outputs = outputs
        self._input = input
        self._on_started = on_started
        self._limited = limited
        self._stream: Stream | None = None
        self._connection: Connection | None = None
        self._cancelled = False
        self._lock = threading.Lock()  # for these two
        self._end: Ended | Failed | None = None
        self.timers = Timers()

    @property
    def pid(self) -> int:
        """The command's pid, or 0 if it is not known to run or is brief."""
        return 0 if self._stream is None else self._stream.pid

    @property
    def stream(self) -> Stream:
        """The Stream of a command that has been started."""
        assert self._stream is not None
        return self._stream

    @property
    def has_exited(self) -> bool:
        """Whether the process has ended. Others may still hold its output open."""
        return self._stream is not None and self._stream.ended is not None

    def run(self) -> Ended | Failed:
        """Run the command until it ends and its output ends.

        Raises OSError if the request can't be sent, HelperError, HelperDiedError, ProtocolError,
        RefusedError and CancelledError. After any exception, also from outside, call `abandon`.
        """
        for _ in range(MOST_ATTEMPTS):
            try:
                connection, stream = self._start()
                while self._end is None:
                    for event in _exchange(connection.sock, stream, self.timers.rest()):
                        self._take(event)
                    self.timers.ring()
            except NotServedError:
                self._let_go(Connection.discard)
                continue
            connection.greeted = True
            if self._cancelled:
                self._let_go(Connection.close)
                raise CancelledError
            self._let_go(Connection.give_back if stream.is_free else Connection.close)
            return self._end
        raise helper.ends_at_once(helper.runner)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to `pid`, which is as in the frame SIGNAL."""
        if self._stream is not None:
            self._stream.signal(pid, number)

    def kill(self, *pids: int) -> None:
        """Send SIGKILL to `pids`, and stop waiting for others that hold the output open."""
        if self._stream is not None:
            self._end = self._stream.kill(*pids)

    def cancel(self) -> None:
        """Make `run` in another thread raise CancelledError, and the helper end the command."""
        with self._lock:
            self._cancelled = True
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)

    def abandon(self, *, kill: bool = False) -> None:
        """Close the connection, so that the helper does what the request says for this case.

        With `kill`, first send SIGKILL to the command itself.
        """
        if kill and self._connection is not None:
            stream = self._stream or Stream()
            stream.signal(0, signal.SIGKILL)
            with contextlib.suppress(OSError):
                _send(self._connection.sock, stream)
        self._let_go(Connection.close)

    def _start(self) -> tuple[Connection, Stream]:
        self._stream = None
        spawn_frame = acquire()
        try:
            connection: Connection = self._pool.acquire(self._request, spawn_frame)
            connection.pool.owns_children = True
            with self._lock:
                self._connection = connection
            for _ in spawn_frame.sending():
                ready(connection.sock.fileno(), None, reading=False, writing=True)
        except BaseException as error:
            with self._lock:
                self._connection = spawn_frame.connection  # an exception may have come before
            if spawn_frame.rest and not isinstance(error, NotServedError):
                self._let_go(Connection.close)  # it would take a SIGNAL for the rest
            raise
        finally:
            spawn_frame.done()
        if self._cancelled:
            raise CancelledError
        stream = Stream(connection.greeted)
        stream.begin(
            self._streams,
            self._brief,
            input=BytesIO(self._input or b"") if self._streams & 1 else None,
        )
        self._stream = stream
        return connection, stream

    def _take(self, event: Event) -> None:
        if isinstance(event, Output):
            data = event.data
            if self._limited is not None:
                data = self._limited.take(data)
                if self._limited.is_too_loud:
                    self.signal(lib.EB_WHOLE_TREE, signal.SIGKILL)
            self._outputs[event.number].write(data)
        elif isinstance(event, Started):
            if self._on_started is not None:
                self._on_started()
        elif isinstance(event, Lost):
            if self._cancelled:
                raise CancelledError
            if event.may_resend:
                raise NotServedError
            raise event.error
        else:
            self._end = event

    def _let_go(self, how: Callable[[Connection], object]) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            how(connection)


def _exchange(sock: socket.socket, stream: Stream, seconds: float | None) -> Iterable[Event]:
    """Wait at most `seconds` until data can be moved; move it, and return the events."""
    if not ready(sock.fileno(), seconds, writing=bool(stream.unsent)):
        return ()
    if stream.unsent:
        _send(sock, stream)
    try:
        data = sock.recv(_CHUNK, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return ()
    except ConnectionResetError:
        return (stream.end(reset=True),)
    return stream.receive(data) if data else (stream.end(),)


def _send(sock: socket.socket, stream: Stream) -> None:
    # If the helper has ended, reading will show why.
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        stream.count_sent(sock.send(stream.unsent, SEND_FLAGS))
