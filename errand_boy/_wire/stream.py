"""Streamed commands over one connection, one after another, without I/O: bytes in, events out.

Only this module knows what the frames of a streamed command mean, how much input may be sent, and
whether the request may be sent again if the connection is lost; see docs/protocol.md.
"""

from __future__ import annotations

import errno
import os
import signal
import struct

from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.frames import Failed, Spawned
from errand_boy.errors import HelperDiedError, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Protocol, TypeAlias

    class Input(Protocol):
        """The input of a command."""

        def read(self, size: int, /) -> bytes:
            """Return the next `size` bytes; fewer only at the end."""


_HEADER_SIZE, _unpack_header = frames.HEADER.size, frames.HEADER.unpack_from
_MORE = struct.Struct("<QiB")  # at the end of a brief command's EXITED
_END_SIZES = frames.EXITED.size, frames.EXITED.size + _MORE.size  # of a brief command
_NOT_BRIEF = _END_SIZES[0], _END_SIZES[0] + frames.TREE.size
_END_OF_INPUT = frames.frame(lib.EB_STDIN, [])
_MOST_REASON = 4096  # bytes
_LAST_STATUS, _STOPPED = 0xFFFF, 0x7F  # of waitpid(2)

# The bytes from a brief command without output, up to the payload of its EXITED.
_SILENT = frames.frame(lib.EB_STDOUT, []) + frames.frame(lib.EB_STDERR, [])
_SILENT += frames.HEADER.pack(_END_SIZES[1], lib.EB_EXITED)
_SILENT_SIZE = len(_SILENT) + _END_SIZES[1]

# Bits for what is awaited: those of STREAMS, without standard input, and the exit.
_OUTPUTS, _EXIT = 3, 4
_ALL = _OUTPUTS | _EXIT

# The frames that may arrive: the smallest and largest payload, and the bit.
_KINDS = {
    lib.EB_HELLO: (4, 64, 0),
    lib.EB_SPAWNED: (5, 5, 0),
    lib.EB_FAILED: (10, 10, 0),
    lib.EB_EXITED: (_END_SIZES[0], _END_SIZES[1] + frames.TREE.size, _EXIT),
    lib.EB_REFUSED: (0, _MOST_REASON, 0),
    lib.EB_STDOUT: (0, lib.EB_MAX_OUTPUT, 1),
    lib.EB_STDERR: (0, lib.EB_MAX_OUTPUT, 2),
    lib.EB_CREDIT: (4, 4, 0),
    lib.EB_UNREAD: (0, 0, 0),
}
_NONE = (1, 0, 0)

# The attributes that `Stream.state` contains unchanged, and those in hexadecimal digits.
_PLAIN = (
    "greeted",
    "pid",
    "_awaited",
    "_brief",
    "_is_killed",
    "_request_left",
    "_sends_more",
    "_started",
    "_window",
)
_BYTES = ("unsent", "_rest")


class Started:
    """The command is running. Brief commands have no such event."""

    __slots__ = ("pid",)

    def __init__(self, pid: int) -> None:
        self.pid = pid


class Output:
    """The command has written `data` to standard output (`number` 0) or standard error (1)."""

    __slots__ = ("data", "number")

    def __init__(self, number: int, data: bytes) -> None:
        self.number = number
        self.data = data


class Ended:
    """The command and its output have ended. `returncode` is as in subprocess."""

    __slots__ = ("payload", "returncode")

    def __init__(self, payload: bytes) -> None:
        status = int.from_bytes(payload[:4], "little")
        if status > _LAST_STATUS or status & _STOPPED == _STOPPED:
            raise _unexpected(lib.EB_EXITED)
        self.returncode = os.waitstatus_to_exitcode(status) if status else 0
        self.payload = payload

    @property
    def usage(self) -> tuple[int, ...]:
        """The usage, in the order of wire.h."""
        return frames.EXITED.unpack_from(self.payload)[1:]

    @property
    def _tree(self) -> bytes:
        has_tree = len(self.payload) not in _END_SIZES
        return self.payload[-frames.TREE.size :] if has_tree else b""

    @property
    def tree(self) -> tuple[int, ...]:
        """A supervisor's figures about the tree, in the order of wire.h, or an empty tuple."""
        return frames.TREE.unpack(self._tree) if self._tree else ()

    @property
    def brief(self) -> tuple[int, int, int] | None:
        """The microseconds a brief command took, its pid and its place; None for others."""
        if len(self.payload) in _NOT_BRIEF:
            return None
        return _MORE.unpack_from(self.payload, frames.EXITED.size)


