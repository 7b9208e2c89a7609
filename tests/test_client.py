"""The daemon's client: subprocess's interface, with commands that the daemon's helpers own."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import run_script, started_script
from daemon import Daemon, started_daemon
from wire import NOT_FOUND, USAGE, exited, spawned

import errand_boy
from errand_boy._client.client import Client
from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.connection import Connection
from errand_boy._wire.frames import Exited, Failed, Spawned
from errand_boy.errors import HelperDiedError, NoDaemonError, ProtocolError


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that a test may break."""
    with started_daemon(tmp_path) as it:
        yield it


def script(source: str, daemon: Daemon, **options: Any) -> Any:
    """Return the report of a fresh process with a `client` of the daemon."""
    start = "client = subprocess.connect(sys.argv[2])\n"
    return run_script(start + source, args=[daemon.path], **options)


# As subprocess


@pytest.mark.parametrize(
    "command, code",
    [("exit 0", 0), ("exit 255", 255), ("kill -TERM $$", -15), ("kill -KILL $$", -9)],
)
def test_return_code(client: Client, command: str, code: int) -> None:
    process = client.Popen(["sh", "-c", command])
    assert [process.wait(), process.poll(), process.returncode] == [code] * 3


def test_command_is_not_our_child(client: Client) -> None:
    with client.Popen(["cat"], stdin=subprocess.PIPE) as process:
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
        assert psutil.Process(process.pid).ppid() != os.getpid()
        assert process.poll() is None


@pytest.mark.parametrize("size", [0, 10, 5_000_000])
def test_communicate(client: Client, size: int) -> None:
    data = os.urandom(size)
    process = client.Popen(
        ["sh", "-c", "cat; echo done >&2; exit 4"], stdin=-1, stdout=-1, stderr=-1
    )
    assert process.communicate(data) == (data, b"done\n")
    assert process.returncode == 4


def test_communicate_in_text_mode_with_timeout(client: Client) -> None:
    with client.Popen(["cat"], stdin=-1, stdout=-1, text=True) as process:
        assert process.communicate("foo\n", timeout=20) == ("foo\n", None)


@pytest.mark.slow
def test_communicate_times_out_and_goes_on(client: Client) -> None:
    code = "import sys; print('early', flush=True); print(sys.stdin.read())"
    read, write = os.pipe()
    with client.Popen([sys.executable, "-c", code], stdin=read, stdout=-1, text=True) as process:
        os.close(read)
        for timeout in (0.6, 0.1, 0, -1):
            with pytest.raises(subprocess.TimeoutExpired) as caught:
                process.communicate(timeout=timeout)
            assert caught.value.timeout == timeout
        os.write(write, b"late")
        os.close(write)
        assert process.communicate() == ("early\nlate\n", None)


@pytest.mark.slow
def test_communicate_waits_for_what_outlives_its_pipes(client: Client) -> None:
    command = "exec >&- 2>&-; sleep 0.7; exit 3"
    process = client.Popen(["sh", "-c", command], stdout=-1, stderr=-1)
    assert process.communicate() == (b"", b"")
    assert process.returncode == 3


def test_wait_with_timeout(client: Client) -> None:
    with client.Popen(["cat"], stdin=subprocess.PIPE) as process:
        for timeout in (0.1, 0, -1):
            with pytest.raises(subprocess.TimeoutExpired) as caught:
                process.wait(timeout)
            assert caught.value.timeout == timeout
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


def test_functions(client: Client) -> None:
    assert client.call(["sh", "-c", "exit 3"]) == 3
    assert client.check_call(["true"]) == 0
    assert client.check_output(["echo", "fine"]) == b"fine\n"
    assert client.getoutput("echo fine") == "fine"
    assert client.getstatusoutput("echo fine; exit 5") == (5, "fine")
    done = client.run(["cat"], input="in", capture_output=True, text=True, check=True)
    assert (done.stdout, done.returncode) == ("in", 0)
    with pytest.raises(client.CalledProcessError):
        client.run(["false"], check=True)
    with pytest.raises(client.TimeoutExpired):
        client.run(["sleep", "100"], timeout=0.1)


