"""Runs the interpreter's own tests of subprocess with errand_boy in its place.

    python tests/cpython/run.py [--stdlib] [SUITE]... [-v] [-k PATTERN]...

Suites: `subprocess` and `asyncio` have errand_boy.Popen as subprocess.Popen; `asyncio-loop` and
`uvloop` start processes through errand_boy.asyncio instead of asyncio or uvloop.
With ERRAND_BOY_SPAWN=helper, a helper starts the commands.
With --stdlib nothing is replaced or excluded: failures are then the machine's fault.
Exit status 1 if a test fails, 77 if this Python is installed without its `test` package, or uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import functools
import importlib
import inspect
import os
import platform
import resource
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

NOT_INSTALLED = 77
MANY_DESCRIPTORS = 1024

SUITES = {
    "subprocess": "test.test_subprocess",
    "asyncio": "test.test_asyncio.test_subprocess",
    "asyncio-loop": "test.test_asyncio.test_subprocess",
    "uvloop": "test.test_asyncio.test_subprocess",
}


class Named(NamedTuple):
    """A test of a suite, in each Python from `since` on and before `until`, and why it is named.

    Both are compared with sys.version_info: with two numbers, or with three for a patch release.

    Patch releases move tests from class to class, so that only the method's name is given, or that
    of a whole class; the summary has the whole name of what was found, and finding nothing is a
    failure.
    """

    suite: str
    test: str
    since: tuple[int, ...]
    reason: str
    until: tuple[int, ...] = (9, 9)

    def applies(self, suite: str) -> bool:
        return self.suite == suite and self.since <= sys.version_info < self.until


# Tests that mock the code that errand_boy.Popen replaces. They can't pass, since their mock is
# never called. Python 3.10 has a test__use_vfork without a mock, which runs.
EXCLUDED = (
    Named(
        "subprocess",
        "test__use_vfork",
        (3, 11),
        "patches subprocess._fork_exec and looks at the arguments of that C function",
        (3, 14),
    ),
    Named(
        "subprocess",
        "test_exception_errpipe_normal",
        (3, 10),
        "patches the fork_exec of subprocess to write into the error pipe of its child",
    ),
    Named(
        "subprocess",
        "test_exception_errpipe_bad_data",
        (3, 10),
        "patches the fork_exec of subprocess to write nonsense into the error pipe of its child",
    ),
    Named(
        "subprocess",
        "test_stopped",
        (3, 10),
        "patches os.waitpid, and os.wait4 is called, which tells what was used too",
    ),
    Named(
        "subprocess",
        "test_pidfd_open_notification_without_immediate_reap",
        (3, 15),
        "patches os.waitpid, and os.wait4 is called, which tells what was used too",
    ),
    *(
        Named(suite, *named)
        for suite in ("asyncio-loop", "uvloop")
        for named in (
            ("test_popen_error", (3, 10), "patches subprocess.Popen, which is not called"),
            (
                "test_popen_error_with_stdin_pipe",
                (3, 10),
                "patches subprocess.Popen, which is not called",
            ),
            (
                "test_create_subprocess_fails_with_inactive_watcher",
                (3, 11),
                "expects a child watcher to be asked, and none is used",
                (3, 14),
            ),
            (
                "SubprocessFastWatcherTests",
                (3, 10),
                "FastChildWatcher waits for all children, before we can",
                (3, 14),
            ),
            (
                "test_create_subprocess_with_pidfd",
                (3, 12),
                "fails alone with nothing replaced: needs what tests excluded here leave behind",
                (3, 13),
            ),
            (
                "test_pid_not_reaped_before_exit_published",
                (3, 14, 7),
                "looks for the thread in which asyncio's own child watcher waits, and none is used",
            ),
        )
    ),
    Named(
        "uvloop",
        "test_pause_reading",
        (3, 10),
        "puts mocks into a pipe's transport, which uvloop's does not take",
    ),
    Named(
        "uvloop",
        "SubprocessSafeWatcherTests",
        (3, 10),
        "uvloop does not let SafeChildWatcher have SIGCHLD",
        (3, 14),
    ),
    Named(
        "uvloop",
        "test_watcher_implementation",
        (3, 14),
        "looks at the child watcher of asyncio's own loop, which uvloop's does not have",
    ),
)

# Tests that start their commands from their own Python interpreter. That one replaces Popen too:
# otherwise they would pass without using errand_boy.
REPLACED_IN_CHILD = (
    Named("subprocess", "test_stdout_none", (3, 10), "stdout is passed on by a child"),
    Named("subprocess", "test_issue8780", (3, 10), "stdout is passed on by a child"),
    Named("subprocess", "test_encoding_warning", (3, 11), "counts the warnings of a child"),
    Named(
        "subprocess",
        "test_close_fds_when_max_fd_is_lowered",
        (3, 10),
        "lowers RLIMIT_NOFILE below open descriptors in a child",
    ),
    Named(
        "subprocess",
        "test_wait_when_sigchild_ignored",
        (3, 10),
        "ignores SIGCHLD in a child",
    ),
    Named(
        "subprocess",
        "test_preexec_at_exit",
        (3, 12),
        "uses preexec_fn when a child finalizes",
    ),
)


class Result(unittest.TextTestResult):
    """Also remembers which tests passed, by id; a subtest counts as its test."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.passed: set[str] = set()

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed.add(test.id())

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self.passed.add(test.id())

    def skips(self) -> dict[str, str]:
        return {test_id(test): reason for test, reason in self.skipped}

    def failed(self) -> set[str]:
        tests = [test for test, _ in self.failures + self.errors] + self.unexpectedSuccesses
        return {test_id(test) for test in tests}


