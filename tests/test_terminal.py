"""Commands with a terminal: Popen(pty=...), however they are started."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import os
import signal
import subprocess as stdlib
import sys
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    PATIENCE,
    find_program,
    has_ended,
    run_script,
    started_script,
    until,
    with_enough_time,
)
from daemon import Daemon, started_daemon

import errand_boy
from errand_boy import terminal as terminals
from errand_boy._process import helper as _helper
from errand_boy.terminal import Pty, Terminal

errand: Any = errand_boy  # its parameters are more than a type checker knows


@pytest.fixture(params=["direct", "helper", "daemon"])
def starter(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, daemon: Daemon
) -> Iterator[Any]:
    """The object that has Popen and run."""
    if request.param == "daemon":
        client = errand_boy.connect(daemon.path)
        yield client
        client.close()
        return
    monkeypatch.setenv("ERRAND_BOY_SPAWN", request.param)
    yield errand_boy
    errand_boy.stop()


def cfmakeraw(fd: int) -> None:
    """Make a terminal raw by the C library; tty.setraw is not the same in all versions."""
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(256)
    assert libc.tcgetattr(fd, attributes) == 0
    libc.cfmakeraw(attributes)
    assert libc.tcsetattr(fd, termios.TCSANOW, attributes) == 0


def read_until(terminal: Terminal, text: Any) -> Any:
    """Read until `text` has come; return all output."""
    got = terminal.read(1000)
    while text not in got:
        part = terminal.read(1000)
        assert part, got
        got += part
    return got


# -- what the command has --


def test_standard_streams_are_the_controlling_terminal(starter: Any) -> None:
    find_program("ps", "procps")
    script = (
        "tty; ps -o tty=,pid=,pgid=,sid=,tpgid= -p $$; test -t 1 && test -t 2; echo $?;"
        "echo more >/dev/tty; stty size"
    )
    with starter.Popen(["sh", "-c", script], pty=True, text=True) as process:
        lines = process.terminal.read().splitlines()
    name, ps, status, more, size = lines
    assert name.startswith("/dev/pts/")
    tty_name, *ids = ps.split()
    assert "/dev/" + tty_name == name
    assert set(map(int, ids)) == {process.pid}
    assert (status, more, size) == ("0", "more", "24 80")
    assert process.returncode == 0


def test_only_what_is_not_redirected_is_the_terminal(starter: Any) -> None:
    script = "for n in 0 1 2; do test -t $n; echo $? >/dev/tty; done; cat; echo error >&2"
    with starter.Popen(
        ["sh", "-c", script], pty=True, stdin=stdlib.PIPE, stderr=stdlib.PIPE, text=True
    ) as process:
        out, errors = process.communicate("text\n", timeout=PATIENCE)
    assert (out, errors) == ("1\n0\n1\ntext\n", "error\n")


def test_all_redirected_and_still_a_controlling_terminal(starter: Any) -> None:
    process = starter.Popen(
        ["sh", "-c", "echo out; echo tty >/dev/tty"], pty=True, stdin=stdlib.DEVNULL,
        stdout=stdlib.PIPE, stderr=stdlib.STDOUT,
    )  # fmt: skip
    with process:
        # Nobody has it open until the command opens it.
        assert until(process.terminal.read) == b"tty\r\n"
        assert process.communicate(timeout=PATIENCE) == (b"out\n", None)


LATE = "head -c 1000000 /dev/zero >/dev/tty; echo out; exit 3"


def test_communicate_when_it_is_opened_late(starter: Any) -> None:
    """More than the kernel buffers is written to it, after the pipes were polled."""
    process = starter.Popen(
        ["sh", "-c", "read x; " + LATE], pty=Pty(raw=True), stdin=stdlib.PIPE,
        stdout=stdlib.PIPE, stderr=stdlib.STDOUT,
    )  # fmt: skip
    with process:
        assert process.communicate(b"go\n", timeout=PATIENCE) == (b"out\n", None)
    assert process.returncode == 3


@pytest.mark.slow
def test_communicate_when_it_is_opened_again(starter: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = "exec </dev/null >/dev/null 2>&1; read x <$1; echo again >/dev/tty; " + LATE
    with starter.Popen(["sh", "-c", script, "sh", str(fifo)], pty=Pty(raw=True)) as process:
        with pytest.raises(stdlib.TimeoutExpired):
            process.communicate(timeout=0.2)
        fifo.write_bytes(b"go\n")
        shown, _ = process.communicate(timeout=PATIENCE)
        assert shown == b"again\n" + bytes(1000000)
    assert process.returncode == 3


def test_communicate_types_when_it_is_opened(starter: Any) -> None:
    """A program that asks for a password does so."""
    process = starter.Popen(
        ["sh", "-c", "read x </dev/tty; echo got $x"], pty=True, stdin=stdlib.DEVNULL,
        stdout=stdlib.PIPE, stderr=stdlib.PIPE,
    )  # fmt: skip
    with process:
        assert process.communicate(b"word\n", timeout=PATIENCE) == (b"got word\n", b"")


def test_nothing_of_it_is_inherited_by_others() -> None:
    with errand.Popen(["cat"], pty=True) as process:
        fd = process.terminal.fileno()
        assert not os.get_inheritable(fd)
        script = f"test -e /proc/self/fd/{fd} && readlink /proc/self/fd/{fd} || true"
        seen = stdlib.check_output(["sh", "-c", script], close_fds=False)
        assert b"ptmx" not in seen


def test_this_process_does_not_get_it_as_its_controlling_terminal() -> None:
    script = """
        os.setsid()
        with subprocess.Popen(["true"], pty=True) as process:
            process.terminal.read()
        try:
            os.open("/dev/tty", os.O_RDWR)
        except OSError as error:
            report(error.errno)
    """
    assert run_script(script) == errno.ENXIO


@pytest.mark.parametrize(
    ("given", "size"),
    [(True, "24 80"), ((5, 7), "5 7"), ([5, 7], "5 7"), (Pty(9, 8), "9 8"), (Pty(), "24 80")],
)
def test_what_pty_may_be(given: Any, size: str) -> None:
    done = errand.run(["stty", "size"], pty=given, capture_output=True, text=True)
    assert done.stdout == size + "\n"


@pytest.mark.parametrize("given", [None, False])
def test_no_terminal(given: Any) -> None:
    process = errand.Popen(["true"], pty=given)
    assert process.terminal is None
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("given", "error"),
    [("24x80", TypeError), (3, TypeError), ((1 << 16, 80), ValueError), ((-1, 80), ValueError)],
)
def test_what_it_may_not_be(given: Any, error: type[Exception]) -> None:
    gc.collect()  # what other tests have left may hold descriptors
    before = os.listdir("/proc/self/fd")
    with pytest.raises(error):
        errand.Popen(["true"], pty=given)
    assert os.listdir("/proc/self/fd") == before


def test_how_it_is_to_be(starter: Any) -> None:
    script = "import sys, termios; print(termios.tcgetattr(0)[:4])"
    command = [sys.executable, "-c", script]
    plain = eval(starter.run(command, pty=True, capture_output=True).stdout)
    quiet = eval(starter.run(command, pty=Pty(echo=False), capture_output=True).stdout)
    raw = eval(starter.run(command, pty=Pty(raw=True), capture_output=True).stdout)
    assert plain[3] & termios.ECHO and plain[3] & termios.ICANON
    assert quiet == [*plain[:3], plain[3] & ~termios.ECHO]
    master, slave = os.openpty()
    cfmakeraw(slave)
    assert raw == termios.tcgetattr(slave)[:4]
    given = termios.tcgetattr(slave)
    given[3] |= termios.ECHO
    own = eval(starter.run(command, pty=Pty(termios=given), capture_output=True).stdout)
    assert own == given[:4]
    os.close(master)
    os.close(slave)


def test_failures_leave_nothing(starter: Any) -> None:
    starter.run(["true"])
    gc.collect()  # what other tests have left may hold descriptors
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        starter.run(["/none"], pty=True)
    with pytest.raises(ValueError, match="preexec_fn"):
        starter.Popen(["true"], pty=True, preexec_fn=lambda: None)
    assert os.listdir("/proc/self/fd") == before


def test_posix_spawn_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "posix")
    with pytest.raises(OSError, match="controlling_terminal") as caught:
        errand.Popen(["true"], pty=True)
    assert caught.value.errno == errno.ENOTSUP
    errand_boy.stop()


def test_no_terminal_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_none(path: Any, *args: Any) -> int:
        if path == "/dev/ptmx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args)

    monkeypatch.setattr(os, "open", open_none)
    with pytest.raises(OSError, match=r"kernel\.pty\.max"):
        errand.Popen(["true"], pty=True)


# -- the caller's side --


def test_conversation(starter: Any) -> None:
    with starter.Popen(["sh", "-c", "read a; echo got $a; exit 3"], pty=True) as process:
        assert process.terminal.write(b"text\n") == 5
        assert process.terminal.read() == b"text\r\ngot text\r\n"
        assert process.terminal.read() == process.terminal.read(1) == b""
        assert process.wait(PATIENCE) == 3


def test_text(starter: Any) -> None:
    code = "print(input()); print('\\u20ac' * 3)"
    with starter.Popen(
        [sys.executable, "-c", code], pty=True, encoding="utf-8", env={"PYTHONUTF8": "1"}
    ) as process:
        process.terminal.echo = False
        process.terminal.write("h\u00e9\n")
        # A character that is read byte by byte is one all the same.
        got = ""
        while part := process.terminal.read(1):
            got += part
        assert got.endswith("h\u00e9\n\u20ac\u20ac\u20ac\n")


def test_winsize(starter: Any) -> None:
    script = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
print("ready", flush=True)
signal.sigwait([signal.SIGWINCH])
print(*os.get_terminal_size(0), flush=True)
"""
    with starter.Popen([sys.executable, "-c", script], pty=Pty(30, 90, xpixel=5)) as process:
        terminal = process.terminal
        assert terminal.winsize == (30, 90)
        assert terminal.pixels == (5, 0)
        read_until(terminal, b"ready")
        terminal.winsize = 40, 120
        assert read_until(terminal, b"120 40")
        assert (terminal.winsize, terminal.pixels) == ((40, 120), (5, 0))
        terminal.winsize = 1, 2, 3, 4
        assert (terminal.winsize, terminal.pixels) == ((1, 2), (3, 4))
        with pytest.raises(ValueError, match="rows"):
            terminal.winsize = 1, 70000


