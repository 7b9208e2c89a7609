"""Runs psutil's own tests with errand_boy.Popen in place of subprocess.Popen.

    python tests/psutil/run.py [SDIST] [--timeout SECONDS] [-k EXPRESSION]

SDIST is the unpacked sdist (or $PSUTIL_SDIST) of the psutil that is installed, as is pytest. The
tests run twice, first with nothing replaced: failures are then the machine's fault. The exit
status is 1 if a test fails only in the second run, or if that run does not end in time; 77 if the
tests are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from foreign.suite import NOT_INSTALLED, Results, compare, run_pytest

REPLACED = Path(__file__).parent.parent / "cpython" / "replaced"
LONGEST_TEST = 30  # seconds; the slowest takes five
IN_PLACE = "with errand_boy in place"

# They look at /proc/PID/cmdline right after the start. The kernel fills it microseconds after the
# exec, so at first it is empty nine times out of ten, with subprocess as with errand_boy.
RACES = ("test_cmdline", "test_long_cmdline", "test_proc_cmdline")

# It looks for leaks of memory in psutil's C functions, with one more package (psleak), and not at
# processes.
LEFT_OUT = ("test_memleaks.py",)


def copy(sdist: Path, to: Path) -> None:
    """Copy all but the package, which is not built there, and would be imported."""
    shutil.copytree(sdist, to, ignore=lambda path, _: {"psutil"} if Path(path) == sdist else ())
    # Instead of psutil's own options, which need more plugins.
    (to / "pytest.ini").write_text("[pytest]\n")


def run(sdist: Path, replaced: bool, tests: Sequence[str], timeout: float) -> tuple[Results, bool]:
    """Run the tests once; return their results, and whether pytest ended by itself."""
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory) / "psutil"
        copy(sdist, top)
        return run_pytest(
            top,
            [*(f"--ignore=tests/{name}" for name in LEFT_OUT), *tests],
            packages=("errand_boy", "psutil"),
            first=REPLACED if replaced else None,
            longest_test=LONGEST_TEST,
            timeout=timeout,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sdist", nargs="?", metavar="SDIST", help="psutil's unpacked sdist")
    parser.add_argument("--timeout", type=float, default=120, help="give up a run after so long")
    parser.add_argument("-k", dest="expression", help="as in pytest")
    arguments = parser.parse_args()
    place = arguments.sdist or os.environ.get("PSUTIL_SDIST")
    if not place or not (Path(place) / "tests" / "test_process.py").exists():
        print("psutil's tests are not here")
        return NOT_INSTALLED
    sdist = Path(place).resolve()
    for package in "errand_boy", "psutil", "pytest":
        if importlib.util.find_spec(package) is None:
            print(f"Python {platform.python_version()} has no {package}")
            return NOT_INSTALLED
    versions = f"psutil {metadata.version('psutil')}, Python {platform.python_version()}"
    tests = ["tests", *(["-k", arguments.expression] if arguments.expression else [])]
    plain, _ = run(sdist, False, tests, arguments.timeout)
    print(plain.summary(f"{versions}, nothing in place"), flush=True)
    for test in sorted(plain.failed):
        print(f"  fails with nothing replaced: {test}")
    ours, well = run(sdist, True, tests, arguments.timeout)
    print(ours.summary(f"{versions}, errand_boy in place"), flush=True)
    if not plain.passed:
        print("  no test passed with nothing replaced")
        return 1
    if (plain.popen, ours.popen) != ("subprocess", "errand_boy._process.popen"):
        print(f"  Popen was that of {plain.popen}, and then that of {ours.popen}")
        return 1

    def again(tests: Sequence[str]) -> Results:
        return run(sdist, True, tests, arguments.timeout)[0]

    return 0 if compare(plain, ours, again, IN_PLACE, RACES) and well else 1


if __name__ == "__main__":
    sys.exit(main())
