"""The private helper of this process: started when needed, replaced when it no longer fits."""

from __future__ import annotations

import atexit
import errno
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

from errand_boy import protocol
from errand_boy._native import ffi, lib
from errand_boy.connection import Connection
from errand_boy.errors import HelperError

_MOST_IDLE = 32  # connections kept for later

_EXECUTABLE = str(Path(__file__).with_name("errand-boy-helper"))

_lock = threading.RLock()
_current: Helper | None = None
_unreaped: list[Helper] = []  # retired; they have ended, or will soon
_thread = threading.local()


class Caller:
    """The calling thread's state as the kernel has it; one object for each thread."""

    def __init__(self) -> None:
        c = lib.eb_caller_new()
        if c == ffi.NULL:
            raise MemoryError
        self._c: Any = ffi.gc(c, lib.eb_caller_free)
        self._options: Any = ffi.buffer(c.options)

    def read(
        self, flags: int, helper: Helper | None = None, connection: Connection | None = None
    ) -> int:
        """Read the state anew, for a start by `helper` over `connection`; return what was found."""
        start, pid = ffi.NULL, 0
        fd, device, inode = -1, 0, 0
        if helper is not None:
            start = helper.caller._c
            if helper.shares_fs:
                pid = helper.pid
            else:
                flags |= lib.EB_WITH_UMASK
        if connection is not None:
            fd, device, inode = connection.sock.fileno(), connection.device, connection.inode
        found: int = lib.eb_caller_read(self._c, start, pid, flags, fd, device, inode)
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        return found

    @property
    def umask(self) -> int:
        """The file mode creation mask."""
        mask: int = self._c.umask
        return mask

    @property
    def options(self) -> bytes:
        """The options of a SPAWN request that make the child inherit this state."""
        data: bytes = self._options[: self._c.options_size]
        return data

    def environment(self) -> bytes:
        """Return the C library's environment, which os.putenv changes, as an option."""
        if lib.caller_read_environment(self._c):
            raise MemoryError
        c = self._c
        return protocol.option(lib.EB_TAG_ENV, ffi.buffer(c.environment, c.environment_size)[:])


def caller() -> Caller:
    """Return the calling thread's Caller."""
    try:
        return _thread.caller  # type: ignore[no-any-return]
    except AttributeError:
        _thread.caller = Caller()
        return _thread.caller  # type: ignore[no-any-return]


class Helper:
    """A running helper process, and the connections to it that are not in use."""

    def __init__(self) -> None:
        self.caller = Caller()
        self.caller.read(0)
        self._owner = os.getpid()
        path = os.environ.get("ERRAND_BOY_HELPER") or _EXECUTABLE
        posix = os.environ.get("ERRAND_BOY_SPAWN") == "posix"
        arguments = [b"errand-boy: helper of %d" % self._owner, b"--private"]
        if posix:
            arguments.append(b"--posix-spawn")
        strings = [ffi.new("char[]", argument) for argument in arguments]
        argv = ffi.new("char *[]", [*strings, ffi.NULL])
        share_fs = ffi.new("int *", 0 if posix else 1)
        ours, theirs = socket.socketpair()
        with theirs:
            pid = lib.eb_start_helper(os.fsencode(path), argv, theirs.fileno(), share_fs)
        if pid < 0:
            ours.close()
            raise HelperError(-pid, f"cannot start the helper: {os.strerror(-pid)}", path)
        self.pid: int = pid
        self.shares_fs: bool = share_fs[0] != 0
        self.owns_children = False  # until a reply says so
        self.idle: list[Connection] = []
        self._control = Connection(ours)
        self._control_lock = threading.Lock()
        ours.sendall(protocol.OPENING)

    def connect(self) -> Connection:
        """Return a new connection. Raises BrokenPipeError if the helper has gone."""
        if not self._control.is_ours():
            raise BrokenPipeError
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._control_lock:
                rights = struct.pack("i", theirs.fileno())
                self._control.sock.sendmsg(
                    [protocol.HEADER.pack(0, lib.EB_ADOPT)],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
                )
            return Connection(ours)
        except BaseException:
            ours.close()
            raise

    def release(self, connection: Connection) -> None:
        """Take back a connection whose last command has ended or is the caller's own child."""
        if self is _current and len(self.idle) < _MOST_IDLE:
            self.idle.append(connection)
        else:
            connection.close()

    def retire(self) -> None:
        """Close everything; the helper ends when its last connection does."""
        while self.idle:
            self.idle.pop().close()
        if self._owner == os.getpid():
            if self._control.is_ours():
                # Also where forked processes hold copies of it.
                self._control.sock.shutdown(socket.SHUT_RDWR)
            _unreaped.append(self)
        self._control.close()


def acquire(flags: int) -> tuple[Helper, Connection, Caller, int]:
    """Return a connection to a helper that fits the calling thread, whose state has been read.

    Raises HelperError if none can be started, and OSError for a lack of descriptors.
    """
    state = caller()
    for _ in range(_MOST_IDLE + 8):
        helper = _current or _replace(None)
        try:
            connection = helper.idle.pop()
        except IndexError:
            connection = None
        found = state.read(flags, helper, connection)
        if not found & lib.EB_FITS:
            if connection is not None:
                connection.close()
            _replace(helper)
        elif connection is None:
            try:
                return helper, helper.connect(), state, found
            except (BrokenPipeError, ConnectionResetError):
                _replace(helper)
        elif found & lib.EB_CONNECTION:
            return helper, connection, state, found
        else:
            connection.close()
    raise HelperError(errno.EAGAIN, "the helper ends again and again as soon as it is started")


def discard(helper: Helper, connection: Connection) -> None:
    """Take note that `connection` broke, and probably the helper with it."""
    connection.close()
    with _lock:
        if helper is _current:
            _retire_current()


def _replace(old: Helper | None) -> Helper:
    """Start a helper in place of `old`, unless another thread has."""
    global _current
    with _lock:
        if _current is old:
            _retire_current()
        if _current is None:
            helper = Helper()
            # A signal handler may have started one meanwhile, in this very thread.
            _retire_current()
            _current = helper
        return _current


def _retire_current() -> None:
    global _current
    helper, _current = _current, None
    if helper is not None:
        helper.retire()
    _reap(os.WNOHANG)


def _reap(options: int) -> None:
    for helper in _unreaped[:]:
        # One that owns children stays until the last of them has ended.
        wait = os.WNOHANG if helper.owns_children else options
        try:
            done, _ = os.waitpid(helper.pid, wait)
        except ChildProcessError:
            done = helper.pid  # somebody waited for any child
        if done:
            _unreaped.remove(helper)


def start() -> None:
    """Start the helper now, rather than with the first command; does nothing if it runs.

    A helper that is started early, while the process is small and single-threaded, starts fastest.
    Raises HelperError.
    """
    helper, connection, *_ = acquire(0)
    helper.release(connection)


def stop() -> None:
    """End the helper and wait for it; the next command starts a new one.

    Useful before ``os.exec*`` of a set-user-ID program: Linux ignores that bit while another
    process shares the working directory, as the helper does.
    """
    with _lock:
        _retire_current()
        _reap(0)


def helper_pid() -> int | None:
    """Return the running helper's pid, or None."""
    helper = _current
    return None if helper is None else helper.pid


def _after_fork() -> None:
    global _current, _lock, _thread
    # The parent's helper is not ours; a lock may be held by a thread that exists no more.
    _lock = threading.RLock()
    _thread = threading.local()
    _unreaped.clear()
    helper, _current = _current, None
    if helper is not None:
        helper.retire()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(stop)