def test_echo(starter: Any) -> None:
    with starter.Popen(["sh", "-c", "stty -echo; echo ready; cat"], pty=True) as process:
        read_until(process.terminal, b"ready")
        assert not process.terminal.echo
        process.terminal.write(b"once\n")
        assert read_until(process.terminal, b"once\r\n").count(b"once") == 1
        process.terminal.echo = True
        assert process.terminal.echo
        process.terminal.write(b"twice\n")
        assert read_until(process.terminal, b"twice\r\ntwice\r\n")
        process.terminal.eof()
        assert process.terminal.read() == b""


def test_intr_and_foreground_group(starter: Any) -> None:
    script = "trap 'echo got it; exit 5' INT; echo ready; while :; do sleep 0.01; done"
    with starter.Popen(["sh", "-c", script], pty=True) as process:
        read_until(process.terminal, b"ready")
        assert process.terminal.foreground_pgid == process.pid
        process.terminal.intr()
        assert read_until(process.terminal, b"got it")
        assert process.wait(PATIENCE) == 5


def test_suspend_by_a_shell_with_job_control(starter: Any) -> None:
    with starter.Popen(
        ["bash", "--norc", "--noprofile", "-i"], pty=True, env={"PS1": "> ", "PATH": os.defpath}
    ) as process:
        terminal = process.terminal
        read_until(terminal, b"> ")
        terminal.write(b"sh -c 'echo re''ady; exec sleep 1000'\n")
        read_until(terminal, b"ready\r\n")
        assert terminal.foreground_pgid != process.pid
        terminal.write(b"\x1a")
        assert read_until(terminal, b"> ").count(b"Stopped") == 1
        until(lambda: terminal.foreground_pgid == process.pid)
        terminal.write(b"fg\n")
        until(lambda: terminal.foreground_pgid != process.pid)
        terminal.intr()
        terminal.write(b"exit 7\n")
        terminal.read()
        assert process.wait(PATIENCE) == 7


