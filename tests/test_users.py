"""A daemon of root serves each user through helpers with only that user's rights."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, started_script, until
from daemon import (
    Daemon,
    acting_as,
    ended,
    send_signal,
    spawn,
    started_daemon,
    taken_from,
)

from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.connection import Connection

pytestmark = pytest.mark.root

FIRST, SECOND, THIRD = 12345, 12346, 12347
STATUS = b"\0" + frames.HEADER.pack(4, lib.EB_STATUS) + struct.pack("<I", lib.EB_VERSION)


def connect_as(daemon: Daemon, uid: int, groups: Sequence[int] = ()) -> Connection:
    """Return a connection of user `uid`, whose group has the same number."""
    with acting_as(uid, uid, groups):
        return daemon.connect()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def refusal(connection: Connection) -> str:
    with pytest.raises(PermissionError) as caught:
        connection.receive(PATIENCE)
    return str(caught.value)


def end(connection: Connection, pid: int) -> None:
    send_signal(connection, pid, signal.SIGKILL)
    assert ended(connection) == -signal.SIGKILL
    connection.close()


@contextlib.contextmanager
def open_daemon(directory: Path, *options: object, **popen: object) -> Iterator[Daemon]:
    """Run a daemon that serves FIRST, SECOND and THIRD."""
    allowed = [f"--allow-uid={uid}" for uid in (FIRST, SECOND, THIRD)]
    with started_daemon(directory, *allowed, *options, **popen) as daemon:  # type: ignore[arg-type]
        yield daemon


def test_no_process_has_more_rights_than_its_user(public_dir: Path) -> None:
    groups = {FIRST: [FIRST, 23456, 23457], SECOND: [], THIRD: [23456]}
    with open_daemon(public_dir, "--pool-size=1") as daemon:
        live: dict[int, tuple[Connection, int, socket.socket]] = {}
        for uid, more in groups.items():
            connection = connect_as(daemon, uid, more)
            pid = spawn(connection, "/bin/sh", "-c", "sleep 100; exit 1")
            with acting_as(uid, uid, more):
                text = daemon.socket()
            text.sendall(b"sleep 101\r\n\r\n\r\n\r\n")
            live[uid] = (connection, pid, text)
        server = psutil.Process(daemon.process.pid)
        until(lambda: sum(p.name() == "sleep" for p in server.children(recursive=True)) == 6)
        sessions = set()
        for uid, (_, pid, _) in live.items():
            helper = psutil.Process(pid).parent()
            assert helper is not None
            sessions.add(os.getsid(helper.pid))
            processes = [helper, *helper.children(recursive=True)]
            assert len(processes) >= 4
            for process in processes:
                status = status_of(process.pid)
                assert status["Uid"].split() == [str(uid)] * 4
                assert status["Gid"].split() == [str(uid)] * 4
                assert sorted(map(int, status["Groups"].split())) == sorted(groups[uid])
                for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                    assert int(status[name], 16) == 0
                assert Path(f"/proc/{process.pid}/loginuid").read_text() == str(uid)
                assert process.cwd() == "/"
                assert process.environ() == {} or process is not helper
            assert {os.readlink(f"/proc/{helper.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
        assert len(sessions) == 3
        assert os.getsid(daemon.process.pid) not in sessions
        # Nothing else has come of the server than helpers of ours and of these three.
        for child in server.children():
            assert child.uids().real in (0, *groups)
        for connection, pid, text in live.values():
            send_signal(connection, -pid, signal.SIGKILL)
            assert ended(connection) == -signal.SIGKILL
            connection.close()
            text.close()


def test_another_users_group_and_roots_own_are_told_apart(public_dir: Path) -> None:
    with open_daemon(public_dir, "--pool-size=1") as daemon:
        connections = [
            daemon.connect(),
            connect_as(daemon, FIRST, [FIRST]),
            connect_as(daemon, FIRST, [FIRST, 23456]),
            connect_as(daemon, FIRST, [FIRST]),
        ]
        parents = []
        for connection in connections:
            pid = spawn(connection, "/bin/sleep", "100")
            parents.append(psutil.Process(pid).ppid())
            end(connection, pid)
        assert parents[1] == parents[3]
        assert len(set(parents)) == 3


WITH_A_KEY = """
import ctypes, os, sys
syscall = ctypes.CDLL(None).syscall
keyctl, add_key = (250, 248) if os.uname().machine == "x86_64" else (219, 217)
assert syscall(keyctl, 1, None) > 0  # KEYCTL_JOIN_SESSION_KEYRING
assert syscall(add_key, b"user", b"of-the-daemon", b"secret", 6, -3) > 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def told(daemon: Daemon, uid: int, line: bytes) -> bytes:
    """Return the complete answer to a text client of user `uid`."""
    with acting_as(uid, uid, [uid]):
        sock = daemon.socket()
    with sock:
        sock.sendall(line + b"\r\n\r\n\r\n\r\n")
        data = b""
        while part := sock.recv(1 << 16):
            data += part
    return data


