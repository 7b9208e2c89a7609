"""A started command: its end, and signals to it, for a process object of any class.

The classes keep their state as subprocess.Popen does: `pid`, `returncode`, `_waitpid_lock`. A child
of this process needs nothing else. The pid belongs to the child until somebody has waited for it,
and nobody waits without the lock. So the holder of the lock may send a signal, or open a pidfd. If
a helper owns the child, the object has a HelperChild as `_helper_child`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from operator import index

from errand_boy import _native
from errand_boy._wire import frames
from errand_boy._wire.frames import Exited
from errand_boy.errors import HelperDiedError, NotServedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any

    from errand_boy._wire.connection import Connection

# Since Python 3.15 subprocess itself waits by pidfd.
_STDLIB_POLLS = sys.version_info < (3, 15)

_MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes, the unit of ru_maxrss

_LONGEST = 3600.0  # seconds of one wait: poll(2) takes at most 24 days, a lock no infinity


_LONGEST_POLL = 1e6  # seconds; in milliseconds that fits a C int


def ready(fd: int, seconds: float | None, *, reading: bool = True, writing: bool = False) -> bool:
    """Wait until `fd` is readable, writable or in an error state; return whether it is.

    Waits at most `seconds`, with the process's select module, so that under gevent and eventlet
    other greenlets run.
    """
    if not hasattr(select, "poll"):  # eventlet has taken it away; its select knows no limit
        return any(select.select([fd] if reading else [], [fd] if writing else [], [], seconds))
    poll = select.poll()
    poll.register(fd, reading * select.POLLIN | writing * select.POLLOUT)
    while seconds is not None and seconds > _LONGEST_POLL:
        if poll.poll(_LONGEST_POLL * 1000):
            return True
        seconds -= _LONGEST_POLL
    return bool(poll.poll(None if seconds is None else seconds * 1000))


class HelperChild:
    """A command that a helper owns. Its signals and its exit status go over the connection.

    `status` is its wait status, once it is known to have ended, and `usage` what it used, as in
    Exited. `lost` is the reason if its exit status is lost; it then counts as killed. The thread
    that receives the exit status calls `on_end`, after the process object has its return code.
    """

    __slots__ = ("connection", "lost", "on_end", "status", "tree", "usage")

    def __init__(self, connection: Connection) -> None:
        connection.pool.owns_children = True
        self.connection: Connection | None = connection  # until the end
        self.status: int | None = None
        self.usage: tuple[int, ...] = ()
        self.tree: tuple[int, ...] = ()
        self.lost: OSError | None = None
        self.on_end: Callable[[], Any] | None = None

    def wait(self, timeout: float | None) -> None:
        """Wait for the end, at most `timeout` seconds. Only one thread at a time may call this.

        Raises TimeoutError; ChildProcessError in a process forked since the start; and
        HelperDiedError or another OSError if the exit status is lost.
        """
        connection = self.connection
        if connection is None:
            return
        if connection.is_foreign():
            raise _not_ours()
        try:
            reply = connection.reply
            if not isinstance(reply, Exited):  # else the last call was interrupted
                reply = connection.receive(timeout)
        except TimeoutError:
            raise
        except (NotServedError, OSError) as error:
            self.lost = HelperDiedError(
                errno.EPIPE, "errand-boy's helper ended: the command's exit status is lost"
            )
            if not isinstance(error, NotServedError):
                self.lost = error
            self._end(signal.SIGKILL)
            connection.close()
            raise self.lost from None
        if isinstance(reply, Exited):
            self.usage, self.tree = reply.usage, reply.tree
            self._end(reply.status)
            connection.give_back()

    def _end(self, status: int) -> None:
        assert self.connection is not None
        self.status = status
        # Once it has been given back, another command may use the connection.
        with self.connection.lock:
            self.connection = None

    def is_foreign(self) -> bool:
        """Return whether this process was forked from the one that started the command."""
        connection = self.connection
        return connection is not None and connection.is_foreign()

    def send_signal(self, pid: int, number: int, flags: int = 0) -> None:
        """Send a signal to the command; a negative `pid` means its process group. Raises OSError.

        `flags` is 0, or EB_ENDS_GROUP as in the frame SIGNAL.
        """
        if not 0 <= index(number) < signal.NSIG:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        connection = self.connection
        if connection is not None:
            with connection.lock:
                if self.connection is not None:
                    connection.send_signal(pid, number | flags)


def _not_ours() -> ChildProcessError:
    return ChildProcessError(
        errno.ECHILD, "the command was started in another process, before a fork"
    )


def helper_child(process: Any) -> HelperChild | None:
    """Return the HelperChild of a command that a helper owns; None for a child of this process."""
    child: HelperChild | None = vars(process).get("_helper_child")
    return child


# -- how it ended --


class Verdict:
    """What Popen knows about the command's end. All attributes are None until it has ended.

    - `cause`: "exit"; "signal" if a signal ended it; "client" if this object sent that signal; or
      the limit that it exceeded: "timeout", "cpu", "memory", "output" or "processes".
    - `duration`: seconds from the start until the end was noticed.
    - `rusage`: a resource.struct_rusage of the command and the children that it has waited for.
      With `limits` or ``tree="all"`` it covers everything that the command has started.
    - `peak_memory`: bytes. For several processes it is the peak of the largest one or, with
      `limits`, the highest observed sum. Without `limits`, a command that this process has started
      itself has at least the memory of this process at that time.
    """

    _begun: float | None = None
    _over: float | None = None
    _usage: bytes | resource.struct_rusage | None = (
        None  # as wait4(2) returns it, until somebody asks
    )
    _sent = 0  # the last signal that this object has sent
    _ends_group = False  # when the command ends, the rest of its process group is killed
    _limited: Any = None  # a Tracker

    @property
    def cause(self) -> str | None:
        """Why the command ended: "exit", "signal", "client" or the name of a limit."""
        returncode: int | None = vars(self).get("returncode")
        if returncode is None:
            return None
        if self._limited is not None:
            found: str | None = self._limited.cause(returncode, _tree(self))
            if found is not None:
                return found
        if returncode >= 0:
            return "exit"
        return "client" if self._sent == -returncode else "signal"

    @property
    def duration(self) -> float | None:
        """How long the command took, in seconds."""
        if self._begun is None or self._over is None:
            return None
        return self._over - self._begun

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """The resources that the command used, as a resource.struct_rusage."""
        child = helper_child(self)
        if child is not None and child.usage:
            return frames.rusage(child.usage, child.tree)
        usage = self._usage
        if isinstance(usage, bytes):
            usage = self._usage = frames.kernels_rusage(usage)
        return usage

    @property
    def peak_memory(self) -> int | None:
        """The peak memory of the command, in bytes."""
        rusage = self.rusage
        if rusage is None:
            return None
        peak: int | None = None
        if self._limited is not None:
            peak = self._limited.peak_memory(_tree(self))
        return rusage.ru_maxrss * _MAXRSS if peak is None else peak

    @property
    def limits_by(self) -> str | None:
        """What enforces its limits: "cgroup", "rlimits" (a supervisor), or None without limits."""
        if self._limited is None:
            return None
        return "cgroup" if self._limited.limits.by_cgroup else "rlimits"


def _tree(process: Any) -> tuple[int, ...]:
    child = helper_child(process)
    return () if child is None else child.tree


def verdict(process: Any) -> dict[str, Any]:
    """Return the attributes about the end of `process`, for a result of run()."""
    return {name: getattr(process, name, None) for name in VERDICT}


VERDICT = ("cause", "duration", "rusage", "peak_memory", "limits_by")


def note_end(process: Any) -> None:
    """Record the time at which the end of `process` was noticed."""
    process._over = time.monotonic()
    if process._limited is not None:
        process._limited.finish()


def tell_verdict(process: Any, error: BaseException | None) -> None:
    """Add the attributes of Verdict to an exception that leaves the `with` statement of run()."""
    if isinstance(error, subprocess.SubprocessError):
        vars(error).update(verdict(process))
        if isinstance(error, subprocess.TimeoutExpired):
            error.cause = "timeout"  # type: ignore[attr-defined]


class Told:
    """A CompletedProcess with the attributes of Verdict, which are computed when they are read."""

    _end: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        end = self._end
        if name in VERDICT and end is not None:
            told = Verdict()
            vars(told).update(zip(_PLAIN_END, end, strict=True))
            vars(self).update(verdict(told))
            vars(self).pop("_end", None)
        if name in vars(self):  # by now: another thread may have been first
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> Any:
        """Make copies instances of the ordinary class, with all values, also in other processes."""
        getattr(self, "cause", None)
        return _copied, (type(self).__mro__[2], vars(self))


def _copied(kind: Any, attributes: Mapping[str, Any]) -> Any:
    done = kind.__new__(kind)
    vars(done).update(attributes)
    return done


_PLAIN_END = ("returncode", "_sent", "_begun", "_over", "_usage")  # all that Verdict needs


def completed(kind: type[Any], args: Any, returncode: int, *output: Any) -> Any:
    """Return a CompletedProcess of class `kind`, for the `process` of the run() that calls this."""
    done = kind(args, returncode, *output)
    process = sys._getframe(1).f_locals.get("process")
    if isinstance(process, Verdict) and process._limited is helper_child(process) is None:
        done._end = (returncode, process._sent, process._begun, process._over, process._usage)
    elif process is not None:
        vars(done).update(verdict(process))
    return done


# -- methods of subprocess.Popen; `original` is the method of the class of `process` --


def internal_poll(
    original: Callable[..., int | None],
    process: Any,
    _deadstate: int | None = None,
    **kwargs: Any,
) -> int | None:
    """Return the return code, or None."""
    child = helper_child(process)
    if child is None:
        if kwargs or process.returncode is not None or not isinstance(process, Verdict):
            return original(process, _deadstate, **kwargs)
        return _poll(process, _deadstate)
    if child.is_foreign():
        if _deadstate is None:
            raise _not_ours()
        process.returncode = _deadstate
    # The standard library polls forgotten objects when it starts another command.
    ignored = TimeoutError if _deadstate is None else OSError
    if process.returncode is None and process._waitpid_lock.acquire(False):
        try:
            with contextlib.suppress(ignored):
                _await_end(process, child, 0.0)
        finally:
            process._waitpid_lock.release()
    returncode: int | None = process.returncode
    return returncode


def _poll(process: Any, _deadstate: int | None) -> int | None:
    """Do what subprocess's own method does, and get the usage too."""
    if not process._waitpid_lock.acquire(False):
        return None
    try:
        if process.returncode is None:
            pid, status = wait_for(process, os.WNOHANG)
            if pid == process.pid:
                process._handle_exitstatus(status)
    except OSError as error:
        if _deadstate is not None:
            process.returncode = _deadstate
        elif error.errno == errno.ECHILD:
            process.returncode = 0  # somebody else has waited for it
    finally:
        process._waitpid_lock.release()
    returncode: int | None = process.returncode
    return returncode


