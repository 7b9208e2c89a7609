"""What the tests share: both implementations, scripts in fresh processes, checks for leftovers.

A test that takes `subprocess` runs with the standard library, and with errand_boy in its place:
once with commands started in this process, and once by a helper; if marked `portable`, once more
with the helper's posix_spawn. Scripts have the same names. A test that takes `spawn` runs with each
way forced.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess as stdlib
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

LONGEST_SCRIPT = 50  # seconds; the longest test is in pyproject.toml
INTERVAL = 5
PATIENCE = 30.0  # seconds; nothing takes this long
LONGEST_TMPDIR = 20  # bytes; the path of a socket below it must not have more than 107

T = TypeVar("T")

# interrupt(n): raise Interrupt at the n-th call of a function of errand_boy.
INTERRUPT = """
package = os.path.dirname(subprocess.__file__)

class Interrupt(Exception):
    pass

def interrupt(count):
    # Python runs signal handlers when a function begins, among others.
    def trace(frame, event, arg):
        nonlocal count
        count -= frame.f_code.co_filename.startswith(package)
        if count == 0:
            raise Interrupt
    sys.settrace(trace)
"""

PRELUDE = """
import ctypes, fcntl, gc, importlib, json, os, resource, select, signal, socket, stat
import subprocess as stdlib
import sys, threading, time, warnings
subprocess = importlib.import_module(sys.argv[1].partition("-")[0])
if sys.argv[1].endswith("-helper"):
    importlib.import_module("errand_boy._process.way")._helper_is_asked_for = True
helped = sys.argv[1].endswith("-helper") or "ERRAND_BOY_SPAWN" in os.environ
start = getattr(subprocess, "start", lambda: None) if helped else lambda: None
if helped:
    # Now: other users may not be able to read the library.
    importlib.import_module("errand_boy._process.helper")
helper_pid = getattr(subprocess, "helper_pid", lambda: None)
stdlib._USE_POSIX_SPAWN = False
libc = ctypes.CDLL(None, use_errno=True)

def report(value):
    print(json.dumps(value), flush=True)
"""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "root: needs the rights of root")
    config.addinivalue_line("markers", "slow: takes long; `python -m pytest` alone leaves it out")
    config.addinivalue_line("markers", "portable: runs through the helper's posix_spawn as well")
    # Inherited from nohup, or as a background job of a shell without job control. Everything that
    # the tests start would ignore them too.
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # by Python itself
        if signal.getsignal(number) is signal.SIG_IGN:
            action = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, action)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ["LANGUAGE"] = "en"  # of the messages of shells and tools, in any locale
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    # Python 3.13 starts some commands through posix_spawn, where its errors read differently.
    stdlib._USE_POSIX_SPAWN = False  # type: ignore[misc]
    if sys.platform == "linux":
        # This process adopts a script's orphans, so that nothing_left_behind sees them.
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # `python -m pytest` alone is what a newcomer waits for; a named file, or -m, means all of that.
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Spare collections of the tests' garbage what this has made, a quarter of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs the rights of root")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subprocess" in metafunc.fixturenames:
        names = ["subprocess", "errand_boy", "errand_boy-helper"]
        if any(mark.name == "portable" for mark in metafunc.definition.iter_markers()):
            names.append("errand_boy-posix")
        metafunc.parametrize("subprocess", names, indirect=True)


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_timeout_set_timer() -> Iterator[Any]:
    """Interrupt whatever a test does when its time is up, such as waiting for a command."""
    yield
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, left, INTERVAL)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """Don't interrupt pytest itself: at a high load it takes seconds to show a traceback."""
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)


