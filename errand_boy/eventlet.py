"""eventlet.green.subprocess with children that errand-boy starts, without blocking the hub.

``Popen``, ``run``, ``call``, ``check_call``, ``check_output``, ``getoutput`` and
``getstatusoutput`` are those of eventlet.green.subprocess, except for the step that starts the
child.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import eventlet
from eventlet import hubs
from eventlet.green import select, subprocess
from eventlet.green.subprocess import (
    DEVNULL,
    PIPE,
    STDOUT,
    CalledProcessError,
    CompletedProcess,
    SubprocessError,
    TimeoutExpired,
    list2cmdline,
)

from errand_boy._process import child as _child, driver as _driver, start as _start
from errand_boy._process.functions import parameters, rebind
from errand_boy._process.popen import WithEnds, WithTerminal, WithVerdict

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "CalledProcessError",
    "CompletedProcess",
    "Popen",
    "SubprocessError",
    "TimeoutExpired",
    "call",
    "check_call",
    "check_output",
    "getoutput",
    "getstatusoutput",
    "list2cmdline",
    "run",
]

_HOUR = 3600.0  # seconds

_Base: Any = subprocess.Popen
_STANDARD = parameters(_Base.__init__)


class _Popen(WithEnds, WithTerminal, WithVerdict, _Base):  # type: ignore[misc]  # eventlet has no types
    """eventlet.green.subprocess.Popen whose child is started as in errand_boy.Popen.

    All parameters, methods and exceptions are eventlet's, and other greenlets run while a program
    is slow to execute. On Linux the child is a child of this process. `preexec_fn` is as in
    errand_boy.Popen.
    """

    _more = _start.NOTHING
    # eventlet's own methods raise the exceptions of a copy of the module.
    _expired = (
        TimeoutExpired,
        *WithEnds._expired,
        _Base.communicate.__globals__["TimeoutExpired"],
        _Base._communicate.__globals__["TimeoutExpired"],
    )
    _select = select

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        construct = super().__init__
        if _STANDARD.issuperset(kwargs) or not _start.take_options(
            self, construct, _STANDARD, args, kwargs
        ):
            construct(*args, **kwargs)

    def _execute_child(self, *args: Any) -> None:
        self._begun = time.monotonic()
        execute_child(_Base._execute_child, self, *args)

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        return _child.internal_poll(_Base._internal_poll, self, *args, **kwargs)

    def _check_timeout(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._check_timeout(*args, **kwargs)
        except self._expired as expired:
            raise TimeoutExpired(
                expired.cmd, expired.timeout, expired.output, expired.stderr
            ) from None

    def wait(self, timeout: float | None = None, check_interval: float = 0.01) -> int:
        """Wait for the process to end, at most `timeout` seconds; return its return code.

        Raises TimeoutExpired. `check_interval` (seconds) is used only if the system has no pidfd.
        """
        return wait(_Base.wait, self, timeout, check_interval)

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process; do nothing if it is known to have ended."""
        if self.returncode is None:
            self._sent = sig
        _child.send_signal(_Base.send_signal, self, sig)


if TYPE_CHECKING:  # the functions are called in the same way
    from errand_boy._process.popen import Popen
    from errand_boy._types.signatures import Call, CheckOutput, Run

    call: Call
    check_call: Call
    check_output: CheckOutput
    getoutput: Callable[..., str]
    getstatusoutput: Callable[..., tuple[int, str]]
    run: Run
else:
    Popen = _Popen
    Popen.__name__ = Popen.__qualname__ = "Popen"
    globals().update(rebind(Popen, subprocess))


def execute_child(original: Callable[..., None], process: Any, *args: Any) -> None:
    """Start a command for an eventlet.green.subprocess.Popen of any class."""
    driver = _driver.BLOCKING if _in_hub() else _HUB
    more = getattr(process, "_more", _start.NOTHING)
    _start.execute(process, args, original, driver=driver, more=more)


def wait(
    original: Callable[..., int],
    process: Any,
    timeout: float | None = None,
    check_interval: float = 0.01,
) -> int:
    """Return the return code; see Popen.wait. eventlet's own wait polls."""
    known = process.returncode is not None or _child.helper_child(process) is not None
    while not (known or _in_hub()):
        try:
            if not _child.wait_by_pidfd(process, _HOUR if timeout is None else timeout, _readable):
                break
        except TimeoutExpired:
            if timeout is not None:
                raise
        else:
            returncode: int = process.returncode
            return returncode
    return original(process, timeout, check_interval)


class _NotReadableError(Exception):
    """A descriptor did not become readable in time."""


def _readable(fd: int, seconds: float) -> None:
    with contextlib.suppress(_NotReadableError):
        hubs.trampoline(fd, read=True, timeout=seconds, timeout_exc=_NotReadableError)


def _wait(fd: int, writing: bool) -> None:
    hubs.trampoline(fd, read=not writing, write=writing)


def _run(steps: Any) -> None:
    _driver.run(steps, eventlet.sleep, _wait)


def _conclude(process: Any, steps: Any) -> None:
    # A Timeout in one greenlet must not make the others wait.
    eventlet.spawn_n(_run, steps)


_HUB = _driver.Driver(_run, _conclude)


def _in_hub() -> bool:
    """Return whether this is a callback of the hub, which must not switch to it."""
    return bool(eventlet.getcurrent() is hubs.get_hub().greenlet)
