"""What PyInstaller does not find by itself: the helper, and modules imported by their name."""

from __future__ import annotations

import os

import errand_boy
from errand_boy import _LATER
from errand_boy._cli.args import COMMANDS

binaries = [
    (os.path.join(os.path.dirname(errand_boy.__file__), "errand-boy-helper"), "errand_boy"),
]
hiddenimports = ["_cffi_backend", *_LATER.values()]
hiddenimports += sorted({f"errand_boy._cli.{module}" for module, *_ in COMMANDS.values()})
