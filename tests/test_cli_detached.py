"""Jobs on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import shlex
import signal
import subprocess as stdlib
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, find_program, has_ended, script_environment, until
from daemon import Daemon, started_daemon
from jobs import await_output, kill_keeper

import errand_boy
from errand_boy._cli.attach import DetachKeys
from errand_boy._jobs.modes import Modes, Past
from errand_boy.terminal import wait_for

errand: Any = errand_boy

COMMAND = [sys.executable, "-m", "errand_boy"]


def with_jobs(directory: Path) -> list[str]:
    places = [f"{directory}/state", f"{directory}/runtime"]
    return ["--job-state", places[0], "--job-runtime", places[1]]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("daemon")
    with started_daemon(directory, *with_jobs(directory)) as it:
        yield it


@pytest.fixture(autouse=True)
def its_socket(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ERRAND_BOY_SOCKET", daemon.path)
    yield
    client = errand.connect(daemon.path)
    for job in client.jobs(all=True):
        if job.state in ("running", "starting"):
            job.stop(stop=[signal.SIGKILL])
        job.remove()
    client.close()


def cli(*arguments: str, **options: Any) -> Any:
    options = {"stdin": stdlib.DEVNULL, "timeout": PATIENCE, "env": script_environment(), **options}
    if "input" in options:
        del options["stdin"]
    return stdlib.run([*COMMAND, *arguments], capture_output=True, text=True, **options)


def detach(*arguments: str, script: str, **options: Any) -> str:
    done = cli("run", "--detach", *arguments, "--", "sh", "-c", script, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    name, number = done.stdout.split()
    assert number.isdecimal()
    return str(name)


# -- without a terminal --


@pytest.mark.slow
def test_start_logs_wait_and_remove() -> None:
    name = detach("--name", "build", script="echo out; echo error >&2; exit 3")
    assert name == "build"
    done = cli("logs", "--follow", name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "error\n")
    assert cli("wait", name).returncode == 3
    assert cli("ps", "--quiet").stdout == ""
    assert cli("ps", "--all", "--quiet").stdout == "build\n"
    (job,) = json.loads(cli("ps", "--all", "--json").stdout)
    assert (job["name"], job["state"], job["returncode"], job["cause"]) == (
        "build",
        "ended",
        3,
        "exit",
    )
    assert job["args"][0] == "sh"
    head, row = cli("ps", "-a").stdout.splitlines()
    assert head.split() == ["NAME", "ID", "STATE", "STARTED", "TIME", "COMMAND"]
    assert re.match(r"build +\d+ +exit 3 +\d{4}-", row)
    assert cli("rm", name).returncode == 0
    assert cli("ps", "--all", "--quiet").stdout == ""
    done = cli("logs", name)
    assert done.returncode == 125
    assert done.stderr.startswith("errand-boy: ") and "build" in done.stderr


@pytest.mark.slow
def test_list_does_nothing_to_a_terminal() -> None:
    detach(script="exit 0 # \x1b]0;title\x07\n\udcff")
    listed = cli("ps", "--all").stdout
    assert listed.count("\n") == 2
    assert "\\x1b]0;title\\x07\\n\\udcff" in listed
    with errand.Popen(
        [*COMMAND, "ps", "--all"], pty=(20, 50), env=script_environment(), text=True
    ) as it:
        lines = it.terminal.read().splitlines()
    assert max(map(len, lines)) == 50


@pytest.mark.slow
def test_whose_jobs() -> None:
    name = detach(script="sleep 1000")
    own = str(os.getuid())
    head, row = cli("ps", "--user", "all").stdout.splitlines()
    assert "USER" in head.split()
    assert row.split()[2] == pwd.getpwuid(os.getuid()).pw_name
    assert cli("ps", "--quiet", "--user", own).stdout == f"{name}\n"
    assert cli("ps", "--quiet", "--user", "nobody").stdout == ""
    done = cli("stop", "--user", "nobody", name)
    assert done.returncode == 125
    assert name in done.stderr
    assert cli("stop", "--user", own, name).returncode == 0
    assert cli("ps", "--user", "nobody-of-this-name").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (["/none"], 127, "/none: No such file or directory"),
        (["/etc/passwd"], 126, "/etc/passwd: Permission denied"),
        (["--cgroup", "/none", "true"], 126, "/none"),
    ],
)
def test_start_that_fails(argv: list[str], status: int, text: str) -> None:
    done = cli("run", "--detach", *argv)
    assert done.returncode == status, done
    assert text in done.stderr
    assert done.stdout == ""
    assert cli("ps", "--all", "--quiet").stdout == ""


@pytest.mark.slow
def test_no_daemon(tmp_path: Path) -> None:
    """The command is not started, because nothing would watch over it."""
    made = tmp_path / "made"
    for arguments in ["run", "--detach", "touch", str(made)], ["ps"], ["wait", "x"]:
        done = cli(arguments[0], "--socket", str(tmp_path / "none"), *arguments[1:])
        assert done.returncode == 125
        assert str(tmp_path / "none") in done.stderr
    assert not made.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--detach", "--timeout", "1", "true"], "--timeout"),
        (["run", "--detach", "--record", "x", "true"], "--record"),
        (["run", "--name", "x", "true"], "--name needs --detach"),
        (["run", "--log-size", "1K", "true"], "--log-size needs --detach"),
        (["logs", "--since", "yesterday", "x"], "--since"),
    ],
)
def test_what_makes_no_sense(arguments: list[str], text: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert text in done.stderr


@pytest.mark.slow
def test_logs_of_a_time_and_of_the_last_lines() -> None:
    name = detach(script="echo one; echo two; echo three; printf four")
    assert cli("wait", name).returncode == 0
    assert cli("logs", "--tail", "2", name).stdout == "three\nfour"
    assert cli("logs", "--since", "1h", name).stdout == "one\ntwo\nthree\nfour"
    assert cli("logs", "--since", "2100-01-01", name).stdout == ""
    lines = cli("logs", "--timestamps", name).stdout.splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\dT[\d:.]{12}[+-]\d\d:\d\d ", "", line) for line in lines] == [
        "one",
        "two",
        "three",
        "four",
    ]


@pytest.mark.slow
def test_logs_say_what_is_lost() -> None:
    name = detach("--ring", "4K", script="seq 10000")
    assert cli("wait", name).returncode == 0
    done = cli("logs", name)
    lost = re.fullmatch(
        r"errand-boy: (\d+) bytes of standard output are not kept any more\n", done.stderr
    )
    assert lost is not None
    assert int(lost[1]) + len(done.stdout) == len("".join(f"{n}\n" for n in range(1, 10001)))
    assert done.stdout.endswith("\n9999\n10000\n")


@pytest.mark.slow
def test_logs_that_nobody_reads() -> None:
    name = detach("--ring", "1M", script="seq 100000")
    assert cli("wait", name).returncode == 0
    command = [*COMMAND, "logs", name]
    with stdlib.Popen(command, stdout=stdlib.PIPE, stderr=stdlib.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == 128 + signal.SIGPIPE


@pytest.mark.slow
def test_wait_for_several_and_for_too_long() -> None:
    first = detach(script="exit 2")
    second = detach(script="kill -TERM $$")
    third = detach(script="sleep 1000")
    assert cli("wait", first, second).returncode == 128 + signal.SIGTERM
    done = cli("wait", "--timeout", "100ms", first, third)
    assert done.returncode == 124
    assert f"{third} has not ended" in done.stderr


@pytest.mark.slow
def test_stop() -> None:
    ready = "echo ready; while :; do sleep 0.01; done"
    usual = detach(script=f"trap 'echo got TERM; exit 4' TERM; {ready}")
    own = detach("--stop", "USR1:100,KILL", script=f"trap 'exit 5' USR1; {ready}")
    other = detach(script=f"trap 'exit 6' USR2; {ready}")
    for name in usual, own, other:
        until(lambda name=name: cli("logs", name).stdout == "ready\n")  # type: ignore[misc]
    assert cli("stop", usual, own).returncode == 0
    assert cli("stop", "--stop", "USR2:2m,KILL", other).returncode == 0
    assert [cli("wait", name).returncode for name in (usual, own, other)] == [4, 5, 6]


@pytest.mark.slow
def test_name_that_is_unknown_among_others() -> None:
    """The others get their turn, and the exit status is the worst."""
    first, last = detach(script="echo 1; exit 2"), detach(script="echo 2; exit 3")
    for name in first, last:
        assert cli("wait", name).returncode in (2, 3)
    live = detach(script="sleep 1000")
    for command, status, output in (
        ("logs", 125, "1\n2\n"),
        ("wait", 125, ""),
        ("rm", 125, ""),
    ):
        done = cli(command, first, "nope", last)
        assert (done.returncode, done.stdout) == (status, output), done
        assert done.stderr.count("\n") == 1
        assert "nope" in done.stderr
    assert cli("ps", "--all", "--quiet").stdout == f"{live}\n"
    other = detach(script="sleep 1000")
    assert cli("stop", live, "nope", other).returncode == 125
    assert cli("ps", "--quiet").stdout == ""
    assert cli("wait", live, other).returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_wait_has_the_highest_status() -> None:
    assert cli("wait", detach(script="exit 7"), detach(script="exit 0")).returncode == 7


def test_interactive_shell_is_stopped_as_by_its_terminal() -> None:
    done = cli("run", "--detach", "--pty", "--", "env", "PS1=ready>", "bash", "--norc", "-i")
    name = done.stdout.split()[0]
    job = errand.connect().job(name)
    await_output(job, b"ready>")
    assert cli("stop", name).returncode == 0
    assert cli("wait", name).returncode == 128 + signal.SIGHUP


@pytest.mark.slow
def test_stop_that_takes_long_says_what_it_waits_for() -> None:
    name = detach(script="trap '' TERM; echo ready; sleep 1000")
    until(lambda: cli("logs", name).stdout == "ready\n")
    command = [*COMMAND, "stop", "--stop", "TERM:1000,KILL", name]
    with errand.Popen(command, pty=True, env=script_environment(), text=True) as it:
        text = ""
        while "\n" not in text:
            text += it.terminal.read(1000)
        assert f"errand-boy: waiting for {name} to end" in text
        errand.connect().job(name).stop(stop=signal.SIGKILL)
        assert it.wait(PATIENCE) == 0


@pytest.mark.slow
def test_remove_what_runs() -> None:
    name = detach(script="sleep 1000")
    done = cli("rm", name)
    assert done.returncode == 125
    assert "stop it first" in done.stderr
    assert cli("ps", "-q").stdout == f"{name}\n"


def test_log_and_notification(tmp_path: Path) -> None:
    log, told = tmp_path / "log", tmp_path / "told"
    notify = f"echo $ERRAND_BOY_NAME $ERRAND_BOY_STATUS $ERRAND_BOY_CAUSE >{told}.new; "
    notify += f"mv {told}.new {told}"
    name = detach("--log", str(log), "--notify", notify, script="echo out; exit 3")
    until(told.exists, "the notification")
    assert told.read_text() == f"{name} 3 exit\n"
    assert log.read_text() == "out\n"


def test_command_that_has_lost_its_keeper(daemon: Daemon) -> None:
    name = detach("--tree", "process", script="echo begin; exec sleep 1000")
    job = errand_boy.connect(daemon.path).job(name)
    await_output(job, b"begin\n")
    kill_keeper(job)
    until(lambda: job.status()["state"] == "lost")
    told = f"errand-boy: job {job.id} is lost: its keeper was killed, or could not write its "
    told += "journal"
    left = f"{told}; its command still runs as process {job.pid}\n"
    assert f"lost: killed, but process {job.pid} runs" in cli("ps", "--all").stdout
    assert cli("ps").stdout.count("\n") == 1
    done = cli("logs", name)
    assert (done.returncode, done.stdout, done.stderr) == (125, "begin\n", left)
    done = cli("wait", name)
    assert (done.returncode, done.stderr) == (125, left)
    done = cli("rm", name)
    assert done.returncode == 125
    assert "stop it first" in done.stderr
    done = cli("stop", name)
    assert (done.returncode, done.stderr) == (125, f"{told}\n")
    assert job.pid is not None
    assert has_ended(job.pid)
    assert cli("rm", name).returncode == 0


@pytest.mark.slow
def test_attach_to_the_standard_streams() -> None:
    name = detach("-i", script="cat; echo end >&2; exit 3")
    done = cli("attach", name, input="text\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "text\n", "end\n")
    done = cli("attach", name)
    assert done.returncode == 125
    assert f"{name} is over" in done.stderr


@pytest.mark.slow
def test_signal_leaves_the_job() -> None:
    name = detach(script="echo ready; read x; sleep 1000")
    with stdlib.Popen([*COMMAND, "attach", name], stdout=stdlib.PIPE, stderr=stdlib.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.terminate()
        _, errors = client.communicate(timeout=PATIENCE)
        assert client.returncode == 128 + signal.SIGTERM
        assert errors.decode() == f"errand-boy: detached from {name}\n"
    assert cli("ps", "-q").stdout == f"{name}\n"


def test_job_that_reads_nothing(tmp_path: Path) -> None:
    """A user who types more than there is room for still sees the output, and can detach."""
    name = detach("-i", script="yes | head -c 2000000; echo last; sleep 1000")
    typed = tmp_path / "typed"
    typed.write_bytes(bytes(1 << 20))
    with (
        typed.open("rb") as stdin,
        stdlib.Popen(
            [*COMMAND, "attach", name], stdin=stdin, stdout=stdlib.PIPE, stderr=stdlib.PIPE
        ) as client,
    ):
        assert client.stdout is not None
        assert any(line == b"last\n" for line in client.stdout)
        # More than what the pipe and the keeper take.
        until(lambda: os.lseek(stdin.fileno(), 0, os.SEEK_CUR) > 150_000)
        client.terminate()
        _, errors = client.communicate(timeout=PATIENCE)
        assert client.returncode == 128 + signal.SIGTERM
        assert re.search(rb"\d+ bytes of input may not have reached", errors)


# -- with one --


@pytest.mark.slow
def test_terminal_is_as_large_as_the_one_here_which_is_restored(daemon: Daemon) -> None:
    """The program is left in the middle of a line, with the alternate screen and the mouse on."""
    line = " ".join(COMMAND)
    script = "stty size; printf '\\033[?1049h\\033[?1000hready'; read x; exit $x"
    with errand.Popen(["sh", "-i"], pty=(31, 91), env={**script_environment(), "PS1": "> "}) as it:
        seen = bytearray()

        def see(pattern: bytes) -> None:
            while not re.search(pattern, seen):
                assert wait_for(select, [it.terminal.fileno()], [], PATIENCE)[0], bytes(seen)
                seen.extend(it.terminal.read(1000))

        it.terminal.write(f"{line} run -dt --name it sh -c {shlex.quote(script)}\n".encode())
        see(rb"it \d+\r\n")
        before = termios.tcgetattr(it.terminal.fileno())
        it.terminal.write(f"{line} attach it\n".encode())
        see(rb"\x1b\[\?1000h")
        until(lambda: not termios.tcgetattr(it.terminal.fileno())[3] & termios.ICANON)
        it.terminal.write(b"\x10\x11")
        see(rb"detached from it")
        until(lambda: termios.tcgetattr(it.terminal.fileno())[3] & termios.ICANON)
        assert termios.tcgetattr(it.terminal.fileno()) == before
        after = bytes(seen).partition(b"\x1b[?1000h")[2]
        assert b"\x1b[?1000l" in after and b"\x1b[?1049l" in after
        it.terminal.write(f"{line} attach --detach-keys ctrl-a,d it; echo status $?\n".encode())
        until(lambda: not termios.tcgetattr(it.terminal.fileno())[3] & termios.ICANON)
        it.terminal.write(b"7\r")
        see(rb"status 7")
    assert b"31 91" in cli("logs", "it").stdout.encode()


@pytest.fixture
def screens() -> Any:
    return pytest.importorskip("screen")


def for_vim() -> dict[str, str]:
    return {**script_environment(), "TERM": "linux", "LC_ALL": "C.UTF-8"}


def attached(screens: Any, name: str, size: tuple[int, int], *options: str) -> Any:
    return screens.program([*COMMAND, "attach", *options, name], size)


@pytest.mark.slow
def test_vim_in_two_windows_and_over_an_upgrade(
    screens: Any, daemon: Daemon, tmp_path: Path
) -> None:
    find_program("vim")
    text = tmp_path / "text"
    text.write_text("first\nsecond\n")
    done = cli("run", "-dt", "--name", "vim", "--", *screens.VIM, str(text), env=for_vim())
    assert done.returncode == 0, done
    with attached(screens, "vim", (12, 60)) as one:
        one.has("12x60")
        assert one.lines()[:3] == ["first", "second", "~"]
        with attached(screens, "vim", (20, 50)) as two:
            two.has("12x50")
            one.has("12x50")
            assert two.lines()[:3] == one.lines()[:3] == ["first", "second", "~"]
            two.type("ihello \x1b")
            for screen in one, two:
                screen.until(lambda lines: lines[0] == "hello first")
            two.terminal.winsize = 9, 70
            two.screen.resize(9, 70)
            for screen in one, two:
                screen.has("9x60")
            with attached(screens, "vim", (30, 40), "--read-only") as reader:
                reader.has("9x40")
                assert reader.lines()[0] == "hello first"
                reader.type("dd")
                one.type("x")
                reader.until(lambda lines: lines[:2] == ["hellofirst", "second"])
                reader.type("\x10\x11")
                assert reader.end() == 0
            two.has("9x60")
            two.type("\x10\x11")
            assert two.end() == 0
            assert any("detached from vim" in line for line in two.lines())
        one.has("12x60")
        one.type("\x10\x11")
        assert one.end() == 0
    daemon.process.send_signal(signal.SIGUSR2)
    assert daemon.notify.recv(100).startswith(b"RELOADING=1")
    assert daemon.notify.recv(100) == b"READY=1"
    with attached(screens, "vim", (10, 44)) as again:
        again.has("10x44")
        assert again.lines()[:2] == ["hellofirst", "second"]
        again.type(":wq\r")
        assert again.end() == 0
    assert text.read_text() == "hellofirst\nsecond\n"


def test_screen_after_attach_has_the_last_lines(screens: Any) -> None:
    name = detach("--pty", script="seq 100; printf 'prompt> '; read x; echo got $x; read x")
    with attached(screens, name, (10, 40)) as screen:
        screen.has("prompt>")
        assert screen.lines()[-2:] == ["100", "prompt>"]
        screen.type("on\r")
        screen.has("got on")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.end() == 128 + signal.SIGTERM


@pytest.mark.slow
def test_key_that_is_kept_back(screens: Any) -> None:
    """It is held back only for a while, since it may not begin the detach keys."""
    script = "stty raw -echo; echo ready; dd bs=1 count=1 2>/dev/null | od -An -tx1"
    name = detach("--pty", script=script)
    with attached(screens, name, (10, 40)) as screen:
        screen.has("ready")
        screen.type("\x10")
        screen.has(" 10")
        assert screen.end() == 0


def test_client_that_is_killed_leaves_the_job(screens: Any) -> None:
    name = detach("--pty", script="stty size; read x; stty size; read x; exit 3")
    with attached(screens, name, (10, 40)) as first, attached(screens, name, (20, 30)) as second:
        first.has("24 80")
        second.has("24 80")
        second.process.kill()
        second.process.wait(PATIENCE)
        first.type("\r")
        first.has("10 40")
        first.type("\r")
        assert first.end() == 3


@pytest.mark.slow
def test_daemon_and_keeper_that_are_killed(screens: Any, tmp_path: Path) -> None:
    script = "echo $$ >$1; echo ready; while read x; do echo got $x; done"
    pid = tmp_path / "pid"
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(started_daemon(tmp_path, *with_jobs(tmp_path)))
        where = ["--socket", own.path]
        done = cli("run", *where, "-dt", "--name", "it", "--", "sh", "-c", script, "sh", str(pid))
        assert done.returncode == 0, done
        screen = stack.enter_context(
            screens.program([*COMMAND, "attach", *where, "it"], size=(10, 60))
        )
        screen.has("ready")
        client = errand.connect(own.path)
        keeper = client.job("it").status()["keeper"]
        client.close()
        own.stop(signal.SIGKILL)
        screen.type("one\r")
        screen.has("got one")
        stack.enter_context(started_daemon(tmp_path, *with_jobs(tmp_path)))
        os.kill(keeper, signal.SIGKILL)
        assert screen.end() == 125
        assert any("lost: its keeper was killed" in line for line in screen.lines())
        until(lambda: not psutil.pid_exists(int(pid.read_text())), "the end of the command")
        assert cli("logs", *where, "it").stdout.startswith("ready")
        assert cli("wait", *where, "it").returncode == 125


DRAWS = """
import os, signal, sys
drawn = 0
def draw(*_):
    global drawn
    drawn += 1
    os.write(1, b"\\x1b[2J\\x1b[Hdrawn %d\\r\\n" % drawn)
