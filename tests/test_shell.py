"""errand_boy.Shell: what stays, how commands end, and what cannot confuse it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import errand_boy
from errand_boy._process import direct
from errand_boy._shell import processes

pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash: apt-get install bash"),
    pytest.mark.skipif(not direct.works(), reason="the system lacks what is needed"),
]


@pytest.fixture(autouse=True)
def helper() -> Iterator[None]:
    yield
    errand_boy.stop()


@pytest.fixture
def shell() -> Iterator[errand_boy.Shell]:
    with errand_boy.Shell() as shell:
        yield shell


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"


def test_state_stays(shell: errand_boy.Shell, tmp_path: Path) -> None:
    result = shell.run("echo out; echo err >&2; cd /; false")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 1)
    assert (result.cwd, result.ended_shell, result.args) == (
        "/",
        False,
        "echo out; echo err >&2; cd /; false",
    )
    assert result.duration >= 0
    assert shell.run("echo $? $PWD").stdout == "1 /\n"
    shell.run(
        "variable='a b'; f() { echo f $1; return 4; }; alias say='echo said'; umask 027; set -f"
    )
    result = shell.run("echo $variable *; umask; f 1")
    assert (result.stdout, result.returncode) == ("a b *\n0027\nf 1\n", 4)
    assert shell.run("say so").stdout == "said so\n"
    assert not shell.run("echo $(false)").returncode
    with pytest.raises(subprocess.CalledProcessError) as caught:
        shell.run("echo x; exit_status_of() { return 9; }; exit_status_of", check=True)
    assert (caught.value.returncode, caught.value.stdout) == (9, "x\n")


def test_input(shell: errand_boy.Shell) -> None:
    assert shell.run("cat", input="a\nb").stdout == "a\nb"
    assert shell.run("cat").stdout == ""  # /dev/null
    assert shell.run("read line; echo $?").stdout == "1\n"
    assert shell.run("read line; echo $line; cat", input="1\n2\n").stdout == "1\n2\n"


def test_bytes_and_one_stream() -> None:
    with errand_boy.Shell(
        text=False, stderr=subprocess.STDOUT, env={"PATH": os.environ["PATH"]}
    ) as shell:
        result = shell.run("printf 'a\\0\\377'; echo b >&2; echo $HOME")
        assert (result.stdout, result.stderr) == (b"a\0\xffb\n\n", None)


# What confuses shells that are driven by prompts and markers. Each has the status that bash gives
# it, or None if the shell itself ends.
HOSTILE = [
    ("echo 'not closed", 2),
    ('echo "$(', 2),
    ("if true; then", 2),
    ("cat <<END\nno end", 0),
    (")", 2),
    ("", 0),
    ("\n\n#", 0),
    ("return 3", 3),
    ("break", 0),
    ("exit 3", None),
    ("exec sh -c 'exit 4'", None),
    ("set -e; false", None),
    ("set -u; echo $not_set_at_all", 1),
    ("kill -KILL $$", None),
    ('for n in {0..255}; do eval "exec $n>&-"; done', None),
    ("exec >/dev/null 2>&1", 0),
    ("exec </dev/zero", 0),
    ("read line", 1),
    ("printf() { :; }; trap() { :; }; read() { :; }; eval() { :; }", 0),
    ("trap 'echo trapped' EXIT ERR DEBUG; false", 1),
    ("trap '' INT TERM HUP", 0),
    ("PROMPT_COMMAND='echo prompt'; PS1='$ '; PS2='> '", 0),
    ("set -x -v", 0),
    ("IFS=0123456789; set -- a b c", 0),
    ("printf '\\0\\0001\\0000\\0/\\0\\0'", 0),
    ("echo __eb_out 1; declare -f __eb_out >/dev/null", 0),
    ("unset PATH HOME PWD; cd /", 0),
    ("cd /; unset PWD OLDPWD", 0),
    ("shopt -s extglob nullglob failglob; set -o noglob", 0),
    ("(exit 77)", 77),
    ("kill -TERM $BASHPID", 0),
    ("yes | head -n 1 >/dev/null", 0),
    ("ulimit -n 20; true", 0),
    ("nosuchcommand", 127),
    ("/", 126),
    ("\x01\x7f\x1b[31m", 127),
]


@pytest.mark.parametrize(("command", "status"), HOSTILE)
def test_the_next_command_works(command: str, status: int | None) -> None:
    with errand_boy.Shell(cwd="/", env={"PATH": os.environ["PATH"], "KEPT": "kept"}) as shell:
        result = shell.run("cd /usr; export KEPT")
        result = shell.run(command, timeout=60)
        assert result.ended_shell is (status is None)
        if status is not None:
            assert result.returncode == status
        if not command.startswith("exec >"):
            printed = shell.run('echo "<$KEPT>"', timeout=60).stdout
            assert "<kept>\n" in printed
        assert shell.run("(exit 5)", timeout=60).returncode == 5


def test_a_shell_that_ends_starts_anew(shell: errand_boy.Shell, tmp_path: Path) -> None:
    shell.run(f"export KEPT='a\nb'; unset HOME; variable=1; cd {tmp_path}")
    first = shell.pid
    left = shell.start("sleep 1000 & echo $!; exit 3").wait()
    assert (left.ended_shell, left.returncode, left.cwd) == (True, 3, str(tmp_path))
    until(lambda: not lives(int(left.stdout)))
    result = shell.run('echo "$KEPT,$variable,$HOME,$PWD"')
    assert (result.stdout, result.ended_shell) == (f"a\nb,,,{tmp_path}\n", False)
    assert shell.pid not in (first, None)


@pytest.mark.slow
def test_redefined_builtin(shell: errand_boy.Shell) -> None:
    """The shell can't report any more. That is noticed, and there is a new one."""
    assert shell.run("builtin() { :; }").ended_shell
    assert shell.run("echo back").stdout == "back\n"


