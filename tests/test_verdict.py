"""Results say why a command ended, how long it took and what it used."""

from __future__ import annotations

import asyncio
import copy
import pickle
import signal
import subprocess
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import run_script

import errand_boy
import errand_boy.asyncio

run, Popen = cast(Any, errand_boy.run), cast(Any, errand_boy.Popen)
BUSY = "import time\nwhile time.process_time() < 0.2: pass\nx = b'x' * (100 << 20)"


def check(done: Any, cause: str) -> None:
    assert done.cause == cause
    assert done.duration > 0
    assert done.rusage.ru_maxrss > 0
    assert done.peak_memory == done.rusage.ru_maxrss * 1024


@pytest.mark.parametrize(
    "script, cause", [("exit 0", "exit"), ("exit 3", "exit"), ("kill -9 $$", "signal")]
)
def test_cause_of_each_front(script: str, cause: str, spawn: str, client: Any) -> None:
    command = ["sh", "-c", script]
    check(run(command), cause)
    check(run(command, capture_output=True), cause)
    check(run(command, timeout=30), cause)
    with Popen(command) as process:
        assert process.wait() == process.returncode
    check(process, cause)
    with Popen(command) as process:
        while process.poll() is None:
            time.sleep(0.001)
    check(process, cause)
    check(asyncio.run(errand_boy.asyncio.run(command)), cause)
    for done in errand_boy.map([command]):
        check(done, cause)
    check(client.run(command, capture_output=True), cause)
    check(client.run(command), cause)
    celery = pytest.importorskip("errand_boy.celery")
    outcome = celery.run_command(command)
    check(SimpleNamespace(**{**outcome, "rusage": SimpleNamespace(**outcome["rusage"])}), cause)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gevent", "eventlet"])
def test_cause_of_each_front_of_greenlets(name: str, spawn: str) -> None:
    pytest.importorskip(name)
    found = run_script(
        """
        ours = importlib.import_module(f"errand_boy.{sys.argv[2]}")
        found = []

        def tell(done):
            usage = sys.argv[2] == "gevent" or done.rusage.ru_maxrss * 1024 == done.peak_memory > 0
            assert done.duration > 0 and usage
            found.append(done.cause)

        for script in "exit 0", "exit 3", "kill -9 $$":
            tell(ours.run(["sh", "-c", script]))
            tell(ours.run(["sh", "-c", script], capture_output=True, timeout=60))
        with ours.Popen(["sleep", "1000"]) as process:
            assert (process.cause, process.duration, process.rusage) == (None, None, None)
            process.terminate()
        tell(process)
        for options in {"timeout": 0.2}, {"timeout": 0.2, "stdout": ours.PIPE}:
            try:
                ours.run(["sh", "-c", "echo so far; exec sleep 1000"], **options)
            except stdlib.TimeoutExpired as error:
                tell(error)
                assert error.output == (b"so far\\n" if "stdout" in options else None)
        try:
            ours.run(["false"], check=True)
        except stdlib.CalledProcessError as error:
            tell(error)
        report(found)
        """,
        args=[name],
    )
    causes = ["exit"] * 4 + ["signal"] * 2 + ["client"] + ["timeout"] * 2 + ["exit"]
    assert found == causes


def test_before_the_end() -> None:
    with Popen(["cat"], stdin=subprocess.PIPE) as process:
        found = process.cause, process.duration, process.rusage, process.peak_memory
        assert found == (None, None, None, None)
    check(process, "exit")


def test_own_signals_and_those_of_others_are_told_apart() -> None:
    with Popen(["sleep", "1000"]) as process:
        process.terminate()
    check(process, "client")
    with Popen(["sh", "-c", "kill -KILL $$"]) as process:
        process.wait()
        process.kill()
    check(process, "signal")


@pytest.mark.slow
def test_timeouts_and_failures_have_a_cause(spawn: str, client: Any) -> None:
    command = ["sh", "-c", "echo so far; exec sleep 1000"]
    for function in run, client.run:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            function(command, stdout=subprocess.PIPE, timeout=0.3)
        check(caught.value, "timeout")
        assert cast(Any, caught.value).output == b"so far\n"
        assert cast(Any, caught.value).duration >= 0.3
        with pytest.raises(subprocess.CalledProcessError) as failed:
            function(["false"], stdout=subprocess.PIPE, check=True)
        check(failed.value, "exit")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        asyncio.run(errand_boy.asyncio.run(command, capture_output=True, timeout=0.3))
    check(caught.value, "timeout")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        asyncio.run(errand_boy.asyncio.run(["false"], check=True))
    check(failed.value, "exit")
    (done,) = errand_boy.map([command], timeout=0.3)
    check(done, "timeout")


@pytest.mark.slow
def test_usage_is_the_commands(spawn: str) -> None:
    done = run(["python3", "-c", BUSY])
    assert 0.2 <= done.rusage.ru_utime + done.rusage.ru_stime <= done.duration + 0.1
    assert done.peak_memory > 100 << 20


def test_command_that_somebody_else_has_waited_for() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        done = run(["true"])
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (done.returncode, done.cause, done.rusage) == (0, "exit", None)


def test_results_can_be_copied_and_pickled() -> None:
    done = errand_boy.run(["sh", "-c", "echo a; exit 3"], capture_output=True)
    for other in pickle.loads(pickle.dumps(done)), copy.deepcopy(done):
        assert vars(other) == vars(done)
        assert (other.cause, other.returncode, other.stdout) == ("exit", 3, b"a\n")
        assert isinstance(other, subprocess.CompletedProcess)
    with pytest.raises(AttributeError, match="'CompletedProcess' object has no attribute 'nope'"):
        cast(Any, done).nope  # noqa: B018
