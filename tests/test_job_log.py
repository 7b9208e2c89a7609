"""A job's log, and the command that runs at its end."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import until
from keeper import HELLO, SUPERVISED, Keeper, Visitor, follow, job, keeping, shell, text
from wire import Failed, frame, option, strings

from errand_boy._native import lib

ON = lib.EB_FOLLOW_ON


# The log


def log_error(visitor: Visitor) -> int:
    """Read up to LOG_FAILED; return its errno."""
    while (answer := visitor.frame())[0] != lib.EB_LOG_FAILED:
        assert answer[0] in (lib.EB_PIECE, lib.EB_CAUGHT_UP)
    return int(struct.unpack("<i", answer[1])[0])


def test_log_has_all_of_both_streams(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with keeping(tmp_path, f"--log={log}", ring=4096) as keeper:
        keeper.start(shell("seq 1 5000; echo error >&2", streams=6))
        assert keeper.follower(flags=lib.EB_FOLLOW_QUIET).exit_status() == 0
        kept = log.read_text()
        assert "error\n" in kept
        total = "".join(f"{n}\n" for n in range(1, 5001))
        assert kept.replace("error\n", "") == "before\n" + total
        assert keeper.journal()["log_lost"] == 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_log_is_rotated_by_size(tmp_path: Path, count: int) -> None:
    log = tmp_path / "log"
    with keeping(
        tmp_path, f"--log={log}", "--log-size=10000", f"--log-count={count}", ring=8192
    ) as keeper:
        keeper.start(shell("seq 10000 20000", streams=2))
        assert keeper.follower(flags=lib.EB_FOLLOW_QUIET).exit_status() == 0
        assert keeper.journal()["log_lost"] == 0
    files = [*(f"log.{n}" for n in range(count, 0, -1)), "log"]
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("log")) == sorted(files)
    assert all((tmp_path / name).stat().st_size <= 10000 for name in files)
    kept = "".join((tmp_path / name).read_text() for name in files)
    total = "".join(f"{n}\n" for n in range(10000, 20001))
    assert total.endswith(kept)
    assert len(kept) > count * (10000 - 8192 // 4)  # a record is not divided


def test_log_that_cannot_be_opened_fails_the_start(tmp_path: Path) -> None:
    with keeping(tmp_path, "--log=/none/log") as keeper:
        assert keeper.starter.frame() == HELLO
        with open(os.devnull) as null:
            keeper.starter.send(job("/bin/true", targets=[3]), [null.fileno()])
        assert keeper.starter.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_LOG)
        assert keeper.starter.closed()
        assert keeper.wait() == 0
        assert keeper.journal()["failed"] == [errno.ENOENT, lib.EB_STAGE_LOG, 0]


def test_full_disk_loses_the_log_and_not_the_job(tmp_path: Path) -> None:
    with keeping(tmp_path, "--log=/dev/full") as keeper:
        step = keeper.steps("read x; echo a; read x; echo b; exit 3", streams=2)
        follower = keeper.follower()
        step()
        assert log_error(follower) == errno.ENOSPC
        step()
        pieces, end = follower.rest()
        assert (text(pieces)[-2:], end.status) == (b"b\n", 3 << 8)
        entry = keeper.journal()
        assert (entry["log_errno"], entry["log_lost"]) == (errno.ENOSPC, 4)
        assert keeper.journal_path.read_text().count("log_errno") == 1


@pytest.mark.slow
def test_fifo_as_a_log(tmp_path: Path) -> None:
    """A FIFO that nobody reads is refused, and one with a slow reader loses output."""
    log = tmp_path / "log"
    os.mkfifo(log)
    with keeping(tmp_path, f"--log={log}") as keeper:
        assert keeper.starter.frame() == HELLO
        keeper.starter.send(job("/bin/true"))
        assert keeper.starter.reply() == Failed(0, errno.ENXIO, lib.EB_STAGE_LOG)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "socket").unlink()
    with keeping(tmp_path, f"--log={log}") as keeper:
        keeper.start(shell("head -c 1000000 /dev/zero", streams=2))
        keeper.starter.send(follow(flags=lib.EB_FOLLOW_QUIET))
        while keeper.starter.frame()[0] != lib.EB_EXITED:
            pass
        assert keeper.wait() == 0
        entry = keeper.journal()
        got = 0
        while data := os.read(reader, 1 << 16):
            got += len(data)
        assert entry["log_errno"] == errno.EAGAIN
        assert entry["log_lost"] + got == entry["bytes"][0] == 1_000_000
    os.close(reader)


def test_log_that_cannot_be_rotated_goes_on(tmp_path: Path) -> None:
    """A directory is in the place of the rotated file."""
    log = tmp_path / "log"
    (tmp_path / "log.1").mkdir()
    arguments = [f"--log={log}", "--log-size=100", "--log-count=1"]
    with keeping(tmp_path, *arguments) as keeper:
        step = keeper.steps("read x; seq 1 20; read x; seq 21 60", streams=2)
        follower = keeper.follower()
        step()
        follower.until(b"20\n")
        step()
        assert log_error(follower) in (errno.EISDIR, errno.EEXIST)
        follower.rest()
        assert log.read_text() == "".join(f"{n}\n" for n in range(1, 61))
        assert keeper.journal()["log_lost"] == 0


# The command at the end


def notify(script: str, options: Sequence[bytes] = ()) -> bytes:
    parts = [
        strings(lib.EB_TAG_EXECUTABLES, "/bin/sh"),
        strings(lib.EB_TAG_ARGV, "sh", "-c", script),
        strings(lib.EB_TAG_ENV, "ERRAND_BOY_JOB=7", "ERRAND_BOY_STATUS=no", "PATH=/usr/bin:/bin"),
        option(lib.EB_TAG_NULL, b"\7"),
    ]
    return frame(lib.EB_NOTIFY, *parts, *options)


def start_notified(keeper: Keeper, notification: bytes, command: bytes) -> None:
    assert keeper.starter.frame() == HELLO
    keeper.starter.send(notification)
    keeper.starter.send(command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        ("exit 5", [], "7 5 exit"),
        ("kill -9 $$", [], "7 137 signal"),
        (
            "sleep 100",
            [SUPERVISED, option(lib.EB_TAG_LIMITS, struct.pack("<QQQI", 50_000, 0, 0, 0))],
            "7 137 timeout",
        ),
    ],
)
def test_command_is_run_at_the_end(
    tmp_path: Path, script: str, options: Sequence[bytes], told: str
) -> None:
    done = tmp_path / "done"
    say = "$ERRAND_BOY_JOB $ERRAND_BOY_STATUS $ERRAND_BOY_CAUSE"
    with keeping(tmp_path) as keeper:
        command = f"echo {say} >{done}.new; mv {done}.new {done}"
        start_notified(keeper, notify(command), shell(script, options=options))
        keeper.starter.reply()
        keeper.starter.sock.close()
        assert keeper.wait() == 0
        until(done.exists)
        assert done.read_text().strip() == told


def test_command_at_the_end_that_cannot_be_run_is_noted(keeper: Keeper) -> None:
    missing = strings(lib.EB_TAG_EXECUTABLES, "/none") + strings(lib.EB_TAG_ARGV, "none")
    start_notified(keeper, frame(lib.EB_NOTIFY, missing), job("/bin/true"))
    keeper.starter.reply()
    keeper.starter.sock.close()
    assert keeper.wait() == 0
    entry = keeper.journal()
    assert (entry["status"], entry["notify_errno"]) == (0, errno.ENOENT)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with keeping(tmp_path) as it:
        yield it


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([notify("")] * 2, "a second NOTIFY"),
        (
            [notify("", [option(lib.EB_TAG_STREAMS, b"\0"), SUPERVISED])],
            "malformed NOTIFY: descriptors, STREAMS, SUPERVISE and COALESCE are not allowed",
        ),
        ([frame(lib.EB_NOTIFY, b"\0")], "malformed NOTIFY: an option is longer than its frame"),
        ([frame(lib.EB_NOTIFY, bytes(65537))], "NOTIFY with a payload of 65537 bytes"),
    ],
)
def test_notify_that_is_refused(keeper: Keeper, frames: Sequence[bytes], reason: str) -> None:
    assert keeper.starter.frame() == HELLO
    for data in frames:
        keeper.starter.send(data)
    assert keeper.starter.refusal() == reason
    assert keeper.wait() == 0


def test_job_that_does_not_start_notifies_nobody(keeper: Keeper) -> None:
    start_notified(keeper, notify("exit 0"), job("/none"))
    assert isinstance(keeper.starter.reply(), Failed)
    assert keeper.wait() == 0
    assert "notify_errno" not in keeper.journal()
