"""Keeps account of a command with limits, and says why it ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping

from errand_boy._native import lib
from errand_boy._options.limits import CAUSES, ELSEWHERE, Bounds, check_read, expand, no_cgroup
from errand_boy._process.child import helper_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from errand_boy._process.cgroups import Cgroup


def prepare(
    given: Mapping[str, Any], may_have_cgroup: bool, unread: Iterable[int]
) -> tuple[Tracker, dict[str, Any]]:
    """Return the Tracker for a command with these options, and the expanded options.

    `unread` are the descriptors of its outputs that this process does not read. Raises ValueError,
    and OSError if a cgroup is required and none is available.
    """
    limits, by = Bounds(given["limits"]), given.get("limits_by")
    check_read(limits, unread)
    expanded = expand({**given, "limits": limits})
    tracker = Tracker(limits)
    if by == "rlimits" or (by is None and (given.get("cgroup") is not None or not may_have_cgroup)):
        return tracker, expanded
    if given.get("cgroup") is not None:
        raise ValueError("limits_by='cgroup' can't be given with a cgroup of your own")
    if not may_have_cgroup:
        raise no_cgroup(ELSEWHERE)
    from errand_boy._process import cgroups  # noqa: PLC0415

    directory = cgroups.directory()
    if directory is not None:
        tracker.cgroup = cgroups.Cgroup(directory, limits.memory, limits.processes)
        limits.by_cgroup = True
        expanded["cgroup"] = tracker.cgroup
    elif by == "cgroup":
        raise no_cgroup("here: that needs a cgroup v2 with the controllers memory and pids, in "
                         "which this process may make cgroups")  # fmt: skip
    return tracker, expanded


class Tracker:
    """Keeps account of a command with limits, in the process that waits for it."""

    __slots__ = ("_by_kernel", "_counted", "_peak", "cgroup", "is_too_loud", "limits", "room")

    def __init__(self, limits: Bounds) -> None:
        self.limits = limits
        self.cgroup: Cgroup | None = None
        self.room = sys.maxsize if limits.output is None else limits.output  # for output, in bytes
        self.is_too_loud = False
        self._counted = [0, 0]  # pieces of each output
        self._by_kernel: str | None = None
        self._peak: int | None = None

    def finish(self) -> None:
        """Read the cgroup's figures, and remove it. Calling it again has no effect."""
        if self.cgroup is not None:
            self._by_kernel, self._peak = self.cgroup.exceeded(), self.cgroup.peak()
            self.cgroup.close()
            self.cgroup = None

    def cause(self, returncode: int, tree: Sequence[int]) -> str | None:
        """Return the limit that the command exceeded, or None; `tree` is as in Exited."""
        if self.is_too_loud:
            return "output"
        return cause(returncode, tree, self.limits, self._by_kernel)

    def peak_memory(self, tree: Sequence[int]) -> int | None:
        """Return the peak memory of all its processes in bytes, or None if it is not known."""
        return self._peak if self._peak is not None else peak_memory(tree)

    def take(self, data: bytes) -> bytes:
        """Return the part of `data` that may be kept; if it is less than all, the limit is hit."""
        size = len(data)
        if size > self.room:
            data = data[: self.room]
            self.is_too_loud = True
        self.room -= len(data)
        return data

    def keep(self, process: Any, data: bytes) -> bytes:
        """Return the part of `data` that may be kept; if it is less than all, end the command."""
        was_too_loud = self.is_too_loud
        data = self.take(data)
        if self.is_too_loud and not was_too_loud:
            end(process)
        return data

    def count(self, process: Any, *outputs: list[bytes] | None) -> None:
        """Count the pieces of output, and end the command if they exceed the limit."""
        for number, pieces in enumerate(outputs):
            if pieces is not None:
                for i in range(self._counted[number], len(pieces)):
                    pieces[i] = self.keep(process, pieces[i])
                self._counted[number] = len(pieces)


def end(process: Any) -> None:
    """Kill a command and everything that it has started."""
    child = helper_child(process)
    if child is not None:
        child.send_signal(lib.EB_WHOLE_TREE, signal.SIGKILL)


def peak_memory(tree: Sequence[int]) -> int | None:
    """Return the peak memory in bytes, or None if `tree`, which is as in Exited, is empty."""
    return tree[3] if tree else None


def cause(
    returncode: int, tree: Sequence[int], limits: Bounds, by_kernel: str | None = None
) -> str | None:
    """Return the limit that a command exceeded, or None.

    `tree` is as in Exited, or empty; `by_kernel` is the limit that its cgroup has enforced.
    """
    if tree and tree[0] in CAUSES:
        return CAUSES[tree[0]]
    if by_kernel is not None and returncode != 0:
        return by_kernel
    if limits.cpu is not None and returncode == -signal.SIGXCPU:
        return "cpu"
    if limits.file_size is not None and returncode == -signal.SIGXFSZ:
        return "output"
    return None
