"""errand_boy.Executor, as users of concurrent.futures expect it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import PATIENCE, has_ended, until
from daemon import started_daemon

import errand_boy
from errand_boy import Executor


@pytest.fixture(autouse=True)
def no_helper_left() -> Iterator[None]:
    yield
    errand_boy.stop()


@pytest.fixture(params=["helper", "daemon"])
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Executor]:
    if request.param == "helper":
        with Executor(4) as made:
            yield made
        return
    with started_daemon(tmp_path) as daemon:
        client = errand_boy.connect(daemon.path)
        with Executor(4, client=client) as made:
            yield made
        client.close()


def sleeper(pids: Path) -> list[str]:
    """A command with a child that runs for long; it writes both pids."""
    return ["/bin/sh", "-c", f"sleep 1000 & echo $! $$ >> {pids}; wait"]


def pids_in(path: Path) -> list[int]:
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return [int(pid) for pid in path.read_text().split()]


def test_future_of_a_completed_process(executor: Executor) -> None:
    future = executor.submit(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"data")
    done = future.result(PATIENCE)
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"data", b"err\n")
    assert (future.done(), future.running(), future.cancel()) == (True, False, False)


def test_options(executor: Executor, tmp_path: Path) -> None:
    future = executor.submit("echo $X; pwd", shell=True, cwd=tmp_path, env={"X": "1"})
    assert future.result(PATIENCE).stdout == b"1\n%s\n" % bytes(tmp_path)
    with Executor(text=True, env={"X": "2"}) as other:
        assert other.submit("echo $X", shell=True).result(PATIENCE).stdout == "2\n"


def test_failures_are_those_of_run(executor: Executor) -> None:
    absent = executor.submit(["/absent"])
    late = executor.submit(["sleep", "1000"], timeout=0.05)
    wrong = executor.submit(["sh", "-c", "echo out; exit 3"], check=True)
    assert executor.submit(["false"]).result(PATIENCE).returncode == 1
    assert isinstance(absent.exception(PATIENCE), FileNotFoundError)
    with pytest.raises(subprocess.TimeoutExpired):
        late.result(PATIENCE)
    error = wrong.exception(PATIENCE)
    assert isinstance(error, subprocess.CalledProcessError)
    assert (error.returncode, error.stdout) == (3, b"out\n")


def test_wrong_arguments_raise_at_once_and_do_no_harm(executor: Executor) -> None:
    with pytest.raises(TypeError, match="functions"):
        executor.submit(len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'wd'. Did you mean 'cwd'\?"):
        executor.submit(["true"], wd="/")  # type: ignore[call-arg]
    assert executor.submit(["true"]).result(PATIENCE).returncode == 0
    with pytest.raises(TypeError, match="ordered"):
        Executor(ordered=True)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="max_workers"):
        Executor(0)


def test_retries(executor: Executor, tmp_path: Path) -> None:
    path = tmp_path / "x"
    script = f"echo x >> {path}; [ $(wc -l < {path}) -ge 3 ]"
    assert executor.submit(["sh", "-c", script], retries=4).result(PATIENCE).runs == 3


def test_wait_and_as_completed(executor: Executor, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    slow, fast = executor.submit(["cat", str(fifo)]), executor.submit(["true"])
    done, left = wait([slow, fast], PATIENCE, FIRST_COMPLETED)
    assert (done, left) == ({fast}, {slow})
    assert slow.running()
    fifo.write_text("x")
    assert list(as_completed([slow], PATIENCE)) == [slow]
    futures = [executor.submit(["echo", str(n)]) for n in range(100)]
    outputs = {int(future.result().stdout) for future in as_completed(futures, PATIENCE)}
    assert outputs == set(range(100))


def test_map(executor: Executor) -> None:
    results = executor.map((["echo", str(n)] for n in range(50)), check=True)
    assert [int(result.stdout) for result in results] == list(range(50))
    results = executor.map([["true"], ["false"], ["sleep", "1000"]], check=True)
    assert next(results).returncode == 0
    with pytest.raises(subprocess.CalledProcessError):
        next(results)  # and the last is cancelled, else the executor's end would wait


@pytest.mark.slow
def test_cancel_ends_what_runs(executor: Executor, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    future = executor.submit(sleeper(pids))
    group = pids_in(pids)
    assert future.running()
    assert future.cancel()
    assert future.cancel()
    assert (future.cancelled(), future.running()) == (True, False)
    with pytest.raises(CancelledError):
        future.result(PATIENCE)
    assert wait([future], PATIENCE).done == {future}
    assert list(as_completed([future], PATIENCE)) == [future]
    until(lambda: all(map(has_ended, group)))


def test_cancel_of_what_waits_its_turn(tmp_path: Path) -> None:
    pids, mark = tmp_path / "pids", tmp_path / "mark"
    with Executor(1) as executor:
        runs, waits = executor.submit(sleeper(pids)), executor.submit(["touch", str(mark)])
        pids_in(pids)
        assert not waits.running()
        waits.cancel()
        assert wait([waits], PATIENCE).done == {waits}
        runs.cancel()
    assert not mark.exists()


def test_cancel_of_what_is_to_be_run_again(executor: Executor) -> None:
    policy = errand_boy.Retries(9, delay=1000)
    future = executor.submit(["false"], retries=policy)
    until(future.running)
    future.cancel()
    assert wait([future], PATIENCE).done == {future}


@pytest.mark.slow
def test_asyncio_waits_and_cancels(executor: Executor, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def main() -> None:
        done = await asyncio.wrap_future(executor.submit(["echo", "x"]))
        assert done.stdout == b"x\n"
        loop = asyncio.get_running_loop()
        command: Any = ["echo", "y"]
        assert (await loop.run_in_executor(executor, command)).stdout == b"y\n"
        many = [asyncio.wrap_future(executor.submit(["true"])) for _ in range(20)]
        assert [done.returncode for done in await asyncio.gather(*many)] == [0] * 20
        task = asyncio.wrap_future(executor.submit(sleeper(pids)))
        while not pids.exists() or not pids.read_text():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    until(lambda: all(map(has_ended, pids_in(pids))))


def test_callbacks_that_submit(executor: Executor) -> None:
    ends: list[int] = []
    finished = threading.Event()

    def go_on(future: concurrent.futures.Future[Any]) -> None:
        ends.append(int(future.result().stdout))
        if len(ends) == 20:
            finished.set()
        else:
            executor.submit(["echo", str(ends[-1] + 1)]).add_done_callback(go_on)

    executor.submit(["echo", "0"]).add_done_callback(go_on)
    assert finished.wait(PATIENCE)
    assert ends == list(range(20))


def test_shutdown(tmp_path: Path) -> None:
    executor = Executor(2)
    futures = [executor.submit(["echo", str(n)]) for n in range(20)]
    executor.shutdown()
    assert [int(future.result(0).stdout) for future in futures] == list(range(20))
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(["true"])
    executor.shutdown()


def test_shutdown_that_cancels(tmp_path: Path) -> None:
    fifo, pids = tmp_path / "fifo", tmp_path / "pids"
    os.mkfifo(fifo)
    executor = Executor(1)
    runs = executor.submit(["sh", "-c", f"echo $$ > {pids}; cat {fifo}"])
    pids_in(pids)
    queued = [executor.submit(["true"]) for _ in range(1000)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in queued)
    fifo.write_text("end")
    assert runs.result(PATIENCE).stdout == b"end"
    executor.shutdown()


def test_threads_submit_and_cancel_at_random() -> None:
    with Executor(8) as executor:

        def work(seed: int) -> None:
            random = Random(seed)
            kept = []
            for _ in range(60):
                future = executor.submit(["sleep", "1000" if random.random() < 0.2 else "0"])
                kept.append(future)
                if random.random() < 0.3:
                    random.choice(kept).cancel()
            for future in kept:
                args = future._job.args  # type: ignore[attr-defined]
                if args[1] == "1000":
                    future.cancel()
            assert not wait(kept, PATIENCE).not_done
            assert all(f.cancelled() or f.result().returncode == 0 for f in kept)

        with ThreadPoolExecutor(4) as threads:
            for _ in threads.map(work, range(4)):
                pass


def test_cancelled_as_they_end() -> None:
    random = Random(1)
    with Executor(8) as executor:
        for _ in range(100):
            futures = [executor.submit(["true"]) for _ in range(8)]
            wait(random.choices(futures), PATIENCE)
            for future in futures:
                future.cancel()
            assert not wait(futures, PATIENCE).not_done
            assert all(f.cancelled() or f.result().returncode == 0 for f in futures)


def test_many_cancelled_commands_leave_room_for_others(executor: Executor) -> None:
    for _ in range(100):
        future = executor.submit(["sleep", "1000"])
        until(future.running)
        future.cancel()
    assert executor.submit(["true"]).result(PATIENCE).returncode == 0


def test_no_thread_and_no_descriptor_is_left_while_there_is_nothing_to_do() -> None:
    executor, others = Executor(2), threading.active_count()
    executor.submit(["true"]).result(PATIENCE)
    until(lambda: threading.active_count() <= others)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        assert executor.submit(["true"]).result(PATIENCE).returncode == 0
    until(lambda: threading.active_count() <= others)
    assert len(os.listdir("/proc/self/fd")) <= before
    executor.shutdown()


def test_helper_that_dies_is_told_and_replaced() -> None:
    with Executor(2) as executor:
        executor.submit(["true"]).result(PATIENCE)
        future = executor.submit(["sh", "-c", "kill -9 $PPID"])
        assert isinstance(future.exception(PATIENCE), errand_boy.HelperDiedError)
        assert executor.submit(["true"]).result(PATIENCE).returncode == 0


def test_what_ends_the_thread_is_told_to_all(tmp_path: Path) -> None:
    client = errand_boy.connect(tmp_path / "nobody", peer_uid=os.getuid())
    with Executor(1, client=client) as executor:
        futures = [executor.submit(["true"]) for _ in range(5)]
        for future in futures:
            assert isinstance(future.exception(PATIENCE), errand_boy.NoDaemonError)


@pytest.mark.slow
def test_the_interpreters_end_waits() -> None:
    script = """
        import errand_boy
        executor = errand_boy.Executor()
        executor.submit(["sh", "-c", "sleep 0.2; echo end"], check=True).add_done_callback(
            lambda future: print(future.result().stdout)
        )
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert (done.stdout, done.stderr) == (b"b'end\\n'\n", b"")


def test_fork() -> None:
    with Executor(1) as executor:
        executor.submit(["true"]).result(PATIENCE)
        pid = os.fork()
        if pid == 0:
            try:
                executor.submit(["true"])
            except ChildProcessError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0


def test_import_costs_nothing() -> None:
    script = "import sys, errand_boy; print('concurrent.futures' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n"
