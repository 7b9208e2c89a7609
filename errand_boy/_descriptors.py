"""The descriptors that this process has open."""

from __future__ import annotations

import os
from contextlib import suppress

_MOST = 1 << 20  # Linux's own default limit, fs.nr_open


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
