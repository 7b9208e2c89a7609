"""Runs somebody else's tests, with errand_boy in place and without, and compares the results."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
NOT_INSTALLED = 77
ATTEMPTS = 3
MOST_ATTEMPTS = 20  # of those that fail more often than not
MOST_DOUBTFUL = 5  # tests


class Results(NamedTuple):
    """The outcomes of the tests, by id."""

    popen: str  # the module of subprocess.Popen there
    running: str  # the test that was running last, if it has no result
    passed: set[str]
    skipped: set[str]
    failed: dict[str, str]  # and why

    def summary(self, what: str) -> str:
        """Return one line about a run."""
        return (
            f"{what}: {len(self.passed) + len(self.failed)} ran, {len(self.passed)} passed, "
            f"{len(self.skipped)} skipped by the suite, {len(self.failed)} failed"
        )


def read(path: Path) -> Results:
    """Read the file of the plugin `results`."""
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


def run_pytest(
    directory: Path,
    arguments: Sequence[str],
    *,
    packages: Sequence[str],
    first: Path | None,
    longest_test: float,
    timeout: float,
) -> tuple[Results, bool]:
    """Run pytest in `directory`; return the tests' results, and whether it ended by itself.

    Interpreters that the tests start find `packages` where this one has them, whatever virtual
    environment they are of, and look into the directory `first` before. Of those named by the
    arguments there may be no tests at all. Times are in seconds.
    """
    specs = [importlib.util.find_spec(name) for name in packages]
    places = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    if first:
        places.insert(0, str(first))
    with tempfile.TemporaryDirectory() as name:
        results = Path(name) / "results"
        results.touch()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*places, str(HERE)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SUITE_RESULTS": str(results),
            "SUITE_LONGEST_TEST": str(longest_test),
        }
        command = [sys.executable, "-m", "pytest", "-p", "results", "-p", "no:cacheprovider"]
        command += ["-c", "pytest.ini", "-q", "--tb=short", "-W", "ignore", *arguments]
        # A file, not a pipe: a process that a test leaves behind would hold it open.
        with (Path(name) / "output").open("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=directory,
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
            ended = returncode in (0, 1, 5)  # 1: tests have failed, 5: there are none
            if returncode is None:
                where = found.running or "pytest's end: what it waits for at exit does not come"
                print(f"  gave up after {timeout:g} s, in {where}", flush=True)
            elif not ended:
                output.seek(0)
                last = output.read().splitlines()[-20:]
                print(f"  pytest ended with {returncode}:", *last, sep="\n    ", flush=True)
        return found, ended


def compare(
    plain: Results,
    ours: Results,
    again: Callable[[Sequence[str]], Results],
    how: str,
    races: Sequence[str] = (),
) -> bool:
    """Print what differs between a run without and one with errand_boy; return whether all is well.

    Some tests look at the whole machine or wait for so and so long, and fail now and then when
    others use it. If few have failed `how` only, `again` runs them again: they have to pass each
    time then, and those whose functions are named by `races`, once of up to MOST_ATTEMPTS times.
    """
    lost = plain.passed - ours.passed - ours.skipped - ours.failed.keys()
    problems = {test: ours.failed[test] for test in ours.failed.keys() - plain.failed.keys()}
    doubtful = sorted(problems) if len(problems) <= MOST_DOUBTFUL else []
    racing = {test for test in doubtful if test.rpartition("::")[2] in races}
    passes: Counter[str] = Counter()
    tries: Counter[str] = Counter()
    for attempt in range(MOST_ATTEMPTS):
        more = [t for t in doubtful if attempt < ATTEMPTS or (t in racing and not passes[t])]
        if not more:
            break
        tries.update(more)
        passes.update(again(more).passed)
    for test in doubtful:
        if passes[test] >= (1 if test in racing else ATTEMPTS):
            print(
                f"  failed once, and passed {passes[test]} of {tries[test]} times afterwards: "
                f"{test}"
            )
            print("    " + problems.pop(test).replace("\n", "\n    "))
    for test, text in sorted(problems.items()):
        print(f"  failed {how} only: {test}")
        print("    " + text.replace("\n", "\n    "))
    for test in sorted(lost):
        print(f"  no result {how}: {test}")
    for test in sorted(ours.skipped & plain.passed):
        print(f"  skipped by the suite {how} only: {test}")
    print(f"{len(problems) + len(lost)} new failures {how}", flush=True)
    return not problems and not lost
