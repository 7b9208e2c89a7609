"""The daemon's server, as its clients, its supervisor and attackers see it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, has_ended, script_environment, until
from daemon import Daemon, activated_daemon, ended, request, send_signal, spawn, started_daemon

from errand_boy._daemon import listen
from errand_boy._daemon.limits import Limits, LimitsError, Table
from errand_boy._daemon.log import Complaints
from errand_boy._daemon.turns import Turns
from errand_boy._native import lib
from errand_boy._wire import frames, status as _status
from errand_boy._wire.address import Address
from errand_boy._wire.connection import Connection
from errand_boy._wire.frames import Failed, Spawned

SERVE = [sys.executable, "-m", "errand_boy", "serve"]
HELLO = frames.OPENING
NOBODY = 65534


def serve(*options: object) -> subprocess.CompletedProcess[str]:
    command = [*SERVE, *map(str, options)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=script_environment(),
    )


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    return data


def refusal(sock: socket.socket) -> str:
    data = read_all(sock)
    length, kind = frames.HEADER.unpack_from(data)
    assert kind == lib.EB_REFUSED
    assert len(data) == frames.HEADER.size + length
    return data[frames.HEADER.size :].decode()


def answers(path: str) -> bool:
    try:
        return bool(_status.fetch(Address(path)))
    except _status.NoAnswerError:
        return False


# -- service --


def test_a_connection_carries_commands_one_after_another(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        connection = daemon.connect()
        for expected in (7, 0, 3):
            spawn(connection, "/bin/sh", "-c", f"exit {expected}")
            assert ended(connection) == expected
        connection.close()


def test_bytes_one_by_one_are_a_request_too(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon, daemon.socket() as sock:
        for byte in HELLO:
            sock.sendall(bytes([byte]))
        assert sock.recv(100) == frames.HELLO


@pytest.mark.slow
def test_least_busy_helper_serves(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size", 3) as daemon:
        connections = [daemon.connect() for _ in range(6)]
        for connection in connections:
            spawn(connection, "/bin/true")
            ended(connection)
        assert [helper["connections"] for helper in daemon.status()["helpers"]] == [2, 2, 2]
        for connection in connections:
            connection.close()


def test_pid_file_and_title(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with started_daemon(tmp_path, "--pid-file", file) as daemon:
        assert file.read_text() == f"{daemon.process.pid}\n"
        helper = psutil.Process(daemon.helpers()[0])
        # Split at spaces by psutil, as titles may be.
        title = " ".join(helper.cmdline())
        assert title.startswith(f"errand-boy: helper of {daemon.process.pid} ")
        assert daemon.stop() == 0
        assert not file.exists()


def test_memory(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size", 2) as daemon:
        pids = [daemon.process.pid, *daemon.helpers()]
        used = sum(psutil.Process(pid).memory_full_info().pss for pid in pids)
        assert used <= 12 << 20


def test_log_as_json(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--log-format", "json", "--log-level", "debug") as daemon:
        daemon.status()
        daemon.stop()
        entries = [json.loads(line) for line in daemon.log().splitlines()]
    assert {"listening", "accepted", "stopping", "stopped"} <= {e["message"] for e in entries}
    assert all({"time", "level", "message"} <= entry.keys() for entry in entries)


@pytest.mark.slow
def test_classic_spelling(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "errand_boy.run", "--socket"]
    options = {"env": script_environment(), "timeout": PATIENCE, "capture_output": True}
    with started_daemon(tmp_path) as daemon:
        command = "printf 'o\\377'; echo err >&2; exit 3"
        done = subprocess.run([*run, daemon.path, command], **options)  # type: ignore[call-overload]
        assert (done.stdout, done.stderr, done.returncode) == (b"o\xff", b"err\n", 3)
    done = subprocess.run([*run, str(tmp_path / "none"), "true"], **options)  # type: ignore[call-overload]
    assert done.returncode == 125
    assert done.stderr.startswith(b"errand-boy: ")
    assert done.stderr.count(b"\n") == 1
    done = subprocess.run([*run[:-1], "--local", "cat; exit 3"], **options, input=b"in")  # type: ignore[call-overload]
    assert (done.stdout, done.returncode) == (b"in", 3)


@pytest.mark.parametrize(
    "module", [["errand_boy", "serve"], ["errand_boy.run", "-t", "unixsocket"]]
)
def test_plain_spellings_serve(tmp_path: Path, module: list[str]) -> None:
    path = str(tmp_path / "socket")
    command = [sys.executable, "-m", *module, "--socket", path]
    with subprocess.Popen(command, env=script_environment()) as process:
        until(lambda: answers(path))
        process.terminate()
        assert process.wait(PATIENCE) == 0


# -- where it listens --


def test_socket_is_its_users_only(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o600


@pytest.mark.slow
def test_live_socket_is_not_taken_over(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        done = serve("--socket", daemon.path)
        assert done.returncode == 1
        assert done.stderr == f"errand-boy: another errand-boy listens on {daemon.path}\n"
        assert daemon.helpers()


def test_socket_of_another_program_is_not_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        done = serve("--socket", path)
        assert done.stderr == f"errand-boy: another program listens on {path}\n"
    assert os.path.exists(path)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "socket"
    message = f"errand-boy: cannot listen on {path}: there is no directory {path.parent}\n"
    assert serve("--socket", path).stderr == message


def test_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    assert serve("--socket", path).returncode == 1
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["/none/socket", "/tmp/" + "x" * 200])
def test_path_where_nobody_can_listen_is_one_line(path: str) -> None:
    done = serve("--socket", path)
    assert done.returncode == 1
    assert done.stderr.startswith("errand-boy: cannot listen on /")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--pool-size=0", "--max-accepts=-1", "--allow-uid=nobody-has"])
def test_wrong_option_is_an_error_of_usage(option: str) -> None:
    assert serve(option).returncode == 2


@pytest.mark.slow
def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        daemon.process.kill()
        daemon.process.wait()
        assert os.path.exists(daemon.path)
    with started_daemon(tmp_path) as daemon:
        assert daemon.helpers()


def test_socket_goes_at_the_end(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        assert daemon.stop() == 0
        assert daemon.notify.recv(100) == b"STOPPING=1"
        assert not os.path.exists(daemon.path)


@pytest.mark.slow
def test_path_is_free_while_the_last_commands_finish(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as old:
        connection = old.connect()
        pid = spawn(connection, "/bin/sleep", "100")
        old.process.terminate()
        old.notify.recv(100)
        until(lambda: not os.path.exists(old.path))
        with started_daemon(tmp_path) as new:
            assert new.helpers()
            send_signal(connection, pid, signal.SIGTERM)
            assert ended(connection) == -signal.SIGTERM
            assert old.process.wait(PATIENCE) == 0
            assert new.helpers()
        connection.close()


def test_classic_directory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    own = tmp_path / f"errand-boy-{os.geteuid()}"
    path = str(own / "errand-boy.sock")
    listen.listen(path, 0o600).close()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    listen.listen(path, 0o600).close()
    own.chmod(0o750)
    with pytest.raises(listen.ListenError, match="mode 0700"):
        listen.listen(path, 0o600)
    own.rename(tmp_path / "moved")
    own.symlink_to(tmp_path / "moved")
    own.chmod(0o700)
    with pytest.raises(listen.ListenError, match="mode 0700"):
        listen.listen(path, 0o600)


def test_socket_from_systemd(tmp_path: Path) -> None:
    with activated_daemon(tmp_path) as daemon:
        connection = daemon.connect()
        spawn(connection, "/bin/sh", "-c", 'exit "${LISTEN_FDS:-0}${NOTIFY_SOCKET:+1}"')
        assert ended(connection) == 0
        connection.close()
        assert daemon.stop() == 0
    assert os.path.exists(daemon.path)


# -- who may use it --


def as_nobody(path: str, first: bytes) -> bytes:
    """Return the daemon's answer to another user who sends `first`."""
    script = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(bytes.fromhex(sys.argv[2]))
