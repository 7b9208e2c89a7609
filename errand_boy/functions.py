"""The functions of subprocess, bound to another Popen."""

from __future__ import annotations

import subprocess
from types import FunctionType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAMES = ("call", "check_call", "check_output", "getoutput", "getstatusoutput", "run")


def original_popen() -> type[subprocess.Popen[Any]]:
    """Return the standard library's own Popen, also where gevent or eventlet has replaced it."""
    for base in subprocess.Popen.__mro__:
        if base.__module__ == "subprocess":  # eventlet's is derived from it
            return base
    from gevent.monkey import get_original  # noqa: PLC0415

    original: type[subprocess.Popen[Any]] = get_original("subprocess", "Popen")
    return original


def bound_to(popen: type[Any], module: ModuleType = subprocess) -> dict[str, Any]:
    """Return the functions of `module`, by name, with `popen` in the place of Popen.

    `module` is subprocess or one that stands for it; by default they are the running Python's own.
    They are the same code objects over another global namespace, so they stay what this Python's
    are, and none of its users sees a change.
    """
    functions: dict[str, Any] = {}
    namespace: dict[str, Any] = {}
    for name in NAMES:
        original: FunctionType = getattr(module, name)
        if not namespace:  # that of subprocess, or of gevent.subprocess
            namespace = {**original.__globals__, "Popen": popen}
        bound = FunctionType(
            original.__code__, namespace, name, original.__defaults__, original.__closure__
        )
        bound.__kwdefaults__ = original.__kwdefaults__
        bound.__doc__ = original.__doc__
        namespace[name] = functions[name] = bound
    return functions
