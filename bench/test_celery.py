"""A Celery worker that holds 2 GiB against a small one: from run_command's request to its end.

Workers import this file too, as the module of their app.
"""

from __future__ import annotations

import os
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

pytest.importorskip("celery")

TESTS = Path(__file__).parent.parent / "tests"
sys.path.append(str(TESTS))

from celery_app import make_app  # noqa: E402

AT_MOST = 1.2
GIB = 2.0
PATIENCE = 30.0  # seconds

if "CELERY_BENCH_GIB" in os.environ:
    app = make_app(os.environ["CELERY_BENCH_FOLDER"])
    gib = float(os.environ["CELERY_BENCH_GIB"])
    held = hold_memory(int(gib * (1 << 30))) if gib else None


@contextmanager
def worker(folder: Path, gib: float) -> Iterator[Callable[[int], list[int]]]:
    """Start a worker; give the function that runs commands on it and returns the nanoseconds."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{package_parent()}:{TESTS}",
        "CELERY_BENCH_FOLDER": str(folder),
        "CELERY_BENCH_GIB": str(gib),
    }
    command = [sys.executable, "-m", "celery", "-A", "bench.test_celery", "worker"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING"]
    process = subprocess.Popen(
        [*command, "--pool", "prefork", "--concurrency", "1", *quiet],
        env=environment,
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    client = make_app(str(folder))
    try:
        yield partial(run_commands, client)
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
            large, small, name=f"run_command, worker of {GIB:g} GiB over small", at_most=AT_MOST
        )
