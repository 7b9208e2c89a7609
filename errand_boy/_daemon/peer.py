"""Who has connected."""

from __future__ import annotations

import errno
import socket
import struct

_SO_PEERGROUPS = 59

_CREDENTIALS = struct.Struct("iII")


class Peer:
    """Who has connected, as the kernel noted it then; the groups only where they matter."""

    __slots__ = ("gid", "groups", "pid", "uid")

    def __init__(self, sock: socket.socket, with_groups: bool) -> None:
        size = _CREDENTIALS.size
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        self.pid, self.uid, self.gid = _CREDENTIALS.unpack(credentials)
        self.groups = _groups(sock) if with_groups else ()


def _groups(sock: socket.socket) -> tuple[int, ...]:
    for count in (64, 1 << 16):  # NGROUPS_MAX
        try:
            found = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * count)
        except OSError as error:
            if error.errno != errno.ERANGE:
                break
        else:
            return tuple(gid for (gid,) in struct.iter_unpack("I", found))
    return ()
