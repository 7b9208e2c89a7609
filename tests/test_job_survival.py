"""Jobs outlive their client, and upgrades and the end of the daemon; losses are reported."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, has_ended, until
from daemon import Daemon, started_daemon
from jobs import (
    await_output,
    end_all,
    files,
    keeper_of,
    keepers,
    keeping_jobs,
    kill_keeper,
    text,
)

import errand_boy
from errand_boy import JobLostError
from errand_boy._client.client import Client
from errand_boy._jobs.blocking import Job, Missed, Output
from errand_boy._native import lib
from errand_boy._wire import frames

FEW = 30


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Start daemons for the same jobs, one after another."""

    @contextmanager
    def daemon() -> Iterator[tuple[Daemon, Client]]:
        options = "--job-state", tmp_path / "state", "--job-runtime", tmp_path / "run"
        with started_daemon(tmp_path, *options, "--log-commands") as started:
            client = errand_boy.connect(started.path)
            yield started, client
            client.close()

    yield daemon
    end_all(tmp_path)


def upgrade(daemon: Daemon) -> None:
    daemon.process.send_signal(signal.SIGUSR2)
    assert daemon.notify.recv(100).startswith(b"RELOADING=1")
    assert daemon.notify.recv(100) == b"READY=1"


def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait(PATIENCE)


def waiting(path: Path, more: str = "exit 5") -> list[str]:
    """Return a command that writes a line, and a second one after a line comes from `path`."""
    os.mkfifo(path)
    return ["/bin/sh", "-c", f"echo begin; cat {path}; {more}"]


@pytest.mark.slow
def test_upgrade(places: Callable[[], Any], tmp_path: Path) -> None:
    with places() as (daemon, client):
        job = client.start(waiting(tmp_path / "fifo"), name="kept")
        events = job.logs(follow=True)
        assert next(events) is not None
        found: list[int] = []
        waiter = threading.Thread(target=lambda: found.append(job.wait(PATIENCE).returncode))
        waiter.start()
        upgrade(daemon)
        assert client.job("kept").state == "running"
        until(lambda: daemon.status()["jobs"]["jobs_running"] == 1)
        (tmp_path / "fifo").write_bytes(b"end\n")
        assert [event.data for event in events if isinstance(event, Output)] == [b"end\n"]
        waiter.join(PATIENCE)
        assert found == [5]
        until(lambda: daemon.status()["jobs"]["jobs_running"] == 0)
        assert daemon.log().count("job ended") == 1
        job.remove()
        until(lambda: not files(tmp_path))


@pytest.mark.slow
def test_killed_daemon(places: Callable[[], Any], tmp_path: Path) -> None:
    """Its followers notice nothing; the next one finds the jobs."""
    with places() as (daemon, client):
        job = client.start(waiting(tmp_path / "fifo"), name="kept")
        over = client.start(["true"], name="over")
        over.wait(PATIENCE)
        events = job.logs(follow=True)
        assert next(events) is not None
        kill(daemon)
        with pytest.raises(errand_boy.NoDaemonError):
            client.jobs()
    with places() as (daemon, client):
        found = client.job("kept")
        assert (found.state, found.id, found.pid) == ("running", job.id, job.pid)
        assert client.job("over").returncode == 0
        with found.attach(read_only=True) as attachment:
            assert attachment.read() == b"begin\n"
            (tmp_path / "fifo").write_bytes(b"end\n")
            assert attachment.read() == b"end\n"
            assert attachment.read() == b""
        assert [event.data for event in events if isinstance(event, Output)] == [b"end\n"]
        assert found.wait(PATIENCE).returncode == 5
        until(lambda: daemon.status()["jobs"]["jobs_running"] == 0)
        assert client.start(["true"], name="next").id > over.id
        until(lambda: daemon.status()["jobs"]["jobs_running"] == 0)
        assert daemon.log().count("job ended") == 3


