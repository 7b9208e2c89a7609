"""The daemon executes the installed version in its place, and its clients do not notice."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import wire
from conftest import PATIENCE, script_environment, until
from daemon import (
    Daemon,
    acting_as,
    activated_daemon,
    ended,
    request,
    send_signal,
    spawn,
    started_daemon,
)

import errand_boy
from errand_boy._client.client import Client
from errand_boy._daemon.limits import Limits
from errand_boy._daemon.log import Log
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.status import Reply
from errand_boy._daemon.turns import Turns
from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.connection import Connection
from errand_boy._wire.frames import Spawned

pytestmark = pytest.mark.slow

COMMANDS, UPGRADES = 1000, 20
USER = 12345


def ask_for_upgrade(daemon: Daemon) -> None:
    daemon.process.send_signal(signal.SIGUSR2)


def await_upgrade(daemon: Daemon) -> None:
    assert daemon.notify.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert daemon.notify.recv(100) == b"READY=1"


def upgrade(daemon: Daemon) -> None:
    ask_for_upgrade(daemon)
    await_upgrade(daemon)


def refused_upgrade(daemon: Daemon) -> str:
    """Expect an upgrade of the daemon to fail, and return its log message."""
    before = daemon.log().count("no upgrade")
    ask_for_upgrade(daemon)
    until(lambda: daemon.log().count("no upgrade") > before)
    return daemon.log().splitlines()[-1]


def open_files(pid: int) -> list[str]:
    """Return the kinds of files that a process has open, since sockets have numbers."""
    kinds = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            kinds.append("socket" if target.startswith("socket:") else target)
    return sorted(kinds)


def sockets(files: list[str]) -> int:
    return files.count("socket")


def files_at_rest(daemon: Daemon, helpers: int) -> list[str]:
    """Return the same for a daemon without clients, whose sockets are closed a little later."""
    files: list[str] = []

    def at_rest() -> bool:
        files[:] = open_files(daemon.process.pid)
        return sockets(files) == 3 + helpers  # it listens, and signals wake it

    until(at_rest, "the close of the last connection")
    return files


def answer(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(1 << 16):
        data += part
    return data


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, for a daemon that runs it: PYTHONPATH, in which it can be changed."""
    assert errand_boy.__file__ is not None
    path = tmp_path / "packages"
    shutil.copytree(
        Path(errand_boy.__file__).parent,
        path / "errand_boy",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return path


@contextmanager
def daemon_of(package: Path, directory: Path, *options: object) -> Iterator[Daemon]:
    env = {"PYTHONPATH": str(package)}
    with started_daemon(directory, *options, env=env, cwd=directory) as daemon:  # not a checkout
        yield daemon


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    # Of another size, so that no older byte code is taken for it.
    path.write_text(text.replace(old, new) + "# changed\n")


# -- nothing is lost --


class Work:
    """Runs commands from several clients at the same time, until there were enough.

    Each command writes its number to a file, and returns a status that depends on it.
    """

    def __init__(self, daemon: Daemon, file: Path) -> None:
        self.wrong: list[object] = []
        self._file = file
        self._path = daemon.path
        self._is_over = threading.Event()
        self._count = 0
        self._lock = threading.Lock()
        kinds = (self._popen, self._run, self._map, self._connect)
        self._threads = [threading.Thread(target=self._work, args=[kind]) for kind in kinds]

    def __enter__(self) -> Work:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @property
    def count(self) -> int:
        """How many there were."""
        return self._count

    def _work(self, kind: Callable[[Client, list[int]], None]) -> None:
        try:
            with closing(errand_boy.connect(self._path)) as client:
                while not (self._is_over.is_set() and self._count >= COMMANDS):
                    with self._lock:
                        numbers = list(range(self._count, self._count + 10))
                        self._count += 10
                    kind(client, numbers)
        except BaseException as error:
            self.wrong.append(error)

    def _command(self, number: int) -> list[str]:
        return ["/bin/sh", "-c", f"echo {number} >>{self._file}; exit {number % 7}"]

    def _check(self, number: int, status: int | None) -> None:
        if status != number % 7:
            self.wrong.append((number, status))

    def _popen(self, client: Client, numbers: list[int]) -> None:
        processes = [client.Popen(self._command(number)) for number in numbers]
        for number, process in zip(numbers, processes, strict=True):
            self._check(number, process.wait(PATIENCE))

    def _run(self, client: Client, numbers: list[int]) -> None:
        for number in numbers:
            done = client.run(self._command(number), capture_output=True)
            self._check(number, done.returncode)

    def _map(self, client: Client, numbers: list[int]) -> None:
        results = client.map(map(self._command, numbers), max_workers=4)
        for number, result in zip(numbers, results, strict=True):
            self._check(number, result.returncode)

    def _connect(self, client: Client, numbers: list[int]) -> None:
        """Each over a connection of its own, which may wait to be accepted."""
        for number in numbers:
            with closing(errand_boy.connect(client.path)) as other:
                self._check(number, other.Popen(self._command(number)).wait(PATIENCE))


@pytest.mark.timeout(320)
@pytest.mark.parametrize("options", [[], ["--max-processes=3"], ["--max-child-tasks=50"]])
def test_no_command_is_lost_and_none_runs_twice(tmp_path: Path, options: list[str]) -> None:
    file = tmp_path / "numbers"
    with started_daemon(tmp_path, "--pool-size=2", *options) as daemon:
        before = files_at_rest(daemon, 2)
        helpers = daemon.helpers()
        with Work(daemon, file) as work:
            for _ in range(UPGRADES):
                upgrade(daemon)
        assert work.wrong == []
        assert Counter(map(int, file.read_text().split())) == Counter(range(work.count))
        status = until(
            lambda: (it := daemon.status())["totals"]["ended"] == work.count and it, "the ends"
        )
        assert status["totals"]["started"] == work.count
        assert status["totals"]["helpers_lost"] == status["totals"]["failed"] == 0
        assert status["pid"] == daemon.process.pid
        if "--max-child-tasks=50" not in options:
            assert daemon.helpers() == helpers
        assert files_at_rest(daemon, 2) == before
        assert daemon.log().count("upgraded") == UPGRADES
        assert "error" not in daemon.log()
        assert daemon.stop() == 0


def test_what_runs_and_what_waits_goes_on(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-processes=1") as daemon:
        first, second, rest = (daemon.connect() for _ in range(3))
        pid = spawn(first, "/bin/sleep", "100")
        request(second, "/bin/sh", "-c", "exit 5")
        until(lambda: daemon.status()["queue"] == 1)
        before = daemon.status()
        upgrade(daemon)
        after = daemon.status()
        assert [command["pid"] for command in after["commands"]] == [pid]
        assert after["queue"] == 1
        assert after["users"] == before["users"]
        assert after["totals"]["started"] == 1
        assert after["totals"]["accepted"] == before["totals"]["accepted"] + 1
        assert after["uptime"] >= before["uptime"]
        send_signal(first, pid, signal.SIGKILL)
        assert ended(first) == -signal.SIGKILL
        assert isinstance(second.receive(PATIENCE), Spawned)
        assert ended(second) == 5
        spawn(rest, "/bin/true")
        assert ended(rest) == 0
        for connection in (first, second, rest):
            connection.close()
        until(lambda: not daemon.status()["users"])


def test_first_bytes_that_are_awaited(tmp_path: Path) -> None:
    with (
        started_daemon(tmp_path, "--pool-size=1") as daemon,
        daemon.socket() as half,
        daemon.socket() as none,
    ):
        half.sendall(frames.OPENING[:3])
        until(lambda: sockets(open_files(daemon.process.pid)) == 6)
        upgrade(daemon)
        half.sendall(frames.OPENING[3:])
        assert half.recv(100) == frames.HELLO
        none.sendall(frames.OPENING)
        assert none.recv(100) == frames.HELLO


def test_helper_that_dies_meanwhile_is_replaced(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size=1") as daemon:
        (helper,) = daemon.helpers()
        ask_for_upgrade(daemon)
        os.kill(helper, signal.SIGKILL)
        await_upgrade(daemon)
        until(lambda: daemon.helpers() not in ([], [helper]))
        assert not psutil.pid_exists(helper)


def test_orphans_are_killed_after_it_as_before(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size=1") as daemon, daemon.socket() as sock:
        marker = tmp_path / "marker"
        # It takes no notice of SIGTERM; SIGKILL comes 3 seconds later.
        on_close = frames.option(lib.EB_TAG_ON_CLOSE, (3000).to_bytes(4, "little"))
        connection = Connection(sock)
        connection.open()
        script = f"trap 'echo >{marker}' TERM; while :; do sleep 0.05; done"
        pid = spawn(connection, "/bin/sh", "-c", script, options=on_close)
        process = psutil.Process(pid)
        upgrade(daemon)
        os.kill(daemon.helpers()[0], signal.SIGKILL)
        until(marker.exists)
        upgrade(daemon)
        until(lambda: not process.is_running())


@pytest.mark.root
def test_helpers_of_users(public_dir: Path) -> None:
    options = [f"--allow-uid={USER}", "--pool-size=1", "--idle=0.2"]
    with started_daemon(public_dir, *options) as daemon:
        with acting_as(USER, USER, [USER, 23456]):
            connection = daemon.connect()
        pid = spawn(connection, "/bin/sleep", "100")
        helper = psutil.Process(pid).ppid()
        upgrade(daemon)
        with acting_as(USER, USER, [USER, 23456]):
            other = daemon.connect()
        second = spawn(other, "/bin/sleep", "100")
        assert psutil.Process(second).ppid() == helper
        for one, it in (connection, pid), (other, second):
            send_signal(one, -it, signal.SIGKILL)
            assert ended(one) == -signal.SIGKILL
            one.close()
        upgrade(daemon)
        until(lambda: len(daemon.helpers()) == 1, "the end of an idle helper")


def test_soft_limit_of_commands_stays(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size=1", "--max-child-tasks=1") as daemon:
        limits = []
        for _ in range(3):
            with daemon.socket() as sock:
                sock.sendall(b"ulimit -n\r\n\r\n\r\n\r\n")
                limits.append(answer(sock))
            upgrade(daemon)
        assert len(set(limits)) == 1


# -- text requests and answers that are under way --


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def begin_at(gate: Path, sock: socket.socket, rest: str = "true", input: bytes = b"") -> None:
    """Start a command over `sock`, which goes on with `rest` when the gate is written to."""
    sock.sendall(f"echo begun; cat {gate}; {rest}\r\n\r\n".encode() + input + b"\r\n\r\n")
    assert sock.recv(4) == b"\r\n0:"


def test_text_requests_go_on(tmp_path: Path, gate: Path) -> None:
    with started_daemon(tmp_path, "--grace=0") as daemon, daemon.socket() as sock:
        begin_at(gate, sock, "exit 3")
        upgrade(daemon)
        gate.write_text("passed\n")
        upgrade(daemon)
        assert answer(sock) == b"begun\npassed\n\r\n1:\r\n\r\n3\r\n\r\n"
        until(lambda: not daemon.status()["commands"])


def test_text_request_in_parts(tmp_path: Path) -> None:
    """One of the requests is too large to be kept in memory."""
    lines = b"".join(b"line %d\n" % number for number in range(10_000))
    request = b"cat; echo $?\r\n\r\n" + lines + b"\r\n\r\n"
    parts = [request[:3], request[3:14], request[14:17], request[17:60_000], request[60_000:-3]]
    with started_daemon(tmp_path) as daemon, daemon.socket() as sock:
        held = psutil.Process(daemon.process.pid)
        for part in [*parts, request[-3:]]:
            sock.sendall(part)
            until(lambda: unread(sock) == 0)
            upgrade(daemon)
        assert answer(sock) == b"\r\n0:" + lines + b"0\n\r\n1:\r\n\r\n0\r\n\r\n"
        until(lambda: not [file for file in held.open_files() if "deleted" in file.path])


def unread(sock: socket.socket) -> int:
    """Return how many bytes sent over `sock` have not been received yet."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def test_input_and_output_of_text_requests_go_on(tmp_path: Path, gate: Path) -> None:
    lines = b"".join(b"line %d\n" % number for number in range(100_000))
    script = "head -c 100000 >&2; cat; exit 5"
    with started_daemon(tmp_path) as daemon, daemon.socket() as sock:
        begin_at(gate, sock, script, lines)
        upgrade(daemon)  # what the helper takes of the input is under way
        gate.write_text("")
        upgrade(daemon)  # so are errors and output
        assert sock.recv(6, socket.MSG_WAITALL) == b"begun\n"
        upgrade(daemon)
        output, errors, end = answer(sock).partition(b"\r\n1:")
        assert (output, errors, end) == (
            lines[100_000:],
            b"\r\n1:",
            lines[:100_000] + b"\r\n\r\n5\r\n\r\n",
        )


def test_text_client_that_goes_after_it_ends_its_command(tmp_path: Path, gate: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        with daemon.socket() as whole, daemon.socket() as half:
            begin_at(gate, whole)
            begin_at(gate, half)
            half.shutdown(socket.SHUT_WR)
            upgrade(daemon)
            assert len(daemon.status()["commands"]) == 2
        until(lambda: not daemon.status()["commands"])


def test_text_request_is_sent_again_after_the_upgrade(tmp_path: Path) -> None:
    """It goes to another helper, after the first one has died without reading it."""
    with started_daemon(tmp_path, "--pool-size=1") as daemon, daemon.socket() as sock:
        (helper,) = daemon.helpers()
        os.kill(helper, signal.SIGSTOP)
        sock.sendall(b"echo $PPID\r\n\r\n\r\n\r\n")
        until(lambda: unread(sock) == 0)
        upgrade(daemon)
        os.kill(helper, signal.SIGKILL)
        (other,) = until(lambda: [pid for pid in daemon.helpers() if pid != helper])
        assert answer(sock) == f"\r\n0:{other}\n\r\n1:\r\n\r\n0\r\n\r\n".encode()


def test_text_request_that_never_becomes_whole(tmp_path: Path) -> None:
    with (
        started_daemon(tmp_path, "--patience=1") as daemon,
        daemon.socket() as sock,
    ):
        sock.sendall(b"echo begun")
        until(lambda: unread(sock) == 0)
        upgrade(daemon)
        assert b"the request was not complete, and nothing came for 1 seconds" in answer(sock)


def status_of(reply: bytes) -> dict[str, Any]:
    length, kind = frames.HEADER.unpack_from(reply)
    assert kind == lib.EB_STATUS_REPLY
    assert len(reply) == frames.HEADER.size + length
    status: dict[str, Any] = json.loads(reply[frames.HEADER.size :])
    return status


def test_status_request_during_an_upgrade(tmp_path: Path) -> None:
    """The upgrade comes before the helpers have reported."""
    query = b"\0" + wire.frame(lib.EB_STATUS, frames.HELLO[-4:])
    with started_daemon(tmp_path, "--pool-size=1", "--log-level=debug") as daemon:
        (helper,) = daemon.helpers()
        with daemon.socket() as sock:
            os.kill(helper, signal.SIGSTOP)
            count = daemon.log().count("kind=status")
            sock.sendall(query)
            until(lambda: daemon.log().count("kind=status") > count)
            upgrade(daemon)
            os.kill(helper, signal.SIGCONT)
            assert status_of(answer(sock))["pid"] == daemon.process.pid


def test_status_of_which_half_is_sent() -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    loop = Loop(Log("info", "text"))
    done: list[Reply] = []

    def reply(sock: socket.socket) -> Reply:
        return Reply(loop, sock, 0, [], lambda reports: {"it": "x" * 100_000}, 30, done.append)

    first = reply(ours)
    copies: list[int] = []

    def keep(fd: int) -> int:
        copies.append(os.dup(fd))
        return copies[-1]

    loop.run(lambda: select.select([theirs], [], [], 0)[0] != [])
    _, rest = json.loads(json.dumps(first.state(keep)))
    loop.watch(ours, 0)
    reply(socket.socket(fileno=copies[0])).send(bytes.fromhex(rest))
    received = b""

    def is_done() -> bool:
        nonlocal received
        while select.select([theirs], [], [], 0)[0]:
            received += theirs.recv(1 << 16)
        return bool(done)

    loop.run(is_done)
    ours.close()
    loop.run(lambda: loop.closer.is_idle)
    assert status_of(received + answer(theirs)) == {"it": "x" * 100_000}
    theirs.close()


# -- another version --


def test_new_version_takes_over(tmp_path: Path, package: Path) -> None:
    with daemon_of(package, tmp_path) as daemon:
        replace(package / "errand_boy/__init__.py", "__version__ = ", '__version__ = "9.9" or ')
        upgrade(daemon)
        assert daemon.status()["version"] == "9.9"
        assert "upgraded version=9.9" in daemon.log()


def test_new_program_of_the_helper(tmp_path: Path, package: Path) -> None:
    with daemon_of(package, tmp_path, "--pool-size=1") as daemon:
        (helper,) = daemon.helpers()
        running = daemon.connect()
        pid = spawn(running, "/bin/sleep", "100")
        program = package / "errand_boy/errand-boy-helper"
        shutil.copy2(program, tmp_path / "new")
        os.replace(tmp_path / "new", program)
        upgrade(daemon)
        later = daemon.connect()
        other = psutil.Process(spawn(later, "/bin/sleep", "100")).parent()
        assert other is not None and other.pid != helper
        assert other.exe() == str(program)
        send_signal(later, 0, signal.SIGKILL)
        assert ended(later) == -signal.SIGKILL
        later.close()
        assert psutil.Process(pid).ppid() == helper
        send_signal(running, pid, signal.SIGKILL)
        assert ended(running) == -signal.SIGKILL
        running.close()
        until(lambda: daemon.helpers() == [other.pid])
        upgrade(daemon)
        assert daemon.helpers() == [other.pid]
        assert daemon.status()["totals"]["started"] == 2


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("_daemon/server.py", "class Server", "class Server(:", "SyntaxError"),
        ("_daemon/serve.py", "import sys", "import nonsense", "nonsense"),
        ("_daemon/options.py", "socket: str,", "plug: str,", "socket"),
        ("__init__.py", "__version__ = ", "__version__ = nonsense or ", "nonsense"),
        ("_daemon/upgrade.py", "STATE_VERSION = 1", "STATE_VERSION = 0", "restart the daemon"),
        (
            "_daemon/process.py",
            "    print(introduce())",
            "    print(17)",
            "gave no valid answer: 17",
        ),
    ],
)
def test_broken_version_does_not(
    tmp_path: Path, package: Path, name: str, old: str, new: str, reason: str
) -> None:
    with daemon_of(package, tmp_path, "--pool-size=1") as daemon:
        before = files_at_rest(daemon, 1)
        file = package / "errand_boy" / name
        text = file.read_text()
        replace(file, old, new)
        assert reason in refused_upgrade(daemon)
        connection = daemon.connect()
        spawn(connection, "/bin/sh", "-c", "exit 4")
        assert ended(connection) == 4
        connection.close()
        assert files_at_rest(daemon, 1) == before
        file.write_text(text)
        upgrade(daemon)
        assert files_at_rest(daemon, 1) == before


def descriptors_of_helper(daemon: Daemon) -> int:
    with closing(daemon.connect()) as connection:
        spawn(connection, "/bin/sh", "-c", "exit $(ls /proc/$PPID/fd | wc -l)")
        return ended(connection)


def test_daemon_goes_on_if_the_exec_fails(tmp_path: Path, package: Path) -> None:
    """The check succeeds, but the exec fails."""
    replace(
        package / "errand_boy/_daemon/upgrade.py",
        "os.execv(sys.executable, ",
        'os.execv("/nonexistent", ',
    )
    with daemon_of(package, tmp_path, "--pool-size=1") as daemon, daemon.socket() as half:
        half.sendall(frames.OPENING[:3])
        before = descriptors_of_helper(daemon)
        connection = daemon.connect()
        pid = spawn(connection, "/bin/sleep", "100")
        assert "FileNotFoundError" in refused_upgrade(daemon)
        await_upgrade(daemon)  # it is as it was
        send_signal(connection, pid, signal.SIGKILL)
        assert ended(connection) == -signal.SIGKILL
        connection.close()
        half.sendall(frames.OPENING[3:])
        assert half.recv(100) == frames.HELLO
        # What it has kept for the successor is nobody else's.
        until(lambda: descriptors_of_helper(daemon) == before + 1)  # with the other half


def speak_another_protocol(package: Path) -> None:
    replace(
        package / "errand_boy/_daemon/upgrade.py",
        "errand_boy.__version__, lib.EB_VERSION,",
        "errand_boy.__version__, lib.EB_VERSION + 1,",
    )


def test_version_of_another_protocol_has_its_own_helpers(tmp_path: Path, package: Path) -> None:
    with daemon_of(package, tmp_path, "--pool-size=1", "--max-processes=1") as daemon:
        first, second = daemon.connect(), daemon.connect()
        (helper,) = daemon.helpers()
        pid = spawn(first, "/bin/sleep", "100")
        request(second, "/bin/sh", "-c", "exit 5")
        until(lambda: daemon.status()["queue"] == 1)
        speak_another_protocol(package)
        upgrade(daemon)
        # Nobody is left who could have it wait.
        assert isinstance(second.receive(PATIENCE), Spawned)
        assert ended(second) == 5
        (other,) = daemon.helpers()
        assert other != helper
        assert daemon.status()["totals"]["started"] == 1
        third = daemon.connect()
        spawn(third, "/bin/sh", "-c", "exit 6")
        assert ended(third) == 6
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in daemon.log())
        assert psutil.pid_exists(pid)
        send_signal(first, pid, signal.SIGKILL)
        assert ended(first) == -signal.SIGKILL
        assert daemon.process.wait(PATIENCE) == 0
        for connection in (first, second, third):
            connection.close()


def test_version_of_another_protocol_waits_for_text_requests(
    tmp_path: Path, package: Path, gate: Path
) -> None:
    """The server speaks with their helpers. Others are served meanwhile, later texts after it."""
    with (
        daemon_of(package, tmp_path) as daemon,
        daemon.socket() as sock,
        daemon.socket() as later,
    ):
        begin_at(gate, sock, "exit 3")
        speak_another_protocol(package)
        ask_for_upgrade(daemon)
        until(lambda: "an upgrade waits for text requests" in daemon.log())
        later.sendall(b"echo later\r\n\r\n\r\n\r\n")
        connection = daemon.connect()
        spawn(connection, "/bin/sh", "-c", "exit 4")
        assert ended(connection) == 4
        connection.close()
        assert not select.select([daemon.notify, later], [], [], 0)[0]
        gate.write_text("passed\n")
        assert answer(sock) == b"begun\npassed\n\r\n1:\r\n\r\n3\r\n\r\n"
        await_upgrade(daemon)
        assert answer(later) == b"\r\n0:later\n\r\n1:\r\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("is_stopped", [False, True])
def test_text_request_that_lasts_outlasts_another_protocol(
    tmp_path: Path, package: Path, gate: Path, is_stopped: bool
) -> None:
    grace = "--grace=30" if is_stopped else "--grace=0"
    with daemon_of(package, tmp_path, grace) as daemon, daemon.socket() as sock:
        begin_at(gate, sock)
        speak_another_protocol(package)
        with daemon.socket() as later:
            ask_for_upgrade(daemon)
            until(lambda: "an upgrade waits for text requests" in daemon.log())
            later.sendall(b"echo later\r\n\r\n\r\n\r\n")
            if is_stopped:
                daemon.process.send_signal(signal.SIGTERM)
            else:
                assert answer(later) == b"\r\n0:later\n\r\n1:\r\n\r\n0\r\n\r\n"
                assert "1 text requests go on" in daemon.log()
        gate.write_text("passed\n")
        assert answer(sock) == b"begun\npassed\n\r\n1:\r\n\r\n0\r\n\r\n"
        if is_stopped:
            assert daemon.process.wait(PATIENCE) == 0
        else:
            upgrade(daemon)


# -- besides --


def test_path_stays_its_own(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with started_daemon(tmp_path, "--pid-file", file) as daemon:
        upgrade(daemon)
        command = [sys.executable, "-m", "errand_boy", "serve", "--socket", daemon.path]
        other = subprocess.run(
            command, env=script_environment(), capture_output=True, timeout=PATIENCE
        )
        assert other.returncode == 1
        assert b"another errand-boy listens" in other.stderr
        assert file.read_text() == f"{daemon.process.pid}\n"
        assert daemon.stop() == 0
        assert daemon.notify.recv(100) == b"STOPPING=1"
        assert not file.exists()
        assert not os.path.exists(daemon.path)


def test_socket_of_systemd(tmp_path: Path) -> None:
    with activated_daemon(tmp_path) as daemon:
        upgrade(daemon)
        assert daemon.status()["socket"] == daemon.path
        assert daemon.stop() == 0
    assert os.path.exists(daemon.path)


def test_without_descriptors_it_goes_on(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        process = psutil.Process(daemon.process.pid)
        before = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (60, before[1]))
        assert "Too many open files" in refused_upgrade(daemon)
        process.rlimit(psutil.RLIMIT_NOFILE, before)
        await_upgrade(daemon)  # it is as it was
        upgrade(daemon)


def test_reload_ends_when_there_is_an_upgrade_or_none(tmp_path: Path) -> None:
    def reload() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "errand_boy", "serve", "--upgrade", "--socket"]
        environment = script_environment()
        return subprocess.run(
            [*command, tmp_path / "socket"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    with started_daemon(tmp_path) as daemon:
        done = reload()
        assert (done.returncode, done.stderr) == (0, "")
        assert daemon.status()["upgrades"]["done"] == 1
        process = psutil.Process(daemon.process.pid)
        process.rlimit(psutil.RLIMIT_NOFILE, (60, process.rlimit(psutil.RLIMIT_NOFILE)[1]))
        done = reload()
        assert done.returncode == 1
        assert "errand-boy: no upgrade: " in done.stderr
        assert "Too many open files" in done.stderr
        assert daemon.stop() == 0
    done = reload()
    assert done.returncode == 1
    assert str(tmp_path / "socket") in done.stderr


def test_limits_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "limits"
    file.write_text('{"default": {"commands": 2}}')

    def most() -> int:
        (user,) = daemon.status()["users"]
        return int(user["limits"]["commands"])

    with started_daemon(tmp_path, "--limits", file) as daemon:
        connection = daemon.connect()
        assert most() == 2
        file.write_text('{"default": {"commands": 3}}')
        upgrade(daemon)
        assert most() == 3
        file.write_text("nonsense")
        upgrade(daemon)
        assert most() == 3
        assert "the limits stay as they were" in daemon.log()
        connection.close()


def test_signals_that_come_meanwhile_are_not_lost(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        for _ in range(5):
            ask_for_upgrade(daemon)
            assert daemon.notify.recv(100).startswith(b"RELOADING=1")
            ask_for_upgrade(daemon)  # to the one who has no handlers yet, or the one who has
            assert daemon.notify.recv(100) == b"READY=1"
            await_upgrade(daemon)
        daemon.process.send_signal(signal.SIGUSR2)
        assert daemon.notify.recv(100).startswith(b"RELOADING=1")
        assert daemon.stop() == 0


def test_turns_survive_json() -> None:
    def limits(user: int) -> Limits:
        return Limits(commands=1, starts_per_second=1, burst=2)

    turns = Turns(2, limits)
    for connection, user in (1, 10), (2, 10), (3, 20), (4, 20):
        turns.want(connection, user, user)
    assert sorted(turns.next(0.0)) == [1, 3]
    state: Any = json.loads(json.dumps(turns.state()))
    other = Turns(2, limits)
    other.restore(state)
    assert other.state() == turns.state()
    assert list(other.next(0.0)) == []
    other.done(1)
    assert list(other.next(0.0)) == [2]
    assert other.running(10) == other.running(20) == 1
    assert other.waiting(20) == 1
