"""Divides standard input or a file into blocks, the input of `errand-boy map`'s commands."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Sequence

from errand_boy._cli.inputs import STDIN, Source, open_source, unescaped
from errand_boy._cli.parsing import UsageError
from errand_boy._map.batch import NOT_NOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from errand_boy._cli.inputs import Records

_CHUNK = 1 << 18  # bytes
_SIZE = re.compile(r"(-?)([0-9]+(?:\.[0-9]+)?)([kKmMgGtT]?)")
_UNITS = "kmgt"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group(
        "blocks",
        "Standard input is divided into blocks. Each is the standard input of a command, in place "
        "of arguments.",
    )
    group.add_argument("--pipe", action="store_true", help="divide standard input into blocks")
    group.add_argument(
        "--pipe-part",
        "--pipepart",
        action="store_true",
        help="divide the file of -a, and read each block when its command starts",
    )
    group.add_argument(
        "--block",
        metavar="SIZE",
        default="1M",
        help="the approximate size of a block, with the units K, M, G, or k, m, g for powers of "
        "1000; with --pipe-part, -N divides the file into N blocks for each slot (default: 1M)",
    )
    group.add_argument("--recend", metavar="STRING", help="the end of a record (default: \\n)")
    group.add_argument(
        "--recstart", metavar="STRING", help="the beginning of a record; blocks end before it"
    )


def size(text: str) -> int:
    """Return a SIZE in bytes. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"--block {text} is not a size such as 10M or 64k")
    unit = match[3]
    power = _UNITS.index(unit.lower()) + 1 if unit else 0
    value = int(float(match[2]) * (1024 if unit.isupper() else 1000) ** power)
    if not value:
        raise UsageError("--block must not be 0")
    return -value if match[1] else value


class Divider:
    """Divides bytes into blocks of whole records as they arrive. No I/O.

    A block has `count` records. If `count` is None, it has as many as fit in `most` bytes, but at
    least one.
    """

    def __init__(self, end: bytes, start: bytes, most: int, count: int | None) -> None:
        self._boundary = end + start
        self._end = len(end)
        self._most = most
        self._count = count
        self._data = bytearray()
        self._looked = 0  # up to here there is no boundary, or there are `_records` of them
        self._records = 0

    def feed(self, data: bytes) -> None:
        """Append `data`."""
        self._data += data

    def header(self, lines: int) -> bytes | None:
        """Take the first lines; return None if they have not all arrived yet."""
        end = 0
        for _ in range(lines):
            end = self._data.find(b"\n", end) + 1
            if not end:
                return None
        return self._take(end)

    def block(self, final: bool) -> bytes | None:
        """Take the next block, or return None if it is incomplete. `final`: no more data comes."""
        end = self._by_count() if self._count is not None else self._by_size(final)
        if end is None:
            return self._take(len(self._data)) if final and self._data else None
        return self._take(end)

    def _by_count(self) -> int | None:
        assert self._count is not None
        while self._records < self._count:
            # Not at the very beginning, which is the start of the first record.
            found = self._data.find(self._boundary, max(self._looked, 0 if self._end else 1))
            if found < 0:
                self._looked = max(self._looked, len(self._data) - len(self._boundary) + 1)
                return None
            self._records += 1
            self._looked = found + max(self._end, 1)
        return self._looked if self._end else self._looked - 1

    def _by_size(self, final: bool) -> int | None:
        data, start = self._data, len(self._boundary) - self._end
        if len(data) < self._most + start:
            return None
        found = data.rfind(self._boundary, 1 - min(self._end, 1), self._most + start)
        if found < 0:
            found = data.find(self._boundary, max(self._looked, self._most - self._end, 1))
            if found < 0:
                self._looked = max(self._looked, len(data) - len(self._boundary) + 1)
                return None
        return found + self._end

    def _take(self, end: int) -> bytes:
        taken = bytes(self._data[:end])
        del self._data[:end]
        self._looked = self._records = 0
        return taken