@pytest.fixture
def subprocess(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    name, _, spawn = request.param.partition("-")
    module = importlib.import_module(name)
    if not spawn:
        yield module
        return
    module.stop()
    if spawn == "helper":
        module.start()
    else:
        monkeypatch.setenv("ERRAND_BOY_SPAWN", spawn)
    yield module
    module.stop()


@pytest.fixture(params=["direct", "helper", "posix"])
def spawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The way to start commands: in this process, by a helper, or by a helper that owns them."""
    errand_boy = importlib.import_module("errand_boy")
    errand_boy.stop()
    way: str = request.param
    monkeypatch.setenv("ERRAND_BOY_SPAWN", way)
    yield way
    errand_boy.stop()


@pytest.fixture
def by_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper starts commands, in this process and in scripts."""
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A daemon for all tests of a file."""
    started_daemon = importlib.import_module("daemon").started_daemon
    with started_daemon(tmp_path_factory.mktemp("daemon")) as it:
        yield it


@pytest.fixture
def client(daemon: Any) -> Iterator[Any]:
    it = importlib.import_module("errand_boy").connect(daemon.path)
    yield it
    it.close()


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A daemon's helper, with the arguments that are the test's parameter."""
    with importlib.import_module("wire").running(*getattr(request, "param", ())) as it:
        yield it


@pytest.fixture
def witness(pool: Any) -> Iterator[Any]:
    """A connection made before the offence, which must still work after it."""
    client = pool.connect()
    assert client.status("/bin/true") == 0
    yield client
    assert client.status("/bin/sh", "-c", "exit 3") == 3 << 8


def descendants() -> set[psutil.Process]:
    # psutil reads all of /proc to find them, for each test twice, and usually there are none.
    lists = [*Path("/proc/self/task").glob("*/children")]
    with suppress(OSError):  # a thread has ended
        if lists and not any(path.read_text() for path in lists):
            return set()
    return set(psutil.Process().children(recursive=True))


@contextmanager
def expecting_nothing_left_behind() -> Iterator[None]:
    before = descendants()
    yield
    errand_boy = sys.modules.get("errand_boy")
    helper = errand_boy.helper_pid() if errand_boy else None
    new = [p for p in descendants() - before if p.pid != helper]
    # A helper notices the end of its script a moment later than we do.
    _, alive = psutil.wait_procs(new, timeout=PATIENCE)
    found = [str(process) for process in alive]
    for process in alive:
        with suppress(psutil.NoSuchProcess):  # it has ended since
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    assert not found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    with expecting_nothing_left_behind():
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind_by_the_file() -> Iterator[None]:
    """Reaps what fixtures of a whole file leave, too, such as the helpers of a killed daemon."""
    with expecting_nothing_left_behind():
        yield


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that every user can enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="errand-boy-") as name:
        os.chmod(name, 0o755)
        yield Path(name).resolve()


def find_program(name: str, package: str | None = None, **options: bool) -> str:
    """Return a program's path, or skip the test and name the Debian package that has it."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}: apt-get install {package or name}", **options)
    return path


@pytest.fixture
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon is named, and none listens at the default path."""
    monkeypatch.delenv("ERRAND_BOY_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "errand-boy.sock").touch()


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; zombies count."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition: Callable[[], T], what: str = "what the test waits for") -> T:
    """Wait for a condition that no descriptor reports, and return its value."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what} takes more than {PATIENCE:.0f} seconds")
        select.select([], [], [], 0.002)
    return found


def with_enough_time(call: Callable[[float], T | None]) -> T:
    """Return what `call` returns, given a short time-out, or a long one if that is nothing.

    For a command that writes something before the time-out ends it, at any load.
    """
    found = call(0.5) or call(PATIENCE / 2)
    assert found
    return found


def script_environment() -> dict[str, str]:
    spec = importlib.util.find_spec("errand_boy")
    assert spec is not None and spec.origin is not None
    return {**os.environ, "PYTHONPATH": str(Path(spec.origin).parent.parent)}


@contextmanager
def started_script(
    source: str,
    implementation: str = "errand_boy",
    args: Sequence[object] = (),
    *,
    under: Sequence[str | Path] = (),
    **options: Any,
) -> Iterator[stdlib.Popen[str]]:
    """Run `source` in a fresh interpreter, to talk to it over its stdin and stdout.

    `under` is a command that runs the interpreter, such as strace.
    """
    code = PRELUDE + textwrap.dedent(source)
    command = [*under, sys.executable, "-c", code, implementation, *map(str, args)]
    options = {"stdin": stdlib.PIPE, "stdout": stdlib.PIPE, "stderr": stdlib.PIPE, **options}
    with stdlib.Popen(command, text=True, env=script_environment(), **options) as process:
        try:
            yield process
        finally:
            process.kill()


def run_script(
    source: str, implementation: str = "errand_boy", args: Sequence[object] = (), **options: Any
) -> Any:
    """Run `source` in a fresh interpreter and return what it gave to `report`."""
    with started_script(source, implementation, args, **options) as process:
        try:
            out, err = process.communicate(timeout=LONGEST_SCRIPT)
        except stdlib.TimeoutExpired as expired:
            pytest.fail(f"the script hangs:\n{expired.output!r}\n{expired.stderr!r}")
    if process.returncode:
        pytest.fail(f"the script returned {process.returncode}:\n{out}\n{err}", pytrace=False)
    return json.loads(out.splitlines()[-1])


def compare_scripts(source: str, args: Sequence[object] = (), **options: Any) -> Any:
    """Run `source` with all implementations, expect the same report from all, and return it."""
    expected = run_script(source, "subprocess", args, **options)
    for implementation in ("errand_boy", "errand_boy-helper"):
        assert run_script(source, implementation, args, **options) == expected
    return expected
