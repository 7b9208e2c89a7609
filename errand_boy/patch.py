"""``python -m errand_boy.patch script.py args…`` runs a program under errand_boy.patch().

With ``-m module`` instead of the script it runs a module.
"""

from __future__ import annotations

import os
import runpy
import sys
from types import ModuleType, TracebackType
from typing import Any

from errand_boy import _patching

_USAGE = "usage: python -m errand_boy.patch (SCRIPT | -m MODULE) [ARGUMENT ...]"
_HELP = f"""{_USAGE}

Run a Python program unchanged, but start its commands through errand-boy: those of subprocess,
asyncio, uvloop, gevent, eventlet, ptyprocess and pty. The program runs after a call of
errand_boy.patch()."""


class _Callable(ModuleType):
    """Makes this module callable, since importing it replaces the function errand_boy.patch."""

    def __call__(self) -> None:
        _patching.patch()


def main() -> None:
    """Run the program that the command line names."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_HELP)
        return
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[as_module:]
    if not arguments or (not as_module and arguments[0].startswith("-")):
        print(_USAGE, file=sys.stderr)
        sys.exit(2)
    _patching.patch()
    sys.argv = arguments
    _hide_frames()
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def _hide_frames() -> None:
    """Make the traceback of an uncaught exception begin in the program."""
    original = sys.excepthook
    ours = {__file__, runpy.__file__, "<frozen runpy>"}

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> Any:
        while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
            traceback = traceback.tb_next
        return original(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = excepthook


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _Callable
