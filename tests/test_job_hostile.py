"""A job's keeper against clients that break the rules and other users, and what it costs."""

from __future__ import annotations

import errno
import os
import random
import select
import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import until
from daemon import acting_as
from guard import Guard
from keeper import HELLO, SUPERVISED, Keeper, follow, job, keeping, shell, text
from wire import Failed, Spawned, frame, option, pair, u32

from errand_boy._native import lib
from errand_boy._wire import frames

ON, QUIET = lib.EB_FOLLOW_ON, lib.EB_FOLLOW_QUIET
SLEEP = job("/bin/sleep", "100", options=[SUPERVISED])
MOST = 256


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with keeping(tmp_path) as it:
        yield it


def lives(keeper: Keeper) -> bool:
    return keeper.follower(flags=QUIET).pieces() == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0" + frame(lib.EB_HELLO, u32(99)), "speaks version 1 of the protocol, not 99"),
        (b"\0" + frame(lib.EB_FOLLOW, bytes(25)), "the first frame must be HELLO"),
        (b"\0" + frame(lib.EB_HELLO), "the first frame must be HELLO with a version"),
        (b"GET / HTTP/1.1\r\n", "a framed connection starts with a NUL byte"),
        (frames.OPENING + SLEEP, "SPAWN is not allowed on this connection"),
        (frames.OPENING + frame(lib.EB_ADOPT), "ADOPT is not allowed on this connection"),
        (frames.OPENING + frame(lib.EB_NOTIFY, b"a"), "NOTIFY is not allowed on this connection"),
        (frames.OPENING + frame(200), "unknown frame kind 200"),
        (frames.OPENING + frame(0), "unknown frame kind 0"),
        (frames.OPENING + frame(lib.EB_HELLO, u32(1)), "unknown frame kind 1"),
        (frames.OPENING + frame(lib.EB_FOLLOW, bytes(24)), "FOLLOW with a payload of 24 bytes"),
        (frames.OPENING + frame(lib.EB_SIGNAL, bytes(9)), "SIGNAL with a payload of 9 bytes"),
        (frames.OPENING + frames.HEADER.pack(1 << 31, lib.EB_STDIN), "a frame of more than"),
        (frames.OPENING + frames.HEADER.pack(1 << 20, lib.EB_STDIN), "STDIN with a payload of"),
    ],
)
def test_garbage(keeper: Keeper, data: bytes, reason: str) -> None:
    keeper.start(SLEEP)
    with keeper.dial() as server:
        server.sendall(frames.OPENING)
        visitor = keeper.hand_over(server, opening=data)
    assert visitor.frame()[0] == lib.EB_HELLO
    assert reason in visitor.refusal()
    assert lives(keeper)


def test_random_frames(keeper: Keeper) -> None:
    """None of them is a signal that ends the job."""
    keeper.start(job("/bin/cat", streams=3, options=[SUPERVISED]))
    chance = random.Random(1)
    kinds = [lib.EB_FOLLOW, lib.EB_ATTACH, lib.EB_WINSIZE, lib.EB_SIGNAL, 99, 0]
    sizes = {lib.EB_FOLLOW: 25, lib.EB_ATTACH: 17, lib.EB_WINSIZE: 16, lib.EB_SIGNAL: 8}
    for _ in range(300):
        visitor = keeper.visitor()
        for _ in range(chance.randrange(1, 10)):
            kind = chance.choice(kinds)
            size = sizes.get(kind, 3) if chance.random() < 0.9 else chance.randrange(30)
            payload = chance.randbytes(size) if kind != lib.EB_SIGNAL else bytes(size)
            data = frame(kind, payload)[: None if chance.random() < 0.95 else 7]
            with suppress(BrokenPipeError, ConnectionResetError):
                visitor.send(data)
        visitor.sock.close()
    assert lives(keeper)


@pytest.mark.slow
def test_half_a_frame_is_waited_for_so_long(tmp_path: Path) -> None:
    with keeping(tmp_path, "--frame-timeout=2000") as keeper:  # enough for what comes in time
        keeper.start(SLEEP)
        idle = keeper.visitor()
        half = keeper.visitor(frame(lib.EB_SIGNAL, bytes(8))[:-1])
        assert half.refusal() == "the rest of a frame has not come in 2000 ms"
        with keeper.dial() as server:
            server.sendall(frames.OPENING)
            silent = keeper.hand_over(server, opening=b"\0")
        assert silent.frame()[0] == lib.EB_HELLO
        assert silent.refusal() == "the rest of a frame has not come in 2000 ms"
        idle.send(follow(flags=QUIET))
        assert idle.pieces() == []


