"""A program whose exec takes long, as on a hung file system, holds up nobody else."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from guard import Guard

import errand_boy

pytestmark = pytest.mark.root


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    return Path(shutil.copy("/bin/cat", tmp_path / "slow"))


def test_starts_in_other_threads_finish_before_a_slow_one(slow: Path) -> None:
    errand_boy.start()
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
    errand_boy.start()
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
