"""A pytest plugin that records the outcome of each test, and fails tests that do not end.

Each line is a test's id, its outcome ("started", "failed", "skipped" or "ended") and a text. The
first one has no id, and names the module of subprocess.Popen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

_RESULTS = Path(os.environ["SUITE_RESULTS"])
_LONGEST_TEST = float(os.environ["SUITE_LONGEST_TEST"])  # seconds
_AGAIN = 5.0  # seconds that a failing test gets for its clean-up


def _write(test: str, outcome: str, text: str = "") -> None:
    with _RESULTS.open("a") as file:
        file.write(json.dumps([test, outcome, text]) + "\n")


def _give_up(number: int, frame: Any) -> None:
    raise TimeoutError(f"the test has taken {_LONGEST_TEST:g} s")


def pytest_sessionstart() -> None:
    _write("", "Popen", subprocess.Popen.__module__)


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(nodeid, "started")
    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST_TEST, _AGAIN)


def pytest_runtest_logfinish(nodeid: str) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    _write(nodeid, "ended")


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed or report.skipped:
        _write(report.nodeid, report.outcome, report.longreprtext)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(report.nodeid, report.outcome, report.longreprtext)
