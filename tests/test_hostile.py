"""What callers do to themselves and the helper: forks, signals, closed descriptors, sudden ends."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import compare_scripts, run_script, started_script
from guard import Guard

# Also part of the scripts below.
ENDED = '''
def ended(pid, seconds=20):
    """Wait for the end of a process by pidfd, reaped or not; it may be gone already."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)

def children():
    import psutil
    return [child.pid for child in psutil.Process().children()]

def only_helper_left(seconds=20):
    """Whether all other children end and are reaped, as starting the next command does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        subprocess.run(["true"], check=True)
        others = [pid for pid in children() if pid != helper_pid()]
        if not others:
            return True
        ended(others[0], 1)
    return False
'''
pytestmark = pytest.mark.usefixtures("by_helper")

namespace: dict[str, Any] = {"os": os, "select": select}
exec(ENDED, namespace)
ended = namespace["ended"]


@pytest.mark.slow
def test_many_threads_start_at_once(subprocess: Any) -> None:
    barrier = threading.Barrier(32)
    wrong: list[object] = []

    def start(number: int) -> None:
        barrier.wait()
        for turn in range(10):
            text = f"{number} {turn}"
            out = subprocess.run(["echo", text], capture_output=True, text=True)
            if (out.returncode, out.stdout, out.stderr) != (0, f"{text}\n", ""):
                wrong.append(out)

    threads = [threading.Thread(target=start, args=[number]) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_first_start_in_many_threads_makes_one_helper() -> None:
    source = f"""{ENDED}
barrier = threading.Barrier(32)
def run():
    barrier.wait()
    subprocess.run(["true"], check=True)