class Blocks(Source):
    """The blocks that come from a descriptor. `data` is the block that was taken last."""

    def __init__(self, options: argparse.Namespace) -> None:
        end, start = _boundaries(options)
        most = size(options.block)
        if most < 0:
            raise UsageError("a negative --block needs --pipe-part")
        self.fd: int | None = open_source(STDIN)
        self.ended = False
        self.data = b""
        self.records = self._blocks()
        self._divider = Divider(end, start, most, options.max_args)
        self._found: deque[bytes] = deque()
        self._header_lines = _header_lines(options)
        self._header: bytes | None = None if self._header_lines else b""

    def wanted(self) -> bool:
        return not self._found and not self.ended

    def read(self) -> None:
        data = os.read(0, _CHUNK)
        self._divider.feed(data)
        self.ended = not data
        if self._header is None:
            self._header = self._divider.header(self._header_lines)
            if self._header is None:
                return
        while (block := self._divider.block(self.ended)) is not None:
            self._found.append(block)

    def _blocks(self) -> Records:
        while True:
            while self._found:
                self.data = (self._header or b"") + self._found.popleft()
                yield []
            if self.ended:
                return
            yield NOT_NOW


class Parts(Source):
    """The blocks of a file, by offsets. `data` is as in Blocks. Raises UsageError and OSError."""

    def __init__(self, options: argparse.Namespace, paths: Sequence[str], jobs: int) -> None:
        if len(paths) != 1 or paths[0] == STDIN:
            raise UsageError("--pipe-part needs one file: -a FILE")
        end, start = _boundaries(options)
        if options.max_args is not None:
            raise UsageError("--pipe-part divides by --block, not by -n")
        self._boundary, self._end = end + start, len(end)
        self._fd = os.open(paths[0], os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size
        most = size(options.block)
        self._most = most if most > 0 else max(1, -(-self._size // (jobs * -most)))
        lines, self._header = _header_lines(options), b""
        while lines and len(self._header) < self._size:
            stop = self._find(len(self._header), b"\n", 1)
            self._header = os.pread(self._fd, stop, 0)
            lines -= 1
        self.records = self._parts()

    @property
    def data(self) -> bytes:
        """The block that was taken last. Raises OSError."""
        at, stop = self._part
        found = [self._header]
        while at < stop and (part := os.pread(self._fd, stop - at, at)):
            found.append(part)
            at += len(part)
        return b"".join(found)

    def _parts(self) -> Records:
        at = len(self._header)
        while at < self._size:
            stop = self._find(max(at + 1, at + self._most - self._end), self._boundary, self._end)
            self._part = at, stop
            yield []
            at = stop

    def _find(self, at: int, boundary: bytes, end: int) -> int:
        """Return the end of the first record that ends after `at`."""
        rest = b""
        while data := os.pread(self._fd, _CHUNK, at):
            rest += data
            found = rest.find(boundary)
            if found >= 0:
                return at + len(data) - len(rest) + found + end
            at += len(data)
            rest = rest[len(rest) - len(boundary) + 1 :] if len(boundary) > 1 else b""
        return self._size


def _boundaries(options: argparse.Namespace) -> tuple[bytes, bytes]:
    start = unescaped(options.recstart or "")
    end = unescaped(options.recend if options.recend is not None else "" if start else "\n")
    if not start and not end:
        raise UsageError("--recend and --recstart must not both be empty")
    return os.fsencode(end), os.fsencode(start)


def _header_lines(options: argparse.Namespace) -> int:
    header = options.header
    if header in (None, ":"):
        return 0 if header is None else 1
    if not header.isdecimal():
        raise UsageError(f"--header {header} is neither : nor a number of lines")
    return int(header)


def blocks(options: argparse.Namespace, paths: Sequence[str], jobs: int) -> Blocks | Parts:
    """Return the source for --pipe or --pipe-part. Raises UsageError and OSError."""
    if options.pack or options.max_lines or options.max_args == 0:
        raise UsageError("blocks are divided by --block or -n, not by -L, -m, -X or --xargs")
    return Parts(options, paths, jobs) if options.pipe_part else Blocks(options)