try:
    while data := sock.recv(1000):
        os.write(1, data)
except ConnectionResetError:
    pass
"""
    command = [sys.executable, "-I", "-c", script, path, first.hex()]
    return subprocess.check_output(command, timeout=PATIENCE)


@pytest.mark.root
def test_another_user_is_refused_with_the_reason(public_dir: Path) -> None:
    with started_daemon(public_dir) as daemon:
        os.chmod(daemon.path, 0o666)
        answer = as_nobody(daemon.path, HELLO)
        assert answer[4] == lib.EB_REFUSED
        assert b"user 65534 may not use this daemon of user 0" in answer
        assert b"user 65534 may not use" in as_nobody(daemon.path, b"ls\r\n\r\n\r\n\r\n")
        assert daemon.status()["totals"]["refused"] == 2


@pytest.mark.root
def test_flood_of_refusals_does_not_flood_the_log(public_dir: Path) -> None:
    script = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for _ in range(1000):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        sock.sendall(bytes.fromhex(sys.argv[2]))
        while sock.recv(1000):
            pass
"""
    with started_daemon(public_dir, "--log-format=json") as daemon:
        os.chmod(daemon.path, 0o666)
        subprocess.run([sys.executable, "-I", "-c", script, daemon.path, HELLO.hex()], check=True)
        assert daemon.status()["totals"]["refused"] == 1000
        assert daemon.stop() == 0
        entries = [json.loads(line) for line in daemon.log().splitlines()]
        refusals = [entry for entry in entries if entry["message"] == "refused"]
        assert len(refusals) < 100
        assert sum(entry.get("left_out", 1) for entry in refusals) == 1000