threads = [threading.Thread(target=run) for _ in range(32)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report(children() == [helper_pid()])
"""
    assert run_script(source) is True


# Forks


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with a live child"])
def test_forked_process_gets_its_own_helper(fork: str, busy: bool) -> None:
    """A raw fork does not run Python's handlers."""
    source = f"""{ENDED}
start()
subprocess.run(["true"], check=True)
before = helper_pid()
live = subprocess.Popen(["cat"], stdin=subprocess.PIPE) if {busy} else None
r, w = os.pipe()
pid = {fork}()
if pid == 0:
    parent = int(subprocess.check_output(["sh", "-c", "echo $PPID"]))
    own = helper_pid()
    seen = [parent == os.getpid(), own != before, children() == [own]]
    os.write(w, json.dumps(seen).encode())
    os._exit(0)
os.close(w)
subprocess.run(["true"], check=True)
with open(r) as stream:
    seen = json.load(stream)
os.waitpid(pid, 0)
parent = int(subprocess.check_output(["sh", "-c", "echo $PPID"]))
if live:
    live.communicate()
report([*seen, parent == os.getpid(), helper_pid() == before])
"""
    assert run_script(source) == [True] * 5


@pytest.mark.slow
def test_fork_while_other_threads_start_commands() -> None:
    source = """
        start()
        over = threading.Event()
        def work():
            while not over.is_set():
                subprocess.run(["true"], check=True)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        codes = []
        warnings.simplefilter("ignore")
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                code = 3
                try:
                    subprocess.run(["true"], check=True)
                    code = 0
                finally:
                    os._exit(code)
            codes.append(os.waitpid(pid, 0)[1])
        over.set()
        for thread in threads:
            thread.join()
        report(codes)
    """
    assert run_script(source) == [0] * 30


# The helper's misfortunes


@pytest.mark.parametrize("reaped", ["nobody", "by somebody else", "by the kernel"])
def test_helper_killed_while_idle(reaped: str) -> None:
    source = f"""{ENDED}
reaped = sys.argv[2]
if reaped == "by the kernel":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
start()
before = helper_pid()
os.kill(before, signal.SIGKILL)
if reaped == "by somebody else":
    os.waitpid(before, 0)
else:
    ended(before)
out = subprocess.check_output(["echo", "fine"]).decode()
report([out, helper_pid() != before, children() == [helper_pid()]])
"""
    assert run_script(source, args=[reaped]) == ["fine\n", True, True]


def test_helper_killed_again_and_again() -> None:
    source = f"""{ENDED}
descriptors = lambda: sorted(os.listdir("/proc/self/fd"))
start()
subprocess.run(["true"], check=True)
before = descriptors()
for _ in range(30):
    os.kill(helper_pid(), signal.SIGKILL)
    subprocess.run(["true"], check=True)
report([only_helper_left(), descriptors() == before])
"""
    assert run_script(source) == [True, True]


def test_helper_killed_where_sigpipe_has_its_default_action() -> None:
    """Programs that write to pipes set it. Writing to the dead helper must not end the program."""
    source = f"""{ENDED}
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(300)]  # a longer way to send
for passed in [], descriptors:
    subprocess.run(["true"], check=True)
    os.kill(helper_pid(), signal.SIGKILL)
    ended(helper_pid())
    subprocess.run(["true"], pass_fds=passed, check=True)
report("alive")
"""
    assert run_script(source) == "alive"


def test_helper_killed_with_a_live_child() -> None:
    source = f"""{ENDED}
process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
os.kill(helper_pid(), signal.SIGKILL)
ended(helper_pid())
report([process.communicate(b"alive")[0].decode(), process.returncode])
"""
    assert run_script(source) == ["alive", 0]


@pytest.mark.root
@pytest.mark.parametrize("count", [1, 5])
def test_helper_killed_while_it_starts_commands(count: int, tmp_path: Path) -> None:
    program = Path(shutil.copy("/bin/sh", tmp_path / "slow"))
    lines = tmp_path / "lines"
    lines.touch()
    source = f"""{ENDED}
program, lines, count = sys.argv[2], sys.argv[3], int(sys.argv[4])
outcomes = []
def run(mark):
    try:
        subprocess.run([program, "-c", f"echo {{mark}} >> {{lines}}"], check=True)
        outcomes.append("done")
    except subprocess.HelperDiedError as error:
        outcomes.append("died" if isinstance(error, OSError) else "not an OSError")

start()
before = helper_pid()
threads = [threading.Thread(target=run, args=[mark]) for mark in range(count)]
for thread in threads:
    thread.start()
sys.stdin.readline()
os.kill(before, signal.SIGKILL)
ended(before)
# Held up by nobody, though what the old helper was starting is still being held.
print(subprocess.check_output(["echo", "fine"]).decode(), end="", flush=True)
for thread in threads:
    thread.join()
run("last")
report([outcomes, helper_pid() != before])
"""
    with (
        Guard(program) as guard,
        started_script(source, args=[program, lines, count]) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        pids = [guard.held() for _ in range(count)]
        process.stdin.write("kill\n")
        process.stdin.flush()
        assert process.stdout.readline() == "fine\n"
        assert not any(ended(pid, 0) for pid in pids)
        for _ in pids:
            guard.release()
        assert all(ended(pid) for pid in pids)
        guard.held()
        guard.release()
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out) == [["died"] * count + ["done"], True]
    marks = lines.read_text().split()
    assert marks[-1] == "last"
    assert len(marks) == len(set(marks))


@pytest.mark.slow
def test_helper_stopped_and_continued() -> None:
    source = """
        start()
        os.kill(helper_pid(), signal.SIGSTOP)
        os.waitid(os.P_PID, helper_pid(), os.WSTOPPED | os.WNOWAIT)
        seen = []
        thread = threading.Thread(
            target=lambda: seen.append(subprocess.check_output(["echo", "late"]).decode())
        )
        thread.start()
        thread.join(0.2)
        waits = thread.is_alive()
        before = helper_pid()
        os.kill(before, signal.SIGCONT)
        thread.join()
        report([waits, seen, helper_pid() == before])
    """
    assert run_script(source) == [True, ["late\n"], True]


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGUSR1"])
def test_signal_sent_to_the_whole_group_spares_the_helper(name: str) -> None:
    source = f"""
        os.setpgid(0, 0)
        start()
        before = helper_pid()
        signal.signal(signal.{name}, lambda *args: None)
        os.kill(0, signal.{name})
        subprocess.run(["true"], check=True)
        report(helper_pid() == before)
    """
    assert run_script(source) is True


# Descriptors closed and replaced under us


def test_all_descriptors_closed() -> None:
    source = f"""{ENDED}
start()
before = helper_pid()
for _ in range(3):
    os.closerange(3, 1000)
    out = subprocess.check_output(["echo", "fine"]).decode()
    assert out == "fine\\n", out
report([only_helper_left(), children() == [helper_pid()]])
"""
    assert run_script(source) == [True, True]


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_all_descriptors_closed_while_a_forked_process_has_copies(fork: str) -> None:
    """If a program forks workers and becomes a daemon, the old helper sees no end."""
    source = f"""{ENDED}
start()
subprocess.run(["true"], check=True)
before = helper_pid()
read, write = os.pipe()
worker = {fork}()
if worker == 0:
    os.close(write)
    os.read(read, 1)
    os._exit(0)
os.dup2(write, 2000, inheritable=False)
os.closerange(3, 2000)
out = subprocess.check_output(["echo", "fine"]).decode()
gone = ended(before)
subprocess.run(["true"], check=True)
left = [pid for pid in children() if pid not in (worker, helper_pid())]
subprocess.stop()
os.close(2000)
os.waitpid(worker, 0)
report([out, gone, left])
"""
    assert run_script(source) == ["fine\n", True, []]


REPLACED = """
def replace(targets, replacement):
    for number in targets:
        os.dup2(replacement, number)

def open_descriptors():
    found = []
    for number in range(3, 1000):
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(number)
    return found
"""


def test_all_descriptors_replaced_by_a_file(tmp_path: Path) -> None:
    source = f"""{ENDED}{REPLACED}
start()
subprocess.run(["true"], check=True)
targets = open_descriptors()
assert targets
file = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
replace(targets, file)
out = subprocess.check_output(["echo", "fine"]).decode()
same = all(os.path.samestat(os.fstat(number), os.fstat(file)) for number in targets)
offset = os.lseek(file, 0, os.SEEK_CUR)
report([out, same, offset, os.fstat(file).st_size, only_helper_left()])
"""
    assert run_script(source, args=[tmp_path / "file"]) == ["fine\n", True, 0, 0, True]


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_SEQPACKET", "SOCK_DGRAM"])
def test_all_descriptors_replaced_by_a_socket(kind: str) -> None:
    source = f"""{ENDED}{REPLACED}
start()
subprocess.run(["true"], check=True)
targets = open_descriptors()
assert targets
ours, other = socket.socketpair(socket.AF_UNIX, socket.{kind})
replace(targets, ours.fileno())
out = subprocess.check_output(["echo", "fine"]).decode()
subprocess.run(["true"], check=True)
same = all(os.path.samestat(os.fstat(n), os.fstat(ours.fileno())) for n in targets)
other.setblocking(False)
try:
    received = other.recv(100).decode(errors="replace")
except BlockingIOError:
    received = "nothing"
report([out, same, received, only_helper_left()])
"""
    assert run_script(source) == ["fine\n", True, "nothing", True]


def test_descriptors_replaced_one_at_a_time(tmp_path: Path) -> None:
    source = f"""{ENDED}{REPLACED}
start()
subprocess.run(["true"], check=True)
file = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
for number in open_descriptors():
    if number == file:
        continue
    os.dup2(file, number)
    assert subprocess.check_output(["echo", "fine"]) == b"fine\\n"
    assert os.path.samestat(os.fstat(number), os.fstat(file))
report([os.fstat(file).st_size, only_helper_left()])
"""
    assert run_script(source, args=[tmp_path / "file"]) == [0, True]


def test_descriptors_swapped_with_each_other() -> None:
    source = f"""{ENDED}{REPLACED}
start()
processes = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(3)]
for process in processes:
    process.communicate()
subprocess.run(["true"], check=True)
numbers = open_descriptors()
copies = [os.dup(number) for number in numbers]
for number, copy in zip(numbers, reversed(copies)):
    os.dup2(copy, number)
for copy in copies:
    os.close(copy)
report([subprocess.check_output(["echo", "fine"]).decode(), only_helper_left()])
"""
    assert run_script(source) == ["fine\n", True]


# A terminal


@pytest.mark.parametrize(
    ("key", "number"),
    [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)],
    ids=["^C", "^backslash"],
)
@pytest.mark.parametrize("implementation", ["subprocess", "errand_boy"])
def test_key_reaches_the_child_and_not_the_helper(
    implementation: str, key: bytes, number: int
) -> None:
    source = """
        import termios
        number, terminal = map(int, sys.argv[2:])
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        start()
        before = helper_pid()
        signal.signal(number, lambda *args: None)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        print("ready", flush=True)
        code = process.wait()
        after = subprocess.check_output(["echo", "fine"]).decode()
        report([code, after, helper_pid() == before])
    """
    master, slave = os.openpty()
    try:
        with started_script(
            source, implementation, [int(number), slave], start_new_session=True, pass_fds=[slave]
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            os.write(master, key)
            out, err = process.communicate()
        assert out == f'[-{int(number)}, "fine\\n", true]\n', err
    finally:
        os.close(master)
        os.close(slave)


def test_suspend_key_stops_the_child_and_not_the_helper() -> None:
    source = """
        import termios
        terminal = int(sys.argv[2])
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        start()
        before = helper_pid()
        # The group of a session's leader is orphaned, so that the key does not stop it.
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)
            os.waitpid(pid, 0)
            sys.exit()
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.tcsetpgrp(terminal, os.getpgrp())
        signal.signal(signal.SIGTSTP, lambda *args: None)
        start()
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        print("ready", flush=True)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        after = subprocess.check_output(["echo", "fine"]).decode()
        os.kill(process.pid, signal.SIGCONT)
        process.communicate()
        report([os.WIFSTOPPED(status), after, helper_pid() != before])
    """
    master, slave = os.openpty()
    try:
        with started_script(
            source, args=[slave], start_new_session=True, pass_fds=[slave]
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            os.write(master, b"\x1a")
            out, err = process.communicate()
        assert out == '[true, "fine\\n", true]\n', err
    finally:
        os.close(master)
        os.close(slave)


# The caller's end

ENDS = {
    "the last line": "",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise ValueError",
    "os._exit": "os._exit(3)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "abort": "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()",
    "execv": "os.execv('/bin/cat', ['cat'])",
}

ENDING = """
start()
subprocess.run(["true"], check=True)
kind, live = sys.argv[3:]
if live == "live child":
    child = subprocess.Popen(["cat"], stdin=int(sys.argv[2]), stdout=subprocess.DEVNULL)
elif live == "forked process":
    child_pid = os.fork()
    if child_pid == 0:
        os.read(int(sys.argv[2]), 1)
        os._exit(0)
print(helper_pid(), child.pid if live == "live child" else 0, flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "live"),
    [
        (kind, live)
        for kind in ENDS
        for live in ("nothing", "live child", "forked process")
        # There, the new program has the caller's pid, and the forked process its connections.
        if (kind, live) != ("execv", "forked process")
    ],
)
def test_helper_ends_with_its_caller(kind: str, live: str) -> None:
    r, w = os.pipe()
    source = ENDING + ENDS[kind]
    try:
        with started_script(source, args=[r, kind, live], pass_fds=[r]) as process:
            assert process.stdin is not None and process.stdout is not None
            helper, child = map(int, process.stdout.readline().split())
            pidfd = os.pidfd_open(helper)
            try:
                process.stdin.write("end\n")
                process.stdin.flush()
                assert select.select([pidfd], [], [], 10)[0]
                if child:
                    assert psutil.Process(child).status() != psutil.STATUS_ZOMBIE
            finally:
                os.close(pidfd)
    finally:
        os.close(r)
        os.close(w)


def test_end_of_the_thread_that_started_the_helper_does_not_end_it() -> None:
    source = """
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        before = helper_pid()
        out = subprocess.check_output(["echo", "fine"]).decode()
        report([out, helper_pid() == before])
    """
    assert run_script(source) == ["fine\n", True]


def test_main_thread_ends_before_another_that_starts_commands() -> None:
    source = """
        start()
        before = helper_pid()
        def go_on():
            threading.main_thread().join()
            out = subprocess.check_output(["echo", "fine"]).decode()
            report([out, helper_pid() == before])
        threading.Thread(target=go_on).start()
    """
    assert compare_scripts(source.replace("helper_pid()", "None")) == ["fine\n", True]
    assert run_script(source) == ["fine\n", True]


# Odd moments


@pytest.mark.slow
def test_start_in_a_signal_handler() -> None:
    """The handler also interrupts starts, in any state."""
    source = f"""{ENDED}
start()
handled = 0
def handle(number, frame):
    global handled
    assert subprocess.check_output(["echo", "handler"]) == b"handler\\n"
    handled += 1

signal.signal(signal.SIGALRM, handle)
for turn in range(300):
    # Once in each turn. A timer that goes on would leave a slow machine no time for anything else.
    signal.setitimer(signal.ITIMER_REAL, 0.0001 + turn * 0.00001)
    assert subprocess.check_output(["echo", str(turn)]) == b"%d\\n" % turn
assert handled
signal.setitimer(signal.ITIMER_REAL, 0)
report(only_helper_left())
"""
    assert run_script(source) is True


@pytest.mark.slow
def test_first_start_of_all_in_a_signal_handler_during_another() -> None:
    source = f"""{ENDED}
handled = 0
def handle(number, frame):
    global handled
    signal.signal(number, signal.SIG_IGN)
    subprocess.run(["true"], check=True)
    handled += 1

for turn in range(400):
    subprocess.stop()
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0001 + turn * 0.000005)
    subprocess.run(["true"], check=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
report(only_helper_left())
"""
    assert run_script(source) is True


@pytest.mark.parametrize("order", ["registered first", "registered last"])
@pytest.mark.parametrize("implementation", ["subprocess", "errand_boy"])
def test_start_at_exit(order: str, implementation: str) -> None:
    source = """
        import atexit
        def last():
            report(subprocess.check_output(["echo", "at exit"]).decode())
        if sys.argv[2] == "registered first":
            del sys.modules[sys.argv[1]]
            for name in [name for name in sys.modules if name.startswith("errand_boy.")]:
                del sys.modules[name]
            atexit._clear()
            atexit.register(last)
            subprocess = importlib.import_module(sys.argv[1])
        else:
            atexit.register(last)
        subprocess.run(["true"], check=True)
    """
    assert run_script(source, implementation, [order]) == "at exit\n"


@pytest.mark.root
def test_interrupt_while_starting_leaves_no_lost_child(tmp_path: Path) -> None:
    program = Path(shutil.copy("/bin/true", tmp_path / "slow"))
    source = f"""{ENDED}
start()
print("starting", flush=True)
try:
    subprocess.run([sys.argv[2]])
    outcome = "done"
except KeyboardInterrupt:
    outcome = "interrupted"
report([outcome, only_helper_left()])
"""
    with Guard(program) as guard, started_script(source, args=[program]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        pid = guard.held()
        process.send_signal(signal.SIGINT)
        guard.release()
        out, err = process.communicate()
        assert ended(pid)
    assert out == '["interrupted", true]\n', err


@pytest.mark.slow
def test_interrupts_at_random_moments_lose_no_child() -> None:
    """The standard library loses one if the signal comes during its fork_exec."""
    source = f"""{ENDED}
import random
start()
subprocess.run(["true"])
interrupted = 0
inside = False
def interrupt(number, frame):
    global inside
    if inside:
        inside = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
for _ in range(300):
    try:
        inside = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.002))
        subprocess.Popen(["true"]).wait()
        inside = False
    except KeyboardInterrupt:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