LOOPS = [
    "sleep 1000",
    "while :; do :; done",
    "while :; do sleep 0.01; done",
    "f() { while :; do sleep 1000; done; }; f; f",
    "sleep 1000 | sleep 1000 | cat",
    "(sleep 1000; sleep 1000)",
    "cat <(sleep 1000)",
    "x=$(sleep 1000)",
]


@pytest.mark.parametrize("command", LOOPS)
def test_time_out(shell: errand_boy.Shell, command: str) -> None:
    shell.run("kept=1; cd /")
    pid = shell.pid
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        shell.run(f"echo before; {command}; echo after", timeout=0.1)
    assert caught.value.output.startswith("before\n")
    assert shell.run("echo $kept $PWD").stdout == "1 /\n"
    assert (shell.pid, shell.background) == (pid, [])


@pytest.mark.slow
def test_time_out_of_what_ignores_signals_and_leaves_its_session() -> None:
    with errand_boy.Shell(stop=((signal.SIGTERM, 0.2), signal.SIGKILL)) as shell:
        kept = int(shell.run("sleep 1000 >/dev/null 2>&1 & echo $!").stdout)
        assert shell.background == [kept]
        with pytest.raises(subprocess.TimeoutExpired):
            shell.run("(trap '' INT TERM; setsid sleep 1000 & sleep 1000)", timeout=0.3)
        assert shell.background == [kept]
        with pytest.raises(subprocess.TimeoutExpired):
            shell.run("trap '' INT TERM; while :; do :; done", timeout=0.3)  # the shell itself
        assert shell.run("echo next").stdout == "next\n"
        assert not lives(kept)  # it belonged to the shell that was killed


