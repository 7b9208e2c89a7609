"""Ends a command on request, at a time-out, or at the end of `with`; for any class of process.

The object's `_ends` says how to end it, or is None. `_is_one_shot` means that run or call has made
it, which kill it after any exception.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from errand_boy import _native
from errand_boy._native import lib
from errand_boy._options import cgroup, ends as _ends
from errand_boy._options.ends import Ends
from errand_boy._process.child import _reap, helper_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LOOK = 0.02  # seconds between checks whether a command has ended, while its output is drained
_FOREVER = 2e6  # seconds; poll(2) takes little more


@contextlib.contextmanager
def _unreaped(process: Any) -> Iterator[bool]:
    """Keep others from waiting for a child of this process; yield whether nobody has waited yet."""
    lock = vars(process).get("_waitpid_lock")
    if lock is None:  # a gevent process, for which the loop of this thread waits
        yield process.returncode is None
        return
    with lock:
        yield not _reap(process)


class Target:
    """The processes of a command that get the signals."""

    def __init__(self, process: Any, ends: Ends) -> None:
        self._process = process
        self._child = helper_child(process)
        self._tree = ends.tree
        self._pidfd = -1
        self._cgroup: Any = process._more.get("cgroup") if ends.tree == "cgroup" else None
        if ends.tree == "group" and self._child is None:
            process._ends_group = True
            if "_waitpid_lock" not in vars(process):  # a gevent process: its loop waits for it
                with contextlib.suppress(OSError):
                    self._pidfd = _native.pidfd_open(process.pid)

    def send(self, number: int) -> None:
        """Send a signal to the processes."""
        process, child = self._process, self._child
        if self._tree == "cgroup":
            cgroup.signal_all(self._cgroup, number)
        elif process.returncode is not None:
            if self._pidfd >= 0:
                _ends.signal_left(self._pidfd, number)
        elif self._tree == "process":
            process.send_signal(number)
        elif child is not None:
            if self._tree == "all":
                child.send_signal(lib.EB_WHOLE_TREE, number)
            else:
                child.send_signal(-process.pid, number, lib.EB_ENDS_GROUP)
        else:
            with _unreaped(process) as is_live:
                if is_live:
                    with contextlib.suppress(ProcessLookupError):  # somebody else waits for it
                        os.killpg(process.pid, number)

    def close(self) -> None:
        """Forget them."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


# -- the methods of process objects --


def stop(process: Any, given: Any = None) -> int:
    """End the command as its `stop` and `tree` say, or by `given` steps; return its return code.

    Raises ValueError and TypeError for bad steps, and the exceptions of `wait`. An exception from
    outside sends SIGKILL at once.
    """
    ends: Ends = process._ends or Ends()
    if given is not None:
        ends = Ends(given, ends.tree, ends.drain)
    target = Target(process, ends)
    try:
        if process.poll() is not None and ends.tree != "cgroup":
            return int(process.returncode)
        course = ends.course(target.send)
        with contextlib.suppress(StopIteration):
            seconds = next(course)
            while True:
                seconds = course.send(_ends_within(process, seconds))
    except BaseException:
        with contextlib.suppress(OSError):
            target.send(signal.SIGKILL)
        raise
    finally:
        target.close()
    return int(process.wait())


def _ends_within(process: Any, seconds: float | None) -> bool:
    try:
        process.wait(timeout=seconds)
    except process._expired:
        return False
    return True


def leave(process: Any) -> None:
    """End the command at the end of `with`, after an exception."""
    ends: Ends = process._ends
    if ends.is_given or ends.tree != "process":
        stop(process)


def communicate(process: Any, input: Any, timeout: float | None) -> tuple[Any, Any]:
    """Do what subprocess does, for an object with `_ends`; end the command at a time-out."""
    ends: Ends = process._ends
    known: tuple[Any, Any] | None = vars(process).get("_closed_output")
    if known is not None:
        return known
    if timeout is None and process._limited is not None:
        timeout = _FOREVER  # without a time-out, subprocess reads a single pipe without checking it
    try:
        if ends.drain is None:
            return process._exchange_output(input, timeout)  # type: ignore[no-any-return]
        return _drained(process, input, timeout, ends.drain)
    except process._expired as expired:
        output = expired.output, expired.stderr
        if ends.is_given or process._is_one_shot:
            stop(process)
            if process.stdout or process.stderr or process.terminal:
                with contextlib.suppress(*process._expired):
                    process._exchange_output(None, ends.patience)
            output = _so_far(process)
            close(process)
        raise process._expired[0](process.args, timeout, *output) from None


def _drained(process: Any, input: Any, timeout: float | None, drain: float) -> tuple[Any, Any]:
    now = time.monotonic()
    times_up = None if timeout is None else now + timeout
    drained: float | None = None
    while True:
        until = min(t for t in (now + _LOOK, times_up, drained) if t is not None)
        try:
            return process._exchange_output(input, max(0.0, until - now))  # type: ignore[no-any-return]
        except process._expired:
            input, now = None, time.monotonic()
            if drained is None and process.poll() is not None:
                drained = now + drain
            if drained is not None and now >= drained:
                break
            if times_up is not None and now >= times_up and drained is None:
                raise
    return close(process)


def _output(process: Any) -> tuple[Any, Any]:
    """Return the output so far, as `communicate` does."""
    exchange = vars(process).get("_exchange")  # of one with a terminal, see pty
    if exchange is not None:
        return exchange.result(is_whole=False)  # type: ignore[no-any-return]
    streams = process.stdout, process.stderr
    out, errors = (
        None if stream is None else _as_wanted(stream, data)
        for stream, data in zip(streams, _so_far(process), strict=True)
    )
    return out, errors


def _so_far(process: Any) -> tuple[bytes | None, bytes | None]:
    """Return the output so far in bytes, as in TimeoutExpired."""
    exchange = vars(process).get("_exchange")
    if exchange is not None:
        return exchange.output()  # type: ignore[no-any-return]
    chunks = vars(process).get("_fileobj2output", {})
    out, errors = (b"".join(chunks.get(s, ())) or None for s in (process.stdout, process.stderr))
    return out, errors


def _as_wanted(stream: Any, data: bytes | None) -> Any:
    encoding = getattr(stream, "encoding", None)
    if encoding is None:
        return data or b""
    text = (data or b"").decode(encoding, stream.errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def close(process: Any) -> tuple[Any, Any]:
    """Close the pipes and the terminal, which others may hold open; return the output so far."""
    if "_closed_output" not in vars(process):
        process._closed_output = _output(process)
    for moving in vars(process).get("_moving", ()):  # gevent's greenlets, which use them
        moving.kill()
    for stream in (process.stdin, process.stdout, process.stderr, process.terminal):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    return process._closed_output  # type: ignore[no-any-return]