@pytest.mark.slow
def test_request_that_does_not_come(tmp_path: Path) -> None:
    with keeping(tmp_path, "--frame-timeout=300") as keeper:
        assert keeper.starter.frame()[0] == lib.EB_HELLO
        assert keeper.starter.refusal() == "the rest of a frame has not come in 300 ms"
        assert keeper.wait() == 0


def test_descriptors_that_no_frame_names(keeper: Keeper) -> None:
    keeper.start(SLEEP)
    visitor = keeper.visitor()
    before = keeper.descriptors()
    with open(os.devnull) as null:
        visitor.send(follow(flags=QUIET), [null.fileno()] * 200)
    assert visitor.refusal() == "200 descriptors that no frame names"
    until(lambda: keeper.descriptors() <= before)


def test_thousand_connections(keeper: Keeper) -> None:
    keeper.start(SLEEP)
    before = keeper.descriptors()
    refused = 0
    clients = []
    for _ in range(1000):
        with keeper.dial() as server:
            server.sendall(frames.OPENING)
            clients.append(keeper.hand_over(server))
    for client in clients:
        assert client.frame()[0] == lib.EB_HELLO
        with suppress(BrokenPipeError):
            client.send(follow(flags=QUIET))
        kind, payload = client.frame()
        if kind == lib.EB_REFUSED:
            refused += 1
            assert payload == b"this job has %d connections, which is the limit" % MOST
    assert refused == 1000 - (MOST - 1)  # the starter has a place
    assert keeper.descriptors() < before + MOST + 20
    for client in clients:
        client.sock.close()
    until(lambda: keeper.descriptors() == before)
    assert lives(keeper)


def test_server_that_sends_nothing_sensible(keeper: Keeper) -> None:
    """It is another process of the same user, so it harms only itself."""
    keeper.start(SLEEP)
    for data in (
        b"\0",
        b"",
        b"x" * 100,
        frames.OPENING + frame(lib.EB_ADOPT),
        frames.OPENING + SLEEP,
    ):
        with keeper.dial() as server:
            with suppress(BrokenPipeError):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
            while server.recv(1000):
                pass
    assert lives(keeper)


@pytest.mark.root
def test_another_user_hands_over_nothing(public_dir: Path) -> None:
    with keeping(public_dir) as keeper:
        keeper.start(SLEEP)
        os.chmod(keeper.address, 0o777)
        with acting_as(65534, 65534, []):
            server = keeper.dial()
        ours, theirs = pair()
        with server, ours:
            with theirs, suppress(BrokenPipeError):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", theirs.fileno()))]
                server.sendmsg([frames.OPENING + frame(lib.EB_ADOPT)], rights)
            with suppress(ConnectionResetError):
                assert ours.recv(1) == b""
        assert lives(keeper)


@pytest.mark.root
def test_keeper_is_the_user_and_hidden_from_him(public_dir: Path) -> None:
    """The user can neither reach its files nor trace it, but owns its command."""
    uid, gid = 12345, 12346
    with keeping(
        public_dir, f"--uid={uid}", f"--gid={gid}", "--groups=5,6", "--chdir=/tmp"
    ) as keeper:
        step = keeper.steps("id -u; id -g; id -G; pwd; echo $ERRAND_BOY_TEST; read x")
        follower = keeper.follower()
        assert follower.until(b"/tmp\n\n").split() == b"12345 12346 12346 5 6 /tmp".split()
        status = Path(f"/proc/{keeper.pid}/status").read_text()
        assert "Uid:\t12345\t12345\t12345\t12345" in status
        assert "CapEff:\t0000000000000000" in status
        with acting_as(uid, gid, []), pytest.raises(PermissionError):
            os.listdir(f"/proc/{keeper.pid}/fd")
        step()
        assert follower.exit_status() == 0


@pytest.mark.root
@pytest.mark.parametrize(
    ("tag", "value", "script"),
    [
        (lib.EB_TAG_OOM_SCORE_ADJ, struct.pack("<i", 500), "cat /proc/self/oom_score_adj"),
        (lib.EB_TAG_NAMESPACES, u32(0x10000000), "id -u"),
    ],
)
def test_options_that_need_a_file_in_proc(
    public_dir: Path, tag: int, value: bytes, script: str
) -> None:
    with keeping(public_dir, "--uid=12345", "--gid=12345") as keeper:
        keeper.start(shell(f"{script}; sleep 100", options=[option(tag, value), SUPERVISED]))
        assert keeper.follower().until(b"\n") in (b"500\n", b"12345\n")
        with acting_as(12345, 12345, []), pytest.raises(PermissionError):
            os.listdir(f"/proc/{keeper.pid}/fd")


