"""run_command and map on real workers, with brokers that need no installation, and with Redis."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    PATIENCE,
    find_program,
    has_ended,
    script_environment,
    until,
    with_enough_time,
)

pytest.importorskip("celery", reason="Celery is not installed")

from celery import chord
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery_app import make_app
from kombu.message import Message

import errand_boy
from errand_boy.celery import map as cluster_map, run_command

pytestmark = pytest.mark.slow

POOLS = ("prefork", "threads", "gevent", "eventlet")
COMMANDS = 1000
LEADS_TWO = 'sleep 1000 & echo "$$ $!" > "$0.new"; mv "$0.new" "$0"; wait'


@pytest.fixture(autouse=True)
def no_helper_left(nothing_left_behind: None) -> Iterator[None]:
    yield
    errand_boy.stop()


@pytest.fixture(params=["filesystem", "redis"])
def broker(request: pytest.FixtureRequest, tmp_path: Path, public_dir: Path) -> Iterator[str]:
    if request.param == "filesystem":
        yield str(tmp_path)
        return
    server_path = find_program("redis-server")
    pytest.importorskip("redis", reason="Redis's client is not installed")
    path = public_dir / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(public_dir)]
    with subprocess.Popen([server_path, *options], stdout=subprocess.DEVNULL) as server:
        try:
            until(path.exists, "the start of Redis")
            yield f"redis+socket://{path}"
        finally:
            server.terminate()


@pytest.fixture
def app(broker: str) -> Iterator[Any]:
    app = make_app(broker)
    yield app
    app.close()


class Worker:
    def __init__(self, process: subprocess.Popen[bytes], name: str, log: Path) -> None:
        self.process = process
        self.name = name
        self.log = log

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return " ready." in self.log.read_text()

        until(ready, "the start of a worker")

    def kill(self) -> None:
        processes = self.pool_processes()
        self.process.kill()
        self.process.wait()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def pool_processes(self) -> list[psutil.Process]:
        return [process for process in self._children() if not _is_helper(process)]

    def helpers(self) -> list[psutil.Process]:
        """Return those of the worker itself, in a pool of threads."""
        return [process for process in self._children() if _is_helper(process)]

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


def _is_helper(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "errand-boy-help"
    return False


StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker(broker: str, tmp_path: Path) -> Iterator[StartWorker]:
    workers: list[Worker] = []

    def start(pool: str, name: str = "one", concurrency: int = 2) -> Worker:
        if pool in ("gevent", "eventlet"):
            pytest.importorskip(pool, reason=f"{pool} is not installed")
        environment = script_environment()
        environment["PYTHONPATH"] += f":{Path(__file__).parent}"
        environment["CELERY_TEST_BROKER"] = broker
        environment["EVENTLET_NO_GREENDNS"] = "yes"
        arguments = ["--pool", pool, "--concurrency", str(concurrency), "-n", f"{name}@host"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO"]
        command = [sys.executable, "-m", "celery", "-A", "celery_app", "worker"]
        log = tmp_path / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *arguments, *quiet],
                env=environment, cwd=tmp_path, stdout=output, stderr=output,
            )  # fmt: skip
        worker = Worker(process, f"{name}@host", log)
        workers.append(worker)
        worker.wait_ready()
        return worker

    yield start
    for worker in workers:
        if worker.process.poll() is None:
            await_idle(broker, worker.name)
        worker.process.terminate()
    for worker in workers:
        try:
            worker.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            worker.kill()
            print(worker.log.read_text())
            raise


def await_idle(broker: str, name: str) -> None:
    """Wait until a worker has read its last result, if it answers.

    If it has to end earlier, Celery 5.7 takes the rest for a complete result, and waits for ever.
    """
    app = make_app(broker)
    for _ in range(100):
        inspect = app.control.inspect([name], limit=1)
        if not (inspect.active() or {}).get(name):
            break
    app.close()


class Group:
    """The two processes of LEADS_TWO."""

    def __init__(self, path: Path) -> None:
        until(path.exists, "the start of a command")
        self.pids = [int(word) for word in path.read_text().split()]
        path.unlink()
        self._fds = [os.pidfd_open(pid) for pid in self.pids]

    def await_end(self) -> None:
        for fd in self._fds:
            ended, _, _ = select.select([fd], [], [], PATIENCE)
            os.close(fd)
            assert ended, "a process of the command's group is left"


def send(app: Any, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return app.signature(run_command.name, args, kwargs).apply_async(**(options or {}))


@pytest.mark.parametrize("pool", POOLS)
def test_a_thousand_commands(app: Any, start_worker: StartWorker, pool: str) -> None:
    # Over Redis, a full worker in one process checks for new tasks once a second.
    start_worker(pool, concurrency=4 if pool == "prefork" else 20)
    commands = [f"echo out {i}; echo err {i} >&2; exit {i % 5}" for i in range(COMMANDS)]
    seen = set()
    for outcome in cluster_map(app, commands, shell=True, within=60):
        i = outcome["index"]
        assert i is not None
        seen.add(i)
        assert outcome["args"] == commands[i]
        assert (outcome["stdout"], outcome["stderr"]) == (f"out {i}\n", f"err {i}\n")
        assert (outcome["returncode"], outcome["error"]) == (i % 5, None)
    assert len(seen) == COMMANDS


@pytest.mark.parametrize("pool", POOLS)
def test_revoke_ends_the_group(
    app: Any, start_worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    start_worker(pool)
    result = send(app, ["sh", "-c", LEADS_TWO, str(tmp_path / "pids")], grace=100)
    group = Group(tmp_path / "pids")
    result.revoke(terminate=True)
    group.await_end()
    until(lambda: result.state == "REVOKED", "the word of a revocation")
    # The worker goes on.
    assert send(app, ["echo", "on"]).get(PATIENCE)["stdout"] == "on\n"


def test_two_threads_acknowledge_once() -> None:
    """They are the main thread after a revocation, and the thread whose command it has ended."""
    threads: list[threading.Thread] = []

    def on_ack(*_: object) -> None:
        threads.append(threading.current_thread())
        if len(threads) == 1:
            second.start()
            second.join(0.2)  # it would be through by then

    headers = {"id": "some", "task": run_command.name}
    message: Any = Message
    request = run_command.Request(
        message(), on_ack, task=run_command, headers=headers, body=((), {}, {}), decoded=True
    )
    second = threading.Thread(target=request.acknowledge)
    request.acknowledge()
    second.join()
    assert threads == [threading.current_thread()]


def _is_over_or_there(result: Any, path: Path) -> bool:
    return path.exists() or bool(result.ready())


def send_with(app: Any, limit: str, path: Path) -> tuple[Any, Group]:
    """Send LEADS_TWO with a time limit, a longer one if it has not begun by then, at high load."""
    for seconds in 1, 15:
        command = ["sh", "-c", LEADS_TWO, str(path)]
        result = send(app, command, grace=100, options={limit: seconds})
        until(partial(_is_over_or_there, result, path), "the start of a command")
        if path.exists():
            break
    return result, Group(path)


@pytest.mark.parametrize("pool", POOLS)
def test_soft_time_limit_ends_the_group(
    app: Any, start_worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    start_worker(pool)
    result, group = send_with(app, "soft_time_limit", tmp_path / "pids")
    group.await_end()
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(PATIENCE)


@pytest.mark.parametrize("pool", POOLS)
def test_hard_time_limit_ends_the_group(
    app: Any, start_worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    start_worker(pool)
    result, group = send_with(app, "time_limit", tmp_path / "pids")
    group.await_end()
    with pytest.raises(TimeLimitExceeded):
        result.get(PATIENCE)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_killed_worker(app: Any, start_worker: StartWorker, tmp_path: Path, pool: str) -> None:
    by_redis = app.conf.broker_url.startswith("redis")
    if not by_redis and pool == "threads":
        pytest.skip("the filesystem broker forgets the tasks of a worker that was killed")
    # One at a time: if the broker gives it the task again before it is killed, the task must wait.
    first = start_worker(pool, "first", concurrency=1)
    # The second time it has been there already.
    command = 'test -e "$1" && echo again && exit; touch "$1"; ' + LEADS_TWO
    result = send(app, ["sh", "-c", command, str(tmp_path / "pids"), str(tmp_path / "been")])
    group = Group(tmp_path / "pids")
    start_worker(pool, "second")
    assert app.control.cancel_consumer(
        "celery", destination=[first.name], reply=True, timeout=PATIENCE, limit=1
    )
    if by_redis:
        first.kill()
    else:  # it is the worker itself who gives the task back
        for process in first.pool_processes():
            process.kill()
    group.await_end()
    if by_redis:
        with app.connection_for_read() as connection:
            # As the workers do once in 100 seconds.
            restore = connection.default_channel.qos.restore_visible
            until(lambda: restore(interval=1) or result.ready(), "the second try")
    outcome = result.get(timeout=PATIENCE)
    if not by_redis:
        first.kill()  # otherwise Celery 5.7 would wait for its killed process for ever
    assert (outcome["stdout"], outcome["worker"]) == ("again\n", "second@host")


def test_prefork_children_have_small_helpers(
    app: Any, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker("prefork", concurrency=4)
    command = 'touch "$0/$$"; while ! test -e "$0/go"; do sleep 0.05; done'
    results = [send(app, ["sh", "-c", command, str(tmp_path / "here")]) for _ in range(4)]
    (tmp_path / "here").mkdir(exist_ok=True)
    processes = worker.pool_processes()
    until(lambda: len(list((tmp_path / "here").iterdir())) == 4, "the start of four commands")
    helpers = [child for process in processes for child in process.children()]
    assert len(helpers) == len(processes) == 4
    for helper in helpers:
        assert _is_helper(helper)
        rollup = Path(f"/proc/{helper.pid}/smaps_rollup").read_text()
        lines = [line.split() for line in rollup.splitlines() if line.startswith("Private_")]
        assert sum(int(line[1]) for line in lines[:2]) <= 160, rollup
    (tmp_path / "here" / "go").touch()
    for result in results:
        assert result.get(timeout=PATIENCE)["returncode"] == 0


def test_map_in_order(app: Any, start_worker: StartWorker) -> None:
    start_worker("threads", "one")
    start_worker("threads", "two")
    commands = [{"args": ["cat"], "input": str(i)} for i in range(20)]
    outcomes = list(cluster_map(app, commands, ordered=True, max_output=1, within=PATIENCE))
    assert [outcome["index"] for outcome in outcomes] == list(range(20))
    assert [outcome["stdout"] for outcome in outcomes] == [str(i)[0] for i in range(20)]
    assert [outcome["truncated"] for outcome in outcomes] == [i > 9 for i in range(20)]


def test_closed_map_ends_what_runs(app: Any, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker("threads")
    slow = ["sh", "-c", LEADS_TWO, str(tmp_path / "pids")]
    outcomes = cluster_map(app, [slow, ["true"]], grace=100, within=PATIENCE)
    assert next(outcomes)["index"] == 1
    group = Group(tmp_path / "pids")
    outcomes.close()  # type: ignore[attr-defined]
    group.await_end()


def test_map_tells_of_failed_tasks(app: Any, start_worker: StartWorker) -> None:
    start_worker("threads")
    commands = [["false"], ["no such program"], ["true"]]
    outcomes = list(cluster_map(app, commands, ordered=True, check=True, within=PATIENCE))
    assert [outcome["returncode"] for outcome in outcomes] == [None, None, 0]
    errors = [outcome["error"] or "" for outcome in outcomes]
    assert "CalledProcessError" in errors[0] and "FileNotFoundError" in errors[1]


def test_chord(app: Any, start_worker: StartWorker) -> None:
    start_worker("threads")
    echoes = [app.signature(run_command.name, (["echo", str(i)],)) for i in range(5)]
    # The callback's first argument is the list of the outcomes.
    total = app.signature("celery_app.total")
    result = chord(echoes, app=app)(total)
    assert result.get(timeout=PATIENCE) == 10


def test_retries_until_success(app: Any, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker("threads")
    command = 'echo x >> "$0"; test "$(wc -l < "$0")" -eq 3'
    arguments = ["sh", "-c", command, str(tmp_path / "count")]
    assert send(app, arguments, retries=5, retry_delay=0.01).get(PATIENCE)["returncode"] == 0
    assert (tmp_path / "count").read_text() == "x\n" * 3


# -- what needs no worker --


def test_outcome() -> None:
    outcome = run_command("echo out; echo err >&2; exit 3", shell=True)
    assert (outcome["stdout"], outcome["stderr"]) == ("out\n", "err\n")
    assert (outcome["returncode"], outcome["error"]) == (3, None)
    assert outcome["rusage"]["ru_maxrss"] > 0  # type: ignore[index]
    assert outcome["duration"] > 0
    assert outcome["host"] == socket.gethostname()
    assert json.loads(json.dumps(outcome)) == outcome


def test_input_larger_than_the_window() -> None:
    text = "0123456789abcde\n" * 50_000
    outcome = run_command(["cat"], input=text, max_output=1 << 30)
    assert outcome["stdout"] == text


def test_input_that_is_not_read() -> None:
    assert run_command(["true"], input="x" * 1_000_000)["returncode"] == 0


def test_environment_and_directory(tmp_path: Path) -> None:
    outcome = run_command(["/bin/sh", "-c", 'echo "$A"; pwd'], env={"A": "b"}, cwd=str(tmp_path))
    assert outcome["stdout"] == f"b\n{tmp_path}\n"


def test_own_session() -> None:
    find_program("ps", "procps")
    outcome = run_command("ps -o pid=,pgid=,sid= -p $$", shell=True)
    pid, group, session = outcome["stdout"].split()  # type: ignore[union-attr]
    assert pid == group == session


def test_output_is_bounded_or_kept(tmp_path: Path) -> None:
    outcome = run_command(["seq", "100000"], max_output=10)
    assert (outcome["stdout"], outcome["truncated"]) == ("1\n2\n3\n4\n5\n", True)
    outcome = run_command(["seq", "100000"], max_output=10, output_dir=str(tmp_path))
    assert (outcome["stdout"], outcome["truncated"]) == ("1\n2\n3\n4\n5\n", False)
    assert outcome["stderr_file"] is None
    lines = Path(outcome["stdout_file"]).read_text().split()  # type: ignore[arg-type]
    assert lines == [str(i) for i in range(1, 100_001)]


def test_timeout_lets_the_command_say_goodbye() -> None:
    command = "trap 'echo bye; exit 4' TERM; echo hello; sleep 1000 & wait"

    def outcome_of(timeout: float) -> Any:
        outcome = run_command(command, shell=True, timeout=timeout, grace=100)
        return outcome if outcome["stdout"] else None

    outcome = with_enough_time(outcome_of)
    assert (outcome["stdout"], outcome["returncode"]) == ("hello\nbye\n", 4)
    assert "TimeoutExpired" in (outcome["error"] or "")


def test_timeout_kills_who_ignores_sigterm() -> None:
    outcome = run_command(
        "trap '' TERM; sleep 1000; sleep 1000", shell=True, timeout=0.2, grace=0.1
    )
    assert outcome["returncode"] == -signal.SIGKILL


def test_timeout_ends_what_outlives_the_leader(tmp_path: Path) -> None:
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (6, 9):
        pytest.skip("the kernel has no signals to the group of a process that has been waited for")
    path = tmp_path / "pid"
    stubborn = f"trap '' TERM; echo $$ > {path}; while :; do sleep 0.1; done"
    leader = 'sh -c "$0" & while ! test -s "$1"; do sleep 0.01; done'
    outcome = run_command(["sh", "-c", leader, stubborn, str(path)], timeout=3, grace=0.1)
    assert outcome["returncode"] == 0
    assert "TimeoutExpired" in (outcome["error"] or "")
    pid = int(path.read_text())
    until(lambda: has_ended(pid), "the end of a stubborn process")


def test_no_start() -> None:
    outcome = run_command(["no such program"])
    assert (outcome["returncode"], outcome["rusage"]) == (127, None)
    assert outcome["error"] == (
        "FileNotFoundError: [Errno 2] No such file or directory: 'no such program'"
    )
    assert run_command(["/"])["returncode"] == 126
    assert run_command(["true"], cwd="/no such directory")["returncode"] == 127


def test_check() -> None:
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run_command("echo out; exit 3", shell=True, check=True)
    assert (raised.value.returncode, raised.value.output) == (3, "out\n")
    with pytest.raises(FileNotFoundError):
        run_command(["no such program"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        run_command(["sleep", "1000"], check=True, timeout=0.1)


def test_helper_is_killed() -> None:
    find_program("ps", "procps")
    kill = 'kill -9 "$PPID"; sleep 1000'
    outcome = run_command(
        ["timeout", "2", "sh", "-c", kill.replace("$PPID", "$(ps -o ppid= $PPID)")]
    )
    assert outcome["returncode"] == -signal.SIGKILL
    assert "HelperDiedError" in (outcome["error"] or "")
    assert run_command(["true"])["returncode"] == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one argument"):
        run_command([])
    with pytest.raises(ValueError, match="grace"):
        run_command(["true"], grace=-1)
    with pytest.raises(ValueError, match="null byte"):
        run_command(["true", "a\0b"])
