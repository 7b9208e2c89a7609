"""What ends a helper and what doesn't. No command may be lost or run twice."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from conftest import PRELUDE, run_script, script_environment
from guard import Guard

import errand_boy

pytestmark = pytest.mark.usefixtures("by_helper")

ENDED = """
from errand_boy._process import helper

def ended(pidfd):
    return bool(select.select([pidfd], [], [], 10.0)[0])
"""

# -- SIGTERM --


@pytest.mark.parametrize("manager", ["launcher", "runner"])
def test_sigterm_ends_a_helper_at_rest_and_the_next_command_starts_another(manager: str) -> None:
    source = f"""{ENDED}
def run():
    subprocess.run(["true"], check=True)
    next(subprocess.map([["true"]])).check_returncode()

start()
run()
before = helper.{manager}.current
pidfd = os.pidfd_open(before.pid)
os.kill(before.pid, signal.SIGTERM)
seen = [ended(pidfd)]
run()
report([*seen, helper.{manager}.current is not before])
"""
    assert run_script(source) == [True, True]


def test_who_ends_all_children_of_a_process_can_wait_for_them(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    source = """
import psutil

start()
sleeper = subprocess.Popen(["sleep", "60"])
commands = [["true"], ["sh", "-c", f"echo > {sys.argv[2]}; exec sleep 60"]]
results = subprocess.map(commands, max_workers=2)
next(results)
open(sys.argv[2]).read()
children = psutil.Process().children(recursive=True)
for child in children:
    child.terminate()
_, alive = psutil.wait_procs(children, timeout=20)
done = next(results)
report([len(children), len(alive), sleeper.wait(), done.returncode])
"""
    # Two helpers, and two that sleep.
    # psutil knows the exit status of this process's own children.
    assert run_script(source, args=[fifo]) == [4, 0, 0, -signal.SIGTERM]


def test_command_of_a_helper_that_is_told_to_end_goes_on() -> None:
    """It is the helper's own child here, which needs it for input, output and exit status."""
    script = "kill -TERM $PPID; wc -c; exit 3"
    source = f"""{ENDED}
start()
next(subprocess.map([["true"]])).check_returncode()
before = helper.runner.current
results = subprocess.map([["sh", "-c", {script!r}], ["true"]], input=bytes(1 << 20), max_workers=1)
done = next(results)
seen = [int(done.stdout), done.returncode, next(results).returncode]
report([*seen, helper.runner.current is not before])
"""
    assert run_script(source) == [1 << 20, 3, 0, True]


@pytest.mark.root
def test_start_in_progress_is_brought_to_its_end(tmp_path: Path) -> None:
    slow = Path(shutil.copy("/bin/true", tmp_path / "slow"))
    status: list[int] = []
    errand_boy.stop()
    errand_boy.start()
    pid = errand_boy.helper_pid()
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    with Guard(slow) as guard:
        thread = threading.Thread(target=lambda: status.append(errand_boy.run([slow]).returncode))
        thread.start()
        guard.held()
        os.kill(pid, signal.SIGTERM)
        for _ in range(2):  # the first may still be in time
            assert errand_boy.run(["true"]).returncode == 0
        assert errand_boy.helper_pid() != pid
        assert not select.select([pidfd], [], [], 0)[0]
        guard.release()
        thread.join()
    assert status == [0]
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    errand_boy.stop()


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["threads", "map", "map with input"])
def test_each_command_runs_once_whenever_sigterm_comes(front_end: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = f"""{ENDED}
log, count = sys.argv[2], 300
over = threading.Event()
terminated = set()

def terminate():
    while not over.wait(0.003):
        for manager in helper.launcher, helper.runner:
            current = manager.current
            if current is not None:
                try:
                    os.kill(current.pid, signal.SIGTERM)
                    terminated.add(current.pid)
                except ProcessLookupError:
                    pass

def command(n):
    return ["sh", "-c", f"echo {{n}} >> {{log}}"]

def some(first):
    for n in range(first, count, 4):
        assert subprocess.run(command(n)).returncode == 0

start()
killer = threading.Thread(target=terminate)
killer.start()
front_end = {front_end!r}
if front_end == "threads":
    failures = []
    def run_and_keep(first):
        try:
            some(first)
        except BaseException as error:
            failures.append(repr(error))
    threads = [threading.Thread(target=run_and_keep, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
else:
    data = b"some input" if "input" in front_end else None
    commands = (command(n) for n in range(count))
    results = subprocess.map(commands, input=data, max_workers=4)
    failures = [repr(done.error) for done in results if done.returncode or done.error]
over.set()
killer.join()
subprocess.stop()
report([failures, len(terminated)])
"""
    failures, terminated = run_script(source, args=[log])
    assert failures == []
    assert terminated > 3
    runs = Counter(map(int, log.read_text().split()))
    assert [runs[n] for n in range(300)] == [1] * 300


# -- the terminal --


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP])
def test_what_the_terminal_sends_to_its_foreground_group_does_not_touch_a_helper(
    number: signal.Signals,
) -> None:
    """Keys are typed at a separate terminal; SIGHUP comes from that terminal's end."""
    source = f"""{ENDED}
import termios

def take(signum, frame):
    seen.append(signum)

seen, out = [], os.fdopen(int(sys.argv[2]), "w")
signal.signal({int(number)}, take)
start()
subprocess.run(["true"], check=True)
next(subprocess.map([["true"]])).check_returncode()
before = [helper.launcher.current, helper.runner.current]
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.tcsetpgrp(0, os.getpgrp())
groups = [os.getpgid(it.pid) == os.getpgrp() for it in before]
print("ready", flush=True, file=out)
while not seen:
    signal.pause()
subprocess.run(["true"], check=True)
next(subprocess.map([["true"]])).check_returncode()
states = [open(f"/proc/{{it.pid}}/stat").read().rpartition(") ")[2][0] for it in before]
same = [helper.launcher.current, helper.runner.current] == before
print(json.dumps([seen, same, groups, "T" in states]), flush=True, file=out)
"""
    master, terminal = pty.openpty()
    read, write = os.pipe()
    command = [sys.executable, "-c", PRELUDE + source, "errand_boy", str(write)]
    with subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        pass_fds=[write],
        start_new_session=True,
        env=script_environment(),
        text=True,
    ) as process:
        os.close(write)
        os.close(terminal)
        with os.fdopen(read) as lines:
            ready = lines.readline()
            if number == signal.SIGHUP:
                os.close(master)
            elif ready:
                keys = {signal.SIGINT: b"\x03", signal.SIGQUIT: b"\x1c", signal.SIGTSTP: b"\x1a"}
                os.write(master, keys[number])
            report = lines.readline()
        if number != signal.SIGHUP:
            os.close(master)
        _, errors = process.communicate()
    assert report == f"[[{int(number)}], true, [true, true], false]\n", errors


