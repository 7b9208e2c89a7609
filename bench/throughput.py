"""How long many runs of /bin/true take, several at once, with their output captured.

    python -m bench.throughput WAY WORKERS COUNT

prints seconds, for the ways that are Python programs; `seconds` runs any way.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import errand_boy
from bench.callers import ask
from bench.heavy import TRUE, Caller, package_parent

WARM_UP = 20
LINE_TRUE = [*TRUE, "-"]  # given one argument only, it sets up its locale to look for --help

THREADS = "ThreadPoolExecutor, subprocess.run"
OUR_THREADS = "ThreadPoolExecutor, errand_boy.run"

SHELL = {
    "xargs -P": ["xargs", "-n1", "-P"],
    "GNU parallel": ["parallel", "--will-cite", "-j"],
    "errand-boy map": [sys.executable, "-m", "errand_boy", "map", "-j"],
}


def threads(library: Any, workers: int, count: int) -> None:
    def run(_: int) -> None:
        library.run(TRUE, capture_output=True, check=True)

    with ThreadPoolExecutor(workers) as pool:
        deque(pool.map(run, range(count)), maxlen=0)


def on_asyncio(workers: int, count: int) -> None:
    async def run(left: list[None]) -> None:
        while left:
            left.pop()
            pipe = subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*TRUE, stdout=pipe, stderr=pipe)
            await process.communicate()

    async def main() -> None:
        left = [None] * count
        await asyncio.gather(*(run(left) for _ in range(workers)))

    asyncio.run(main())


def by_map(workers: int, count: int) -> None:
    results = errand_boy.map([TRUE] * count, max_workers=workers, ordered=False, check=True)
    deque(results, maxlen=0)


PYTHON: dict[str, Callable[[int, int], None]] = {
    THREADS: partial(threads, subprocess),
    OUR_THREADS: partial(threads, errand_boy),
    "asyncio": on_asyncio,
    "errand_boy.map": by_map,
}


def is_there(way: str) -> bool:
    return way not in SHELL or shutil.which(SHELL[way][0]) is not None


def seconds(way: str, workers: int, count: int) -> float:
    """Return how long the commands took; for a command-line tool, its own start included."""
    environment = os.environ | {"PYTHONPATH": package_parent()}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled
    if way in PYTHON:
        command = [sys.executable, "-m", "bench.throughput", way, str(workers), str(count)]
        return float(subprocess.check_output(command, env=environment))
    lines = b"".join(b"%d\n" % number for number in range(count))
    command = [*SHELL[way], str(workers), *LINE_TRUE]
    start = time.perf_counter()
    subprocess.run(command, input=lines, env=environment, capture_output=True, check=True)
    return time.perf_counter() - start


def compile_c_loop(directory: str) -> str:
    program = os.path.join(directory, "cloop")
    source = Path(__file__).with_name("cloop.c")
    subprocess.run(["cc", "-O2", "-Wall", "-o", program, source], check=True)
    return program


def c_seconds(loops: Sequence[Caller], count: int) -> float:
    """Return how long the C loops together took for this many commands."""
    share = -(-count // len(loops))
    start = time.perf_counter()
    with ThreadPoolExecutor(len(loops)) as pool:
        deque(pool.map(lambda loop: ask(loop, "loop", "c", share), loops), maxlen=0)
    return (time.perf_counter() - start) * count / (share * len(loops))


def main() -> None:
    way, workers, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    PYTHON[way](workers, WARM_UP)
    start = time.perf_counter()
    PYTHON[way](workers, count)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
