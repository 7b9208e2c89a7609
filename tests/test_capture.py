"""Captured output of a daemon's commands: run, check_output, getoutput and run_cmd.

Each is compared with subprocess. Nothing may show that the output took another way.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, run_script, started_script
from daemon import Daemon, started_daemon
from wire import spawned

import errand_boy
from errand_boy._client.client import Client, _Idle
from errand_boy._wire import frames
from errand_boy._wire.address import Address
from errand_boy.errors import HelperDiedError, NoDaemonError
from errand_boy.transports.unixsocket import UNIXSocketTransport

PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
BOTH = "echo out; echo err >&2; exit 3"


VERDICT = {"cause", "duration", "limits_by", "peak_memory", "rusage"}


def outcome(library: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """Return what subprocess has too. Attributes of errand_boy are all there, or none of them."""
    try:
        found = dict(vars(library.run(*args, **options)))
    except Exception as error:
        found = {"raised": type(error), "text": str(error), **vars(error)}
    assert (found.keys() & VERDICT) in (VERDICT, set())
    return {name: value for name, value in found.items() if name not in VERDICT}


@pytest.mark.parametrize(
    "options",
    [
        {"capture_output": True},
        {"capture_output": True, "text": True},
        {"capture_output": True, "check": True},
        {"capture_output": True, "timeout": 60},
        {"capture_output": True, "timeout": 60, "check": True, "text": True},
        {"capture_output": True, "stdin": DEVNULL},
        {"capture_output": True, "encoding": "utf-16-le"},
        {"capture_output": True, "encoding": "utf-16-le", "errors": "replace"},
        {"capture_output": True, "errors": "replace"},
        {"capture_output": True, "stdout": PIPE},
        {"capture_output": True, "input": b"x"},
        {"stdout": PIPE, "stderr": STDOUT},
        {"stdout": PIPE, "stderr": DEVNULL},
        {"stdout": DEVNULL, "stderr": PIPE},
        {"stdout": PIPE, "stderr": PIPE, "universal_newlines": True},
        {"stdout": STDOUT, "stderr": PIPE},
        {"stdout": PIPE, "stderr": STDOUT, "bufsize": 0, "close_fds": False},
    ],
    ids=str,
)
def test_same_as_by_subprocess(client: Client, options: dict[str, Any]) -> None:
    args = ["sh", "-c", BOTH]
    assert outcome(client, args, **options) == outcome(subprocess, args, **options)


@pytest.mark.parametrize(
    "args, options",
    [
        ("echo a; exit 2", {"shell": True}),
        (["printf", r"a\r\nb\rc\n"], {"text": True}),
        (["printf", r"\377"], {"text": True}),
        (["printf", r"\377"], {"encoding": "latin-1"}),
        (["/none"], {}),
        (["none-there"], {}),
        (["true"], {"cwd": "/none"}),
        (["env"], {"env": {"A": "1"}}),
        (["sh", "-c", "kill -9 $$"], {"check": True}),
        (["pwd"], {"cwd": "/usr"}),
        (["sh", "-c", "umask"], {"umask": 0o27}),
        (["a\0b"], {}),
        ([], {}),
        (["true"], {"nonsense": 1}),
    ],
    ids=str,
)
def test_same_commands(client: Client, args: Any, options: dict[str, Any]) -> None:
    expected = outcome(subprocess, args, capture_output=True, **options)
    assert outcome(client, args, capture_output=True, **options) == expected


def test_the_other_functions(client: Client) -> None:
    assert client.check_output(["echo", "a"]) == b"a\n"
    assert client.check_output(["echo", "a"], text=True, stderr=STDOUT) == "a\n"
    assert client.check_output(["cat"], input=b"a") == b"a"
    assert client.getoutput("echo out; echo err >&2") == "out\nerr"
    assert client.getstatusoutput("echo a; exit 3") == (3, "a")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        client.check_output(["sh", "-c", BOTH], stderr=PIPE)
    assert (caught.value.output, caught.value.stderr) == (b"out\n", b"err\n")


def test_what_is_not_piped_is_inherited(daemon: Daemon) -> None:
    source = """
