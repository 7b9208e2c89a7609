"""Jobs where there is no room: full disks."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from keeper import HELLO, SUPERVISED, keeping, shell
from wire import Failed

from errand_boy._jobs.follow import Follower, Missed
from errand_boy._jobs.ring import RingFile
from errand_boy._native import lib

pytestmark = pytest.mark.root


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Fill the file system; return the file that takes the room."""
    path = place / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))
    return path


def test_end_is_noted_though_the_disk_is_full(small: Path) -> None:
    """The journal needs a new page for it."""
    with keeping(small) as keeper:
        with keeper.journal_path.open("a") as file:
            file.write(" " * (4096 - 60 - file.tell()) + "\n")
        step = keeper.steps("read x; exit 3", options=[SUPERVISED])
        fill(small)
        step()
        assert keeper.follower().end().status == 3 << 8
        assert keeper.journal()["status"] == 3 << 8


def test_start_without_room_for_its_end_fails(small: Path) -> None:
    with keeping(small) as keeper:
        with keeper.journal_path.open("a") as file:
            file.write(" " * (4095 - file.tell()) + "\n")
        fill(small)
        assert keeper.starter.frame() == HELLO
        keeper.starter.send(shell("exit 3"))
        answer = keeper.starter.reply()
        assert isinstance(answer, Failed)
        assert (answer.errno, answer.stage) == (errno.ENOSPC, lib.EB_STAGE_RING)


@pytest.mark.parametrize("known", [0, 1000])
def test_output_that_found_no_room_is_told_by_its_file(small: Path, known: int) -> None:
    """This includes the last output."""
    with keeping(small) as keeper:
        script = "read x; head -c 9000 /dev/zero; exit 3"
        if known:
            script = "printf %01000d; " + script
        step = keeper.steps(script, options=[SUPERVISED])
        if known:
            keeper.follower().until(b"0" * known)
        fill(small)
        step()
        keeper.follower().rest()
        with keeper.ring_path.open("rb") as file:
            events = list(Follower().replay(RingFile(file.fileno())))
        told = sum(e.size if isinstance(e, Missed) else len(e.data) for e in events)
        assert told == known + 9000
