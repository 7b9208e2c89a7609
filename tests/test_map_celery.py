"""errand_boy.map and `errand-boy map` on Celery's workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, script_environment, until

pytest.importorskip("celery", reason="Celery is not installed")

from celery.exceptions import WorkerLostError
from test_celery import LEADS_TWO, Group, StartWorker, app, broker, no_helper_left, start_worker

import errand_boy
import errand_boy.asyncio
from errand_boy._map import celery_runner
from errand_boy.celery import Cluster

pytestmark = pytest.mark.slow

# Those that pytest finds by their names here.
__all__ = ["app", "broker", "no_helper_left", "start_worker"]


def command_line(broker: str, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = script_environment() | {"CELERY_TEST_BROKER": broker}
    environment["PYTHONPATH"] += f":{Path(__file__).parent}"
    map_on = [sys.executable, "-m", "errand_boy", "map", "--celery", "celery_app"]
    return [*map_on, *words], environment


def run_map(broker: str, *words: str) -> subprocess.CompletedProcess[str]:
    command, environment = command_line(broker, *words)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE
    )


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_results_are_as_on_this_machine(
    app: Any, start_worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    start_worker(pool)
    data = bytes(range(256))
    commands: list[Any] = [
        ["printf", "a\\nb"],
        {"args": ["cat"], "input": data},
        {"args": "echo $A >&2; pwd; exit 3", "shell": True, "env": {"A": "é"}, "cwd": tmp_path},
        ["no such program"],
        [b"printf", b"%s", b"\xff"],
        ["sh", "-c", "kill -9 $$"],
        {"args": ["sleep", "1000"], "timeout": 0.3},
        {"args": ["yes"], "limits": {"output": 10}},
    ]
    told = []
    for results in (errand_boy.map(commands), errand_boy.map(commands, on=app)):
        told.append(
            [
                (r.args, r.returncode, r.stdout, r.stderr, str(r.error), r.cause, r.index, r.runs)
                for r in results
            ]
        )
    here, there = told
    assert there == here
    for result in errand_boy.map([["true"]], on=app):
        assert result.host and result.rusage and result.peak_memory
        assert result.rusage.ru_maxrss * 1024 == result.peak_memory
        assert abs(result.started - time.time()) < 100


def test_text_and_order(app: Any, start_worker: StartWorker) -> None:
    start_worker("threads")
    commands = [{"args": ["cat"], "input": f"é{i}\r\n"} for i in range(20)]
    results = list(errand_boy.map(commands, on=app, encoding="utf-8", max_workers=3))
    assert [result.stdout for result in results] == [f"é{i}\n" for i in range(20)]
    assert {result.slot for result in results} <= {1, 2, 3}
    (wrong,) = errand_boy.map([["printf", "\\377"]], on=app, encoding="utf-8")
    assert isinstance(wrong.error, UnicodeError)
    (short,) = errand_boy.map([["echo", "12345"]], on=app, max_output=3)
    assert (short.stdout, short.truncated) == (b"123", True)


def test_options_that_are_not_possible(app: Any) -> None:
    with pytest.raises(ValueError, match="captured"):
        errand_boy.map([["true"]], on=app, capture_output=False)
    with pytest.raises(TypeError, match="Celery app"):
        errand_boy.map([["true"]], on="celery_app")
    (result,) = errand_boy.map([["true"]], on=app, user="nobody")
    assert "user is not possible" in str(result.error)
    (result,) = errand_boy.map([{"args": ["true"], "env": {"A": 1}}], on=app)
    assert isinstance(result.error, TypeError)


def test_retries_and_halt(app: Any, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker("threads")
    third = 'echo x >> "$0"; test "$(wc -l < "$0")" -eq 3'
    (result,) = errand_boy.map([["sh", "-c", third, str(tmp_path / "n")]], on=app, retries=5)
    assert (result.returncode, result.runs) == (0, 3)
    assert (tmp_path / "n").read_text() == "x\n" * 3
    # Tasks that have not begun are revoked; running ones end by themselves.
    wait = 'touch "$0"; while ! test -e "$1"; do sleep 0.05; done; exit $2'
    at_work = [tmp_path / "fails", tmp_path / "runs"]
    fail, go = tmp_path / "fail", str(tmp_path / "go")

    def commands() -> Iterator[list[str]]:
        yield ["sh", "-c", wait, str(at_work[0]), str(fail), "1"]
        yield ["sh", "-c", wait, str(at_work[1]), go, "0"]
        until(lambda: all(path.exists() for path in at_work), "the start of both")
        for number in range(20):
            yield ["sh", "-c", wait, str(tmp_path / f"late{number}"), go, "0"]
        fail.touch()

    ended: list[tuple[int, int]] = []
    control = app.control.inspect()
    for result in errand_boy.map(commands(), on=app, halt="soon,fail=1", ordered=False):
        if not ended:
            until(lambda: any((control.revoked() or {}).values()), "the word of the halt")
            Path(go).touch()
        ended.append((result.index, result.returncode))
    assert ended[0] == (0, 1) and (1, 0) in ended
    assert len(ended) <= 3 and len(list(tmp_path.glob("late*"))) <= 1
    # `now` ends them.
    fails = ["sh", "-c", 'while ! test -e "$0"; do sleep 0.05; done; exit 1', str(tmp_path / "p")]
    two = [["sh", "-c", LEADS_TWO, str(tmp_path / "p")], fails]
    results = list(errand_boy.map(two, on=app, halt="now,fail=1", ordered=False))
    assert [result.index for result in results] == [1]
    Group(tmp_path / "p").await_end()


def test_closing_ends_what_runs(app: Any, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker("threads")
    slow = ["sh", "-c", LEADS_TWO, str(tmp_path / "pids")]
    results = errand_boy.map([slow, ["true"]], on=app, ordered=False)
    assert next(results).index == 1
    group = Group(tmp_path / "pids")
    results.close()
    group.await_end()


def test_other_drivers(app: Any, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker("threads")

    async def main() -> list[int]:
        results = errand_boy.asyncio.map([["sh", "-c", f"exit {i}"] for i in range(5)], on=app)
        return [result.returncode async for result in results]

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]
    with errand_boy.Executor(on=app) as executor:
        assert executor.submit(["echo", "a"]).result(PATIENCE).stdout == b"a\n"
        slow = executor.submit(["sh", "-c", LEADS_TWO, str(tmp_path / "pids")])
        group = Group(tmp_path / "pids")
        assert slow.cancel()
        group.await_end()


def test_a_build_is_a_loop(app: Any, start_worker: StartWorker) -> None:
    start_worker("threads")
    done: list[int] = []

    def commands() -> Any:
        for i in range(5):
            while len(done) < i:
                yield None
            yield ["echo", str(i)]

    for result in errand_boy.map(commands(), on=Cluster(app, interval=0.02), check=True):
        done.append(int(result.stdout))
    assert done == [0, 1, 2, 3, 4]


def test_result_says_that_a_command_ran_again(
    app: Any, start_worker: StartWorker, tmp_path: Path
) -> None:
    first = start_worker("prefork", "first", concurrency=1)
    command = 'test -e "$1" && echo again && exit; touch "$1"; ' + LEADS_TWO
    words = ["sh", "-c", command, str(tmp_path / "pids"), str(tmp_path / "been")]
    with errand_boy.Executor(on=Cluster(app, interval=0.02)) as executor:
        future = executor.submit(words)
        Group(tmp_path / "pids")
        start_worker("threads", "second")
        # It is the worker itself who gives the task back.
        for process in first.pool_processes():
            process.kill()
        again = future.result(PATIENCE)
    first.kill()  # asked to end, Celery 5.7 waits for its killed process for ever
    assert (again.stdout, again.runs) == (b"again\n", 2)


def test_result_says_that_a_worker_was_lost(
    app: Any,
    start_worker: StartWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(celery_runner, "_CHECK", 0.5)
    monkeypatch.setenv("CELERY_TEST_EARLY", "yes")  # acknowledged before they run
    app.conf.task_acks_late = False
    worker = start_worker("threads")
    count = 'echo x >> "$1"; exec sh -c "$2" "$0"'
    words = ["sh", "-c", count, str(tmp_path / "pids"), str(tmp_path / "count"), LEADS_TWO]
    results = errand_boy.map([words, ["true"]], on=app, ordered=False)
    assert next(results).index == 1
    group = Group(tmp_path / "pids")
    # Its helper ends the command when it notices.
    (helper,) = worker.helpers()
    helper.suspend()
    worker.kill()
    helper.resume()
    group.await_end()
    start_worker("threads", "two")
    (lost,) = results
    assert isinstance(lost.error, WorkerLostError) and "disappeared" in str(lost.error)
    assert (lost.returncode, lost.failed) == (-signal.SIGKILL, True)
    assert (tmp_path / "count").read_text() == "x\n"


def test_long_command_does_not_count_as_lost(
    app: Any, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checks = 0
    enough = tmp_path / "enough"
    monkeypatch.setattr(celery_runner, "_CHECK", 0.1)
    monkeypatch.setattr(celery_runner, "_MOST_SILENCES", 1)
    monkeypatch.setattr(
        celery_runner, "_ANSWER", PATIENCE
    )  # the worker may answer late, at high load
    app.conf.task_acks_late = False
    start_worker("threads")
    look = celery_runner.Tasks._look_for_lost

    def counted(tasks: celery_runner.Tasks, now: float) -> None:
        nonlocal checks
        look(tasks, now)
        checks += 1
        if checks == 4:
            enough.touch()

    monkeypatch.setattr(celery_runner.Tasks, "_look_for_lost", counted)
    script = 'until [ -e "$0" ]; do sleep 0.1; done'
    (result,) = errand_boy.map([["/bin/sh", "-c", script, enough]], on=app)
    assert result.returncode == 0


# -- the command line --


def test_command_line(app: Any, broker: str, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker("threads")
    log = tmp_path / "log"
    words = ("-k", "--joblog", str(log), "--tag", "--retries", "2")
    done = run_map(broker, *words, "sh", "-c", "echo {}; exit {}", ":::", "0", "3", "0")
    assert (done.stdout, done.returncode) == ("0\t0\n3\t3\n0\t0\n", 1), done.stderr
    rows = [line.split("\t") for line in log.read_text().splitlines()[1:]]
    assert sorted((row[0], row[6]) for row in rows) == [("1", "0"), ("2", "3"), ("3", "0")]
    assert all(row[1] == os.uname().nodename for row in rows)
    assert all(abs(float(row[2]) - time.time()) < 1000 for row in rows)
    # What the log has is not run again.
    more = ("--resume", "echo", "{}", ":::", "0", "3", "0", "new")
    done = run_map(broker, "--joblog", str(log), *more)
    assert (done.stdout, done.returncode) == ("new\n", 0), done.stderr


def test_interrupt(app: Any, broker: str, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker("threads")
    words = ["sh", "-c", LEADS_TWO, str(tmp_path / "pids"), ":::", "x"]
    command, environment = command_line(broker, *words)
    with subprocess.Popen(command, env=environment) as process:
        group = Group(tmp_path / "pids")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == -signal.SIGINT
    group.await_end()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--ungroup", "true"], "--ungroup can't"),
        (["--socket", "/x", "true"], "not both"),
        (["--memsuspend", "1G", "true"], "--memsuspend"),
        (["--celery", "json", "true"], "json"),
        (["--celery", "nothing_of_this_name", "true"], "nothing_of_this_name"),
    ],
)
def test_wrong_arguments(tmp_path: Path, words: list[str], text: str) -> None:
    done = run_map(str(tmp_path), *words, ":::", "1")
    assert done.returncode == 2 and text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_broker() -> None:
    done = run_map("redis+socket:///nowhere/redis.sock", "echo", ":::", "1")
    assert done.returncode == 125 and "broker" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
