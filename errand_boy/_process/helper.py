"""The private helper of this process: started when needed, replaced when it no longer fits."""

from __future__ import annotations

import _socket
import atexit
import contextlib
import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Generator

from errand_boy import _native
from errand_boy._descriptors import above_standard, duplicate
from errand_boy._environment import variable
from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import ffi, lib
from errand_boy._options.request import Request
from errand_boy._options.spawn_frame import (
    MOST_ATTEMPTS,
    Caller,
    SpawnFrame,
    acquire,
    check,
    forget,
)
from errand_boy._process.child import ready
from errand_boy._wire import frames
from errand_boy._wire.connection import Connection, close_all
from errand_boy.errors import HelperError

_MOST_IDLE = 32  # connections kept for later

_EXECUTABLE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "errand-boy-helper")
_GRACE = 1.0  # seconds
_MOST_SAID = 1 << 10  # bytes
_START = 30.0  # seconds for its first message, after the exec

_NAMES = (
    "user ids (real, effective, saved)",
    "group ids (real, effective, saved)",
    "supplementary groups",
)

_WITH_FS = lib.EB_WITH_CWD | lib.EB_WITH_UMASK

_lock = threading.RLock()
_unreaped: list[Helper] = []  # retired helpers, which have ended or will soon


def _open_program() -> tuple[int, int, int]:
    """Return a descriptor of the helper's program, for use after a change of root or ids."""
    try:
        [fd] = above_standard(os.open(_EXECUTABLE, os.O_PATH | os.O_CLOEXEC))
    except OSError:
        return -1, 0, 0  # starting it will raise the error
    info = os.fstat(fd)
    return fd, info.st_dev, info.st_ino


_program = _open_program()


def _program_fd() -> int:
    fd, device, inode = _program
    try:
        info = os.fstat(fd)
    except OSError:
        return -1
    return fd if (info.st_dev, info.st_ino) == (device, inode) else -1


def _socketpair() -> tuple[socket.socket, socket.socket]:
    """Return our end of a connection and the helper's end, which reports who sends."""
    # Sockets that gevent or eventlet has replaced would let other greenlets run, and gevent's loop
    # could reap the command before its pid is known.
    classes = _socket.socket.__subclasses__()
    native: type[socket.socket]
    native = next(c for c in classes if c.__module__ == "socket")  # type: ignore[assignment]
    first, second = _socket.socketpair()
    fds = above_standard(first.detach(), second.detach())
    ours, theirs = (native(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd) for fd in fds)
    # Before anything is sent: the kernel records the sender only if the receiver asks for it.
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def _frame(sock: socket.socket, seconds: float) -> tuple[int, bytes] | None:
    """Return the next frame's kind and payload; None at the end. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    data, size = b"", frames.HEADER.size
    while len(data) < size:
        if not ready(sock.fileno(), max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        try:
            part = sock.recv(size - len(data))
        except ConnectionResetError:
            part = b""
        if not part:
            return None
        data += part
        if len(data) == frames.HEADER.size:
            size += min(frames.HEADER.unpack(data)[0], lib.EB_MAX_FRAME)
    return data[frames.HEADER.size - 1], data[frames.HEADER.size :]


def _ids_after_exec() -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the calling thread's ids as they are after an exec: the effective ids become saved."""
    (uid, euid, _), (gid, egid, _) = os.getresuid(), os.getresgid()
    return (uid, euid, euid), (gid, egid, egid), tuple(os.getgroups())