signal.signal(signal.SIGWINCH, draw)
for line in sys.stdin:
    for _ in range(100):
        os.write(1, b"flood\\r\\n" * 5000)
    open(sys.argv[1], "w").close()
"""


@pytest.mark.slow
def test_screen_is_drawn_anew_for_who_has_missed_some(
    screens: Any, daemon: Daemon, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    arguments = ["run", "-dt", "--name", "draws", "--", sys.executable, "-c", DRAWS, str(done)]
    assert cli(*arguments).returncode == 0
    with attached(screens, "draws", (10, 40)) as screen:
        screen.has("drawn")
        screen.process.send_signal(signal.SIGSTOP)
        job = errand.connect(daemon.path).job("draws")
        with job.attach(window=(10, 40)) as other:  # the first one is stopped
            other.write(b"\r")
            until(done.exists, "the end of the flood")
        screen.process.send_signal(signal.SIGCONT)
        screen.has("flood")
        screen.has("drawn")


@pytest.mark.slow
def test_suspended_client(screens: Any) -> None:
    """It stops without its job, and later shows the job's current screen."""
    find_program("vim")
    done = cli("run", "-dt", "--name", "vim", "--", *screens.VIM, env=for_vim())
    assert done.returncode == 0, done
    with screens.program(["bash", "--norc", "--noprofile", "-i"], (12, 60)) as screen:
        screen.has("prompt>")
        screen.type(" ".join([*COMMAND, "attach", "vim"]) + "\r")
        screen.has("12x60")
        os.kill(screen.terminal.foreground_pgid, signal.SIGTSTP)
        screen.has("Stopped")
        screen.type("clear\r")
        screen.until(lambda lines: not any("12x60" in line for line in lines))
        screen.type("fg\r")
        screen.has("12x60")
        screen.type("\x10\x11")
        screen.has("detached from vim")


