"""errand_boy.asyncio on asyncio's own loop and on uvloop's: one test each, where both have it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import importlib
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from conftest import PATIENCE, run_script
from daemon import Daemon, started_daemon
from guard import Guard

import errand_boy
import errand_boy.asyncio as ours
from errand_boy._asyncio import loop as _loop, transport as _transport
from errand_boy._native import lib
from errand_boy._process import helper as _helper, start as _start

T = TypeVar("T")

TICK = 0.005  # seconds
MANY = 300


class Runner:
    """Runs coroutines, each in its own loop."""

    def __init__(self, name: str) -> None:
        module = importlib.import_module(name)
        self.name = name
        self.new_loop: Callable[[], asyncio.AbstractEventLoop] = module.new_event_loop

    def __call__(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        loop = self.new_loop()
        try:
            return loop.run_until_complete(main())
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            gc.collect()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    if request.param == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop is not installed")
    return Runner(request.param)


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def children(*, recursive: bool = False) -> list[psutil.Process]:
    # A killed command may take a while to end. The next start waits for it.
    current = (_helper.launcher.current, _helper.runner.current)
    helpers = {helper.pid for helper in (*current, *_helper._unreaped) if helper is not None}
    me = psutil.Process()
    return [child for child in me.children(recursive) if child.pid not in helpers]


@pytest.fixture
def unchanged() -> Iterator[None]:
    """Expects no child, living or dead, and no more descriptors than before."""
    if os.environ.get("ERRAND_BOY_SPAWN") == "helper":
        errand_boy.start()
    before = len(descriptors()) + 8  # at most: connections and status files that are kept
    yield
    gc.collect()
    assert children() == []
    errand_boy.stop()
    assert len(descriptors()) < before


def wait_for_the_forgotten() -> None:
    """Wait for the commands of garbage objects; a helper that owns one waits for this."""
    gc.collect()
    while subprocess._active:  # type: ignore[attr-defined]
        subprocess._cleanup()  # type: ignore[attr-defined]


async def ticks(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(TICK)


def in_thread(call: Callable[[], T]) -> Awaitable[T]:
    return asyncio.get_running_loop().run_in_executor(None, call)


@contextlib.contextmanager
def stopped_helper() -> Iterator[None]:
    errand_boy.start()
    pid = errand_boy.helper_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# -- what asyncio does --


@pytest.mark.slow
def test_exec_and_communicate(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        pipe = ours.PIPE
        process = await ours.create_subprocess_exec("cat", stdin=pipe, stdout=pipe, stderr=pipe)
        assert isinstance(process, asyncio.subprocess.Process)
        assert process.returncode is None
        assert await process.communicate(b"x" * 1_000_000) == (b"x" * 1_000_000, b"")
        assert process.returncode == 0

    run(main)


@pytest.mark.slow
def test_shell_status_and_streams(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_shell(
            "read line; echo $line; echo $line >&2; exit 7", ours.PIPE, ours.PIPE, ours.STDOUT
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        await process.stdin.drain()
        assert await process.stdout.read() == b"hello\nhello\n"
        assert await process.wait() == 7
        assert await process.wait() == 7

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["terminate", "kill", "send_signal"])
def test_signals(run: Runner, spawn: str, unchanged: None, how: str) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_exec("sleep", "60")
        if how == "send_signal":
            process.send_signal(signal.SIGUSR1)
        else:
            getattr(process, how)()
        numbers = {"terminate": signal.SIGTERM, "kill": signal.SIGKILL}
        assert await process.wait() == -numbers.get(how, signal.SIGUSR1)
        with pytest.raises(ProcessLookupError):
            process.kill()

    run(main)


@pytest.mark.slow
def test_signal_to_one_that_has_ended_unnoticed(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_exec("true")
        with contextlib.suppress(ChildProcessError):  # noticed already
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
            process.kill()
        assert await process.wait() == 0

    async def owned() -> None:
        process = await ours.create_subprocess_exec("true", stdout=ours.PIPE)
        assert process.stdout is not None
        while not process.stdout.at_eof():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.sleep(0)
        assert await process.wait() in {0, -signal.SIGTERM}

    run(owned if spawn == "posix" else main)


@pytest.mark.slow
def test_writing_after_the_end(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_exec("true", stdin=ours.PIPE)
        assert await process.wait() == 0
        assert process.stdin is not None
        # The last one is uvloop's, for its own processes too.
        with pytest.raises((BrokenPipeError, ConnectionResetError, RuntimeError)):
            while True:
                process.stdin.write(b"x" * 100_000)
                await process.stdin.drain()
        done = await ours.run(["true"], input=b"x" * 1_000_000)
        assert done.returncode == 0

    run(main)


@pytest.mark.slow
def test_drain_waits_for_the_reader(run: Runner, unchanged: None) -> None:
    async def main() -> None:
        reader, writer = os.pipe()
        process = await ours.create_subprocess_shell(
            f"read go </dev/fd/{reader}; exec wc -c", ours.PIPE, ours.PIPE, pass_fds=[reader]
        )
        os.close(reader)
        assert process.stdin is not None
        process.stdin.write(b"x" * 1_000_000)
        drained = asyncio.ensure_future(process.stdin.drain())
        await ticks()
        assert not drained.done()
        os.write(writer, b"\n")
        os.close(writer)
        await drained
        out, _ = await process.communicate(b"")
        assert int(out) == 1_000_000

    run(main)


@pytest.mark.slow
def test_output_held_by_a_grandchild(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_shell(
            "sleep 60 & echo $!; exec true", stdout=ours.PIPE
        )
        assert process.stdout is not None
        grandchild = int(await process.stdout.readline())
        while process.returncode is None:
            await ticks(1)
        assert not process.stdout.at_eof()
        os.kill(grandchild, signal.SIGKILL)
        assert (await process.communicate())[0] == b""
        # It may have become ours.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(grandchild, 0)

    run(main)


def test_limit(run: Runner) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_exec("echo", "x" * 100, stdout=ours.PIPE, limit=10)
        assert process.stdout is not None
        with pytest.raises(ValueError, match="limit"):
            await process.stdout.readline()
        await process.communicate()

    run(main)


ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no program": (("/nowhere/at/all",), {}),
    "not in the path": (("no-such-program-anywhere",), {}),
    "a directory": (("/tmp",), {}),
    "not executable": (("/etc/passwd",), {}),
    "no directory": (("true",), {"cwd": "/nowhere"}),
    "too long": (("true", "x" * 3_000_000), {}),
    "longer than a frame": (("true", "x" * 20_000_000), {}),
    "NUL": (("true", "a\0b"), {}),
    "not a string": (("true", 5), {}),
    "text": (("true",), {"text": True}),
    "universal_newlines": (("true",), {"universal_newlines": True}),
    "encoding": (("true",), {"encoding": "utf-8"}),
    "errors": (("true",), {"errors": "strict"}),
    "bufsize": (("true",), {"bufsize": 5}),
    "shell": (("true",), {"shell": True}),
    "option": (("true",), {"no_such_option": 1}),
    "environment": (("true",), {"env": {"a=b": "c"}}),
    "descriptor": (("true",), {"stdin": 12345}),
    "pass_fds": (("true",), {"pass_fds": [-1]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_errors(run: Runner, unchanged: None, name: str) -> None:
    args, options = ERRORS[name]
    options = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE} | options

    async def outcome(create: Any) -> Any:
        try:
            process = await create(*args, **options)
        except Exception as error:
            number = getattr(error, "errno", None)
            filename = getattr(error, "filename", None)
            words = None if isinstance(error, TypeError) else str(error)
            return type(error), number, filename, words
        return await process.communicate(), process.returncode

    async def main() -> None:
        # uvloop's own errors differ in their words and filenames.
        assert await outcome(ours.create_subprocess_exec) == expected

    expected = Runner("asyncio")(lambda: outcome(asyncio.create_subprocess_exec))
    run(main)


def test_errors_of_shell_commands(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="cmd must be a string"):
            await ours.create_subprocess_shell(["true"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="shell must be True"):
            await ours.create_subprocess_shell("true", shell=False)  # type: ignore[call-arg]

    run(main)


def test_preexec_fn_goes_the_standard_library_s_way(run: Runner, unchanged: None) -> None:
    _start._warned.clear()

    async def main() -> None:
        with pytest.warns(RuntimeWarning, match="makes Popen fork"):
            process = await ours.create_subprocess_exec(
                "pwd", stdout=ours.PIPE, preexec_fn=lambda: os.chdir("/")
            )
        assert (await process.communicate())[0] == b"/\n"

    run(main)


@pytest.mark.slow
def test_raw_protocol(run: Runner, spawn: str, unchanged: None) -> None:
    seen: list[Any] = []

    class Protocol(asyncio.SubprocessProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            seen.append("made")

        def pipe_data_received(self, fd: int, data: bytes) -> None:
            seen.append((fd, data))

        def process_exited(self) -> None:
            seen.append("exited")

        def connection_lost(self, exc: Exception | None) -> None:
            seen.append("lost")
            over.set()

    over = asyncio.Event()

    async def main() -> None:
        transport = await _transport.make_transport(
            asyncio.get_running_loop(), Protocol(), ["echo", "a"], False, None, ours.PIPE, None, 0
        )
        assert transport.get_extra_info("subprocess").pid == transport.get_pid()
        await over.wait()
        assert transport.get_returncode() == 0
        transport.close()

    run(main)
    assert seen[0] == "made"
    assert sorted(map(str, seen[1:-1])) == sorted(["exited", str((1, b"a\n"))])
    assert seen[-1] == "lost"


@pytest.mark.slow
def test_each_protocol_is_called_in_the_context_of_its_start(run: Runner, spawn: str) -> None:
    start = contextvars.ContextVar[int]("start")
    seen: list[tuple[int, int]] = []

    class Protocol(asyncio.SubprocessProtocol):
        def __init__(self, number: int) -> None:
            self.number = number

        def process_exited(self) -> None:
            seen.append((self.number, start.get(-1)))

    async def main() -> None:
        async def one(number: int) -> None:
            start.set(number)
            make = _transport.make_transport
            loop = asyncio.get_running_loop()
            transport = await make(loop, Protocol(number), ["true"], False, None, None, None, 0)
            await transport._wait()

        await asyncio.gather(*(asyncio.ensure_future(one(number)) for number in range(5)))

    run(main)
    assert sorted(seen) == [(number, number) for number in range(5)]


@pytest.mark.slow
def test_without_epoll(run: Runner, spawn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll")

    async def main() -> None:
        assert (await ours.run(["echo", "x"], capture_output=True)).stdout == b"x\n"

    run(main)


def test_a_descriptor_that_is_watched_is_closed(run: Runner) -> None:
    async def main() -> None:
        readers = _loop.readers_of(asyncio.get_running_loop())
        for _ in range(2):  # the number is given anew
            reader, writer = os.pipe()
            readers.add_reader(reader, lambda: None)
            os.close(reader)
            readers.remove_reader(reader)
            os.close(writer)

    run(main)


# -- the loop goes on --


@pytest.mark.root
def test_slow_exec_does_not_block_the_loop(run: Runner, spawn: str, tmp_path: Path) -> None:
    slow = Path(shutil.copy("/bin/echo", tmp_path / "slow"))

    async def main(guard: Guard) -> None:
        start = asyncio.ensure_future(ours.create_subprocess_exec(slow, "done", stdout=ours.PIPE))
        await in_thread(guard.held)
        await ticks()
        if spawn != "posix":
            quick = await ours.create_subprocess_exec("true")
            assert await quick.wait() == 0
        assert not start.done()
        guard.release()
        process = await start
        assert (await process.communicate())[0] == b"done\n"

    with Guard(slow) as guard:
        run(lambda: main(guard))


@pytest.mark.root
def test_cancelled_in_a_slow_exec(run: Runner, tmp_path: Path, unchanged: None) -> None:
    slow = Path(shutil.copy("/bin/echo", tmp_path / "slow"))

    async def main(guard: Guard) -> None:
        reader, writer = os.pipe()
        start = asyncio.ensure_future(ours.create_subprocess_exec(slow, "x", stdout=writer))
        await in_thread(guard.held)
        os.close(writer)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        guard.release()
        while _transport._cancelled_starts:
            await ticks(1)
        os.close(reader)

    with Guard(slow) as guard:
        run(lambda: main(guard))


@pytest.mark.slow
@pytest.mark.usefixtures("by_helper")
def test_stopped_helper_does_not_block_the_loop(run: Runner, unchanged: None) -> None:
    async def main() -> None:
        with stopped_helper():
            starts = [asyncio.ensure_future(ours.run(["true"])) for _ in range(MANY)]
            await ticks()
            assert not any(start.done() for start in starts)
        assert [done.returncode for done in await asyncio.gather(*starts)] == [0] * MANY

    run(main)


@pytest.mark.slow
@pytest.mark.usefixtures("by_helper")
def test_request_larger_than_the_socket_takes(run: Runner, unchanged: None) -> None:
    size = 100_000

    async def main() -> None:
        env = {f"NAME{i}": "x" * size for i in range(15)}
        with stopped_helper():
            start = asyncio.ensure_future(
                ours.run(["/bin/sh", "-c", "echo ${#NAME14}"], env=env, capture_output=True)
            )
            await ticks()
            assert not start.done()
        assert int((await start).stdout) == size

    run(main)


@pytest.mark.slow
@pytest.mark.usefixtures("by_helper")
def test_more_descriptors_than_one_message_takes(run: Runner, unchanged: None) -> None:
    count = lib.EB_MAX_FDS_PER_SEND * 2 + 10

    async def main() -> None:
        fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
        with stopped_helper():
            start = asyncio.ensure_future(
                ours.run(
                    ["/bin/sh", "-c", f"test -e /dev/fd/{fds[0]} && test -e /dev/fd/{fds[-1]}"],
                    pass_fds=fds,
                )
            )
            await ticks()
            assert not start.done()
        assert (await start).returncode == 0
        for fd in fds:
            os.close(fd)

    run(main)


# -- cancellation --


@pytest.mark.slow
@pytest.mark.parametrize("output", [None, asyncio.subprocess.PIPE])
def test_cancelled_after_each_number_of_turns(
    run: Runner, spawn: str, unchanged: None, output: int | None
) -> None:
    async def main() -> None:
        outcomes = set()
        for turns in range(40):
            start = asyncio.ensure_future(
                ours.create_subprocess_exec("sleep", "60", stdin=output, stdout=output)
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            if start.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await start
                outcomes.add("cancelled")
            else:
                process = start.result()
                process.kill()
                await process.wait()
        assert outcomes
        assert children() == []

    run(main)


@pytest.mark.slow
def test_cancelled_at_random_times(run: Runner, spawn: str, unchanged: None) -> None:
    async def one(chance: random.Random) -> None:
        output = chance.choice([None, ours.PIPE])
        start = asyncio.ensure_future(
            ours.create_subprocess_exec("sleep", "60", stdin=output, stdout=output)
        )
        await asyncio.sleep(chance.uniform(0, 0.02))
        start.cancel()
        await asyncio.sleep(chance.choice([0, 0.001]))
        start.cancel()
        try:
            process = await start
        except asyncio.CancelledError:
            return
        process.kill()
        await process.wait()

    async def main() -> None:
        chance = random.Random(5)
        for _ in range(20):
            await asyncio.gather(*(one(chance) for _ in range(16)))

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("turns", range(8))
def test_loop_closed_right_after_a_cancellation(run: Runner, unchanged: None, turns: int) -> None:
    async def main() -> None:
        start = asyncio.ensure_future(ours.create_subprocess_exec("sleep", "60"))
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            process = await start
            process.kill()
            await process.wait()

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("turns", range(8))
def test_loop_closed_in_a_start(run: Runner, spawn: str, unchanged: None, turns: int) -> None:
    async def main() -> None:
        start = asyncio.ensure_future(ours.create_subprocess_exec("sleep", "60"))
        # As in a program that has forgotten it; silent, unlike asyncio.
        start._log_destroy_pending = False  # type: ignore[attr-defined]
        for _ in range(turns):
            await asyncio.sleep(0)

    run(main)
    wait_for_the_forgotten()


@pytest.mark.slow
@pytest.mark.parametrize("output", [None, asyncio.subprocess.PIPE])
def test_loop_closed_before_pipes_are_connected(
    run: Runner, spawn: str, unchanged: None, monkeypatch: pytest.MonkeyPatch, output: int | None
) -> None:
    loop = run.new_loop()
    make = _transport._Transport.__init__

    def make_and_stop(*args: Any) -> None:
        make(*args)
        loop.stop()

    monkeypatch.setattr(_transport._Transport, "__init__", make_and_stop)
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        start = loop.create_task(ours.create_subprocess_exec("sleep", "60", stdout=output))
        start._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_forever()
        assert len(children(recursive=True)) == 1
        del start
        loop.close()
        wait_for_the_forgotten()
        assert children(recursive=True) == []
        assert run.name == "uvloop" or "never awaited" in str([each.message for each in kept])


def test_run_ends_with_processes_that_live(unchanged: None) -> None:
    async def main() -> list[int]:
        processes = [
            await ours.create_subprocess_exec("sleep", "60", stdin=pipe, stdout=pipe)
            for pipe in (None, ours.PIPE)
        ]
        return [process.pid for process in processes]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pids = asyncio.run(main())
        gc.collect()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(10)


# -- what goes wrong --


@pytest.mark.slow
def test_helper_killed_while_a_start_is_awaited(run: Runner, unchanged: None) -> None:
    async def main() -> None:
        done = await ours.run(["true"])  # so that a connection is there, and greeted
        errand_boy.start()
        pid = errand_boy.helper_pid()
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        start = asyncio.ensure_future(ours.run(["echo", "x"], capture_output=True))
        await ticks(2)
        os.kill(pid, signal.SIGKILL)
        done = await start  # it had not been read
        assert done.stdout == b"x\n"
        assert errand_boy.helper_pid() != pid

    run(main)


@pytest.mark.usefixtures("by_helper")
@pytest.mark.root
def test_helper_killed_in_the_midst_of_a_start(run: Runner, tmp_path: Path) -> None:
    slow = Path(shutil.copy("/bin/cat", tmp_path / "slow"))

    async def main(guard: Guard) -> None:
        await ours.run(["true"])
        start = asyncio.ensure_future(ours.run([slow], stdin=ours.DEVNULL))
        pid = errand_boy.helper_pid()
        assert pid is not None
        held = await in_thread(guard.held)
        os.kill(pid, signal.SIGKILL)
        await ticks()
        guard.release()  # until the exec, the child has a copy of the helper's end
        with pytest.raises(errand_boy.HelperDiedError):
            await start
        os.waitpid(held, 0)
        assert (await ours.run(["true"])).returncode == 0

    with Guard(slow) as guard:
        run(lambda: main(guard))


def test_somebody_else_waits_for_the_child(
    run: Runner, unchanged: None, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_exec("sleep", "60")
        process.kill()
        os.waitpid(process.pid, 0)
        assert await process.wait() == 255
        assert f"Unknown child process pid {process.pid}" in caplog.text

    run(main)


def test_ignored_sigchld(run: Runner, unchanged: None) -> None:
    async def main() -> None:
        process = await ours.create_subprocess_exec("true", stdout=ours.PIPE)
        assert await process.wait() == 255

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        run(main)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_descriptor_is_free(run: Runner, unchanged: None) -> None:
    async def main() -> None:
        await ours.run(["true"])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, descriptors()[:-1]))
        opened = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    opened.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(8):
                with pytest.raises(OSError, match="Too many open files"):
                    await ours.create_subprocess_exec("sleep", "60", stdout=ours.PIPE)
                os.close(opened.pop())
                if len(opened) > 3:
                    with contextlib.suppress(OSError):
                        process = await ours.create_subprocess_exec("true")
                        await process.wait()
                        break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in opened:
                os.close(fd)

    run(main)


# -- threads and signals --


LOOPS = """
    import asyncio
    import errand_boy.asyncio as ours

    async def main():
        process = await ours.create_subprocess_exec("cat", stdin=ours.PIPE, stdout=ours.PIPE)
        out, _ = await process.communicate(b"x")
        slow = await ours.create_subprocess_exec("sleep", "0.1")
        return out.decode(), process.returncode, await slow.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["asyncio", "uvloop"])