def test_complaints_left_out_are_told_when_the_time_is_over() -> None:
    written: list[tuple[str, dict[str, object]]] = []
    timers: list[Callable[[], None]] = []

    class Log:
        def warning(self, message: str, **fields: object) -> None:
            written.append((message, fields))

    complaints = Complaints(Log(), lambda _, callback: timers.append(callback), most=2)  # type: ignore[arg-type]
    for message in ("one", "other", "one", "one", "one"):
        complaints.warning(message, pid=1)
    assert written == [(message, {"pid": 1}) for message in ("one", "other", "one")]
    assert len(timers) == 1
    timers.pop()()
    assert written[3:] == [("one", {"left_out": 2})]
    complaints.warning("one")
    assert (len(written), len(timers)) == (5, 1)


@pytest.mark.root
@pytest.mark.parametrize("allow", ["--allow-uid", "--allow-gid"])
def test_commands_have_the_ids_of_who_asked(public_dir: Path, allow: str) -> None:
    with started_daemon(public_dir, allow, NOBODY) as daemon:
        connection = daemon.connect()
        spawn(connection, "/bin/sh", "-c", 'exit "$(id -u)"')
        assert ended(connection) == 0
        connection.close()
        # Its own ids, and none of the groups that it does not have.
        script = 'test "$(id -u) $(id -G)" = "65534 65534" || exit 1; exit 42'
        argv = [b"sh", b"-c", script.encode()]
        payload = [
            frames.strings(lib.EB_TAG_EXECUTABLES, [b"/bin/sh"]),
            frames.strings(lib.EB_TAG_ARGV, argv),
            frames.strings(lib.EB_TAG_ENV, [b"PATH=/usr/bin:/bin"]),
        ]
        request = HELLO + frames.frame(lib.EB_SPAWN, payload)
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-c"),
                """
import os, socket, struct, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(bytes.fromhex(sys.argv[2]))
data = b""
while True:
    data += sock.recv(1000)
    at = 0
    while len(data) >= at + 5:
        length, kind = struct.unpack_from("<IB", data, at)
        if len(data) < at + 5 + length:
            break
        if kind not in (1, 16):
            print(kind, os.waitstatus_to_exitcode(struct.unpack_from("<i", data, at + 5)[0]))
            raise SystemExit
        at += 5 + length
""",
                daemon.path,
                request.hex(),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.communicate(timeout=PATIENCE)[0] == f"{lib.EB_EXITED} 42\n"


# -- faults --


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"", HELLO[:1], HELLO[:7]])
def test_silence_ends_a_connection_and_nothing_else(tmp_path: Path, first: bytes) -> None:
    with started_daemon(tmp_path, "--patience", 1) as daemon, daemon.socket() as sock:
        connection = daemon.connect()
        sock.sendall(first)
        assert refusal(sock) == "no request came in time"
        spawn(connection, "/bin/true")
        assert ended(connection) == 0
        connection.close()


