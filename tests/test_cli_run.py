"""``errand-boy run``, as a user at a shell or a supervisor sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import pwd
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, script_environment
from daemon import Daemon, started_daemon
from guard import Guard

RUN = [sys.executable, "-m", "errand_boy", "run"]


@pytest.fixture(autouse=True, params=["helper", "daemon"])
def by(
    request: pytest.FixtureRequest,
    daemon: Daemon,
    no_daemon: None,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The process that runs the commands: a private helper, or the daemon."""
    name: str = request.param
    if name == "daemon":
        monkeypatch.setenv("ERRAND_BOY_SOCKET", daemon.path)
    return name


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=50)


def test_output_and_status_are_the_commands() -> None:
    done = run("--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


def test_command_is_a_child_of_the_helpers_or_ours(by: str, daemon: Daemon) -> None:
    before = daemon.status()["totals"]["started"]
    run("true")
    assert daemon.status()["totals"]["started"] - before == (by == "daemon")


def test_socket_goes_before_the_default(daemon: Daemon, tmp_path: Path) -> None:
    before = daemon.status()["totals"]["started"]
    assert run("--socket", daemon.path, "--", "true").returncode == 0
    assert daemon.status()["totals"]["started"] - before == 1


def test_end_by_a_signal_is_128_plus_its_number() -> None:
    assert run("--", "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_missing_program_is_127_and_named() -> None:
    done = run("/none")
    assert done.returncode == 127
    assert "/none: No such file or directory" in done.stderr


def test_missing_program_with_a_space_is_quoted() -> None:
    assert "errand-boy: '/none at all': No such file or directory" in run("/none at all").stderr


def test_environment_and_working_directory(tmp_path: Path, by: str) -> None:
    variables = tmp_path / "variables"
    variables.write_bytes(b"# of this test\n\nONE=from the file\nTWO='2'\nBYTES=\xff\n")
    script = 'echo "$ONE,$TWO,$THREE,$PATH,$(pwd)"; printf %s "$BYTES"'
    given = ["-C", str(tmp_path), "--env-file", str(variables), "-e", "ONE=a=b", "--env", "THREE="]
    done = subprocess.run([*RUN, *given, "--", "sh", "-c", script], capture_output=True, timeout=50)
    assert done.stdout == f"a=b,'2',,{os.environ['PATH']},{tmp_path}\n".encode() + b"\xff"
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("option", "value", "status", "text"),
    [
        ("--env", "NAME", 2, "'NAME' is not NAME=VALUE"),
        ("--env-file", "/none", 2, "/none: No such file or directory"),
        ("--cwd", "/none", 126, "/none: No such file or directory"),
    ],
)
def test_bad_environment_or_working_directory(
    option: str, value: str, status: int, text: str
) -> None:
    done = run(option, value, "--", "true")
    assert done.returncode == status
    assert text in done.stderr


def test_program_that_cannot_run_is_126(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a program")
    assert run(str(tmp_path / "text")).returncode == 126


def test_no_command_is_an_error_of_usage() -> None:
    assert run("--").returncode == 2


IDS = ["sh", "-c", "echo $(id -u) $(id -g) $(id -G)"]


@pytest.mark.root
def test_user_brings_its_groups() -> None:
    nobody = pwd.getpwnam("nobody")
    uid, gid = nobody.pw_uid, nobody.pw_gid
    own = " ".join(map(str, os.getgrouplist("nobody", gid)))
    assert run("--user", "nobody", "--", *IDS).stdout == f"{uid} {gid} {own}\n"
    assert run("--user", str(uid), "--", *IDS).stdout == f"{uid} {gid} {own}\n"
    assert run("--user", "nobody", "--pty", "--", *IDS).stdout == f"{uid} {gid} {own}\n"
    both = run("--user", "nobody", "--group", "daemon", "--", *IDS)
    assert both.stdout == f"{uid} 1 {' '.join(map(str, os.getgrouplist('nobody', 1)))}\n"
    assert run("--group", "daemon", "--", "id", "-g").stdout == "1\n"


def test_user_that_does_not_exist_or_may_not_be_taken_on() -> None:
    for name in "no-such-user", "2000000000":
        done = run("--user", name, "--", "true")
        assert done.returncode == 2
        assert f"argument --user: unknown user {name}" in done.stderr
    command = ["setpriv", "--bounding-set=-setuid"] if os.geteuid() == 0 else []
    local = [*command, *RUN, "--local", "--user", "nobody", "--", "true"]
    done = subprocess.run(local, capture_output=True, text=True, timeout=50)
    message = "errand-boy: true: Operation not permitted; --user and --group need root's rights\n"
    assert (done.returncode, done.stderr) == (126, message)


def test_a_limit_of_output_is_refused_since_nobody_would_count() -> None:
    done = run("--limit", "output=1K", "--", "true")
    assert (done.returncode, "errand-boy map" in done.stderr) == (2, True)


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
    # 32 and 33 are glibc's own.
    here, there = (int(line.split()[1], 16) & ~(3 << 31) for line in seen)
    assert here & 1 << signal.SIGHUP - 1
    assert here == there


def test_interrupt_at_the_terminal_comes_once() -> None:
    """The terminal signals the command itself; a forwarded signal would be a second one."""
    script = """
import os, select, signal
count = []
# Not by print(), which may not have returned from "ready" yet, and refuses to be called again.
signal.signal(signal.SIGINT, lambda *_: (count.append(1), os.write(1, b"interrupted\\n")))
print("ready", flush=True)
# Python runs no handler during a call that the signal has just preceded.
while not select.select([0], [], [], 0.01)[0]:
    pass
print("interrupts", len(count), flush=True)
"""
    with Terminal("--", sys.executable, "-c", script) as terminal:
        terminal.until(b"ready")
        terminal.write(b"\x03")
        terminal.until(b"interrupted")
        terminal.write(b"go on\n")
        terminal.until(b"interrupts 1")
        assert terminal.status() == 0


@pytest.mark.root
def test_interrupt_at_the_terminal_during_the_start_comes_once(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs already, but its helper's answer has not come."""
    if by != "helper":
        pytest.skip("the daemon's commands are not on the terminal")
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper")
    slow = Path(shutil.copy("/bin/sh", tmp_path / "slow"))
    script = """
trap 'echo interrupted; n=$((n + 1))' INT
trap 'echo $n times' USR1
echo ready
while :; do sleep 0.01; done
"""
    with Guard(slow) as guard, Terminal("--", str(slow), "-c", script) as terminal:
        command = guard.held()
        (helper,) = (
            child for child in psutil.Process(terminal.pid).children() if child.pid != command
        )
        helper.suspend()
        guard.release()
        terminal.until(b"ready")
        terminal.write(b"\x03")
        terminal.until(b"interrupted")
        os.kill(terminal.pid, signal.SIGUSR1)
        helper.resume()
        # It is forwarded after those that came before it.
        terminal.until(b" times\r\n")
        assert terminal.seen.endswith(b"\n1 times\r\n")


def test_interrupt_at_the_terminal_comes_to_the_whole_group() -> None:
    # Python sleeps through a signal that comes right before.
    below = "import time; print('ready', flush=True); [time.sleep(0.01) for _ in range(10_000)]"
    script = "trap 'echo got it' INT; \"$@\"; echo end; exit 3"
    with Terminal("sh", "-c", script, "sh", sys.executable, "-c", below) as terminal:
        terminal.until(b"ready")
        terminal.write(b"\x03")
        terminal.until(b"got it\r\nend")
        assert terminal.status() == 3


def test_change_of_the_terminals_size() -> None:
    script = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
print("ready", flush=True)
signal.sigwait([signal.SIGWINCH])
print(*os.get_terminal_size(1))
"""
    with Terminal(sys.executable, "-c", script) as terminal:
        terminal.until(b"ready")
        terminal.resize(33, 77)
        terminal.until(b"77 33")
        assert terminal.status() == 0


def test_suspend_at_the_terminal(by: str) -> None:
    if by != "daemon":
        pytest.skip("the terminal's driver does not stop a group that no shell watches over")
    with Terminal("sh", "-c", "echo pid $$; read line; echo got $line") as terminal:
        terminal.until(b"\n")
        command = psutil.Process(int(terminal.seen.split()[1]))
        terminal.write(b"\x1a")
        _, status = os.waitpid(terminal.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        until_status(command, psutil.STATUS_STOPPED)
        os.kill(terminal.pid, signal.SIGCONT)
        until_status(command, psutil.STATUS_SLEEPING)
        terminal.write(b"on\n")
        terminal.until(b"got on")
        assert terminal.status() == 0


def test_helper_that_dies(by: str, tmp_path: Path) -> None:
    if by != "daemon":
        pytest.skip("a private helper does not own its commands")
    with started_daemon(tmp_path) as own:
        command = [*RUN, "--socket", own.path, "sh", "-c", "echo $$; exec sleep 100"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            pid = int(process.stdout.readline())
            for helper in own.helpers():
                os.kill(helper, signal.SIGKILL)
            assert process.wait() == 125
            os.kill(pid, signal.SIGKILL)
            assert "helper ended" in process.stderr.read()


def until_status(process: psutil.Process, status: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.status() != status:
        assert time.monotonic() < deadline
        os.sched_yield()


class Terminal:
    """`errand-boy run` with a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [*RUN, *arguments])
        self.seen = b""
        self._status: int | None = None

    def until(self, text: bytes) -> None:
        while text not in self.seen:
            self.seen += os.read(self.master, 1000)

    def write(self, data: bytes) -> None:
        os.write(self.master, data)

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def status(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status()
        os.close(self.master)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(closed: str) -> None:
    script = f'exec "$@" </dev/null {closed}'
    for arguments in (["map", "true"], ["run", "true"], ["status", "--socket", "/none"]):
        command = [sys.executable, "-m", "errand_boy", *arguments]
        done = subprocess.run(
            ["/bin/sh", "-c", script, "sh", *command],
            env=script_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == (1 if arguments[0] == "status" else 0)
        assert "Traceback" not in done.stderr