@pytest.mark.root
@pytest.mark.parametrize("supervised", [False, True], ids=["alone", "supervised"])
@pytest.mark.parametrize(
    ("tag", "value"),
    [(lib.EB_TAG_OOM_SCORE_ADJ, struct.pack("<i", 500)), (lib.EB_TAG_NAMESPACES, u32(0x10000000))],
    ids=["oom_score_adj", "namespaces"],
)
def test_keeper_is_closed_to_its_user_while_it_starts_such_a_command(
    public_dir: Path, tag: int, value: bytes, supervised: bool
) -> None:
    """Its user may trace the new process, but gets nothing of the keeper's by that."""
    program = public_dir / "slow"
    shutil.copy("/bin/sleep", program)
    options = [option(tag, value), *([SUPERVISED] if supervised else ())]
    with keeping(public_dir, "--uid=12345", "--gid=12345") as keeper, Guard(program) as guard:
        assert keeper.starter.frame() == HELLO
        keeper.starter.send(job(str(program), "0", options=options))
        child = guard.held()
        assert os.stat(f"/proc/{keeper.pid}/mem").st_uid == 0
        place = writable_place(child)
        before = memory(keeper.pid, place)
        with acting_as(12345, 12345, []):
            for name in "mem", "fd/3", "fd/4", "fd/5", "fd/6":
                with pytest.raises(PermissionError):
                    open(f"/proc/{keeper.pid}/{name}", "r+b", buffering=0)
            names = [f"/proc/{child}/fd/{number}" for number in os.listdir(f"/proc/{child}/fd")]
            held = {os.readlink(name) for name in names}
            with open(f"/proc/{child}/mem", "r+b", buffering=0) as mine:
                mine.seek(place)
                mine.write(bytes(byte ^ 255 for byte in before))
        assert not held & {str(keeper.journal_path), str(keeper.ring_path), keeper.address}
        assert memory(keeper.pid, place) == before
        guard.release()
        assert isinstance(keeper.starter.reply(), Spawned)


def writable_place(pid: int) -> int:
    """Return an address of the process's data."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(int(line.partition("-")[0], 16) for line in lines if " rw-p " in line)


def memory(pid: int, place: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        file.seek(place)
        return file.read(8)


@pytest.mark.root
@pytest.mark.parametrize("supervised", [False, True], ids=["alone", "supervised"])
def test_failure_of_a_start_in_its_own_memory_is_told(public_dir: Path, supervised: bool) -> None:
    options = [
        option(lib.EB_TAG_NAMESPACES, u32(0x10000000)),
        *([SUPERVISED] if supervised else ()),
    ]
    with keeping(public_dir, "--uid=12345", "--gid=12345") as keeper:
        assert keeper.starter.frame() == HELLO
        keeper.starter.send(job("/nowhere/to/be/found", options=options))
        answer = keeper.starter.reply()
        assert isinstance(answer, Failed)
        assert (answer.errno, answer.stage) == (errno.ENOENT, lib.EB_STAGE_EXEC)


@pytest.mark.slow
def test_idle_keeper_uses_no_cpu_time(keeper: Keeper) -> None:
    """Its clients may be half closed, not reading, or gone."""
    step = keeper.steps(
        "read x; head -c 1000000 /dev/zero; echo end >&2; sleep 100", options=[SUPERVISED]
    )
    stopped = keeper.follower()
    half = keeper.follower()
    half.sock.shutdown(socket.SHUT_WR)
    watcher = keeper.follower()
    watcher.sock.close()
    step()
    asker = keeper.visitor()
    until(lambda: text(asker.so_far(), 2) == b"end\n")
    until(lambda: rests(keeper), "that the keeper sleeps")
    assert stopped.sock.recv(1)


def rests(keeper: Keeper) -> bool:
    """Return whether it used no CPU time for a while. A busy loop would have used much."""
    before = Path(f"/proc/{keeper.pid}/schedstat").read_text().split()[2]
    select.select([], [], [], 0.3)
    return before == Path(f"/proc/{keeper.pid}/schedstat").read_text().split()[2]