def test_close_hangs_up(starter: Any) -> None:
    script = "trap 'exit 9' HUP; echo ready; while :; do sleep 0.01; done"
    process = starter.Popen(["sh", "-c", script], pty=True)
    read_until(process.terminal, b"ready")
    process.terminal.close()
    process.terminal.close()
    assert process.terminal.closed
    assert process.wait(PATIENCE) == 9
    with pytest.raises(ValueError, match="closed"):
        process.terminal.fileno()


def test_leaving_the_block_hangs_up(starter: Any) -> None:
    with starter.Popen(["sleep", "1000"], pty=True) as process:
        pass
    assert process.returncode == -signal.SIGHUP


@pytest.mark.slow
def test_end_of_the_terminal_is_not_its_loss() -> None:
    """A command that ends at the end of its input gets no SIGHUP meanwhile."""
    for _ in range(200):
        with errand.Popen(["cat"], pty=True) as process:
            process.terminal.eof()
            process.terminal.read()
        assert process.returncode == 0


def test_it_is_a_file() -> None:
    with errand.Popen(["cat"], pty=True) as process, process.terminal as terminal:
        assert terminal.isatty()
        assert f"fd={terminal.fileno()}" in repr(terminal)
        with pytest.raises(TypeError):
            terminal.write("text")
    assert "closed" in repr(terminal)


