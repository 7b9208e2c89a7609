"""`import errand_boy` over `import subprocess`, each in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.heavy import package_parent

MORE_MILLISECONDS = 15

TIMED_IMPORT = """
import time
start = time.perf_counter_ns()
import {library}
print(time.perf_counter_ns() - start)
"""


def import_nanoseconds(cache: Path, library: str, count: int) -> list[int]:
    command = [sys.executable, "-c", TIMED_IMPORT.format(library=library)]
    # Compiled once, like any installed package, whatever this process's own setting is.
    environment = os.environ | {
        "PYTHONPATH": package_parent(),
        "PYTHONPYCACHEPREFIX": str(cache),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    return [int(subprocess.check_output(command, env=environment)) for _ in range(count)]


def test_import(compare: Callable[..., None], tmp_path: Path) -> None:
    compare(
        partial(import_nanoseconds, tmp_path, "errand_boy"),
        partial(import_nanoseconds, tmp_path, "subprocess"),
        name="import errand_boy over import subprocess",
        more_milliseconds=MORE_MILLISECONDS,
    )