def test_session_keyring_is_the_users_own(public_dir: Path) -> None:
    line = b"grep -c of-the-daemon /proc/keys"
    under = [sys.executable, "-I", "-c", WITH_A_KEY]
    with open_daemon(public_dir, under=under) as daemon:
        assert b"0:1\n" in told(daemon, 0, line)
        for uid in (FIRST, SECOND):
            assert b"0:0\n" in told(daemon, uid, line)


def test_more_groups_than_getsockopt_of_python_takes(public_dir: Path) -> None:
    for count in (100, 20_000):
        groups = list(range(30_000, 30_000 + count))
        with open_daemon(public_dir) as daemon:
            connection = connect_as(daemon, FIRST, groups)
            pid = spawn(connection, "/bin/sleep", "100")
            assert list(map(int, status_of(pid)["Groups"].split())) == groups
            end(connection, pid)


def test_group_far_down_the_list_is_one_to_be_allowed(public_dir: Path) -> None:
    with started_daemon(public_dir, "--allow-gid=30099") as daemon:
        connection = connect_as(daemon, FIRST, list(range(30_000, 30_100)))
        end(connection, spawn(connection, "/bin/sleep", "100"))


def test_helpers_come_with_work_and_go_without(public_dir: Path) -> None:
    with open_daemon(public_dir, "--pool-size=2", "--idle=0.1") as daemon:
        own = set(daemon.helpers())
        first = connect_as(daemon, FIRST)
        pids = [spawn(first, "/bin/sleep", "100")]
        assert len(set(daemon.helpers()) - own) == 1
        others = [connect_as(daemon, FIRST) for _ in range(3)]
        pids += [spawn(connection, "/bin/sleep", "100") for connection in others]
        assert len(set(daemon.helpers()) - own) == 2
        assert len({psutil.Process(pid).ppid() for pid in pids}) == 2
        for connection, pid in zip([first, *others], pids, strict=True):
            end(connection, pid)
        until(lambda: set(daemon.helpers()) == own)
        assert daemon.status()["totals"]["helpers_lost"] == 0
        again = connect_as(daemon, FIRST)
        end(again, spawn(again, "/bin/sleep", "100"))


def test_more_users_than_allowed_are_told(public_dir: Path) -> None:
    with open_daemon(public_dir, "--max-users=2") as daemon:
        first, second = connect_as(daemon, FIRST), connect_as(daemon, SECOND)
        # Both are served, not only connected: the next one's first bytes may come before theirs.
        one, other = spawn(first, "/bin/sleep", "100"), spawn(second, "/bin/sleep", "100")
        assert "2 users are served, and --max-users allows no more" in refusal(
            connect_as(daemon, THIRD)
        )
        end(first, one)
        # Who has no connection makes room.
        until(lambda: all(h["uid"] != FIRST or not h["connections"] for h in helpers(daemon)))
        third = connect_as(daemon, THIRD)
        end(third, spawn(third, "/bin/sleep", "100"))
        end(second, other)


