"""A started command: its end, and signals to it, for a process object of any class.

The classes keep their state as subprocess.Popen does: `pid`, `returncode`, `_waitpid_lock`. A child
of this process needs nothing else. The pid belongs to it until it has been waited for, and nobody
waits without the lock; so the holder of the lock may send it a signal, or open a pidfd. If a helper
owns the child, it is a HelperChild, which the object has as `_helper_child`.
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

from errand_boy import _native, _wire
from errand_boy._wire import Exited
from errand_boy.errors import HelperDiedError, NotServedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any

    from errand_boy._connection import Connection

# Since Python 3.15 subprocess itself waits by pidfd.
_STDLIB_POLLS = sys.version_info < (3, 15)

_LONGEST = 3600.0  # seconds, of one wait: poll(2) takes no more than 24 days, a lock not infinity


_LONGEST_POLL = 1e6  # seconds; a C int has room for so many milliseconds


def ready(fd: int, seconds: float | None, *, reading: bool = True, writing: bool = False) -> bool:
    """Wait until `fd` is readable, or writable, or has failed; return whether it is.

    The process's select module waits, so under gevent and eventlet other greenlets run.
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
    """A command that a helper owns: signals and the news of its end go over the connection.

    `status` is its wait status, once it is known to have ended, and `usage` what it used, as in
    Exited. `lost` is the reason why its end is not known; it counts as killed then. The thread
    that reads the news of the end calls `on_end`, when the process object has its return code.
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
        """Wait for the end, at most `timeout` seconds. Only one thread at a time may do so.

        Raises TimeoutError; ChildProcessError in a process forked since the start; and if the end
        is lost, HelperDiedError or another OSError.
        """
        connection = self.connection
        if connection is None:
            return
        if connection.is_foreign():
            raise _not_ours()
        try:
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
        # Once it is given back, another command's request may use the connection.
        with self.connection.lock:
            self.connection = None

    def is_foreign(self) -> bool:
        """Return whether it was started in another process, from which this one was forked."""
        connection = self.connection
        return connection is not None and connection.is_foreign()

    def send_signal(self, pid: int, number: int, flags: int = 0) -> None:
        """Send a signal to its pid, or to its process group, a negative pid. Raises OSError.

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
    """What Popen tells about the command's end. All attributes are None until that is known.

    - `cause`: "exit"; "signal" if one ended it; "client" if this object sent that signal; or the
      limit that it exceeded: "timeout", "cpu", "memory", "output" or "processes".
    - `duration`: seconds from the start until the end was noticed.
    - `rusage`: a resource.struct_rusage of the command and the children that it has waited for.
      With `limits` or ``tree="all"`` it is about everything that the command has started.
    - `peak_memory`: bytes. Of several processes it is the peak of the largest or, with `limits`,
      what they had at the same time, as far as that was seen. Without `limits`, a command that
      this process has started itself has at least what this process had then.
    """

    _begun: float | None = None
    _over: float | None = None
    _usage: bytes | resource.struct_rusage | None = (
        None  # as wait4(2) has it, until it is asked for
    )
    _sent = 0  # the last signal that this object has sent
    _ends_group = False  # what the command leaves of its process group is killed at its end
    _limited: Any = None  # a _limits.Tracker

    @property
    def cause(self) -> str | None:
        """Why the command ended."""
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
        """What the command has used."""
        child = helper_child(self)
        if child is not None and child.usage:
            return _wire.rusage(child.usage, child.tree)
        if isinstance(self._usage, bytes):
            self._usage = _wire.kernels_rusage(self._usage)
        return self._usage

    @property
    def peak_memory(self) -> int | None:
        """The most memory that the command had, in bytes."""
        rusage = self.rusage
        if rusage is None:
            return None
        peak: int | None = None
        if self._limited is not None:
            peak = self._limited.peak_memory(_tree(self))
        return rusage.ru_maxrss * 1024 if peak is None else peak

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
    """Return the attributes that a result of run() has for `process`."""
    return {name: getattr(process, name, None) for name in VERDICT}


