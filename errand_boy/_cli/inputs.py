"""The sources of the arguments of `errand-boy map`."""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from errand_boy._cli.parsing import UsageError
from errand_boy._map.batch import NOT_NOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any, TypeAlias

    Values: TypeAlias = "list[bytes]"
    Records: TypeAlias = "Iterator[Values | Any]"  # or NOT_NOW

_CHUNK = 1 << 16  # bytes
STDIN = "-"
_STRIPS = {"l": bytes.lstrip, "r": bytes.rstrip, "lr": bytes.strip, "rl": bytes.strip}
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\0": "\0", "\\r": "\r", "\\\\": "\\"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group(
        "where arguments come from",
        "After COMMAND, `::: ARGUMENT ...` gives arguments, and `:::: FILE ...` files with one "
        "argument on each line. Without these and -a, they come from standard input. Several "
        "sources are combined in all ways; one that begins with `:::+` or `::::+` is linked to "
        "the one before it.",
    )
    group.add_argument(
        "-a",
        "--arg-file",
        action="append",
        default=[],
        metavar="FILE",
        help="take arguments from the lines of FILE (-: standard input); repeatable. +FILE is "
        "linked to the source before it",
    )
    group.add_argument("-0", "--null", action="store_true", help="lines end with a NUL byte")
    group.add_argument(
        "-d",
        "--delimiter",
        metavar="C",
        help="lines end with the character C, which may be \\n, \\t or \\0",
    )
    group.add_argument(
        "-r",
        "--no-run-if-empty",
        action="store_true",
        help="skip blank lines, which are empty arguments otherwise",
    )
    group.add_argument("-E", "--eof", metavar="LINE", help="stop reading at the line LINE")
    group.add_argument(
        "--trim",
        choices=("n", "l", "r", "lr", "rl"),
        default="n",
        help="remove white space on the left (l) or right (r) of arguments",
    )
    group.add_argument(
        "--link",
        "--xapply",
        action="store_true",
        help="link all sources instead of combining them",
    )
    group.add_argument(
        "-C",
        "--colsep",
        metavar="REGEXP",
        help="divide lines into columns where REGEXP, in Python's syntax, matches",
    )
    group.add_argument(
        "--csv",
        action="store_true",
        help="lines are CSV, and may have line ends in quotes; --colsep is then the delimiter",
    )
    group.add_argument(
        "--header",
        metavar=":",
        help="with `:`, the first line of each source names the columns, for {NAME}. With --pipe, "
        "`:` or a number of lines, which come first in each block",
    )
    group.add_argument("--arg-sep", default=":::", metavar="WORD", help="use WORD instead of :::")
    group.add_argument(
        "--arg-file-sep", default="::::", metavar="WORD", help="use WORD instead of ::::"
    )


# -- lines, as they arrive --