def helpers(daemon: Daemon) -> list[dict[str, int]]:
    found: list[dict[str, int]] = daemon.status()["helpers"]
    return found


def test_connections_for_which_a_stopped_helper_has_no_room_are_counted(public_dir: Path) -> None:
    """They stay open in the server, where a user may have a quarter of the descriptors."""
    under = ["prlimit", "--nofile=200"]
    with open_daemon(public_dir, "--pool-size=1", under=under) as daemon:
        connections = [connect_as(daemon, FIRST)]
        end(connections[0], spawn(connections[0], "/bin/sleep", "100"))
        until(lambda: any(h["uid"] == FIRST for h in helpers(daemon)))
        (helper,) = [h["pid"] for h in helpers(daemon) if h["uid"] == FIRST]
        os.kill(helper, signal.SIGSTOP)
        # Each leaves a question, when the answer has come without it, that fills the queue.
        for _ in range(2):
            with acting_as(FIRST, FIRST, []):
                asking = [daemon.socket() for _ in range(45)]
            for sock in asking:
                sock.sendall(STATUS)
            for sock in asking:
                while sock.recv(1 << 16):
                    pass
                sock.close()
        connections = []
        for _ in range(250):
            with acting_as(FIRST, FIRST, []):
                connections.append(Connection(daemon.socket()))
            with contextlib.suppress(BrokenPipeError):  # it has been refused already
                connections[-1].open()
        # Which of them there is no room for depends on how many the server accepts at once.
        waiting = {one.sock: one for one in connections}
        reason = ""
        while "connections that no helper serves yet" not in reason:
            ready, _, _ = select.select(waiting, [], [], PATIENCE)
            reason = refusal(waiting.pop(ready[0]))
        server = psutil.Process(daemon.process.pid)
        until(lambda: server.num_fds() < 100)  # those that are refused are closed a little later
        other = connect_as(daemon, SECOND)
        end(other, spawn(other, "/bin/sleep", "100"))
        for connection in connections:
            connection.close()
        os.kill(helper, signal.SIGKILL)


def test_one_user_does_not_take_the_place_of_all(public_dir: Path) -> None:
    with open_daemon(public_dir, "--max-users=20") as daemon:
        connections = [connect_as(daemon, FIRST, [FIRST, 30_000 + i]) for i in range(8)]
        pids = [spawn(connection, "/bin/sleep", "100") for connection in connections]
        assert "8 other sets of groups" in refusal(connect_as(daemon, FIRST, [FIRST]))
        connections.append(connect_as(daemon, SECOND))
        pids.append(spawn(connections[-1], "/bin/sleep", "100"))
        for connection, pid in zip(connections, pids, strict=True):
            end(connection, pid)


@pytest.mark.parametrize("capability", ["setuid", "setgid"])
def test_daemon_that_cannot_change_ids_says_so(public_dir: Path, capability: str) -> None:
    under = ["setpriv", f"--bounding-set=-{capability}"]
    with open_daemon(public_dir, under=under) as daemon:
        assert "could not become this user" in refusal(connect_as(daemon, FIRST))
        assert b"could not become this user" in told(daemon, FIRST, b"id")
        assert "cannot become user 12345" in daemon.log()
        connection = daemon.connect()
        end(connection, spawn(connection, "/bin/sleep", "100"))


def test_daemon_needs_few_capabilities(public_dir: Path) -> None:
    """These are the ones in docs/deployment.md."""
    under = ["setpriv", "--no-new-privs", "--bounding-set=-all,+setuid,+setgid,+kill"]
    with open_daemon(public_dir, under=under) as daemon:
        assert b"\r\n0:12345\n\r\n1:" in told(daemon, FIRST, b"id -u")
        connection = connect_as(daemon, SECOND)
        pid = spawn(connection, "/bin/sleep", "100")
        assert status_of(pid)["CapBnd"] == f"{1 << 5 | 1 << 6 | 1 << 7:016x}"
        assert status_of(pid)["CapPrm"] == "0" * 16
        end(connection, pid)
        connection = daemon.connect()
        end(connection, spawn(connection, "/bin/sleep", "100"))
        assert daemon.stop() == 0


