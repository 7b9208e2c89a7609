"""Packs several arguments into each command of `errand-boy map`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from errand_boy._cli.parsing import UsageError, number
from errand_boy._map.batch import NOT_NOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from errand_boy._cli.inputs import Records, Values

_ONE_STRING = 1 << 17  # bytes: Linux's longest argument, and so the longest shell command
_HEADROOM = 4096  # bytes
_POINTER = 8  # bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("how many arguments for each command")
    group.add_argument(
        "-n",
        "-N",
        "--max-args",
        "--max-replace-args",
        dest="max_args",
        type=number(int, 0),
        metavar="N",
        help="give each command N arguments, {1} to {N}; 0: run the command once for each "
        "argument, without it. With --pipe, give each command N records",
    )
    group.add_argument(
        "-L",
        "--max-lines",
        dest="max_lines",
        type=number(int, 1),
        metavar="N",
        help="give each command N lines",
    )
    group.add_argument(
        "-m",
        dest="pack",
        action="store_const",
        const="m",
        help="give each command as many arguments as fit; the last ones are shared out among all "
        "that run at once",
    )
    group.add_argument(
        "-X",
        dest="pack",
        action="store_const",
        const="X",
        help="the same, and repeat a word that has {} in it for each argument",
    )
    group.add_argument(
        "--xargs",
        dest="pack",
        action="store_const",
        const="xargs",
        help="like -m, but don't share out the last ones",
    )
    group.add_argument(
        "-s",
        "--max-chars",
        type=number(int, 1),
        metavar="N",
        help="how long a packed command may be, in bytes (default: what the system allows)",
    )


def packed(
    records: Records,
    options: argparse.Namespace,
    make: Callable[[Values], Sequence[bytes] | bytes],
    jobs: int,
) -> Records:
    """Yield the values for each command. `make` makes a command from such values."""
    if options.pack is not None:
        if options.max_args == 0:
            raise UsageError("-n 0 can't be combined with -m, -X or --xargs")
        count = options.max_args or options.max_lines
        shares = jobs if options.pack != "xargs" else 1
        if options.max_chars is not None or options.shell:
            most = options.max_chars or _ONE_STRING - 1
            return _fitting(records, most, count, lambda values: size_of(make(values)), shares)

        def size(values: Values) -> int:
            words = make(values)
            return size_of(words) + _POINTER * len(words)

        return _fitting(records, _most_bytes(), count, size, shares)
    if options.max_args == 0:
        return (record if record is NOT_NOW else [] for record in records)
    count = options.max_args or options.max_lines or 1
    return _groups(records, count) if count > 1 else records


def _groups(records: Records, count: int) -> Records:
    values: Values = []
    taken = 0
    for record in records:
        if record is NOT_NOW:
            yield NOT_NOW
            continue
        values += record
        taken += 1
        if taken == count:
            yield values
            values, taken = [], 0
    if taken:
        yield values


def _fitting(
    records: Records, most: int, count: int | None, size: Callable[[Values], int], shares: int
) -> Records:
    held: list[Values] = []
    used = 0
    for record in records:
        if record is NOT_NOW:
            yield NOT_NOW
            continue
        alone = size(record)
        if alone > most:
            raise UsageError(f"an argument is too long for a command of {most} bytes")
        more = size(record + record) - alone  # how much it adds to a command that has others
        if used + more > most or len(held) == count:
            yield _joined(held)
            held, used = [], 0
        used += more if held else alone
        held.append(record)
    share = max(1, -(-len(held) // shares))
    for start in range(0, len(held), share):
        yield _joined(held[start : start + share])


def _joined(records: Sequence[Values]) -> Values:
    return [value for record in records for value in record]


def size_of(command: Sequence[bytes] | bytes) -> int:
    """Return the size of a command in bytes, as xargs counts it."""
    if isinstance(command, bytes):
        return len(command) + 1
    return sum(map(len, command)) + len(command)


def _most_bytes() -> int:
    environment = sum(len(name) + len(value) + 2 + _POINTER for name, value in os.environb.items())
    return max(_HEADROOM, os.sysconf("SC_ARG_MAX") - environment - _HEADROOM)
