"""A file whose close can take any time, because its FUSE file system does not answer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_GETATTR, _OPEN, _INIT = 3, 14, 26
_REQUEST = struct.Struct("<IIQ")
_ANSWER = struct.Struct("<IiQ")
_MNT_FORCE, _MNT_DETACH = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def stuck_file(path: Path) -> Iterator[int]:
    """Make a file at `path`, and yield a descriptor of it.

    To close a copy, in whichever process, takes until the end of the block.
    """
    path.touch()
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")
    options = b"fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other" % (device, stat.S_IFREG)
    if _libc.mount(b"stuck", os.fsencode(path), b"fuse", 0, options) != 0:
        os.close(device)
        pytest.skip(f"no FUSE file system can be mounted: {os.strerror(ctypes.get_errno())}")
    server = threading.Thread(target=_serve, args=(device,))
    server.start()
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        yield fd
    finally:
        # All requests fail from now on, also those that wait for their answer.
        _libc.umount2(os.fsencode(path), _MNT_FORCE)
        if fd >= 0:
            with contextlib.suppress(OSError):  # ENOTCONN, closed all the same
                os.close(fd)
        _libc.umount2(os.fsencode(path), _MNT_DETACH)
        server.join()
        os.close(device)


def _serve(device: int) -> None:
    """Allow opening the file, and answer no other request."""
    with contextlib.suppress(OSError):  # ENODEV: its end
        while True:
            request = os.read(device, 1 << 16)
            _, kind, number = _REQUEST.unpack_from(request)
            if kind == _INIT:
                answer = struct.pack("<II56x", 7, 31)  # the version
            elif kind == _GETATTR:
                answer = struct.pack("<Q8xQ52xII20x", 3600, 1, stat.S_IFREG | 0o644, 1)
            elif kind == _OPEN:
                answer = struct.pack("<QII", 1, 0, 0)
            else:
                continue
            os.write(device, _ANSWER.pack(_ANSWER.size + len(answer), 0, number) + answer)