def test_sigchld_blocked_a_wakeup_fd_and_no_thread(module: str) -> None:
    pytest.importorskip(module)
    assert run_script(
        LOOPS
        + f"""
    import {module}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    ours_, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    loop = {module}.new_event_loop()
    result = loop.run_until_complete(main())
    threads = os.listdir("/proc/self/task")
    handler = signal.getsignal(signal.SIGCHLD)
    report([*result, len(threads), handler == signal.SIG_DFL])
    """
    ) == ["x", 0, 0, 1, True]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["asyncio", "uvloop"])
@pytest.mark.parametrize("watcher", [None, "SafeChildWatcher", "FastChildWatcher",
                                     "ThreadedChildWatcher", "MultiLoopChildWatcher"])  # fmt: skip
def test_loop_in_another_thread(module: str, watcher: str | None) -> None:
    pytest.importorskip(module)
    if watcher is not None and not hasattr(asyncio, watcher):
        pytest.skip(f"this Python has no {watcher}")
    set_watcher = "" if watcher is None else f"asyncio.set_child_watcher(asyncio.{watcher}())"
    assert run_script(
        LOOPS
        + f"""
    import {module}
    warnings.simplefilter("ignore", DeprecationWarning)
    {set_watcher}
    results = []

    def run():
        loop = {module}.new_event_loop()
        results.append(loop.run_until_complete(main()))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    report(results)
    """
    ) == [["x", 0, 0]]