def test_half_a_frame_and_the_end(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon, daemon.socket() as sock:
        sock.sendall(HELLO[:7])
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
        assert daemon.helpers()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"\0" + bytes(9), "must be HELLO, STATUS or JOB"),
        (b"\0" + b"\xff" * 50, "must be HELLO, STATUS or JOB"),
        (b"\0" + frames.HEADER.pack(4, lib.EB_HELLO) + b"\x63\0\0\0", "version 1 of the"),
        (b"\0" + frames.HEADER.pack(4, lib.EB_STATUS) + b"\x63\0\0\0", "version 1 of the"),
        (b"\0" + frames.HEADER.pack(4, lib.EB_SPAWN) + bytes(4), "must be HELLO, STATUS or JOB"),
    ],
)
def test_garbage_is_refused(tmp_path: Path, first: bytes, reason: str) -> None:
    with started_daemon(tmp_path) as daemon, daemon.socket() as sock:
        sock.sendall(first)
        assert reason in refusal(sock)
        assert daemon.helpers()


@pytest.mark.slow
def test_shortage_of_descriptors_passes(tmp_path: Path) -> None:
    under = ["/bin/sh", "-c", 'ulimit -n 30; exec "$@"', "sh"]
    with started_daemon(tmp_path, under=under) as daemon:
        socks = [daemon.socket() for _ in range(40)]
        until(lambda: "cannot accept" in daemon.log())
        for sock in socks:
            sock.close()
        assert daemon.helpers()
        assert daemon.log().count("cannot accept") == 1


@contextlib.contextmanager
def all_descriptors_taken(daemon: Daemon) -> Iterator[None]:
    """Connect until the daemon has no descriptor left, of SHORT."""
    socks = [daemon.socket() for _ in range(30)]
    try:
        until(lambda: "cannot accept" in daemon.log())
        yield
    finally:
        for sock in socks:
            sock.close()


SHORT = ["/bin/sh", "-c", 'ulimit -n 40; exec "$@"', "sh"]


@pytest.mark.slow
def test_text_request_needs_no_descriptor_to_end(tmp_path: Path) -> None:
    """Nothing is imported or opened when a client ends its side."""
    with started_daemon(tmp_path, under=SHORT) as daemon, daemon.socket() as running:
        running.sendall(b"read x; cat; echo $x" + b"\r\n\r\n" + b"first\nsecond\n\r\n\r\n")
        before = daemon.status()["totals"]["started"]
        assert before <= 1
        with daemon.socket() as other:
            other.sendall(b"sleep 100\r\n\r\n\r\n\r\n")
            until(lambda: daemon.status()["totals"]["started"] >= 1)
            with all_descriptors_taken(daemon):
                other.shutdown(socket.SHUT_WR)
                running.shutdown(socket.SHUT_WR)
                assert b"second\nfirst\n" in read_all(running)
                cpu = psutil.Process(daemon.process.pid).cpu_times
                used = sum(cpu())
                select.select([], [], [], 1.5)  # in which it could spin
                assert sum(cpu()) - used < 1
        assert daemon.helpers()
        assert "internal error" not in daemon.log()


@pytest.mark.slow
def test_client_that_waits_for_a_descriptor_is_refused(tmp_path: Path) -> None:
    with started_daemon(tmp_path, under=SHORT) as daemon, all_descriptors_taken(daemon):
        with daemon.socket() as late:
            late.sendall(HELLO)
            # Those before it wait for their turn, too.
            answer = refusal(late)
        assert answer == "the daemon is full: Too many open files"


