"""The server with malformed requests about jobs, and with journals that lie."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, has_ended, script_environment, until
from daemon import Daemon, acting_as, started_daemon
from jobs import files, keeper_of, keepers, keeping_jobs, text

import errand_boy
from errand_boy import NoJobError
from errand_boy._client.client import Client
from errand_boy._jobs.blocking import Job
from errand_boy._native import lib
from errand_boy._wire import frames

START, LIST = lib.EB_JOB_START, lib.EB_JOB_LIST
OPEN, REMOVE = lib.EB_JOB_OPEN, lib.EB_JOB_REMOVE
UID = 1001


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    places = "--job-state", tmp_path / "state", "--job-runtime", tmp_path / "run"
    with started_daemon(tmp_path, *places) as daemon:
        yield daemon


def answer(daemon: Daemon, operation: int, request: str) -> dict[str, Any]:
    """Return the one answer, after which the daemon ends the connection."""
    payload = struct.pack("<IB", lib.EB_VERSION, operation) + request.encode()
    data = b""
    with daemon.socket() as sock:
        sock.sendall(b"\0" + frames.frame(lib.EB_JOB, [payload]))
        while part := sock.recv(1 << 16):
            data += part
    length, kind = frames.HEADER.unpack_from(data)
    assert (length, kind) == (len(data) - frames.HEADER.size, lib.EB_JOB_REPLY), data
    reply: dict[str, Any] = json.loads(data[frames.HEADER.size :])
    return reply


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "request_text", "reason"),
    [
        (START, "", "the request is not a JSON object"),
        (START, "[]", "the request is not a JSON object"),
        (START, nested(1900), "the request is not a JSON object"),
        (START, '{"argv": "a"}', "argv must be of type list"),
        (START, '{"argv": [1]}', "argv must be strings"),
        (START, '{"argv": ["\\ud800"]}', "argv and cwd must be what a system call takes"),
        (START, '{"cwd": "/\\ud800"}', "argv and cwd must be what a system call takes"),
        (START, '{"ring": NaN}', "ring must be of type int"),
        (START, '{"ring": true}', "ring must be of type int"),
        (START, '{"name": "a\\n2026 ended"}', "a name has 1 to 64 letters"),
        (START, '{"name": "\\ud800"}', "a name has 1 to 64 letters"),
        (START, '{"log": "a"}', "log must be an absolute path"),
        (START, '{"log": "/\\u0000"}', "log must be an absolute path"),
        (START, '{"log": "/\\ud800"}', "log must be an absolute path"),
        (START, '{"log": "/a", "log_size": -1}', "log_size: -1 is out of range"),
        (START, '{"log": "/a", "log_count": 1e3}', "log_count must be of type int"),
        (START, '{"whom": "everybody"}', "whom must be one of"),
        (START, '{"stop": [[15, NaN]]}', "stop must be signals"),
        (START, '{"stop": [15]}', "stop must be signals"),
        (LIST, '{"after": [1, 2, 3]}', "after must be two numbers"),
        (LIST, '{"after": [true, 1]}', "after must be two numbers"),
        (LIST, '{"uid": "0"}', "uid must be a number"),
        (LIST, '{"uid": 4294967296}', "uid must be a number"),
        (OPEN, f'{{"job": "{"9" * 4000}"}}', "there is no job 9999"),
        (OPEN, '{"job": NaN}', "there is no job nan"),
        (OPEN, '{"job": "\\u00b2"}', "there is no job"),
        (OPEN, '{"job": -1, "uid": -1}', "there is no job -1"),
        (REMOVE, '{"job": null}', "there is no job None"),
        (99, "{}", "there is no operation 99"),
    ],
)
def test_malformed(daemon: Daemon, operation: int, request_text: str, reason: str) -> None:
    assert reason in answer(daemon, operation, request_text)["error"]
    assert "internal error" not in daemon.log()
    assert answer(daemon, LIST, '{"all": true}') == {"jobs": [], "next": None}


@pytest.mark.parametrize(
    ("operation", "name"), [(START, "stop"), (START, "name"), (START, "argv"), (OPEN, "job")]
)
def test_nested_at_the_limit_of_the_stack(daemon: Daemon, operation: int, name: str) -> None:
    """A value that can just be decoded may be too deep to encode, or to show."""
    for depth in *range(900, 1000, 7), 1500:
        assert answer(daemon, operation, f'{{"{name}": {nested(depth)}}}').keys() >= {"error"}
    assert "internal error" not in daemon.log()


# Journals


ENTRY = {"argv": ["true"], "cwd": "/", "started": 1e9, "boot_id": "", "pty": False, "ring": 4096}
USAGE = '"usage": [0, 0, 0, 0, 0, 0, 0, 0, 0]'


def write_journals(directory: Path, lines: Sequence[str], **entry: object) -> None:
    """Write a journal for each of the lines, as if by its keeper."""
    for part in "state", f"state/{os.geteuid()}":
        (directory / part).mkdir(0o700)
    for number, line in enumerate(lines, 1):
        path = directory / "state" / str(os.geteuid()) / f"{number}.job"
        path.write_text(json.dumps({**ENTRY, "name": f"job-{number}", **entry}) + f"\n{line}\n")


def test_keepers_lies_are_not_passed_on(tmp_path: Path) -> None:
    """A keeper is a process of its user, and root lists all jobs."""
    lies = [
        '{"pid": 1, "keeper": 1099511627776}',
        '{"pid": -1, "keeper": -1}',
        '{"pid": 9223372036854775808}',
        f'{{"pid": 1, "ended": 1, {USAGE}, "status": 9223372036854775808}}',
        f'{{"pid": 1, "ended": 1, {USAGE}, "status": 127}}',
        f'{{"pid": 1, "ended": 1, {USAGE}, "status": -1}}',
        f'{{"pid": 1, "ended": NaN, {USAGE}, "status": 0}}',
        '{"pid": 1, "ended": 1, "status": 0, "usage": [1]}',
        f'{{"pid": 1, "ended": 1, {USAGE}, "status": 0, "tree": [1], "bytes": [], "cause": 1e99}}',
        '{"pid": 1, "failed": []}',
        '{"pid": 1, "failed": [1e9, 1, 1]}',
        '{"pid": 1, "why": []}',
        '{"pid": 1, "argv": ["\\u001b[2J"], "uid": 1, "id": 1000, "name": "root"}',
        "[" * 1000,
        '{"pid": 1, "a": ' * 1000,
    ]
    write_journals(tmp_path, lies)
    places = "--job-state", tmp_path / "state", "--job-runtime", tmp_path / "run"
    with started_daemon(tmp_path, *places, "--log-commands") as daemon:
        found = answer(daemon, LIST, '{"all": true}')["jobs"]
        assert {(entry["uid"], entry["argv"][0]) for entry in found} == {(os.geteuid(), "true")}
        for job in errand_boy.connect(daemon.path).jobs(all=True):
            assert job.state in ("lost", "ended", "failed")
            assert job.name == f"job-{job.id}"
            if job.state == "ended":
                result = job.wait(0)
                assert (result.returncode, result.cause, result.bytes) == (0, "exit", (0, 0))
                assert result.rusage.ru_maxrss == result.peak_memory == 0
        assert "internal error" not in daemon.log()


def test_terminal_gets_no_control_characters(tmp_path: Path) -> None:
    argv = ["\33]0;title\7", "a\nroot 9 running", "\udcff", "\ud800", "é b", "\u202e"]
    write_journals(tmp_path, ['{"pid": 1}'], argv=argv)
    places = "--job-state", tmp_path / "state", "--job-runtime", tmp_path / "run"
    with started_daemon(tmp_path, *places) as daemon:
        command = [sys.executable, "-m", "errand_boy", "ps", "--all", "--socket", daemon.path]
        environment = {**script_environment(), "PYTHONUTF8": "1"}
        out = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    _, line = out.decode().splitlines()
    assert line.isprintable()
    assert line.endswith("'é b' '\\u202e'")


# Output


def opened(daemon: Daemon, job: Job) -> int:
    """Return a descriptor of the output of a job that is over."""
    request = struct.pack("<IB", lib.EB_VERSION, OPEN) + b'{"job": %d}' % job.id
    with daemon.socket() as sock:
        sock.sendall(b"\0" + frames.frame(lib.EB_JOB, [request]))
        _, fds, _, _ = socket.recv_fds(sock, 1 << 16, 2)
    (fd,) = fds
    return fd


def test_who_keeps_removed_output_open_keeps_no_room(tmp_path: Path) -> None:
    """Nobody would count that room any more, and all users share /run."""
    with keeping_jobs(tmp_path) as (daemon, client):
        job = client.start(["head", "-c", "100000", "/dev/zero"])
        job.wait(PATIENCE)
        fd = opened(daemon, job)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert os.fstat(fd).st_size > 100000
        events = job.logs()
        next(events)
        job.remove()
        until(lambda: os.fstat(fd).st_size == 0)
        os.close(fd)
        with pytest.raises(NoJobError):
            list(job.logs())


# A keeper that has been stopped by its user


def test_end_while_the_daemon_can_open_nothing(tmp_path: Path) -> None:
    """The journal is read when that is possible again; the job is not taken for one without any."""
    with keeping_jobs(tmp_path, "--log-level", "debug") as (daemon, client):
        job = client.start(["sh", "-c", "read x; echo word; exit 3"], stdin=-1)
        keeper = keeper_of(job)
        with job.attach(history=True) as attachment:
            limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
            attachment.write(b"\n")
            assert attachment.read() == b"word\n"
        until(lambda: has_ended(keeper.pid))
        until(lambda: "a job's journal" in daemon.log())
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)
        assert job.wait(PATIENCE).returncode == 3
        assert text(job) == b"word\n"


def test_who_waits_for_a_stopped_keeper_and_goes_is_forgotten(tmp_path: Path) -> None:
    with keeping_jobs(tmp_path) as (daemon, client):
        server = psutil.Process(daemon.process.pid)
        job = client.start(["sleep", "1000"])
        keeper = keeper_of(job)
        keeper.suspend()
        request = struct.pack("<IB", lib.EB_VERSION, OPEN) + b'{"job": 1}'
        before = server.num_fds()
        waiting = [daemon.socket() for _ in range(100)]
        for sock in waiting:
            sock.sendall(b"\0" + frames.frame(lib.EB_JOB, [request]))
        until(lambda: server.num_fds() > before + 50)
        assert [found.id for found in client.jobs()] == [job.id]
        for sock in waiting:
            sock.close()
        until(lambda: server.num_fds() <= before)
        assert "does not answer" not in daemon.log()
        keeper.resume()
        assert job.stop(signal.SIGKILL).returncode == -signal.SIGKILL


# Numbers


def restarted(daemon: Daemon, directory: Path) -> AbstractContextManager[tuple[Daemon, Client]]:
    """Kill a daemon; the next one takes over its jobs."""
    daemon.process.kill()
    daemon.process.wait(PATIENCE)
    return keeping_jobs(directory)


@pytest.mark.slow
def test_number_of_a_removed_job_is_not_given_again(tmp_path: Path) -> None:
    """Otherwise whoever remembers the number would see another job."""
    with keeping_jobs(tmp_path) as (daemon, client):
        job = client.start(["true"])
        job.wait(PATIENCE)
        job.remove()
        until(lambda: not files(tmp_path))
        with restarted(daemon, tmp_path) as (_, other):
            assert other.start(["true"]).id == job.id + 1
            with pytest.raises(NoJobError):
                job.status()


@pytest.mark.slow
def test_removed_job_whose_keeper_lives_stays_removed(tmp_path: Path) -> None:
    """It waits for a follower that does not read."""
    with keeping_jobs(tmp_path) as (daemon, client):
        job = client.start(["sh", "-c", "read x; head -c 1000000 /dev/zero"], stdin=subprocess.PIPE)
        follower = job.attach()
        follower.write(b"\n")
        job.wait(PATIENCE)
        job.remove()
        assert client.jobs(all=True) == []
        with restarted(daemon, tmp_path) as (_, other):
            assert keepers(tmp_path)
            assert other.jobs(all=True) == []
            with pytest.raises(NoJobError):
                other.job(job.id)
            follower.close()
            until(lambda: not files(tmp_path))


def test_log_is_made_with_the_clients_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with keeping_jobs(tmp_path, umask=0o022) as (_, client):
            log = tmp_path / "output"
            client.start(["echo", "secret"], log=log).wait(PATIENCE)
            client.start(["echo", "secret"], log=tmp_path / "shared", umask=0o027).wait(PATIENCE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o640


# Users


@pytest.mark.slow
def test_long_time_out(tmp_path: Path) -> None:
    """poll(2) takes less than a month."""
    with keeping_jobs(tmp_path) as (_, client):
        for seconds in 30 * 86400, 1e300:
            assert client.start(["sleep", "0.2"]).wait(seconds).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run", "--detach", "--ring=infK", "true"], "'infK' is not a size"),
        (["run", "--detach", "--ring=K", "true"], "'K' is not a size"),
        (["logs", "--since=yesterday", "1"], "'yesterday' is not a time"),
        (["logs", "--since=0001-01-01", "1"], "'0001-01-01' is not a time"),
    ],
)
def test_mistaken_arguments(arguments: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "errand_boy", *arguments]
    done = subprocess.run(command, env=script_environment(), capture_output=True, text=True)
    assert done.returncode in (2, 125)
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def hunt(uid: int) -> None:
    """Exit with status 1 as soon as that user gets a descriptor of a keeper's. Never returns."""
    status = 2
    try:
        libc = ctypes.CDLL(None)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        while True:
            for name in filter(str.isdecimal, os.listdir("/proc")):
                with suppress(OSError):
                    if b"keeper of a job" in Path(f"/proc/{name}/cmdline").read_bytes():
                        pidfd = os.pidfd_open(int(name))
                        if libc.syscall(438, pidfd, 5, 0) >= 0:  # pidfd_getfd
                            status = 1
                            return
                        os.close(pidfd)
    finally:
        os._exit(status)


@pytest.mark.root
def test_keeper_is_closed_to_its_user_during_any_start(public_dir: Path) -> None:
    """For oom_score_adj it is dumpable for a moment; its files are in the daemon's directories."""
    with keeping_jobs(public_dir, "--allow-uid", UID) as (daemon, client):
        os.chmod(daemon.path, 0o777)
        hunter = os.fork()
        if hunter == 0:
            hunt(UID)
        try:
            with acting_as(UID, UID, []):
                for _ in range(60):
                    job = client.start(["true"], oom_score_adj=500)
                    assert job.wait(PATIENCE).returncode == 0
                job = client.start(["cat", "/proc/self/status"])
                job.wait(PATIENCE)
                assert "CapPrm:\t0000000000000000" in text(job, 1).decode()
        finally:
            os.kill(hunter, signal.SIGKILL)
            _, status = os.waitpid(hunter, 0)
        assert os.WIFSIGNALED(status)