@pytest.mark.slow
def test_two_loops_at_once(run: Runner, spawn: str, unchanged: None) -> None:
    codes: list[list[int]] = []

    async def main() -> list[int]:
        async def one(code: int) -> int:
            return (await ours.run(["/bin/sh", "-c", f"exit {code}"])).returncode

        return list(await asyncio.gather(*map(one, range(50))))

    threads = [threading.Thread(target=lambda: codes.append(run(main))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [list(range(50))] * 2


@pytest.mark.slow
def test_new_loops_of_many_threads(unchanged: None) -> None:
    # Each new loop checks those of the other threads.
    codes: list[int] = []

    async def main() -> None:
        process = await ours.create_subprocess_exec("/bin/true")
        codes.append(await process.wait())

    def work() -> None:
        for _ in range(40):
            asyncio.run(main())

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert codes == [0] * 320


# -- run --


@pytest.mark.slow
def test_run(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        done = await ours.run(["cat"], input=b"x", capture_output=True)
        assert (done.args, done.returncode, done.stdout, done.stderr) == (["cat"], 0, b"x", b"")
        done = await ours.run("echo a; exit 3", shell=True, stdout=ours.PIPE)
        assert (done.returncode, done.stdout) == (3, b"a\n")
        assert done.stderr is None
        with pytest.raises(subprocess.CalledProcessError) as failed:
            await ours.run("exit 4", shell=True, check=True)
        assert failed.value.returncode == 4
        with pytest.raises(ValueError, match="capture_output"):
            await ours.run(["true"], capture_output=True, stdout=ours.PIPE)
        with pytest.raises(ValueError, match="input"):
            await ours.run(["true"], input=b"", stdin=ours.PIPE)
        assert (await ours.run("true")).args == "true"

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        {"text": True},
        {"universal_newlines": True},
        {"encoding": "latin-1"},
        {"encoding": "utf-16", "errors": "ignore"},
        {"errors": "replace"},
    ],
    ids=str,
)
def test_run_in_text_mode(run: Runner, mode: dict[str, Any]) -> None:
    undecodable = r"\344" if "errors" in mode else ""
    script = rf"cat; printf 'one\r\ntwo\rthree{undecodable}' >&2; exit 3"
    expected = subprocess.run(script, shell=True, input="é\n", capture_output=True, **mode)

    async def main() -> None:
        done = await ours.run(script, shell=True, input="é\n", capture_output=True, **mode)
        assert (done.stdout, done.stderr) == (expected.stdout, expected.stderr)
        with pytest.raises(subprocess.CalledProcessError) as failed:
            await ours.run(script, shell=True, input="é\n", stdout=ours.PIPE, check=True, **mode)
        assert (failed.value.stdout, failed.value.stderr) == (expected.stdout, None)
        assert (await ours.run(["cat"], input=None, stdout=ours.PIPE, **mode)).stdout == ""

    run(main)


def test_run_takes_one_list(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match=r"its arguments as one list: \['sleep', '3'\]"):
            await ours.run("sleep", "3")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"'timeot'. Did you mean 'timeout'\?"):
            await ours.run(["true"], timeot=5)  # type: ignore[call-overload]

    run(main)


