"""Runs the server, in an interpreter that has loaded little else.

``python -I -S serve.py`` with a JSON object: "path", the sys.path to use, and "options", those of
options.Options. The package's ``__init__`` is for clients and costs 3 MB, so it is not loaded.
"state" is the descriptor that a predecessor has left. With ``--check`` before the object, the
program only describes itself.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType


def main() -> int:
    """Read the arguments and serve; return the exit status."""
    import json  # noqa: PLC0415

    argument = json.loads(sys.argv[-1])
    sys.path[:] = argument["path"]
    package = ModuleType("errand_boy")
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["errand_boy"] = package
    from errand_boy._daemon import process  # noqa: PLC0415

    if sys.argv[1] == "--check":
        return process.check(argument["options"])
    return process.serve(argument["options"], argument.get("state"))


if __name__ == "__main__":
    raise SystemExit(main())
