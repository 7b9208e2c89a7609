"""A framework's own tests of subprocess, as one test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import script_environment
from frameworks.run import NOT_INSTALLED

LONGEST = 70  # seconds


def run_suite(framework: str, directory: Path) -> None:
    """Fail if the framework's tests fail; skip if they are missing."""
    # Not a pipe: a command that a test leaves behind would hold it open.
    output = directory / "output"
    with output.open("w") as stream:
        returncode = subprocess.call(
            [sys.executable, str(Path(__file__).with_name("run.py")), framework],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=script_environment(),
            timeout=LONGEST,
        )
    report = output.read_text(errors="replace")
    if returncode == NOT_INSTALLED:
        pytest.skip(report.strip())
    if returncode:
        pytest.fail(f"run.py returned {returncode}:\n{report}", pytrace=False)