@pytest.mark.root
def test_strangers_do_not_bring_the_end_nearer(public_dir: Path) -> None:
    with started_daemon(public_dir, "--max-accepts", 2) as daemon:
        os.chmod(daemon.path, 0o666)
        for _ in range(3):
            assert b"may not use this daemon" in as_nobody(daemon.path, HELLO)
        assert daemon.process.poll() is None
        daemon.status()
        daemon.status()
        assert daemon.process.wait(PATIENCE) == 0


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(tmp_path: Path, closed: str) -> None:
    under = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh"]
    with started_daemon(tmp_path, under=under) as daemon:
        for fd in range(3):
            target = os.readlink(f"/proc/{daemon.process.pid}/fd/{fd}")
            assert "socket" not in target and "event" not in target
        connection = daemon.connect()
        for _ in range(3):
            spawn(connection, "/bin/true")
            assert ended(connection) == 0
        connection.close()
        assert daemon.status()["totals"]["helpers_lost"] == 0
        assert daemon.stop() == 0


def test_directory_where_it_was_started_is_not_searched_for_modules(tmp_path: Path) -> None:
    package = tmp_path / "setproctitle"  # which the server alone imports
    package.mkdir()
    (package / "_setproctitle.py").write_text("open('searched', 'w').close()")
    with started_daemon(tmp_path, cwd=tmp_path) as daemon:
        assert daemon.helpers()
    assert not (tmp_path / "searched").exists()


def test_full_disk_for_the_log(tmp_path: Path) -> None:
    with (
        open("/dev/full", "wb") as full,
        started_daemon(tmp_path, "--log-level", "debug", stderr=full) as daemon,
    ):
        for _ in range(3):
            assert daemon.helpers()
        assert daemon.stop() == 0