client = subprocess.connect(sys.argv[2])
done = client.run(["sh", "-c", "read line; echo $line; echo err >&2"], stdout=subprocess.PIPE)
os.close(0)
closed = client.run(["sh", "-c", "test -e /dev/fd/0"], stdout=subprocess.PIPE)
report([done.stdout.decode(), closed.returncode])
"""
    with started_script(source, args=[daemon.path], stdin=PIPE, stderr=PIPE) as process:
        stdout, stderr = process.communicate("line\n")
    assert '["line\\n", 1]' in stdout
    assert stderr == "err\n"


def test_much_output(client: Client) -> None:
    script = "head -c 20000000 /dev/zero; head -c 3000000 /dev/zero >&2"
    done = client.run(["sh", "-c", script], capture_output=True)
    assert (done.stdout, done.stderr) == (bytes(20_000_000), bytes(3_000_000))


@pytest.mark.slow
def test_background_holder_of_the_output(client: Client) -> None:
    done = client.run(["sh", "-c", "(sleep 0.5; echo late) & echo early"], capture_output=True)
    assert done.stdout == b"early\nlate\n"


def test_connections_are_used_again(client: Client, daemon: Daemon) -> None:
    for _ in range(20):
        client.run(["echo", "x"], capture_output=True, check=True)
        with pytest.raises(FileNotFoundError):
            client.run(["/none"], capture_output=True)
        client.Popen(["true"]).wait()
    assert len(client._idle) == 1


@pytest.mark.slow
def test_timeout_kills_and_has_the_output_so_far(client: Client, tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/pid; echo early; exec sleep 1000"
    choices: tuple[Any, ...] = ({}, {"text": True})
    for options in choices:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            client.run(["sh", "-c", script], capture_output=True, timeout=0.5, **options)
        assert (caught.value.output, caught.value.stderr) == (b"early\n", None)
        assert caught.value.timeout == 0.5
        assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_timeout_does_not_wait_for_those_who_hold_the_output(client: Client) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        client.run(["sh", "-c", "sleep 1000 & echo $!"], capture_output=True, timeout=0.5)
    process = psutil.Process(int(caught.value.output))
    process.kill()
    process.wait(PATIENCE)


@pytest.mark.slow
def test_time_in_the_queue_does_not_count(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-processes=1") as daemon:
        client = errand_boy.connect(daemon.path)
        first = client.Popen(["sleep", "1.5"])
        done = client.run(["echo", "x"], capture_output=True, timeout=1)
        assert done.stdout == b"x\n"
        assert first.wait() == 0
        client.close()


def test_timeout_that_poll_cannot_wait_for(client: Client) -> None:
    assert client.run(["echo", "x"], capture_output=True, timeout=1e9).stdout == b"x\n"


def test_interrupt_kills(daemon: Daemon, tmp_path: Path) -> None:
    source = """
client = subprocess.connect(sys.argv[2])
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGUSR1, interrupt)
script = 'echo $$ > "$0"; kill -USR1 "$1"; exec sleep 1000'
try:
    client.run(["sh", "-c", script, sys.argv[3], str(os.getpid())], capture_output=True)
except KeyboardInterrupt:
    report(client.run(["echo", "on"], capture_output=True, text=True).stdout)
"""
    file = tmp_path / "pid"
    assert run_script(source, args=[daemon.path, file]) == "on\n"
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(file.read_text())).wait(PATIENCE)


def test_command_outlives_its_client(daemon: Daemon, tmp_path: Path) -> None:
    source = """
