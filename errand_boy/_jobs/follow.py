"""The messages of a job's keeper, without I/O: bytes from a connection in, events out."""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from errand_boy._jobs.ring import RingFile

_FOLLOW = struct.Struct("<QQQB")
_PIECE = struct.Struct("<QQB")
_MISSED = struct.Struct("<BQ")
_ATTACH = struct.Struct("<B4I")
_NUMBER = struct.Struct("<I")
_ERRNO = struct.Struct("<i")
_LONGEST = (1 << 20) + _PIECE.size  # bytes of a payload
_STREAMS = (1, 2)


class Output(NamedTuple):
    """A piece of output, read at `time` (seconds since 1970).

    `stream` is 1 for standard output, 2 for standard error.
    """

    stream: int
    time: float
    data: bytes


class Missed(NamedTuple):
    """`size` bytes of a stream were lost: they are no longer kept, and had not been read."""

    stream: int
    size: int


class LogFailed(NamedTuple):
    """From here on, output is missing in the job's log file."""

    errno: int


class CaughtUp(NamedTuple):
    """All earlier output has been sent."""


class Credit(NamedTuple):
    """`size` more bytes of input may be sent."""

    size: int


class Over(NamedTuple):
    """The job is over, and so is its output."""


class Frames:
    """Splits the bytes from a keeper's connection into frames."""

    __slots__ = ("_rest", "greeted")

    def __init__(self) -> None:
        self._rest = b""
        self.greeted = False

    def receive(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the kinds and payloads of complete frames, without HELLO.

        Raises ProtocolError and RefusedError.
        """
        data = self._rest + data
        at, header = 0, frames.HEADER.size
        self._rest = b""
        while len(data) - at >= header:
            length, kind = frames.HEADER.unpack_from(data, at)
            if length > _LONGEST:
                raise ProtocolError(errno.EPROTO, f"frame {kind} of {length} bytes")
            if len(data) - at - header < length:
                break
            payload = data[at + header : at + header + length]
            at += header + length
            if kind == lib.EB_REFUSED:
                raise frames.refusal(payload.decode("utf-8", "replace"), self.greeted)
            if kind == lib.EB_HELLO and not self.greeted:
                frames.check_version(payload)
                self.greeted = True
            else:
                self._rest = data[at:]  # the caller may stop here
                yield kind, payload
                self._rest = b""
        self._rest = data[at:]


class Follower:
    """The position of a client that follows a job's output, maybe over several connections.

    `before` is sent first over each connection. With `quiet` it gets only the end. With `goes_on`
    it also gets output that is still to come.
    """

    def __init__(self, *, quiet: bool = False, goes_on: bool = True, before: bytes = b"") -> None:
        self._before = before
        self._flags = (lib.EB_FOLLOW_ON if goes_on else 0) | (lib.EB_FOLLOW_QUIET if quiet else 0)
        self.goes_on = goes_on
        self.quiet = quiet
        self._next = 0  # sequence number of the next piece
        self._positions = {1: 0, 2: 0}  # bytes of each stream up to there
        self._frames = Frames()

    @property
    def is_served(self) -> bool:
        """Whether the keeper has this connection."""
        return self._frames.greeted

    def begin(self) -> bytes:
        """Return the first bytes to send over a new connection."""
        self._frames = Frames()
        positions = self._positions[1], self._positions[2]
        return frames.OPENING + self._before + follow(self._next, *positions, self._flags)

    def receive(self, data: bytes) -> Iterator[Any]:
        """Yield the events in `data` from the keeper. Raises ProtocolError and RefusedError."""
        for kind, payload in self._frames.receive(data):
            try:
                event = self._take(kind, payload)
            except struct.error:
                event = None
            if event is None:
                raise ProtocolError(errno.EPROTO, f"frame {kind} of {len(payload)} bytes")
            yield event

    def _take(self, kind: int, payload: bytes) -> Any:
        if kind == lib.EB_PIECE:
            sequence, microseconds, stream = _PIECE.unpack_from(payload)
            if stream not in _STREAMS or sequence < self._next:
                return None
            self._next = sequence + 1
            data = payload[_PIECE.size :]
            self._positions[stream] += len(data)
            return Output(stream, microseconds / 1e6, data)
        if kind == lib.EB_MISSED:
            stream, size = _MISSED.unpack(payload)
            if stream not in _STREAMS:
                return None
            self._positions[stream] += size
            return Missed(stream, size)
        if kind == lib.EB_CAUGHT_UP:
            return CaughtUp()
        if kind == lib.EB_EXITED:
            return Over()
        if kind == lib.EB_CREDIT:
            return Credit(*_NUMBER.unpack(payload))
        if kind == lib.EB_LOG_FAILED:
            return LogFailed(*_ERRNO.unpack(payload))
        return None

    def replay(self, ring: RingFile) -> Iterator[Any]:
        """Yield the rest from the file of a keeper that has gone. Raises RingError and OSError."""
        for sequence, microseconds, stream, position, data in ring.records(self._next):
            missed = position - self._positions[stream]
            if missed > 0:
                yield Missed(stream, missed)
            self._next = sequence + 1
            self._positions[stream] = position + len(data)
            yield Output(stream, microseconds / 1e6, data)
        for stream, end in ring.ends():  # the last bytes may have found no room
            missed = end - self._positions[stream]
            if missed > 0:
                self._positions[stream] = end
                yield Missed(stream, missed)

    def miss(self, sizes: Sequence[int]) -> Iterator[Missed]:
        """Yield a Missed for all later output, because it is gone; `sizes` of both streams."""
        for stream, size in zip(_STREAMS, sizes, strict=False):
            missed = size - self._positions[stream]
            if missed > 0:
                self._positions[stream] = size
                yield Missed(stream, missed)


def follow(sequence: int, first: int, second: int, flags: int) -> bytes:
    """Return a FOLLOW."""
    return frames.frame(lib.EB_FOLLOW, [_FOLLOW.pack(sequence, first, second, flags)])


def attach(flags: int, size: tuple[int, int, int, int]) -> bytes:
    """Return an ATTACH, with `size` as in WINSIZE."""
    return frames.frame(lib.EB_ATTACH, [_ATTACH.pack(flags, *size)])


def winsize(size: tuple[int, int, int, int]) -> bytes:
    """Return a WINSIZE."""
    return frames.frame(lib.EB_WINSIZE, [struct.pack("<4I", *size)])


def signal(pid: int, number: int) -> bytes:
    """Return a SIGNAL."""
    return frames.frame(lib.EB_SIGNAL, [struct.pack("<ii", pid, number)])


def last_lines(events: list[Any], count: int) -> list[Any]:
    """Return the last events, with `count` lines of both streams together."""
    kept: list[Any] = []
    starts = 0  # of lines
    at_end = True
    for event in reversed(events) if count > 0 else ():
        if isinstance(event, Output):
            data = event.data
            at = len(data) - (at_end and data.endswith(b"\n"))
            at_end = False
            while starts < count and (at := data.rfind(b"\n", 0, at)) >= 0:
                starts += 1
            if starts == count:
                if data[at + 1 :]:
                    kept.append(event._replace(data=data[at + 1 :]))
                break
        kept.append(event)
    return kept[::-1]
