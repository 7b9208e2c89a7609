"""The descriptors that this process has open, and the places of our own."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

_MOST = 1 << 20  # Linux's own default limit, fs.nr_open
_FIRST = 3  # behind the standard streams


def duplicate(fd: int) -> int:
    """Return a close-on-exec copy of `fd`, from 3 on."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST)


def above_standard(*fds: int) -> list[int]:
    """Return `fds`, with close-on-exec copies from 3 on in place of 0, 1 and 2, which are closed.

    All descriptors of ours go through this, or its counterpart in csrc/common/descriptor.h. What
    this program or its commands write to a standard stream that is closed must not reach them.
    Raises OSError; all of `fds` are closed then.
    """
    moved = list(fds)
    try:
        for at, fd in enumerate(fds):
            if fd < _FIRST:
                moved[at] = duplicate(fd)
                os.close(fd)
    except OSError:
        for fd in moved:
            os.close(fd)
        raise
    return moved


def open_descriptors() -> list[int]:
    """Return their numbers in ascending order, and maybe one more, which is closed by now.

    Without /proc, all numbers below the limit are tried. If the limit has been lowered, those above
    it are missed.
    """
    try:
        return sorted(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        found = []
        for fd in range(min(os.sysconf("SC_OPEN_MAX"), _MOST)):
            with suppress(OSError):
                os.get_inheritable(fd)
                found.append(fd)
        return found
