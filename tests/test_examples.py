"""The examples, run as a reader would run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "build_project.py"
GIB = 1 << 30

needed = ["git", "tar", "gzip", "sha256sum", "cc"]
missing = [name for name in needed if shutil.which(name) is None]


def hold_gib() -> float:
    if os.environ.get("CI") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * GIB:
        return 0.1
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 if available > 4 * GIB else 0.1


@pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")
def test_build_project() -> None:
    hold = hold_gib()
    done = subprocess.run(
        [sys.executable, EXAMPLE, f"--hold={hold}", "--rounds=1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"holding {hold:.2f} GiB"
    assert re.fullmatch(r"built 240 files in 6 commits, with \d+ commands", lines[1])
    assert re.fullmatch(r"commit [0-9a-f]{40}", lines[2])
    assert re.fullmatch(r"archive [0-9a-f]{64}", lines[3])
    measured = r"\s+[\d.]+ s\s+[\d.]+\s+\d+ ms\s+[\d.]+"
    assert re.fullmatch("errand_boy" + measured, lines[6])
    assert re.fullmatch("subprocess" + measured, lines[7])
    # Near a memory limit the third way may be refused; the line is there all the same.
    assert lines[8].startswith(("gevent.subprocess", "subprocess, preexec_fn"))
    assert len(lines) == 9
