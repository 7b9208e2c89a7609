"""Who has connected, and with which rights."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from errand_boy._address import credentials
from errand_boy._native import ffi, lib

_SO_PEERGROUPS = 59
_MOST_GROUPS = 1 << 16  # NGROUPS_MAX


class Credentials(NamedTuple):
    """By which the kernel judges what a process may do."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def own(cls) -> Credentials:
        """Return those of this process."""
        return cls(os.geteuid(), os.getegid(), tuple(sorted(os.getgroups())))


class Peer:
    """Who has connected, as the kernel noted it then. Raises OSError if it cannot tell."""

    __slots__ = ("credentials", "pid", "uid")

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, gid = credentials(sock)
        self.credentials = Credentials(self.uid, gid, _groups(sock))


def _groups(sock: socket.socket) -> tuple[int, ...]:
    # Not socket.getsockopt: it takes 1,024 bytes at most, and a process may have more groups.
    for most in (64, _MOST_GROUPS):
        groups = ffi.new("uint32_t[]", most)
        size = ffi.new("unsigned int *", 4 * most)
        if lib.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, size) == 0:
            return tuple(sorted(groups[0 : size[0] // 4]))
    raise OSError(ffi.errno, os.strerror(ffi.errno))
