"""Popen if the helper owns the children: with posix_spawn, or without CLONE_PARENT."""

from __future__ import annotations

import errno
import os
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script

import errand_boy

HELPER = os.environ.get("ERRAND_BOY_HELPER") or str(
    Path(errand_boy.__file__).with_name("errand-boy-helper")
)


@pytest.fixture(autouse=True, params=["posix", "clone"])
def mode(request: pytest.FixtureRequest, public_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set the scripts' environment so that their helpers own the children."""
    name: str = request.param
    if name == "posix":
        monkeypatch.setenv("ERRAND_BOY_SPAWN", "posix")
    else:
        wrapper = public_dir / "helper"
        wrapper.write_text(f'#!/bin/sh\nexec {HELPER} --own-children "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("ERRAND_BOY_HELPER", str(wrapper))
        monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper")
    return name


def outcome(source: str, **options: Any) -> Any:
    """Run a script that fails if its commands turn out to be its own children."""
    check = """
        subprocess.run(["true"], check=True)
        process = subprocess.Popen(["true"])
        try:
            os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            pass
        else:
            raise AssertionError("this is no test of the mode that it is meant for")
        assert process.wait() == 0
    """
    return run_script(textwrap.dedent(check) + textwrap.dedent(source), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, code",
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -TERM $$", -signal.SIGTERM),
        ("kill -KILL $$", -signal.SIGKILL),
    ],
)
def test_return_code(script: str, code: int) -> None:
    source = f"""
        process = subprocess.Popen(["sh", "-c", {script!r}])
        report([process.wait(), process.wait(), process.poll(), process.returncode])
    """
    assert outcome(source) == [code] * 4


def test_poll_tells_a_running_command_from_one_that_has_ended() -> None:
    source = """
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        running = [process.poll(), process.returncode]
        process.stdin.close()
        process.stdout.read()
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            os.sched_yield()
        report([running, process.poll(), process.returncode])
    """
    assert outcome(source) == [[None, None], 0, 0]


@pytest.mark.slow
def test_wait_with_timeout() -> None:
    source = """
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        seen = []
        for timeout in (0.1, 0, -1):
            before = time.monotonic()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                seen.append([error.timeout, error.cmd, time.monotonic() - before >= timeout])
        process.stdin.close()
        report([seen, process.wait(20)])
    """
    expected = [[0.1, ["cat"], True], [0, ["cat"], True], [-1, ["cat"], True]]
    assert outcome(source) == [expected, 0]


@pytest.mark.slow
def test_communicate() -> None:
    source = """
        sizes = []
        for size in (0, 10, 5_000_000):
            data = os.urandom(size)
            process = subprocess.Popen(
                ["sh", "-c", "cat; echo done >&2; exit 4"], stdin=-1, stdout=-1, stderr=-1
            )
            out, err = process.communicate(data)
            sizes.append([out == data, err.decode(), process.returncode])
        process = subprocess.Popen(["sleep", "100"], stdout=-1)
        try:
            process.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            process.kill()
        report([sizes, process.communicate()[0].decode(), process.returncode])
    """
    assert outcome(source) == [[[True, "done\n", 4]] * 3, "", -signal.SIGKILL]


@pytest.mark.slow
def test_functions() -> None:
    source = """
        seen = [subprocess.call(["sh", "-c", "exit 3"])]
        seen.append(subprocess.check_output(["echo", "fine"]).decode())
        seen.append(subprocess.getstatusoutput("echo fine; exit 5"))
        for call in (
            lambda: subprocess.run(["sh", "-c", "kill -INT $$"], check=True),
            lambda: subprocess.run(["sleep", "100"], timeout=0.1),
        ):
            try:
                call()
            except subprocess.SubprocessError as error:
                seen.append([type(error).__name__, getattr(error, "returncode", None)])
        report(seen)
    """
    assert outcome(source) == [
        3,
        "fine\n",
        [5, "fine"],
        ["CalledProcessError", -signal.SIGINT],
        ["TimeoutExpired", None],
    ]


@pytest.mark.slow
def test_signals_reach_the_command_and_no_other() -> None:
    source = """
        other = subprocess.Popen(["sleep", "100"])
        seen = []
        for send in ("terminate", "kill", "send_signal"):
            process = subprocess.Popen(["sleep", "100"])
            getattr(process, send)(*[signal.SIGUSR1] * (send == "send_signal"))
            seen.append(process.wait())
            getattr(process, send)(*[signal.SIGUSR1] * (send == "send_signal"))
        process = subprocess.Popen(["sleep", "100"])
        waiter = threading.Thread(target=process.wait)
        waiter.start()
        process.terminate()
        waiter.join()
        seen.append(process.returncode)
        seen.append(other.poll())
        other.kill()
        seen.append(other.wait())
        report(seen)
    """
    term, kill, usr1 = -signal.SIGTERM, -signal.SIGKILL, -signal.SIGUSR1
    assert outcome(source) == [term, kill, usr1, term, None, kill]


@pytest.mark.slow
def test_many_at_once_from_threads() -> None:
    source = """
        wrong = []
        def work(number):
            for turn in range(10):
                code = number * 10 + turn
                out = subprocess.run(
                    ["sh", "-c", f"echo {code}; exit {code}"], capture_output=True
                )
                if (out.returncode, out.stdout) != (code, b"%d\\n" % code):
                    wrong.append(repr(out))

        threads = [threading.Thread(target=work, args=[number]) for number in range(20)]
        for thread in threads:
            thread.start()
        live = [subprocess.Popen(["sh", "-c", f"exit {n}"]) for n in range(60)]
        for thread in threads:
            thread.join()
        codes = [process.wait() for process in reversed(live)]
        report([wrong, codes == list(reversed(range(60)))])
    """
    assert outcome(source) == [[], True]


def test_wait_in_many_threads_for_one_command() -> None:
    source = """
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        codes = []
        threads = [
            threading.Thread(target=lambda: codes.append(process.wait())) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        process.stdin.close()
        for thread in threads:
            thread.join()
        report(codes)
    """
    assert outcome(source) == [0] * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, error, filename",
    [
        ('["/none/program"]', errno.ENOENT, "/none/program"),
        ('["none-such-program"]', errno.ENOENT, "none-such-program"),
        ('["/etc/passwd"]', errno.EACCES, "/etc/passwd"),
        ('["/etc"]', errno.EACCES, "/etc"),
        ('["true"], cwd="/none"', errno.ENOENT, "/none"),
        ('["true"], cwd="/etc/passwd"', errno.ENOTDIR, "/etc/passwd"),
        ('["x" * 3_000_000]', errno.ENAMETOOLONG, None),
        ('["true", "x" * 3_000_000]', errno.E2BIG, "true"),
    ],
)
def test_errors(arguments: str, error: int, filename: str | None) -> None:
    source = f"""
        try:
            subprocess.Popen({arguments})
        except OSError as error:
            filename = error.filename if len(str(error.filename)) < 100 else None
            report([error.errno, filename, type(error) is type(OSError(error.errno, ""))])
    """
    assert outcome(source) == [error, filename, True]