def test_signals_are_sent_with_the_users_rights(public_dir: Path) -> None:
    """The user may not end a set-user-ID program that has become root completely."""
    program = public_dir / "setpriv"
    shutil.copy("/usr/bin/setpriv", program)
    program.chmod(0o4755)
    with open_daemon(public_dir) as daemon:
        connection = connect_as(daemon, FIRST)
        pid = spawn(connection, str(program), "--reuid=0", "--clear-groups", "/bin/sleep", "100")
        until(lambda: psutil.Process(pid).name() == "sleep")
        assert status_of(pid)["Uid"].split() == ["0"] * 4
        send_signal(connection, pid, signal.SIGKILL)
        send_signal(connection, pid, signal.SIGTERM)
        daemon.status()  # the helper has answered, after it has read those
        assert psutil.Process(pid).name() == "sleep"
        os.kill(pid, signal.SIGKILL)
        assert ended(connection) == -signal.SIGKILL
        connection.close()


@pytest.mark.parametrize(
    "nonsense",
    [
        frames.HEADER.pack(1 << 30, lib.EB_REPORT),
        frames.HEADER.pack(3, lib.EB_WANT) + b"abc",
        frames.HEADER.pack(4, lib.EB_REPORT) + b"abcd",
        frames.HEADER.pack(8 << 20, lib.EB_REPORT) + bytes(8 << 20),
    ],
)
def test_helper_taken_over_by_its_user_harms_that_user_only(
    public_dir: Path, nonsense: bytes
) -> None:
    """Its user may trace it, and so make it say anything."""
    with open_daemon(public_dir, "--pool-size=1") as daemon:
        mine, theirs = connect_as(daemon, FIRST), connect_as(daemon, SECOND)
        pid = spawn(theirs, "/bin/sleep", "100")
        orphan = spawn(mine, "/bin/sleep", "100")
        helper = psutil.Process(orphan).ppid()
        with taken_from(helper, 3) as control:
            with contextlib.suppress(OSError):
                control.sendall(nonsense)
            until(lambda: helper not in daemon.helpers())
        assert "a helper is killed" in daemon.log()
        assert psutil.pid_exists(pid)
        end(theirs, pid)
        again = connect_as(daemon, FIRST)
        end(again, spawn(again, "/bin/sleep", "100"))
        mine.close()
        os.kill(orphan, signal.SIGKILL)


NUMBERED = """
import struct
number = (ctypes.c_int * 1)(int(sys.argv[2]))
fields = 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(number), 1
arguments = struct.pack("<10Q", *fields)
clone3, syscall = 435, ctypes.PyDLL(None).syscall
report("ready")
try:
    while True:
        os.kill(number[0], 0)
except ProcessLookupError:  # somebody has waited for it
    pid = syscall(clone3, arguments, len(arguments))
if pid == 0:
    os.execv("/bin/sleep", ["sleep", "100"])
report(pid)
sys.stdin.readline()
if pid > 0:
    os.kill(pid, signal.SIGTERM)
    report(os.waitpid(pid, 0)[1])
"""


def test_number_of_a_helper_that_has_ended_is_not_signalled(public_dir: Path) -> None:
    """Its user can leave bad frames, and have another process get the number."""
    with open_daemon(public_dir, "--pool-size=1") as daemon:
        connection = connect_as(daemon, FIRST)
        pid = spawn(connection, "/bin/sleep", "100")
        helper = psutil.Process(pid).ppid()
        send_signal(connection, pid, signal.SIGKILL)  # the helper's session has no other member
        assert ended(connection) == -signal.SIGKILL
        with taken_from(helper, 3) as control, started_script(NUMBERED, args=[helper]) as script:
            assert script.stdin is not None and script.stdout is not None
            assert json.loads(script.stdout.readline()) == "ready"
            server = psutil.Process(daemon.process.pid)
            server.suspend()
            until(lambda: server.status() == psutil.STATUS_STOPPED)
            good, bad = (
                frames.HEADER.pack(0, lib.EB_FULL),
                frames.HEADER.pack(1 << 30, lib.EB_REPORT),
            )
            control.sendall(good * 4000 + bad)
            os.kill(helper, signal.SIGKILL)
            until(lambda: psutil.Process(helper).status() == psutil.STATUS_ZOMBIE)
            server.resume()
            made = json.loads(script.stdout.readline())  # -1: the kernel lets nobody choose pids
            until(lambda: helper not in daemon.helpers())
            out, _ = script.communicate("\n", timeout=PATIENCE)
        if made > 0:
            assert json.loads(out) == signal.SIGTERM
        assert "a helper has died" in daemon.log()
        assert "internal error" not in daemon.log()
        connection.close()
        assert daemon.stop() == 0


