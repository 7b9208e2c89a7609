"""Commands that outlive their client: started, followed, waited for, stopped, removed."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, has_ended, until
from daemon import Daemon
from jobs import await_output, files, keeper_of, keepers, keeping_jobs, kill_keeper, text

import errand_boy
import errand_boy.asyncio
from errand_boy import JobError, NoJobError
from errand_boy._cli.detached import _row
from errand_boy._client.client import Client
from errand_boy._jobs.blocking import Job, Missed, Output
from errand_boy._jobs.state import Chooser
from errand_boy._wire import status

PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT

# With this, a shell waits until the test continues it. It leaves no process behind.
FOREVER = "exec sleep 1000"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Client, Path]]:
    directory = tmp_path_factory.mktemp("jobs")
    with keeping_jobs(directory) as (daemon, client):
        yield daemon, client, directory


@pytest.fixture
def client(served: tuple[Daemon, Client, Path]) -> Iterator[Client]:
    _, client, directory = served
    yield client
    for job in client.jobs(all=True):
        with suppress(NoJobError):  # one that could not be started is removed by the daemon
            if job.state in ("running", "starting"):
                job.stop(signal.SIGKILL)
            job.remove()
    until(lambda: not keepers(directory), "the end of all keepers")
    until(lambda: not files(directory), "the removal of all files")


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def data_of(*events: Output | Missed) -> bytes:
    assert all(isinstance(event, Output) for event in events)
    return b"".join(event.data for event in events if isinstance(event, Output))


# -- start, wait, logs --


def test_end_is_waited_for(client: Client) -> None:
    job = client.start(sh("echo out; echo errors >&2; exit 3"), name="first")
    assert (job.name, job.args[0]) == ("first", "/bin/sh")
    result = job.wait(PATIENCE)
    assert result.returncode == job.returncode == 3
    assert result.cause == "exit"
    assert result.bytes == (4, 7)
    assert 0 <= result.duration < PATIENCE
    assert result.rusage.ru_maxrss > 0
    assert result.peak_memory > 0
    assert job.state == "ended"
    assert text(job, 1) == b"out\n"
    assert text(job, 2) == b"errors\n"
    assert job.wait(0).returncode == 3
    with pytest.raises(subprocess.CalledProcessError):
        result.check_returncode()


def test_signal_is_told(client: Client) -> None:
    result = client.start(sh("kill -TERM $$")).wait(PATIENCE)
    assert (result.returncode, result.cause) == (-signal.SIGTERM, "signal")


@pytest.mark.slow
def test_limit_is_told(client: Client) -> None:
    result = client.start(sh(FOREVER), limits={"wall": 0.2}).wait(PATIENCE)
    assert (result.returncode, result.cause) == (-signal.SIGKILL, "timeout")


def test_order_of_streams_and_times(client: Client) -> None:
    before = time.time()
    job = client.start(
        sh("for i in 1 2 3; do echo o$i; read x; echo e$i >&2; read x; done"), stdin=PIPE
    )
    with job.attach(history=True) as attachment:
        while attachment.read():  # what has come is kept, so that the order is certain
            attachment.write(b"\n")
    job.wait(PATIENCE)
    events = list(job.logs())
    assert all(isinstance(event, Output) for event in events)
    pieces = [event for event in events if isinstance(event, Output)]
    assert [(p.stream, p.data) for p in pieces] == [
        (n, f"{letter}{i}\n".encode()) for i in (1, 2, 3) for n, letter in ((1, "o"), (2, "e"))
    ]
    times = [piece.time for piece in pieces]
    assert times == sorted(times)
    assert before - 1 < times[0] <= times[-1] < time.time() + 1
    assert [p for p in job.logs(since=times[2])] == pieces[2:]


def test_clock_that_is_set_back() -> None:
    """What is written after what was asked for is wanted, whatever the clock says then."""
    chooser = Chooser(100.0, None)
    pieces = [Output(1, seconds, b"x") for seconds in (99.0, 101.0, 50.0)]
    assert [event for piece in pieces for event in chooser.take(piece)] == pieces[1:]


def test_time_does_not_depend_on_the_clock(client: Client) -> None:
    job = client.start(sh("read x"), stdin=PIPE)
    entry = job.status()
    days = 86400 * 3
    for started in entry["started"] - days, entry["started"] + days:
        shown = _row(Job(client, {**entry, "started": started}), False)
        assert "s" in shown[4]  # less than an hour
        assert "m" not in shown[4]
    with job.attach() as attachment:
        attachment.end_input()
        assert attachment.read() == b""
    result = job.wait()
    assert job.duration == result.duration


@pytest.mark.parametrize("follow", [False, True])
def test_last_lines(client: Client, follow: bool) -> None:
    job = client.start(sh("seq 1000; printf end"))
    job.wait(PATIENCE)
    assert text(job, tail=3, follow=follow) == b"999\n1000\nend"
    assert text(job, tail=0) == b""
    assert len(text(job, tail=10_000)) == 3893 + 3


def test_followed_while_it_runs(client: Client, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    job = client.start(sh(f"echo one; cat {fifo}; echo three"))
    events = job.logs(follow=True)
    assert data_of(next(events)) == b"one\n"
    assert text(job) == b"one\n"  # without follow, that is all
    fifo.write_bytes(b"two\n")
    assert data_of(*events) == b"two\nthree\n"


def test_last_lines_are_followed(client: Client, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    job = client.start(sh(f"seq 9; cat {fifo}"))
    await_output(job, b"9\n")
    events = job.logs(follow=True, tail=2)
    assert data_of(next(events)) == b"8\n9\n"
    fifo.write_bytes(b"more\n")
    assert data_of(*events) == b"more\n"


def test_old_output_is_overwritten_and_that_is_told(client: Client) -> None:
    size = 200_000
    job = client.start(sh(f"head -c {size} /dev/zero; echo end"), ring=4096)
    assert job.wait(PATIENCE).bytes[0] == size + 4
    events = list(job.logs())
    assert isinstance(events[0], Missed) and events[0].stream == 1
    kept = sum(len(event.data) for event in events if isinstance(event, Output))
    assert 0 < kept <= 4096
    assert kept + events[0].size == size + 4
    assert isinstance(events[-1], Output) and events[-1].data.endswith(b"end\n")


def test_time_out(client: Client) -> None:
    job = client.start(sh(FOREVER))
    for timeout in 0, 0.05:
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(timeout)
    job.stop()


@pytest.mark.slow
def test_many_wait(client: Client) -> None:
    job = client.start(sh("sleep 0.3; exit 7"))
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(job.wait(PATIENCE).returncode))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [7] * 20


@pytest.mark.slow
def test_nobody_waits(client: Client) -> None:
    """A client that ends at once leaves its job running."""
    script = f"""