class Lines:
    """Divides bytes into lines as they arrive. No I/O."""

    def __init__(self, separator: bytes) -> None:
        self._separator = separator
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes."""
        *lines, self._rest = (self._rest + data).split(self._separator)
        return lines

    def end(self) -> list[bytes]:
        """Return the last line, if it has no separator."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class CsvLines(Lines):
    """The same for CSV, where quotes may contain line ends."""

    def __init__(self) -> None:
        super().__init__(b"\n")
        self._open = b""  # an incomplete record, with an open quote

    def feed(self, data: bytes) -> list[bytes]:
        """Return the records that `data` completes."""
        return list(self._records(super().feed(data)))

    def end(self) -> list[bytes]:
        """Return the last line, if it has no separator."""
        records = list(self._records(super().end()))
        if self._open:
            records.append(self._open.removesuffix(b"\n"))
        return records

    def _records(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            record = self._open + line
            if record.count(b'"') % 2:
                self._open = record + b"\n"
            else:
                self._open = b""
                yield record


# -- sources --


class Source:
    """Values, one list for each command or part of one.

    `fd`: a descriptor to wait for, or None; call `read` when it is ready and `wanted` is true.
    `total`: how many records there are, or None if that is not known.
    """

    fd: int | None = None
    ended = True
    total: int | None = None

    def __init__(self, records: Iterable[Values]) -> None:
        self.records: Records = iter(records)
        if isinstance(records, Sequence):
            self.total = len(records)

    def wanted(self) -> bool:
        """Return whether to read on."""
        return False

    def read(self) -> None:
        """Read what is available."""

    def read_all(self) -> None:
        """Read everything, to know `total`."""
        while not self.ended:
            self.read()
        records = [values for values in self.records if values is not NOT_NOW]
        self.records, self.total = iter(records), len(records)


class Stream(Source):
    """The lines that come from a descriptor, read only when they are needed."""

    def __init__(self, fd: int, lines: Lines, divide: Callable[[bytes], Values] | None) -> None:
        self.fd: int | None = fd
        self.ended = False
        self._fd = fd
        self._lines = lines
        self._found: deque[bytes] = deque()
        self.records = self._singles() if divide is None else self._divided(divide)

    def wanted(self) -> bool:
        return not self._found and not self.ended

    def read(self) -> None:
        data = os.read(self._fd, _CHUNK)
        self._found.extend(self._lines.feed(data) if data else self._lines.end())
        self.ended = not data

    def _singles(self) -> Records:
        found = self._found
        while True:
            while found:
                yield [found.popleft()]
            if self.ended:
                return
            yield NOT_NOW

    def _divided(self, divide: Callable[[bytes], Values]) -> Records:
        for values in self._singles():
            yield values if values is NOT_NOW else divide(values[0])


class Inputs:
    """The sources that the command line names.

    `words` are the command and the sources after it. Raises UsageError.
    """

    def __init__(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        self._options = options
        self._separator = _separator(options)
        self._divide = _divider(options)
        self.command, self.given = _sources(options, words)
        self.names: list[bytes] = []
        self.source = Source(())

    @property
    def from_stdin(self) -> bool:
        """Whether the arguments come from standard input."""
        return not self.given or any(
            kind == "file" and STDIN in items for kind, items, _ in self.given
        )

    def open(self) -> None:
        """Open the sources, as `source`, and read the header, as `names`. Raises OSError."""
        if self._options.header not in (None, ":"):
            raise UsageError("--header is `:`, or with --pipe a number of lines")
        if len(self.given) <= 1:
            kind, items, _ = self.given[0] if self.given else ("file", [STDIN], False)
            if kind == "file" and len(items) == 1:
                self.source = Stream(open_source(items[0]), self._lines(), self._divide)
            else:
                self.source = Source(self._table(kind, items))
            if self._options.header:
                self.names = _first(self.source)
        else:
            tables = [(self._table(kind, items), linked) for kind, items, linked in self.given]
            if self._options.header:
                for table, _ in tables:
                    self.names += table.pop(0) if table else []
            groups = _groups(tables, self._options.link)
            self.source = Source(_crossed(groups))
            self.source.total = math.prod(map(len, groups))
        self._filter()

    def _lines(self) -> Lines:
        return CsvLines() if self._options.csv else Lines(self._separator)

    def _filter(self) -> None:
        source, end = self.source, self._options.eof
        if end is not None:
            source.records = _until(os.fsencode(end), source.records)
            source.total = None
        strip = _STRIPS.get(self._options.trim)
        if strip is not None:
            source.records = _stripped(strip, source.records)
        if self._options.no_run_if_empty or not self.command:
            source.records = _not_blank(source.records)
            source.total = None

    def _table(self, kind: str, items: Sequence[str]) -> list[Values]:
        """Return all values of one source."""
        if kind == "file":
            values: list[bytes] = []
            for path in items:
                lines = self._lines()
                with open(open_source(path), "rb", closefd=path != STDIN) as file:
                    values += lines.feed(file.read())
                values += lines.end()
        else:
            values = [os.fsencode(item) for item in items]
        divide = self._divide
        return [[value] if divide is None else divide(value) for value in values]


def _sources(
    options: argparse.Namespace, words: Sequence[str]
) -> tuple[list[str], list[tuple[str, list[str], bool]]]:
    """Return the command, and of each source the kind, the items and whether it is linked."""
    separators = {
        options.arg_sep: ("values", False),
        options.arg_sep + "+": ("values", True),
        options.arg_file_sep: ("file", False),
        options.arg_file_sep + "+": ("file", True),
    }
    found: list[tuple[str, list[str], bool]] = []
    for path in options.arg_file:
        is_linked = path.startswith("+")
        found.append(("file", [path.removeprefix("+")], is_linked))
    starts = [number for number, word in enumerate(words) if word in separators]
    ends = [*starts[1:], len(words)]
    for start, end in zip(starts, ends, strict=False):  # without sources, there is still one end
        kind, is_linked = separators[words[start]]
        items = list(words[start + 1 : end])
        # Each file is a source of its own.
        for group in [[item] for item in items] if kind == "file" else [items]:
            found.append((kind, group, is_linked))
    if found and found[0][2]:
        raise UsageError("the first source can't be linked to one before it")
    return list(words[: starts[0]] if starts else words), found


def unescaped(text: str) -> str:
    """Return `text` with its escapes replaced: \\n, \\t, \\r, \\0 and \\\\."""
    return re.sub(r"\\[ntr0\\]", lambda match: _ESCAPES[match[0]], text)


def _separator(options: argparse.Namespace) -> bytes:
    if options.null:
        return b"\0"
    if options.delimiter is None:
        return b"\n"
    separator = os.fsencode(unescaped(options.delimiter))
    if not separator:
        raise UsageError("--delimiter must not be empty")
    return separator


def _divider(options: argparse.Namespace) -> Callable[[bytes], Values] | None:
    """Return the function that divides a line into columns, or None for a single column."""
    colsep = options.colsep
    if options.csv:
        import csv  # noqa: PLC0415

        delimiter = unescaped(colsep or ",")
        if len(delimiter) != 1:
            raise UsageError("with --csv, --colsep must be one character")

        def fields(line: bytes) -> Values:
            rows = list(csv.reader([os.fsdecode(line)], delimiter=delimiter))
            return [os.fsencode(field) for field in rows[0]] if rows else [b""]

        return fields
    if colsep is None:
        return None
    if not colsep:
        raise UsageError("--colsep must not be empty")
    try:
        pattern = re.compile(os.fsencode(colsep))
    except re.error as error:
        raise UsageError(f"--colsep {colsep}: {error}") from None
    # A group in the pattern must not become a column.
    return pattern.split if not pattern.groups else lambda line: _split(pattern, line)


def _split(pattern: re.Pattern[bytes], line: bytes) -> Values:
    values, end = [], 0
    for match in pattern.finditer(line):
        values.append(line[end : match.start()])
        end = match.end()
    return [*values, line[end:]]


def open_source(path: str) -> int:
    if path != STDIN:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if os.isatty(0):
        text = "errand-boy: reading from the terminal, a line for each command; Ctrl-D ends it"
        print(text, file=sys.stderr)
    return 0


def _first(source: Source) -> Values:
    """Wait for the first record, and return it."""
    if source.total:
        source.total -= 1
    for values in source.records:
        if values is not NOT_NOW:
            return list(values)
        source.read()
    return []


def _until(end: bytes, records: Records) -> Records:
    return itertools.takewhile(lambda values: values is NOT_NOW or values[0] != end, records)


def _stripped(strip: Callable[[bytes], bytes], records: Records) -> Records:
    return (v if v is NOT_NOW else list(map(strip, v)) for v in records)


def _not_blank(records: Records) -> Records:
    return (v for v in records if v is NOT_NOW or any(map(bytes.strip, v)))


# -- several sources --


def _groups(tables: Sequence[tuple[list[Values], bool]], link_all: bool) -> list[list[Values]]:
    """Return the records of the sources, with linked sources merged into one.

    With --link, a source that is shorter than the longest one starts again. Sources that are linked
    by a separator end with the shortest one. GNU parallel does both.
    """
    groups: list[list[list[Values]]] = []
    for table, is_linked in tables:
        if groups and (is_linked or link_all):
            groups[-1].append(table)
        else:
            groups.append([table])
    lengths = [(max if link_all else min)(map(len, group)) for group in groups]
    return [
        [
            [value for table in group if table for value in table[number % len(table)]]
            for number in range(length)
        ]
        for group, length in zip(groups, lengths, strict=True)
    ]


def _crossed(groups: Sequence[list[Values]]) -> Iterator[Values]:
    """Yield each combination, the first source varying slowest."""
    for parts in itertools.product(*groups):
        yield [value for values in parts for value in values]
