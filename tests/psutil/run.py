"""Runs psutil's own tests with errand_boy.Popen in place of subprocess.Popen.

    python tests/psutil/run.py [SDIST] [--timeout SECONDS] [-k EXPRESSION]

SDIST is the unpacked sdist (or $PSUTIL_SDIST) of the psutil that is installed, as is pytest. The
tests run twice, first with nothing replaced: what fails then is the machine's doing. The exit
status is 1 if a test fails in the second run only, or if that run does not end in time; 77 if the
tests are not there.
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
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from foreign.suite import Results, read

HERE = Path(__file__).parent
FOREIGN = HERE.parent / "foreign"
REPLACED = HERE.parent / "cpython" / "replaced"

NOT_INSTALLED = 77
LONGEST_TEST = 30  # seconds; the slowest takes five
ATTEMPTS = 3
MOST_DOUBTFUL = 5  # tests

# They look at /proc/PID/cmdline right after the start. The kernel fills it microseconds after the
# exec, so at first it is empty in nine looks of ten, with subprocess as with errand_boy.
RACES = ("test_cmdline", "test_long_cmdline", "test_proc_cmdline")

# It looks for leaks of memory in psutil's C functions, with one more package (psleak), and not at
# processes.
LEFT_OUT = ("test_memleaks.py",)


def copy(sdist: Path, to: Path) -> None:
    """Copy all but the package, which is not built there, and would be imported."""
    shutil.copytree(sdist, to, ignore=lambda path, _: {"psutil"} if Path(path) == sdist else ())
    # In place of psutil's own options, which need more plugins.
    (to / "pytest.ini").write_text("[pytest]\n")


def run(
    sdist: Path, replaced: bool, tests: Iterable[str], options: Sequence[str], timeout: float
) -> tuple[Results, bool]:
    """Run the tests once; return their results, and whether pytest ended by itself."""
    # The tests start a Python outside of any virtual environment, which has to find psutil.
    packages = importlib.util.find_spec("errand_boy"), importlib.util.find_spec("psutil")
    places = [str(Path(spec.origin).parents[1]) for spec in packages if spec and spec.origin]
    if replaced:
        places.insert(0, str(REPLACED))
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory) / "psutil"
        copy(sdist, top)
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
        command += ["-c", "pytest.ini", "-q", "--tb=short", "-W", "ignore", *options]
        command += [f"--ignore=tests/{name}" for name in LEFT_OUT]
        # A file, not a pipe: what a test has left behind would hold it open.
        with (Path(directory) / "output").open("w+", errors="replace") as output:
            process = subprocess.Popen(
                [*command, *(list(tests) or ["tests"])],
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
                where = found.running or "pytest's end: what it waits for at exit does not come"
                print(f"  gave up after {timeout:g} s, in {where}", flush=True)
            elif returncode not in (0, 1):  # 1: tests have failed
                output.seek(0)
                last = output.read().splitlines()[-20:]
                print(f"  pytest ended with {returncode}:", *last, sep="\n    ", flush=True)
        return found, returncode in (0, 1)


def summary(what: str, results: Results) -> str:
    """Return one line about a run."""
    return (
        f"psutil {metadata.version('psutil')}, Python {platform.python_version()}, "
        f"{what} in place: {len(results.passed) + len(results.failed)} ran, "
        f"{len(results.passed)} passed, "
        f"{len(results.skipped)} skipped by the suite, {len(results.failed)} failed"
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
    options = ["-k", arguments.expression] if arguments.expression else []
    plain, _ = run(sdist, False, (), options, arguments.timeout)
    print(summary("nothing", plain), flush=True)
    for test in sorted(plain.failed):
        print(f"  fails with nothing replaced: {test}")
    ours, well = run(sdist, True, (), options, arguments.timeout)
    print(summary("errand_boy", ours), flush=True)
    if not plain.passed:
        print("  no test passed with nothing replaced")
        return 1
    if (plain.popen, ours.popen) != ("subprocess", "errand_boy._popen"):
        print(f"  Popen was that of {plain.popen}, and then that of {ours.popen}")
        return 1

    lost = plain.passed - ours.passed - ours.skipped - ours.failed.keys()
    problems = {test: ours.failed[test] for test in ours.failed.keys() - plain.failed.keys()}
    # Some tests look at the memory, the processes and the CPUs of the whole machine, and fail now
    # and then when others use it. They have to pass each time when they are run again; races, once.
    doubtful = set(problems) if well and len(problems) <= MOST_DOUBTFUL else set()
    passes: Counter[str] = Counter()
    for _ in range(ATTEMPTS if doubtful else 0):
        again, _ = run(sdist, True, sorted(doubtful), (), arguments.timeout)
        passes.update(again.passed)
    for test in sorted(doubtful):
        if passes[test] < (1 if test.rpartition("::")[2] in RACES else ATTEMPTS):
            continue
        print(
            f"  failed once, and passed {passes[test]} of {ATTEMPTS} times when run again: {test}"
        )
        print("    " + problems.pop(test).replace("\n", "\n    "))
    for test, text in sorted(problems.items()):
        print(f"  failed with errand_boy in place only: {test}")
        print("    " + text.replace("\n", "\n    "))
    for test in sorted(lost):
        print(f"  no result with errand_boy in place: {test}")
    for test in sorted(ours.skipped & plain.passed):
        print(f"  skipped by the suite with errand_boy in place only: {test}")
    print(f"{len(problems) + len(lost)} new failures with errand_boy in place")
    return 0 if well and not problems and not lost else 1


if __name__ == "__main__":
    sys.exit(main())