def test_report_is_not_longer_than_connections_explain(public_dir: Path) -> None:
    """A report of a million commands, for example, would delay everybody."""
    with open_daemon(public_dir, "--pool-size=1") as daemon:
        connection = connect_as(daemon, FIRST)
        pid = spawn(connection, "/bin/sleep", "100")
        helper = psutil.Process(pid).ppid()
        with taken_from(helper, 3) as control:
            os.kill(helper, signal.SIGSTOP)
            daemon.status()  # and a question stays
            control.sendall(frames.HEADER.pack(5000, lib.EB_REPORT))
            until(lambda: helper not in daemon.helpers())
        assert "it sent a long frame" in daemon.log()
        connection.close()
        os.kill(pid, signal.SIGKILL)


def test_helper_speaks_for_its_own_connections_only(public_dir: Path) -> None:
    """For example, where commands are limited, it might say that another's command has ended."""
    with open_daemon(public_dir, "--pool-size=1", "--max-processes=1") as daemon:
        running = connect_as(daemon, SECOND)
        pid = spawn(running, "/bin/sleep", "100")
        waiting = connect_as(daemon, FIRST)
        connection = connect_as(daemon, FIRST)  # the helper is there
        until(lambda: any(h["uid"] == FIRST for h in helpers(daemon)))
        (helper,) = [h["pid"] for h in helpers(daemon) if h["uid"] == FIRST]
        with taken_from(helper, 3) as control:
            for number in range(10):
                for kind in (lib.EB_DONE, lib.EB_CLOSED):
                    control.sendall(frames.HEADER.pack(4, kind) + struct.pack("<I", number))
            daemon.status()
        assert any(h["uid"] == SECOND and h["connections"] == 1 for h in helpers(daemon))
        assert helpers(daemon)
        end(running, pid)
        waiting.close()
        connection.close()


def test_user_may_trace_its_helper_and_nobody_elses(public_dir: Path) -> None:
    with open_daemon(public_dir) as daemon:
        connections = [connect_as(daemon, uid) for uid in (FIRST, SECOND)]
        pids = [spawn(connection, "/bin/sleep", "100") for connection in connections]
        first, second = (psutil.Process(pid).ppid() for pid in pids)
        with acting_as(FIRST, FIRST, []):
            assert os.stat(f"/proc/{first}/mem").st_uid == FIRST
            assert os.stat(f"/proc/{second}/mem").st_uid == SECOND
            with pytest.raises(PermissionError):
                open(f"/proc/{second}/mem", "rb")
        for connection, pid in zip(connections, pids, strict=True):
            end(connection, pid)


def test_limit_of_commands_counts_users(public_dir: Path) -> None:
    with open_daemon(public_dir, "--max-processes-per-user=1") as daemon:
        connections = [connect_as(daemon, FIRST), connect_as(daemon, SECOND)]
        pids = [spawn(connection, "/bin/sleep", "100") for connection in connections]
        # Another process of a user whose limit is reached is no other user.
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                waiting = connect_as(daemon, FIRST)
                spawn(waiting, "/bin/true")
            os._exit(0)
        until(lambda: daemon.status()["queue"] == 1)
        for connection, live in zip(connections, pids, strict=True):
            end(connection, live)
        os.waitpid(pid, 0)


