"""The files of jobs, in directories that only the server may enter.

For job N of a user, ``STATE/UID/N.job`` is the journal, on disk; ``RUNTIME/UID/N.ring`` has the
output, and the keeper listens at ``N.sock``. The keeper gets their descriptors, and holds a lock on
the journal as long as it lives. It is a process of the user, so what it writes is checked like
anything that comes from a stranger.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,63}")  # none that looks like an option
WHOMS = "", "process", "group", "all"  # which processes a stop is for, as in `tree`
MOST_RING = 1 << 30  # bytes, of each stream
MOST_READ = 64 << 10  # bytes of a journal; the server's line takes at most half of them
_BACKLOG = 16  # connections that a keeper has not accepted yet
_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | _OLD
_LATEST = 1e12  # seconds since 1970


class JobsError(Exception):
    """A request is refused; the text says why, in one line."""

    is_missing = False  # there is no such job


def boot_id() -> str:
    """Return the kernel's id of this boot of the machine, or "" without /proc."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


class Store:
    """The two directories of all jobs. Raises OSError, and JobsError if another daemon has them."""

    def __init__(self, state: str, runtime: str, *, create: bool) -> None:
        self._state = self._runtime = -1
        self._paths = state, runtime
        try:
            self._state = _locked(state, create)
            self._runtime = _directory(runtime, create=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the directories for another daemon."""
        for fd in self._state, self._runtime:
            if fd >= 0:
                os.close(fd)
        self._state = self._runtime = -1

    def uids(self) -> list[int]:
        """Return the users who have jobs."""
        return sorted(int(name) for name in os.listdir(self._state) if name.isdecimal())

    def mend(self) -> list[str]:
        """Make those again that somebody has removed, and return their paths. Raises as above."""
        made = []
        for fd, path, opened in zip(
            (self._state, self._runtime), self._paths, (_locked, _directory), strict=True
        ):
            if _is_removed(fd):
                _replace(fd, opened(path, True))
                made.append(path)
        return made

    def mend_files(self, files: Files) -> None:
        """Do so for the directories of one user. Raises OSError."""
        for fd, directory in (files.state, self._state), (files.runtime, self._runtime):
            if _is_removed(fd):
                _replace(fd, _enter(str(files.uid), directory))

    def of(self, uid: int) -> Files:
        """Return the files of a user's jobs. Raises OSError."""
        state = _enter(str(uid), self._state)
        try:
            return Files(uid, state, _enter(str(uid), self._runtime))
        except BaseException:
            os.close(state)
            raise


def _directory(path: str, create: bool) -> int:
    """Open a directory that belongs to us and is closed to others; make it if `create`."""
    if create:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
    return _checked(os.open(path, _DIRECTORY), path)


def _locked(path: str, create: bool) -> int:
    fd = _directory(path, create)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise JobsError(
            f"another daemon keeps its jobs in {path}: give this one --job-state"
        ) from None
    return fd


def _is_removed(directory: int) -> bool:
    return os.fstat(directory).st_nlink == 0


def _replace(fd: int, new: int) -> None:
    """Have `fd` be what `new` is, which is closed."""
    try:
        os.dup2(new, fd, inheritable=False)
    finally:
        os.close(new)


def _enter(name: str, directory: int) -> int:
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=directory)
    return _checked(os.open(name, _DIRECTORY, dir_fd=directory), name)


def _checked(fd: int, path: str) -> int:
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        os.close(fd)
        text = f"not a directory of user {os.geteuid()} with mode 0700"
        raise PermissionError(errno.EPERM, text, path)
    return fd


class New:
    """The open files of a new job: descriptors for its keeper."""

    def __init__(self, journal: int, ring: int, listener: socket.socket) -> None:
        self.journal = journal
        self.ring = ring
        self.listener = listener

    def close(self) -> None:
        """Leave them to the keeper."""
        os.close(self.journal)
        os.close(self.ring)
        self.listener.close()