# -- stop() --


@pytest.mark.root
@pytest.mark.parametrize("used", ["run", "map", "map with a live command", "map closed"])
def test_set_user_id_program_after_stop_has_its_rights(used: str, public_dir: Path) -> None:
    """Linux ignores the bit while another process shares the working directory."""
    program = Path(shutil.copy("/usr/bin/id", public_dir / "id"))
    program.chmod(0o4755)
    if os.statvfs(program).f_flag & os.ST_NOSUID:
        pytest.skip("set-user-ID programs do not work in the temporary directory")
    source = """
import errand_boy._map.map  # where it is, the others may read nothing

program, used = sys.argv[2:]
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
start()
subprocess.run(["true"], check=True)
if used != "run":
    results = subprocess.map([["true"], ["sleep", "60"]][: 1 + (used != "map")], max_workers=2)
    next(results).check_returncode()
    if used == "map":
        assert list(results) == []
    elif used == "map closed":
        results.close()
subprocess.stop()
os.execv(program, [program, "-u"])
"""
    for _ in range(10):
        assert run_script(source, args=[program, used]) == 0


def test_stop_while_other_threads_start_commands() -> None:
    source = """
        stopped = threading.Event()
        failures = []
        def work():
            try:
                while not stopped.is_set():
                    subprocess.run(["true"], check=True)
            except BaseException as error:
                failures.append(repr(error))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(200):
                subprocess.stop()
        finally:
            stopped.set()
        for thread in threads:
            thread.join()
        report(failures)
    """
    assert run_script(source) == []


def test_stop_waits_for_the_end_of_helpers_whose_commands_are_over() -> None:
    source = """
import psutil

start()
subprocess.run(["true"], check=True)
results = subprocess.map([["true"], ["true"]], max_workers=2)
next(results), next(results)  # and still it has its connections
before = len(psutil.Process().children())
subprocess.stop()
report([before, len(psutil.Process().children()), next(results, "over")])
"""
    assert run_script(source) == [2, 0, "over"]


def test_helper_with_a_live_command_shares_nothing_after_stop(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    source = f"""{ENDED}
os.chdir("/")
results = subprocess.map([["cat", sys.argv[2]], ["true"]], max_workers=2, ordered=False)
next(results)
it = helper.runner.current
pidfd = os.pidfd_open(it.pid)
cwd = lambda: os.readlink(f"/proc/{{it.pid}}/cwd")
os.chdir("/usr")
seen = [cwd()]
helper._GRACE = 1000.0  # it is not needed
subprocess.stop()
os.chdir("/etc")
seen.append(cwd())
subprocess.stop()
with open(sys.argv[2], "w") as file:
    file.write("to the end")
seen.append(next(results).stdout.decode())
report([*seen, ended(pidfd), subprocess.run(["true"]).returncode])
"""
    seen = run_script(source, args=[fifo])
    assert seen == ["/usr", "/usr", "to the end", True, 0]
