"""``errand-boy run --pty``, in a user's terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, has_ended, script_environment, until
from daemon import Daemon, started_daemon

import errand_boy
from errand_boy.terminal import Pty

errand: Any = errand_boy

RUN = [sys.executable, "-m", "errand_boy", "run", "--pty"]


@pytest.fixture(autouse=True, params=["here", "daemon"])
def by(
    request: pytest.FixtureRequest, daemon: Daemon, no_daemon: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    name: str = request.param
    if name == "daemon":
        monkeypatch.setenv("ERRAND_BOY_SOCKET", daemon.path)
    return name


class Outer:
    """What a user sees."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.terminal = process.terminal
        self.seen = b""

    def until(self, text: bytes) -> None:
        while text not in self.seen:
            part = self.terminal.read(1000)
            assert part, self.seen
            self.seen += part

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.terminal.fileno())

    def end(self) -> int:
        self.seen += self.terminal.read()
        status: int = self.process.wait(PATIENCE)
        return status


@contextmanager
def outer(*arguments: str, command: Sequence[str] = RUN, pty: Any = (30, 90)) -> Iterator[Outer]:
    with errand.Popen([*command, *arguments], pty=pty, env=script_environment()) as process:
        yield Outer(process)


@pytest.mark.slow
def test_terminal_is_another_of_the_same_size_and_kind() -> None:
    with outer("--", "sh", "-c", "tty; stty size; stty -a; exit 3") as user:
        name = os.readlink(f"/proc/{user.process.pid}/fd/0")
        assert user.end() == 3
    lines = user.seen.splitlines()
    assert lines[0].startswith(b"/dev/pts/")
    assert lines[0] != os.fsencode(name)
    assert lines[1] == b"30 90"
    assert b" echo " in user.seen and b"intr = ^C" in user.seen


def test_raw_while_it_runs_and_restored() -> None:
    with outer("sh", "-c", "echo ready; read x; echo got $x") as user:
        before = user.modes()
        user.until(b"ready")
        during = user.modes()
        assert not during[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        user.terminal.write(b"text\r")
        user.until(b"got text\r\n")
        assert user.process.wait(PATIENCE) == 0
        # The end of its own session hangs up the terminal, whose attributes can't be read then.
    assert before[3] & termios.ICANON


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("sh -c 'echo ready; read x'", 0),
        ("sh -c 'echo ready; kill -KILL $$'", 137),
        ("/none; echo ready", 127),
    ],
)
def test_terminal_is_restored(script: str, status: int) -> None:
    """It is the terminal of a shell, before and after."""
    line = f"echo one; stty -g; {' '.join(RUN)} -- {script.replace('; echo ready', '')}; s=$?; "
    line += "echo; echo two; stty -g; echo status $s; read x"
    if status == 127:
        line = line.replace("s=$?", "s=$?; echo ready")
    with outer(command=["sh", "-c", line]) as user:
        user.until(b"ready")
        if status == 0:
            user.terminal.write(b"x\r")
        user.until(b"status ")
        user.until(b"%d\r\n" % status)
    lines = user.seen.splitlines()
    assert lines[lines.index(b"one") + 1] == lines[lines.index(b"two") + 1]


def test_keys_reach_the_command() -> None:
    script = (
        "trap 'echo got it; go=1' INT; echo ready; while [ -z $go ]; do sleep 0.01; done;"
        "echo next; cat; echo end"
    )
    with outer("sh", "-c", script) as user:
        user.until(b"ready")
        user.terminal.write(b"\x03")
        user.until(b"got it")
        user.until(b"next")
        user.terminal.write(b"line\r")
        user.until(b"line\r\nline\r\n")
        user.terminal.write(b"\x04")
        assert user.end() == 0
        assert user.seen.endswith(b"end\r\n")


def test_change_of_the_size() -> None:
    script = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
