"""A cgroup for each command, with its limits and its counters, where this process may make one.

This needs cgroup v2, and a directory that is delegated to this user, or root's rights. The
directory is the cgroup of this process, or the one above it, if the controllers for memory and
processes are enabled there or can be enabled. ``ERRAND_BOY_CGROUP`` names another one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import signal

from errand_boy._descriptors import above_standard
from errand_boy._environment import variable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_CONTROLLERS = {"memory", "pids"}
_PATIENCE = 5.0  # seconds that killed processes may take to disappear

_numbers = itertools.count()
_found: dict[str | None, str | None] = {}  # the directory for each value of ERRAND_BOY_CGROUP


def directory() -> str | None:
    """Return the directory in which cgroups of commands are made, or None if there is none."""
    named = variable("ERRAND_BOY_CGROUP")
    if named not in _found:
        candidates = _candidates() if named is None else [named]
        _found[named] = next(filter(_is_usable, candidates), None)
    return _found[named]


def _candidates() -> list[str]:
    own = mount = ""
    with contextlib.suppress(OSError):
        with open("/proc/self/cgroup") as lines:
            own = next((line[3:].strip() for line in lines if line.startswith("0::")), "")
        with open("/proc/self/mountinfo") as lines:
            for line in lines:
                before, _, after = line.partition(" - ")
                if after.startswith("cgroup2 "):
                    root, mount = before.split(" ")[3:5]
                    # Only a part of the hierarchy may be mounted, as in a container.
                    if root != "/" and own.startswith(root):
                        own = own[len(root) :]
                    break
    if not own or not mount:
        return []
    path = os.path.normpath(mount + own)
    return [path] if path == mount else [path, os.path.dirname(path)]


def _is_usable(path: str) -> bool:
    """Return whether cgroups with the controllers can be made there; enable them if necessary.

    The kernel refuses to enable them in a cgroup that has processes, except at the root. Somebody
    must then have enabled them before, in the directory above this process's cgroup.
    """
    try:
        if not _CONTROLLERS.issubset(_read(path, "cgroup.controllers").split()):
            return False
        missing = _CONTROLLERS - set(_read(path, "cgroup.subtree_control").split())
        if missing:
            _write(path, "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))
    except OSError:
        return False
    return os.access(path, os.W_OK) and os.access(os.path.join(path, "cgroup.procs"), os.W_OK)


class Cgroup:
    """The cgroup of one command, from before its start until `close`. Raises OSError."""

    def __init__(self, parent: str, memory: int | None, processes: int | None) -> None:
        self.path = os.path.join(parent, f"errand-boy-{os.getpid()}-{next(_numbers)}")
        os.mkdir(self.path)
        self._fd = -1
        self.peak_memory: int | None = None
        self.events: Mapping[str, int] = {}
        try:
            if memory is not None:
                _write(self.path, "memory.max", str(memory))
                _write(self.path, "memory.oom.group", "1")
                with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                    _write(self.path, "memory.swap.max", "0")
            if processes is not None:
                _write(self.path, "pids.max", str(processes))
            [self._fd] = above_standard(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY))
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor of the cgroup's directory."""
        return self._fd

    def cpu(self) -> float:
        """Return the CPU time in seconds that all of its processes have used."""
        return _counters(self.path, "cpu.stat").get("usage_usec", 0) / 1e6

    def exceeded(self) -> str | None:
        """Return which of the limits the kernel has enforced: "memory", "processes" or None."""
        events = _counters(self.path, "memory.events")
        if events.get("oom_kill") or events.get("oom_group_kill"):
            return "memory"
        return "processes" if _counters(self.path, "pids.events").get("max") else None

    def peak(self) -> int | None:
        """Return the peak memory of all its processes in bytes, or None before Linux 5.19."""
        with contextlib.suppress(OSError, ValueError):
            return int(_read(self.path, "memory.peak"))
        return None

    def kill(self) -> None:
        """Kill all of its processes."""
        try:
            _write(self.path, "cgroup.kill", "1")
        except FileNotFoundError:  # before Linux 5.14
            from errand_boy._options import cgroup  # noqa: PLC0415  only those kernels need it

            cgroup.signal_all(self.path, signal.SIGKILL)

    def close(self) -> None:
        """Kill the remaining processes and remove the cgroup; calling it again has no effect."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        pause = 0.001
        while pause < _PATIENCE:
            try:
                os.rmdir(self.path)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    return
                with contextlib.suppress(OSError):
                    self.kill()
                select.select([], [], [], pause)  # nothing reports that the cgroup is empty
                pause *= 2
            else:
                return

    __del__ = close  # for a command that was not started


def _read(path: str, name: str) -> str:
    with open(os.path.join(path, name)) as file:
        return file.read()


def _write(path: str, name: str, text: str) -> None:
    [fd] = above_standard(os.open(os.path.join(path, name), os.O_WRONLY | os.O_CLOEXEC))
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _counters(path: str, name: str) -> dict[str, int]:
    """Return the numbers of a flat keyed file, or an empty mapping if there is no such file."""
    try:
        lines = _read(path, name).splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, value in (line.split() for line in lines)}