def test_one_client_for_a_path(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SOCKET", client.path)
    assert errand_boy.connect() is client
    monkeypatch.chdir(os.path.dirname(client.path))
    assert errand_boy.connect(Path("socket")) is client


@pytest.mark.parametrize(
    "arguments, options, error, filename",
    [
        (["/none/program"], {}, errno.ENOENT, "/none/program"),
        (["none-such-program"], {}, errno.ENOENT, "none-such-program"),
        (["/etc/passwd"], {}, errno.EACCES, "/etc/passwd"),
        (["true"], {"cwd": "/none"}, errno.ENOENT, "/none"),
        (["x" * 3_000_000], {}, errno.ENAMETOOLONG, "x" * 3_000_000),
        (["true", "x" * 3_000_000], {}, errno.E2BIG, "true"),
        (["x" * 100_000] * 200, {}, errno.E2BIG, "x" * 100_000),
        (["true"], {"process_group": 1}, errno.EPERM, None),
    ],
)
def test_errors(
    client: Client, arguments: Any, options: Any, error: int, filename: str | None
) -> None:
    if "process_group" in options and sys.version_info < (3, 11):
        pytest.skip("process_group came with 3.11")
    with pytest.raises(OSError) as caught:
        client.Popen(arguments, **options)
    assert (caught.value.errno, caught.value.filename) == (error, filename)
    assert type(caught.value) is type(OSError(error, ""))
    assert client.call(["true"]) == 0


def test_preexec_fn(client: Client) -> None:
    with pytest.raises(ValueError, match="use an option instead"):
        client.Popen(["true"], preexec_fn=print)
    with client.Popen(["cat"], stdin=-1, preexec_fn=os.setsid) as process:
        assert os.getsid(process.pid) == process.pid


@pytest.mark.root
def test_ids(client: Client) -> None:
    options: Any = {"user": 12345, "group": 12346, "extra_groups": [12347]}
    assert client.check_output(["id", "-u"], **options) == b"12345\n"
    assert client.check_output(["id", "-G"], **options) == b"12346 12347\n"


# What the command has


def test_command_has_what_its_client_has(daemon: Daemon, tmp_path: Path) -> None:
    source = """
        os.chdir(sys.argv[3])
        os.umask(0o27)
        os.environ["PUT"] = "there"
        os.nice(3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (77, 77))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        show = "pwd; umask; echo $PUT; nice; ulimit -n; ulimit -c; taskset -p $$ | sed s/.*://;" \\
               "grep -e SigBlk -e SigIgn /proc/self/status"
        here = stdlib.check_output(show, shell=True, text=True)
        there = subprocess.connect(sys.argv[2]).check_output(show, shell=True, text=True)
        report([here, there])
    """
    here, there = run_script(source, args=[daemon.path, tmp_path])
    assert here == there
    assert str(tmp_path) in here


def test_explicit_directory_umask_environment_and_descriptors(
    client: Client, tmp_path: Path
) -> None:
    options: Any = {"cwd": tmp_path, "umask": 0o77, "env": {"A": "b"}, "text": True}
    assert client.check_output("pwd; umask; echo $A", shell=True, **options) == (
        f"{tmp_path}\n0077\nb\n"
    )
    read, write = os.pipe()
    client.run([sys.executable, "-c", f"import os; os.write({write}, b'x')"], pass_fds=[write])
    os.close(write)
    assert os.read(read, 100) == b"x"
    os.close(read)


def test_command_leads_a_group_of_its_own_by_default(client: Client) -> None:
    def ids(**options: Any) -> tuple[int, int, int]:
        with client.Popen(["cat"], stdin=-1, **options) as process:
            return process.pid, os.getpgid(process.pid), os.getsid(process.pid)

    pid, group, session = ids()
    assert pid == group != session
    pid, group, session = ids(start_new_session=True)
    assert pid == group == session
    if sys.version_info >= (3, 11):
        pid, group, session = ids(process_group=0)
        assert pid == group != session


def test_rusage(client: Client) -> None:
    process = client.Popen(
        [sys.executable, "-c", "x = bytearray(50_000_000)\nfor i in range(2_000_000): pass"]
    )
    assert process.rusage is None
    assert process.wait() == 0
    usage = process.rusage
    assert isinstance(usage, resource.struct_rusage)
    assert 0.01 < usage.ru_utime + usage.ru_stime < 20
    assert 50_000 < usage.ru_maxrss < 500_000
    assert usage.ru_minflt > 1000
    assert usage.ru_nvcsw + usage.ru_nivcsw > 0


# Signals


def test_signals(client: Client) -> None:
    for name, number in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
        process = client.Popen(["sleep", "100"])
        getattr(process, name)()
        assert process.wait() == -number
        getattr(process, name)()
    process = client.Popen(["sleep", "100"])
    with pytest.raises(OSError, match="Invalid argument"):
        process.send_signal(1000)
    with pytest.raises(TypeError):
        process.send_signal("TERM")  # type: ignore[arg-type]
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == -signal.SIGUSR1
    process.send_signal(signal.SIGUSR1)


def test_signal_to_the_whole_group(client: Client) -> None:
    with client.Popen(["sh", "-c", "(echo ready; exec sleep 100); exit 3"], stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_group_signal(signal.SIGTERM)
        assert process.stdout.read() == b""  # the inner one has ended too
    assert process.returncode == -signal.SIGTERM


def test_signal_while_another_thread_waits(client: Client) -> None:
    process = client.Popen(["sleep", "100"])
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(process.wait())) for _ in range(4)]
    for thread in threads:
        thread.start()
    process.terminate()
    for thread in threads:
        thread.join()
    assert codes == [-signal.SIGTERM] * 4