class Lost:
    """The connection can't be used any more.

    `may_resend`: the command's request was not read, and may be sent again over another connection.
    Otherwise `error` is the exception to raise. `reason` is the text of a REFUSED.
    """

    __slots__ = ("error", "may_resend", "reason")

    def __init__(self, error: OSError, reason: str | None = None) -> None:
        self.error = error
        self.may_resend = False
        self.reason = reason


Event: TypeAlias = "Started | Output | Ended | Failed | Lost"


class Stream:
    """A connection's commands, as seen by their client.

    `unsent` are the bytes to send as soon as the socket takes them. `pid` is 0 before Started, and
    for brief commands. `ended` is the command's end, which may be known before the end of its
    output. `greeted`: HELLO has arrived.
    """

    __slots__ = (
        "_awaited",
        "_brief",
        "_input",
        "_is_killed",
        "_request_left",
        "_rest",
        "_sends_more",
        "_started",
        "_window",
        "ended",
        "greeted",
        "pid",
        "unsent",
    )

    def __init__(self, greeted: bool = False) -> None:
        self.greeted = greeted
        self._rest = b""  # an incomplete frame
        self._awaited = 0
        self._request_left = 0
        self.unsent = b""

    def begin(
        self, streams: int, brief: bool, request: bytes = b"", input: Input | None = None
    ) -> None:
        """Begin a command, after the previous one is over.

        `streams` and `brief` are as in the request; `request` is its unsent part.
        """
        self._awaited = streams >> 1 & _OUTPUTS | _EXIT
        self._brief = brief
        self._started = False
        self._is_killed = False
        self._window = lib.EB_WINDOW
        self._request_left = len(request)
        self._sends_more = False  # whether anything was sent after the request
        self.unsent = request
        self.pid = 0
        self.ended: Ended | None = None
        self._input = input
        # Input waits for SPAWNED: only if nothing was sent after the request, unread bytes mean
        # that the request was not read.
        if input is not None and brief:
            self._feed(input)

    @property
    def is_free(self) -> bool:
        """Whether the connection can carry another command."""
        return not (self._awaited or self.unsent or self._rest)

    def count_sent(self, size: int) -> None:
        """Remove the first `size` bytes of `unsent`, which have been sent."""
        self.unsent = self.unsent[size:]
        if self._request_left:
            self._request_left = max(0, self._request_left - size)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to `pid`, which is as in the frame SIGNAL."""
        self._send(frames.frame(lib.EB_SIGNAL, [struct.pack("<ii", pid, number)]))

    def kill(self, *pids: int) -> Ended | None:
        """Stop waiting for processes that hold the output open: the command ends with its process.

        Return the end if it is known; otherwise send SIGKILL to `pids`.
        """
        self._is_killed = True
        if self.ended is None:
            for pid in pids:
                self.signal(pid, signal.SIGKILL)
        return self.ended

    def receive_end(self, data: memoryview) -> Ended | None:
        """Process data that is exactly the end of a brief command without output.

        Return that end, or None for other data: then call `receive`, which handles all, but slower.
        """
        if (
            len(data) != _SILENT_SIZE
            or self._awaited != _ALL
            or not (self._brief and self.greeted)
            or self._rest
            or not (whole := bytes(data)).startswith(_SILENT)
        ):
            return None
        self.ended = ended = Ended(whole[len(_SILENT) :])
        self._started = True
        self._awaited = 0
        return ended

    def receive(self, data: bytes | memoryview) -> Iterator[Event]:
        """Process data, and yield the events. After Lost, the stream must not be used."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, end = 0, len(data)
        try:
            while end - at >= _HEADER_SIZE:
                length, kind = _unpack_header(data, at)
                least, most, bit = _KINDS.get(kind, _NONE)
                if not least <= length <= most:
                    raise _unexpected(kind)
                begin, following = at + _HEADER_SIZE, at + _HEADER_SIZE + length
                if following > end:
                    break
                at = following
                if not bit:
                    event = self._take(kind, bytes(data[begin:at]))
                    if event is not None:
                        yield event
                        if isinstance(event, Lost):
                            return
                    continue
                may_tell = self.greeted and (self._started or self._brief)
                if not (self._awaited & bit and may_tell):
                    raise _unexpected(kind)
                self._started = True
                if bit == _EXIT:
                    if length - _END_SIZES[self._brief] not in (0, frames.TREE.size):
                        raise _unexpected(kind)
                    self.ended = Ended(bytes(data[begin:at]))
                elif length:
                    yield Output(bit - 1, bytes(data[begin:at]))
                    continue
                self._awaited -= bit
                ended = self.ended
                if ended is not None and (not self._awaited or self._is_killed):
                    yield ended
                    if self._awaited:
                        return  # later output is from descendants
        except ProtocolError as error:
            yield Lost(error)
        if at < end:
            self._rest = bytes(data[at:])

    def end(self, reset: bool = False) -> Lost:
        """Handle the end of the connection; `reset`: it ended with ECONNRESET."""
        # ECONNRESET: the other side has closed it without reading all bytes.
        text = "errand-boy's helper ended: the command may have been started"
        lost = Lost(HelperDiedError(errno.EPIPE, text))
        if self._awaited and not self._started:
            unread = not self.greeted or self._request_left or (reset and not self._sends_more)
            lost.may_resend = bool(unread)
        return lost

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` needs after an exec. The command must have begun."""
        ended = self.ended
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: getattr(self, name).hex() for name in _BYTES},
            "ended": None if ended is None else ended.payload.hex(),
            "reads_input": self._input is not None,
        }

    def restore(self, state: dict[str, Any], input: Input | None) -> None:
        """Continue from a `state`; send the rest of `input`."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        for name in _BYTES:
            setattr(self, name, bytes.fromhex(state[name]))
        ended = state["ended"]
        self.ended = None if ended is None else Ended(bytes.fromhex(ended))
        self._input = input if state["reads_input"] else None

    def _take(self, kind: int, payload: bytes) -> Event | None:
        if kind == lib.EB_REFUSED:
            reason = payload.decode("utf-8", "replace")
            return Lost(frames.refusal(reason, self.greeted), reason)
        if self.greeted == (kind == lib.EB_HELLO):
            raise _unexpected(kind)
        if kind == lib.EB_HELLO:
            frames.check_version(payload)
            self.greeted = True
            return None
        if kind == lib.EB_CREDIT and self._awaited:
            self._window += int.from_bytes(payload, "little")
            if self._window > lib.EB_WINDOW:
                raise _unexpected(kind)
            if self._input is not None:
                self._feed(self._input)
            return None
        if kind == lib.EB_UNREAD and not (self._awaited and self._started):
            lost = self.end()
            lost.may_resend = True
            return lost
        if self._awaited & _EXIT and not self._started:
            reply = frames.reply(kind, payload)
            if isinstance(reply, Failed):
                self._awaited = 0
                return reply
            if isinstance(reply, Spawned) and reply.by_helper and not self._brief:
                self._started = True
                self.pid = reply.pid
                if self._input is not None:
                    self._feed(self._input)
                return Started(reply.pid)
        raise _unexpected(kind)

    def _feed(self, input: Input) -> None:
        """Add as much input to `unsent` as may be sent now."""
        data = input.read(self._window)
        if data:
            self._send(frames.frame(lib.EB_STDIN, [data]))
        if len(data) < self._window:
            self._send(_END_OF_INPUT)
            self._input = None
        self._window -= len(data)

    def _send(self, frame: bytes) -> None:
        self.unsent += frame
        self._sends_more = True


def _unexpected(kind: int) -> ProtocolError:
    return ProtocolError(errno.EPROTO, f"unexpected frame {kind}")