def try_wait(process: Any, flags: int) -> tuple[int, int]:
    """Wait for a child of this process; see subprocess.Popen._try_wait."""
    try:
        return wait_for(process, flags)
    except ChildProcessError:
        return process.pid, 0


def wait_for(process: Any, flags: int) -> tuple[int, int]:
    """Wait for a child of this process as os.waitpid does, and note what it has used."""
    if process._ends_group:
        # Until somebody has waited for the leader, no other group can get its number. So a leader
        # that ends right after this look is left for the next call.
        options = os.WEXITED | os.WNOWAIT | (flags & os.WNOHANG)
        if os.waitid(os.P_PID, process.pid, options) is None:
            return 0, 0
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    pid, status, usage = _native.wait4(process.pid, flags)
    if pid:
        process._usage = usage
    return pid, status


def wait(original: Callable[..., int], process: Any, timeout: float | None) -> int:
    """Return the return code; see subprocess.Popen._wait."""
    child = helper_child(process)
    if child is None:
        # Also without a time-out, waiting first and reaping afterwards would release the GIL
        # twice, which costs 10 ms beside a busy thread.
        if timeout is None or not _STDLIB_POLLS or not wait_by_pidfd(process, timeout):
            return original(process, timeout)
        return int(process.returncode)
    if child.is_foreign():
        raise _not_ours()
    rest = None if timeout is None else max(timeout, 0)
    start = time.monotonic()
    if not process._waitpid_lock.acquire(timeout=-1 if rest is None else rest):
        raise subprocess.TimeoutExpired(process.args, timeout)  # type: ignore[arg-type]
    try:
        if rest is not None:
            rest = max(0.0, rest - (time.monotonic() - start))
        _await_end(process, child, rest)
    except TimeoutError:
        if timeout is None:  # a signal handler raised it
            raise
        raise subprocess.TimeoutExpired(process.args, timeout) from None
    finally:
        process._waitpid_lock.release()
    return int(process.returncode)


