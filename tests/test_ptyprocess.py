"""ptyprocess, pexpect and pty.spawn without a fork, and their own tests."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import find_program, has_ended, run_script, script_environment, started_script, until

pytest.importorskip("ptyprocess", reason="needs the package pexpect")
pytest.importorskip("pexpect", reason="needs the package pexpect")
ours: Any = importlib.import_module("errand_boy.ptyprocess")

RUN = Path(__file__).parent / "pty_suites" / "run.py"
NOT_INSTALLED = 77
LONGEST_SUITE = 400

NO_FORK = """
    import warnings
    def refuse(event, args):
        if event in ("os.fork", "os.forkpty"):
            raise AssertionError(event)
    sys.addaudithook(refuse)
"""


def read_all(process: Any) -> Any:
    parts = []
    while True:
        try:
            parts.append(process.read())
        except EOFError:
            return type(parts[0])().join(parts) if parts else b""


def test_program_has_a_terminal_and_session(tmp_path: Path) -> None:
    find_program("ps", "procps")
    script = "tty; stty size; pwd; echo $A; stty -a | grep -o -e '-echo '; ps -o sid=,tpgid= -p $$"
    environment = {**os.environ, "A": "b"}
    process = ours.PtyProcess.spawn(
        ["sh", "-c", script], cwd=str(tmp_path), env=environment, echo=False, dimensions=(10, 20)
    )
    tty, *rest, ids = read_all(process).splitlines()
    assert tty.startswith(b"/dev/pts/")
    assert rest == [b"10 20", os.fsencode(tmp_path), b"b", b"-echo "]
    assert set(map(int, ids.split())) == {process.pid}
    assert process.wait() == 0
    assert (process.env, process.launch_dir) == (environment, str(tmp_path))
    assert process.argv[0].endswith("/sh")
    assert isinstance(process, importlib.import_module("ptyprocess").PtyProcess)
    process.close()


def test_unicode() -> None:
    process = ours.PtyProcessUnicode.spawn(["cat"])
    process.write("h\u00e9\n")
    assert [process.readline(), process.readline()] == ["h\u00e9\r\n"] * 2
    process.sendeof()
    assert process.wait() == 0
    process.close()


@pytest.mark.slow
def test_only_what_is_passed_is_inherited() -> None:
    read, write = os.pipe()
    os.set_inheritable(read, True)
    for fds in ((), (read,)):
        process = ours.PtyProcess.spawn(["sh", "-c", "ls /proc/$$/fd"], pass_fds=fds)
        assert (b"%d" % read in read_all(process).split()) == bool(fds)
        process.close()
    os.close(read)
    os.close(write)


def test_errors(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left may hold descriptors
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError, match="not found or was not executable: /none"):
        ours.PtyProcess.spawn(["/none"])
    program = tmp_path / "program"
    program.write_bytes(b"\0\1")
    program.chmod(0o755)
    with pytest.raises(OSError, match="Exec format"):
        ours.PtyProcess.spawn([str(program)])
    with pytest.raises(FileNotFoundError):
        ours.PtyProcess.spawn(["true"], cwd="/none")
    with pytest.raises(TypeError, match="list or tuple"):
        ours.PtyProcess.spawn("true")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.slow
def test_signals_are_as_ptyprocess_leaves_them() -> None:
    """The signals that this process ignores, including SIGPIPE, and its signal mask."""
    standard = importlib.import_module("ptyprocess").PtyProcess
    seen = []
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        for cls in (standard, ours.PtyProcess):
            process = cls.spawn(["grep", "-E", "Sig(Blk|Ign|Cgt)", "/proc/self/status"])
            seen.append(read_all(process))
            process.close()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    assert seen[0] == seen[1]


def test_a_function_of_ones_own_is_called_in_a_fork(tmp_path: Path) -> None:
    path = tmp_path / "called"
    with pytest.warns(RuntimeWarning, match="fork"):
        process = ours.PtyProcess.spawn(["true"], preexec_fn=path.touch)
    process.wait()
    process.close()
    assert path.exists()


@pytest.mark.slow
def test_killed_helper_leaves_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a child of this process, which goes on."""
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper")
    errand_boy: Any = importlib.import_module("errand_boy")
    process = ours.PtyProcess.spawn(["cat"], echo=False)
    os.kill(errand_boy.helper_pid(), signal.SIGKILL)
    process.write(b"text\n")
    assert process.readline() == b"text\r\n"
    process.sendeof()
    assert process.wait() == 0
    process.close()
    again = ours.PtyProcess.spawn(["true"])  # another helper's
    assert again.wait() == 0
    again.close()
    errand_boy.stop()


