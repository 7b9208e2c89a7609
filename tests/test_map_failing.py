"""Failures in a map: retries, early ends, time-outs."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from daemon import started_daemon

import errand_boy
import errand_boy.asyncio
from errand_boy import Retries
from errand_boy._map.policy import Halt, Median, Timeout

Map = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_helper_left() -> Iterator[None]:
    yield
    errand_boy.stop()


@pytest.fixture(params=["helper", "daemon", "asyncio"])
def run_map(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Map]:
    """errand_boy.map, the map of a daemon's client, and asyncio's as a list."""
    if request.param == "helper":
        yield errand_boy.map
    elif request.param == "daemon":
        with started_daemon(tmp_path) as daemon:
            client = errand_boy.connect(daemon.path)
            yield client.map
            client.close()
    else:

        async def collect(commands: Any, options: dict[str, Any]) -> list[errand_boy.Result]:
            return [result async for result in errand_boy.asyncio.map(commands, **options)]

        yield lambda commands, **options: iter(asyncio.run(collect(commands, options)))


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def counting(path: Path, succeeds_at: int) -> list[str]:
    """A command that fails until it has been run several times."""
    return shell(f"echo x >> {path}; echo run; [ $(wc -l < {path}) -ge {succeeds_at} ]")


def runs(path: Path) -> int:
    return path.read_text().count("x") if path.exists() else 0


# -- retries --


@pytest.mark.slow
def test_a_command_that_fails_is_run_again(run_map: Map, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abcd"]
    commands = [counting(path, at) for path, at in zip(paths, (1, 2, 3, 9), strict=True)]
    results = list(run_map(commands, retries=2))
    assert [result.runs for result in results] == [1, 2, 3, 3] == [runs(path) for path in paths]
    assert [result.returncode for result in results] == [0, 0, 0, 1]
    assert {result.stdout for result in results} == {b"run\n"}  # of the last run
    assert [result.index for result in results] == [0, 1, 2, 3]


def test_no_retries_is_the_default(run_map: Map, tmp_path: Path) -> None:
    [result] = run_map([counting(tmp_path / "x", 2)])
    assert (result.runs, result.returncode, runs(tmp_path / "x")) == (1, 1, 1)


def test_retries_of_one_command(run_map: Map, tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    commands = [{"args": counting(first, 9), "retries": 4}, counting(second, 9)]
    assert [result.runs for result in run_map(commands, retries=1)] == [5, 2]


@pytest.mark.slow
def test_failed_starts_and_timeouts_run_again(run_map: Map, tmp_path: Path) -> None:
    absent, slow = tmp_path / "absent", {"args": ["sleep", "1000"], "timeout": 0.05}
    missing, late = run_map([[str(absent)], slow], retries=2)
    assert (missing.runs, missing.returncode) == (3, 127)
    assert isinstance(missing.error, FileNotFoundError)
    assert late.runs == 3
    assert isinstance(late.error, subprocess.TimeoutExpired)


@pytest.mark.slow
def test_input_is_there_for_each_run(run_map: Map, tmp_path: Path) -> None:
    path = tmp_path / "x"
    command = shell(f"echo x >> {path}; cat; [ $(wc -l < {path}) -ge 3 ]")
    [result] = run_map([command], input=b"data", retries=5)
    assert (result.stdout, result.runs) == (b"data", 3)


@pytest.mark.slow
def test_delays_between_runs(run_map: Map, tmp_path: Path) -> None:
    policy = Retries(2, delay=0.05, factor=3)
    before = time.monotonic()
    [result] = run_map([counting(tmp_path / "x", 9)], retries=policy)
    assert result.runs == 3
    assert time.monotonic() - before >= 0.05 + 0.15


@pytest.mark.slow
def test_others_run_during_a_delay(tmp_path: Path) -> None:
    commands = [counting(tmp_path / "x", 2), ["true"], ["true"]]
    policy = Retries(1, delay=2)
    results = errand_boy.map(commands, max_workers=1, ordered=False, retries=policy)
    assert [result.index for result in results] == [1, 2, 0]


def test_policy_chooses_which_failures_run_again(run_map: Map) -> None:
    policy = Retries(3, only_if=lambda result: result.returncode == 75)
    results = run_map([shell("exit 75"), shell("exit 1")], retries=policy)
    assert [result.runs for result in results] == [4, 1]


def test_delays() -> None:
    result: Any = None
    policy = Retries(6, delay=1, factor=2, longest=10)
    assert [policy.delay(run, result) for run in range(1, 8)] == [1, 2, 4, 8, 10, 10, None]
    random = Retries(float("inf"), delay=8, jitter=0.5, longest=100)
    assert all(4 <= (random.delay(1, result) or 0) <= 8 for _ in range(100))
    assert random.delay(10**6, result) is not None
    assert Retries(0).delay(1, result) is None


@pytest.mark.parametrize("retries", [-1, "3", Ellipsis])
def test_bad_retries(retries: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"retries|negative"):
        next(errand_boy.map([["true"]], retries=retries))


def test_closing_during_a_delay() -> None:
    results = errand_boy.map([["false"], ["true"]], retries=Retries(1, delay=1000), ordered=False)
    assert next(results).index == 1
    results.close()


# -- halting --


def test_halt_soon(run_map: Map, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    waits = shell(f"read x < {fifo}; exit 5")
    commands = [["true"], waits, shell(f"echo > {fifo}; exit 3"), *[["true"]] * 100]
    results = list(run_map(commands, max_workers=2, halt="soon,fail=1"))
    codes = [result.returncode for result in results]
    assert codes[:3] == [0, 5, 3]  # what ran has come to its end
    assert len(codes) < len(commands)


@pytest.mark.slow
def test_halt_now(run_map: Map, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    sleeps = shell(f"echo $$ >> {pids}; exec sleep 1000")
    fails = shell(f"until [ -s {pids} ]; do sleep 0.01; done; exit 7")
    results = list(run_map([sleeps, fails, ["true"]], max_workers=2, halt="now,fail=1"))
    assert [(result.index, result.returncode) for result in results] == [(1, 7)]
    pid = int(pids.read_text())
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "count"), [("success=2", 4), ("done=3", 3), ("done=50%", 5)])
def test_ends_that_count_for_a_halt(run_map: Map, policy: str, count: int) -> None:
    commands = [["false"], ["true"]] * 5
    results = list(run_map(commands, max_workers=1, halt=f"soon,{policy}"))
    assert len(results) == count


@pytest.mark.slow
def test_retried_failures_do_not_halt(run_map: Map, tmp_path: Path) -> None:
    commands = [counting(tmp_path / str(n), 2) for n in range(5)]
    assert len(list(run_map(commands, retries=1, halt="now,fail=1"))) == 5


def test_halt_ends_the_wait_for_the_next_run(run_map: Map, tmp_path: Path) -> None:
    commands = [{"args": ["false"], "retries": Retries(1, delay=1000)}, ["sh", "-c", "exit 3"]]
    results = list(run_map(commands, max_workers=1, halt="soon,fail=1"))
    assert [(result.returncode, result.runs) for result in results] == [(1, 1), (3, 1)]


@pytest.mark.slow
def test_halt_leaves_a_helper_that_works(run_map: Map) -> None:
    for _ in range(5):
        list(run_map([["sleep", "1000"], ["false"]], max_workers=2, halt="now,fail=1"))
        assert [result.returncode for result in run_map([["true"]] * 3)] == [0, 0, 0]


@pytest.mark.parametrize(
    "policy", ["", "fail=1", "soon,fail=0", "now,fail=101%", "later,fail=1", 1]
)
def test_bad_halt(policy: Any) -> None:
    with pytest.raises(ValueError, match="halt="):
        errand_boy.map([], halt=policy)


def test_share_of_an_unknown_number() -> None:
    with pytest.raises(ValueError, match="have a length"):
        errand_boy.map(iter([]), halt="now,done=50%")


def result_of(code: int) -> errand_boy.Result:
    return errand_boy.Result(["x"], code)


@pytest.mark.parametrize(("total", "expected"), [(None, 4), (20, 5), (10, None)])
def test_shares(total: int | None, expected: int | None) -> None:
    halt = Halt("soon,fail=25%" if total == 20 else "soon,fail=70%")
    halt.total = total
    codes = [0, 1, 1, 1, 1, 1, 1] if total != 20 else [1, 1, 1, 1, 1, 1, 1]
    found = None
    for number, code in enumerate(codes, 1):
        halt.count(result_of(code))
        if halt.due and found is None:
            found = number
    assert found == expected


# -- a share of the median --


@pytest.mark.slow
def test_timeout_of_a_share_of_the_median(run_map: Map) -> None:
    commands = [["sleep", "0.1"]] * 4 + [["sleep", "1000"]]
    results = list(run_map(commands, max_workers=2, timeout="2000%"))
    late = results.pop()
    assert isinstance(late.error, subprocess.TimeoutExpired)
    assert late.error.timeout >= 2
    assert [result.returncode for result in results] == [0] * 4


@pytest.mark.slow
def test_commands_that_began_before_there_was_a_median_end_too(run_map: Map) -> None:
    commands = [["sleep", "1000"], ["sleep", "1000"], *[["sleep", "0.1"]] * 3]
    results = list(run_map(commands, max_workers=3, timeout="2000%"))
    assert [type(result.error) for result in results[:2]] == [subprocess.TimeoutExpired] * 2
    assert [result.error for result in results[2:]] == [None] * 3


def test_a_timeout_of_its_own_comes_first(run_map: Map) -> None:
    commands = [{"args": ["sleep", "1000"], "timeout": 0.05}]
    [result] = run_map(commands, timeout="200%")
    assert isinstance(result.error, subprocess.TimeoutExpired)
    assert result.error.timeout == 0.05


@pytest.mark.parametrize("timeout", ["", "200", "-1%", "x%"])
def test_bad_shares(timeout: str) -> None:
    with pytest.raises(ValueError, match="percentage"):
        errand_boy.map([], timeout=timeout)


def test_median() -> None:
    median = Median()
    for value, expected in ((5.0, None), (1.0, None), (3.0, 3.0)):
        median.add(value)
        assert median.get() == expected
    for _ in range(5000):  # those of long ago count no more
        median.add(7.0)
    assert median.get() == 7.0
    share = Timeout("150%")
    for _ in range(3):
        share.count(2.0)
    assert share.seconds == 3.0


# -- slots --


@pytest.mark.slow
def test_slots_are_of_those_that_run_at_the_same_time(run_map: Map) -> None:
    results = list(run_map([["true"]] * 50, max_workers=3))
    assert {result.slot for result in results} <= {1, 2, 3}
    assert {result.slot for result in run_map([["true"]] * 5, max_workers=1)} == {1}


# -- commands that results lead to --


def test_iterator_that_grows_by_what_came_out() -> None:
    todo = deque([["echo", "1"]])
    seen = []

    def commands() -> Iterator[list[str] | None]:
        while True:
            yield todo.popleft() if todo else None

    for result in errand_boy.map(commands(), ordered=False, text=True):
        number = int(result.stdout)
        seen.append(number)
        if number < 64:
            todo.extend([["echo", str(2 * number)], ["echo", str(2 * number + 1)]])
    assert sorted(seen) == list(range(1, 128))


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("max_workers", [1, 3, 50])
def test_build_graph(ordered: bool, max_workers: int) -> None:
    needs = {n: {n // 2, n // 3} - {n, 0} for n in range(1, 100)}
    done: set[int] = set()
    given: set[int] = set()

    def commands() -> Iterator[list[str] | None]:
        while len(given) < len(needs):
            free = [n for n in needs if n not in given and needs[n] <= done]
            given.update(free)
            yield from (["echo", str(n)] for n in free)
            if not free:
                yield None

    built = []
    for result in errand_boy.map(commands(), ordered=ordered, max_workers=max_workers):
        number = int(result.stdout)
        assert needs[number] <= done
        done.add(number)
        built.append(number)
    assert sorted(built) == list(needs)


def test_iterator_that_yields_only_none_ends(run_map: Map) -> None:
    assert list(run_map(iter(lambda: None, 1))) == []
    assert [result.returncode for result in run_map([["true"], None, ["true"], None])] == [0, 0]


@pytest.mark.slow
def test_graph_with_retries_and_delays(tmp_path: Path) -> None:
    todo = deque([counting(tmp_path / "1", 2)])
    led = []

    def commands() -> Iterator[list[str] | None]:
        while True:
            yield todo.popleft() if todo else None

    for result in errand_boy.map(commands(), retries=Retries(1, delay=0.05), ordered=False):
        led.append(result.runs)
        if len(led) < 4:
            todo.append(counting(tmp_path / f"{len(led) + 1}", 2))
    assert led == [2, 2, 2, 2]


def test_async_graph() -> None:
    async def main() -> list[int]:
        todo, seen = deque([["echo", "1"]]), []

        def commands() -> Iterator[list[str] | None]:
            while True:
                yield todo.popleft() if todo else None

        async for result in errand_boy.asyncio.map(commands(), ordered=False):
            number = int(result.stdout)
            seen.append(number)
            await asyncio.sleep(0)
            if number < 16:
                todo.extend([["echo", str(2 * number)], ["echo", str(2 * number + 1)]])
        return sorted(seen)

    assert asyncio.run(main()) == list(range(1, 32))