def test_background_process_that_keeps_the_terminal(starter: Any) -> None:
    """Reads go on until that process ends, as with a pipe; the command's end is known before."""
    script = "trap '' HUP; { echo $$; read x; } <$1 & exit 4"
    read, write = os.pipe()
    with starter.Popen(
        ["sh", "-c", script, "sh", f"/dev/fd/{read}"], pty=True, pass_fds=[read]
    ) as process:
        os.close(read)
        read_until(process.terminal, b"\n")
        assert process.wait(PATIENCE) == 4
        select = importlib.import_module("select")
        assert not select.select([process.terminal.fileno()], [], [], 0)[0]
        os.close(write)
        assert process.terminal.read() == b""


def test_background_process_gets_the_hang_up(starter: Any) -> None:
    with starter.Popen(["sh", "-c", "sleep 1000 & exit 4"], pty=True) as process:
        assert process.terminal.read() == b""
        assert process.wait(PATIENCE) == 4


@pytest.mark.slow
def test_terminal_that_the_command_has_left() -> None:
    """It closes the terminal, and goes on."""
    script = "exec </dev/null >/dev/null 2>&1; sleep 0.2; exit 6"
    with errand.Popen(["sh", "-c", script], pty=True) as process:
        assert process.terminal.read() == b""
        assert process.wait(PATIENCE) == 6


# -- communicate and run --


def test_run(starter: Any) -> None:
    done = starter.run(
        ["sh", "-c", "cat; echo error >&2; exit 3"], pty=True, capture_output=True, input=b"a\nb"
    )
    assert done.returncode == 3
    assert done.stderr is None
    assert done.stdout.endswith(b"error\r\n")
    assert done.stdout.count(b"a\r\n") == 2


def test_run_without_input_ends_it(starter: Any) -> None:
    assert starter.run(["cat"], pty=True, text=True, timeout=PATIENCE).stdout == ""


