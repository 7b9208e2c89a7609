"""Full-screen programs, on a screen that pyte emulates."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
from conftest import find_program, until
from screen import VIM, program, pyte


def test_bash() -> None:
    with program(["bash", "--norc", "--noprofile", "-i"]) as screen:
        screen.has("prompt>")
        screen.type("echo $((6 * 7))\r")
        screen.until(lambda lines: "42" in lines)
        screen.type("sleep 1000\r")
        # Before its exec, the new process still has bash's handler of SIGINT.
        until(lambda: psutil.Process(screen.terminal.foreground_pgid).name() == "sleep")
        screen.type("\x03")
        screen.until(lambda lines: any("^C" in line for line in lines))
        screen.type("abc\x15echo $LINES $COLUMNS\r")
        screen.until(lambda lines: "24 80" in lines)
        screen.terminal.winsize = 20, 70
        screen.screen.resize(20, 70)
        screen.type("stty size\r")
        screen.until(lambda lines: "20 70" in lines)
        screen.type("exit 3\r")
        assert screen.end() == 3


def test_vim(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("first\nsecond\n")
    with program([*VIM, str(path)]) as screen:
        screen.until(lambda lines: lines[:4] == ["first", "second", "~", "~"])
        screen.type("ihello \x1b")
        screen.until(lambda lines: lines[0] == "hello first")
        screen.terminal.winsize = 10, 40
        screen.screen.resize(10, 40)
        screen.has("10x40")
        screen.type(":wq\r")
        assert screen.end() == 0
    assert path.read_text() == "hello first\nsecond\n"


def replayed(path: Path) -> Any:
    """Return the screen of a recording at its end."""
    header, *events = map(json.loads, path.read_text().splitlines())
    screen = pyte.Screen(header["width"], header["height"])
    stream = pyte.Stream(screen)
    for _, kind, data in events:
        if kind == "o":
            stream.feed(data)
        else:
            columns, rows = map(int, data.split("x"))
            screen.resize(rows, columns)
    return screen


def look(screen: Any) -> list[Any]:
    """Return everything visible: characters with colours, and the cursor."""
    lines = [
        [screen.buffer[row][column] for column in range(screen.columns)]
        for row in range(screen.lines)
    ]
    return [screen.columns, screen.lines, screen.cursor.x, screen.cursor.y, lines]


def test_recording_is_what_was_on_the_screen(tmp_path: Path, no_daemon: None) -> None:
    """With vim, colours, non-ASCII text and a resize, a player shows the same."""
    find_program("vim")
    cast, text = tmp_path / "cast", tmp_path / "text.py"
    text.write_text("def first():\n    return 'größer als €'\n")
    command = [sys.executable, "-m", "errand_boy", "run", "--record", str(cast)]
    with program([*command, *VIM, "-c", "syntax on", str(text)], (12, 60)) as screen:
        screen.has("größer als €")
        screen.type("Ox = 'ж'\x1b")
        screen.has("x = 'ж'")
        screen.terminal.winsize = 10, 40
        screen.screen.resize(10, 40)
        screen.has("10x40")
        # The screen from before vim does not come back: it ends by a signal that it can't handle.
        (vim_process,) = psutil.Process(screen.process.pid).children()
        vim_process.kill()
        assert screen.end() == 128 + signal.SIGKILL
        assert any("größer" in line for line in screen.lines())
        assert look(replayed(cast)) == look(screen.screen)
    if shutil.which("asciinema") is None:
        return
    # What a player writes, with the resizing that players leave to who looks.
    player = ["asciinema", "play", "--speed", "1000", str(cast)]
    with program(player, (10, 40), HOME=str(tmp_path)) as played:
        # It asks what vim asked, but an answer that comes when it ends is echoed to the screen.
        played.screen.write_process_input = lambda text: None
        assert played.end() == 0
        assert played.lines() == screen.lines()


def test_less(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("".join(f"line {n}\n" for n in range(1000)))
    with program(["less", str(path)], (10, 40)) as screen:
        screen.until(lambda lines: lines[8] == "line 8")
        screen.type(" ")
        screen.until(lambda lines: lines[8] == "line 17")
        screen.type("/line 500\r")
        screen.until(lambda lines: lines[0] == "line 500")
        screen.type("G")
        screen.until(lambda lines: lines[8] == "line 999")
        screen.type("q")
        assert screen.end() == 0


def test_top() -> None:
    with program(["top", "-d", "1"]) as screen:
        screen.until(lambda lines: lines[0].startswith("top - "))
        screen.has("PID")
        screen.type("q")
        assert screen.end() == 0


def test_python() -> None:
    with program([sys.executable, "-q"], PYTHONSTARTUP="") as screen:
        screen.has(">>>")
        screen.type("6 * 7\r")
        screen.until(lambda lines: "42" in lines)
        # Python sleeps through a signal that comes right before.
        screen.type("import time; print('run' + 'ning'); [time.sleep(0.01) for _ in range(9999)]\r")
        screen.has("running")  # not earlier: in its own code, Python may end by an interrupt
        screen.terminal.intr()
        screen.has("KeyboardInterrupt")
        screen.type("\x04")
        # Before 3.13, Python ends by the interrupt that it has survived.
        assert screen.end() in (0, -signal.SIGINT)


def test_hang_up_ends_them() -> None:
    with program(["bash", "--norc", "--noprofile", "-i"]) as screen:
        screen.has("prompt>")
    assert screen.process.returncode in (-signal.SIGHUP, 128 + signal.SIGHUP, 1)
