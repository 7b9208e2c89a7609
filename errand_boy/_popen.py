"""Popen: the standard library's, but for how the child is started."""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from operator import index

from errand_boy import _child, _direct, _request, _ways, _wire
from errand_boy._frame import MOST_ATTEMPTS, SpawnFrame, acquire
from errand_boy._functions import original_popen
from errand_boy._native import lib
from errand_boy._request import Request
from errand_boy._wire import Exited, Failed, Reply, Spawned
from errand_boy.errors import HelperDiedError, HelperError, NotServedError

_LOOK = 100_000  # microseconds, after which a start that is pending is looked at whatever happens

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, AnyStr

    from errand_boy._connection import Connection

    _Base = subprocess.Popen
else:
    AnyStr = str  # typing takes milliseconds to import
    _Base = original_popen()


class Popen(_Base[AnyStr]):
    """subprocess.Popen whose child is started without a fork, at the same cost by any process.

    All parameters, methods and exceptions are those of the running Python's subprocess.Popen, and
    on Linux the child is a child of this process. It is started in this process; by a helper if
    `user`, `group` or `extra_groups` is given, after errand_boy.start(), or if the environment
    variable ``ERRAND_BOY_SPAWN`` says so; and the standard library's way where the system lacks
    what is needed. A wait with a time-out ends when the child does.

    `preexec_fn` may be None, os.setsid or os.setpgrp; any other function runs the standard
    library's way, by a fork of this process, with a warning.

    Where a helper is needed, the constructor also raises HelperError if there is none, and
    HelperDiedError if it ends in the middle of a start. ``ERRAND_BOY_SPAWN=direct`` makes it raise
    OSError (ENOTSUP, ENOSYS) for what can't be started in this process; a value that is unknown
    makes it raise ValueError.
    """

    # Set where the helper owns the child: the connection over which it reports the child's end.
    _connection: Connection | None = None
    _usage: tuple[int, ...] = ()  # see protocol.Exited
    _more_options = b""
    _default_group = -1  # the caller's
    _patience_us = _direct.PATIENCE_US
    _names: tuple[Any, Any]  # of the program and its directory, for an error

    def _execute_child(self, *given: Any) -> None:
        # Follows CPython's _execute_child of 3.13, which gives the reasons.
        args: Any
        (
            args, executable, preexec_fn, close_fds, pass_fds, cwd, env, _, _, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
            restore_signals, gid, gids, uid, umask, start_new_session,
        ) = given[:22]  # fmt: skip
        process_group = given[22] if len(given) > 22 else -1  # Python 3.11
        if preexec_fn is os.setsid:
            start_new_session = True
        elif preexec_fn is os.setpgrp:
            process_group = 0
        elif preexec_fn is not None:
            self._execute_function(preexec_fn, given)
            return
        has_ids = (
            gids is not None or max(-1 if gid is None else gid, -1 if uid is None else uid) >= 0
        )
        way = self._way(has_ids)
        if way == "subprocess":
            self._execute_original(given)
            return

        args = _request.arguments(args, shell, executable)
        if executable is None:
            executable = args[0]
        sys.audit("subprocess.Popen", executable, args, cwd, env)

        settings, flags = _request.settings(
            env=env,
            cwd=cwd,
            restore_signals=restore_signals,
            umask=umask,
            start_new_session=start_new_session,
            process_group=process_group,
            default_group=self._default_group,
            gids=gids,
            gid=gid,
            uid=uid,
        )
        options = _request.command(args, executable, env) + self._more_options + settings
        standard = _request.standard(p2cread, c2pwrite, errwrite)
        others = _request.others(pass_fds) if pass_fds else []

        self._names = executable, cwd
        if way == "direct":
            if not close_fds:
                flags |= lib.EB_KEEP_FILES
            null = vars(self).get("_devnull")
            if p2cwrite != -1 or p2cread == null:
                flags |= lib.EB_OWN_STDIN
            if c2pread != -1 or c2pwrite == null:
                flags |= lib.EB_OWN_STDOUT | (lib.EB_OWN_STDERR if errwrite == c2pwrite else 0)
            if errread != -1 or errwrite == null:
                flags |= lib.EB_OWN_STDERR
            failed = self._start_here(Request(options, standard, others, flags))
            if failed and _wire.is_refused(failed):
                _direct.give_up()
                self._way(has_ids)  # raises where it is forced
                self._execute_original(given)
                return
        else:
            if not close_fds:
                others = _request.with_inheritable(others)
            failed = self._ask(Request(options, standard, others, flags))
        if failed:
            raise _wire.spawn_error(failed, *self._names)
        if standard != (-1, -1, -1):
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _way(self, with_ids: bool) -> str:
        return _ways.way(with_ids)

    def _start_here(self, request: Request) -> Failed | None:
        """Start a command in this process; return why it could not be."""
        outcome = _direct.spawn(
            self,
            request.options,
            *request.standard,
            request.others,
            request.flags,
            self._patience_us,
        )
        if not (outcome is None or isinstance(outcome, tuple)):
            outcome = self._await_start(outcome)
        return Failed(0, *outcome) if outcome else None

    def _await_start(self, start: object) -> tuple[int, int] | None:
        """Await the outcome of a pending start."""
        outcome: tuple[int, int] | None
        try:
            while (outcome := _direct.await_spawn(self, start, _LOOK)) is start:
                pass
        finally:
            _direct.leave_spawn(start)
        return outcome

    def _ask(self, request: Request) -> Failed | None:
        """Have a command started by a helper; return why it could not be."""
        try:
            reply = self._start(request)
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise OSError(error.errno, error.strerror, self._names[0]) from None
            raise
        return reply if isinstance(reply, Failed) else None

    def _close_pipe_fds(
        self, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int
    ) -> None:
        # Not os.close: gevent's closes later, which may be too late for an end-of-file.
        null: int | None = getattr(self, "_devnull", None)
        pairs = (p2cwrite, p2cread), (c2pread, c2pwrite), (errread, errwrite)
        for ours, theirs in pairs:
            if ours != -1 and theirs not in (-1, null):
                posix.close(theirs)
        if null is not None:
            posix.close(null)
        self._closed_child_pipe_fds = True

    if TYPE_CHECKING:

        def _handle_exitstatus(self, status: int) -> None: ...

        _waitpid_lock: Any
        _child_created: bool

    def _execute_function(self, preexec_fn: Callable[[], Any], given: tuple[Any, ...]) -> None:
        """Start a command with a `preexec_fn` that can't be sent."""
        _warn_of_fork(preexec_fn)
        self._execute_original(given)

    def _execute_original(self, given: tuple[Any, ...]) -> None:
        """Start a command the standard library's way; `given` are _execute_child's arguments."""
        super()._execute_child(*given)  # type: ignore[misc]

    def _acquire(self, request: Request, spawn_frame: SpawnFrame) -> Connection:
        """Prepare `request` for a connection, and return that."""
        from errand_boy import _helper  # noqa: PLC0415  most processes need none

        return _helper.launcher.acquire(request, spawn_frame)

    def _outcome(self, connection: Connection, spawn_frame: SpawnFrame) -> Spawned | Failed:
        """Send what has not been sent of a request, and return its outcome."""
        return connection.outcome(spawn_frame)

    def _start(self, request: Request) -> Spawned | Failed | None:
        spawn_frame = acquire()
        try:
            for _ in range(MOST_ATTEMPTS):
                try:
                    connection = self._acquire(request, spawn_frame)
                    reply = self._outcome(connection, spawn_frame)
                    self._take(reply, connection)
                except NotServedError:
                    connection.discard()
                    continue
                except BaseException as error:
                    self._abandon(spawn_frame, error)
                    raise
                if self._connection is None:
                    connection.give_back()
                return reply
        finally:
            spawn_frame.done()
        raise HelperError(errno.EPIPE, "the helper ends as soon as it is asked to start a command")

    def _abandon(self, spawn_frame: SpawnFrame, error: BaseException) -> None:
        """Have what became of a request whose start has failed with `error`."""
        # Descriptors that cannot be sent end the connection, not the helper; if it is the helper
        # that ended, the next start finds that out.
        connection = spawn_frame.connection
        if connection is None:
            return
        if not isinstance(error, OSError):
            connection.recover()
        if connection.reply is not None:
            self._take(connection.reply, connection)
        if self._connection is None:
            connection.close()

    def _take(self, reply: Reply, connection: Connection) -> None:
        """Make the outcome this object's own; calling it again has no effect."""
        if isinstance(reply, Spawned):
            self.pid = reply.pid
            self._child_created = True
            if reply.by_helper:
                connection.pool.owns_children = True
                self._connection = connection
        elif isinstance(reply, Failed) and reply.pid > 0 and self.returncode is None:
            self.pid = reply.pid
            with contextlib.suppress(ChildProcessError):  # somebody waited for any child
                _, status = posix.waitpid(reply.pid, 0)
                self._handle_exitstatus(status)

    # -- where the helper owns the child --

    def _internal_poll(self, _deadstate: int | None = None, **kwargs: Any) -> int | None:
        connection = self._connection
        if connection is None:
            return super()._internal_poll(_deadstate, **kwargs)  # type: ignore[misc,no-any-return]
        if connection.is_foreign():
            if _deadstate is None:
                raise _not_ours()
            self.returncode = _deadstate
            return _deadstate
        # The standard library polls forgotten objects, whatever else is being started.
        ignored = TimeoutError if _deadstate is None else OSError
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                with contextlib.suppress(ignored):
                    self._await_exit(0.0)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        connection = self._connection
        if connection is None:
            if _child.STDLIB_POLLS and _child.wait(self, timeout):
                return self.returncode
            return super()._wait(timeout)  # type: ignore[misc,no-any-return]
        if connection.is_foreign():
            raise _not_ours()
        if timeout is None:
            with self._waitpid_lock:
                self._await_exit(None)
            return self.returncode
        start = time.monotonic()
        if not self._waitpid_lock.acquire(timeout=max(timeout, 0)):
            raise subprocess.TimeoutExpired(self.args, timeout)
        try:
            self._await_exit(max(0.0, timeout - (time.monotonic() - start)))
        except TimeoutError:
            raise subprocess.TimeoutExpired(self.args, timeout) from None
        finally:
            self._waitpid_lock.release()
        return self.returncode

    def _await_exit(self, timeout: float | None) -> None:
        connection = self._connection
        if self.returncode is not None or connection is None:
            return
        try:
            reply = connection.receive(timeout)
        except TimeoutError:
            raise
        except (NotServedError, OSError) as error:
            self.returncode = -signal.SIGKILL  # nobody can tell any more
            with connection.lock:
                self._connection = None
            connection.close()
            if isinstance(error, NotServedError):
                raise HelperDiedError(
                    errno.EPIPE, "errand-boy's helper ended: the command's exit status is lost"
                ) from None
            raise
        if isinstance(reply, Exited):
            self._usage = reply.usage
            self._handle_exitstatus(reply.status)
            # Once it is back, another command's request may be on its way over it.
            with connection.lock:
                self._connection = None
            connection.give_back()

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process; does nothing if it is known to have ended."""
        if self._connection is None:
            if not _child.send_signal(self, sig):
                super().send_signal(sig)
        elif self.poll() is None:
            self._send_signal_frame(self.pid, sig)

    def _send_signal_frame(self, pid: int, sig: int) -> None:
        if not 0 <= index(sig) < signal.NSIG:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        connection = self._connection
        if connection is not None:
            with connection.lock:
                if self._connection is not None:
                    connection.send_signal(pid, sig)


def _not_ours() -> ChildProcessError:
    return ChildProcessError(errno.ECHILD, "another process started the command, before a fork")


_warned: set[tuple[str, int]] = set()


def _warn_of_fork(preexec_fn: Callable[[], Any]) -> None:
    modules = ("subprocess", "gevent.subprocess", "eventlet.green.subprocess")
    files = [sys.modules[name].__file__ or "" for name in modules if name in sys.modules]
    inside = (os.path.dirname(__file__) + os.sep, *files)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
        level += 1
    # Not left to the warnings module: os.get_exec_path resets its memory with each command.
    place = (frame.f_code.co_filename, frame.f_lineno)
    if place in _warned:
        return
    _warned.add(place)
    name = getattr(preexec_fn, "__qualname__", repr(preexec_fn))
    warnings.warn(
        f"preexec_fn={name} makes Popen fork this process. Use user=, group=, extra_groups=, "
        "umask=, cwd=, start_new_session= or process_group= instead, or start a small program that "
        "does it and then executes the command",
        RuntimeWarning,
        stacklevel=level,
    )