import errand_boy
print(errand_boy.connect({client.path!r}).start(["/bin/sh", "-c", "sleep 0.2; echo done"]).id)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    job = client.job(int(out))
    assert job.wait(PATIENCE).returncode == 0
    assert text(job) == b"done\n"


# -- what it is given --


def test_options(client: Client, tmp_path: Path) -> None:
    job = client.start(
        "echo $WORD; pwd; umask; ulimit -n; nice",
        shell=True,
        cwd=tmp_path,
        env={"WORD": "word", "PATH": os.environ["PATH"]},
        umask=0o027,
        rlimits={"nofile": 77},
        nice=3,
    )
    job.wait(PATIENCE)
    nice = os.getpriority(os.PRIO_PROCESS, 0) + 3
    assert text(job).decode().splitlines() == ["word", str(tmp_path), "0027", "77", f"{nice}"]


def test_working_directory_is_the_clients(client: Client) -> None:
    job = client.start(["pwd"])
    job.wait(PATIENCE)
    assert text(job) == os.fsencode(os.getcwd()) + b"\n"
    assert job.status()["cwd"] == os.getcwd()


def test_input(client: Client, tmp_path: Path) -> None:
    assert client.start(["cat"]).wait(PATIENCE).returncode == 0  # it is /dev/null
    path = tmp_path / "input"
    path.write_bytes(b"from a file")
    with path.open("rb") as file:
        job = client.start(["cat"], stdin=file)
    job.wait(PATIENCE)
    assert text(job) == b"from a file"


def test_joined(client: Client) -> None:
    job = client.start(sh("echo out; echo errors >&2"), stderr=STDOUT)
    job.wait(PATIENCE)
    assert text(job, 1) == b"out\nerrors\n"


