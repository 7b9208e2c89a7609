"""CPython's own tests of subprocess pass with errand_boy.Popen in place of subprocess.Popen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import script_environment

pytestmark = pytest.mark.slow

RUN = Path(__file__).parent / "cpython" / "run.py"
NOT_INSTALLED = 77
LONGEST_SUITE = 300


# The runner gives up by itself, with a traceback. This is for the case that it can't.
@pytest.mark.timeout(LONGEST_SUITE + 20)
@pytest.mark.parametrize("way", ["direct", "helper"])
@pytest.mark.parametrize("suite", ["subprocess", "asyncio", "asyncio-loop", "uvloop"])
def test_suite_passes_with_popen_replaced(suite: str, way: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--timeout", str(LONGEST_SUITE), suite]
    environment = script_environment()
    if way == "helper":
        environment["ERRAND_BOY_SPAWN"] = way
    # Not a pipe: a command that a suite has left behind would hold it open.
    output = tmp_path / "output"
    with output.open("w") as stream:
        returncode = subprocess.call(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            timeout=LONGEST_SUITE + 10,
        )
    report = output.read_text(errors="replace")
    if returncode == NOT_INSTALLED:
        pytest.skip(report.strip())
    if returncode:
        pytest.fail(f"run.py returned {returncode}:\n{report}", pytrace=False)
