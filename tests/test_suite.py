"""The tests themselves, wherever they are run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

IGNORING = """
import os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""

INNER = """
import signal, subprocess
def test_command_can_be_ended():
    for number in signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1:
        with subprocess.Popen(["sleep", "100"]) as process:
            process.send_signal(number)
            assert process.wait(timeout=30) == -number
"""


def test_ignored_and_blocked_signals_are_not_for_what_the_tests_start(tmp_path: Path) -> None:
    """As under nohup, where those that wait for the end by a SIGHUP would wait for ever."""
    inner = tmp_path / "test_inner.py"
    inner.write_text(INNER)
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "-c", "/dev/null"]
    command = [sys.executable, "-c", IGNORING, sys.executable, *pytest, str(inner)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