def test_log(client: Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = client.start(["seq", "100000"], log=log, ring=4096)
    job.wait(PATIENCE)
    assert log.read_bytes() == b"".join(b"%d\n" % n for n in range(1, 100_001))


def test_log_is_rotated(client: Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = client.start(sh("seq 20000; seq 20000"), log=log, log_size=50_000, log_count=9)
    job.wait(PATIENCE)
    parts = sorted(tmp_path.glob("log*"), key=lambda path: -int(path.suffix[1:] or 0))
    assert len(parts) > 3
    assert b"".join(part.read_bytes() for part in parts) == 2 * b"".join(
        b"%d\n" % n for n in range(1, 20_001)
    )


def test_notification(client: Client, tmp_path: Path) -> None:
    note = tmp_path / "note"
    job = client.start(
        sh("exit 5"),
        name="noted",
        notify=f"echo $ERRAND_BOY_JOB $ERRAND_BOY_NAME $ERRAND_BOY_STATUS $ERRAND_BOY_CAUSE >"
        f"{note}.new; mv {note}.new {note}",
    )
    until(note.exists)
    assert note.read_text().split() == [str(job.id), "noted", "5", "exit"]


# -- a start that fails --


@pytest.mark.parametrize(
    ("args", "options", "error", "name"),
    [
        (["/nonexistent"], {}, FileNotFoundError, "/nonexistent"),
        (["/etc/passwd"], {}, PermissionError, "/etc/passwd"),
        (["true"], {"cwd": "/nonexistent"}, FileNotFoundError, "/nonexistent"),
        (["true"], {"log": "/nonexistent/log"}, FileNotFoundError, "/nonexistent/log"),
    ],
)
def test_failed_start(
    served: tuple[Daemon, Client, Path],
    client: Client,
    args: list[str],
    options: dict[str, Any],
    error: type[OSError],
    name: str,
) -> None:
    _, _, directory = served
    for _ in range(3):  # at once: nothing of the first is in the way of the next
        with pytest.raises(error) as caught:
            client.start(args, name="fails", **options)
        assert caught.value.filename == name
    until(lambda: not files(directory))
    assert client.jobs(all=True) == []


@pytest.mark.parametrize(
    "options",
    [
        {"unknown": 1},
        {"dies_with_caller": True},
        {"tree": "cgroup"},
        {"stderr": subprocess.DEVNULL},
        {"stop": 99},
        {"notify": ["\0"]},
        {"notify": "true", "env": {"LONG": "x" * 70_000}},
    ],
)
def test_what_cannot_be_asked_for(client: Client, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        client.start(["true"], **options)
    assert client.jobs(all=True) == []


@pytest.mark.parametrize("name", ["", "a b", "12", "x" * 65, "a/b", "ä", "\n", "--all"])
def test_names_that_are_none(client: Client, name: str) -> None:
    with pytest.raises(JobError, match="a name has 1 to 64"):
        client.start(["true"], name=name)


# -- names, lists --


def test_names(client: Client) -> None:
    first = client.start(sh(FOREVER), name="build")
    with pytest.raises(JobError, match=f"job {first.id} runs under the name build"):
        client.start(["true"], name="build")
    first.stop()
    second = client.start(["true"], name="build")
    assert client.job("build").id == second.id != first.id
    assert client.job(first.id).id == client.job(str(first.id)).id == first.id
    second.wait(PATIENCE)
    unnamed = client.start(["true"])
    assert unnamed.name == f"true-{unnamed.id}"
    assert client.start(["./a b/c d!"], executable="/bin/true").name.startswith("c-d-")
    with pytest.raises(NoJobError, match="there is no job other"):
        client.job("other")
    with pytest.raises(LookupError):
        client.job(10**9)


def test_lists(client: Client) -> None:
    over = client.start(["true"])
    over.wait(PATIENCE)
    running = client.start(sh(FOREVER))
    assert [job.id for job in client.jobs()] == [running.id]
    assert [job.id for job in client.jobs(all=True)] == [over.id, running.id]
    assert running.pid is not None
    process = psutil.Process(running.pid)
    until(lambda: process.name() == "sleep")


def test_long_lists_come_in_parts(client: Client) -> None:
    words = ["true", *("\x01" * 90 for _ in range(3))]
    started = [client.start(words, name=f"n{n}").id for n in range(60)]
    assert [job.id for job in client.jobs(all=True)] == started
    assert client.jobs(all=True)[0].args == words


def test_long_commands_are_cut(client: Client) -> None:
    job = client.start(["true", "\udcff" * 100_000, "x"])
    assert job.wait(PATIENCE).returncode == 0
    assert client.job(job.id).args[0] == "true"
    assert len(client.job(job.id).args) == 2


# -- signals, stop, remove --


def test_stop(client: Client) -> None:
    job = client.start(sh(FOREVER))
    assert job.stop().returncode == -signal.SIGTERM
    assert job.stop().returncode == -signal.SIGTERM


def test_stop_takes_the_steps_of_the_start(client: Client) -> None:
    job = client.start(
        sh("trap 'exit 9' INT; echo ready; while :; do sleep 0.02; done"),
        stop=((signal.SIGINT, 20), signal.SIGKILL),
    )
    await_output(job, b"ready")
    assert client.job(job.id).stop().returncode == 9


@pytest.mark.slow
def test_stop_takes_further_steps(client: Client) -> None:
    job = client.start(sh("trap '' TERM; echo ready; while :; do sleep 0.02; done"))
    await_output(job, b"ready")
    result = job.stop(((signal.SIGTERM, 0.2), signal.SIGKILL))
    assert result.returncode == -signal.SIGKILL


def test_all_that_it_has_started_ends_with_it(client: Client) -> None:
    job = client.start(sh("setsid sleep 1000 & echo $!; exec sleep 1000"))
    await_output(job, b"\n")
    other = int(text(job))
    assert not has_ended(other)
    job.stop()
    until(lambda: has_ended(other))


def test_process_alone_is_stopped(client: Client) -> None:
    job = client.start(sh("sleep 1000 & echo $!; exec sleep 1000"), tree="process")
    await_output(job, b"\n")
    other = int(text(job))
    job.stop()
    assert not has_ended(other)
    os.kill(other, signal.SIGKILL)


def test_signal(client: Client) -> None:
    job = client.start(sh("trap 'echo got; exit 4' USR1; echo ready; while :; do sleep 0.02; done"))
    await_output(job, b"ready")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE).returncode == 4
    job.send_signal(signal.SIGUSR1)  # does nothing
    with pytest.raises(ValueError, match="not a signal"):
        job.send_signal(1000)


def test_remove(served: tuple[Daemon, Client, Path], client: Client) -> None:
    _, _, directory = served
    job = client.start(sh(FOREVER))
    with pytest.raises(JobError, match=f"job {job.id} is running: stop it first"):
        job.remove()
    job.stop()
    job.remove()
    until(lambda: not files(directory))
    for act in job.status, job.remove, job.wait, lambda: list(job.logs()):
        with pytest.raises(NoJobError):
            act()


def test_removed_while_somebody_follows(
    served: tuple[Daemon, Client, Path], client: Client
) -> None:
    """A client that has not read everything still gets it; the files go with the keeper."""
    _, _, directory = served
    size = 1 << 20
    job = client.start(sh(f"echo begin; cat; head -c {size} /dev/zero"), stdin=PIPE, ring=2 * size)
    events = job.logs(follow=True)
    assert data_of(next(events)) == b"begin\n"  # from the keeper, not from a file that it has left
    with job.attach(history=False) as attachment:
        attachment.end_input()
    until(lambda: job.status()["state"] == "ended")
    job.remove()
    assert client.jobs(all=True) == []
    assert len(data_of(*events)) == size
    until(lambda: not files(directory))


# -- followers --


def test_slow_follower_holds_up_nobody(client: Client) -> None:
    size = 8 << 20
    job = client.start(sh(f"echo begin; cat; head -c {size} /dev/zero; echo end"), stdin=PIPE)
    await_output(job, b"begin\n")
    slow = job.logs(follow=True)
    assert data_of(next(slow)) == b"begin\n"
    with job.attach(history=False) as attachment:
        attachment.end_input()
        assert job.wait(PATIENCE).returncode == 0  # and nobody has read on
    events = list(slow)
    missed = sum(event.size for event in events if isinstance(event, Missed))
    read = sum(len(event.data) for event in events if isinstance(event, Output))
    assert missed > 0
    assert missed + read == size + 4
    assert isinstance(events[-1], Output) and events[-1].data.endswith(b"end\n")


class Proxy:
    """Forwards connections to a daemon, and ends those of keepers after some bytes."""

    def __init__(self, path: Path, target: str, most: int) -> None:
        self.path, self._target, self._most = str(path), target, most
        self.cut = 0

    def new_socket(self, blocking: bool) -> socket.socket:
        """Like Client's, but the other end of a socket pair, with a thread that copies."""
        ours, theirs = socket.socketpair()
        real = socket.socket(socket.AF_UNIX)
        real.connect(self._target)
        threading.Thread(target=self._copy, args=(theirs, real, None), daemon=True).start()
        threading.Thread(target=self._copy, args=(real, theirs, self._most), daemon=True).start()
        ours.setblocking(blocking)
        return ours

    def _copy(self, source: socket.socket, to: socket.socket, most: int | None) -> None:
        left = most
        while True:
            data, fds, _, _ = socket.recv_fds(source, 4096 if left is None else min(left, 4096), 4)
            if not data:
                break
            socket.send_fds(to, [data], fds)
            for fd in fds:
                os.close(fd)
            if left is not None:
                left -= len(data)
                if left <= 0:
                    self.cut += 1
                    break
        for sock in source, to:
            sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_follower_goes_on_over_another_connection(client: Client, tmp_path: Path) -> None:
    """Each byte comes once, however often the connection breaks."""
    job = client.start(sh("seq 3000; sleep 0.1; seq 3000; sleep 0.1; seq 3000"))
    proxy = Proxy(tmp_path / "none", client.path, 9000)
    broken = Job(proxy, job.status())
    events = list(broken.logs(follow=True))
    assert proxy.cut > 2
    assert not [event for event in events if isinstance(event, Missed)]
    data = b"".join(event.data for event in events if isinstance(event, Output))
    assert data == 3 * b"".join(b"%d\n" % n for n in range(1, 3001))


# -- attached --


def test_input_of_who_attaches(client: Client) -> None:
    job = client.start(["cat"], stdin=PIPE)
    with job.attach() as attachment:
        assert attachment.write(b"hello\n") == 6
        assert attachment.read() == b"hello\n"
        assert attachment.fileno() >= 0
    with job.attach(history=True) as attachment:
        assert attachment.read(2) + attachment.read() == b"hello\n"
        attachment.write(b"x" * 300_000)
        got = b""
        while len(got) < 300_000:
            got += attachment.read()
        assert got == b"x" * 300_000
        attachment.end_input()
        assert attachment.read() == b""
        assert attachment.is_over
    assert job.wait(PATIENCE).returncode == 0


def test_attached_client_waits_for_output_as_long_as_it_wants_to(client: Client) -> None:
    """What the keeper says besides, such as that the command has its input, does not end that."""
    job = client.start(sh("head -c 40000 >/dev/null; sleep 0.3; echo done"), stdin=PIPE)
    with job.attach() as attachment:
        attachment.write(b"x" * 40_000)
        event = attachment.read_some(PATIENCE)
        assert isinstance(event, Output)
        assert event.data == b"done\n"
        assert attachment.read_some(PATIENCE) is None  # it is over


def test_input_that_is_lost_with_the_keeper(client: Client) -> None:
    job = client.start(sh(FOREVER), stdin=PIPE)
    with job.attach() as attachment:
        attachment.write(b"x" * 170_000)  # this returns when the pipe has taken some
        kill_keeper(job)
        assert attachment.read() == b""
        assert attachment.lost_input == 170_000 - (64 << 10)


def test_input_that_the_command_has_is_not_lost(client: Client) -> None:
    job = client.start(sh("echo begin; exec cat"), stdin=PIPE)
    with job.attach() as attachment:
        assert attachment.read() == b"begin\n"
        for line in b"a\n", b"b\n":
            attachment.write(line)
            assert attachment.read() == line
        kill_keeper(job)
        assert attachment.read() == b""
        assert attachment.lost_input == 0


def test_input_that_is_not_sent(client: Client) -> None:
    job = client.start(sh(FOREVER), stdin=PIPE)
    with job.attach() as attachment:
        attachment.write(b"x" * 170_000)
    assert attachment.lost_input == 170_000 - 2 * (64 << 10)  # the keeper has the rest


def test_two_are_attached_and_one_may_write(client: Client) -> None:
    job = client.start(["cat"], stdin=PIPE)
    with job.attach() as writer, job.attach(read_only=True) as reader:
        with pytest.raises(ValueError, match="read only"):
            reader.write(b"x")
        writer.write(b"for both\n")
        assert writer.read() == reader.read() == b"for both\n"
        assert reader.read_some(0) is None
        writer.end_input()
        assert writer.read() == reader.read() == b""


def test_window_is_the_smallest(client: Client) -> None:
    job = client.start(
        sh("trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done"), pty=(24, 80)
    )
    assert job.has_terminal
    await_output(job, b"ready")
    with job.attach(window=(30, 100)), job.attach(window=(40, 90)) as second:
        await_output(job, b"30 90\r\n")
        second.winsize = (20, 120)
        await_output(job, b"20 100\r\n")
    job.stop(signal.SIGKILL)


def test_what_was_on_the_terminal_long_before_is_not_shown_again(client: Client) -> None:
    job = client.start(sh("seq 1000; exec cat"), pty=True)
    await_output(job, b"1000\r\n")
    with job.attach(window=(10, 80)) as attachment:
        attachment.write(b"after\n")
        got = b""
        while b"after\r\nafter\r\n" not in got:
            got += attachment.read()
        assert b"\n1000\r\n" in got
        assert b"\n900\r\n" not in got
        attachment.end_input()
        assert attachment.read() == b""
    assert job.wait(PATIENCE).returncode == 0


# -- asyncio --


def test_asyncio(client: Client) -> None:
    async def main() -> None:
        its = errand_boy.asyncio.connect(client.path)
        job = await its.start(sh("echo one; read line; echo $line; exit 3"), "async", stdin=PIPE)
        assert [known.id for known in await its.jobs()] == [job.id]
        waiting = asyncio.create_task(job.wait(PATIENCE))
        with pytest.raises(subprocess.TimeoutExpired):
            await job.wait(0.01)
        async with aclosing(job.logs(follow=True)) as events:
            async for event in events:
                assert isinstance(event, Output) and event.data == b"one\n"
                break
        async with await job.attach(history=False) as attachment:
            await attachment.write(b"two\n")
            assert await attachment.read() == b"two\n"
            assert await attachment.read() == b""
        assert (await waiting).returncode == 3
        assert (await job.status())["state"] == "ended"
        found = await its.job("async")
        assert [event.data async for event in found.logs() if isinstance(event, Output)] == [
            b"one\n",
            b"two\n",
        ]
        await found.remove()
        with pytest.raises(NoJobError):
            await its.job("async")
        other = await its.start(sh(FOREVER))
        await other.send_signal(0)
        assert (await other.stop()).returncode == -signal.SIGTERM
        with pytest.raises(FileNotFoundError):
            await its.start(["/nonexistent"])

    asyncio.run(main())


def test_cancelled_start(client: Client) -> None:
    """No command is left."""

    async def main() -> None:
        its = errand_boy.asyncio.connect(client.path)
        for pause in (0, 0.001, 0.002, 0.004, 0.008):
            task = asyncio.create_task(its.start(sh(FOREVER)))
            await asyncio.sleep(pause)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                await (await task).stop()

    asyncio.run(main())
    until(lambda: not client.jobs())


# -- status, limits, audit --


def test_status(served: tuple[Daemon, Client, Path], client: Client) -> None:
    daemon, _, _ = served
    job = client.start(["true"], ring=8192)
    job.wait(PATIENCE)
    until(lambda: daemon.status()["jobs"]["jobs_running"] == 0)
    running = client.start(sh(FOREVER), pty=True)
    value = daemon.status()
    size = 4096 + 2 * 8192 + 4096 + 2 * (256 << 10)
    assert value["jobs"] == {"jobs_running": 1, "jobs_over": 1, "ring_bytes": size}
    (user,) = (user for user in value["users"] if user["uid"] == os.geteuid())
    assert (user["jobs_running"], user["jobs_over"]) == (1, 1)
    assert "1 jobs running, 1 over, their output in at most" in status.table(value)
    assert "\nerrand_boy_jobs_running 1\n" in status.metrics(value)
    running.stop()


@pytest.mark.slow
def test_limits(tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    ring = 3 * (4096 + 2 * 4096)
    limits.write_text(json.dumps({"default": {"jobs": 2, "kept_jobs": 3, "ring": ring}}))
    with keeping_jobs(tmp_path, "--limits", limits) as (daemon, client):
        options: dict[str, Any] = {"ring": 4096}
        with pytest.raises(JobError, match=f"may take {ring} bytes"):
            client.start(["true"], ring=1 << 20)
        running = [client.start(sh(FOREVER), **options) for _ in range(2)]
        with pytest.raises(JobError, match="has 2 jobs, and may have no more"):
            client.start(["true"], **options)
        running.pop().stop()
        until(lambda: daemon.status()["jobs"]["jobs_running"] == 1)
        for _ in range(5):  # those that are over make room for each
            job = client.start(["true"], **options)
            job.wait(PATIENCE)
            until(lambda: daemon.status()["jobs"]["jobs_running"] == 1)
            assert daemon.status()["jobs"]["ring_bytes"] <= ring
        limits.write_text(json.dumps({"default": {"kept_jobs": 3}}))
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "limits have been read" in daemon.log())
        for _ in range(5):
            job = client.start(["true"])
            job.wait(PATIENCE)
        until(lambda: daemon.status()["jobs"]["jobs_running"] == 1)
        assert daemon.status()["jobs"]["jobs_over"] == 3
        assert [known.id for known in client.jobs(all=True)][-1] == job.id
        assert len(files(tmp_path)) == 2 * 4 + 1  # and a socket
        running[0].stop()


def test_audit(tmp_path: Path) -> None:
    with keeping_jobs(tmp_path, "--log-commands", "json", "--log-format", "json") as found:
        daemon, client = found
        client.start(sh("exit 3"), name="x").wait(PATIENCE)
        with pytest.raises(FileNotFoundError):
            client.start(["/nonexistent"])

        def lines() -> list[dict[str, Any]]:
            entries = [json.loads(line) for line in daemon.log().splitlines()]
            return [entry for entry in entries if "job" in entry]

        until(lambda: len(lines()) == 4)
        # The end of the first may be seen after the start of the second.
        started, ended, *others = sorted(lines(), key=lambda entry: int(entry["job"]))
        assert (started["message"], started["name"], started["uid"]) == (
            "job started",
            "x",
            os.getuid(),
        )
        assert started["argv"] == sh("exit 3")
        assert (ended["message"], ended["job"], ended["status"]) == ("job ended", started["job"], 3)
        assert ended["client"] == os.getpid()
        assert [entry["message"] for entry in others] == ["job started", "job not started"]
        assert (others[1]["error"], others[1]["stage"]) == ("ENOENT", "exec")


def test_no_place(tmp_path: Path) -> None:
    place = tmp_path / "state"
    place.mkdir(mode=0o755)
    refused = pytest.raises(JobError, match=r"no place for jobs: .*mode 0700")
    with keeping_jobs(tmp_path) as (_, client), refused:
        client.start(["true"])


def test_place_of_another_daemon(served: tuple[Daemon, Client, Path], client: Client) -> None:
    _, _, directory = served
    client.start(["true"]).wait(PATIENCE)
    other = directory / "other"
    other.mkdir()
    places = "--job-state", directory / "state", "--job-runtime", directory / "run"
    with keeping_jobs(other, *places) as (_, second):
        with pytest.raises(JobError, match="another daemon keeps its jobs in"):
            second.start(["true"])
        with pytest.raises(JobError, match="another daemon keeps its jobs in"):
            second.jobs()


@pytest.mark.slow
def test_cost_of_a_job(client: Client) -> None:
    """The keeper is small, and the server does not slow jobs down."""
    job = client.start(sh(FOREVER))
    keeper = keeper_of(job)
    memory = keeper.memory_full_info()
    assert memory.uss <= 250 << 10  # bytes, with what the kernel counts of its stack
    assert resource.getpagesize() == 4096
    job.stop()
