"""What PyInstaller does not find by itself: the helper, and modules imported by their name."""

from __future__ import annotations

import os

import errand_boy
from errand_boy import _LATER
from errand_boy._cli.args import COMMANDS
from errand_boy._process import direct

binaries = []
hiddenimports = [*_LATER.values()]
if direct.WITHOUT_C is None:
    helper = os.path.join(os.path.dirname(errand_boy.__file__), "errand-boy-helper")
    binaries.append((helper, "errand_boy"))
    hiddenimports.append("_cffi_backend")
hiddenimports += sorted({f"errand_boy._cli.{module}" for module, *_ in COMMANDS.values()})
