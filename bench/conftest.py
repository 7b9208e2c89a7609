from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import throughput
from bench.heavy import Caller, heavy_caller
from bench.ratios import (
    CPUS,
    Comparison,
    Measure,
    batch_size,
    pairs_in_time,
    table,
    timed,
    typical_nanoseconds,
)

COMPARISONS = pytest.StashKey[list[Comparison]]()
NOTES = pytest.StashKey[list[str]]()

measured_seconds = 0.0


def callers_clock() -> float:
    """pytest-benchmark's timer: the time that callers report, without the messages to them."""
    return measured_seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("errand-boy callers")
    group.addoption("--resident", type=float, default=4, metavar="GIB")
    group.addoption("--descriptors", type=int, default=15_000, metavar="N")
    group.addoption("--pairs", type=int, default=250, metavar="N")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARISONS] = []
    config.stash[NOTES] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=callers_clock))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    comparisons: list[Comparison] = config.stash[COMPARISONS]
    if comparisons:
        terminalreporter.section("ratios (A over B, in turns; medians)")
        for line in table(comparisons):
            terminalreporter.write_line(line)
    for line in config.stash[NOTES]:
        terminalreporter.write_line(line)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Measures A and B in turns, and keeps the comparison for the table and for the record."""

    def compare(a: Measure, b: Measure, **comparison_fields: Any) -> None:
        comparison = Comparison(**comparison_fields)
        a_typical, b_typical = typical_nanoseconds(a), typical_nanoseconds(b)
        a_size, b_size = batch_size(a_typical), batch_size(b_typical)
        pair = a_typical * a_size + b_typical * b_size
        pairs = pairs_in_time(pair, request.config.getoption("--pairs"))

        def measure_a() -> None:
            global measured_seconds
            median = statistics.median(a(a_size))
            comparison.a.append(median)
            measured_seconds += median / 1e9

        def measure_b() -> None:
            comparison.b.append(statistics.median(b(b_size)))

        benchmark.pedantic(measure_a, setup=measure_b, rounds=pairs)
        benchmark.extra_info.update(comparison.record())
        request.config.stash[COMPARISONS].append(comparison)

    return compare


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line below the table."""
    return request.config.stash[NOTES].append


@pytest.fixture(scope="session")
def caller(request: pytest.FixtureRequest) -> Iterator[Callable[..., Caller]]:
    """Callers by weight; two of one weight are told apart by a name."""
    resident: float = request.config.getoption("--resident")
    descriptors: int = request.config.getoption("--descriptors")
    callers: dict[tuple[str, str], Caller] = {}

    def caller(weight: str, name: str = "", **variables: str) -> Caller:
        if (weight, name) not in callers:
            callers[weight, name] = start(weight, variables)
        return callers[weight, name]

    def start(weight: str, variables: dict[str, str]) -> Caller:
        if weight == "large":
            if resident + 1 > available_gib():
                pytest.skip(f"{resident:g} GiB are not available")
            return heavy_caller(resident=resident, variables=variables)
        if weight == "crowded":
            if not allow_descriptors(descriptors + 100):
                pytest.skip(f"{descriptors} open descriptors are not allowed")
            return heavy_caller(descriptors=descriptors, variables=variables)
        return heavy_caller(variables=variables)

    yield caller
    for started in callers.values():
        started.close()


@pytest.fixture(scope="session")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return throughput.compile_c_loop(str(tmp_path_factory.mktemp("cloop")))


@pytest.fixture(scope="session")
def c_loop(c_program: str) -> Iterator[Measure]:
    caller = Caller([c_program])
    yield partial(caller.ask, "loop", "c")
    caller.close()


@pytest.fixture(scope="session")
def c_limit(c_program: str) -> Iterator[Callable[[int], Measure]]:
    """C loops of vfork, exec and wait, one for each CPU."""
    loops = [Caller([c_program]) for _ in range(CPUS)]

    def act(count: int) -> None:
        throughput.c_seconds(loops, count)

    yield lambda batch: timed(act, batch)
    for loop in loops:
        loop.close()


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / (1 << 20)
    raise LookupError("/proc/meminfo without MemAvailable")


def allow_descriptors(count: int) -> bool:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count > hard:
        return False
    if count > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    return True