class Helper:
    """A running helper process, and the connections to it that no command uses."""

    def __init__(self, manager: HelperManager) -> None:
        self._manager = manager
        self.caller = Caller()
        self._owner = os.getpid()
        path = variable("ERRAND_BOY_HELPER")
        posix = variable("ERRAND_BOY_SPAWN") == "posix" or not lib.EB_HAVE_RAW
        arguments = [b"errand-boy: helper of %d" % self._owner, b"--private"]
        if manager.own_children:
            arguments.append(b"--own-children")
        if posix:
            arguments.append(b"--posix-spawn")
        strings = [ffi.new("char[]", argument) for argument in arguments]
        argv = ffi.new("char *[]", [*strings, ffi.NULL])
        share_fs = ffi.new("int *", 0 if posix else 1)
        step = ffi.new("char *[1]")
        ours, theirs = _socketpair()
        errors, its_errors = above_standard(*os.pipe())
        try:
            with theirs:
                pid = lib.eb_start_helper(
                    -1 if path else _program_fd(),
                    os.fsencode(path or _EXECUTABLE),
                    argv,
                    theirs.fileno(),
                    its_errors,
                    share_fs,
                    step,
                )
        finally:
            os.close(its_errors)
        if pid < 0:
            ours.close()
            os.close(errors)
            raise _not_started(-pid, ffi.string(step[0]).decode(), path or _EXECUTABLE)
        self.pid: int = pid
        manager.last_end = None
        self.shares_fs: bool = share_fs[0] != 0
        self.owns_children = False  # a reply will say so
        self._stays = False  # retired, but alive until its commands have ended
        self.idle: list[Connection] = []
        self._control = Connection(ours)
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended at once
                self._control.open()
            self._check_ids(path or _EXECUTABLE, errors)
        except BaseException:
            self.retire()
            raise
        finally:
            os.close(errors)

    def _check_ids(self, path: str, errors: int) -> None:
        # An exec changes ids depending on the kernel and on the program's mode.
        try:
            frame = _frame(self._control.sock, _START)
        except TimeoutError:
            text = f"the helper did not report within {_START:.0f} seconds"
            raise HelperError(errno.ETIMEDOUT, text, path) from None
        if frame is None:
            self._check_end(path, errors)
            return
        kind, payload = frame
        ids = struct.unpack(f"<{len(payload) // 4}I", payload) if kind == lib.EB_IDS else ()
        theirs, ours = (ids[:3], ids[3:6], ids[6:]), _ids_after_exec()
        for name, its, wanted in zip(_NAMES, theirs, ours, strict=True):
            if its != wanted:
                raise HelperError(
                    errno.EPERM,
                    f"the helper does not have this process's rights: its {name} are {its}, not "
                    f"{wanted}. See that its program is not set-user-ID or set-group-ID",
                    path,
                )

    def _check_end(self, path: str, errors: int) -> None:
        """Raise HelperError if the helper ended by itself, since the next one would too."""
        has_ended = self.ended(_GRACE)
        status = self._manager.last_end if has_ended else None
        if status is None or not os.WIFEXITED(status):
            return  # somebody has killed it: connect() will notice
        os.set_blocking(errors, False)  # other processes may have the other end open
        try:
            said = os.read(errors, _MOST_SAID).decode(errors="replace").strip()
        except BlockingIOError:
            said = ""
        text = f"the helper ended as soon as it was started, {self._manager.how_it_ended()}"
        if said:
            text += f": {said}"
        raise HelperError(errno.ENOEXEC, text + SEE_DOCTOR, path)

    def fits(self, fresh: Helper | None) -> bool:
        """Return whether it fits the calling thread; `fresh` is the helper it has just started."""
        spawn_frame = acquire()
        try:
            found = spawn_frame.read(self.caller, self.pid if self.shares_fs else 0)
        finally:
            spawn_frame.done()
        return _fits(found, self is fresh)

    def connect(self) -> Connection | None:
        """Return a new connection, or None if the helper has ended."""
        ours, theirs = _socketpair()
        connection = Connection(ours, self)
        try:
            with theirs:
                rights = struct.pack("i", theirs.fileno())
                if self._control.is_ours():
                    # A message this small is never mixed with those of other threads.
                    self._control.sock.sendmsg(
                        [frames.HEADER.pack(0, lib.EB_ADOPT)],
                        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
                        socket.MSG_NOSIGNAL,
                    )
                    connection.open()
                    return connection
        except (BrokenPipeError, ConnectionResetError):
            pass
        except OSError as error:
            if error.errno != errno.EBADF:  # else another thread has just retired it
                connection.close()
                raise
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    def is_there(self) -> bool:
        """Return whether the helper is alive, as far as its connections show."""
        try:
            return bool(self._control.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def take_back(self, connection: Connection) -> None:
        """Keep a connection for the next command, or close it. For Connection.give_back."""
        if self is self._manager.current and len(self.idle) < _MOST_IDLE:
            self.idle.append(connection)
            if self is not self._manager.current:  # retired meanwhile
                self._close_idle()
        else:
            connection.close()

    def discard(self, connection: Connection) -> None:
        """Drop `connection`, which broke, and this helper, which has probably ended."""
        connection.close()
        self._manager.dismiss(self)

    def _close_idle(self) -> None:
        while self.idle:
            with contextlib.suppress(IndexError):  # another thread took it
                self.idle.pop().close()

    def retire(self) -> None:
        """Have the helper take no more requests, and end after the current ones."""
        self._close_idle()
        if self._owner != os.getpid():
            self._control.close()
            return
        _unreaped.append(self)
        if self._control.is_ours():
            with contextlib.suppress(OSError):  # it has ended
                self._control.sock.shutdown(socket.SHUT_WR)
        else:
            # Somebody else has closed the socket, so we can't tell the helper to end, and copies in
            # forked processes may keep it alive.
            self._kill()
            self._control.close()

    def ended(self, grace: float) -> bool:
        """Return whether the helper has ended, and reap it.

        With a `grace` in seconds, wait so long, and then kill it if it may be killed. A helper that
        stays with its commands no longer shares anything with this process.
        """
        # Somebody may have waited for any child, including this one.
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                if not grace or not self._ends(grace):
                    return False
                _, status = os.waitpid(self.pid, 0)
            self._manager.last_end = status
        self._control.close()
        self._owner = 0  # its pid may belong to another process now
        return True

    def _ends(self, grace: float) -> bool:
        """Wait until the helper ends or says that it stays; return whether it ends."""
        if self._stays:
            return False
        deadline = time.monotonic() + grace
        try:
            while self._control.is_ours():
                frame = _frame(self._control.sock, max(0.0, deadline - time.monotonic()))
                if frame is None:
                    break
                if frame[0] == lib.EB_STAYS:
                    self._stays = True
                    self._control.close()
                    return False
        except TimeoutError:
            pass
        pidfd = _native.pidfd_open(self.pid)
        try:
            if ready(pidfd, max(0.0, deadline - time.monotonic())):
                return True
        finally:
            os.close(pidfd)
        # Some start takes long, or somebody has stopped the helper. Do not lose its commands.
        return not self.owns_children and self._kill()

    def _kill(self) -> bool:
        """Kill the helper, unless somebody has waited for it; return whether it ends."""
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                try:
                    os.kill(self.pid, signal.SIGKILL)
                except PermissionError:  # this process has given up the rights
                    return False
        return True


def _fits(found: int, fresh: bool) -> bool:
    return bool(found & lib.EB_FITS) and (fresh or not found & lib.EB_UNSURE)


def _not_started(error: int, step: str, path: str) -> HelperError:
    text = f"cannot start the helper: {step}: {os.strerror(error)}"
    if step.startswith("exec"):
        return HelperError(error, text + SEE_DOCTOR, path)
    if error in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        text += ". The kernel lacks this call (errand-boy needs Linux 5.9), or a seccomp filter"
        text += f" refuses it{SEE_DOCTOR}"
    return HelperError(error, text)


def ends_at_once(manager: HelperManager) -> HelperError:
    """Return the error for helpers that keep dying."""
    text = f"the helper ends again and again as soon as it is started, {manager.how_it_ended()}"
    return HelperError(errno.EAGAIN, text + SEE_DOCTOR)


class HelperManager:
    """Starts, finds and replaces the helper of one kind.

    With `own_children`, that helper's commands are its own children, and so can be streamed.
    """

    def __init__(self, own_children: bool) -> None:
        self.own_children = own_children
        self.current: Helper | None = None
        self.last_end: int | None = None  # the wait status of the last helper, if known

    def how_it_ended(self) -> str:
        """Return in words how the last helper ended."""
        status = self.last_end
        if status is None:
            return "for an unknown reason"
        code = os.waitstatus_to_exitcode(status)
        return f"by signal {-code}" if code < 0 else f"with exit status {code}"

    def acquire(self, request: Request, spawn_frame: SpawnFrame) -> Connection:
        """Prepare `request` for a helper that fits the calling thread; return its connection.

        `spawn_frame` keeps the connection, because the request may have been sent when an exception
        comes from outside. Raises HelperError if no helper can be started, and OSError if
        descriptors are short or the request is too long (E2BIG).
        """
        fresh: Helper | None = None
        lock = _lock  # a fork in a signal handler replaces it
        if _unreaped and lock.acquire(blocking=False):  # else another thread does it
            try:
                _reap()
            finally:
                lock.release()
        for _ in range(MOST_ATTEMPTS):
            helper = self.current
            if helper is None:
                helper = fresh = self._replace(None)
            try:
                connection = spawn_frame.connection = helper.idle.pop()
            except IndexError:
                connection = None
            pid, flags = (helper.pid, 0) if helper.shares_fs else (0, _WITH_FS)
            found = spawn_frame.prepare(request, helper.caller, pid, flags, connection)
            if found < 0:  # the request is too long: nothing has been sent
                spawn_frame.connection = None
                if connection is not None:
                    connection.give_back()
                check(found)
            if not _fits(found, helper is fresh):
                fresh = self._replace(helper)
            elif connection is None:
                connection = spawn_frame.connection = helper.connect()
                if connection is not None:
                    return connection
                fresh = self._replace(helper)
            elif found & lib.EB_CONNECTION:
                return connection
            if connection is not None:
                spawn_frame.connection = None
                connection.close()
        raise ends_at_once(self)

    def until_reachable(self) -> Generator[tuple[int, bool], None, None]:
        """Yield (descriptor, True) while `acquire` would wait until the descriptor is writable."""
        while (helper := self.current) is not None and not helper.idle:
            # Each start gets its own copy: event loops have one waiter for each descriptor.
            copy = duplicate(helper._control.sock.fileno())
            try:
                if ready(copy, 0, reading=False, writing=True):
                    return
                yield copy, True
            finally:
                os.close(copy)

    def start(self) -> None:
        """Start a helper, unless there is one that fits the calling thread."""
        fresh: Helper | None = None
        for _ in range(MOST_ATTEMPTS):
            helper = self.current
            if helper is not None and helper.fits(fresh):
                connection = None if helper.idle else helper.connect()
                if connection is not None:
                    connection.give_back()
                if helper.idle:
                    return
            fresh = self._replace(helper)
        raise ends_at_once(self)

    def dismiss(self, helper: Helper) -> None:
        """Forget `helper`, if it is the current one."""
        with _lock:
            if helper is self.current:
                self.retire()

    def _replace(self, old: Helper | None) -> Helper:
        """Replace `old` by a new helper, unless another thread has done so."""
        with _lock:
            if self.current is old:
                self.retire()
            if self.current is None:
                helper = Helper(self)
                if self.current is None:
                    self.current = helper
                else:  # a signal handler has meanwhile started one, in this thread
                    helper.retire()
                    _reap()
            return self.current

    def retire(self) -> None:
        """Retire the current helper. Call it with the lock held."""
        helper, self.current = self.current, None
        if helper is not None:
            helper.retire()
        _reap()


launcher = HelperManager(own_children=False)  # starts children of the calling process
runner = HelperManager(own_children=True)  # owns its commands, and can stream their output


def _reap(grace: float = 0.0) -> None:
    """Reap the retired helpers; kill those without own children that outlive `grace` seconds.

    Call it with the lock held.
    """
    for helper in _unreaped[:]:
        if helper.ended(grace):
            with contextlib.suppress(ValueError):  # a signal handler was here first
                _unreaped.remove(helper)


def stop() -> None:
    """End all helpers and wait for them.

    A helper with commands of an unfinished `map` stays until they end, but no longer shares
    anything with this process.
    """
    with _lock:
        launcher.retire()
        runner.retire()
        _reap(_GRACE)
    forget()


def _after_fork() -> None:
    global _lock
    # The parent's helpers are not ours, and a thread that no longer exists may hold the lock.
    _lock = threading.RLock()
    _unreaped.clear()
    launcher.current = runner.current = None
    close_all()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(stop)
