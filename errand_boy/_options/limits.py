"""Limits of a command and of all that it starts: their checks and encodings."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping

from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import lib
from errand_boy._options.names import Limits
from errand_boy._quantities import A_DURATION, A_SIZE, seconds, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ENCODED = struct.Struct("<QQQI")
_MOST = (1 << 63) - 1
_SPARE = 200  # processes
_NULL = os.makedev(1, 3)  # /dev/null
ELSEWHERE = (
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
            whole = math.ceil(self.cpu) + 1
            found["cpu"] = (whole, whole + 1)
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


def check_read(limits: Mapping[str, Any] | Bounds, unread: Iterable[int]) -> None:
    """Raise ValueError if the output has a limit and goes where nobody counts it.

    `unread` are the descriptors, or -1, of the outputs that nobody reads. They may be the null
    device, or closed.
    """
    bounds = limits if isinstance(limits, Bounds) else Bounds(limits)
    if bounds.output is None:
        return
    for fd in unread:
        try:
            status = os.fstat(fd)
        except OSError:
            continue
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _NULL:
            raise ValueError(
                "limits: output is counted where it is read: give both stdout and stderr as PIPE, "
                "STDOUT or DEVNULL, as capture_output=True does; file_size bounds a file"
            )


def _processes() -> int:
    """Return how many processes and threads the machine has, or 0 if that is not known."""
    with contextlib.suppress(OSError), open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[2])
    return 0


def _kind(name: str) -> str:
    if name in _SIZES:
        return A_SIZE
    return A_DURATION if name in _SECONDS else "an integer"


def _number(name: str, value: Any) -> float | int:
    try:
        if isinstance(value, bool):
            raise TypeError
        if name in _SIZES:
            number: float | int = size(value)
        else:
            number = seconds(value) if name in _SECONDS else int(value)
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
            raise no_cgroup(ELSEWHERE)
        limits = Bounds(limits)
    if given.get("tree") not in (None, "all"):
        raise ValueError(f"limits count all that is started, so tree can't be {given['tree']!r}")
    expanded = {name: value for name, value in given.items() if name != "limits_by"}
    rlimits = {**limits.rlimits(), **(given.get("rlimits") or {})}
    return {**expanded, "limits": limits, "tree": "all", "rlimits": rlimits or None}


def no_cgroup(where: str) -> OSError:
    """Return the error of a command that requires a cgroup."""
    return OSError(errno.ENOTSUP, f"limits_by='cgroup': no cgroup can be had {where}{SEE_DOCTOR}")
