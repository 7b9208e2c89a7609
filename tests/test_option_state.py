"""A start with every option leaves its caller unchanged; bench/option_state.py does more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_places import needs_users

SCRIPT = Path(__file__).parents[1] / "bench" / "option_state.py"


@pytest.mark.slow
@needs_users
@pytest.mark.parametrize("way", ["direct", "helper"])
def test_caller_is_unchanged(way: str) -> None:
    if not SCRIPT.exists():
        pytest.skip("only the tests are here")
    root = str(SCRIPT.parents[1])
    environment = {**os.environ, "ERRAND_BOY_SPAWN": way, "PYTHONPATH": root}
    command = [sys.executable, str(SCRIPT), "160"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "160 starts, 0 threads failed []\n")