VERDICT = ("cause", "duration", "rusage", "peak_memory", "limits_by")


def note_end(process: Any) -> None:
    """Note when the end of `process` became known."""
    process._over = time.monotonic()
    if process._limited is not None:
        process._limited.finish()


def tell_verdict(process: Any, error: BaseException | None) -> None:
    """Add what is known to an exception that leaves a `with` statement of run()."""
    if isinstance(error, subprocess.SubprocessError):
        vars(error).update(verdict(process))
        if isinstance(error, subprocess.TimeoutExpired):
            error.cause = "timeout"  # type: ignore[attr-defined]


class Told:
    """A CompletedProcess that tells about the end as Popen does, computed when asked for."""

    _end: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        if name in VERDICT and self._end is not None:
            told = Verdict()
            vars(told).update(zip(_PLAIN_END, self._end, strict=True))
            del self._end
            vars(self).update(verdict(told))
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> Any:
        """A copy, also in another process, is of the ordinary class, and says all of it."""
        getattr(self, "cause", None)
        return _copied, (type(self).__mro__[2], vars(self))


def _copied(kind: Any, attributes: Mapping[str, Any]) -> Any:
    done = kind.__new__(kind)
    vars(done).update(attributes)
    return done


_PLAIN_END = ("returncode", "_sent", "_begun", "_over", "_usage")  # all that the verdict is made of


def completed(kind: type[Any], args: Any, returncode: int, *output: Any) -> Any:
    """Return a CompletedProcess, `kind`; for the code of subprocess.run, whose process it takes."""
    done = kind(args, returncode, *output)
    process = sys._getframe(1).f_locals.get("process")
    if isinstance(process, Verdict) and process._limited is helper_child(process) is None:
        done._end = (returncode, process._sent, process._begun, process._over, process._usage)
    elif process is not None:
        vars(done).update(verdict(process))
    return done


# -- the methods of subprocess.Popen; `original` is the one that the class of `process` has --


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
    # The standard library polls forgotten objects, whatever else is being started.
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
    """Do as subprocess's own, but get the usage too."""
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
        # While the leader has not been waited for, the number of the group is its own.
        options = os.WEXITED | os.WNOWAIT | (flags & os.WNOHANG)
        if os.waitid(os.P_PID, process.pid, options) is not None:
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
        # Without a time-out too, to wait first and reap then would let go of the GIL twice, which
        # costs 10 ms beside a busy thread.
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
        if timeout is None:  # it is a signal handler's
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
    """Wait for the end of a helper's command. Call it with the lock held. Raises as `wait` does."""
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

    `timeout` is in seconds; `until_readable` waits for so long for a descriptor. Raises
    TimeoutExpired. Returns False at once if no pidfd can be had.
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
                # No descriptor is free, or a kernel or a filter refuses it.
                return False
        finally:
            process._waitpid_lock.release()
        try:
            until_readable(fd, min(_LONGEST, rest))
        finally:
            os.close(fd)
    return True


def _send_signal(process: Any, sig: int) -> bool:
    """Send a signal to `process` and return True; if it may have ended, only return False.

    It may have ended while the lock is held by another thread that is about to wait for it, or by
    the code that a signal handler of this thread has interrupted.
    """
    if not process._waitpid_lock.acquire(False):
        return False
    try:
        if not _reap(process):
            with contextlib.suppress(ProcessLookupError):  # it is being waited for by somebody else
                os.kill(process.pid, sig)
    finally:
        process._waitpid_lock.release()
    return True


def _reap(process: Any) -> bool:
    """Return whether `process` is known to have ended, after a look. Call it with the lock held."""
    if process.returncode is None:
        pid, status = process._try_wait(os.WNOHANG)
        if pid == process.pid:
            process._handle_exitstatus(status)
    return process.returncode is not None
