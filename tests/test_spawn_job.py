"""Parts of a start that can't be tested through a command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_wire import COMPILER, CSRC, HERE, compile_c

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs cc: apt-get install gcc")


@pytest.mark.slow
def test_process_that_takes_no_table_of_descriptors_in_time(tmp_path: Path) -> None:
    """Its maker waits for seconds at most, and its end does not count as a program's."""
    sources = [*(CSRC / "spawn").glob("*.c"), *(CSRC / "common").glob("*.c")]
    compile_c(tmp_path / "program", HERE / "c" / "await_table.c", *sources)
    done = subprocess.run([tmp_path / "program"], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
