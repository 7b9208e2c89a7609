"""A program whose exec takes long, as on a hung file system, holds up nobody else."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE
from guard import Guard

import errand_boy

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True, params=["direct", "helper"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    errand_boy.stop()
    monkeypatch.setenv("ERRAND_BOY_SPAWN", request.param)
    yield
    errand_boy.stop()


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    return Path(shutil.copy("/bin/cat", tmp_path / "slow"))


def test_starts_in_other_threads_finish_before_a_slow_one(slow: Path) -> None:
    order: list[str] = []
    ticked = threading.Condition()
    ticks = 0
    over = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not over.wait(0.01):
            with ticked:
                ticks += 1
                ticked.notify_all()

    def start_slow() -> None:
        errand_boy.run([slow], stdin=errand_boy.DEVNULL, check=True)
        order.append("slow")

    def start_quick() -> None:
        for _ in range(5):
            errand_boy.run(["true"], check=True)
            order.append("quick")

    with Guard(slow) as guard:
        ticker = threading.Thread(target=tick)
        ticker.start()
        slow_thread = threading.Thread(target=start_slow)
        slow_thread.start()
        guard.held()
        quick_threads = [threading.Thread(target=start_quick) for _ in range(10)]
        for thread in quick_threads:
            thread.start()
        with ticked:
            seen = ticks
            ticked.wait_for(lambda: ticks > seen + 2)
        for thread in quick_threads:
            thread.join()
        guard.release()
        slow_thread.join()
        over.set()
        ticker.join()
    assert order == ["quick"] * 50 + ["slow"]


def test_many_slow_ones_at_once_and_a_quick_one(slow: Path) -> None:
    count = 20
    order: list[str] = []

    def start_slow() -> None:
        errand_boy.run([slow], stdin=errand_boy.DEVNULL, check=True)
        order.append("slow")

    with Guard(slow) as guard:
        threads = [threading.Thread(target=start_slow) for _ in range(count)]
        for thread in threads:
            thread.start()
        for _ in threads:
            guard.held()
        errand_boy.run(["true"], check=True)
        order.append("quick")
        for _ in threads:
            guard.release()
        for thread in threads:
            thread.join()
    assert order == ["quick"] + ["slow"] * count


def test_slow_exec_that_fails_in_the_end(slow: Path) -> None:
    slow.write_text("neither ELF nor script")
    errors: list[OSError] = []

    def start_slow() -> None:
        try:
            errand_boy.run([slow])
        except OSError as error:
            errors.append(error)

    with Guard(slow) as guard:
        thread = threading.Thread(target=start_slow)
        thread.start()
        guard.held()
        errand_boy.run(["true"], check=True)
        assert not errors
        guard.release()
        thread.join()
    assert [(error.strerror, error.filename) for error in errors] == [("Exec format error", slow)]


def test_map_goes_on_beside_a_slow_one(slow: Path) -> None:
    commands: list[list[Any]] = [[slow, "/dev/null"], *([["echo", "quick"]] * 50)]
    with Guard(slow) as guard:
        results = errand_boy.map(commands, max_workers=2, ordered=False)
        quick = [next(results) for _ in range(50)]
        held = guard.held()
        assert psutil.pid_exists(held)
        assert [(r.returncode, r.stdout) for r in quick] == [(0, b"quick\n")] * 50
        guard.release()
        assert [(r.index, r.returncode, r.error) for r in results] == [(0, 0, None)]


def test_slow_exec_of_a_map_that_was_closed(tmp_path: Path) -> None:
    slow = Path(shutil.copy("/bin/sleep", tmp_path / "slow"))
    with Guard(slow) as guard:
        results = errand_boy.map([[slow, "60"], ["true"]], max_workers=2, ordered=False)
        assert next(results).args == ["true"]
        process = psutil.Process(guard.held())
        results.close()
        guard.release()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.wait(PATIENCE)


def test_slow_exec_of_a_map_that_fails_in_the_end(slow: Path) -> None:
    slow.write_text("neither ELF nor script")
    with Guard(slow) as guard:
        results = errand_boy.map([[slow], ["true"]], max_workers=2, ordered=False)
        assert next(results).args == ["true"]
        guard.held()
        guard.release()
        (failed,) = results
    assert failed.returncode == 126
    assert getattr(failed.error, "strerror", None) == "Exec format error"