@contextmanager
def ending_daemon(path: Path) -> Iterator[Client]:
    """A daemon that ends as soon as it has answered two requests about a job that runs."""
    entry = {"id": 1, "uid": os.getuid(), "name": "x", "state": "running", "pid": 1, "argv": []}

    def serve(listener: socket.socket) -> None:
        for reply in {"jobs": [entry], "next": None}, entry:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                sock.sendall(frames.frame(lib.EB_JOB_REPLY, [json.dumps(reply).encode()]))
                if reply is entry:
                    listener.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=[listener], daemon=True)
        thread.start()
        yield errand_boy.connect(path)
        thread.join(PATIENCE)


@pytest.mark.parametrize(
    "act",
    [
        lambda job: job.send_signal(signal.SIGTERM),
        lambda job: list(job.logs(follow=True)),
        lambda job: job.attach().read(),
    ],
)
def test_daemon_that_ends_before_the_keeper_has_the_client(
    tmp_path: Path, act: Callable[[Any], object]
) -> None:
    with ending_daemon(tmp_path / "socket") as client:
        job = client.job(1)
        with pytest.raises(
            errand_boy.NoDaemonError, match="job 1 does not depend on it: ask again"
        ):
            act(job)


def test_daemon_that_ends_during_a_start(tmp_path: Path) -> None:
    with ending_daemon(tmp_path / "socket") as client:
        client.job(1)
        with pytest.raises(
            errand_boy.NoDaemonError, match="ended before it had the command started"
        ):
            client.start(["true"])


@pytest.mark.slow
def test_daemon_that_ends_before_the_job(places: Callable[[], Any], tmp_path: Path) -> None:
    """The keeper tells those who wait of the end, but not how the job ended."""
    with places() as (daemon, client):
        job = client.start(waiting(tmp_path / "fifo"))
        events = job.logs(follow=True)
        next(events)
        with ThreadPoolExecutor() as pool:
            waits = [
                pool.submit(act) for act in (job.wait, lambda: job.stop([(signal.SIGURG, 99)]))
            ]
            (keeper,) = keepers(tmp_path)
            until(lambda: len(keeper.net_connections("unix")) >= 4)
            kill(daemon)
            (tmp_path / "fifo").write_bytes(b"end\n")
            for wait in waits:
                with pytest.raises(errand_boy.NoDaemonError, match="does not depend on it"):
                    wait.result()
        assert [event.data for event in events if isinstance(event, Output)] == [b"end\n"]
    with places() as (_, client):
        assert client.job(job.id).wait(PATIENCE).returncode == 5


@pytest.mark.slow
def test_end_without_a_daemon(places: Callable[[], Any], tmp_path: Path) -> None:
    with places() as (daemon, client):
        client.start(waiting(tmp_path / "fifo"), name="kept")
        (keeper,) = keepers(tmp_path)
        assert daemon.stop() == 0
    (tmp_path / "fifo").write_bytes(b"end\n")
    until(lambda: has_ended(keeper.pid))
    for _ in range(2):
        with places() as (daemon, client):
            job = client.job("kept")
            assert job.wait(0).returncode == 5
            assert text(job) == b"begin\nend\n"
            until(lambda: daemon.status()["jobs"]["jobs_over"] == 1)
            assert daemon.log().count("job ended") == 1  # of all daemons, once
            assert client.jobs() == []
            assert daemon.stop() == 0


@pytest.mark.slow
def test_stopped_while_no_daemon_knew_it(places: Callable[[], Any], tmp_path: Path) -> None:
    with places() as (daemon, client):
        client.start(["sleep", "1000"], name="kept")
        kill(daemon)
    with places() as (_, client):
        assert client.job("kept").stop().returncode == -signal.SIGTERM
        client.job("kept").remove()
        until(lambda: not files(tmp_path))


def test_killed_keeper(tmp_path: Path) -> None:
    with keeping_jobs(tmp_path) as (daemon, client):
        job = client.start(
            ["/bin/sh", "-c", "seq 1000; setsid sleep 1000 & exec sleep 1000"], name="x"
        )
        await_output(job, b"1000\n")
        events = job.logs(follow=True)
        before = next(events)
        pid = job.pid
        assert isinstance(before, Output) and pid is not None
        kill_keeper(job)
        assert job.status()["state"] == "lost"
        assert job.status()["why"] == "killed"
        until(lambda: has_ended(pid))  # and with it all that it had started
        for act in job.wait, job.stop:
            with pytest.raises(JobLostError, match=f"job {job.id} is lost: .*killed"):
                act()
        rest = b"".join(event.data for event in events if isinstance(event, Output))
        numbers = b"".join(b"%d\n" % n for n in range(1, 1001))
        assert before.data + rest == text(job) == numbers
        until(lambda: "a job is lost" in daemon.log())
        with job.attach(read_only=True) as attachment:
            assert attachment.read(5) == b"1\n2\n3"
        assert job.returncode is None
        assert client.start(["true"], name="x").wait(PATIENCE).returncode == 0  # the name is free
        job.remove()
        client.job("x").remove()
        until(lambda: not files(tmp_path))


