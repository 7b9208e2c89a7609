"""A Celery worker that holds 2 GiB over a small one: from run_command's request to its end.
Also how long after `revoke` the command's process group has gone.

Workers import this file too, as their app's module.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.conftest import available_gib
from bench.heavy import TRUE, hold_memory, package_parent
from bench.ratios import quartiles, verdict

pytest.importorskip("celery")

TESTS = Path(__file__).parent.parent / "tests"
sys.path.append(str(TESTS))

from celery_app import make_app  # noqa: E402

AT_MOST = 1.2
GIB = 2.0
REVOKED_AT_MOST = 1.0  # seconds
REVOCATIONS = 10
POOLS = ("prefork", "threads", "gevent", "eventlet")
PATIENCE = 30.0  # seconds

if "CELERY_BENCH_GIB" in os.environ:
    app = make_app(os.environ["CELERY_BENCH_FOLDER"])
    gib = float(os.environ["CELERY_BENCH_GIB"])
    held = hold_memory(int(gib * (1 << 30))) if gib else None


@contextmanager
def worker(folder: Path, gib: float = 0, pool: str = "prefork") -> Iterator[Any]:
    """Start a worker of one process, thread or greenlet; give its clients' app."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{package_parent()}:{TESTS}",
        "CELERY_BENCH_FOLDER": str(folder),
        "CELERY_BENCH_GIB": str(gib),
    }
    command = [sys.executable, "-m", "celery", "-A", "bench.test_celery", "worker"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING"]
    process = subprocess.Popen(
        [*command, "--pool", pool, "--concurrency", "1", *quiet],
        env=environment,
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    client = make_app(str(folder))
    try:
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(PATIENCE)


def run_commands(client: Any, count: int) -> list[int]:
    """Run them one after the other."""
    nanoseconds = []
    for _ in range(count):
        result = client.signature("errand_boy.run_command", (TRUE,)).apply_async()
        end = time.monotonic() + PATIENCE
        while not result.ready():
            assert time.monotonic() < end
        nanoseconds.append(int(result.get()["duration"] * 1e9))
    return nanoseconds


def test_large_worker(tmp_path: Path, compare: Callable[..., None]) -> None:
    if available_gib() < GIB + 1:
        pytest.skip(f"{GIB:g} GiB are not available")
    with worker(tmp_path / "large", GIB) as large, worker(tmp_path / "small", 0) as small:
        compare(
            partial(run_commands, large),
            partial(run_commands, small),
            name=f"run_command, worker of {GIB:g} GiB over small",
            at_most=AT_MOST,
        )


@pytest.mark.parametrize("pool", POOLS)
def test_revoke(tmp_path: Path, note: Callable[[str], None], pool: str) -> None:
    if pool in ("gevent", "eventlet"):
        pytest.importorskip(pool)
    seconds = []
    with worker(tmp_path / "worker", pool=pool) as client:
        for number in range(REVOCATIONS):
            file = tmp_path / str(number)
            script = "sleep 100 & echo $$ $! > $0.new; mv $0.new $0; wait"
            args = (["/bin/sh", "-c", script, str(file)],)
            result = client.signature("errand_boy.run_command", args).apply_async()
            until(file.exists)
            processes = [os.pidfd_open(int(pid)) for pid in file.read_text().split()]
            start = time.monotonic()
            result.revoke(terminate=True)
            for fd in processes:
                assert select.select([fd], [], [], PATIENCE)[0]
                os.close(fd)
            seconds.append(time.monotonic() - start)
            until(partial(is_revoked, result))
    first, median, third = quartiles(seconds)
    met = verdict(max(seconds) <= REVOKED_AT_MOST)
    note(
        f"revoke to the end of the group, {pool}: {median * 1e3:.0f} ms "
        f"[{first * 1e3:.0f} - {third * 1e3:.0f}], at most {max(seconds) * 1e3:.0f} "
        f"(target {REVOKED_AT_MOST * 1e3:.0f}): {met}"
    )


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def is_revoked(result: Any) -> bool:
    return bool(result.state == "REVOKED")