def test_reader_of_the_log_that_has_stopped(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        with started_daemon(tmp_path, "--log-level", "debug", stderr=writer) as daemon:
            for _ in range(200):
                assert daemon.helpers()
            os.read(reader, 1 << 16)
            assert daemon.stop() == 0
            assert b"lost=" in os.read(reader, 1 << 16)
    finally:
        os.close(reader)
        os.close(writer)


def test_helper_that_dies_is_replaced(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size", 2) as daemon:
        connections = [daemon.connect() for _ in range(2)]
        commands = [spawn(connection, "/bin/sleep", "100") for connection in connections]
        parents = [psutil.Process(pid).ppid() for pid in commands]
        before = daemon.helpers()
        assert set(parents) == set(before)
        os.kill(parents[0], signal.SIGKILL)
        with pytest.raises(OSError, match="ended"):  # at once
            connections[0].receive(PATIENCE)
        until(lambda: len(set(daemon.helpers()) - {parents[0]}) == 2)
        assert daemon.status()["totals"]["helpers_lost"] == 1
        send_signal(connections[1], commands[1], signal.SIGTERM)
        assert ended(connections[1]) == -signal.SIGTERM
        os.kill(commands[0], signal.SIGKILL)
        for connection in connections:
            connection.close()


def test_counts_of_a_killed_helper_are_not_lost(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size", 1) as daemon:
        connection = daemon.connect()
        for _ in range(5):
            spawn(connection, "/bin/true")
            ended(connection)
        request(connection, "/nonexistent")
        assert isinstance(connection.receive(PATIENCE), Failed)
        pid = spawn(connection, "/bin/sleep", "100")
        (helper,) = daemon.helpers()
        os.kill(helper, signal.SIGKILL)
        until(lambda: daemon.status()["totals"]["helpers_lost"] == 1)
        status = daemon.status()
        totals = status["totals"]
        assert (totals["started"], totals["ended"], totals["commands_lost"]) == (6, 5, 1)
        assert status["failures"] == {"ENOENT": 1}
        os.kill(pid, signal.SIGKILL)
        connection.close()


@pytest.mark.slow
def test_helper_is_not_crowded(tmp_path: Path) -> None:
    """A start copies the helper's table of descriptors."""
    with started_daemon(tmp_path, "--pool-size", 1) as daemon:
        connections = [daemon.connect() for _ in range(700)]
        for connection in connections:
            spawn(connection, "/bin/true")
            assert ended(connection) == 0
        helpers = daemon.status()["helpers"]
        assert sorted(helper["connections"] for helper in helpers) == [188, 256, 256]
        for connection in connections:
            connection.close()
        until(lambda: len(daemon.helpers()) == 1)


@pytest.mark.slow
def test_helpers_survive_the_server(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as old:
        connection, idle = old.connect(), old.connect()
        pid = spawn(connection, "/bin/sleep", "100")
        old.process.kill()
        old.process.wait()
        with started_daemon(tmp_path) as new:
            assert new.helpers()
            send_signal(connection, pid, signal.SIGUSR1)
            assert ended(connection) == -signal.SIGUSR1
        connection.close()
        idle.close()


# -- the end --


def test_commands_may_finish(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        connection, idle = daemon.connect(), daemon.connect()
        pid = spawn(connection, "/bin/sleep", "100")
        daemon.process.terminate()
        assert daemon.notify.recv(100) == b"STOPPING=1"
        assert read_all(idle.sock)[len(frames.HELLO) :] == b""  # at rest, so closed
        send_signal(connection, pid, signal.SIGTERM)
        assert ended(connection) == -signal.SIGTERM
        assert daemon.process.wait(PATIENCE) == 0
        connection.close()
        idle.close()


@pytest.mark.slow
def test_commands_that_do_not_finish_are_terminated(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--grace", 0.1) as daemon:
        connection = daemon.connect()
        spawn(connection, "/bin/sleep", "100")
        assert daemon.stop() == 3
        assert ended(connection) == -signal.SIGTERM
        connection.close()


def ready_to_ignore_sigterm(daemon: Daemon) -> tuple[int, Connection]:
    connection = daemon.connect()
    reader, writer = os.pipe()
    script = "trap '' TERM; echo ready; while :; do sleep 100; done"
    with open(os.devnull) as null:
        pid = spawn(connection, "/bin/sh", "-c", script, fds=[null.fileno(), writer])
    os.close(writer)
    assert os.read(reader, 100) == b"ready\n"
    os.close(reader)
    return pid, connection


def test_commands_that_ignore_sigterm_are_killed(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        pid, connection = ready_to_ignore_sigterm(daemon)
        daemon.process.terminate()
        assert daemon.notify.recv(100) == b"STOPPING=1"
        daemon.process.terminate()  # each one more: no patience
        until(lambda: "terminating" in daemon.log())
        daemon.process.terminate()
        assert daemon.process.wait(PATIENCE) == 4
        assert has_ended(pid)
        connection.close()


def test_max_accepts(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-accepts", 2) as daemon:
        first, second = daemon.connect(), daemon.connect()
        for connection in (first, second):
            spawn(connection, "/bin/sh", "-c", "exit 5")
            assert ended(connection) == 5
            connection.close()
        assert daemon.process.wait(PATIENCE) == 0
        assert not os.path.exists(daemon.path)


def test_commands_that_run_at_the_last_accept_may_finish(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-accepts", 1, "--grace", 0) as daemon:
        connection = daemon.connect()
        pid = spawn(connection, "/bin/sleep", "100")
        assert daemon.notify.recv(100) == b"STOPPING=1"
        assert not os.path.exists(daemon.path)
        send_signal(connection, pid, signal.SIGUSR1)
        assert ended(connection) == -signal.SIGUSR1
        connection.close()
        assert daemon.process.wait(PATIENCE) == 0


@pytest.mark.slow
def test_half_a_text_request_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--grace", 0.1) as daemon, daemon.socket() as sock:
        sock.sendall(b"sleep 1")
        assert daemon.helpers()  # after it in the daemon's queue
        assert daemon.stop() == 0


# -- limits --


def test_helper_is_replaced_after_its_share(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size", 1, "--max-child-tasks", 2) as daemon:
        live, connection = daemon.connect(), daemon.connect()
        pid = spawn(live, "/bin/sleep", "100")
        old = psutil.Process(pid).ppid()
        spawn(connection, "/bin/true")
        assert ended(connection) == 0
        connection.close()
        until(lambda: len(daemon.helpers()) == 2)
        connection = daemon.connect()
        last = spawn(connection, "/bin/sleep", "100")
        new = psutil.Process(last).ppid()
        assert new != old
        send_signal(live, pid, signal.SIGTERM)
        assert ended(live) == -signal.SIGTERM
        live.close()
        until(lambda: daemon.helpers() == [new])
        totals = daemon.status()["totals"]
        assert (totals["started"], totals["ended"], totals["helpers_lost"]) == (3, 2, 0)
        send_signal(connection, last, signal.SIGTERM)
        ended(connection)
        connection.close()


def test_excess_waits_and_leaves_with_its_client(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-processes", 1) as daemon:
        running, leaving, waiting = (daemon.connect() for _ in range(3))
        pid = spawn(running, "/bin/sleep", "100")
        request(leaving, "/bin/true")
        until(lambda: daemon.status()["queue"] == 1)
        request(waiting, "/bin/true")
        until(lambda: daemon.status()["queue"] == 2)
        leaving.close()
        until(lambda: daemon.status()["queue"] == 1)
        send_signal(running, pid, signal.SIGTERM)
        assert ended(running) == -signal.SIGTERM
        waiting.receive(PATIENCE)
        assert ended(waiting) == 0
        for each in (running, waiting):
            each.close()


def test_clients_take_turns() -> None:
    turns = Turns(2, lambda uid: Limits())
    for connection in range(1, 6):
        turns.want(connection, 1000, client=100)
    assert list(turns.next(0.0)) == [1, 2]
    turns.want(11, 1000, client=200)
    turns.want(12, 1000, client=200)
    assert list(turns.next(0.0)) == []
    order: list[int] = []
    for connection in (1, 2, 3, 11):
        turns.done(connection)
        order += turns.next(0.0)
    assert order == [3, 11, 4, 12]
    assert len(turns) == 1


def test_a_users_own_limit_holds_up_nobody_else() -> None:
    turns = Turns(0, lambda uid: Limits(commands=1))
    turns.want(1, 1000, client=100)
    turns.want(2, 1000, client=100)
    turns.want(3, 2000, client=200)
    assert list(turns.next(0.0)) == [1, 3]
    turns.done(2)  # withdrawn
    turns.want(4, 1000, client=100)
    turns.done(1)
    assert list(turns.next(0.0)) == [4]
    for connection in (3, 4, 4):
        turns.done(connection)
    assert len(turns) == 0
    assert list(turns.next(0.0)) == []


def test_starts_a_second() -> None:
    limits = {1000: Limits(starts_per_second=4, burst=2), 2000: Limits()}
    turns = Turns(0, lambda uid: limits[uid])
    for connection in range(1, 8):
        turns.want(connection, 1000, client=1)
    turns.want(11, 2000, client=2)
    assert list(turns.next(100.0)) == [1, 11, 2]
    assert turns.next_at == 100.25
    assert list(turns.next(100.125)) == []
    assert turns.next_at == 100.25
    assert list(turns.next(100.25)) == [3]
    for connection in (1, 2, 3, 11):
        turns.done(connection)
    # What was not used adds up, but not beyond the burst, nor by leaving.
    assert list(turns.next(102.0)) == [4, 5]
    for connection in (4, 5, 6, 7):
        turns.done(connection)
    turns.want(8, 1000, client=1)
    assert list(turns.next(102.0)) == []
    limits[1000] = Limits()
    turns.refresh()
    assert list(turns.next(102.0)) == [8]
    assert turns.next_at is None


def test_file_of_limits(tmp_path: Path) -> None:
    file = tmp_path / "limits"
    table = Table(str(file), Limits(commands=3))
    file.write_text('{"default": {"connections": 9}, "root": {"commands": 1}, "12": {"burst": 0}}')
    table.read()
    assert table.of(0) == Limits(commands=1, connections=9)
    assert table.of(12) == table.of(13) == Limits(commands=3, connections=9)
    file.write_text('{"root": {"commands": 1, "bytes": "64K", "ring": "1G"}}')
    table.read()
    assert table.of(0) == Limits(commands=1, bytes=64 << 10, ring=1 << 30)
    for text, reason in (
        ("{", "Expecting"),
        ("[]", "not an object"),
        ('{"nobody-has": {}}', "unknown user nobody-has"),
        ('{"default": {"command": 1}}', "unknown limit 'command'"),
        ('{"default": {"commands": -1}}', "commands cannot be -1"),
        ('{"default": {"commands": 1.5}}', "commands cannot be 1.5"),
        ('{"default": {"starts_per_second": true}}', "cannot be True"),
        ('{"default": {"bytes": "much"}}', "'much' is not a size such as"),
        ('{"default": {"commands": "1K"}}', "commands cannot be '1K'"),
        ('{"0": 5}', "5 is not an object"),
    ):
        file.write_text(text)
        with pytest.raises(LimitsError, match=reason):
            table.read()
        assert table.of(0).commands == 1
    file.unlink()
    with pytest.raises(LimitsError, match="No such file"):
        table.read()


def test_file_of_limits_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "limits"
    uid = os.geteuid()
    file.write_text(json.dumps({str(uid): {"commands": 1, "connections": 4}}))
    with started_daemon(tmp_path, "--limits", file) as daemon:
        connections = [daemon.connect() for _ in range(3)]
        pids = [spawn(connections[0], "/bin/sleep", "100")]
        for number in (1, 2):
            request(connections[number], "/bin/sleep", "100")
            until(lambda number=number: daemon.status()["queue"] == number)  # type: ignore[misc]
        with daemon.socket(), daemon.socket() as sock:
            sock.sendall(HELLO)
            assert refusal(sock) == f"user {uid} has 4 connections, and may have no more"
        file.write_text("nonsense")
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "the limits stay as they were" in daemon.log())
        file.write_text(json.dumps({"default": {"commands": 2, "connections": 4}}))
        daemon.process.send_signal(signal.SIGHUP)
        started = connections[1].receive(PATIENCE)
        assert isinstance(started, Spawned)
        pids.append(started.pid)
        (user,) = daemon.status()["users"]
        assert (user["uid"], user["running"], user["waiting"]) == (uid, 2, 1)
        assert user["connections"] == 3
        assert user["limits"]["commands"] == 2
        send_signal(connections[0], pids[0], signal.SIGTERM)
        ended(connections[0])
        last = connections[2].receive(PATIENCE)
        assert isinstance(last, Spawned)
        for connection, pid in zip(connections[1:], (pids[1], last.pid), strict=True):
            send_signal(connection, pid, signal.SIGTERM)
            ended(connection)
        for connection in connections:
            connection.close()
        until(lambda: daemon.status()["users"] == [])


def test_wrong_file_of_limits_is_one_line(tmp_path: Path) -> None:
    done = serve("--socket", tmp_path / "socket", "--limits", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr == f"errand-boy: {tmp_path}/none: No such file or directory\n"
    assert not (tmp_path / "socket").exists()


def test_bytes_that_are_kept_for_a_user(tmp_path: Path) -> None:
    file = tmp_path / "limits"
    file.write_text('{"default": {"bytes": 1000}}')

    def answer(size: int) -> bytes:
        with daemon.socket() as sock:
            sock.sendall(b"wc -c\r\n\r\n" + b"x" * size + b"\r\n\r\n")
            return b"".join(iter(lambda: sock.recv(1000), b""))

    with started_daemon(tmp_path, "--limits", file) as daemon, daemon.socket() as half:
        half.sendall(b"cat\r\n\r\n" + b"x" * 603)
        until(lambda: [user["bytes"] for user in daemon.status()["users"]] == [600])
        assert answer(400).startswith(b"\r\n0:400\n")
        assert b"the requests of this user may hold at most 1000 bytes" in answer(401)
        file.write_text('{"default": {"bytes": 0}}')
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "limits have been read" in daemon.log())
        assert answer(1_000_000).startswith(b"\r\n0:1000000\n")


@pytest.mark.slow
def test_starts_beyond_the_rate_wait(tmp_path: Path) -> None:
    file = tmp_path / "limits"
    file.write_text('{"default": {"starts_per_second": 20, "burst": 3}}')
    with started_daemon(tmp_path, "--limits", file) as daemon:
        connection = daemon.connect()
        for _ in range(13):
            spawn(connection, "/bin/true")
            assert ended(connection) == 0
        (user,) = daemon.status()["users"]
        assert user["limits"]["starts_per_second"] == 20
        assert "starts_per_second=20 burst=3 jobs=" in _status.table(daemon.status())
        connection.close()
