"""`errand-boy status --watch`, on a terminal that a test can read."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from daemon import started_daemon

import errand_boy
from errand_boy._cli.watch import Rates

pyte = pytest.importorskip("pyte")
rich = pytest.importorskip("rich")

WATCH = [sys.executable, "-m", "errand_boy", "status", "--watch", "0.05", "--socket"]


class Terminal:
    """The screen of a program."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._master = master
        self._screen = pyte.Screen(100, 24)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display)

    def read_until(self, *wanted: str, without: str | None = None) -> str:
        """Read until all of these texts are on the screen."""
        end = time.monotonic() + PATIENCE
        while not (
            all(text in self.text for text in wanted)
            and (without is None or without not in self.text)
        ):
            if not select.select([self._master], [], [], max(0, end - time.monotonic()))[0]:
                pytest.fail(f"{wanted} do not come:\n{self.text}")
            try:
                self._stream.feed(os.read(self._master, 1 << 16))
            except OSError:
                pytest.fail(f"it has ended without {wanted}:\n{self.text}")
        return self.text


@contextmanager
def watching(path: str) -> Iterator[Terminal]:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        [*WATCH, path], stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.slow
def test_screen_follows_the_daemon(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        client = errand_boy.connect(daemon.path)
        with watching(daemon.path) as terminal:
            text = terminal.read_until("errand-boy 1", "HELPER", "0 started (0.0/s)")
            assert daemon.path[:40] in text
            words = ["sh", "-c", "read x", "[bold]\x1b[31mred"]
            with client.Popen(words, stdin=subprocess.PIPE) as command:
                text = terminal.read_until("COMMAND", "read x", "1 started")
                assert "[bold]" in text  # neither rich's markup nor the terminal's
                assert "\\x1b[31mred" in text
                assert str(command.pid) in text
                command.communicate(b"x\n", timeout=PATIENCE)
            terminal.read_until("1 ended", without="read x")
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.process.wait(PATIENCE) == 0
        client.close()


def test_no_daemon() -> None:
    # A short path, since a message longer than a line is broken somewhere.
    with tempfile.TemporaryDirectory() as directory, watching(f"{directory}/s") as terminal:
        terminal.read_until("no errand-boy daemon listens here")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(PATIENCE) == 0


def test_needs_a_terminal(tmp_path: Path) -> None:
    done = subprocess.run([*WATCH, tmp_path / "x"], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (1, b"errand-boy: --watch needs a terminal\n")


def test_rates() -> None:
    rates = Rates()
    totals = {"accepted": 10, "started": 10, "ended": 5, "failed": 0}
    assert set(rates.take(1.0, totals).values()) == {None}
    found: dict[str, Any] = rates.take(3.0, {**totals, "started": 20})
    assert found == {"accepted": 0, "started": 5, "ended": 0, "failed": 0}
    assert rates.take(4.0, dict.fromkeys(totals, 0)) == dict.fromkeys(totals, 0)  # it is new
