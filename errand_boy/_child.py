"""Waits and signals for a child of this process, given as a subprocess.Popen of any class.

The pid is the child's until the child has been waited for, and nobody does that without the
object's `_waitpid_lock`. So who holds the lock may send it a signal, or open a pidfd.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Since Python 3.15 subprocess itself waits by pidfd.
STDLIB_POLLS = sys.version_info < (3, 15)

_LONGEST = 3600.0  # seconds, of one wait: poll(2) takes no more than 24 days, a lock not infinity


def readable(fd: int, seconds: float) -> bool:
    """Wait until `fd` is readable; return whether it is."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    return bool(select.select([fd], [], [], seconds)[0])  # all that eventlet leaves there


def wait(
    process: Any,
    timeout: float | None,
    readable: Callable[[int, float], Any] = readable,
) -> bool:
    """Wait for the end of `process`, as _wait of subprocess.Popen does, but without polling.

    `timeout` is in seconds; `readable` waits for so long for a descriptor. Raises TimeoutExpired.
    Returns False, at once, where no pidfd can be had, or none is needed: without a time-out. (To
    wait first and reap then would let go of the GIL twice, which costs 10 ms beside a busy thread.)
    """
    if process.returncode is not None:
        return True
    if timeout is None:
        return False
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
                fd = os.pidfd_open(process.pid)
            except (AttributeError, OSError):
                # No descriptor is free, a filter refuses it, or Python was built for older kernels.
                return False
        finally:
            process._waitpid_lock.release()
        try:
            readable(fd, min(_LONGEST, rest))
        finally:
            os.close(fd)
    return True


def send_signal(process: Any, sig: int) -> bool:
    """Send a signal to `process` if it has not ended; return False, without that, if it may have.

    That is while the lock is held, by another thread that is about to wait for the child, or by the
    code that a handler of this thread has interrupted.
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
