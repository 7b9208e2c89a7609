"""How many arguments each command of `errand-boy map` gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from errand_boy._batch import NOT_NOW
from errand_boy._cli.parsing import UsageError, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from errand_boy._cli.inputs import Records, Values

_ONE_STRING = 1 << 17  # bytes, of Linux: the longest argument, and so the longest shell command
_HEADROOM = 4096  # bytes
_POINTER = 8  # bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("how many arguments for each command")
    group.add_argument(
        "-n",
        "-N",
        "-L",
        "--max-args",
        "--max-replace-args",
        "--max-lines",
        dest="max_args",
        type=number(int, 1),
        metavar="N",
        help="so many arguments or lines for each command; {1} to {N} are each of them",
    )
    group.add_argument(
        "-m",
        dest="pack",
        action="store_const",
        const="m",
        help="as many as an argument list can hold; the last of them are shared out to all that "
        "run at once",
    )
    group.add_argument(
        "-X",
        dest="pack",
        action="store_const",
        const="X",
        help="the same, and a word with {} in it is repeated whole for each argument",
    )
    group.add_argument(
        "--xargs",
        dest="pack",
        action="store_const",
        const="xargs",
        help="as -m, but the last are not shared out",
    )
    group.add_argument(
        "-s",
        "--max-chars",
        type=number(int, 1),
        metavar="N",
        help="bytes of a command that is packed, at most (default: what the system allows)",
    )


def packed(
    records: Records, options: argparse.Namespace, size: Callable[[Values], int], jobs: int
) -> Records:
    """Return the values of each command. `size` is that of a command with such values."""
    if options.pack is not None:
        most = options.max_chars or _most_bytes(options.shell)
        shares = jobs if options.pack != "xargs" else 1
        return _fitting(records, most, options.max_args, size, shares)
    if options.max_args is not None and options.max_args > 1:
        return _groups(records, options.max_args)
    return records


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
    empty = size([])
    room = most - empty
    held: list[Values] = []
    used = 0
    for record in records:
        if record is NOT_NOW:
            yield NOT_NOW
            continue
        needed = size(record) - empty
        if needed > room:
            raise UsageError(f"an argument is too long for a command of {most} bytes")
        if used + needed > room or len(held) == count:
            yield _joined(held)
            held, used = [], 0
        held.append(record)
        used += needed
    share = max(1, -(-len(held) // shares))
    for start in range(0, len(held), share):
        yield _joined(held[start : start + share])


def _joined(records: Sequence[Values]) -> Values:
    return [value for record in records for value in record]


def size_of(command: Sequence[bytes] | bytes) -> int:
    """Return the bytes that the kernel counts for a command."""
    if isinstance(command, bytes):
        return len(command) + 1
    return sum(len(word) + 1 + _POINTER for word in command)


def _most_bytes(shell: bool) -> int:
    if shell:
        return _ONE_STRING - 1
    environment = sum(len(name) + len(value) + 2 + _POINTER for name, value in os.environb.items())
    return max(_HEADROOM, os.sysconf("SC_ARG_MAX") - environment - _HEADROOM)
