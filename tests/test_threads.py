"""What several threads do at the same moment, which is so to the letter where there is no GIL."""

from __future__ import annotations

import signal
import sysconfig
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from conftest import run_script

import errand_boy
from errand_boy._native import lib
from errand_boy._options import table
from errand_boy._wire import frames

THREADS = 8

AT_ONCE = """
def at_once(*functions):
    barrier, errors = threading.Barrier(len(functions)), []
    def work(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(repr(error))
    threads = [threading.Thread(target=work, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
"""

namespace: dict[str, Any] = {"threading": threading}
exec(AT_ONCE, namespace)
at_once: Callable[..., list[str]] = namespace["at_once"]


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has a GIL"
)
def test_import_leaves_the_gil_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON_GIL", raising=False)
    source = "report([subprocess.run(['true']).returncode, sys._is_gil_enabled()])"
    assert run_script(source) == [0, False]


def test_options_are_those_of_their_own_thread() -> None:
    """What was encoded last is kept for the next start with the same options."""

    def encode(number: int) -> None:
        given = {"nice": number}
        expected = frames.number(lib.EB_TAG_RENICE, number)
        for _ in range(3000):
            assert table.encode(given, False, False) == (expected, [])

    assert at_once(*(partial(encode, number) for number in range(THREADS))) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "helper"])
def test_environment_that_other_threads_change(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they leave alone is there, once; the rest is as they have set it, or absent."""
    monkeypatch.setenv("ERRAND_BOY_SPAWN", way)
    source = f"""{AT_ONCE}
import random
over = threading.Event()
for kind in "FIRST", "STAYS":  # what follows a variable moves when that is removed
    os.environ.update((f"{{kind}}_{{number}}", "1" * 20) for number in range(20))

def change(names):
    while not over.is_set():
        for name in names:
            os.environ[name] = "1" * random.randrange(20, 200)
        for name in names:
            del os.environ[name]

def start():
    try:
        for _ in range(60):
            done = subprocess.run([b"/usr/bin/env", b"-0"], stdout=subprocess.PIPE, check=True)
            found = [line.split(b"=", 1) for line in done.stdout.split(b"\\0")[:-1]]
            names = [name for name, *_ in found if name.startswith(b"STAYS_")]
            assert len(names) == len(set(names)) == 20, names
            changing = (b"STAYS_", b"FIRST_", b"MORE_")
            values = [value for name, value in found if name.startswith(changing)]
            assert all(20 <= len(value) == value.count(b"1") for value in values), values
    finally:
        over.set()

more = [[f"MORE_{{thread}}_{{number}}" for number in range(100)] for thread in range(3)]
more.append([f"FIRST_{{number}}" for number in range(20)])
report(at_once(start, *(lambda names=names: change(names) for names in more)))
"""
    assert run_script(source) == []


@pytest.mark.slow
def test_verdict_is_computed_by_many_threads_at_once() -> None:
    for _ in range(100):
        with errand_boy.Popen(["true"]) as process:
            process.wait()
        seen: list[Any] = []

        def read(ended: Any, seen: list[Any] = seen) -> None:
            seen.append(ended.rusage)

        reads = [partial(read, process), partial(read, errand_boy.run(["true"]))]
        assert at_once(*reads * 4) == []
        assert len(seen) == 8 and all(usage.ru_maxrss > 0 for usage in seen)


@pytest.mark.slow
def test_patch_and_unpatch_in_many_threads() -> None:
    source = f"""{AT_ONCE}
from subprocess import Popen
before, finders = dict(vars(Popen)), list(sys.meta_path)
def change():
    for _ in range(50):
        subprocess.patch()
        subprocess.unpatch()

errors = []
for _ in range(20):
    errors += at_once(*[subprocess.patch] * {THREADS}) + at_once(*[subprocess.unpatch] * 2)
    errors += at_once(*[change] * {THREADS})
subprocess.unpatch()
report([errors, dict(vars(Popen)) == before, sys.meta_path == finders])
"""
    assert run_script(source) == [[], True, True]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "helper"])
def test_everything_at_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", way)
    errand_boy.stop()  # so that a helper is started by all of them

    def start(number: int) -> None:
        for turn in range(15):
            text = f"{number}-{turn}"
            done = errand_boy.run(["cat"], input=text, capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.cause) == (0, text, "exit")
            with errand_boy.Popen(
                ["sh", "-c", "echo $TEXT; ulimit -n; exit 3"],
                env={"TEXT": text},
                rlimits={"nofile": 100 + number},
                stdout=errand_boy.PIPE,
            ) as process:
                assert process.communicate()[0] == f"{text}\n{100 + number}\n".encode()
            assert process.returncode == 3
            with pytest.raises(FileNotFoundError):
                errand_boy.run([f"/no/{text}"])
            with errand_boy.Popen(["sleep", "60"]) as process:
                waits = [process.wait, partial(process.wait, timeout=30)]
                assert at_once(*waits, process.poll, process.terminate) == []
            assert process.returncode == -signal.SIGTERM
            assert [r.stdout for r in errand_boy.map([["echo", text]] * 3)] == [
                f"{text}\n".encode()
            ] * 3

    assert at_once(*(partial(start, number) for number in range(THREADS))) == []
    errand_boy.stop()
