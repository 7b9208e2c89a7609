"""``errand-boy run``, as a user at a shell or a supervisor sees it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = [sys.executable, "-m", "errand_boy", "run"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=50)


def test_output_and_status_are_the_commands() -> None:
    done = run("--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


def test_end_by_a_signal_is_128_plus_its_number() -> None:
    assert run("--", "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_missing_program_is_127_and_named() -> None:
    done = run("/none")
    assert done.returncode == 127
    assert "/none: No such file or directory" in done.stderr


def test_program_that_cannot_run_is_126(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a program")
    assert run(str(tmp_path / "text")).returncode == 126


def test_no_command_is_an_error_of_usage() -> None:
    assert run("--").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_forwarded(number: signal.Signals) -> None:
    script = f"""
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
print("ready", flush=True)
print(signal.sigwait([{int(number)}]).name)
"""
    command = [*RUN, "--", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == f"{number.name}\n"
    assert process.returncode == 0


def test_ignored_signals_stay_ignored() -> None:
    shell = "trap '' HUP; \"$@\" grep SigIgn /proc/self/status"
    seen = [
        subprocess.check_output(["sh", "-c", shell, "sh", *prefix], text=True)
        for prefix in (["env"], [*RUN, "--"])
    ]
    assert int(seen[0].split()[1], 16) & 1 << signal.SIGHUP - 1
    assert seen[0] == seen[1]


def test_interrupt_at_the_terminal_comes_once() -> None:
    """The terminal tells the command itself; a forwarded one would be the second."""
    script = """
import os, signal
count = []
signal.signal(signal.SIGINT, lambda *_: count.append(1))
print("ready", flush=True)
os.read(0, 100)
print("interrupts", len(count), flush=True)
"""
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*RUN, "--", sys.executable, "-c", script])
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(master, 1000)

    try:
        until(b"ready")
        os.write(master, b"\x03")
        until(b"^C")
        os.write(master, b"go on\n")
        until(b"interrupts 1")
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        os.close(master)