def test_environment_of_the_daemon_is_nobody_elses(public_dir: Path) -> None:
    with open_daemon(public_dir, env={"SECRET": "1"}) as daemon:
        own, other = daemon.connect(), connect_as(daemon, FIRST)
        pids = [spawn(connection, "/bin/sleep", "100") for connection in (own, other)]
        seen = [Path(f"/proc/{pid}/environ").read_bytes() for pid in pids]
        assert b"SECRET=1" in seen[0]
        assert (
            seen[1] == Path(f"/proc/{psutil.Process(pids[1]).ppid()}/environ").read_bytes() == b""
        )
        end(own, pids[0])
        end(other, pids[1])


def test_stopped_helper_is_replaced_and_its_clients_are_told(public_dir: Path) -> None:
    with open_daemon(public_dir, "--pool-size=1", "--helper-patience=3") as daemon:
        for uid in (0, FIRST):
            connection = connect_as(daemon, uid)
            pid = spawn(connection, "/bin/sleep", "100")
            helper = psutil.Process(pid).ppid()
            os.kill(helper, signal.SIGSTOP)
            with pytest.raises(OSError, match="ended"):
                connection.receive(PATIENCE)
            connection.close()
            os.kill(pid, signal.SIGKILL)
            again = connect_as(daemon, uid)
            end(again, spawn(again, "/bin/sleep", "100"))
        assert "it has not answered for 3 seconds" in daemon.log()
        assert daemon.status()["totals"]["commands_lost"] == 2


STAYS = "trap '' TERM; echo ready >&2; while :; do sleep 1; done"


