"""The functions of subprocess, bound to another Popen."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType

from errand_boy._process.child import Told, completed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Captured(int):
    """The PIPE that functions pass, which a Popen with a terminal can tell from its user's."""


CAPTURED = _Captured(subprocess.PIPE)


def _told(kind: type[Any]) -> type[Any]:
    """Return a CompletedProcess class that also has the attributes of Verdict."""
    return type(
        kind.__name__, (Told, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__}
    )


def one_shot(popen: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes Popen objects for functions that kill them after exceptions."""

    def make(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        if process._ends is not None:
            process._is_one_shot = True
        return process

    return make


ERRORS = ("SubprocessError", "CalledProcessError", "TimeoutExpired")  # users catch them
NAMES = ("call", "check_call", "check_output", "getoutput", "getstatusoutput", "run")


def original_popen() -> type[subprocess.Popen[Any]]:
    """Return the standard library's own Popen, even if gevent or eventlet has replaced it."""
    if subprocess.Popen.__module__.startswith("eventlet."):
        return _popen_of_a_copy()
    for base in subprocess.Popen.__mro__:
        if base.__module__ == "subprocess":
            return base
    from gevent.monkey import get_original  # noqa: PLC0415

    original: type[subprocess.Popen[Any]] = get_original("subprocess", "Popen")
    return original


def parameters(function: Any) -> frozenset[str]:
    """Return the names of a function's parameters."""
    code = function.__code__
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _popen_of_a_copy() -> type[subprocess.Popen[Any]]:
    # eventlet has dropped the original. The base class of its own Popen uses modules that are not
    # eventlet's, so communicate() would make all greenlets wait.
    spec = subprocess.__spec__
    assert spec is not None and spec.loader is not None
    copy = ModuleType("subprocess")
    copy.__file__ = subprocess.__file__
    spec.loader.exec_module(copy)
    for name in ERRORS:
        setattr(copy, name, getattr(subprocess, name))
    popen: type[subprocess.Popen[Any]] = copy.Popen
    return popen


def rebind(
    popen: type[Any],
    module: ModuleType = subprocess,
    wrap_run: Callable[[Any], Any] = lambda run: run,
) -> dict[str, Any]:
    """Return the functions of `module`, by name, with `popen` in place of Popen.

    `module` is subprocess or a module like it; by default the functions are those of the running
    Python. The new functions have the same code objects and another global namespace. So they
    behave as this Python's do, and other users of the module see no change. `run` is replaced by
    what `wrap_run` returns for it, and `check_output` calls that.
    """
    functions: dict[str, Any] = {}
    namespace: dict[str, Any] = {}
    for name in NAMES:
        original: FunctionType = getattr(module, name)
        if not namespace:  # the module of the first function: subprocess or gevent.subprocess
            namespace = {**original.__globals__, "Popen": one_shot(popen), "PIPE": CAPTURED}
            namespace.update((each, getattr(module, each)) for each in ERRORS)
            namespace["CompletedProcess"] = partial(completed, _told(namespace["CompletedProcess"]))
        bound = FunctionType(
            original.__code__, namespace, name, original.__defaults__, original.__closure__
        )
        bound.__kwdefaults__ = original.__kwdefaults__
        bound.__doc__ = original.__doc__
        namespace[name] = functions[name] = wrap_run(bound) if name == "run" else bound
    return functions
