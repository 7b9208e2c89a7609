"""``python -m errand_boy.patch script.py args…`` runs a program under errand_boy.patch().

With ``-m module`` in place of the script it runs a module.
"""

from __future__ import annotations

import os
import runpy
import sys
from types import ModuleType

from errand_boy import _patching


class _Callable(ModuleType):
    """This module, once imported, has the name of the function errand_boy.patch."""

    def __call__(self) -> None:
        _patching.patch()


def main() -> None:
    """Run the program that the command line names."""
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[as_module:]
    if not arguments or (not as_module and arguments[0].startswith("-")):
        sys.exit("usage: python -m errand_boy.patch (SCRIPT | -m MODULE) [ARGUMENT]...")
    _patching.patch()
    sys.argv = arguments
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _Callable
