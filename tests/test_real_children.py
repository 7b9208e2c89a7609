"""The children are the caller's own, whoever asks."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest
from conftest import compare_scripts, run_script


def test_parent_of_the_child_is_the_caller(subprocess: Any) -> None:
    assert int(subprocess.check_output("echo $PPID", shell=True)) == os.getpid()


def test_psutil_lists_the_child(subprocess: Any) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert process.pid in [child.pid for child in psutil.Process().children()]
        assert psutil.Process(process.pid).ppid() == os.getpid()


@pytest.mark.parametrize("command", ["exit 3", "kill -9 $$"])
def test_waitpid(subprocess: Any, command: str) -> None:
    process = subprocess.Popen(command, shell=True)
    pid, status = os.waitpid(process.pid, 0)
    assert pid == process.pid
    assert os.waitstatus_to_exitcode(status) == (3 if "exit" in command else -9)
    # Somebody else has it, so that the module can't know better.
    assert process.wait() == 0


def test_wait4_and_its_resource_usage(subprocess: Any) -> None:
    process = subprocess.Popen(["head", "-c", "100000000", "/dev/zero"], stdout=subprocess.DEVNULL)
    pid, status, usage = os.wait4(process.pid, 0)
    assert (pid, status) == (process.pid, 0)
    assert usage.ru_utime + usage.ru_stime > 0
    process.wait()


@pytest.mark.parametrize("kind", ["P_PID", "P_PIDFD", "P_PGID"])
def test_waitid(subprocess: Any, kind: str) -> None:
    process = subprocess.Popen(["sh", "-c", "read x; exit 5"], stdin=subprocess.PIPE,
                               start_new_session=True)  # fmt: skip
    pidfd = os.pidfd_open(process.pid)
    process.stdin.close()
    number = pidfd if kind == "P_PIDFD" else process.pid
    # The group exists only when the child has made it, which is before its exec.
    result = os.waitid(getattr(os, kind), number, os.WEXITED | os.WNOWAIT)
    assert result is not None
    assert (result.si_pid, result.si_code, result.si_status) == (process.pid, os.CLD_EXITED, 5)
    assert process.wait() == 5
    os.close(pidfd)


def test_stop_and_continue_are_reported(subprocess: Any) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        _, status = os.waitpid(process.pid, os.WCONTINUED)
        assert os.WIFCONTINUED(status)


def test_sigchld_tells_pid_and_status() -> None:
    source = """
        start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        process = subprocess.Popen(["sh", "-c", "exit 7"])
        info = signal.sigwaitinfo([signal.SIGCHLD])
        more = signal.sigtimedwait([signal.SIGCHLD], 0)
        seen = [info.si_pid == process.pid, info.si_code == os.CLD_EXITED, info.si_status]
        report([*seen, more, process.wait()])
    """
    assert compare_scripts(source) == [True, True, 7, None, 7]


def test_sigchld_handler_runs_once_for_each_child() -> None:
    source = """
        start()
        reaped = []
        def reap(number, frame):
            reaped.append(os.waitpid(process.pid, 0)[0])

        signal.signal(signal.SIGCHLD, reap)
        count = 0
        for _ in range(20):
            process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            process.stdin.close()
            while not reaped:
                signal.pause()
            count += reaped.pop() == process.pid
            process.wait()
        report(count)
    """
    assert compare_scripts(source) == 20


def test_any_child_is_the_command_while_the_helper_lives() -> None:
    source = """
        start()
        process = subprocess.Popen(["sh", "-c", "exit 9"])
        pid, status = os.wait()
        report([pid == process.pid, os.waitstatus_to_exitcode(status)])
    """
    assert compare_scripts(source) == [True, 9]


@pytest.mark.slow
def test_resource_usage_of_children_grows() -> None:
    source = """
        start()
        burn = "import time\\nwhile time.process_time() < 0.3: pass"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-I", "-S", "-c", burn], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = [after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime]
        report(sum(spent) > 0.2)
    """
    assert compare_scripts(source) is True


def test_child_outlives_the_helper() -> None:
    source = """
        start()
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        getattr(subprocess, "stop", lambda: None)()
        report([process.poll(), process.communicate(b"still here")[0].decode(), process.wait()])
    """
    assert compare_scripts(source) == [None, "still here", 0]


def test_process_times_of_the_child_start_at_nought(subprocess: Any) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        child = psutil.Process(process.pid)
        assert time.time() - child.create_time() < 30
        assert child.cpu_times().user + child.cpu_times().system < 1


@pytest.mark.slow
@pytest.mark.usefixtures("by_helper")
def test_peak_memory_of_a_child_is_its_own_under_a_caller_of_1_gib() -> None:
    source = """
        import mmap
        start()
        # The same 64 MiB, mapped again and again: resident memory counts the mappings.
        file = os.memfd_create("memory")
        os.ftruncate(file, 64 << 20)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        mappings = [mmap.mmap(file, 64 << 20, flags=flags) for _ in range(16)]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >= 1 << 20
        process = subprocess.Popen(["/bin/true"])
        _, status, usage = os.wait4(process.pid, 0)
        report([status, usage.ru_maxrss])
    """
    status, kibibytes = run_script(source)
    assert status == 0
    assert kibibytes < 10 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["errand_boy", "errand_boy-helper"])
def test_signal_that_dumps_core_before_the_exec_ends_the_child_alone(implementation: str) -> None:
    source = """
    start()
    before = helper_pid()
    others = {before, None}
    path = "/-:" * 50_000 + "/bin"  # the exec takes hundredths of a second
    ends = []

    def run():
        ends.append(subprocess.run(["sleep", "100"], env={"PATH": path}).returncode)

    for number in (signal.SIGQUIT, signal.SIGXCPU):
        thread = threading.Thread(target=run)
        thread.start()
        pids = []
        while not pids:
            with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
                main = file.read().split()
            with open(f"/proc/{os.getpid()}/task/{thread.native_id}/children") as file:
                pids = [int(pid) for pid in main + file.read().split() if int(pid) not in others]
        os.kill(pids[0], number)
        thread.join()
    assert subprocess.run(["true"]).returncode == 0
    report([ends, helper_pid() == before])
    """
    ends, same_helper = run_script(source, implementation)
    assert same_helper
    # Linux before 5.16, where it would end all that share the memory, has SIGKILL in its place.
    for number, end in zip((signal.SIGQUIT, signal.SIGXCPU), ends, strict=True):
        assert end in (-number, -signal.SIGKILL)