def members_of(groups: Sequence[int], at_least: int) -> list[psutil.Process]:
    """Return the members of these process groups, none if there are fewer than `at_least`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) in groups:
                found.append(process)
    return found if len(found) >= at_least else []


@pytest.mark.parametrize("uid", [0, FIRST])
def test_commands_of_a_killed_helper_end_if_they_were_to(public_dir: Path, uid: int) -> None:
    tied = frames.number(lib.EB_TAG_ON_CLOSE, 50)
    reader, writer = os.pipe()
    with open_daemon(public_dir, "--pool-size=1") as daemon, open(os.devnull) as null:
        connections = [connect_as(daemon, uid) for _ in range(4)]
        free = spawn(connections[0], "/bin/sleep", "100")
        fds = [null.fileno(), null.fileno(), writer]
        pids = [
            spawn(connections[1], "/bin/sh", "-c", "sleep 100; exit", options=tied),
            spawn(connections[2], "/bin/sh", "-c", STAYS, options=tied, fds=fds),
            spawn(connections[3], "/bin/sleep", "100", options=tied),
        ]
        os.close(writer)
        assert os.read(reader, 100) == b"ready\n"
        os.close(reader)
        end(connections.pop(), pids.pop())
        helper = psutil.Process(free).ppid()
        groups = until(lambda: members_of(pids, at_least=3))
        os.kill(helper, signal.SIGKILL)
        until(lambda: not any(p.is_running() for p in groups))
        assert psutil.Process(free).ppid() == daemon.process.pid
        os.kill(free, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(free))  # the daemon has waited for it
        for connection in connections:
            connection.close()


def test_helper_of_one_user_has_no_say_over_commands_of_another(public_dir: Path) -> None:
    """Its user may write anything to its file of counters."""
    with open_daemon(public_dir, "--pool-size=1") as daemon:
        mine, theirs = connect_as(daemon, FIRST), connect_as(daemon, SECOND)
        pids = [spawn(connection, "/bin/sleep", "100") for connection in (mine, theirs)]
        helpers = [psutil.Process(pid).ppid() for pid in pids]
        os.kill(helpers[1], signal.SIGKILL)
        until(lambda: psutil.Process(pids[1]).ppid() == daemon.process.pid)
        (line,) = (
            line
            for line in Path(f"/proc/{helpers[0]}/maps").read_text().splitlines()
            if "memfd" in line
        )
        with open(f"/proc/{helpers[0]}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(line.partition("-")[0], 16) + 1816)
            for pid in (pids[1], daemon.process.pid, 1, helpers[0], -1, 1 << 30):
                memory.write(struct.pack("<iI", pid, 0))
        os.kill(helpers[0], signal.SIGKILL)
        until(lambda: psutil.Process(pids[0]).ppid() == daemon.process.pid)
        assert daemon.helpers()
        select.select([], [], [], 0.2)
        assert daemon.helpers()
        for pid, connection in zip(pids, (mine, theirs), strict=True):
            assert psutil.Process(pid).name() == "sleep"
            os.kill(pid, signal.SIGKILL)
            connection.close()


def test_helpers_of_a_user_are_bounded(public_dir: Path) -> None:
    with open_daemon(public_dir, "--pool-size=1", "--max-child-tasks=1") as daemon:
        connections = [connect_as(daemon, FIRST) for _ in range(1)]
        pids = [spawn(connections[0], "/bin/sleep", "100")]
        for _ in range(79):
            connections.append(connect_as(daemon, FIRST))
            pids.append(spawn(connections[-1], "/bin/sleep", "100"))
            daemon.status()  # a new helper is there
        assert sum(h["uid"] == FIRST for h in helpers(daemon)) == 64
        for connection, pid in zip(connections, pids, strict=True):
            end(connection, pid)


def test_end_of_a_helper_whose_socket_somebody_keeps(public_dir: Path) -> None:
    """Its last frames are read, but later ones from others not for ever."""
    with open_daemon(public_dir, "--pool-size=1") as daemon:
        connection = connect_as(daemon, FIRST)
        pid = spawn(connection, "/bin/sleep", "100")
        helper = psutil.Process(pid).ppid()
        with taken_from(helper, 3) as control:
            writer = os.fork()
            if writer == 0:
                with contextlib.suppress(BaseException):
                    while True:
                        control.sendall(frames.HEADER.pack(0, lib.EB_FULL) * 1000)
                os._exit(0)
            os.kill(helper, signal.SIGKILL)
            until(lambda: helper not in daemon.helpers())
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        connection.close()
        os.kill(pid, signal.SIGKILL)


def test_no_new_privs_is_for_all(public_dir: Path) -> None:
    options = [f"--allow-uid={FIRST}", "--pool-size=1", "--no-new-privs"]
    with started_daemon(public_dir, *options) as daemon:
        for connection in connect_as(daemon, FIRST), daemon.connect():
            command = psutil.Process(spawn(connection, "/bin/sleep", "100"))
            helper = command.parent()
            assert helper is not None
            for pid in daemon.process.pid, helper.pid, command.pid:
                assert status_of(pid)["NoNewPrivs"] == "1"
            end(connection, command.pid)


@pytest.mark.parametrize("nice", [0, 5])
def test_priority_is_the_servers_alone(public_dir: Path, nice: int) -> None:
    """If the administrator sets another niceness, it applies to all processes."""
    options = [f"--allow-uid={FIRST}", "--pool-size=1"]
    under = ["nice", f"-n{nice - os.getpriority(os.PRIO_PROCESS, 0)}"]
    with started_daemon(public_dir, *options, under=under, start_new_session=True) as daemon:
        server = psutil.Process(daemon.process.pid)
        connections = [connect_as(daemon, FIRST), daemon.connect()]
        commands = [psutil.Process(spawn(one, "/bin/sleep", "100")) for one in connections]
        assert server.nice() == (-10 if nice == 0 else nice)
        for command in commands:
            assert command.nice() == nice
            assert os.sched_getscheduler(command.pid) == os.SCHED_OTHER
            helper = command.parent()
            assert helper is not None
            assert helper.nice() == nice
        daemon.process.send_signal(signal.SIGUSR2)
        until(lambda: "upgraded" in daemon.log())
        assert server.nice() == (-10 if nice == 0 else nice)
        for connection, command in zip(connections, commands, strict=True):
            end(connection, command.pid)
