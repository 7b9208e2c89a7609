"""The tests themselves, wherever they are run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

IGNORING = """
import os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""

RESETS = """
import signal, subprocess
def test_command_can_be_ended():
    for number in signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1:
        with subprocess.Popen(["sleep", "100"]) as process:
            process.send_signal(number)
            assert process.wait(timeout=30) == -number
"""


STUCK = """
import subprocess, pytest
@pytest.mark.timeout(1)
def test_that_waits_for_ever():
    with subprocess.Popen(["sleep", "1000"]) as process:
        process.wait()
"""

LEAVING = """
import atexit, subprocess, psutil, pytest
@pytest.fixture(scope="module")
def of_the_whole_file():
    yield
    subprocess.run(["sh", "-c", "sleep 0.1 &"])
def test_that_uses_it(of_the_whole_file):
    atexit.register(lambda: print("left:", psutil.Process().children()))
"""

REPORTED = """
import signal, time, pytest
class Timer(Exception):
    def __str__(self):
        return str(signal.getitimer(signal.ITIMER_REAL))
@pytest.mark.timeout(1)
def test_whose_report_takes_long():
    try:
        time.sleep(1000)
    except BaseException:
        raise Timer from None
"""


def run(source: str, directory: Path, *under: str) -> subprocess.CompletedProcess[str]:
    """Run a test with this directory's conftest.py."""
    test = directory / "test_inner.py"
    test.write_text(source)
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "-c", "/dev/null"]
    command = [*under, sys.executable, *options, str(test)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=70)


@pytest.mark.slow
def test_ignored_and_blocked_signals_are_not_for_what_the_tests_start(tmp_path: Path) -> None:
    """Under nohup, tests that wait until SIGHUP ends a command would wait for ever."""
    done = run(RESETS, tmp_path, sys.executable, "-c", IGNORING)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_no_test_lasts_for_ever(tmp_path: Path) -> None:
    """Not even one that waits for a command after it has been interrupted."""
    pytest.importorskip("pytest_timeout")
    done = run(STUCK, tmp_path)
    assert done.returncode == 1
    assert "Timeout (>1.0s) from pytest-timeout" in done.stdout


def test_what_a_file_s_fixtures_leave_is_reaped_with_them(tmp_path: Path) -> None:
    """The tests of the next file may look at all children."""
    done = run(LEAVING, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "left: []" in done.stdout


def test_report_is_not_interrupted(tmp_path: Path) -> None:
    """Pytest would end, and with it all tests that are still to come."""
    pytest.importorskip("pytest_timeout")
    done = run(REPORTED, tmp_path)
    assert "Timer: (0.0, 0.0)" in done.stdout