class Files:
    """The files of one user's jobs; `state` and `runtime` are descriptors of its directories."""

    def __init__(self, uid: int, state: int, runtime: int) -> None:
        self.uid = uid
        self.state = state
        self.runtime = runtime

    def close(self) -> None:
        """Close the directories."""
        os.close(self.state)
        os.close(self.runtime)

    def numbers(self) -> list[int]:
        """Return the numbers of all jobs in ascending order."""
        names = (name.partition(".") for name in os.listdir(self.state))
        return sorted(int(number) for number, _, kind in names if kind == "job" and _is_id(number))

    def last_removed(self) -> int:
        """Return the number of the newest job if it has been removed; 0 if that is not known."""
        try:
            fd = os.open("last", os.O_RDONLY | _OLD, dir_fd=self.state)
            try:
                return int(os.read(fd, 20))
            finally:
                os.close(fd)
        except (OSError, ValueError):
            return 0

    def note_last(self, number: int) -> None:
        """Save the number of the newest job before its removal, so that no other job gets it."""
        with suppress(OSError):
            fd = os.open("last", os.O_WRONLY | os.O_CREAT | _OLD, 0o600, dir_fd=self.state)
            try:
                os.pwrite(fd, b"%020d" % number, 0)
            finally:
                os.close(fd)

    def create(self, number: int, entry: dict[str, Any]) -> New:
        """Make the files of a job, and write `entry`. Raises OSError; FileExistsError if it exists.

        The returned descriptor of the journal, and its copies, hold the lock.
        """
        journal = ring = -1
        listener = socket.socket(socket.AF_UNIX)
        try:
            flags = os.O_WRONLY | os.O_APPEND | _NEW
            journal = os.open(f"{number}.job", flags, 0o600, dir_fd=self.state)
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(journal, _line(entry))
            for kind in "ring", "sock":  # from before the number was lost on disk
                self._unlink(number, kind)
            ring = os.open(f"{number}.ring", os.O_RDWR | _NEW, 0o600, dir_fd=self.runtime)
            listener.setblocking(False)
            # Others can't enter the directory. A path this short always fits an address.
            listener.bind(self._socket_path(number))
            listener.listen(_BACKLOG)
        except BaseException:
            for fd in journal, ring:
                if fd >= 0:
                    os.close(fd)
            listener.close()
            if journal >= 0:  # the others are not another job's
                self.remove(number)
            raise
        return New(journal, ring, listener)

    def read(self, number: int) -> dict[str, Any]:
        """Return the contents of a job's journal. Raises OSError."""
        fd = os.open(f"{number}.job", os.O_RDONLY | _OLD, dir_fd=self.state)
        try:
            data = os.read(fd, MOST_READ)
        finally:
            os.close(fd)
        return {**_checked_entry(data), "id": number, "uid": self.uid}

    def is_held(self, number: int) -> bool:
        """Return whether the keeper of a job lives, as far as its journal tells. Raises OSError."""
        try:
            fd = os.open(f"{number}.job", os.O_RDONLY | _OLD, dir_fd=self.state)
        except FileNotFoundError:  # somebody has removed it
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def note(self, number: int, **values: object) -> None:
        """Add a line to the journal of a job that is over."""
        with suppress(OSError):
            fd = os.open(f"{number}.job", os.O_WRONLY | os.O_APPEND | _OLD, dir_fd=self.state)
            try:
                if os.fstat(fd).st_size < MOST_READ:
                    os.write(fd, _line(values))
            finally:
                os.close(fd)

    def open_ring(self, number: int) -> int:
        """Return a new read-only descriptor of the output. Raises OSError."""
        return os.open(f"{number}.ring", os.O_RDONLY | _OLD, dir_fd=self.runtime)

    def connect(self, number: int) -> socket.socket:
        """Return a connection to a job's keeper. Raises OSError, BlockingIOError if it is busy."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(self._socket_path(number))
        except BaseException:
            sock.close()
            raise
        return sock

    def leave(self, number: int) -> None:
        """Remove the files that only a keeper needs."""
        self._unlink(number, "sock")

    def remove(self, number: int) -> None:
        """Remove all files of a job, whose keeper has ended."""
        self._unlink(number, "sock")
        with suppress(OSError):  # free the memory, since somebody may keep it open
            flags = os.O_WRONLY | os.O_TRUNC | _OLD
            os.close(os.open(f"{number}.ring", flags, dir_fd=self.runtime))
        self._unlink(number, "ring")
        with suppress(OSError):
            os.unlink(f"{number}.job", dir_fd=self.state)

    def _socket_path(self, number: int) -> str:
        return f"/proc/self/fd/{self.runtime}/{number}.sock"

    def _unlink(self, number: int, kind: str) -> None:
        with suppress(OSError):
            os.unlink(f"{number}.{kind}", dir_fd=self.runtime)


def _is_id(text: str) -> bool:
    return text.isdecimal() and text.isascii() and text[0] != "0"


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode("ascii") + b"\n"


# -- checks of a journal's contents --


def _is_number(value: object, most: int = 1 << 63) -> bool:
    return type(value) is int and 0 <= value < most


def _is_pid(value: object) -> bool:
    return _is_number(value, 1 << 31) and value != 0


def _is_status(value: object) -> bool:
    """Return whether it is the wait status of a process that has ended."""
    return _is_number(value, 1 << 16) and (os.WIFEXITED(value) or os.WIFSIGNALED(value))  # type: ignore[arg-type]


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < _LATEST  # type: ignore[operator]


def _is_name(value: object) -> bool:
    return type(value) is str and NAME.fullmatch(value) is not None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST_RING


def _is_text(value: object) -> bool:
    return type(value) is str


def are_steps(value: object) -> bool:
    """Return whether `value` is a `stop`: a list of signals, each with seconds or None."""
    return type(value) is list and all(
        type(step) is list
        and len(step) == 2
        and type(step[0]) is int
        and 0 < step[0] <= 64
        and (step[1] is None or _is_time(step[1]))
        for step in value
    )


def _are_texts(value: object) -> bool:
    return type(value) is list and all(map(_is_text, value))


def _numbers(count: int, most: int = 1 << 63) -> Callable[[object], bool]:
    """Return a function that checks whether a value is a list of `count` numbers."""

    def are_numbers(value: object) -> bool:
        return (
            type(value) is list
            and len(value) == count
            and all(_is_number(number, most) for number in value)
        )

    return are_numbers


_BY_SERVER: dict[str, Callable[[object], bool]] = {
    "name": _is_name,
    "argv": _are_texts,
    "cwd": _is_text,
    "started": _is_time,
    "boot_id": _is_text,
    "pty": lambda value: type(value) is bool,
    "ring": _is_size,
    "log": _is_text,
    "stop": are_steps,
    "whom": lambda value: value in WHOMS,
    "client": _is_number,
}
_LATER: dict[str, Callable[[object], bool]] = {
    "pid": _is_pid,
    "keeper": _is_pid,
    "begun": _is_number,
    "ended": _is_time,
    "duration": _is_time,
    "status": _is_status,
    "usage": _numbers(9),
    "tree": _numbers(4),
    "cause": _is_number,
    "bytes": _numbers(2),
    "lost": _numbers(2),
    "log_lost": _is_number,
    "log_errno": _is_number,
    "notify_errno": _is_number,
    "failed": _numbers(3, 1 << 31),
    "why": lambda value: value in ("killed", "reboot"),
    "seen": _is_time,
    "removed": lambda value: value is True,
}
_DEFAULTS = {"name": "", "argv": [], "cwd": "", "started": 0, "boot_id": "", "ring": 0}


def _checked_entry(data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = dict(_DEFAULTS)
    allowed = _BY_SERVER
    for line in _lines(data):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # cut short, for example because the machine went down
            values = None
        if isinstance(values, dict):
            for name, value in values.items():
                if name in allowed and allowed[name](value):
                    entry[name] = value
        allowed = _LATER
    return entry


def _lines(data: bytes) -> Iterator[bytes]:
    lines = data.split(b"\n", 8)
    yield from lines[:8]
