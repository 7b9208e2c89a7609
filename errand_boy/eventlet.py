"""eventlet's subprocess, started through errand-boy: the hub waits for no start.

``Popen``, ``run``, ``call``, ``check_call``, ``check_output``, ``getoutput`` and
``getstatusoutput`` are eventlet.green.subprocess's own but for how the child is started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import eventlet
from eventlet import hubs
from eventlet.green import subprocess
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

from errand_boy import view
from errand_boy.connection import Connection
from errand_boy.functions import bound_to
from errand_boy.outgoing import Outgoing
from errand_boy.protocol import Failed, Spawned

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

_Base: Any = subprocess.Popen


class Popen(_Base):  # type: ignore[misc]  # eventlet has no types
    """eventlet.green.subprocess.Popen whose child is started by errand-boy's helper.

    All parameters, methods and exceptions are eventlet's, and on Linux the child is a child of this
    process. `preexec_fn` is as in errand_boy.Popen.
    """

    def _execute_child(self, *args: Any) -> None:
        execute_child(_Base._execute_child, self, *args)

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        return view.internal_poll(_Base._internal_poll, self, *args, **kwargs)

    def _wait(self, timeout: float | None) -> int:
        return view.wait(_Base._wait, self, timeout)

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process; does nothing if it is known to have ended."""
        view.send_signal(_Base.send_signal, self, sig)


_functions = bound_to(Popen, subprocess)
call = _functions["call"]
check_call = _functions["check_call"]
check_output = _functions["check_output"]
getoutput = _functions["getoutput"]
getstatusoutput = _functions["getstatusoutput"]
run = _functions["run"]


def execute_child(original: Callable[..., None], process: Any, *args: Any) -> None:
    """Start a command for an eventlet.green.subprocess.Popen of any class."""
    view.execute_child(_View, original, process, *args)


class _View(view.GreenView):
    def _outcome(self, connection: Connection, outgoing: Outgoing) -> Spawned | Failed:
        if eventlet.getcurrent() is hubs.get_hub().greenlet:  # a callback of the hub's, which waits
            return connection.outcome(outgoing)
        return super()._outcome(connection, outgoing)

    def _until_readable(self, connection: Connection) -> None:
        hubs.trampoline(connection.sock.fileno(), read=True)

    def _until_writable(self, connection: Connection) -> None:
        hubs.trampoline(connection.sock.fileno(), write=True)

    def _spawn(self, function: Callable[..., None], *args: Any) -> None:
        eventlet.spawn_n(function, *args)