# -- parts --


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("^P^Q", b"\x10\x11"),
        ("ctrl-p,ctrl-q", b"\x10\x11"),
        ("CTRL-a,d", b"\x01d"),
        ("^]", b"\x1d"),
        ("none", b""),
    ],
)
def test_keys(text: str, keys: bytes) -> None:
    detach_keys = DetachKeys(text)
    assert detach_keys.take(b"abc") == (b"abc", False)
    if not keys:
        assert detach_keys.take(b"\x10\x11") == (b"\x10\x11", False)
        return
    assert detach_keys.take(b"x" + keys[:1]) == (b"x", len(keys) == 1)
    if len(keys) > 1:
        assert detach_keys.held == keys[:1]
        assert detach_keys.take(b"y") == (keys[:1] + b"y", False)
        assert detach_keys.take(keys[:1]) == (b"", False)
        assert detach_keys.take(keys[1:] + b"rest") == (b"", True)


@pytest.mark.parametrize("text", ["", ",", "^1"])
def test_what_are_no_keys(text: str) -> None:
    with pytest.raises(ValueError, match="detach-keys"):
        DetachKeys(text)


def test_modes() -> None:
    whole = b"\x1b[?1049h\x1b[?1;1000hx\x1b[?25l\x1b=\x1b[?2004h\x1b[31mtext\x1b[?2004l\x1b[?2026h"
    modes = Modes()
    for at in range(len(whole)):  # in pieces of one byte
        modes.feed(whole[at : at + 1])
    assert modes.fills_screen
    other = Modes()
    other.feed(modes.restoring())
    assert other.restoring() == modes.restoring()
    assert b"\x1b[?2026h" not in modes.restoring()
    other.feed(modes.undoing())
    assert not other.fills_screen
    undone = Modes()
    undone.feed(other.undoing())
    assert b"h\x1b[?1" not in other.undoing() and b"\x1b[?25l" not in other.undoing()
    modes.feed(b"\x1bc")
    assert modes.restoring() == b""


def test_earlier_output_is_harmless_to_the_terminal() -> None:
    """Earlier output must not make the terminal answer, or move the cursor away."""
    past = Past()
    past.feed(
        b"one\r\n\x1b[1mtwo\x1b[0m\x1b[6n\x1b[c\r\n\x1b]11;?\x07\x1b[5;5Hthree\x07\x1b[?2004h"
    )
    assert past.shown(2) == b"\x1b[1mtwo\x1b[0m\r\nthree\x1b[?2004h"
    past.feed(b"\x1b[?1049hfull")
    assert past.shown(2) == b"\x1b[?2004h\x1b[?1049h"
    assert os.fsdecode(past.shown(2))
