"""Users can see and control only their own jobs, and root all. Tried in many ways."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, has_ended, script_environment, until
from daemon import Daemon, acting_as
from jobs import await_output, keeper_of, keeping_jobs, text

import errand_boy
from errand_boy import JobError, NoJobError, RefusedError
from errand_boy._client.client import Client
from errand_boy._jobs import follow as _follow
from errand_boy._jobs.blocking import Job
from errand_boy._native import lib
from errand_boy._wire import frames

pytestmark = pytest.mark.root

VICTIM, OTHER = 12345, 12346
SECRET = "XYZZY-the-secret-of-the-victim"


class Place:
    """A daemon of root, and a job of the victim that has written a secret."""

    def __init__(self, daemon: Daemon, client: Client, directory: Path) -> None:
        self.daemon = daemon
        self.client = client
        self.directory = directory
        with acting_as(VICTIM, VICTIM, []):
            self.job = client.start(
                ["/bin/sh", "-c", f"echo {SECRET}; exec cat"], name="private", stdin=-1, cwd="/"
            )
            await_output(self.job, SECRET.encode())
            self.over = client.start(["echo", SECRET], name="over", cwd="/")
            self.over.wait(PATIENCE)
        self.keeper = keeper_of_as_root(client, self.job)


def keeper_of_as_root(client: Client, job: Job) -> psutil.Process:
    return keeper_of(client.job(job.id, uid=job.uid))


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="errand-boy-") as name:
        directory = Path(name).resolve()
        directory.chmod(0o755)
        options = "--allow-uid", str(VICTIM), "--allow-uid", str(OTHER), "--idle", "0"
        with keeping_jobs(directory, *options) as (daemon, client):
            yield Place(daemon, client, directory)


@pytest.fixture
def untouched(place: Place) -> Iterator[Place]:
    """Run the test as the other user; afterwards the victim's job must be unchanged."""
    with acting_as(OTHER, OTHER, []):
        yield place
    assert not has_ended(place.keeper.pid)
    with acting_as(VICTIM, VICTIM, []):
        job = place.client.job("private")
        assert job.state == "running" and job.id == place.job.id
        assert text(job) == SECRET.encode() + b"\n"
        assert text(place.client.job("over")) == SECRET.encode() + b"\n"