@pytest.mark.parametrize("with_daemon", [False, True])
@pytest.mark.parametrize("tree", ["all", "group", "process"])
def test_command_that_is_left(
    places: Callable[[], Any], tmp_path: Path, tree: str, with_daemon: bool
) -> None:
    """All that would end it is killed at once: that is told, and it can be stopped."""
    with places() as (daemon, client):
        job = client.start(waiting(tmp_path / "fifo"), tree=tree, process_group=0, name="x")
        await_output(job, b"begin\n")
        pid = job.pid
        assert pid is not None
        until(psutil.Process(pid).children, "the start of cat")
        (child,) = psutil.Process(pid).children()
        parents = parents_up_to_keeper(job)
        assert len(parents) == (3 if tree == "all" else 1)
        if with_daemon:
            kill(daemon)
        kill_at_once(parents)
        if not with_daemon:
            check_left(client, pid, child, tree)
    if with_daemon:
        with places() as (_, client):
            check_left(client, pid, child, tree)


def parents_up_to_keeper(job: Job) -> list[psutil.Process]:
    """Return a command's supervisor and its guard, if there are any, and its keeper."""
    found: list[psutil.Process] = []
    parent: Any = psutil.Process(job.pid)
    while not found or found[-1] != keeper_of(job):
        parent = parent.parent()
        found.append(parent)
    return found


