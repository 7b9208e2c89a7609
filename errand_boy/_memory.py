"""Files without a name."""

from __future__ import annotations

import os
from contextlib import suppress

from errand_boy import _native

_MFD_CLOEXEC = 1
_FOLDERS = ("/dev/shm", "/run", "/tmp")


def open_memory(name: str) -> int:
    """Return a descriptor of a new file in memory, closed by an exec. Raises OSError.

    /proc shows it as `name`. If the kernel or a filter refuses memfd_create, it is a deleted file
    in a file system.
    """
    try:
        return int(_native.memfd_create(name, _MFD_CLOEXEC))
    except OSError as error:
        for folder in _FOLDERS:
            with suppress(OSError):
                return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        raise OSError(error.errno, f"memfd_create: {error.strerror}") from None