def raw(place: Place, operation: int, value: object, *, more: bytes = b"") -> tuple[int, bytes]:
    """Send a JOB, and return kind and payload of the answer."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    payload = struct.pack("<IB", lib.EB_VERSION, operation) + data
    with place.daemon.socket() as sock:
        sock.sendall(b"\0" + frames.frame(lib.EB_JOB, [payload]) + more)
        answer = b""
        while len(answer) < 5 or len(answer) < 5 + struct.unpack_from("<I", answer)[0]:
            part, fds, _, _ = socket.recv_fds(sock, 1 << 16, 8)
            assert not fds
            if not part:
                break
            answer += part
        return answer[4], answer[5:]


# -- by the client's means --


@pytest.mark.parametrize("name", ["private", 1, "1", 2, "over"])
def test_names_and_numbers(untouched: Place, name: str | int) -> None:
    with pytest.raises(NoJobError):
        untouched.client.job(name)


def test_lists(untouched: Place) -> None:
    assert untouched.client.jobs(all=True) == []


@pytest.mark.parametrize("uid", [VICTIM, 0, "all"])
def test_uids(untouched: Place, uid: Any) -> None:
    with pytest.raises(JobError, match="may not see the jobs of others"):
        untouched.client.jobs(all=True, uid=uid)
    if uid != "all":
        with pytest.raises(JobError, match="may not see the jobs of others"):
            untouched.client.job("private", uid=uid)


@pytest.mark.parametrize(
    "act",
    [
        lambda job: job.status(),
        lambda job: list(job.logs()),
        lambda job: list(job.logs(follow=True)),
        lambda job: job.attach(),
        lambda job: job.attach(read_only=True),
        lambda job: job.wait(1),
        lambda job: job.send_signal(signal.SIGKILL),
        lambda job: job.stop(signal.SIGKILL),
        lambda job: job.remove(),
    ],
)
@pytest.mark.parametrize("whose", [VICTIM, OTHER])
def test_a_job_object_of_anothers(untouched: Place, act: Callable[[Job], Any], whose: int) -> None:
    for known in untouched.job, untouched.over:
        job = Job(untouched.client, {**known._entry, "uid": whose})
        with pytest.raises(JobError):
            act(job)


def test_status_and_lists_of_the_daemon(untouched: Place) -> None:
    value = json.dumps(untouched.client.status())
    assert SECRET not in value
    assert str(VICTIM) not in value


# -- by frames of one's own --


@pytest.mark.parametrize("operation", [lib.EB_JOB_LIST, lib.EB_JOB_OPEN, lib.EB_JOB_REMOVE])
@pytest.mark.parametrize(
    "value",
    [
        {"job": "private", "uid": VICTIM},
        {"job": "private", "uid": str(VICTIM)},
        {"job": "private", "uid": float(VICTIM)},
        {"job": "private", "uid": True},
        {"job": "private", "uid": -1},
        {"job": "private", "uid": -(1 << 32) + VICTIM},
        {"job": "private", "uid": (1 << 32) + VICTIM},
        {"job": "private", "uid": [VICTIM]},
        {"job": f"../{VICTIM}/1", "uid": OTHER},
        {"job": f"../{VICTIM}/1"},
        {"job": ["private"]},
        {"job": {"uid": VICTIM}},
        {"job": 1.0},
        {"job": -1},
        {"job": "٣"},
        {"all": True, "uid": -1, "after": [VICTIM - 1, 0]},
        {"all": True, "after": [0, 0], "uid": VICTIM},
        {"all": True, "after": [VICTIM, 0], "name": "private"},
        b'{"job": "private", "uid": %d, "uid": %d}' % (OTHER, VICTIM),
        b"[" * 4000,
        b"\xff\xfe",
        b"",
    ],
)
def test_frames(untouched: Place, operation: int, value: object) -> None:
    kind, answer = raw(untouched, operation, value)
    assert SECRET.encode() not in answer
    if kind == lib.EB_JOB_REPLY:
        reply = json.loads(answer)
        assert "error" in reply or reply == {"jobs": [], "next": None}
    else:
        assert kind == lib.EB_REFUSED


def test_adopted_by_nobody(untouched: Place) -> None:
    """A frame for a keeper comes to the daemon's socket, or after another request."""
    follow = frames.frame(lib.EB_FOLLOW, [struct.pack("<QQQB", 0, 0, 0, 1)])
    for first in follow, frames.frame(lib.EB_ADOPT, []), frames.frame(lib.EB_ATTACH, [bytes(17)]):
        with untouched.daemon.socket() as sock:
            sock.sendall(b"\0" + first + bytes(20))
            assert SECRET.encode() not in sock.recv(1 << 16)
    _, answer = raw(untouched, lib.EB_JOB_OPEN, {"job": "private"}, more=frames.OPENING + follow)
    assert SECRET.encode() not in answer and b"there is no job" in answer


def test_signal_of_a_helper(untouched: Place) -> None:
    """The helper of another user signals only the child of its own connection."""
    assert untouched.job.pid is not None
    connection = untouched.daemon.connect()
    for pid in untouched.job.pid, -untouched.job.pid, untouched.keeper.pid, -1:
        connection.send(frames.frame(lib.EB_SIGNAL, [struct.pack("<ii", pid, signal.SIGKILL)]))
    connection.close()


# -- by the system's means --


def test_files(untouched: Place) -> None:
    directory = untouched.directory
    paths = [directory / "state", directory / "run"]
    for path in [*paths, *(path / str(VICTIM) for path in paths)]:
        for act in os.listdir, os.rmdir, lambda path: os.mkdir(path / "new"), os.unlink:
            with pytest.raises(PermissionError):
                act(path)
    for name in "state/{}/1.job", "run/{}/1.ring", "run/{}/1.sock":
        path = directory / name.format(VICTIM)
        for flags in os.O_RDONLY, os.O_WRONLY, os.O_PATH:
            with pytest.raises(PermissionError):
                os.open(path, flags)
        with pytest.raises(PermissionError):
            os.link(path, directory / "link")