def kill_at_once(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.suspend()
        until(lambda process=process: process.status() == psutil.STATUS_STOPPED)  # type: ignore[misc]
    for process in processes:
        process.kill()
    for process in processes:
        until(lambda process=process: has_ended(process.pid))  # type: ignore[misc]


def check_left(client: Client, pid: int, child: psutil.Process, tree: str) -> None:
    until(lambda: client.job("x").state == "lost")
    (job,) = client.jobs(all=True)
    assert (job.is_left, job.pid) == (True, pid)
    assert text(job) == b"begin\n"
    told = f"job 1 is lost: .*killed.*; its command still runs as process {pid}$"
    with pytest.raises(JobLostError, match=told):
        job.wait()
    with pytest.raises(errand_boy.JobError, match=f"runs as process {pid}: stop it first"):
        job.remove()
    with pytest.raises(JobLostError, match=r"killed, or could not write its journal$"):
        job.stop()
    assert has_ended(pid)
    if tree == "process":
        assert not has_ended(child.pid)
        child.kill()
    until(lambda: has_ended(child.pid))
    assert not client.job("x").is_left
    job.remove()


def test_process_with_the_number_of_a_command_is_left_alone(
    places: Callable[[], Any], tmp_path: Path
) -> None:
    """The time of its start tells it."""
    with places() as (daemon, client):
        job = client.start(["sleep", "1000"], tree="process", name="x")
        pid = job.pid
        assert pid is not None
        kill(daemon)
        end_all(tmp_path)
    journal = tmp_path / "state" / str(os.geteuid()) / f"{job.id}.job"
    begun = json.loads(journal.read_text().splitlines()[1])["begun"]
    journal.write_text(journal.read_text().replace(str(begun), str(begun + 1)))
    with places() as (daemon, client):
        until(lambda: client.job("x").state == "lost")
        assert not client.job("x").is_left
        with pytest.raises(JobLostError):
            client.job("x").stop(signal.SIGKILL)
        assert not has_ended(pid)
        client.job("x").remove()
    os.kill(pid, signal.SIGKILL)
    until(lambda: has_ended(pid))


@pytest.mark.slow
def test_killed_keeper_leaves_whole_records(tmp_path: Path) -> None:
    """At any moment of the kill, the kept output is what was written, without a gap."""
    with keeping_jobs(tmp_path) as (_, client):
        for attempt in range(8):
            job = client.start(["seq", "1", "100000000"], ring=16 << 10)
            until(lambda job=job: text(job) != b"")  # type: ignore[misc]
            select_for(0.003 * attempt)
            kill_keeper(job)
            events = list(job.logs())
            data = b"".join(event.data for event in events if isinstance(event, Output))
            assert sum(isinstance(event, Missed) for event in events) <= 1
            lines = data.split(b"\n")[1:-1]
            first = int(lines[0])
            assert lines == [b"%d" % n for n in range(first, first + len(lines))]
            job.remove()


def select_for(seconds: float) -> None:
    """Wait, while commands run, for a while."""
    threading.Event().wait(seconds)


@pytest.mark.slow
def test_killed_with_the_daemon(places: Callable[[], Any], tmp_path: Path) -> None:
    with places() as (daemon, client):
        job = client.start(waiting(tmp_path / "fifo"), name="both")
        await_output(job, b"begin\n")
        keeper = keeper_of(job)
        kill(daemon)
        keeper.kill()
        until(lambda: has_ended(keeper.pid))
    with places() as (daemon, client):
        assert client.job("both").status()["why"] == "killed"
        assert text(client.job("both")) == b"begin\n"
        until(lambda: daemon.status()["jobs"]["jobs_over"] == 1)


@pytest.mark.slow
def test_jobs_after_a_reboot_are_lost(places: Callable[[], Any], tmp_path: Path) -> None:
    """There are no rings and no locks any more, but the list still shows what was running."""
    with places() as (daemon, client):
        job = client.start(waiting(tmp_path / "fifo"), name="build")
        over = client.start(["echo", "word"], name="over")
        over.wait(PATIENCE)
        assert daemon.stop() == 0
    end_all(tmp_path)
    for path in (tmp_path / "run" / str(os.geteuid())).iterdir():
        path.unlink()
    journal = tmp_path / "state" / str(os.geteuid()) / f"{job.id}.job"
    first, *rest = journal.read_text().splitlines()
    entry = {**json.loads(first), "boot_id": "another"}
    journal.write_text("\n".join([json.dumps(entry), *rest]) + "\n")
    with places() as (daemon, client):
        assert client.jobs() == []
        found, other = client.jobs(all=True)
        assert (found.name, found.state, found.args) == ("build", "lost", job.args)
        assert found.status()["why"] == "reboot"
        assert (other.name, other.state, other.returncode) == ("over", "ended", 0)
        assert list(found.logs()) == []
        assert list(other.logs()) == [Missed(1, 5)]
        with pytest.raises(JobLostError, match="the machine went down"):
            found.wait()
        for one in found, other:
            one.remove()
        until(lambda: not files(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\0" * 4096, b"[1]\n", b"[" * 60_000, b'{"name": 5, "ring": -1}\n{"pid": "x"}\n'],
)
def test_damaged_journal(places: Callable[[], Any], tmp_path: Path, damage: bytes) -> None:
    """It harms no other job."""
    with places() as (daemon, client):
        job, other = client.start(["true"]), client.start(["true"], name="other")
        job.wait(PATIENCE)
        other.wait(PATIENCE)
        kill(daemon)
    until(lambda: not keepers(tmp_path))
    journal = tmp_path / "state" / str(os.geteuid()) / f"{job.id}.job"
    journal.write_bytes(damage)
    with places() as (daemon, client):
        assert client.job("other").returncode == 0
        assert [known.id for known in client.jobs(all=True)] == [other.id]
        assert client.start(["true"]).wait(PATIENCE).returncode == 0
        assert "internal error" not in daemon.log()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["run", "state", "run/{uid}", "state/{uid}"])
def test_directory_that_somebody_removes(tmp_path: Path, part: str) -> None:
    """It is made again for the next job; those that ran can't be reached, which their user is told.

    The rest of what was there is lost as that of a machine that has gone down.
    """
    with keeping_jobs(tmp_path) as (daemon, client):
        job = client.start(["sleep", "1000"], name="before")
        over = client.start(["echo", "word"])
        over.wait(PATIENCE)
        keeper = keeper_of(job)
        shutil.rmtree(tmp_path / part.format(uid=os.getuid()))
        after = client.start(["echo", "after"])
        assert (after.id, after.wait(PATIENCE).returncode) == (3, 0)
        assert text(after) == b"after\n"
        is_told = "has been removed: made again" in daemon.log()
        assert is_told == ("/" not in part)
        reason = f"can't be reached.* is process {job.pid}$|the journal of job 1: No such file"
        for act in job.wait, job.stop, job.attach, lambda: job.send_signal(9), lambda: text(job):
            with pytest.raises(errand_boy.JobError, match=reason):
                act()
        if part.startswith("run"):
            assert list(over.logs()) == [Missed(1, 5)]
        keeper.kill()
        until(lambda: has_ended(keeper.pid))
        if part.startswith("run"):
            until(lambda: job.status()["state"] == "lost")
        assert client.start(["true"], name="before").wait(PATIENCE).returncode == 0


@pytest.mark.parametrize("damage", ["magic", "offset", "head", "record", "short", "empty"])
def test_damaged_ring(tmp_path: Path, damage: str) -> None:
    with keeping_jobs(tmp_path) as (_, client):
        job = client.start(["seq", "1000"])
        job.wait(PATIENCE)
        ring = tmp_path / "run" / str(os.geteuid()) / f"{job.id}.ring"
        data = bytearray(ring.read_bytes())
        if damage == "magic":
            data[:4] = b"oops"
        elif damage == "offset":
            data[16:24] = b"\xff" * 8
        elif damage == "head":
            data[32:40] = b"\xff" * 8
        elif damage == "record":
            data[4096 + 16 : 4096 + 20] = b"\xff" * 4
        elif damage == "short":
            del data[5000:]
        else:
            data.clear()
        ring.write_bytes(data)
        with pytest.raises(errand_boy.JobError, match=f"the output of job {job.id}"):
            list(job.logs())


def test_ring_without_the_last_records(tmp_path: Path) -> None:
    """The keeper could not write them; how much there was is in the journal."""
    with keeping_jobs(tmp_path) as (_, client):
        job = client.start(["sh", "-c", "echo out; echo error >&2"])
        job.wait(PATIENCE)
        until(lambda: not keepers(tmp_path))
        with next(tmp_path.glob("run/*/*.ring")).open("r+b") as ring:
            ring.seek(16 + 40)  # the second ring's: offset, capacity, head, tail, lost
            offset, capacity, _, tail, lost = struct.unpack("=5Q", ring.read(40))
            ring.seek(-40, os.SEEK_CUR)
            ring.write(struct.pack("=5Q", offset, capacity, tail, tail, lost))
        assert Missed(2, len("error\n")) in list(job.logs())


@pytest.mark.slow
def test_keeper_that_does_not_answer(tmp_path: Path) -> None:
    """A stopped keeper delays only its own clients, and these get an error in time."""
    with keeping_jobs(tmp_path, "--patience", "3") as (_, client):
        job = client.start(["sleep", "1000"])
        other = client.start(["sleep", "1000"])
        keeper = keeper_of(job)
        keeper.suspend()
        threads, refused = [], []

        def follow() -> None:
            try:
                list(job.logs())
            except errand_boy.RefusedError as error:
                refused.append(str(error))

        for _ in range(40):
            threads.append(threading.Thread(target=follow))
            threads[-1].start()
        until(lambda: refused)
        assert "does not answer" in refused[0]
        assert job.status()["state"] == "running"
        assert other.stop().returncode == -signal.SIGTERM
        keeper.resume()
        for thread in threads:
            thread.join(PATIENCE)
        job.stop()


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_many_jobs_with_followers_while_the_daemon_changes(
    places: Callable[[], Any], tmp_path: Path
) -> None:
    """What tests/soak_jobs.py does with a thousand."""
    from soak_jobs import Soak  # noqa: PLC0415

    soak = Soak(tmp_path, jobs=FEW, upgrades=3, kills=2, seed=random.randrange(1 << 30))
    soak.run()
    assert soak.wrong == [], soak
    until(lambda: not keepers(tmp_path))