def test_soft_wait(shell: errand_boy.Shell, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    running = shell.start(f"echo é; cat {tmp_path}/go; echo two; false")
    output = ""
    while output != "é\n":
        output += running.read()[0]
    assert running.poll() is None and running.returncode is None
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        running.wait(0)
    assert caught.value.output == "é\n"
    (tmp_path / "go").write_text("go\n")
    assert running.wait().returncode == running.poll() == 1
    assert running.read() == ("go\ntwo\n", "")
    assert running.wait().stdout == "é\ngo\ntwo\n"


def test_interrupt(shell: errand_boy.Shell) -> None:
    running = shell.start("echo begun; while :; do :; done")
    while running.read() != ("begun\n", ""):
        assert running.poll() is None
    running.interrupt()
    assert running.wait(60).returncode == 128 + signal.SIGINT
    assert shell.run("echo $?").stdout == "130\n"


def test_one_command_at_a_time(shell: errand_boy.Shell) -> None:
    def add() -> None:
        for _ in range(20):
            shell.run("number=$((number + 1))")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shell.run("echo $number").stdout == "80\n"


def test_much_output(shell: errand_boy.Shell) -> None:
    result = shell.run("head -c 3000000 /dev/zero | tr '\\0' x; head -c 300000 /dev/zero >&2")
    assert (len(result.stdout), len(result.stderr)) == (3_000_000, 300_000)


def test_large_command_and_environment(shell: errand_boy.Shell) -> None:
    text = "x" * 300_000
    assert shell.run(f"echo {text}; export LARGE='{text[:100_000]}'").stdout == text + "\n"
    assert shell.run("exit").ended_shell
    assert shell.run("echo ${#LARGE}").stdout == "100000\n"


def test_everything_ends_with_it() -> None:
    with errand_boy.Shell() as shell:
        pids = shell.run("setsid sleep 1000 & sleep 1000 & jobs -p; echo $$").stdout.split()
    for pid in map(int, pids):
        until(lambda pid=pid: not lives(pid))  # type: ignore[misc]
    assert shell.pid is None
    assert shell.run("echo again").stdout == "again\n"
    shell.close()
    shell.close()


CALLER = """
import errand_boy
shell = errand_boy.Shell()
print(shell.run("sleep 1000 >/dev/null 2>&1 & echo $$ $!").stdout, end="", flush=True)
shell.run("sleep 1000")
"""


def test_a_killed_caller_takes_all_along() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        assert len(pids) == 2
        caller.kill()
    for pid in pids:
        until(lambda pid=pid: not lives(pid))  # type: ignore[misc]


def test_keyboard_interrupt_ends_the_command(shell: errand_boy.Shell) -> None:
    shell.run("true")
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        until(lambda: bool(processes.descendants([shell.pid or 0])))
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            shell.run("sleep 1000")
    finally:
        thread.join()
    assert shell.run("echo $?").stdout == "130\n"


def test_limits_and_sandbox_are_for_all_commands(tmp_path: Path) -> None:
    with errand_boy.Shell(limits={"memory": "200M"}) as shell:
        assert shell.run("echo x").stdout == "x\n"
    with errand_boy.Shell(sandbox=errand_boy.Sandbox(system=True)) as shell:
        assert shell.run(f"echo x >{tmp_path}/file").returncode == 1
        assert shell.run(f"cat {tmp_path}/file").returncode == 1


def test_mistakes() -> None:
    with pytest.raises(FileNotFoundError, match="nosuchshell"):
        errand_boy.Shell("nosuchshell")
    with errand_boy.Shell() as shell, pytest.raises(ValueError, match="null character"):
        shell.run("a\0b")
    with pytest.raises(OSError):
        errand_boy.Shell("false").run("echo")


@pytest.mark.slow
def test_random_time_outs(shell: errand_boy.Shell) -> None:
    chance = random.Random(28)
    commands = [
        *LOOPS,
        "true",
        "for i in {1..300}; do /bin/true; done",
        "setsid sleep 0.02",
        "exit 3",
    ]
    for number in range(150):
        shell.run(f"cd /usr; export NUMBER={number}")
        command = chance.choice(commands)
        with suppress(subprocess.TimeoutExpired):
            shell.run(command, timeout=chance.choice([0, 0.001, 0.005, 0.02, 0.05]))
        assert shell.run("echo $NUMBER $PWD", timeout=60).stdout == f"{number} /usr\n", command
        assert shell.background == []
