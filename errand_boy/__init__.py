"""Starts commands for processes that are expensive to fork.

``import errand_boy as subprocess``: the same functions, constants and exceptions; every command is
started by a small C helper, as this process's own child.
"""

from __future__ import annotations

from subprocess import (
    DEVNULL,
    PIPE,
    STDOUT,
    CalledProcessError,
    CompletedProcess,
    SubprocessError,
    TimeoutExpired,
    call,
    check_call,
    check_output,
    getoutput,
    getstatusoutput,
    list2cmdline,
    run,
)

from errand_boy.errors import ErrandBoyError, HelperDiedError, HelperError, ProtocolError
from errand_boy.functions import bound_to
from errand_boy.helper import helper_pid, start, stop
from errand_boy.popen import Popen

TYPE_CHECKING = False
if not TYPE_CHECKING:  # to a type checker they are what the imports say
    globals().update(bound_to(Popen))

__version__ = "1.0.0.dev0"

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "CalledProcessError",
    "CompletedProcess",
    "ErrandBoyError",
    "HelperDiedError",
    "HelperError",
    "Popen",
    "ProtocolError",
    "SubprocessError",
    "TimeoutExpired",
    "call",
    "check_call",
    "check_output",
    "getoutput",
    "getstatusoutput",
    "helper_pid",
    "list2cmdline",
    "run",
    "start",
    "stop",
]