def send_signal(original: Callable[..., None], process: Any, sig: int) -> None:
    """Send a signal to the process; do nothing if it is known to have ended."""
    child = helper_child(process)
    if child is None:
        if not _send_signal(process, sig):
            original(process, sig)
    elif process.poll() is None:
        child.send_signal(process.pid, sig)


def _await_end(process: Any, child: HelperChild, timeout: float | None) -> None:
    """Wait for a helper's command to end, with the lock held. Raises as `wait` does."""
    if process.returncode is not None:
        return
    try:
        child.wait(timeout)
    finally:
        if child.status is not None:
            process._handle_exitstatus(child.status)
            if child.on_end is not None:
                child.on_end()


# -- for a child of this process --


def wait_by_pidfd(
    process: Any,
    timeout: float,
    until_readable: Callable[[int, float], Any] = ready,
) -> bool:
    """Wait for the end of `process`, as _wait of subprocess.Popen does, but without polling.

    `until_readable` waits for a descriptor, at most for the seconds given. Raises TimeoutExpired
    after `timeout` seconds. Returns False at once if no pidfd is available.
    """
    if process.returncode is not None:
        return True
    end = time.monotonic() + timeout
    while process.returncode is None:
        patience = max(0.0, min(end - time.monotonic(), _LONGEST))
        if not process._waitpid_lock.acquire(timeout=patience):
            if patience == _LONGEST:
                continue
            raise subprocess.TimeoutExpired(process.args, timeout)
        try:
            if _reap(process):
                break
            rest = end - time.monotonic()
            if rest <= 0:
                raise subprocess.TimeoutExpired(process.args, timeout)
            try:
                fd = _native.pidfd_open(process.pid)
            except OSError:
                # No descriptor is free, or the kernel or a filter refuses the call.
                return False
        finally:
            process._waitpid_lock.release()
        try:
            until_readable(fd, min(_LONGEST, rest))
        finally:
            os.close(fd)
    return True


def _send_signal(process: Any, sig: int) -> bool:
    """Send a signal to `process` and return True; return False if it may have ended.

    It may have ended if another thread holds the lock, since that thread is about to wait for it,
    or if a signal handler of this thread has interrupted the code that holds the lock.
    """
    if not process._waitpid_lock.acquire(False):
        return False
    try:
        if not _reap(process):
            with contextlib.suppress(ProcessLookupError):  # somebody else is waiting for it
                os.kill(process.pid, sig)
    finally:
        process._waitpid_lock.release()
    return True


def _reap(process: Any) -> bool:
    """Check whether `process` has ended, with the lock held; return whether it has."""
    if process.returncode is None:
        pid, status = process._try_wait(os.WNOHANG)
        if pid == process.pid:
            process._handle_exitstatus(status)
    return process.returncode is not None