def test_id(test: unittest.TestCase) -> str:
    whole: unittest.TestCase = getattr(test, "test_case", test)
    return whole.id()


def tests_in(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from tests_in(item)
        else:
            yield item


def method_name(test: unittest.TestCase) -> str:
    return test.id().rpartition(".")[2]


def check_names(suite: str, module: ModuleType) -> list[str]:
    """Return complaints about named tests that this Python does not have."""
    cases = [c for c in vars(module).values() if isinstance(c, type)]
    return [
        f"{named.test} is named for this Python, but {module.__name__} does not have it"
        for named in EXCLUDED + REPLACED_IN_CHILD
        if named.applies(suite)
        and not any(hasattr(case, named.test) or case.__name__ == named.test for case in cases)
    ]


def without_silent_fallback(execute_child: Callable[..., None]) -> Callable[..., None]:
    """Refuse the standard library's start of a child where errand_boy has no reason to use it."""
    signature = inspect.signature(execute_child)

    @functools.wraps(execute_child)
    def start(*args: Any, **options: Any) -> None:
        if signature.bind(*args, **options).arguments["preexec_fn"] is None:
            raise AssertionError("started by the standard library, without a preexec_fn")
        execute_child(*args, **options)

    return start


def start_helper(errand_boy: Any) -> None:
    """Start the helper that the environment asks for, which is one more child and a descriptor."""
    if os.environ.get("ERRAND_BOY_SPAWN") == "helper":  # some tests compare before and after
        errand_boy.start()


def replace_popen(undo: ExitStack) -> None:
    errand_boy: Any = importlib.import_module("errand_boy")
    start_helper(errand_boy)
    standard: Any = subprocess.Popen
    if importlib.import_module("errand_boy._process.direct").WITHOUT_C is None:
        start = without_silent_fallback(standard._execute_child)
        undo.enter_context(mock.patch.object(standard, "_execute_child", start))
    undo.enter_context(mock.patch.object(subprocess, "Popen", errand_boy.Popen))


def replace_asyncio(undo: ExitStack) -> None:
    errand_boy: Any = importlib.import_module("errand_boy")
    ours: Any = importlib.import_module("errand_boy.asyncio")
    start_helper(errand_boy)
    for module in asyncio, asyncio.subprocess:
        for name in "create_subprocess_exec", "create_subprocess_shell":
            undo.enter_context(mock.patch.object(module, name, getattr(ours, name)))
    loop: Any = asyncio.SelectorEventLoop
    make: Any = importlib.import_module("errand_boy._asyncio.transport").make_transport
    undo.enter_context(mock.patch.object(loop, "_make_subprocess_transport", make))


def use_uvloop(undo: ExitStack, replaced: bool) -> None:
    uvloop: Any = importlib.import_module("uvloop")
    standard: Any = asyncio.SelectorEventLoop
    methods = ("subprocess_exec", "subprocess_shell", "_make_subprocess_transport")
    # What the tests and asyncio's own methods use of a loop.
    loop: Any = type("Loop", (uvloop.Loop,), {"_debug": False, "_default_executor": None})
    if replaced:
        for name in methods:
            setattr(loop, name, getattr(standard, name))
    if sys.version_info >= (3, 14):  # where policies are deprecated
        for module in asyncio, asyncio.events:
            undo.enter_context(mock.patch.object(module, "new_event_loop", loop))
    else:
        policy: Any = type(asyncio.get_event_loop_policy())
        undo.enter_context(mock.patch.object(policy, "_loop_factory", loop))


def replace_in_child(test: unittest.TestCase) -> None:
    """Make interpreters that `test` starts replace Popen too."""
    errand_boy: Any = importlib.import_module("errand_boy")
    name = method_name(test)
    method = getattr(test, name)
    places = [Path(__file__).parent / "replaced", Path(errand_boy.__file__).parent.parent]
    path = os.pathsep.join(str(place.resolve()) for place in places)

    @functools.wraps(method)
    def run() -> None:
        # script_helper isolates its interpreters from PYTHONPATH unless they need the environment.
        needed = "test.support.script_helper.interpreter_requires_environment"
        with mock.patch.dict(os.environ, PYTHONPATH=path), mock.patch(needed, lambda: True):
            method()

    setattr(test, name, run)


def run(suite: str, arguments: argparse.Namespace) -> bool:
    """Run one suite, print the summary, and return whether all is well."""
    module = importlib.import_module(SUITES[suite])
    support: Any = importlib.import_module("test.support")
    os_helper: Any = importlib.import_module("test.support.os_helper")
    loader = unittest.TestLoader()
    if arguments.patterns:
        loader.testNamePatterns = arguments.patterns
    tests = list(tests_in(loader.loadTestsFromModule(module)))
    problems: list[str] = []
    excluded: dict[str, str] = {}
    if not arguments.stdlib:
        problems += check_names(suite, module)
        reasons = {named.test: named.reason for named in EXCLUDED if named.applies(suite)}
        children = {named.test for named in REPLACED_IN_CHILD if named.applies(suite)}
        excluded = {
            test.id(): reasons[name]
            for test in tests
            for name in (method_name(test), type(test).__name__)
            if name in reasons
        }
        tests = [test for test in tests if test.id() not in excluded]
        for test in tests:
            if method_name(test) in children:
                replace_in_child(test)

    runner = unittest.TextTestRunner(resultclass=Result, verbosity=1 + arguments.verbose)
    support.environment_altered = False
    with tempfile.TemporaryDirectory() as empty, os_helper.change_cwd(empty):
        result = runner.run(unittest.TestSuite(tests))
    assert isinstance(result, Result)
    if support.environment_altered:
        problems.append("left threads or children behind, or raised where nobody could catch it")

    failed, skips = result.failed(), result.skips()
    lost = {test.id() for test in tests} - result.passed - failed - skips.keys()
    problems += [f"failed {test}" for test in sorted(failed)]
    problems += [f"no result from {test}" for test in sorted(lost)]
    for reason, count in sorted(Counter(skips.values()).items()):
        print(f"  skipped by the suite, {count} times: {' '.join(reason.split())}")
    for name, reason in excluded.items():
        print(f"  excluded {name.removeprefix(module.__name__ + '.')}: {reason}")
    for problem in problems:
        print(f"  {problem}")
    print(
        f"{module.__name__}, Python {platform.python_version()},",
        f"{suite}, {'nothing' if arguments.stdlib else 'errand_boy'} in place:",
        f"{len(result.passed | failed)} ran, {len(result.passed - failed)} passed,",
        f"{len(skips)} skipped by the suite, {len(excluded)} excluded,",
        f"{len(failed) + len(lost)} failed",
        flush=True,
    )
    return not problems


def replace(suite: str, undo: ExitStack, arguments: argparse.Namespace) -> None:
    if not arguments.stdlib:
        if suite in {"subprocess", "asyncio"}:
            replace_popen(undo)
        else:
            replace_asyncio(undo)
    if suite == "uvloop":
        use_uvloop(undo, not arguments.stdlib)


def pattern(text: str) -> str:
    """As unittest's own -k: a substring, unless it holds an asterisk."""
    return text if "*" in text else f"*{text}*"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run CPython's tests of subprocess with errand_boy.Popen in place of its own."
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--stdlib", action="store_true", help="replace and exclude nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="name each test")
    parser.add_argument(
        "-k",
        dest="patterns",
        action="append",
        type=pattern,
        help="as in unittest",
        metavar="PATTERN",
    )
    parser.add_argument("--timeout", type=float, default=600, help="give up after these seconds")
    arguments = parser.parse_args()
    suites = arguments.suites or list(SUITES)
    if unknown := set(suites) - SUITES.keys():
        parser.error(f"no such suite: {', '.join(unknown)}")

    faulthandler.dump_traceback_later(arguments.timeout, exit=True)
    # test_no_leaking uses up the descriptors, and skips itself if there are many more than this.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft > MANY_DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MANY_DESCRIPTORS, hard))
    well = True
    for suite in suites:
        with ExitStack() as undo:
            try:
                replace(suite, undo, arguments)
                importlib.import_module(SUITES[suite])
                regrtest: Any = importlib.import_module("test.libregrtest.utils")
            except ModuleNotFoundError as error:
                if not error.name or error.name.partition(".")[0] not in {"test", "uvloop"}:
                    raise
                print(f"Python {platform.python_version()} has no {error.name}")
                if arguments.suites:
                    return NOT_INSTALLED
                continue
            # These set support.environment_altered.
            regrtest.setup_unraisable_hook()
            regrtest.setup_threading_excepthook()
            well = run(suite, arguments) and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