def test_links_in_the_place_of_files(place: Place) -> None:
    """If there ever is a link, it is not followed."""
    with acting_as(OTHER, OTHER, []):
        job = place.client.start(["true"], name="private", cwd="/")
        job.wait(PATIENCE)
    keeper = place.client.job(job.id, uid=OTHER).status()["keeper"]
    until(lambda: has_ended(keeper))
    ring = place.directory / "run" / str(OTHER) / f"{job.id}.ring"
    journal = place.directory / "state" / str(OTHER) / f"{job.id}.job"
    ring.unlink()
    ring.symlink_to(place.directory / "run" / str(VICTIM) / "1.ring")
    with acting_as(OTHER, OTHER, []):
        assert text(place.client.job("private")) == b""
    journal.unlink()
    journal.symlink_to(place.directory / "state" / str(VICTIM) / "1.job")
    with acting_as(OTHER, OTHER, []):
        with pytest.raises(JobError, match="Too many levels of symbolic links"):
            place.client.job("private")
        job.remove()
    assert place.client.job(1, uid=VICTIM).name == "private"


def test_socket_of_the_keeper(untouched: Place) -> None:
    path = untouched.directory / "run" / str(VICTIM) / "1.sock"
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(PermissionError):
        sock.connect(str(path))


@pytest.mark.parametrize("user", [OTHER, VICTIM])
def test_descriptors_of_the_keeper(place: Place, user: int) -> None:
    """Not even its own user can get them, to write what the daemon reads."""
    pid = place.keeper.pid
    with acting_as(user, user, []):
        script = f"""
import os, ctypes, errno
os.setgroups([]); os.setresgid({user}, {user}, {user}); os.setresuid({user}, {user}, {user})
libc = ctypes.CDLL(None, use_errno=True)
for number in range(12):
    try:
        os.open("/proc/{pid}/fd/%d" % number, os.O_RDWR)
    except OSError as error:
        assert error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT), error
    else:
        raise SystemExit("opened")
for name in "mem", "maps", "environ":
    try:
        open("/proc/{pid}/" + name, "rb").read(1)
    except OSError:
        pass
    else:
        raise SystemExit(name)
assert libc.ptrace(16, {pid}, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM  # PTRACE_ATTACH
pidfd = os.pidfd_open({pid})
assert libc.syscall(438, pidfd, 6, 0) == -1 and ctypes.get_errno() == errno.EPERM  # pidfd_getfd
print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.stdout == b"refused\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_signals(untouched: Place, number: int) -> None:
    assert untouched.job.pid is not None
    for pid in untouched.keeper.pid, untouched.job.pid, -untouched.job.pid:
        with pytest.raises(PermissionError):
            os.kill(pid, number)


def test_command_line_of_the_keeper_says_little(place: Place) -> None:
    words = " ".join(place.keeper.cmdline())
    assert SECRET not in words and "private" not in words


def test_keeper_is_the_users(place: Place) -> None:
    """Neither the keeper nor its command has more rights than the user.

    The one capability by which it stays closed to its user is of no use, and not in effect.
    """
    assert place.job.pid is not None
    block_suspend = 1 << 36
    for pid in place.keeper.pid, place.job.pid:
        status = Path(f"/proc/{pid}/status").read_text()
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(lines["Uid"].split()) == set(lines["Gid"].split()) == {str(VICTIM)}
        assert lines["Groups"].strip() == ""
        assert int(lines["CapEff"], 16) == int(lines["CapAmb"], 16) == 0
        kept = block_suspend if pid == place.keeper.pid else 0
        assert int(lines["CapPrm"], 16) & ~kept == 0


def test_keepers_names_no_file_of_the_daemons_to_the_command(place: Place) -> None:
    """The command has its standard streams, and no descriptor of the keeper."""
    assert place.job.pid is not None
    assert sorted(os.listdir(f"/proc/{place.job.pid}/fd")) == ["0", "1", "2"]


def test_log_is_written_as_the_user(place: Place) -> None:
    victim, other = (place.directory / name for name in ("victims", "others"))
    for path, uid in (victim, VICTIM), (other, OTHER):
        path.mkdir(mode=0o700)
        os.chown(path, uid, uid)
    with acting_as(OTHER, OTHER, []):
        for path in victim / "log", Path("/etc/errand-boy-test"), Path("/root/log"):
            with pytest.raises(PermissionError):
                place.client.start(["true"], log=path, cwd="/")
        job = place.client.start(["echo", "word"], log=other / "log", cwd="/")
        job.wait(PATIENCE)
        job.remove()
    assert (other / "log").read_text() == "word\n"
    assert (other / "log").stat().st_uid == OTHER


def test_notification_is_the_users(place: Place) -> None:
    path = place.directory / "told"
    path.mkdir()
    os.chown(path, OTHER, OTHER)
    with acting_as(OTHER, OTHER, []):
        job = place.client.start(
            ["true"], cwd="/", notify=f"id -u > {path}/new; mv {path}/new {path}/done"
        )
        until((path / "done").exists)
        assert (path / "done").read_text() == f"{OTHER}\n"
        job.remove()


def test_a_users_limits_are_his_own(public_dir: Path) -> None:
    limits = public_dir / "limits"
    limits.write_text(json.dumps({"default": {"jobs": 1}}))
    options = "--allow-uid", str(VICTIM), "--allow-uid", str(OTHER), "--limits", limits
    with keeping_jobs(public_dir, *options) as (_, client):
        jobs = []
        for uid in VICTIM, OTHER:
            with acting_as(uid, uid, []):
                jobs.append(client.start(["sleep", "1000"], name="same", cwd="/"))
                with pytest.raises(JobError, match="has 1 jobs, and may have no more"):
                    client.start(["true"], cwd="/")
        assert [(job.id, job.name) for job in jobs] == [(1, "same"), (1, "same")]
        for job in jobs:
            client.job("same", uid=job.uid).stop()


# -- who may --


def test_root_sees_and_touches_all(place: Place) -> None:
    assert place.client.jobs(all=True) == []  # its own
    found = place.client.jobs(all=True, uid="all")
    assert {(job.uid, job.name) for job in found} >= {(VICTIM, "private"), (VICTIM, "over")}
    job = place.client.job("private", uid=VICTIM)
    assert text(job) == SECRET.encode() + b"\n"
    assert [known.id for known in place.client.jobs(uid=VICTIM)] == [job.id]
    with acting_as(VICTIM, VICTIM, []):
        mine = place.client.start(["sleep", "1000"], cwd="/")
    other = place.client.job(mine.id, uid=VICTIM)
    other.send_signal(0)
    assert other.stop().returncode == -signal.SIGTERM
    other.remove()
    with acting_as(VICTIM, VICTIM, []), pytest.raises(NoJobError):
        mine.status()


HOSTILE = rb"\33]0;title\7\33[6n\302\2331m\377\342\200\256\r\ta\303\251\nb\n"
SHOWN = b"\\x1b]0;title\\x07\\x1b[6n\\x9b1m\\xff\\u202e\\r\ta\xc3\xa9\nb\n"


def cli(*arguments: str, pty: bool, place: Place) -> tuple[bytes, int]:
    """Run errand-boy as root; return what it writes, to a terminal or not, and its status."""
    options: dict[str, Any] = {"pty": True} if pty else {"stdout": -1, "stderr": -2}
    environment = {**script_environment(), "ERRAND_BOY_SOCKET": place.daemon.path}
    command = [sys.executable, "-m", "errand_boy", *arguments]
    errand: Any = errand_boy
    with errand.Popen(command, env=environment, stdin=None if pty else -3, **options) as process:
        data = (process.terminal if pty else process.stdout).read()
    return data.replace(b"\r\n", b"\n") if pty else data, process.returncode


@pytest.fixture
def hostile(place: Place) -> Iterator[Callable[..., Job]]:
    """Start a job of the victim that writes terminal sequences."""
    jobs: list[Job] = []

    def start(script: str, **options: Any) -> Job:
        with acting_as(VICTIM, VICTIM, []):
            script = f"printf '{HOSTILE.decode()}'; {script}"
            jobs.append(place.client.start(["/bin/sh", "-c", script], cwd="/", **options))
            await_output(jobs[-1], b"b")
        return jobs[-1]

    yield start
    for job in jobs:
        found = place.client.job(job.id, uid=VICTIM)
        found.stop(stop=[signal.SIGKILL])
        found.remove()


@pytest.mark.parametrize("pty", [False, True])
def test_output_of_another_user_on_a_terminal(
    place: Place, hostile: Callable[..., Job], pty: bool
) -> None:
    """Escape sequences are shown, not obeyed, except with --raw or in a file."""
    job = hostile("exit 0", **({"pty": True} if pty else {}))
    who = job.name, "--user", str(VICTIM)
    written = text(place.client.job(job.id, uid=VICTIM))
    assert b"\33]0;title\7" in written
    assert cli("logs", *who, pty=True, place=place) == (SHOWN, 0)
    data, status = cli("logs", "--timestamps", *who, pty=True, place=place)
    assert status == 0
    assert b"\33" not in data and data.count(b" ") > 1
    assert cli("logs", *who, pty=False, place=place) == (written, 0)
    assert cli("logs", "--raw", *who, pty=True, place=place) == (written, 0)


def test_attaching_to_another_users_terminal(place: Place, hostile: Callable[..., Job]) -> None:
    job = hostile("read x", pty=True)
    who = job.name, "--user", str(VICTIM)
    data, status = cli("attach", *who, pty=True, place=place)
    assert status == 125
    assert data.startswith(b"errand-boy: ") and b"--raw" in data and b"\33" not in data
    with acting_as(VICTIM, VICTIM, []), job.attach() as attachment:
        attachment.write(b"\n")
        assert job.wait(PATIENCE).returncode == 0


def test_attaching_to_another_users_streams(place: Place, hostile: Callable[..., Job]) -> None:
    job = hostile("read x; kill -9 $$", stdin=-1)
    who = job.name, "--user", str(VICTIM)
    errand: Any = errand_boy
    command = [sys.executable, "-m", "errand_boy", "attach", *who]
    environment = {**script_environment(), "ERRAND_BOY_SOCKET": place.daemon.path}
    with errand.Popen(command, env=environment, pty=True) as process:
        data = b""
        while not data.endswith(b"b\r\n"):
            data += process.terminal.read(1)
        process.terminal.write(b"\n")
        process.terminal.read()
        assert process.wait(PATIENCE) == 128 + signal.SIGKILL
    assert data.replace(b"\r\n", b"\n") == SHOWN


def test_own_output_is_written_as_it_is(place: Place) -> None:
    job = place.client.start(["printf", HOSTILE.decode()], name="own")
    job.wait(PATIENCE)
    assert b"\33" in text(job)
    assert cli("logs", "own", pty=True, place=place) == (text(job), 0)
    job.remove()


def test_reasons_of_strangers_are_no_sequences() -> None:
    frame = frames.frame(lib.EB_REFUSED, ["no\33[2J\n\u202eway".encode()])
    with pytest.raises(RefusedError) as caught:
        list(_follow.Frames().receive(frame))
    assert str(caught.value).endswith("no\ufffd[2J\ufffd\ufffdway")


def test_strangers_are_refused(place: Place) -> None:
    with acting_as(4321, 4321, []):
        for act in place.client.jobs, lambda: place.client.start(["true"], cwd="/"):
            with pytest.raises(RefusedError, match="may not use this daemon"):
                act()
