"""Start to reaped on event loops: errand_boy.asyncio over asyncio's and uvloop's own.

Run as a program (``python -m bench.test_asyncio``), it is the caller that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest

from bench import heavy
from bench.conftest import available_gib
from bench.heavy import TRUE, Caller
from bench.ratios import Measure

LIBRARIES = {"own": "asyncio", "ours": "errand_boy.asyncio"}
LIVE = 200
TICK = 0.005  # seconds

Create = Callable[..., Awaitable[Any]]

ASYNCIO_AT_MOST = 1 / 1.3
UVLOOP_AT_MOST = {"small": 1 / 5, "large": 1 / 150}


# -- the caller --


async def start(create: Create) -> None:
    process = await create(*TRUE)
    await process.wait()


async def nanoseconds(create: Create, at_once: int) -> int:
    """Return how long each of this many starts took."""
    before = time.perf_counter_ns()
    if at_once == 1:
        await start(create)
    else:
        await asyncio.gather(*(start(create) for _ in range(at_once)))
    return (time.perf_counter_ns() - before) // at_once


async def lateness(create: Create) -> list[int]:
    """Return how late (ns) each tick was, while commands were started and ran for a second."""
    late = []

    async def tick() -> None:
        while True:
            due = time.perf_counter_ns() + int(TICK * 1e9)
            await asyncio.sleep(TICK)
            late.append(time.perf_counter_ns() - due)

    async def one() -> None:
        process = await create("sleep", "1")
        await process.wait()

    ticker = asyncio.ensure_future(tick())
    await asyncio.gather(*(one() for _ in range(LIVE)))
    ticker.cancel()
    return late


def serve(resident: float) -> None:
    loops: dict[str, asyncio.AbstractEventLoop] = {}

    def answer(loop_name: str, what: str, count: int) -> list[int]:
        kind, at_once = what.split("-")
        if loop_name not in loops:
            loops[loop_name] = importlib.import_module(loop_name).new_event_loop()
        loop = loops[loop_name]
        create = importlib.import_module(LIBRARIES[kind]).create_subprocess_exec
        if at_once == "ticks":
            return loop.run_until_complete(lateness(create))
        return [loop.run_until_complete(nanoseconds(create, int(at_once))) for _ in range(count)]

    heavy.serve(resident, 0, answer)


# -- the measurements --


@pytest.fixture(scope="module")
def loop_caller(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Caller]]:
    resident: float = request.config.getoption("--resident")
    callers: dict[str, Caller] = {}

    def caller(weight: str) -> Caller:
        if weight not in callers:
            if weight == "large" and resident + 1 > available_gib():
                pytest.skip(f"{resident:g} GiB are not available")
            size = resident if weight == "large" else 0
            command = [sys.executable, "-m", "bench.test_asyncio", f"--resident={size}"]
            callers[weight] = Caller(command)
        return callers[weight]

    yield caller
    for started in callers.values():
        started.close()


@pytest.mark.parametrize("at_once", [1, 32])
@pytest.mark.parametrize("weight", ["small", "large"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_start(
    loop_caller: Callable[[str], Caller],
    compare: Callable[..., None],
    loop: str,
    weight: str,
    at_once: int,
) -> None:
    pytest.importorskip(loop)

    def measure(kind: str) -> Measure:
        return partial(loop_caller(weight).ask, loop, f"{kind}-{at_once}")

    compare(
        measure("ours"),
        measure("own"),
        name=f"errand_boy over {loop}, {weight}, create_subprocess_exec, {at_once} at once",
        at_most=ASYNCIO_AT_MOST if loop == "asyncio" else UVLOOP_AT_MOST[weight],
    )


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_lateness(
    loop_caller: Callable[[str], Caller], note: Callable[[str], None], loop: str
) -> None:
    pytest.importorskip(loop)
    for kind in "own", "ours":
        late = loop_caller("small").ask(loop, f"{kind}-ticks", 1)
        percentile = statistics.quantiles(late, n=100)[98] / 1e6
        name = "errand_boy" if kind == "ours" else loop
        note(
            f"a tick each {TICK * 1e3:g} ms on {loop}, {LIVE} commands of a second by {name}: "
            f"p99 {percentile:.1f} ms late, at most {max(late) / 1e6:.1f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resident", type=float, default=0, metavar="GIB")
    serve(parser.parse_args().resident)