print("ready", flush=True)
signal.sigwait([signal.SIGWINCH])
print(*os.get_terminal_size(1))
"""
    with outer(sys.executable, "-c", script) as user:
        user.until(b"ready")
        user.terminal.winsize = 33, 77
        user.until(b"77 33")
        assert user.end() == 0


@pytest.mark.parametrize("by_key", [True, False], ids=["key", "signal"])
def test_suspend_and_go_on(by_key: bool) -> None:
    """^Z stops the command and the client, and the shell has its terminal; `fg` goes on."""
    shell = ["bash", "--norc", "--noprofile", "-i"]
    with outer(command=shell) as user:
        user.terminal.write(b"PS1='> '\r")
        user.until(b"> ")
        line = " ".join([*RUN, "--", "sh", "-c"])
        user.terminal.write(line.encode() + b" 'echo pid $$ $PPID; read x; echo got $x'\r")
        while (found := re.search(rb"pid (\d+) \d+\r\n", user.seen)) is None:
            user.seen += user.terminal.read(1000)
        pid = int(found[1])
        client = user.terminal.foreground_pgid
        assert not user.modes()[3] & termios.ICANON
        user.seen = b""
        if by_key:
            user.terminal.write(b"\x1a")
        else:
            os.kill(client, signal.SIGTSTP)
        user.until(b"Stopped")
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        user.until(b"> ")
        user.terminal.write(b"stty -a\r")
        user.until(b" icanon")
        user.terminal.write(b"fg\r")
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_SLEEPING)
        until(lambda: not user.modes()[3] & termios.ICANON)
        user.terminal.write(b"on\r")
        user.until(b"got on")
        until(lambda: user.terminal.foreground_pgid == user.process.pid)  # else the client reads it
        user.terminal.write(b"exit 5\r")
        assert user.end() == 5


@pytest.mark.slow
def test_input_that_is_no_terminal() -> None:
    done = errand.run(
        [*RUN, "-t", "sh", "-c", "test -t 0 && cat"],
        input=b"a\nb",
        capture_output=True,
        env=script_environment(),
        timeout=PATIENCE,
    )
    assert done.returncode == 0
    assert done.stdout.count(b"a\r\n") == 2
    done = errand.run(
        [*RUN, "stty", "size"], stdin=errand.DEVNULL, capture_output=True, env=script_environment()
    )
    assert done.stdout == b"24 80\r\n"


def test_signals_are_forwarded() -> None:
    script = "trap 'echo got it; exit 4' TERM; echo ready; while :; do sleep 0.01; done"
    with outer("sh", "-c", script) as user:
        user.until(b"ready")
        user.process.send_signal(signal.SIGTERM)
        user.until(b"got it")
        assert user.end() == 4


@pytest.mark.parametrize("how", ["killed", "hung up"])
def test_client_that_goes_hangs_up(how: str) -> None:
    with outer("sh", "-c", "echo pid $$; exec sleep 1000") as user:
        user.until(b"pid ")
        user.until(b"\r\n")
        pid = int(user.seen.split()[1])
        if how == "killed":
            user.process.kill()
        else:
            user.terminal.close()
        until(lambda: has_ended(pid), "the end of the command")


def test_helper_that_dies(by: str, tmp_path: Path) -> None:
    if by != "daemon":
        pytest.skip("a command that is started here has no helper")
    with started_daemon(tmp_path) as own:
        with outer("--socket", own.path, "sh", "-c", "echo pid $$; exec sleep 1000") as user:
            user.until(b"\r\n")
            for helper in own.helpers():
                os.kill(helper, signal.SIGKILL)
            pid = int(user.seen.split()[1])
            until(lambda: has_ended(pid), "the end of the command")
            assert user.end() == 125
        assert b"helper ended" in user.seen


def test_daemon_that_is_killed(by: str, tmp_path: Path) -> None:
    """Neither the terminal's output nor the exit status passes through the daemon."""
    if by != "daemon":
        pytest.skip("a command that is started here has no daemon")
    with started_daemon(tmp_path) as own:
        with outer("--socket", own.path, "sh", "-c", "echo ready; read x; echo $x; exit 3") as user:
            user.until(b"ready")
            own.stop(signal.SIGKILL)
            user.terminal.write(b"text\r")
            assert user.end() == 3
        assert user.seen.endswith(b"text\r\ntext\r\n")


def test_recording(tmp_path: Path) -> None:
    path = tmp_path / "cast"
    script = "echo ready; read x; printf '\\342\\202\\254\\n'; echo end"
    with outer("--record", str(path), "--", "sh", "-c", script, pty=Pty(30, 90)) as user:
        user.until(b"ready")
        user.terminal.winsize = 20, 50
        user.terminal.write(b"text\r")
        assert user.end() == 0
    header, *events = map(json.loads, path.read_text().splitlines())
    assert (header["version"], header["width"], header["height"]) == (2, 90, 30)
    assert header["command"].startswith("sh -c echo ready")
    assert "".join(data for _, kind, data in events if kind == "o").endswith("\u20ac\r\nend\r\n")
    assert [data for _, kind, data in events if kind == "r"] == ["50x20"]
    times = [at for at, _, _ in events]
    assert times == sorted(times)


def test_recording_that_cannot_be() -> None:
    done = errand.run(
        [*RUN, "--record", "/none/cast", "true"],
        stdin=errand.DEVNULL,
        capture_output=True,
        env=script_environment(),
    )
    assert done.returncode == 125
    assert b"/none/cast: No such file" in done.stderr
