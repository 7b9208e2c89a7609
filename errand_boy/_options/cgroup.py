"""Signals to the processes of a cgroup."""

from __future__ import annotations

import contextlib
import os
import signal

from errand_boy import _native
from errand_boy._descriptors import above_standard, duplicate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def signal_all(cgroup: Any, number: int) -> None:
    """Send a signal to all processes of `cgroup`, a path or a descriptor, and of those below it.

    Raises OSError, and ValueError if this process is one of them.
    """
    is_path = isinstance(cgroup, (str, bytes, os.PathLike))
    if is_path:
        [fd] = above_standard(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY))
    else:
        fd = duplicate(_number(cgroup))
    try:
        pids = _pids(fd)
        if os.getpid() in pids:
            raise ValueError(f"cgroup: {cgroup!r} contains this process, so it can't be ended")
        if number == signal.SIGKILL:
            with contextlib.suppress(FileNotFoundError):  # before Linux 5.14
                _write(fd, "cgroup.kill", b"1")
                return
        for pid in pids:
            with contextlib.suppress(OSError):  # it has just ended
                pidfd = _native.pidfd_open(pid)
                try:
                    # Check again: from now on, another process can't get this number unnoticed.
                    if pid in _pids(fd):
                        _native.pidfd_send_signal(pidfd, number, 0)
                finally:
                    os.close(pidfd)
    finally:
        os.close(fd)


def _number(fd: Any) -> int:
    return fd if isinstance(fd, int) else int(fd.fileno())


def _write(directory: int, name: str, data: bytes) -> None:
    [fd] = above_standard(os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory))
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _pids(directory: int) -> set[int]:
    """Return the processes of a cgroup, and of those below it."""
    pids: set[int] = set()
    for _, _, names, at in os.fwalk(".", dir_fd=directory):
        if "cgroup.procs" in names:
            fd = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=at)
            with open(fd, "rb") as file, contextlib.suppress(OSError):  # ENOTSUP: a threaded cgroup
                pids.update(map(int, file.read().split()))
    return pids