assert interrupted
report(only_helper_left())
"""
    assert run_script(source) is True


@pytest.mark.slow
def test_interrupt_while_the_helper_is_stopped_runs_nothing_twice(tmp_path: Path) -> None:
    """The handler's own commands are served afterwards, when the helper continues."""
    lines = tmp_path / "lines"
    lines.touch()
    source = f"""{ENDED}
class Interrupted(Exception):
    pass

def interrupt(number, frame):
    os.kill(helper_pid(), signal.SIGCONT)
    raise Interrupted

start()
subprocess.run(["true"], check=True)
os.kill(helper_pid(), signal.SIGSTOP)
os.waitid(os.P_PID, helper_pid(), os.WSTOPPED | os.WNOWAIT)
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    subprocess.run(["sh", "-c", "echo x >> " + sys.argv[2]])
    outcome = "done"
except Interrupted:
    outcome = "interrupted"
report([outcome, only_helper_left()])
"""
    assert run_script(source, args=[lines]) == ["interrupted", True]
    assert lines.read_text() in ("", "x\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manager", "run"),
    [
        ("launcher", "subprocess.run(command, input=text, capture_output=True)"),
        ("runner", "next(subprocess.map([command], input=text))"),
        ("runner", "subprocess.run(command, input=text, capture_output=True, tree='all')"),
    ],
)
def test_commands_of_a_helper_that_holds_many_descriptors(manager: str, run: str) -> None:
    """If a table is too large to copy, a new process gets reserved numbers instead."""
    source = f"""
from errand_boy._process import helper
from errand_boy._wire import frames as protocol
from errand_boy._native import lib

start()
list(subprocess.map([["true"]]))
it = helper.{manager}.current
fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(250)]
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
lines = [it.connect() for _ in range(6)]
for line in lines:  # half a frame, with descriptors that the helper keeps for the other half
    line.sock.sendmsg([protocol.HEADER.pack(1000, lib.EB_SPAWN)], rights)
while len(os.listdir(f"/proc/{{it.pid}}/fd")) < 1500:
    pass

script = "cat; ls /proc/self/fd; readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2 | uniq | wc -l"
wrong = []
for number in range(50):
    text = str(number).encode()
    command = ["sh", "-c", script]
    done = {run}
    if done.stdout.split() != [text + b"0", *b"1 2 3 3".split()] or done.stderr:
        wrong.append(repr(done))
try:
    subprocess.run(["/nowhere/nothing"])
except FileNotFoundError:
    pass
listing = ["ls", "/proc/self/fd"]
many = subprocess.run(listing, pass_fds=fds[:20], capture_output=True).stdout.split()
here = subprocess.run(["pwd"], cwd="/usr", capture_output=True).stdout
report([wrong, len(many), here.decode()])
"""
    wrong, many, here = run_script(source)
    assert wrong == []
    assert many == 24
    assert here == "/usr\n"
