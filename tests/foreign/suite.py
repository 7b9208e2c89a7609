"""The results of one run of somebody else's tests, as the plugin `results` has written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Results(NamedTuple):
    """What became of the tests, by id."""

    popen: str  # the module of subprocess.Popen there
    running: str  # the test that was running last, if it has no result
    passed: set[str]
    skipped: set[str]
    failed: dict[str, str]  # and why


def read(path: Path) -> Results:
    """Read what the plugin has written."""
    popen = running = ""
    failed: dict[str, str] = {}
    skipped: set[str] = set()
    ended: set[str] = set()
    for line in path.read_text().splitlines():
        test, outcome, text = json.loads(line)
        if outcome == "Popen":
            popen = text
        elif outcome == "started":
            running = test
        elif outcome == "failed":
            failed.setdefault(test, text)
        elif outcome == "skipped":
            skipped.add(test)
        elif outcome == "ended":
            running = ""
            ended.add(test)
    skipped -= failed.keys()
    return Results(popen, running, ended - skipped - failed.keys(), skipped, failed)
