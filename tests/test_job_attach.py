"""Clients attached to a job: their input, and the windows that show its terminal."""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import until
from keeper import SUPERVISED, Keeper, attach, follow, job, keeping, shell, terminal, text
from wire import frame, signal_frame

from errand_boy._native import lib

ON, WRITES, REDRAWS = lib.EB_FOLLOW_ON, lib.EB_ATTACH_WRITES, lib.EB_ATTACH_REDRAWS
TERMINAL = 3 | lib.EB_JOINED
WINDOW = lib.EB_WINDOW


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with keeping(tmp_path) as it:
        yield it


def typed(data: bytes = b"") -> bytes:
    return frame(lib.EB_STDIN, data)


def window(rows: int, columns: int) -> bytes:
    return frame(lib.EB_WINSIZE, struct.pack("<4I", rows, columns, 0, 0))


def start(keeper: Keeper, script: str, rows: int = 24, columns: int = 80, flags: int = 1) -> None:
    """Start a shell on a terminal without echo."""
    options = [SUPERVISED, *terminal(rows, columns, flags)]
    keeper.start(shell(script, streams=TERMINAL, options=options))


# Pipes


def test_typed_input_arrives(keeper: Keeper) -> None:
    keeper.start(job("/bin/cat", streams=3))
    writer = keeper.visitor(attach(WRITES), follow(flags=ON), typed(b"a"), typed(b"b"), typed())
    pieces, end = writer.rest()
    assert (text(pieces), end.status) == (b"ab", 0)


def test_input_stays_open_until_somebody_ends_it(keeper: Keeper) -> None:
    keeper.start(job("/bin/cat", streams=3))
    for data in b"a", b"b":
        visitor = keeper.visitor(attach(WRITES), typed(data))
        keeper.follower().until(data)
        visitor.sock.close()
    ender = keeper.visitor(attach(WRITES), typed())
    ender.send(follow(flags=ON))
    pieces, _ = ender.rest()
    assert text(pieces) == b"ab"


def test_last_input_of_a_client_that_has_gone_arrives(keeper: Keeper) -> None:
    """It is more than a pipe holds."""
    step = keeper.steps("read x; wc -c", streams=3)
    for _ in range(4):
        visitor = keeper.visitor(attach(WRITES), typed(bytes(WINDOW)), follow())
        while visitor.frame()[0] != lib.EB_CAUGHT_UP:  # then it has been taken
            pass
        visitor.sock.close()
    ender = keeper.visitor(attach(WRITES), typed(), follow(flags=ON))
    step()
    pieces, _ = ender.rest()
    assert int(text(pieces)) == 4 * WINDOW


def test_credit_is_what_the_command_has_read(keeper: Keeper) -> None:
    size = 5_000_000
    keeper.start(shell("wc -c", streams=3))
    writers = [keeper.visitor(attach(WRITES)) for _ in range(2)]
    left = [size, size]
    room = [WINDOW, WINDOW]
    while any(left):
        for i, writer in enumerate(writers):
            while left[i] and room[i]:
                count = min(left[i], room[i], 10_000)
                writer.send(typed(bytes(count)))
                left[i] -= count
                room[i] -= count
            if left[i]:
                kind, payload = writer.frame()
                assert kind == lib.EB_CREDIT
                room[i] += int.from_bytes(payload, "little")
                assert room[i] <= WINDOW
    # Each has its last bytes read before the end of the other.
    for i, writer in enumerate(writers):
        while room[i] <= WINDOW - (16 << 10):
            kind, payload = writer.frame()
            assert kind == lib.EB_CREDIT
            room[i] += int.from_bytes(payload, "little")
    writers[0].send(typed())
    pieces, _ = keeper.follower().rest()
    assert int(text(pieces)) >= 2 * size - 2 * (16 << 10)


@pytest.mark.slow
def test_command_that_does_not_read_holds_up_its_writers_alone(keeper: Keeper) -> None:
    step = keeper.steps("read x; echo now; sleep 100", streams=3, options=[SUPERVISED])
    writer = keeper.visitor(attach(WRITES), typed(bytes(WINDOW)))
    other = keeper.visitor(attach(WRITES), typed(bytes(WINDOW)))
    for visitor in writer, other:
        visitor.send(follow(flags=ON))
    step()
    # A pipe's worth has been taken of the first.
    assert writer.frame()[0] == lib.EB_CREDIT
    for visitor in writer, other:
        assert visitor.until(b"now\n") == b"now\n"
    other.send(signal_frame(0, signal.SIGKILL))
    assert other.exit_status() == signal.SIGKILL


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([typed(b"a")], "STDIN before an ATTACH that writes"),
        ([attach(0), typed(b"a")], "STDIN before an ATTACH that writes"),
        (
            [attach(WRITES), typed(bytes(WINDOW)), typed(bytes(WINDOW))],
            f"STDIN of {WINDOW} bytes, where 0 may be sent",
        ),
    ],
)
def test_input_that_is_refused(keeper: Keeper, frames: Sequence[bytes], reason: str) -> None:
    keeper.start(job("/bin/sleep", "100", streams=3, options=[SUPERVISED]))
    # What the pipe takes is not in the way.
    filler = keeper.visitor(attach(WRITES), typed(bytes(WINDOW)))
    filler.send(attach(WRITES))
    visitor = keeper.visitor(*frames)
    assert visitor.refusal() == reason


