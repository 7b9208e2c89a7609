"""Runs the tests of ptyprocess and of pexpect under errand_boy.patch(), with os.fork forbidden.

    python tests/pty_suites/run.py SDISTS [--timeout SECONDS] [-k EXPRESSION]

SDISTS is a directory (or $PTY_SDISTS) with the unpacked sdists of the ptyprocess and the pexpect
that are installed, as is pytest. The tests run twice, at the same time, once with nothing patched:
failures are then the machine's fault. They mostly sleep, so each run has several processes. The
exit status is 1 if a test fails only under the patch; 77 if the tests are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from foreign.suite import NOT_INSTALLED, Results, compare, run_pytest

REPLACED = Path(__file__).parent / "replaced"
LONGEST_TEST = 60  # seconds; the slowest takes twenty
PROCESSES = 6
PACKAGES = "ptyprocess", "pexpect"

# They time a sleeping shell, or how pexpect reads megabytes, but not starts.
LEFT_OUT = ("test_performance.py",)


def copy(sdist: Path, package: str, to: Path) -> None:
    """Copy all but the package, since the one that is installed is to be imported."""
    shutil.copytree(sdist, to, ignore=lambda path, _: {package} if Path(path) == sdist else ())
    (to / "pytest.ini").write_text("[pytest]\n")
    # Python 3.13 has no unittest.makeSuite. Some files call it, but nothing here needs it.
    (to / "conftest.py").write_text("import unittest\nunittest.makeSuite = lambda *_: None\n")


_port = Lock()


def in_turn(group: str) -> Any:
    """Return a lock for tests that listen at a fixed port, so that they run one at a time."""
    return _port if "socket" in group else contextlib.nullcontext()


def run(
    sdist: Path, package: str, patched: bool, tests: Sequence[str], arguments: argparse.Namespace
) -> tuple[Results, bool]:
    """Run the tests once, in several processes; return all their results."""
    options = ["-k", arguments.expression] if arguments.expression else []
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(PROCESSES) as executor:
        top = Path(directory) / package
        copy(sdist, package, top)
        groups = tests or [
            f"tests/{file.name}"
            for file in sorted((top / "tests").glob("test_*.py"))
            if file.name not in LEFT_OUT
        ]

        def run_group(group: str) -> tuple[Results, bool]:
            with in_turn(group):
                return run_pytest(
                    top,
                    [*options, group],
                    packages=("errand_boy", *PACKAGES),
                    first=REPLACED if patched else None,
                    longest_test=LONGEST_TEST,
                    timeout=arguments.timeout,
                )

        parts = list(executor.map(run_group, groups))
    passed: set[str] = set()
    skipped: set[str] = set()
    failed: dict[str, str] = {}
    for found, _ in parts:
        passed |= found.passed
        skipped |= found.skipped
        failed |= found.failed
    return Results("", "", passed, skipped, failed), all(well for _, well in parts)


def try_package(sdist: Path, package: str, arguments: argparse.Namespace) -> bool:
    """Run one package's tests with and without the patch; return whether all is well."""
    with ThreadPoolExecutor(2) as executor:
        (plain, _), (ours, well) = executor.map(
            lambda patched: run(sdist, package, patched, (), arguments), (False, True)
        )
    versions = f"{package} {metadata.version(package)}, Python {platform.python_version()}"
    print(plain.summary(f"{versions}, nothing patched"))
    for test in sorted(plain.failed):
        print(f"  fails with nothing patched: {test}")
    print(ours.summary(f"{versions}, errand_boy.patch()"), flush=True)
    if not plain.passed:
        print("  no test passed with nothing patched")
        return False

    def again(tests: Sequence[str]) -> Results:
        return run(sdist, package, True, tests, arguments)[0]

    return compare(plain, ours, again, "under the patch") and well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sdists", nargs="?", metavar="SDISTS", help="a directory with both")
    parser.add_argument("--timeout", type=float, default=180, help="for one file of tests")
    parser.add_argument("-k", dest="expression", help="as in pytest")
    parser.add_argument("--only", choices=PACKAGES, help="one of the two suites")
    arguments = parser.parse_args()
    place = Path(arguments.sdists or os.environ.get("PTY_SDISTS") or "none").resolve()
    for name in "errand_boy", "pytest", *PACKAGES:
        if importlib.util.find_spec(name) is None:
            print(f"Python {platform.python_version()} has no {name}")
            return NOT_INSTALLED
    well = True
    for package in [arguments.only] if arguments.only else PACKAGES:
        sdist = place / f"{package}-{metadata.version(package)}"
        if not (sdist / "tests").is_dir():
            print(f"{package}'s tests are not in PTY_SDISTS")
            return NOT_INSTALLED
        well = try_package(sdist, package, arguments) and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