def test_ids_that_posix_spawn_cannot_set(mode: str) -> None:
    source = """
        seen = []
        for option in ({"user": 12345}, {"group": 12345}, {"extra_groups": [12345]}):
            try:
                process = subprocess.Popen(["id", "-u"], **option)
            except OSError as error:
                seen.append([error.errno, error.strerror])
            else:
                process.wait()
        report(seen)
    """
    seen = outcome(source)
    if mode == "posix":
        assert [number for number, _ in seen] == [errno.ENOTSUP] * 3
        for (_, text), word in zip(seen, ("uid", "gid", "groups"), strict=True):
            assert f"posix_spawn cannot change a child's {word}; errand-boy doctor" in text
    elif os.geteuid() == 0:
        assert seen == []


def test_directory_and_umask_are_the_callers_own(tmp_path: Path) -> None:
    """With posix_spawn they are not shared, but sent."""
    source = """
        show = ["sh", "-c", "pwd; umask"]
        seen = []
        def look(**options):
            seen.append(subprocess.check_output(show, text=True, **options).split())
        os.chdir(sys.argv[2])
        look()
        os.umask(0o27)
        look()
        look(umask=0o77)
        os.mkdir("below")
        look(cwd="below")
        os.chdir("below")
        look(cwd="..", umask=0)
        os.rmdir(os.getcwd())
        look(cwd="/")
        seen.append(subprocess.call(["true"]))
        report(seen)
    """
    here, below = str(tmp_path), str(tmp_path / "below")
    seen = outcome(source, args=[tmp_path])
    assert [entry[0] for entry in seen[:-1]] == [here, here, here, below, here, "/"]
    assert [entry[1] for entry in seen[1:-1]] == ["0027", "0077", "0027", "0000", "0027"]
    assert seen[-1] == 0


def test_environment_and_descriptors() -> None:
    source = """
        os.environ["PUT"] = "there"
        out = [subprocess.check_output(["sh", "-c", "echo $PUT"], text=True)]
        out.append(subprocess.check_output(["env"], env={"A": "b"}, text=True))
        read, write = os.pipe()
        subprocess.run(["sh", "-c", f"echo passed >&{write}"], pass_fds=[write], check=True)
        os.close(write)
        out.append(os.read(read, 100).decode())
        report(out)
    """
    assert outcome(source) == ["there\n", "A=b\n", "passed\n"]


def test_helper_killed_with_a_live_child_is_told() -> None:
    """The exit status is lost, but the next command starts."""
    source = """
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        os.kill(helper_pid(), signal.SIGKILL)
        try:
            process.wait()
            raised = None
        except subprocess.HelperDiedError as error:
            raised = isinstance(error, OSError)
        out = process.communicate(b"alive")[0].decode()
        report([raised, out, subprocess.call(["true"])])
    """
    assert outcome(source) == [True, "alive", 0]


def test_nothing_is_left() -> None:
    source = """
        import psutil
        def state():
            gc.collect()
            me = psutil.Process()
            return [
                sorted(os.listdir("/proc/self/fd")),
                sorted(os.listdir(f"/proc/{helper_pid()}/fd")),
                [child.pid for child in me.children(recursive=True)],
            ]
        def work():
            for turn in range(20):
                subprocess.run(["sh", "-c", "exit 1"])
                try:
                    subprocess.run(["/none"])
                except FileNotFoundError:
                    pass
        work()
        before = state()
        work()
        report([before, state()])
    """
    before, after = outcome(source)
    assert after == before
    assert len(after[2]) == 1