@pytest.mark.parametrize("way", ["direct", "helper"])
def test_killed_caller_leaves_nothing(way: str) -> None:
    script = """
        import errand_boy.ptyprocess
        process = errand_boy.ptyprocess.PtyProcess.spawn(
            ["sh", "-c", "sleep 1000 & echo $!; exec sleep 1000"]
        )
        print(process.pid, process.readline().decode(), flush=True)
        sys.stdin.read()
    """
    with started_script(script, "errand_boy-helper" if way == "helper" else "errand_boy") as caller:
        assert caller.stdout is not None
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        caller.kill()
        until(lambda: all(map(has_ended, pids)), "the end of what was in the terminal")


@pytest.mark.slow
def test_patch_and_unpatch() -> None:
    script = (
        NO_FORK
        + """
    import errand_boy, pexpect, pty, ptyprocess
    before = [vars(ptyprocess.PtyProcess)["spawn"], pty.spawn]
    errand_boy.patch()
    child = pexpect.spawn("sh -c 'read x; echo got $x; exit 3'")
    child.sendline("text")
    child.expect("got text")
    child.expect(pexpect.EOF)
    child.close()
    ignoring = pexpect.spawn("grep SigIgn /proc/self/status", ignore_sighup=True)
    ignoring.expect("SigIgn:.([0-9a-f]+)")
    mask = int(ignoring.match.group(1), 16)
    output = pexpect.run("echo hi")
    sys.stdout.flush()
    status = pty.spawn(["sh", "-c", "tty >&2; exit 4"])
    try:
        pty.spawn("/none")
    except FileNotFoundError as error:
        name = error.filename
    class Own(ptyprocess.PtyProcess):
        pass
    own = type(Own.spawn(["true"])) is Own
    errand_boy.unpatch()
    after = [vars(ptyprocess.PtyProcess)["spawn"], pty.spawn]
    report([child.exitstatus, mask & 1, output.decode(), os.waitstatus_to_exitcode(status), name,
            own, before == after])
    """
    )
    assert run_script(script) == [3, 1, "hi\r\n", 4, "/none", True, True]


def test_patch_before_the_modules_are_there() -> None:
    script = (
        NO_FORK
        + """
    import errand_boy
    assert not {"pty", "ptyprocess"} & set(sys.modules)
    errand_boy.patch()
    import pexpect
    report(pexpect.run("echo hi").decode())
    """
    )
    assert run_script(script) == "hi\r\n"


def test_no_warning_in_a_threaded_process() -> None:
    script = (
        NO_FORK
        + """
    warnings.simplefilter("error")
    import errand_boy.ptyprocess
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    process = errand_boy.ptyprocess.PtyProcess.spawn(["true"])
    report(process.wait())
    stop.set()
    """
    )
    assert run_script(script) == 0


@pytest.mark.slow
def test_under_gevent() -> None:
    pytest.importorskip("gevent")
    script = """
    from gevent import monkey, sleep, spawn
    monkey.patch_all()
    import errand_boy
    errand_boy.patch()
    import pexpect
    ticks = []
    def tick():
        while True:
            ticks.append(1)
            sleep(0.001)
    spawn(tick)
    children = [pexpect.spawn("sh -c 'read x; sleep 0.2; echo got $x; exit %d'" % n)
                for n in range(5)]
    for child in children:
        child.sendline("text")
    for child in children:
        child.expect("got text")
        child.expect(pexpect.EOF)
        child.close()
    report([[child.exitstatus for child in children], len(ticks) > 10])
    """
    assert run_script(script) == [list(range(5)), True]


def test_terminado_and_ipython() -> None:
    pytest.importorskip("terminado", reason="needs the package terminado")
    pytest.importorskip("IPython", reason="needs the package ipython")
    script = (
        NO_FORK
        + """
    import errand_boy
    errand_boy.patch()
    from IPython.utils.process import system
    from terminado.management import PtyWithClients
    sys.stdout.flush()
    status = system("exit 3")
    terminal = PtyWithClients(["sh", "-c", "stty size"], dict(os.environ), cwd="/")
    text = terminal.ptyproc.read()
    report([status, text])
    """
    )
    assert run_script(script) == [3, "24 80\r\n"]


@pytest.mark.timeout(LONGEST_SUITE + 20)
@pytest.mark.parametrize("suite", ["ptyprocess", "pexpect"])
def test_own_tests_of_ptyprocess_and_pexpect_pass(suite: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as stream:
        returncode = subprocess.call(
            [sys.executable, str(RUN), "--only", suite],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=script_environment(),
            timeout=LONGEST_SUITE,
        )
    report = output.read_text(errors="replace")
    if returncode == NOT_INSTALLED:
        pytest.skip(report.strip())
    if returncode:
        pytest.fail(f"run.py returned {returncode}:\n{report}", pytrace=False)
