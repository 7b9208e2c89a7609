"""The descendants of a process, and signals for them that reach nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from errand_boy import _native


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def parent(pid: int) -> int | None:
    """Return the parent of a process, or None if the process has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def descendants(roots: Iterable[int], without: Iterable[int] = ()) -> list[int]:
    """Return the processes below `roots`, without `roots`, and `without` and what is below them.

    Of the children of one process the youngest comes first. The first of `roots` is looked at last,
    so it should be the one to which orphans go.
    """
    left = [*roots]
    found: list[int] = []
    seen = {*left, *without}
    while left:
        for child in reversed(_children(left.pop())):
            if child not in seen:
                seen.add(child)
                found.append(child)
                left.append(child)
    return found


def send(pid: int, number: int, roots: Iterable[int]) -> None:
    """Send a signal to a process, if it still descends from one of `roots`.

    A process that ends in between, whose number another one gets, is not mistaken: the descent is
    looked up while a pidfd holds on to the process.
    """
    tops = {*roots}
    try:
        pidfd = _native.pidfd_open(pid)
    except OSError:
        return
    try:
        above: int | None = pid
        for _ in range(1000):
            above = parent(above) if above else None
            if not above or above in tops:
                break
        if above:
            with suppress(OSError):
                _native.pidfd_send_signal(pidfd, number, 0)
    finally:
        os.close(pidfd)
