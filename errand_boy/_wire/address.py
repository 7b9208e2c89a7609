"""Where a daemon listens, and to whom it must belong."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct

from errand_boy._descriptors import above_standard
from errand_boy._environment import variable
from errand_boy.errors import RefusedError

_NAME = "errand-boy.sock"
_MACHINE = "/run"  # where root alone can listen

_CREDENTIALS = struct.Struct("iII")


class Address:
    """The path of a daemon's socket, and who may be trusted to listen there.

    At a path that somebody has named, any listener is trusted; at a default path, the user and
    root; with `peer_uid`, only that user.
    """

    __slots__ = ("is_default", "path", "peer_uid")

    def __init__(self, path: str, peer_uid: int | None = None, *, is_default: bool = False) -> None:
        self.path: str = path
        self.peer_uid: int | None = peer_uid
        self.is_default: bool = is_default

    def check(self, sock: socket.socket) -> None:
        """Raise RefusedError if another user listens at the other end of `sock`.

        Call it after connecting and before sending anything. Checking the path instead would leave
        time to replace the socket.
        """
        own = os.geteuid()
        if self.peer_uid is not None:
            trusted = {self.peer_uid}
        elif self.is_default:
            trusted = {own, 0}
        else:
            return
        _, uid, _ = credentials(sock)
        if uid not in trusted:
            expected = " or ".join(map(str, sorted(trusted, reverse=True)))
            raise RefusedError(
                errno.EPERM,
                f"user {uid} listens here, not user {expected}: nothing was sent",
                self.path,
            )

    def nobody(self) -> str:
        """Return the message if no daemon listens, which says how to start one."""
        from shlex import quote  # noqa: PLC0415  it brings re

        command = f"errand-boy serve --socket {quote(self.path)}"
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            command = f"mkdir -p {quote(directory)} && {command}"
        elif not os.access(directory, os.W_OK):
            command = f"as a user who may write in {directory}: {command}"
        return f"no errand-boy daemon listens here; to start one: {command}"


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return the pid, user id and group id of the other end, as the kernel noted them.

    On the side that has connected, they are those of the process that called listen(2).
    """
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(found)
    return pid, uid, gid


def find(
    path: str | os.PathLike[str] | None = None,
    peer_uid: int | None = None,
    *,
    classic: bool = False,
) -> Address:
    """Return the address of the daemon at `path`, else at ``$ERRAND_BOY_SOCKET``, else by default.

    By default it is the user's own daemon, or the machine's if only that has a socket.
    """
    path = path or variable("ERRAND_BOY_SOCKET")
    if path:
        return Address(os.path.abspath(path), peer_uid)
    places = _places(classic)
    place = next(filter(os.path.exists, places), places[0])
    return Address(place, peer_uid, is_default=True)


def default_path(*, classic: bool = False) -> str:
    """Return the path where a daemon of this user listens by default."""
    return variable("ERRAND_BOY_SOCKET") or _places(classic)[0]


def classic_directory() -> str:
    """Return where the classic daemon listens without ``$XDG_RUNTIME_DIR``."""
    return os.path.join(os.environ.get("TMPDIR") or "/tmp", f"errand-boy-{os.geteuid()}")


def job_directory(kind: str) -> str:
    """Return where a daemon of this user keeps files of jobs; `kind` is STATE or RUNTIME."""
    given = os.environ.get(f"{kind}_DIRECTORY", "").partition(":")[0]  # systemd's, for a service
    if given:
        return os.path.join(given, "jobs")
    if os.geteuid() == 0:
        base = {"STATE": "/var/lib", "RUNTIME": _MACHINE}[kind]
    elif kind == "STATE":
        base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        if not (runtime and _is_own(runtime)):
            return os.path.join(classic_directory(), "jobs")
        base = runtime
    return os.path.join(base, "errand-boy", "jobs")


def _places(classic: bool) -> list[str]:
    directories = [_MACHINE]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # After su or sudo it may still belong to the other user.
    if runtime and _is_own(runtime):
        directories.insert(0, runtime)
    elif classic and os.geteuid() != 0:
        directories.insert(0, classic_directory())
    return [os.path.join(directory, _NAME) for directory in directories]


def _is_own(directory: str) -> bool:
    try:
        info = os.stat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()


def unix_socket() -> socket.socket:
    """Return a new socket for a connection to a daemon, of this process's socket class."""
    sock = socket.socket(socket.AF_UNIX)
    if sock.fileno() > 2:
        return sock
    [fd] = above_standard(sock.detach())
    return socket.socket(socket.AF_UNIX, fileno=fd)
