"""What results say: why a command has ended, how long it took, what it used."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from typing import Any, cast

import pytest

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


def test_before_the_end() -> None:
    with Popen(["cat"], stdin=subprocess.PIPE) as process:
        found = process.cause, process.duration, process.rusage, process.peak_memory
        assert found == (None, None, None, None)
    check(process, "exit")


def test_own_signal_and_anothers() -> None:
    with Popen(["sleep", "1000"]) as process:
        process.terminate()
    check(process, "client")
    with Popen(["sh", "-c", "kill -KILL $$"]) as process:
        process.wait()
        process.kill()
    check(process, "signal")


def test_timeouts_and_failures_tell(spawn: str, client: Any) -> None:
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


def test_usage_is_the_commands(spawn: str) -> None:
    done = run(["python3", "-c", BUSY])
    assert 0.2 <= done.rusage.ru_utime + done.rusage.ru_stime <= done.duration + 0.1
    assert done.peak_memory > 100 << 20


def test_somebody_else_waits_for_it() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        done = run(["true"])
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (done.returncode, done.cause, done.rusage) == (0, "exit", None)
