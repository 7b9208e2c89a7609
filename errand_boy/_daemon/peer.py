"""The process that has connected, and its rights."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from errand_boy._native import ffi, lib
from errand_boy._wire.address import credentials

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SO_PEERGROUPS = 59
_MOST_GROUPS = 1 << 16  # NGROUPS_MAX


class Credentials(NamedTuple):
    """The ids that decide what a process may do."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def of_state(cls, state: Sequence[Any]) -> Credentials:
        """Return the credentials in `state`, which comes from JSON."""
        uid, gid, groups = state
        return cls(uid, gid, tuple(groups))

    @classmethod
    def own(cls) -> Credentials:
        """Return the credentials of this process."""
        return cls(os.geteuid(), os.getegid(), tuple(sorted(os.getgroups())))


class Peer:
    """The process that has connected, as the kernel recorded it at that time."""

    __slots__ = ("credentials", "pid", "uid")

    def __init__(self, pid: int, credentials: Credentials) -> None:
        self.pid = pid
        self.uid = credentials.uid
        self.credentials = credentials

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Return the peer at the other end of `sock`. Raises OSError if the kernel can't tell."""
        pid, uid, gid = credentials(sock)
        return cls(pid, Credentials(uid, gid, _groups(sock)))


def _groups(sock: socket.socket) -> tuple[int, ...]:
    # Not socket.getsockopt, which returns at most 1,024 bytes: a process may have more groups.
    for most in (64, _MOST_GROUPS):
        groups = ffi.new("uint32_t[]", most)
        size = ffi.new("unsigned int *", 4 * most)
        if lib.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, size) == 0:
            return tuple(sorted(groups[0 : size[0] // 4]))
    raise OSError(ffi.errno, os.strerror(ffi.errno))