def test_run_with_input_of_the_wrong_type(run: Runner, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    async def main() -> None:
        with pytest.raises(TypeError, match="input must be bytes, not str; or give text=True"):
            await ours.run(["touch", trace], input="abc")
        with pytest.raises(TypeError, match="input must be str with text=True, not bytes"):
            await ours.run(["touch", trace], input=b"abc", text=True)
        with pytest.raises(TypeError):
            await ours.run(["touch", trace], input=7)  # type: ignore[call-overload]
        assert not trace.exists()
        for data in bytearray(b"abc"), memoryview(b"abc"):
            assert (await ours.run(["cat"], input=data, stdout=ours.PIPE)).stdout == b"abc"

    run(main)


@pytest.mark.slow
def test_run_with_a_timeout(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        for timeout in 0.5, PATIENCE / 2:  # the first may be too short, at high load
            with pytest.raises(subprocess.TimeoutExpired) as expired:
                # A descendant, which lives on, holds the output.
                await ours.run(
                    "echo a; (trap '' TERM; sleep 60) & echo $! >&2; exec sleep 60",
                    shell=True,
                    capture_output=True,
                    timeout=timeout,
                )
            if expired.value.stderr:
                break
        assert expired.value.output == b"a\n"
        descendant = int(expired.value.stderr or b"")
        os.kill(descendant, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(descendant, 0)

    run(main)


@pytest.mark.slow
def test_run_cancelled(run: Runner, spawn: str, unchanged: None) -> None:
    async def main() -> None:
        command = asyncio.ensure_future(ours.run(["sleep", "60"], capture_output=True))
        await ticks()
        command.cancel()
        with pytest.raises(asyncio.CancelledError):
            await command
        assert children() == []

    run(main)


# -- the daemon --


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with started_daemon(tmp_path) as started:
        yield started


@pytest.mark.slow
def test_daemon(run: Runner, daemon: Daemon) -> None:
    async def main() -> None:
        client = ours.connect(daemon.path)
        done = await client.run(["cat"], input=b"x", capture_output=True)
        assert (done.returncode, done.stdout) == (0, b"x")
        process = await client.create_subprocess_exec("sleep", "60")
        assert psutil.Process(process.pid).ppid() in daemon.helpers()
        process.terminate()
        assert await process.wait() == -signal.SIGTERM
        process = await client.create_subprocess_shell("exit 5")
        assert await process.wait() == 5
        with pytest.raises(FileNotFoundError) as failed:
            await client.run(["/nowhere"])
        assert failed.value.filename == "/nowhere"

        async def one(code: int) -> int:
            return (await client.run(["/bin/sh", "-c", f"exit {code}"])).returncode

        assert await asyncio.gather(*map(one, range(100))) == list(range(100))

    run(main)


@pytest.mark.slow
def test_status_that_comes_with_the_answer(run: Runner, daemon: Daemon) -> None:
    async def main() -> None:
        client = ours.connect(daemon.path)
        await client.run(["true"])
        for _ in range(20):
            start = asyncio.ensure_future(client.create_subprocess_exec("true"))
            await asyncio.sleep(0)
            subprocess.run(["sleep", "0.02"])  # the loop is busy; both frames arrive
            process = await start
            assert await process.wait() == 0

    run(main)


@pytest.mark.slow
def test_helper_of_a_daemon_killed(run: Runner, daemon: Daemon) -> None:
    async def main() -> None:
        client = ours.connect(daemon.path)
        process = await client.create_subprocess_exec("sleep", "60", stdout=ours.PIPE)
        command = psutil.Process(process.pid)
        output = asyncio.ensure_future(process.communicate())
        await ticks(2)
        helper = command.parent()
        assert helper is not None
        helper.kill()
        with pytest.raises(errand_boy.HelperDiedError):
            await output
        with pytest.raises(errand_boy.HelperDiedError):
            await process.wait()
        command.kill()
        command.wait(10)

    run(main)


def test_no_daemon(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(errand_boy.NoDaemonError):
            await ours.connect(tmp_path / "socket").run(["true"])

    run(main)


@pytest.mark.slow
def test_daemon_that_does_not_accept(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            listener.listen(0)
            client = ours.connect(tmp_path / "socket")
            starts = [asyncio.ensure_future(client.run(["true"])) for _ in range(4)]
            await ticks()
            assert not any(start.done() for start in starts)
        for start in starts:
            with pytest.raises(OSError, match=r"."):
                await start

    run(main)


@pytest.mark.slow
def test_daemon_s_start_cancelled(run: Runner, daemon: Daemon) -> None:
    async def main() -> None:
        client = ours.connect(daemon.path)
        for turns in range(30):
            start = asyncio.ensure_future(client.create_subprocess_exec("sleep", "60"))
            for _ in range(turns):
                await asyncio.sleep(0)
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                process = await start
                process.kill()
                await process.wait()
        while any(psutil.Process(helper).children() for helper in daemon.helpers()):
            await ticks(1)

    run(main)


def test_environment_chooses_the_daemon(daemon: Daemon) -> None:
    code = """
    import asyncio
    import errand_boy.asyncio as ours

    async def main():
        process = await ours.create_subprocess_exec("sleep", "60")
        with open(f"/proc/{process.pid}/stat") as stat:
            parent = int(stat.read().rsplit(")")[1].split()[1])
        process.kill()
        await process.wait()
        return parent

    report(asyncio.run(main()))
    """
    os.environ["ERRAND_BOY_SOCKET"] = daemon.path
    try:
        assert run_script(code) in daemon.helpers()
    finally:
        del os.environ["ERRAND_BOY_SOCKET"]
