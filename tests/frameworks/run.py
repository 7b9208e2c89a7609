"""Runs gevent's and eventlet's own tests of subprocess with errand_boy's Popen in its place.

    python tests/frameworks/run.py [--original] (gevent | eventlet) [PATH]

gevent's are in its wheel; eventlet's are not: PATH is an unpacked sdist (or $EVENTLET_SDIST). Each
file runs in its own interpreter. With --original nothing is replaced or excluded: failures are then
the machine's fault. Exit status 1 if a test fails, 77 if the tests are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

NOT_INSTALLED = 77
LONGEST_FILE = 240  # seconds


class Excluded(NamedTuple):
    """A test that cannot pass, and why."""

    test: str
    reason: str


EXCLUDED = (
    Excluded(
        "test_subprocess_in_native_thread",
        "expects the TypeError of gevent's Popen in other threads, where errand_boy's works",
    ),
    Excluded(
        "test_run_with_shell_timeout_and_capture_output",
        "fails with gevent's own Popen too where sh does not exec its last command, as dash",
    ),
)

# What each interpreter does first. The library is loaded before: the classes that the tests import
# are errand_boy's, so that no fork can go unseen.
REPLACE = {
    "gevent": """
import gevent.subprocess
import errand_boy.gevent as ours
for name in ("Popen", "run", "call", "check_call", "check_output"):
    setattr(gevent.subprocess, name, getattr(ours, name))
def fork(*args):
    raise AssertionError("started by gevent, by a fork")
ours._Base._execute_child = fork
""",
    "eventlet": """
import eventlet.green.subprocess
import errand_boy.eventlet as ours
for name in ("Popen", "run", "call", "check_call", "check_output"):
    setattr(eventlet.green.subprocess, name, getattr(ours, name))
def fork(*args):
    raise AssertionError("started by eventlet, by a fork")
ours._Base._execute_child = fork
""",
}

RUN_FILE = """
import runpy, sys
path, excluded = sys.argv[1], sys.argv[2].split()
sys.argv = [path, "-v"]
if excluded:
    import unittest
    load = unittest.TestLoader.getTestCaseNames
    def names(self, case):
        return [name for name in load(self, case) if name not in excluded]
    unittest.TestLoader.getTestCaseNames = names
runpy.run_path(path, run_name="__main__")
"""

RUN_FUNCTIONS = """
import runpy, sys
path, excluded = sys.argv[1], sys.argv[2].split()
for name, test in runpy.run_path(path).items():
    if name.startswith("test_") and callable(test) and name not in excluded:
        print(name, flush=True)
        test()
"""


def gevent_files() -> list[Path]:
    spec = importlib.util.find_spec("gevent")
    if spec is None or spec.origin is None:
        return []
    return sorted((Path(spec.origin).parent / "tests").glob("test__subprocess*.py"))


def eventlet_files(sdist: str | None) -> list[Path]:
    tests = Path(sdist or os.environ.get("EVENTLET_SDIST", "/nonexistent")) / "tests"
    return [path for path in [tests / "subprocess_test.py"] if path.exists()]


def run(framework: str, path: Path, original: bool) -> bool:
    """Run one file, print its output, and return whether all is well."""
    program = RUN_FILE if framework == "gevent" else RUN_FUNCTIONS
    source = program if original else REPLACE[framework] + program
    excluded = [] if original else [excluded.test for excluded in EXCLUDED]
    ours = importlib.util.find_spec("errand_boy")
    assert ours is not None and ours.origin is not None
    places = [str(Path(ours.origin).parents[1])]
    directory = path.parent
    if framework == "eventlet":  # its tests run programs that they find from their top directory
        directory = path.parents[1]
        places.insert(0, str(directory))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "PYTHONWARNINGS": "ignore",  # eventlet's warnings about its age would be unexpected output
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        returncode = subprocess.call(
            [sys.executable, "-c", source, str(path), " ".join(excluded)],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=LONGEST_FILE,
        )
    except subprocess.TimeoutExpired:
        returncode = -1
    print(f"{path.name}: {'passed' if returncode == 0 else f'failed ({returncode})'}", flush=True)
    return returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("framework", choices=list(REPLACE))
    parser.add_argument("path", nargs="?", help="eventlet's unpacked sdist")
    parser.add_argument("--original", action="store_true", help="replace and exclude nothing")
    arguments = parser.parse_args()
    files = gevent_files() if arguments.framework == "gevent" else eventlet_files(arguments.path)
    if not files:
        where = "packages" if arguments.framework == "gevent" else "EVENTLET_SDIST"
        print(f"{arguments.framework}'s tests are not in {where}")
        return NOT_INSTALLED
    for test, reason in EXCLUDED:
        print(f"excluded {test}: {reason}")
    well = [run(arguments.framework, path, arguments.original) for path in files]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