def test_check_output_is_what_is_on_the_terminal(starter: Any) -> None:
    assert starter.check_output("echo a; echo b >&2", shell=True, pty=True) == b"a\r\nb\r\n"
    with pytest.raises(stdlib.CalledProcessError) as caught:
        starter.check_output(["sh", "-c", "echo a; false"], pty=True)
    assert caught.value.output == b"a\r\n"


@pytest.mark.slow
def test_run_timeout(starter: Any) -> None:
    def output(timeout: float) -> Any:
        with pytest.raises(stdlib.TimeoutExpired) as caught:
            starter.run(["sh", "-c", "echo a; sleep 1000"], pty=True, timeout=timeout)
        return caught.value.output

    assert with_enough_time(output) == b"a\r\n"


@pytest.mark.slow
def test_communicate_goes_on_after_a_timeout(starter: Any) -> None:
    script = "cat; read x </dev/fd/$1; echo end"
    read, write = os.pipe()
    with starter.Popen(
        ["sh", "-c", script, "sh", str(read)], pty=Pty(echo=False), pass_fds=[read]
    ) as process:
        os.close(read)
        with pytest.raises(stdlib.TimeoutExpired):
            process.communicate(b"text\n", timeout=0.2)
        with pytest.raises(ValueError, match="Cannot send input"):
            process.communicate(b"text")
        os.close(write)
        assert process.communicate(timeout=PATIENCE)[0] == b"text\r\nend\r\n"


# -- much --

MUCH = 100_000_000


@pytest.mark.slow
def test_100_megabytes(starter: Any) -> None:
    script = f"head -c {MUCH} /dev/zero | tr '\\0' x"
    total = 0
    with starter.Popen(["sh", "-c", script], pty=Pty(raw=True)) as process:
        while data := process.terminal.read(1 << 16):
            assert data.count(b"x") == len(data)
            total += len(data)
        assert process.wait(PATIENCE) == 0
    assert total == MUCH


def test_slow_reader_holds_the_command_up_and_loses_nothing(starter: Any) -> None:
    script = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i + 1)); done; echo end >$1"
    read, write = os.pipe()
    with starter.Popen(
        ["sh", "-c", script, "sh", f"/dev/fd/{write}"], pty=True, pass_fds=[write]
    ) as process:
        os.close(write)
        waiting = psutil.Process(process.pid)
        until(lambda: waiting.status() == psutil.STATUS_SLEEPING)  # no other thing makes it wait
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 100)
        text = process.terminal.read()
    os.close(read)
    assert text == b"".join(b"%d\r\n" % i for i in range(20000))


@pytest.mark.slow
def test_writer_waits_for_a_command_that_reads_late() -> None:
    """The input is more than the kernel buffers, and the command begins to read on request."""
    lines = [b"%06d\n" % i for i in range(50_000)]
    script = "kill -STOP $$; exec md5sum"
    with errand.Popen(["sh", "-c", script], pty=Pty(echo=False)) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        threading.Timer(0.3, os.kill, (process.pid, signal.SIGCONT)).start()
        process.terminal.write(b"".join(lines))
        process.terminal.eof()
        hashlib = importlib.import_module("hashlib")
        expected = hashlib.md5(b"".join(lines)).hexdigest().encode()
        assert process.terminal.read().split()[0] == expected