client = subprocess.connect(sys.argv[2])
script = 'echo $$ > "$0"; read x < "$1"; echo done > "$0.done"'
client.run(["sh", "-c", script, sys.argv[3], sys.argv[4]], stdout=subprocess.PIPE)
"""
    fifo, file = tmp_path / "fifo", tmp_path / "file"
    os.mkfifo(fifo)
    with started_script(source, args=[daemon.path, file, fifo]) as process:
        with open(fifo, "w") as writing:  # it has been started
            command = psutil.Process(int(file.read_text()))
            process.kill()
            process.wait()
            writing.write("\n")
        command.wait(PATIENCE)
    assert Path(f"{file}.done").read_text() == "done\n"


def test_kill_on_client_exit(daemon: Daemon, tmp_path: Path) -> None:
    source = """
client = subprocess.connect(sys.argv[2])
client.run(["sh", "-c", 'echo $$ > "$0"; exec sleep 1000', sys.argv[3]], stdout=subprocess.PIPE,
           kill_on_client_exit=True)
"""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with started_script(source, args=[daemon.path, fifo]) as process:
        command = psutil.Process(int(fifo.read_text()))
        process.kill()
        process.wait()
        command.wait(PATIENCE)


def test_helper_killed(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size=1") as daemon:
        client = errand_boy.connect(daemon.path)
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                client.run(["sh", "-c", 'echo > "$0"; exec sleep 1000', fifo], capture_output=True)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        fifo.read_text()
        (helper,) = daemon.helpers()
        left = psutil.Process(helper).children()
        os.kill(helper, signal.SIGKILL)
        thread.join()
        assert [type(error) for error in errors] == [HelperDiedError]
        for process in left:
            process.kill()
        done = client.run(["echo", "on"], capture_output=True)
        assert done.stdout == b"on\n"
        client.close()


@pytest.mark.parametrize("started", [False, True])
def test_helper_that_ends_before_it_reads_of_a_timeout(started: bool) -> None:
    """The bytes that nobody reads are not the request, which must not be sent again."""
    theirs, ours = socket.socketpair()
    client = Client(Address("/none"))  # there is no other helper
    client._idle.append(_Idle(ours, client))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            client.run(["true"], capture_output=True, timeout=0.1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert theirs.recv(1 << 16, 0 if started else socket.MSG_PEEK)
    if started:
        theirs.sendall(frames.HELLO + spawned())
        assert theirs.recv(1, socket.MSG_PEEK)  # it is to be killed
    theirs.close()
    thread.join()
    assert [type(error) for error in errors] == [HelperDiedError if started else NoDaemonError]


def test_many_threads(client: Client) -> None:
    wrong: list[Any] = []

    def run(number: int) -> None:
        for turn in range(20):
            text = f"{number} {turn}"
            done = client.run(["sh", "-c", f"echo {text}; exit {turn}"], capture_output=True)
            if (done.stdout.decode(), done.returncode) != (text + "\n", turn):
                wrong.append(done)

    threads = [threading.Thread(target=run, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("timeout", [None, 60])
def test_process_of_run_cmd(daemon: Daemon, timeout: float | None) -> None:
    transport = UNIXSocketTransport(socket_path=daemon.path)
    process, stdout, stderr = transport.run_cmd("echo $$; echo err >&2; exit 5", timeout=timeout)
    assert (stdout, stderr) == (f"{process.pid}\n", "err\n")
    assert [process.returncode, process.poll(), process.wait()] == [5] * 3
    assert process.args == "echo $$; echo err >&2; exit 5"
    assert isinstance(process.rusage, resource.struct_rusage)
    assert process.rusage.ru_maxrss > 0
    process.kill()  # it is known to have ended
    assert isinstance(process, subprocess.Popen)


def test_inherits_what_others_do(client: Client) -> None:
    code = (
        "import os, resource, signal; print(os.getcwd(), os.environ.get('PWD'), "
        "resource.getrlimit(resource.RLIMIT_CORE), signal.pthread_sigmask(signal.SIG_BLOCK, []), "
        "sorted(os.listdir('/proc/self/fd')))"
    )
    command = [sys.executable, "-c", code]
    plain = client.Popen(command, stdout=PIPE, stderr=PIPE, stdin=DEVNULL)
    assert client.run(command, capture_output=True, stdin=DEVNULL).stdout == plain.communicate()[0]
