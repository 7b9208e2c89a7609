"""Limits of a command and of all that it starts, and the verdict: why it ended."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
import struct
import sys
from collections.abc import Mapping

from errand_boy._child import helper_child
from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import lib
from errand_boy._option_types import Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from errand_boy._cgroups import Cgroup

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", *"KMGTP"))}
_ENCODED = struct.Struct("<QQQI")
_MOST = (1 << 63) - 1
_SPARE = 200  # processes
_ELSEWHERE = (
    "for a command of map or of a daemon; make one for it, with limits, and name it by cgroup="
)

NAMES = tuple(Limits.__annotations__)
_EXAMPLE = {"wall": 60, "memory": "1G"}
_SECONDS = ("wall", "cpu")
_SIZES = ("memory", "output", "file_size")

# The causes that the supervisor reports, by their numbers in the protocol.
CAUSES = {
    lib.EB_CAUSE_TIMEOUT: "timeout",
    lib.EB_CAUSE_CPU: "cpu",
    lib.EB_CAUSE_MEMORY: "memory",
    lib.EB_CAUSE_PROCESSES: "processes",
}


class Bounds:
    """The values of `limits=`, each a number or None: seconds, bytes or a count."""

    __slots__ = ("by_cgroup", *NAMES)

    wall: float | None
    cpu: float | None
    memory: int | None
    output: int | None
    processes: int | None
    file_size: int | None
    open_files: int | None

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.by_cgroup = False  # a cgroup enforces as much as it can
        if not isinstance(given, Mapping):
            raise TypeError(f"limits: {given!r} is not a dictionary such as {_EXAMPLE}")
        unknown = given.keys() - set(NAMES)
        if unknown:
            raise ValueError(f"limits: {min(unknown)!r} is not one of {', '.join(NAMES)}")
        for name in NAMES:
            value = given.get(name)
            setattr(self, name, None if value is None else _number(name, value))
        if self.processes is not None and not 1 <= self.processes <= lib.EB_MAX_PROCESSES:
            raise ValueError(
                f"limits: processes: {self.processes} is not from 1 to {lib.EB_MAX_PROCESSES}"
            )

    def encode(self) -> bytes:
        """Return the value for the supervisor, as bytes."""
        wall, cpu = (
            0 if value is None else max(1, round(value * 1e6)) for value in (self.wall, self.cpu)
        )
        memory, processes = (0, 0) if self.by_cgroup else (self.memory or 0, self.processes or 0)
        return _ENCODED.pack(wall, cpu, memory, processes)

    def rlimits(self) -> dict[str, tuple[int, int]]:
        """Return the resource limits for each process."""
        found = {}
        if self.cpu is not None:
            # The supervisor is exact; this limit is for the case that it is late.
            seconds = math.ceil(self.cpu) + 1
            found["cpu"] = (seconds, seconds + 1)
        if self.processes is not None and not self.by_cgroup and os.geteuid() != 0:
            # This counts all processes of the user, so it only bounds how far a tree can get ahead
            # of the supervisor. It does not apply to root.
            most = _processes() + 4 * self.processes + _SPARE
            found["nproc"] = (most, most)
        if self.file_size is not None:
            found["fsize"] = (self.file_size, self.file_size)
        if self.open_files is not None:
            found["nofile"] = (self.open_files, self.open_files)
        return found


def _processes() -> int:
    """Return how many processes and threads the machine has, or 0 if that is not known."""
    with contextlib.suppress(OSError), open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[2])
    return 0


_A_SIZE = "a size such as 4096, 64K, 10M or 1.5G"


def size(value: Any) -> int:
    """Return the bytes in `value`, a number or a text such as "1.5G". Raises ValueError."""
    if isinstance(value, str):
        found = _SIZE.fullmatch(value.strip())
        if found is None:
            raise ValueError(f"{value!r} is not {_A_SIZE}")
        return int(float(found[1]) * _UNITS[found[2].upper()])
    return int(value)


def _kind(name: str) -> str:
    if name in _SIZES:
        return _A_SIZE
    return "a number of seconds" if name in _SECONDS else "an integer"


def _number(name: str, value: Any) -> float | int:
    try:
        if isinstance(value, bool):
            raise TypeError
        if name in _SIZES:
            number: float | int = size(value)
        else:
            number = float(value) if name in _SECONDS else int(value)
    except (TypeError, ValueError):
        raise ValueError(f"limits: {name}: {value!r} is not {_kind(name)}") from None
    # With a limit of 0, no command could run.
    if not (0 if name in ("output", "file_size") else 1e-6) <= number <= _MOST:
        raise ValueError(f"limits: {name}: {value!r} is out of range")
    return number


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, with those that follow from `limits`. Raises ValueError.

    There is no cgroup, unless `prepare` was called before.
    """
    limits, by = given["limits"], given.get("limits_by")
    if by not in (None, "cgroup", "rlimits"):
        raise ValueError(f"limits_by: {by!r} is neither 'cgroup' nor 'rlimits'")
    if not isinstance(limits, Bounds):
        if by == "cgroup":
            raise _no_cgroup(_ELSEWHERE)
        limits = Bounds(limits)
    if given.get("tree") not in (None, "all"):
        raise ValueError(f"limits count all that is started, so tree can't be {given['tree']!r}")
    expanded = {name: value for name, value in given.items() if name != "limits_by"}
    rlimits = {**limits.rlimits(), **(given.get("rlimits") or {})}
    return {**expanded, "limits": limits, "tree": "all", "rlimits": rlimits or None}


def prepare(given: Mapping[str, Any], may_have_cgroup: bool) -> tuple[Tracker, dict[str, Any]]:
    """Return the Tracker for a command with these options, and the expanded options.

    Raises ValueError, and OSError if a cgroup is required and none is available.
    """
    limits, by = Bounds(given["limits"]), given.get("limits_by")
    expanded = expand({**given, "limits": limits})
    tracker = Tracker(limits)
    if by == "rlimits" or (by is None and (given.get("cgroup") is not None or not may_have_cgroup)):
        return tracker, expanded
    if given.get("cgroup") is not None:
        raise ValueError("limits_by='cgroup' can't be given with a cgroup of your own")
    if not may_have_cgroup:
        raise _no_cgroup(_ELSEWHERE)
    from errand_boy import _cgroups  # noqa: PLC0415

    directory = _cgroups.directory()
    if directory is not None:
        tracker.cgroup = _cgroups.Cgroup(directory, limits.memory, limits.processes)
        limits.by_cgroup = True
        expanded["cgroup"] = tracker.cgroup
    elif by == "cgroup":
        raise _no_cgroup("here: that needs a cgroup v2 with the controllers memory and pids, in "
                         "which this process may make cgroups")  # fmt: skip
    return tracker, expanded


def _no_cgroup(where: str) -> OSError:
    return OSError(errno.ENOTSUP, f"limits_by='cgroup': no cgroup can be had {where}{SEE_DOCTOR}")


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
