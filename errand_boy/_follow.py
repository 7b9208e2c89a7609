"""What a job's keeper tells, without I/O: bytes of a connection in, events out."""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from errand_boy import _wire
from errand_boy._native import lib
from errand_boy.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from errand_boy._ring import RingFile

_FOLLOW = struct.Struct("<QQQB")
_PIECE = struct.Struct("<QQB")
_MISSED = struct.Struct("<BQ")
_ATTACH = struct.Struct("<B4I")
_NUMBER = struct.Struct("<I")
_ERRNO = struct.Struct("<i")
_LONGEST = (1 << 20) + _PIECE.size  # bytes of a payload
_STREAMS = (1, 2)
_NEVER = (1 << 64) - 1  # a sequence that no piece has


class Output(NamedTuple):
    """A piece of output. `stream`: 1, standard output, or 2, standard error; `time`: since 1970."""

    stream: int
    time: float
    data: bytes


class Missed(NamedTuple):
    """So many bytes of a stream are not kept any more, and were not read before."""

    stream: int
    size: int


class LogFailed(NamedTuple):
    """The file that was to have all output lacks what comes from here on."""

    errno: int


class CaughtUp(NamedTuple):
    """All that was there has been told."""


class Credit(NamedTuple):
    """So many more bytes of input may be sent."""

    size: int


class Over(NamedTuple):
    """The job is over, and so is its output."""


class Frames:
    """Splits what comes over a connection to a keeper."""

    __slots__ = ("_rest", "greeted")

    def __init__(self) -> None:
        self._rest = b""
        self.greeted = False

    def receive(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the kinds and payloads that are whole, but for HELLO.

        Raises ProtocolError, RefusedError.
        """
        data = self._rest + data
        at, header = 0, _wire.HEADER.size
        self._rest = b""
        while len(data) - at >= header:
            length, kind = _wire.HEADER.unpack_from(data, at)
            if length > _LONGEST:
                raise ProtocolError(errno.EPROTO, f"frame {kind} of {length} bytes")
            if len(data) - at - header < length:
                break
            payload = data[at + header : at + header + length]
            at += header + length
            if kind == lib.EB_REFUSED:
                raise _wire.refusal(payload.decode("utf-8", "replace"), self.greeted)
            if kind == lib.EB_HELLO and not self.greeted:
                _wire.check_version(payload)
                self.greeted = True
            else:
                self._rest = data[at:]  # for who stops here
                yield kind, payload
                self._rest = b""
        self._rest = data[at:]


class Follower:
    """One who follows a job, over as many connections as it takes: where he is in its output.

    With `quiet` he is told of the end only, with `goes_on` of what is still to come too.
    """

    def __init__(self, *, quiet: bool = False, goes_on: bool = True) -> None:
        self._flags = (lib.EB_FOLLOW_ON if goes_on else 0) | (lib.EB_FOLLOW_QUIET if quiet else 0)
        self.goes_on = goes_on
        self.quiet = quiet
        self._next = 0  # sequence
        self._positions = {1: 0, 2: 0}  # bytes of each stream that he knows of
        self._frames = Frames()

    def begin(self) -> bytes:
        """Return what is sent first over a new connection."""
        self._frames = Frames()
        return _wire.OPENING + follow(
            self._next, self._positions[1], self._positions[2], self._flags
        )

    def receive(self, data: bytes) -> Iterator[Any]:
        """Take what has come, and yield what it tells. Raises ProtocolError and RefusedError."""
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
        """Yield the rest, as a file says it whose keeper has gone. Raises RingError and OSError."""
        if self.quiet:
            return
        for sequence, microseconds, stream, position, data in ring.records(self._next):
            missed = position - self._positions[stream]
            if missed > 0:
                yield Missed(stream, missed)
            self._next = sequence + 1
            self._positions[stream] = position + len(data)
            yield Output(stream, microseconds / 1e6, data)
        for stream, end in ring.ends():  # the last of it may have found no room
            missed = end - self._positions[stream]
            if missed > 0:
                self._positions[stream] = end
                yield Missed(stream, missed)

    def miss(self, sizes: Sequence[int]) -> Iterator[Missed]:
        """Yield that nothing is there of what he does not know; `sizes`: of both streams."""
        for stream, size in zip(_STREAMS, sizes, strict=False):
            missed = size - self._positions[stream]
            if missed > 0 and not self.quiet:
                self._positions[stream] = size
                yield Missed(stream, missed)


def follow(sequence: int, first: int, second: int, flags: int) -> bytes:
    """Return a FOLLOW."""
    return _wire.frame(lib.EB_FOLLOW, [_FOLLOW.pack(sequence, first, second, flags)])


def ask_whether_read() -> bytes:
    """Return what a keeper answers by CAUGHT_UP alone, when it has read what was sent before."""
    return follow(_NEVER, 0, 0, lib.EB_FOLLOW_QUIET)


def attach(flags: int, size: tuple[int, int, int, int]) -> bytes:
    """Return an ATTACH; `size` as WINSIZE has it."""
    return _wire.frame(lib.EB_ATTACH, [_ATTACH.pack(flags, *size)])


def winsize(size: tuple[int, int, int, int]) -> bytes:
    """Return a WINSIZE."""
    return _wire.frame(lib.EB_WINSIZE, [struct.pack("<4I", *size)])


def signal(pid: int, number: int) -> bytes:
    """Return a SIGNAL."""
    return _wire.frame(lib.EB_SIGNAL, [struct.pack("<ii", pid, number)])


def last_lines(events: list[Any], count: int) -> list[Any]:
    """Return the end of what was told that has so many lines, of both streams together."""
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
