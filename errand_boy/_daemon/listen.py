"""The socket on which the daemon listens, at a path with a lock beside it, or from systemd."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress

from errand_boy._wire import address as _address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START
_BACKLOG = 4096  # the kernel's net.core.somaxconn bounds it
_LONGEST = 107  # bytes of a path in struct sockaddr_un, without its NUL


class ListenError(Exception):
    """The daemon can't listen; the text says why, in one line."""


class Listener:
    """A listening socket, and the lock that keeps other daemons from its path.

    `path` is where it listens; `bound` has the device and inode of the socket there, if it is ours.
    The socket is non-blocking.
    """

    def __init__(
        self, sock: socket.socket, path: str, lock: int | None, bound: tuple[int, int] | None
    ) -> None:
        sock.setblocking(False)
        sock.set_inheritable(False)
        self.sock = sock
        self.path = path
        self._lock = lock
        self._bound = bound

    def state(self, keep: Callable[[int], int]) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `of_state`."""
        return {
            "sock": keep(self.sock.fileno()),
            "path": self.path,
            "lock": None if self._lock is None else keep(self._lock),
            "bound": self._bound,
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Listener:
        """Return the predecessor's listener."""
        bound = None if state["bound"] is None else tuple(state["bound"])
        return cls(socket.socket(fileno=state["sock"]), state["path"], state["lock"], bound)

    def close(self, close: Callable[[socket.socket], object] = socket.socket.close) -> None:
        """Stop listening, and release the path for another daemon.

        `close` closes the socket, and with it the connections that wait to be accepted. systemd
        keeps its own copy of a socket open, and the connections in the backlog with it.
        """
        if self._lock is not None:
            try:
                info = os.stat(self.path)
                if (info.st_dev, info.st_ino) == self._bound:  # unless somebody has replaced it
                    os.unlink(self.path)
            except OSError:
                pass
        close(self.sock)
        if self._lock is not None:
            os.close(self._lock)  # last, because whoever holds the lock owns the path
            self._lock = None


def listen(path: str, mode: int) -> Listener:
    """Listen on the socket that systemd has passed, or at `path`.

    `mode` is that of the new socket. Raises ListenError.
    """
    passed = _passed()
    if passed is not None:
        return passed
    directory = os.path.dirname(path)
    try:
        if directory == _address.classic_directory():
            _make_private(directory)
        return _bind(path, mode)
    except FileNotFoundError:
        raise ListenError(f"cannot listen on {path}: there is no directory {directory}") from None
    except OSError as error:
        where = error.filename or path
        raise ListenError(f"cannot listen on {where}: {error.strerror or error}") from None


def _make_private(directory: str) -> None:
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    info = os.lstat(directory)  # not stat, because anybody can make a link under /tmp
    if (
        not stat.S_ISDIR(info.st_mode)
        or info.st_uid != os.geteuid()
        or stat.S_IMODE(info.st_mode) & 0o077
    ):
        raise PermissionError(
            errno.EPERM, f"not a directory of user {os.geteuid()} with mode 0700", directory
        )


def _bind(path: str, mode: int) -> Listener:
    if len(os.fsencode(path)) > _LONGEST:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {_LONGEST} bytes", path)
    # The lock is held until the process ends, and its file is never removed: a lock on a file that
    # another process has unlinked meanwhile would protect nothing.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock = os.open(path + ".lock", flags, 0o600)
    sock = socket.socket(socket.AF_UNIX)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ListenError(f"another errand-boy listens on {path}") from None
        _remove_stale(path)
        before = os.umask(0o777 & ~mode)  # so that the socket has its mode from the start
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
        info = os.stat(path)
        return Listener(sock, path, lock, (info.st_dev, info.st_ino))
    except BaseException:
        sock.close()
        os.close(lock)
        raise


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens. Call it with the lock held."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise ListenError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its backlog is full, so somebody listens
            pass
    raise ListenError(f"another program listens on {path}")


def _passed() -> Listener | None:
    pid = os.environ.pop("LISTEN_PID", None)
    count = os.environ.pop("LISTEN_FDS", None)
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count is None:
        return None
    if count != "1":
        raise ListenError(f"systemd passed {count} sockets; the daemon takes exactly one")
    try:
        sock = socket.socket(fileno=_FIRST_PASSED)
        path = sock.getsockname()
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(f"the descriptor from systemd: {error.strerror}") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listens:
        raise ListenError("the socket from systemd is not a listening Unix stream socket")
    return Listener(sock, os.fsdecode(path), None, None)


class Supervisor:
    """systemd, or another supervisor that listens at `address` ("": none)."""

    def __init__(self, address: str) -> None:
        self.address = address

    def notify(self, state: str) -> None:
        """Send `state`, such as "READY=1"; do nothing if nobody listens."""
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode(), address)
        except OSError:  # the service matters more than its supervisor
            pass
