"""The file in which a job's keeper keeps output, in the format of csrc/common/ringfile.h."""

from __future__ import annotations

import os
import struct
from heapq import merge

from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    # sequence, microseconds since 1970, stream (1 or 2), the position of the data, data
    Record: TypeAlias = tuple[int, int, int, int, bytes]

_HEAD = struct.Struct("=8sII")
_STATE = struct.Struct("=5Q")
_RECORD = struct.Struct("=QQI")
_MAGIC = b"EBRING1\0"
_MOST_CAPACITY = 1 << 30  # bytes
_MOST_OFFSET = 1 << 62  # bytes; with the capacity it is still one for pread
_CHUNK = 1 << 20  # bytes


class RingError(Exception):
    """The file is invalid; the text says why, in one line."""


class RingFile:
    """The contents of the file with descriptor `fd`, whose keeper has ended.

    The file belongs to the user, so everything in it is checked. Raises RingError and OSError.
    """

    def __init__(self, fd: int) -> None:
        header = os.pread(fd, lib.EB_RING_HEADER, 0)
        self._rings: list[_Ring] = []
        self.is_empty: bool = not header
        if not header:
            return  # its keeper was killed before it wrote any output
        try:
            magic, header_size, count = _HEAD.unpack_from(header)
            if (magic, header_size, count) != (_MAGIC, lib.EB_RING_HEADER, lib.EB_RINGS):
                raise RingError("it is not a file of rings")
            for number in range(lib.EB_RINGS):
                state = _STATE.unpack_from(header, _HEAD.size + number * _STATE.size)
                ring = _Ring(fd, number + 1, *state)
                self._rings.append(ring)
        except struct.error:
            raise RingError("its header is cut short") from None

    def records(self, sequence: int = 0) -> Iterator[Record]:
        """Yield the records of both streams from `sequence` on, in order."""
        for record in merge(*(ring.records() for ring in self._rings)):
            if record[0] >= sequence:
                yield record

    def ends(self) -> list[tuple[int, int]]:
        """Return each stream with its number of bytes, after all records have been read."""
        return [(ring.stream, ring.end) for ring in self._rings]


class _Ring:
    """One stream's."""

    def __init__(
        self,
        fd: int,
        stream: int,
        offset: int,
        capacity: int,
        head: int,
        tail: int,
        lost: int,
    ) -> None:
        if not (0 <= head - tail <= capacity <= _MOST_CAPACITY and offset <= _MOST_OFFSET):
            raise RingError(f"its ring {stream} is impossible")
        self._fd = fd
        self._offset, self._capacity = offset, capacity
        self._head, self._tail = head, tail
        self.stream = stream
        self.lost = lost
        self.end = lost  # bytes of output, up to the end of the records read so far

    def records(self) -> Iterator[Record]:
        at, position = self._tail, self.lost
        while at < self._head:
            sequence, time, length = _RECORD.unpack(self._read(at, _RECORD.size))
            at += _RECORD.size
            if length > lib.EB_MAX_OUTPUT:
                raise RingError(f"a record of its ring {self.stream} is impossible")
            yield sequence, time, self.stream, position, self._read(at, length)
            at += length
            position += length
            self.end = position

    def _read(self, at: int, length: int) -> bytes:
        if at + length > self._head:
            raise RingError(f"a record of its ring {self.stream} is cut short")
        parts = []
        while length:
            start = at % self._capacity
            part = os.pread(
                self._fd, min(length, self._capacity - start, _CHUNK), self._offset + start
            )
            if not part:
                raise RingError("it is cut short, or has been removed")
            parts.append(part)
            at += len(part)
            length -= len(part)
        return b"".join(parts)