@pytest.mark.slow
def test_many_terminals_at_once(starter: Any, tmp_path: Path) -> None:
    count = 500
    resource = importlib.import_module("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("needs 4,096 descriptors (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    before = len(os.listdir("/proc/self/fd"))
    try:
        with contextlib.ExitStack() as stack:
            if starter is not errand_boy:
                # A daemon starts one more helper for so many, and either may stay.
                own = stack.enter_context(started_daemon(tmp_path))
                starter = stack.enter_context(contextlib.closing(errand_boy.connect(own.path)))
            processes = [
                stack.enter_context(starter.Popen(["cat"], pty=Pty(24, n + 1)))
                for n in range(count)
            ]
            for n, process in enumerate(processes):
                process.terminal.write(b"%d\n" % n)
            for n, process in enumerate(processes):
                assert read_until(process.terminal, b"\r\n%d\r\n" % n)
                assert process.terminal.winsize == (24, n + 1)
            for process in processes:
                process.terminal.eof()
        assert {process.returncode for process in processes} <= {0, -signal.SIGHUP}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if starter is errand_boy:
        assert len(os.listdir("/proc/self/fd")) <= before + 5


# -- ends of other processes --


def test_killed_helper_leaves_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It started a child of this process, which goes on."""
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper")
    with errand.Popen(["cat"], pty=True) as process:
        helper = errand_boy.helper_pid()
        assert helper is not None
        os.kill(helper, signal.SIGKILL)
        process.terminal.write(b"text\n")
        assert read_until(process.terminal, b"text\r\ntext\r\n")
    assert process.returncode == -signal.SIGHUP
    errand_boy.stop()


def test_killed_helper_of_a_daemon_leaves_the_terminal(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        client: Any = errand_boy.connect(daemon.path)
        process = client.Popen(["cat"], pty=True)
        for helper in daemon.helpers():
            os.kill(helper, signal.SIGKILL)
        with pytest.raises(errand_boy.HelperDiedError):
            process.wait()
        process.terminal.write(b"text\n")
        assert read_until(process.terminal, b"text\r\ntext\r\n")
        process.terminal.close()
        until(lambda: not psutil.pid_exists(process.pid), "the end after the hang-up")
        client.close()


def test_killed_daemon_leaves_the_terminal(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        client: Any = errand_boy.connect(daemon.path)
        with client.Popen(["cat"], pty=True) as process:
            daemon.stop(signal.SIGKILL)
            process.terminal.write(b"text\n")
            assert read_until(process.terminal, b"text\r\ntext\r\n")
            process.terminal.eof()
            assert process.terminal.read() == b""
            assert process.wait(PATIENCE) == 0
        client.close()


@pytest.mark.parametrize("way", ["direct", "helper", "daemon"])
def test_killed_client_hangs_up(way: str, daemon: Daemon) -> None:
    script = """
        path = sys.argv[2]
        source = subprocess.connect(path) if path else subprocess
        process = source.Popen(["sleep", "1000"], pty=True)
        print(process.pid, flush=True)
        sys.stdin.read()
    """
    implementation = "errand_boy-helper" if way == "helper" else "errand_boy"
    path = daemon.path if way == "daemon" else ""
    with started_script(script, implementation, [path]) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        assert psutil.pid_exists(pid)
        client.kill()
        until(lambda: has_ended(pid), "the end of the command")


@pytest.mark.parametrize("way", ["here", "daemon"])
def test_killed_client_with_asyncio_hangs_up(way: str, daemon: Daemon) -> None:
    script = """
        import asyncio
        from errand_boy import asyncio as it
        async def main():
            source = it.connect(sys.argv[2]) if sys.argv[2] else it
            process = await source.create_subprocess_exec("sleep", "1000", pty=True)
            print(process.pid, flush=True)
            await asyncio.Event().wait()
        asyncio.run(main())
    """
    with started_script(script, args=[daemon.path if way == "daemon" else ""]) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        assert psutil.pid_exists(pid)
        client.kill()
        until(lambda: has_ended(pid), "the end of the command")


# Two processes in the terminal, until the test writes to the FIFO $2.
HOLDS = "sleep 1000 & echo $$ $! >$1.new; mv $1.new $1; echo shown; read x <$2; echo $x; exit 3"


@pytest.fixture
def held(tmp_path: Path) -> tuple[list[str], Path, Path]:
    """A command, the file with its pids that it writes when it runs, and a FIFO that it reads."""
    pids, fifo = tmp_path / "pids", tmp_path / "fifo"
    os.mkfifo(fifo)
    return ["sh", "-c", HOLDS, "sh", str(pids), str(fifo)], pids, fifo


def pids_in(path: Path) -> list[int]:
    until(path.exists, "the start of the command")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.parametrize("way", ["private", "daemon"])
def test_killed_helper_of_map_leaves_nothing(
    way: str, held: tuple[list[str], Path, Path], tmp_path: Path
) -> None:
    command, path, _ = held
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(started_daemon(tmp_path)) if way == "daemon" else None
        source: Any = errand_boy if daemon is None else errand_boy.connect(daemon.path)
        before = os.listdir("/proc/self/fd")
        results = source.map([command, ["tty"]], pty=True, max_workers=1)
        with ThreadPoolExecutor(1) as executor:
            first = executor.submit(next, results)
            pids = pids_in(path)
            for helper in [owner_pid()] if daemon is None else daemon.helpers():
                os.kill(helper, signal.SIGKILL)
            assert isinstance(first.result(PATIENCE).error, errand_boy.HelperDiedError)
        until(lambda: all(map(has_ended, pids)), "the end of what was in the terminal")
        (second,) = results  # another helper's
        assert second.stdout.startswith(b"/dev/pts/")
        if daemon is None:
            errand_boy.stop()
        else:
            source.close()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def owner_pid() -> int:
    assert _helper.runner.current is not None
    return _helper.runner.current.pid


def test_killed_daemon_leaves_what_map_runs(
    held: tuple[list[str], Path, Path], tmp_path: Path
) -> None:
    command, path, fifo = held
    with started_daemon(tmp_path) as daemon:
        client: Any = errand_boy.connect(daemon.path)
        results = client.map([command], pty=True)
        with ThreadPoolExecutor(1) as executor:
            first = executor.submit(next, results)
            pids = pids_in(path)
            daemon.stop(signal.SIGKILL)
            fifo.write_text("told\n")
            result = first.result(PATIENCE)
        assert (result.stdout, result.returncode) == (b"shown\r\ntold\r\n", 3)
        until(lambda: all(map(has_ended, pids)), "the end of what was in the terminal")
        client.close()


@pytest.mark.parametrize("way", ["private", "daemon"])
def test_killed_client_of_map_leaves_nothing(
    way: str, held: tuple[list[str], Path, Path], daemon: Daemon
) -> None:
    command, path, _ = held
    script = """
        path, *command = sys.argv[2:]
        source = subprocess.connect(path) if path else subprocess
        list(source.map([command], pty=True))
    """
    with started_script(script, args=[daemon.path if way == "daemon" else "", *command]) as client:
        pids = pids_in(path)
        client.kill()
        until(lambda: all(map(has_ended, pids)), "the end of what was in the terminal")


# -- frameworks and map --

FRAMEWORK = """
    def tick():
        while True:
            ticks.append(1)
            sleep(0.001)
    ticks = []
    spawn(tick)
    done = it.run(["sh", "-c", "sleep 0.3; cat"], pty=True, capture_output=True, input="a\\n",
                  text=True)
    with it.Popen(["sh", "-c", "sleep 0.3; read x; echo got $x"], pty=(5, 6), text=True) as process:
        process.terminal.echo = False
        size = process.terminal.winsize
        process.terminal.write("b\\n")
        text = process.terminal.read()
    report([done.stdout, size, text, process.returncode, len(ticks) > 10])
"""
GREENLETS = {
    "gevent": "import errand_boy.gevent as it; from gevent import sleep, spawn",
    "gevent, patched": (
        "from gevent import monkey; monkey.patch_all(); import errand_boy.gevent as it; "
        "from gevent import sleep, spawn"
    ),
    "eventlet": "import errand_boy.eventlet as it; from eventlet import sleep, spawn",
    "eventlet, patched": (
        "import eventlet; eventlet.monkey_patch(); import errand_boy.eventlet as it; "
        "from eventlet import sleep, spawn"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GREENLETS))
def test_greenlets_go_on(name: str) -> None:
    pytest.importorskip(name.partition(",")[0])
    report = run_script("\n    " + GREENLETS[name] + FRAMEWORK)
    assert report[0].endswith("a\n")
    assert report[1:] == [[5, 6], "got b\n", 0, True]


ASYNCIO = """
    import asyncio, errand_boy.asyncio as it
    unhandled = []
    async def main(it):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: unhandled.append(repr(context)))
        done = await it.run(["cat"], pty=True, capture_output=True, input=b"a\\nb")
        process = await it.create_subprocess_exec("sh", "-c", "stty size; read x; echo got $x",
                                                  pty=(5, 6))
        first = await process.stdout.readline()
        process.terminal.echo = False
        process.stdin.write(b"c\\n")
        rest = await process.stdout.read()
        returncode = await process.wait()
        plain = await it.run(["sh", "-c", "cat; echo e >&2"], pty=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            await it.run(["sleep", "1000"], pty=True, timeout=0.1)
        except subprocess.TimeoutExpired:
            late = True
        many = await asyncio.gather(*(it.run(["stty", "size"], pty=(n, n)) for n in range(1, 30)))
        sizes = [many.stdout.split()[0].decode() for many in many]
        return [done.stdout.decode(), first.decode(), rest.decode(), returncode,
                plain.stdout.decode(), plain.stderr.decode(), late, sizes, unhandled]
    before = os.listdir("/proc/self/fd")
    path = sys.argv[2]
    source = it.connect(path) if path else it
    if sys.argv[3] == "uvloop":
        import uvloop
        value = uvloop.run(main(source))
    else:
        value = asyncio.run(main(source))
        if not path:
            assert os.listdir("/proc/self/fd") == before
    report(value)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "daemon"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_asyncio_streams(loop: str, way: str, daemon: Daemon) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    done, first, rest, *others = run_script(
        ASYNCIO, args=[daemon.path if way == "daemon" else "", loop]
    )
    assert done.count("a\r\n") == 2
    assert done.endswith("b")
    assert first == "5 6\r\n"
    assert rest.endswith("got c\r\n")
    sizes = [str(n) for n in range(1, 30)]
    assert others == [0, "", "e\r\n", True, sizes, []]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["private", "daemon"])
def test_map(by: str, daemon: Daemon) -> None:
    source: Any = errand_boy.connect(daemon.path) if by == "daemon" else errand_boy
    script = "tty; stty size; stty -a | grep -o -e -echo\\ ; cat; echo error >&2; exit 3"
    commands = [["sh", "-c", script], {"args": ["cat"], "input": b"a\nb"}, ["/none"]]
    first, second, third = source.map(commands, pty=Pty(7, 9, echo=False))
    assert first.stdout.splitlines()[1:] == [b"7 9", b"-echo ", b"error"]
    assert (first.stderr, first.returncode) == (b"", 3)
    assert second.stdout == b"a\r\nb"
    assert isinstance(third.error, FileNotFoundError)
    (late,) = source.map([["sh", "-c", "trap '' HUP; sleep 1000"]], pty=True, timeout=0.2)
    assert isinstance(late.error, stdlib.TimeoutExpired)
    (much,) = source.map([["head", "-c", "5000000", "/dev/zero"]], pty=Pty(raw=True))
    assert much.stdout == bytes(5_000_000)
    with pytest.raises(ValueError, match="termios"):
        list(source.map([["true"]], pty=Pty(termios=[])))
    errand_boy.stop()


# -- parts --


def test_wait_for_tells_reading_from_writing() -> None:
    master, slave = terminals.open_pair(Pty(raw=True))
    select = importlib.import_module("select")
    assert terminals.wait_for(select, [master], [master], 0) == ([], [master])
    os.write(slave, b"x")
    assert terminals.wait_for(select, [master], [], PATIENCE) == ([master], [])
    os.close(slave)
    assert os.read(master, 10) == b"x"
    assert terminals.wait_for(select, [master], [], PATIENCE) == ([master], [])
    assert terminals.read_some(master, 10) == b""
    os.close(master)


def test_make_raw_is_cfmakeraw() -> None:
    master, slave = terminals.open_pair(Pty())
    attributes = termios.tcgetattr(slave)
    terminals.make_raw(attributes)
    cfmakeraw(slave)
    assert attributes == termios.tcgetattr(slave)
    os.close(master)
    os.close(slave)
