"""The descriptors that this process has open."""

from __future__ import annotations

import os
from contextlib import suppress

_MOST = 1 << 20  # Linux's own default limit, fs.nr_open


def open_descriptors() -> list[int]:
    """Return their numbers, ascending; one more may be among them that is closed by now.

    Without /proc those below the limit are tried, so one is missed whose limit has been lowered.
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