def test_number_of_writers_is_bounded(keeper: Keeper) -> None:
    keeper.start(job("/bin/cat", streams=3))
    writers = [keeper.visitor(attach(WRITES)) for _ in range(lib.EB_MAX_WRITERS)]
    for writer in writers:
        writer.send(follow(flags=lib.EB_FOLLOW_QUIET))
        assert writer.pieces() == []
    assert keeper.visitor(attach(WRITES)).refusal() == (
        "16 other clients write to this job, which is the limit"
    )
    writers[0].send(attach(WRITES))
    writers.pop().sock.close()
    until(lambda: may_write(keeper))


def may_write(keeper: Keeper) -> bool:
    visitor = keeper.visitor(attach(WRITES), follow(flags=lib.EB_FOLLOW_QUIET))
    return bool(visitor.frame()[0] == lib.EB_CAUGHT_UP)


def test_input_for_a_command_that_takes_none_is_dropped(keeper: Keeper) -> None:
    keeper.start(job("/bin/sleep", "100", options=[SUPERVISED]))
    writer = keeper.visitor(attach(WRITES))
    for _ in range(10):
        writer.send(typed(bytes(WINDOW)))
        assert writer.frame()[0] == lib.EB_CREDIT


# Terminals


def test_terminal(keeper: Keeper) -> None:
    script = "tty -s && stty size; read x; echo got $x; cat; echo end >&2"
    start(keeper, script, rows=30, columns=90)
    user = keeper.visitor(attach(WRITES), follow(flags=ON))
    assert user.until(b"\n") == b"30 90\r\n"
    user.send(typed(b"word\n"))
    assert user.until(b"\n") == b"got word\r\n"
    user.send(typed(b"more\n"))
    assert user.until(b"\n") == b"more\r\n"
    user.send(typed())  # ^D
    pieces, end = user.rest()
    assert (text(pieces), end.status) == (b"end\r\n", 0)
    assert {p.stream for p in keeper.kept()} == {1}


WATCHES = "trap 'stty size' WINCH; stty size; while :; do sleep 100 & wait; kill $!; done"


def test_window_is_the_smallest(keeper: Keeper) -> None:
    start(keeper, WATCHES)
    watcher = keeper.follower()
    watcher.until(b"24 80\r\n")
    first = keeper.visitor(attach(WRITES, 40, 100))
    watcher.until(b"40 100\r\n")
    second = keeper.visitor(attach(0, 50, 70))
    watcher.until(b"40 70\r\n")
    second.send(window(30, 200))
    watcher.until(b"30 100\r\n")
    first.send(window(20, 90))
    watcher.until(b"20 90\r\n")
    first.sock.close()
    watcher.until(b"30 200\r\n")
    # One that is not attached has no say, nor has one without a window, and the last one's stays.
    keeper.visitor(window(5, 5), attach(0))
    second.sock.close()
    third = keeper.visitor(attach(0, 31, 200))
    assert watcher.until(b"31 200\r\n") == b"31 200\r\n"
    third.send(signal_frame(0, signal.SIGKILL))
    assert watcher.exit_status() == signal.SIGKILL


def test_program_is_made_to_redraw(keeper: Keeper) -> None:
    start(keeper, WATCHES)
    watcher = keeper.follower()
    watcher.until(b"24 80\r\n")
    visitor = keeper.visitor(attach(REDRAWS, 24, 80))
    # It shows its size once or twice, and may see the last one both times.
    redrawn = watcher.until(b"24 80\r\n")
    visitor.send(attach(REDRAWS, 30, 80))
    redrawn += watcher.until(b"30 80\r\n")
    visitor.send(signal_frame(0, signal.SIGKILL))
    rest, end = watcher.rest()
    assert end.status == signal.SIGKILL
    redrawn += text(rest)
    assert set(redrawn.splitlines()) - {b"23 80"} == {b"24 80", b"30 80"}


@pytest.mark.slow
def test_terminal_that_is_opened_again(keeper: Keeper) -> None:
    script = "exec >/dev/null 2>&1 </dev/null; exec 9<&-; sleep 0.3; echo late >/dev/tty; sleep 100"
    start(keeper, script)
    watcher = keeper.follower()
    assert watcher.until(b"\n") == b"late\r\n"
    watcher.send(signal_frame(0, signal.SIGKILL))
    assert watcher.exit_status() == signal.SIGKILL


def test_clients_share_one_terminal(keeper: Keeper) -> None:
    """Two clients of one terminal see the same; one of them is read-only."""
    start(keeper, "while read x; do echo got $x; done")
    users = [keeper.visitor(attach(WRITES, 24, 80), follow(flags=ON)) for _ in range(2)]
    users.append(keeper.visitor(attach(0, 24, 80), follow(flags=ON)))
    for i in range(2):
        users[i].send(typed(b"%d\n" % i))
        for user in users:
            assert user.until(b"\n") == b"got %d\r\n" % i
    users[0].send(typed())
    for user in users:
        assert user.exit_status() == 0
