"""The keeper of a job over its sockets: its command and its followers."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import has_ended, until
from keeper import (
    HELLO,
    RECORD,
    SUPERVISED,
    Keeper,
    Missed,
    Piece,
    Visitor,
    follow,
    job,
    keeping,
    shell,
    text,
)
from wire import Failed, frame, option, signal_frame, slow

from errand_boy._native import lib

ON, NEW, QUIET = lib.EB_FOLLOW_ON, lib.EB_FOLLOW_NEW, lib.EB_FOLLOW_QUIET
JOINED = 2 | lib.EB_JOINED
LINE = b"0123456789012345678901234567890123456789012345678"


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with keeping(tmp_path) as it:
        yield it


# The command


def test_output_is_kept_and_the_end_is_noted(keeper: Keeper) -> None:
    before, begun = time.time(), time.monotonic()
    pid = keeper.start(shell("echo out; echo err >&2; exit 3"))
    assert keeper.is_locked()
    keeper.starter.send(follow(flags=ON))
    pieces, end = keeper.starter.rest()
    assert end.status == 3 << 8
    assert keeper.wait() == 0
    assert not keeper.is_locked()
    entry = keeper.journal()
    assert (entry["pid"], entry["keeper"]) == (pid, keeper.pid)
    assert (entry["status"], tuple(entry["usage"])) == (3 << 8, end.usage)
    assert entry["cause"] == lib.EB_CAUSE_NONE
    assert (entry["bytes"], entry["lost"]) == ([4, 4], [0, 0])
    assert before <= entry["ended"] <= time.time()
    assert 0 <= entry["duration"] <= time.monotonic() - begun + 0.001  # to the nearest millisecond
    assert not {"tree", "log_lost", "failed"} & entry.keys()
    kept = keeper.kept()
    assert kept == pieces
    assert [p.sequence for p in kept] == [1, 2]
    assert {(p.stream, p.data) for p in kept} == {(1, b"out\n"), (2, b"err\n")}
    assert all(before * 1e6 <= p.time_us <= time.time() * 1e6 for p in kept)


def test_client_that_comes_late_is_served(tmp_path: Path) -> None:
    """It comes when the keeper has long waited, and nothing else happens."""
    with keeping(tmp_path, hands_over=False) as keeper:
        select.select([], [], [], 0.5)  # more than it waits until it gives memory back
        keeper.starter = keeper.hand_over(keeper.control)
        keeper.start(job("/bin/true"))


def test_job_outlives_its_clients_and_its_server(keeper: Keeper) -> None:
    go_on = keeper.steps("read x; echo done")
    keeper.control.close()
    keeper.starter.sock.close()
    go_on()
    assert keeper.wait() == 0
    assert text(keeper.kept()) == b"done\n"
    assert keeper.journal()["status"] == 0


def test_signal_of_a_client_that_goes_during_the_start(keeper: Keeper) -> None:
    """The signal takes effect, though its sender no longer hears of the start."""
    assert keeper.starter.frame() == HELLO
    options = [option(lib.EB_TAG_STREAMS, b"\7"), option(lib.EB_TAG_SIGMASK, bytes(8))]
    keeper.starter.send(slow("/bin/cat", 20_000, options=options) + signal_frame(0, signal.SIGKILL))
    keeper.starter.sock.close()
    assert keeper.wait() == 0
    assert keeper.journal()["status"] == signal.SIGKILL


def test_start_that_fails(keeper: Keeper) -> None:
    assert keeper.starter.frame() == HELLO
    keeper.starter.send(job("/none/program"))
    assert keeper.starter.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
    assert keeper.starter.closed()
    assert keeper.wait() == 0
    assert keeper.journal() == {"id": 1, "failed": [errno.ENOENT, lib.EB_STAGE_EXEC, 0]}


def test_start_that_the_journal_does_not_take(tmp_path: Path) -> None:
    """The command is killed. Otherwise the next server would think that the job did not start."""
    with keeping(tmp_path, journal_path=Path("/dev/full")) as keeper:
        assert keeper.starter.frame() == HELLO
        keeper.starter.send(job("/bin/sleep", "1000", options=[SUPERVISED]))
        answer = keeper.starter.reply()
        assert isinstance(answer, Failed)
        assert (answer.errno, answer.stage) == (errno.ENOSPC, lib.EB_STAGE_RING)
        assert keeper.wait() == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(lib.EB_SPAWN), "malformed SPAWN: options EXECUTABLES and ARGV are required"),
        (
            job("/bin/true", options=[option(lib.EB_TAG_COALESCE)]),
            "malformed SPAWN: options COALESCE, ON_CLOSE and QUEUE are not allowed for a job",
        ),
        (
            job("/bin/true", options=[option(lib.EB_TAG_LIMITS, bytes(28))]),
            "malformed SPAWN: option LIMITS needs SUPERVISE with 1",
        ),
        (shell("", targets=[3]), "malformed SPAWN: 1 descriptors named, 0 sent"),
        (follow(), "FOLLOW is not allowed on this connection before SPAWN"),
        (frame(lib.EB_ADOPT), "ADOPT is not allowed on this connection before SPAWN"),
    ],
)
def test_request_that_is_refused_ends_the_keeper(keeper: Keeper, data: bytes, reason: str) -> None:
    assert keeper.starter.frame() == HELLO
    keeper.starter.send(data)
    assert keeper.starter.refusal() == reason
    assert keeper.wait() == 0
    assert keeper.journal() == {"id": 1}


def test_keeper_without_a_request_ends_with_its_connection(keeper: Keeper) -> None:
    keeper.starter.sock.close()
    assert keeper.wait() == 0
    assert keeper.journal() == {"id": 1}


def test_keeper_ends_if_its_server_hands_over_nothing(tmp_path: Path) -> None:
    with keeping(tmp_path, hands_over=False) as keeper:
        keeper.control.close()
        assert keeper.wait() == 0


@pytest.mark.parametrize("posix", [False, True])
def test_signals(tmp_path: Path, posix: bool) -> None:
    with keeping(tmp_path, *(["--posix-spawn"] if posix else [])) as keeper:
        pid = keeper.start(job("/bin/sleep", "100"))
        visitor = keeper.follower()
        visitor.send(signal_frame(os.getpid(), signal.SIGKILL))  # not this job's
        visitor.send(signal_frame(pid, signal.SIGTERM))
        assert visitor.exit_status() == signal.SIGTERM


def test_what_is_left_of_the_group_is_ended_if_it_is_to(keeper: Keeper) -> None:
    options = [option(lib.EB_TAG_PGROUP, bytes(4))]
    pid = keeper.start(shell("sleep 100 & echo $!; wait", options=options))
    visitor = keeper.follower()
    child = int(visitor.until(b"\n"))
    visitor.send(signal_frame(-pid, lib.EB_ENDS_GROUP))
    visitor.send(signal_frame(pid, signal.SIGKILL))
    assert visitor.exit_status() == signal.SIGKILL
    until(lambda: has_ended(child))


def test_who_holds_the_output_at_the_end_does_not_prolong_it(keeper: Keeper) -> None:
    keeper.start(shell("sleep 100 & echo $!"))
    pieces, end = keeper.follower().rest()
    assert end.status == 0
    os.kill(int(text(pieces)), signal.SIGKILL)
    keeper.starter.sock.close()
    assert keeper.wait() == 0


@pytest.mark.slow
def test_tree_and_limits(keeper: Keeper) -> None:
    limits = option(lib.EB_TAG_LIMITS, struct.pack("<QQQI", 200_000, 0, 0, 0))
    keeper.start(shell("sleep 100 & exec sleep 100", options=[SUPERVISED, limits]))
    assert keeper.follower().exit_status() == signal.SIGKILL
    entry = keeper.journal()
    assert entry["cause"] == lib.EB_CAUSE_TIMEOUT
    user, system, peak, processes = entry["tree"]
    assert peak > 0
    assert min(user, system, processes) >= 0


def start_three(keeper: Keeper, script: str) -> tuple[Visitor, bytes, list[psutil.Process]]:
    """Start a shell that writes two pids; return a follower, what it has said, and all three."""
    pid = keeper.start(shell(script, options=[SUPERVISED]))
    visitor = keeper.follower()
    said = b""
    while said.count(b"\n") < 2:
        said += visitor.piece().data
    return visitor, said, [psutil.Process(p) for p in (pid, *map(int, said.split()))]


def test_killed_keeper_leaves_no_process_and_a_ring_that_can_be_read(keeper: Keeper) -> None:
    script = "sleep 100 & echo $!; setsid sleep 100 & echo $!; wait"
    _, said, processes = start_three(keeper, script)
    keeper.kill()
    assert not psutil.wait_procs(processes, timeout=30)[1]
    assert text(keeper.kept()) == said
    assert not keeper.is_locked()
    assert "ended" not in keeper.journal()


@pytest.mark.parametrize("which", ["guard", "supervisor", "both"])
def test_killed_supervisor_leaves_no_process(keeper: Keeper, which: str) -> None:
    """The same if both are killed at once: neither can act between the two signals."""
    script = """
        (setsid sleep 100 & echo $!)
        (setsid sh -c 'trap "" TERM; echo $$; while :; do sleep 0.01 & wait; done' &)
        exec sleep 100
    """
    visitor, _, processes = start_three(keeper, script)
    supervisor = psutil.Process(processes[0].ppid())
    guard = psutil.Process(supervisor.ppid())
    assert guard.ppid() == keeper.pid
    killed = {"guard": [guard], "supervisor": [supervisor], "both": [supervisor, guard]}[which]
    for number in signal.SIGSTOP, signal.SIGKILL:
        for process in killed:
            process.send_signal(number)
    assert visitor.exit_status() == signal.SIGKILL
    assert not any(process.is_running() for process in (guard, supervisor, *processes))
    entry = keeper.journal()
    assert (entry["status"], entry["cause"]) == (signal.SIGKILL, lib.EB_CAUSE_NONE)
    assert entry["tree"][2] > 0


@pytest.mark.parametrize("turn", range(10))
def test_killed_at_any_moment(tmp_path: Path, turn: int) -> None:
    script = f"while :; do echo {LINE.decode()}; done"
    with keeping(tmp_path, ring=8192 << turn % 3) as keeper:
        keeper.start(shell(script, options=[SUPERVISED]))
        visitor = keeper.follower()
        for _ in range(1 + turn * turn * 3):
            visitor.output()
        keeper.kill()
        pieces = keeper.kept()
        numbers = [p.sequence for p in pieces]
        assert numbers == list(range(numbers[0], numbers[-1] + 1)) if numbers else turn == 0
        assert set(text(pieces).splitlines()[1:-1]) <= {LINE}


# Followers


def test_each_kind_of_follower(keeper: Keeper) -> None:
    step = keeper.steps("echo a; read x; echo b; read x; echo c; read x")
    first = keeper.follower()
    assert first.until(b"a\n") == b"a\n"
    step()
    assert first.until(b"b\n") == b"b\n"
    # All that is there from some piece on, and CAUGHT_UP after it.
    assert text(keeper.follower(flags=0).pieces()) == b"a\nb\n"
    assert text(keeper.follower(2, 0, (2, 0)).pieces()) == b"b\n"
    assert keeper.follower(3, 0, (4, 0)).pieces() == []
    quiet, new, all_of_it = (keeper.follower(flags=f) for f in (QUIET, NEW | ON, ON))
    assert quiet.pieces() == new.pieces() == []
    assert text(all_of_it.pieces()) == b"a\nb\n"
    step()
    for follower in first, new, all_of_it:
        assert follower.until(b"c\n") == b"c\n"
    # It may ask again.
    new.send(follow(2, known=(2, 0)))
    assert [p.data for p in new.pieces() if isinstance(p, Piece)] == [b"b\n", b"c\n"]
    step()
    for follower in quiet, first, new, all_of_it:
        assert follower.exit_status() == 0


def test_late_follower_gets_all_output(tmp_path: Path) -> None:
    """The keeper waits for a client that it has received."""
    with keeping(tmp_path) as keeper:
        step = keeper.steps("echo a; read x; exit 4")
        visitor = keeper.visitor()
        step()
        until(lambda: "ended" in keeper.journal())
        late = keeper.visitor()
        for client in visitor, late:
            client.send(follow())
            pieces, end = client.rest()
            assert (text(pieces), end.status) == (b"a\n", 4 << 8)
        keeper.starter.sock.close()
        assert keeper.wait() == 0


def test_overwritten_output_is_reported(tmp_path: Path) -> None:
    with keeping(tmp_path, ring=4096) as keeper:
        step = keeper.steps("seq 1 2000; read x; seq 2001 4000; read x")
        follower = keeper.follower(flags=QUIET)
        assert follower.pieces() == []
        asker = keeper.visitor()
        until(lambda: text(asker.so_far()).endswith(b"2000\n"))
        total = b"".join(b"%d\n" % n for n in range(1, 4001))
        half = total.index(b"2001\n")

        def check(output: list[Missed | Piece], missed: int, end: int, begin: int = 0) -> None:
            lost = output[0]
            assert isinstance(lost, Missed)
            assert lost.stream == 1
            assert lost.size == missed
            assert text(output) == total[begin + missed : end]

        first = keeper.follower(flags=0).pieces()
        kept = len(text(first))
        assert 2000 < kept < 4096
        check(first, half - kept, half)
        last = first[-1]
        assert isinstance(last, Piece)
        # A follower that knows a part hears of the rest.
        follower.send(follow(1, known=(half - kept - 7, 0)))
        assert follower.pieces()[:1] == [Missed(1, 7)]
        follower.send(follow(1, known=(half, 0)))
        assert not isinstance(follower.pieces()[0], Missed)
        step()
        until(lambda: text(asker.so_far()).endswith(b"4000\n"))
        follower.send(follow(last.sequence + 1, known=(half, 0)))
        output = follower.pieces()
        check(output, len(total) - half - len(text(output)), len(total), half)
        keeper.starter.sock.close()
        step()
        assert follower.exit_status() == 0
        assert keeper.journal()["bytes"] == [len(total), 0]
        assert keeper.journal()["lost"] == [len(total) - len(text(keeper.kept())), 0]


def test_follower_that_does_not_read_slows_nobody(keeper: Keeper) -> None:
    """It learns what it has missed, to the byte."""
    size = 50_000_000
    step = keeper.steps(f"read x; head -c {size} /dev/zero; read x", streams=2)
    sleepers = [keeper.follower() for _ in range(20)]
    reader = keeper.follower()
    step()
    seen = 0
    while seen < size:
        answer = reader.output()
        if answer is not None:
            seen += len(answer.data) if isinstance(answer, Piece) else answer.size
    step()
    assert reader.exit_status() == 0
    for sleeper in sleepers:
        pieces, _ = sleeper.rest()
        missed = sum(m.size for m in pieces if isinstance(m, Missed))
        assert missed > size / 2
        assert missed + len(text(pieces)) == size
    assert keeper.journal()["bytes"] == [size, 0]


def test_many_small_pieces_of_two_streams(tmp_path: Path) -> None:
    """They are merged in order, also where a record wraps around."""
    script = "i=0; while [ $i -lt 1500 ]; do echo $i; echo $i >&2; i=$((i+1)); done"
    expected = b"".join(b"%d\n" % n for n in range(1500))
    with keeping(tmp_path, ring=5001) as keeper:
        keeper.start(shell(script))
        output, _ = keeper.follower().rest()
        numbers = [p.sequence for p in output if isinstance(p, Piece)]
        assert numbers == sorted(numbers)
        for stream in 1, 2:
            said = b""
            for piece in output:
                if piece.stream == stream:
                    at = len(said)
                    more = (
                        piece.data if isinstance(piece, Piece) else expected[at : at + piece.size]
                    )
                    said += more
            assert said == expected
        kept = keeper.kept()
        for stream in 1, 2:
            assert expected.endswith(text(kept, stream))
            # No more has been overwritten than was necessary; how much a record has is chance.
            size = sum(RECORD.size + len(p.data) for p in kept if p.stream == stream)
            assert 5001 - (RECORD.size + 5001 // 4) < size <= 5001


def test_two_streams_in_one(keeper: Keeper) -> None:
    keeper.start(shell("echo a; echo b >&2; echo c", streams=JOINED))
    pieces, _ = keeper.follower().rest()
    assert text(pieces) == b"a\nb\nc\n"
    assert text(pieces, 2) == b""


def test_output_that_is_not_kept(keeper: Keeper) -> None:
    keeper.start(shell("echo a; echo b >&2", streams=4))
    pieces, _ = keeper.follower().rest()
    assert [(p.stream, p.data) for p in pieces if isinstance(p, Piece)] == [(2, b"b\n")]
    assert keeper.journal()["bytes"] == [0, 2]


def test_no_room_for_the_ring(keeper: Keeper) -> None:
    """The end of the output is kept as far as there is room; the rest is reported as missing."""
    resource.prlimit(keeper.pid, resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
    unlimited = struct.pack("<BQQ", resource.RLIMIT_FSIZE, 2**64 - 1, 2**64 - 1)
    options = [option(lib.EB_TAG_RLIMITS, unlimited)]
    keeper.start(shell("seq 1 20000; exit 5", streams=2, options=options))
    follower = keeper.follower()
    total = b"".join(b"%d\n" % n for n in range(1, 20001))
    position = 0
    pieces, end = follower.rest()
    assert end.status == 5 << 8
    for piece in pieces:
        if isinstance(piece, Piece):
            assert total[position:].startswith(piece.data)
            position += len(piece.data)
        else:
            position += piece.size
    assert position == len(total)
    kept = text(keeper.kept())
    assert total.endswith(kept)
    assert keeper.journal()["lost"] == [len(total) - len(kept), 0]


def test_follower_that_keeps_up_misses_nothing(keeper: Keeper) -> None:
    """The ring begins anew again and again."""
    resource.prlimit(keeper.pid, resource.RLIMIT_FSIZE, (4096 + 3000, resource.RLIM_INFINITY))
    script = "i=0; while [ $i -lt 40 ]; do printf %0500d $i; read x; i=$((i+1)); done"
    step = keeper.steps(script, streams=2)
    follower = keeper.follower()
    for i in range(40):
        assert follower.until(b"%0500d" % i) == b"%0500d" % i
        step()
    assert follower.exit_status() == 0
    kept = text(keeper.kept())
    assert 0 < len(kept) <= 3000
    assert keeper.journal()["lost"] == [40 * 500 - len(kept), 0]


def test_no_room_for_the_header_of_the_ring(keeper: Keeper) -> None:
    resource.prlimit(keeper.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    assert keeper.starter.frame() == HELLO
    keeper.starter.send(job("/bin/true"))
    assert keeper.starter.reply() == Failed(0, errno.EFBIG, lib.EB_STAGE_RING)
    assert keeper.wait() == 0


@pytest.mark.slow
def test_followers_that_do_not_read_the_end(tmp_path: Path) -> None:
    with keeping(tmp_path, "--linger=200") as keeper:
        step = keeper.steps("read x; head -c 1000000 /dev/zero")
        sleeping = keeper.follower()
        silent = keeper.visitor()
        step()
        assert keeper.wait() == 0
        assert silent.closed()
        assert len(text(keeper.kept())) > 100_000
        while sleeping.sock.recv(1 << 16):
            pass