def test_connection_does_not_go_back_while_a_signal_is_sent(client: Client) -> None:
    """Otherwise the signal could end up in the middle of another command's request."""
    client.close()
    process = client.Popen(["sleep", "100"])
    assert process._helper_child is not None
    connection = process._helper_child.connection
    assert connection is not None
    waiter = threading.Thread(target=process.wait)
    waiter.start()
    with connection.lock:
        process.kill()
        for _ in range(20):
            client.call(["true"])
        assert connection not in client._idle
    waiter.join()
    assert connection in client._idle
    with connection.lock:
        process.kill()


# Connections


def test_connection_is_used_again(client: Client, daemon: Daemon) -> None:
    client.close()
    client.call(["true"])
    [connection] = client._idle
    for _ in range(10):
        client.call(["true"])
        with pytest.raises(FileNotFoundError):
            client.call(["/none"])
    assert client._idle == [connection]


def test_live_command_keeps_its_connection(client: Client) -> None:
    client.close()
    with client.Popen(["cat"], stdin=-1) as live:
        assert client.call(["true"]) == 0
        assert len(client._idle) == 1
        assert live.poll() is None
    assert len(client._idle) == 2


def test_many_threads(client: Client) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(10):
            code = number * 10 + turn
            done = client.run(["sh", "-c", f"echo {code}; exit {code}"], capture_output=True)
            if (done.returncode, done.stdout) != (code, b"%d\n" % code):
                wrong.append(done)

    threads = [threading.Thread(target=work, args=[number]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fork_leaves_the_parents_connections_and_replies_alone(daemon: Daemon) -> None:
    source = """
client.call(["true"])
process = client.Popen(["cat"], stdin=-1, stdout=-1)
waiter = threading.Thread(target=process.wait)
waiter.start()
pid = os.fork()
if pid == 0:
    seen = 0
    for ask in (process.poll, process.wait, process.kill, lambda: process.wait(1)):
        try:
            ask()
        except ChildProcessError:
            seen += 1
    codes = [client.call(["sh", "-c", f"exit {n}"]) for n in range(3)]
    del process
    os._exit(seen if codes == [0, 1, 2] else 100)
assert client.call(["sh", "-c", "exit 5"]) == 5
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
alive = process.poll() is None
process.stdin.write(b"alive")
process.stdin.close()
waiter.join()
report([status, alive, process.stdout.read().decode(), process.returncode])
"""
    assert script(source, daemon) == [4, True, "alive", 0]


def test_change_of_ids_ends_the_old_connections(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.call(["true"])
    before = client._idle[-1]
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert client.call(["true"]) == 0
    assert before not in client._idle
    assert before.sock.fileno() == -1


def test_closed_descriptor_is_noticed(client: Client) -> None:
    client.call(["true"])
    os.close(client._idle[-1].sock.fileno())
    assert client.call(["true"]) == 0
    client.call(["true"])
    with open(os.devnull) as null:
        os.dup2(null.fileno(), client._idle[-1].sock.fileno())
    fd = client._idle[-1].sock.fileno()
    assert client.call(["true"]) == 0
    os.close(fd)


# The command and its client


def test_forgotten_command_lives_on(client: Client, tmp_path: Path) -> None:
    read, write = os.pipe()
    end, hold = os.pipe()
    process = client.Popen(["sh", "-c", "cat; echo end"], stdin=end, stdout=write)
    os.close(end)
    os.close(write)
    with pytest.warns(ResourceWarning):
        del process
    assert client.call(["true"]) == 0  # the standard library has a look at it here
    os.close(hold)
    assert os.read(read, 100) == b"end\n"
    os.close(read)


def test_command_outlives_its_client(daemon: Daemon) -> None:
    read, write = os.pipe()
    source = """
client = subprocess.connect(sys.argv[2])
process = client.Popen(["sh", "-c", "read line; echo $line"], stdin=0, stdout=int(sys.argv[3]))
report(process.pid)
os.kill(os.getpid(), signal.SIGKILL)
"""
    end, hold = os.pipe()
    with started_script(source, args=[daemon.path, write], stdin=end, pass_fds=[write]) as it:
        os.close(end)
        os.close(write)
        assert it.wait(20) == -signal.SIGKILL
        os.write(hold, b"still here\n")
        os.close(hold)
        assert os.read(read, 100) == b"still here\n"
    os.close(read)


@pytest.mark.slow
@pytest.mark.parametrize("ignores", [False, True])
def test_kill_on_client_exit(daemon: Daemon, ignores: bool) -> None:
    """Its process group gets SIGTERM, then SIGKILL. Here a child of the command reports it."""
    command = "trap 'echo TERM; exit' TERM; (echo ready; sleep 100; sleep 100); sleep 100"
    grace = "100"
    if ignores:
        command, grace = "trap '' TERM; echo ready; sleep 100; sleep 100", "0.2"
    source = """
client = subprocess.connect(sys.argv[2])
process = client.Popen(
    ["sh", "-c", sys.argv[4]], stdout=int(sys.argv[3]), kill_on_client_exit=True,
    kill_grace=float(sys.argv[5]),
)
report(process.pid)
time.sleep(100)
"""
    read, write = os.pipe()
    args = [daemon.path, write, command, grace]
    with started_script(source, args=args, pass_fds=[write]) as it:
        os.close(write)
        assert it.stdout is not None
        pid = int(it.stdout.readline())
        assert os.read(read, 100) == b"ready\n"
        assert psutil.pid_exists(pid)
        it.kill()
        with open(read) as output:  # ends when the whole group has
            assert output.read() == ("" if ignores else "TERM\n")


def test_kill_grace_out_of_range(client: Client) -> None:
    for grace in (-1, 5_000_000):
        with pytest.raises(ValueError, match="kill_grace"):
            client.Popen(["true"], kill_on_client_exit=True, kill_grace=grace)


# Failures


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(NoDaemonError, match="errand-boy serve") as caught:
        errand_boy.connect(path).run(["true"])
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(NoDaemonError) as caught:
        errand_boy.connect(path).run(["true"])
    assert caught.value.errno == errno.ECONNREFUSED
    with pytest.raises(NoDaemonError, match="107 bytes"):
        errand_boy.connect(tmp_path / ("x" * 200)).run(["true"])


@pytest.mark.root
def test_refused_to_another_user(public_dir: Path) -> None:
    with started_daemon(public_dir) as daemon:
        source = """
            import errand_boy._client.client  # the other user may not be able to read the library
            os.setgid(65534)
            os.setuid(65534)
            seen = []
            for name in ("call", "check_output"):
                try:
                    getattr(subprocess.connect(sys.argv[2]), name)(["true"])
                except PermissionError as error:
                    seen.append([type(error).__name__, str(error)])
            report(seen)
        """
        seen = run_script(source, args=[daemon.path])
        assert [name for name, _ in seen] == ["RefusedError"] * 2
        assert "this user may not connect" in seen[0][1]
        os.chmod(daemon.path, 0o666)
        seen = run_script(source, args=[daemon.path])
        assert [name for name, _ in seen] == ["RefusedError"] * 2
        assert "user 65534 may not use this daemon of user 0" in seen[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("pipe", [None, subprocess.PIPE])
def test_helper_killed_with_a_live_command(own_daemon: Daemon, pipe: int | None) -> None:
    client = errand_boy.connect(own_daemon.path)
    started = client.Popen(["sh", "-c", "echo $$; exec sleep 100"], stdout=subprocess.PIPE)
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    process = client.Popen(["sleep", "100"], stdout=pipe)
    for helper in own_daemon.helpers():
        os.kill(helper, signal.SIGKILL)
    with pytest.raises(HelperDiedError):
        started.wait()
    with pytest.raises(HelperDiedError):
        process.communicate()
    for each in (started, process):
        each.kill()  # the pid may belong to anybody by now
        assert each.wait() == -signal.SIGKILL
        if each.stdout:
            each.stdout.close()
    assert psutil.pid_exists(pid)
    os.kill(pid, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_server_killed_with_a_live_command(own_daemon: Daemon, tmp_path: Path) -> None:
    """Its helper serves it to the end, and the next server gets the path."""
    client = errand_boy.connect(own_daemon.path)
    process = client.Popen(["sh", "-c", "cat; exit 7"], stdin=-1, stdout=-1)
    own_daemon.process.kill()
    own_daemon.process.wait()
    with pytest.raises(NoDaemonError):
        client.call(["true"])
    assert process.poll() is None
    with started_daemon(tmp_path):
        assert client.call(["true"]) == 0
        assert process.communicate(b"still there") == (b"still there", None)
        assert process.returncode == 7
        assert client.call(["true"]) == 0


@pytest.mark.slow
def test_idle_connection_to_a_daemon_that_has_been_restarted(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    client = errand_boy.connect(path)
    with started_daemon(tmp_path) as first:
        assert client.call(["true"]) == 0
        helpers = [psutil.Process(pid) for pid in first.helpers()]
    psutil.wait_procs(helpers, 20)
    with pytest.raises(NoDaemonError):
        client.call(["true"])
    with started_daemon(tmp_path):
        assert client.call(["true"]) == 0


def test_helpers_that_are_replaced_lose_no_command(tmp_path: Path) -> None:
    """Their idle connections are closed; the next command uses a new one."""
    with started_daemon(tmp_path, "--pool-size", 1, "--max-child-tasks", 3) as it:
        client = errand_boy.connect(it.path)
        first = it.helpers()
        live = [client.Popen(["cat"], stdin=-1) for _ in range(4)]
        assert [client.call(["sh", "-c", f"exit {n}"]) for n in range(20)] == list(range(20))
        for process in live:
            with process:
                assert process.poll() is None
            assert process.returncode == 0
        assert it.helpers() != first


@pytest.mark.slow
def test_start_that_waits_for_its_turn(tmp_path: Path) -> None:
    """It can be interrupted, and then never happens."""
    with started_daemon(tmp_path, "--max-processes", 1) as it:
        source = """
            class Interrupt(Exception):
                pass
            def interrupt(number, frame):
                raise Interrupt
            client = subprocess.connect(sys.argv[2])
            signal.signal(signal.SIGALRM, interrupt)
            first = client.Popen(["cat"], stdin=-1)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            try:
                client.Popen(["touch", sys.argv[3]])
            except Interrupt:
                interrupted = True
            turn = threading.Thread(target=first.communicate)
            threading.Timer(0.1, turn.start).start()
            codes = [client.call(["sh", "-c", "exit 3"]), first.wait()]
            report([interrupted, codes, os.path.exists(sys.argv[3])])
        """
        assert run_script(source, args=[it.path, tmp_path / "made"]) == [True, [3, 0], False]


@pytest.mark.slow
def test_interrupt_while_waiting(daemon: Daemon) -> None:
    source = """
def interrupt(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
process = client.Popen(["sleep", "100"], stdout=-1)
seen = []
for wait in (process.wait, process.communicate, lambda: process.wait(100)):
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        wait()
    except KeyboardInterrupt:
        seen.append(process.poll())
process.kill()
report([seen, process.communicate()[0].decode(), process.returncode])
"""
    assert script(source, daemon) == [[None] * 3, "", -signal.SIGKILL]


# Everybody's functions


def test_environment_makes_everything_the_daemons(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
        process = subprocess.Popen(["cat"], stdin=-1)
        try:
            os.waitpid(process.pid, os.WNOHANG)
            report("ours")
        except ChildProcessError:
            process.stdin.close()
            seen = [process.wait(), subprocess.helper_pid(), isinstance(process, subprocess.Popen)]
            report([*seen, subprocess.check_output(["echo", "x"], text=True)])
    """
    monkeypatch.setenv("ERRAND_BOY_SOCKET", daemon.path)
    assert run_script(source) == [0, None, True, "x\n"]


def test_status(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    with client.Popen(["cat", "here"], stdin=-1):
        pass
    value = client.status()
    assert value["pid"] == daemon.process.pid
    assert value["totals"]["started"] > 0
    with pytest.raises(NoDaemonError, match="no errand-boy daemon listens"):
        errand_boy.connect(tmp_path / "none").status()


@pytest.mark.slow
@pytest.mark.parametrize("patched", ["before", "after"])
def test_greenlets_go_on_while_one_waits(daemon: Daemon, patched: str, tmp_path: Path) -> None:
    """Otherwise the greenlet that ends the command would never run."""
    pytest.importorskip("gevent")
    patch = "import gevent.monkey; gevent.monkey.patch_all()"
    imports = [patch, "import errand_boy"] if patched == "before" else ["import errand_boy", patch]
    use = """
import json, sys
import gevent
client = errand_boy.connect(sys.argv[1])
process = client.Popen(["cat"], stdin=-1, stdout=-1)
waiting = [gevent.spawn(process.wait), gevent.spawn(process.wait, 20)]
gevent.joinall([*waiting, gevent.spawn(process.terminate)])
codes = [waiter.value for waiter in waiting]
jobs = [gevent.spawn(client.run, ["cat"], input=b"x" * n, capture_output=True) for n in (0, 10**6)]
fifo = sys.argv[2]
for args in (["cat", fifo], ["sh", "-c", 'echo x > "$0"', fifo]):
    jobs.append(gevent.spawn(client.run, args, capture_output=True))
gevent.joinall(jobs)
print(json.dumps([codes, [len(job.value.stdout) for job in jobs]]))
"""
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-c", "\n".join([*imports, use]), daemon.path, f"{tmp_path}/fifo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[-15, -15], [0, 1000000, 2, 0]]\n"


# -- what comes over a connection --

REPLIES = frames.HELLO + spawned() + exited(9) + NOT_FOUND


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Connection]]:
    """A helper's end of a connection, and the client's."""
    theirs, ours = socket.socketpair()
    connection = Connection(ours)
    with theirs:
        yield theirs, connection
    connection.close()


def expect_replies(connection: Connection) -> None:
    spawned, exited, failed = (connection.receive(0.0) for _ in range(3))
    assert isinstance(spawned, Spawned)
    assert (spawned.pid, spawned.by_helper) == (77, True)
    assert isinstance(exited, Exited)
    assert (exited.status, exited.usage) == (9, USAGE)
    assert isinstance(failed, Failed)
    assert (failed.pid, failed.errno, failed.stage) == (0, errno.ENOENT, lib.EB_STAGE_EXEC)
    assert not connection.has_received()


@pytest.mark.parametrize("portion", [1, 4, 5, 9, 10, 100, 1000])
def test_replies_in_portions(ends: tuple[socket.socket, Connection], portion: int) -> None:
    theirs, connection = ends
    received = []
    for start in range(0, len(REPLIES), portion):
        theirs.sendall(REPLIES[start : start + portion])
        with contextlib.suppress(TimeoutError):  # there is no whole one
            while True:
                received.append(type(connection.receive(0.0)))
    assert received == [Spawned, Exited, Failed]
    assert not connection.has_received()
    theirs.sendall(REPLIES)
    expect_replies(connection)


@pytest.mark.parametrize("counted", [0, len(frames.HELLO)])
def test_replies_received_by_what_was_interrupted(
    ends: tuple[socket.socket, Connection], counted: int
) -> None:
    theirs, connection = ends
    theirs.sendall(REPLIES[:counted])
    with pytest.raises(TimeoutError):
        connection.receive(0.0)
    theirs.sendall(REPLIES[counted:])
    connection.sock.recv_into(connection._buffer)
    expect_replies(connection)


@pytest.mark.parametrize(
    "reply",
    [
        frames.frame(lib.EB_SPAWNED, [bytes(6)]),
        frames.frame(lib.EB_EXITED, [bytes(75)]),
        frames.frame(200, [b"?"]),
        frames.HEADER.pack(508, lib.EB_REFUSED),
        frames.HEADER.pack(0xFFFFFFFF, lib.EB_SPAWNED),
    ],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_malformed_reply(
    ends: tuple[socket.socket, Connection], reply: bytes, interrupted: bool
) -> None:
    theirs, connection = ends
    theirs.sendall(reply)
    if interrupted:
        connection.sock.recv_into(connection._buffer)
    for _ in range(2):
        with pytest.raises(ProtocolError):
            connection.receive(0.0)
