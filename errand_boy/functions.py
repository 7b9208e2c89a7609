"""The functions of subprocess, bound to another Popen."""

from __future__ import annotations

import subprocess
from types import FunctionType
from typing import Any

NAMES = ("call", "check_call", "check_output", "getoutput", "getstatusoutput", "run")


def bound_to(popen: type[subprocess.Popen[Any]]) -> dict[str, Any]:
    """Return the running Python's own functions, by name, with `popen` in the place of Popen.

    They are the same code objects over another global namespace, so they stay what this Python's
    are, and none of its users sees a change.
    """
    namespace: dict[str, Any] = {**vars(subprocess), "Popen": popen}
    functions = {}
    for name in NAMES:
        original: FunctionType = getattr(subprocess, name)
        bound = FunctionType(
            original.__code__, namespace, name, original.__defaults__, original.__closure__
        )
        bound.__kwdefaults__ = original.__kwdefaults__
        bound.__doc__ = original.__doc__
        namespace[name] = functions[name] = bound
    return functions
