"""Many short commands: errand_boy.map and `errand-boy map` over other ways, and over the limit.

The times in the table are those of MANY commands, or CLI_BATCH.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import errand_boy
from bench.heavy import TRUE, package_parent
from bench.ratios import CPUS, MANY, Measure, timed

Compare = Callable[..., None]

CLI_BATCH = 2000
LINE_TRUE = [*TRUE, "-"]  # with the line, two arguments: for a single one it looks for --help
WORKERS = [CPUS, 4 * CPUS]
BEST = 8 * CPUS  # workers of map
OVER_THREADS = 1.4 if sys.version_info < (3, 13) else 1.8


def by_map(workers: int) -> Measure:
    def act(count: int) -> None:
        for result in errand_boy.map([TRUE] * count, max_workers=workers):
            assert result.returncode == 0

    return timed(act, MANY)


@pytest.fixture
def by_threads() -> Iterator[Callable[[int], Measure]]:
    pools = []

    def one(_: int) -> None:
        subprocess.run(TRUE, capture_output=True, check=True)

    def make(workers: int) -> Measure:
        pool = ThreadPoolExecutor(workers)
        pools.append(pool)

        def act(count: int) -> None:
            for _ in pool.map(one, range(count)):
                pass

        return timed(act, MANY)

    yield make
    for pool in pools:
        pool.shutdown()


def by_asyncio(workers: int) -> Measure:
    async def main(count: int) -> None:
        room = asyncio.Semaphore(workers)
        pipe = subprocess.PIPE

        async def one() -> None:
            async with room:
                process = await asyncio.create_subprocess_exec(*TRUE, stdout=pipe, stderr=pipe)
                await process.communicate()

        await asyncio.gather(*(one() for _ in range(count)))

    return timed(lambda count: asyncio.run(main(count)), MANY)


@pytest.mark.parametrize("workers", [*WORKERS, BEST])
def test_over_c_limit(compare: Compare, c_limit: Callable[[int], Measure], workers: int) -> None:
    compare(
        by_map(workers),
        c_limit(MANY),
        name=f"map, {workers} workers over {CPUS} C loops of vfork, exec, wait",
        at_most=1 / 0.9 if workers == BEST else None,
    )


@pytest.mark.parametrize("threads", WORKERS)
def test_over_threads(compare: Compare, by_threads: Callable[[int], Measure], threads: int) -> None:
    compare(
        by_map(BEST),
        by_threads(threads),
        name=f"map, {BEST} workers over subprocess.run in {threads} threads",
        at_most=1 / OVER_THREADS,
    )


def test_over_asyncio(compare: Compare) -> None:
    workers = 4 * CPUS
    compare(by_map(workers), by_asyncio(workers), name=f"map over asyncio, {workers} at a time")


def by_command(*words: str, lines: bytes = b"x\n" * CLI_BATCH) -> Measure:
    environment = os.environ | {"PYTHONPATH": package_parent()}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled

    def act(_: int) -> None:
        subprocess.run(words, input=lines, stdout=subprocess.DEVNULL, check=True, env=environment)

    return timed(act, MANY)


@pytest.mark.parametrize("jobs", [*WORKERS])
def test_command_over_xargs(compare: Compare, jobs: int) -> None:
    compare(
        by_command(sys.executable, "-m", "errand_boy", "map", f"-j{jobs}", *LINE_TRUE),
        by_command("xargs", "-d", "\n", "-n1", f"-P{jobs}", *LINE_TRUE),
        name=f"errand-boy map -j{jobs} over xargs -P{jobs}",
        at_most=1 / 1.3,
    )


@pytest.mark.parametrize("jobs", [*WORKERS])
def test_command_over_parallel(compare: Compare, jobs: int) -> None:
    if not shutil.which("parallel"):
        pytest.skip("needs GNU parallel: Debian's package parallel")
    lines = b"x\n" * 200  # some milliseconds for each
    compare(
        by_command(sys.executable, "-m", "errand_boy", "map", f"-j{jobs}", *LINE_TRUE, lines=lines),
        by_command("parallel", "--will-cite", f"-j{jobs}", *LINE_TRUE, lines=lines),
        name=f"errand-boy map -j{jobs} over parallel -j{jobs}, 200 commands",
        at_most=1 / 3,
    )


def test_callers_cpu(note: Callable[[str], None]) -> None:
    turns = 3
    start = time.process_time()
    by_map(BEST)(turns)
    used = (time.process_time() - start) / (turns * MANY) * 1e6
    note(f"the caller's own CPU for each command of map, {BEST} workers: {used:.1f} µs")
