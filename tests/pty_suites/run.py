"""Runs the tests of ptyprocess and of pexpect under errand_boy.patch(), with os.fork forbidden.

    python tests/pty_suites/run.py SDISTS [--timeout SECONDS] [-k EXPRESSION]

SDISTS is a directory (or $PTY_SDISTS) with the unpacked sdists of the ptyprocess and the pexpect
that are installed, as is pytest. The tests run twice, at the same time, once with nothing patched:
what fails then is the machine's doing. They mostly sleep, so each run has several processes. The
exit status is 1 if a test fails under the patch only; 77 if the tests are not there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from foreign.suite import Results, read

HERE = Path(__file__).parent
FOREIGN = HERE.parent / "foreign"
REPLACED = HERE / "replaced"

NOT_INSTALLED = 77
LONGEST_TEST = 60  # seconds; the slowest takes twenty
ATTEMPTS = 3
MOST_DOUBTFUL = 5  # tests
PROCESSES = 6
PACKAGES = "ptyprocess", "pexpect"

# They time a whole sleeping shell, or pexpect's reading of megabytes: nothing of a start's.
LEFT_OUT = ("test_performance.py",)


def copy(sdist: Path, package: str, to: Path) -> None:
    """Copy all but the package, since the one that is installed is to be imported."""
    shutil.copytree(sdist, to, ignore=lambda path, _: {package} if Path(path) == sdist else ())
    (to / "pytest.ini").write_text("[pytest]\n")
    # Python 3.13 has no unittest.makeSuite, which some files call, and nothing here needs.
    (to / "conftest.py").write_text("import unittest\nunittest.makeSuite = lambda *_: None\n")


def run_files(
    top: Path, patched: bool, tests: Sequence[str], options: Sequence[str], timeout: float
) -> tuple[Results, bool]:
    """Run some tests in one process; return their results, and whether pytest ended by itself."""
    # Their own interpreters have to find what is installed here.
    names = ("errand_boy", *PACKAGES)
    specs = [importlib.util.find_spec(name) for name in names]
    places = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    if patched:
        places.insert(0, str(REPLACED))
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results"
        results.touch()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*places, str(FOREIGN)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SUITE_RESULTS": str(results),
            "SUITE_LONGEST_TEST": str(LONGEST_TEST),
        }
        command = [sys.executable, "-m", "pytest", "-p", "results", "-p", "no:cacheprovider"]
        command += ["-c", "pytest.ini", "-q", "--tb=short", "-W", "ignore", *options, *tests]
        # A file, not a pipe: what a test has left behind would hold it open.
        with (Path(directory) / "output").open("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=top,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                returncode = process.wait(timeout)
            except subprocess.TimeoutExpired:
                returncode = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            found = read(results)
            if returncode is None:
                print(f"  gave up after {timeout:g} s, in {found.running}", flush=True)
            elif returncode not in (0, 1, 5):  # 1: tests have failed, 5: there are none
                output.seek(0)
                last = output.read().splitlines()[-20:]
                print(f"  pytest ended with {returncode}:", *last, sep="\n    ", flush=True)
        return found, returncode in (0, 1, 5)


_port = Lock()


def in_turn(group: Sequence[str]) -> Any:
    """Return a lock for tests that listen at a port of their own: one at a time."""
    return _port if "socket" in group[0] else contextlib.nullcontext()


def run(
    sdist: Path, package: str, patched: bool, tests: Iterable[str], arguments: argparse.Namespace
) -> tuple[Results, bool]:
    """Run the tests once, in several processes; return all their results."""
    options = ["-k", arguments.expression] if arguments.expression else []
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(PROCESSES) as executor:
        top = Path(directory) / package
        copy(sdist, package, top)
        groups = [[test] for test in tests] or [
            [f"tests/{file.name}"]
            for file in sorted((top / "tests").glob("test_*.py"))
            if file.name not in LEFT_OUT
        ]

        def run_group(group: Sequence[str]) -> tuple[Results, bool]:
            with in_turn(group):
                return run_files(top, patched, group, options, arguments.timeout)

        parts = list(executor.map(run_group, groups))
    passed: set[str] = set()
    skipped: set[str] = set()
    failed: dict[str, str] = {}
    for found, _ in parts:
        passed |= found.passed
        skipped |= found.skipped
        failed |= found.failed
    return Results("", "", passed, skipped, failed), all(well for _, well in parts)


def summary(package: str, what: str, results: Results) -> str:
    """Return one line about a run."""
    return (
        f"{package} {metadata.version(package)}, Python {platform.python_version()}, {what}: "
        f"{len(results.passed) + len(results.failed)} ran, {len(results.passed)} passed, "
        f"{len(results.skipped)} skipped by the suite, {len(results.failed)} failed"
    )


def compare(sdist: Path, package: str, arguments: argparse.Namespace) -> bool:
    """Run one package's tests with and without the patch; return whether all is well."""
    with ThreadPoolExecutor(2) as executor:
        (plain, _), (ours, well) = executor.map(
            lambda patched: run(sdist, package, patched, (), arguments), (False, True)
        )
    print(summary(package, "nothing patched", plain))
    for test in sorted(plain.failed):
        print(f"  fails with nothing patched: {test}")
    print(summary(package, "errand_boy.patch()", ours), flush=True)
    if not plain.passed:
        print("  no test passed with nothing patched")
        return False
    lost = plain.passed - ours.passed - ours.skipped - ours.failed.keys()
    problems = {test: ours.failed[test] for test in ours.failed.keys() - plain.failed.keys()}
    # Many tests wait for so and so long, and fail now and then on a busy machine. They have to
    # pass each time when they are run again.
    doubtful = set(problems) if well and len(problems) <= MOST_DOUBTFUL else set()
    for _ in range(ATTEMPTS):
        if doubtful:
            again, _ = run(sdist, package, True, sorted(doubtful), arguments)
            doubtful &= again.passed
    for test in sorted(doubtful):
        print(f"  failed once, and passed {ATTEMPTS} times when run again: {test}")
        print("    " + problems.pop(test).replace("\n", "\n    "))
    for test, text in sorted(problems.items()):
        print(f"  failed under the patch only: {test}")
        print("    " + text.replace("\n", "\n    "))
    for test in sorted(lost):
        print(f"  no result under the patch: {test}")
    for test in sorted(ours.skipped & plain.passed):
        print(f"  skipped by the suite under the patch only: {test}")
    print(f"{len(problems) + len(lost)} new failures under the patch", flush=True)
    return well and not problems and not lost


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
            print(f"{package}'s tests are not here")
            return NOT_INSTALLED
        well = compare(sdist, package, arguments) and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
