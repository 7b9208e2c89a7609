"""The direct way: children of a process that has threads, handlers and many descriptors."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, has_ended, run_script, started_script, until
from guard import Guard

import errand_boy

# Part of the scripts below: a filter that answers one system call with an error, for this thread
# and those that it starts.
REFUSING = """
CLONE, CLONE3, CLOSE_RANGE = 56 if os.uname().machine == "x86_64" else 220, 435, 436

def refuse(number, error, flags=0):
    '''Refuse the system call; with `flags`, only where its first argument has all of them.'''
    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    def instruction(code, k, yes=0, no=0):
        return code | yes << 16 | no << 24 | k << 32

    load, equal, bits, give = 0x20, 0x15, 0x54, 0x06
    allow, refused = 0x7FFF0000, 0x50000 | error
    if flags:
        code = [instruction(load, 0), instruction(equal, number, 0, 3), instruction(load, 16),
                instruction(bits, flags), instruction(equal, flags, 1, 0),
                instruction(give, allow), instruction(give, refused)]
    else:
        code = [instruction(load, 0), instruction(equal, number, 1, 0),
                instruction(give, allow), instruction(give, refused)]
    filters = (ctypes.c_uint64 * len(code))(*code)
    program = Program(len(code), ctypes.addressof(filters))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
"""


# Another: it holds the process of a start just before that gets its own table of descriptors.
HOLDING = """
import fcntl

def hold(seconds):
    '''Hold calls of close_range by this thread and its children for so long.'''
    code = [0x20, 0x15 | 1 << 24 | CLOSE_RANGE << 32,
            0x06 | 0x7FC00000 << 32, 0x06 | 0x7FFF0000 << 32]
    filters = (ctypes.c_uint64 * len(code))(*code)
    program = (ctypes.c_uint64 * 2)(len(code), ctypes.addressof(filters))
    is_set = threading.Event()
    def release():
        is_set.wait()
        while True:
            notice = bytearray(80)
            fcntl.ioctl(listener, 0xC0502100, notice)  # SECCOMP_IOCTL_NOTIF_RECV
            time.sleep(seconds)
            answer = notice[:8] + bytes(12) + (1).to_bytes(4, "little")  # to continue
            try:
                fcntl.ioctl(listener, 0xC0182101, answer)  # SECCOMP_IOCTL_NOTIF_SEND
            except FileNotFoundError:  # it has been killed
                pass
    threading.Thread(target=release, daemon=True).start()
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    seccomp = 317 if os.uname().machine == "x86_64" else 277
    listener = libc.syscall(seccomp, 1, 8, ctypes.byref(program))
    assert listener >= 0
    is_set.set()
"""


@pytest.fixture(autouse=True)
def direct_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    errand_boy.stop()
    monkeypatch.delenv("ERRAND_BOY_SPAWN", raising=False)
    yield
    errand_boy.stop()


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    return Path(shutil.copy("/bin/cat", tmp_path / "slow"))


# -- which way --


def test_plain_commands_leave_nothing_but_themselves() -> None:
    report = run_script(
        """
        import psutil
        def seen():
            return [sorted(os.listdir("/proc/self/fd")), psutil.Process().children(),
                    len(os.listdir("/proc/self/task")), helper_pid()]
        before = seen()
        subprocess.run(["true"], check=True)
        subprocess.run(["cat"], input=b"x", capture_output=True, check=True)
        try:
            subprocess.run(["/nowhere/nothing"])
        except FileNotFoundError:
            pass
        report(seen() == before)
        """
    )
    assert report is True


def test_ids_need_a_helper_which_serves_nobody_else() -> None:
    me = os.getuid()
    assert errand_boy.run(["true"]).returncode == 0
    assert errand_boy.helper_pid() is None
    assert errand_boy.run(["id", "-u"], user=me, capture_output=True).stdout == b"%d\n" % me
    helper = errand_boy.helper_pid()
    assert helper is not None
    os.kill(helper, signal.SIGSTOP)
    try:
        assert errand_boy.run(["true"]).returncode == 0
    finally:
        os.kill(helper, signal.SIGCONT)


def test_start_and_stop_choose() -> None:
    parent = ["sh", "-c", "echo $PPID"]
    errand_boy.start()
    helper = errand_boy.helper_pid()
    assert helper is not None
    os.kill(helper, signal.SIGKILL)
    os.waitid(os.P_PID, helper, os.WEXITED | os.WNOWAIT)
    assert errand_boy.run(parent, capture_output=True).stdout == b"%d\n" % os.getpid()
    assert errand_boy.helper_pid() not in (None, helper)
    errand_boy.stop()
    assert errand_boy.run(parent, capture_output=True).stdout == b"%d\n" % os.getpid()
    assert errand_boy.helper_pid() is None


@pytest.mark.parametrize(("way", "helped"), [("direct", False), ("helper", True), ("posix", True)])
def test_environment_chooses(way: str, helped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", way)
    assert errand_boy.run(["true"]).returncode == 0
    assert (errand_boy.helper_pid() is not None) == helped


def test_environment_that_asks_for_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "drect")
    with pytest.raises(ValueError, match="ERRAND_BOY_SPAWN=drect: it must be direct, helper or"):
        errand_boy.run(["true"])


def test_ids_where_a_helper_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "direct")
    with pytest.raises(OSError, match="need a helper"):
        errand_boy.run(["true"], user=os.getuid())
    assert errand_boy.helper_pid() is None


@pytest.mark.parametrize(
    "refusal",
    [
        "refuse(CLONE3, errno.ENOSYS)",
        "refuse(CLONE3, errno.EPERM)",
        "refuse(CLOSE_RANGE, errno.ENOSYS)",
        "refuse(CLOSE_RANGE, errno.EPERM)",
        "refuse(CLONE3, errno.ENOSYS); refuse(CLONE, errno.EPERM, 0x400)",  # CLONE_FILES
    ],
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_filter_that_refuses_what_is_needed(refusal: str, moment: str) -> None:
    report_ = run_script(
        f"""{REFUSING}
import errno
first = {"0" if moment == "before" else "subprocess.run(['true']).returncode"}
{refusal}
signal.signal(signal.SIGUSR1, lambda *_: None)
done = subprocess.run(["sh", "-c", "cat; kill -USR1 $$"], input=b"x", capture_output=True)
try:
    subprocess.run(["/nowhere/nothing"])
except FileNotFoundError as error:
    report([first, done.returncode, done.stdout.decode(), error.filename, helper_pid()])
"""
    )
    assert report_ == [0, -signal.SIGUSR1, "x", "/nowhere/nothing", None]


@pytest.mark.parametrize("mode", [None, "direct"])
def test_filter_that_an_event_loop_hears_of_late(mode: str | None) -> None:
    seen = run_script(
        f"""{REFUSING}
import asyncio, errno
import errand_boy.asyncio
if {mode!r}:
    os.environ["ERRAND_BOY_SPAWN"] = {mode!r}
before = len(os.listdir("/proc/self/fd"))
async def start():
    try:
        process = await errand_boy.asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    except OSError as error:
        return "a seccomp filter forbids" in str(error)
    out, _ = await process.communicate(b"x")
    return [process.returncode, out.decode()]
async def main():
    first = await start()
    refuse(CLOSE_RANGE, errno.ENOSYS)
    errand_boy._asyncio.transport._DRIVER.patience_us = 0  # pending, then
    return [first, await start(), await start()]
report([asyncio.run(main()), len(os.listdir("/proc/self/fd")) - before])
"""
    )
    done = [0, "x"]
    assert seen == [[done, True, True] if mode else [done] * 3, 0]


@pytest.mark.parametrize("error", ["ENOMEM", "EMFILE"])
def test_want_of_memory_is_no_filter(error: str) -> None:
    seen = run_script(
        f"""{REFUSING}
import errno
import errand_boy._process.direct
refuse(CLOSE_RANGE, errno.{error})
try:
    subprocess.run(["true"])
except OSError as error:
    report([error.errno == errno.{error}, errand_boy._process.direct.works()])
"""
    )
    assert seen == [True, True]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_error_names_what_is_missing(moment: str) -> None:
    """It matters if this way was asked for, or options that the standard library lacks."""
    texts = run_script(
        f"""{REFUSING}
import errno
if {moment!r} == "after":
    import errand_boy
refuse(CLOSE_RANGE, errno.ENOSYS)
import errand_boy
texts = []
for environment, options in ({{"ERRAND_BOY_SPAWN": "direct"}}, {{}}), ({{}}, {{"nice": 1}}):
    os.environ.update(environment)
    try:
        errand_boy.run(["true"], **options)
    except OSError as error:
        texts.append(str(error))
    os.environ.pop("ERRAND_BOY_SPAWN", None)
report(texts)
""",
        "subprocess",
    )
    missing = "close_range(2)" if moment == "before" else "a seccomp filter forbids clone(2)"
    forced, option = texts
    assert f"ERRAND_BOY_SPAWN=direct can't be obeyed: {missing}" in forced
    assert f"nice= can't be given on this system: {missing}" in option


# -- descriptors --

MANY = """
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000), hard))
for _ in range(min(hard, 15000) - 100):
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
LIST = [
    "sh",
    "-c",
    "cat; echo :; ls /proc/self/fd; a=$(readlink /proc/$$/fd/1); b=$(readlink /proc/$$/fd/2);"
    "echo $a $b >&2",
]
"""


@pytest.mark.parametrize("dumpable", [1, 0])
@pytest.mark.parametrize("way", ["errand_boy", "errand_boy-helper", "subprocess"])
def test_pipes_above_many_descriptors(way: str, dumpable: int) -> None:
    out, err, joined = run_script(
        f"""{MANY}
libc.prctl(4, {dumpable}, 0, 0, 0)  # PR_SET_DUMPABLE; /proc/PID/fd is root's then
if os.geteuid() == 0 and not {dumpable}:
    os.setresuid(65534, 65534, 65534)
def run(stderr):
    return subprocess.run(LIST, input=b"data", stdout=-1, stderr=stderr)
separate = run(-1)
joined = run(subprocess.STDOUT).stdout.decode().split(":", 1)[1].split()
report([separate.stdout.decode().split(":")[0] + " ".join(separate.stdout.decode().split()[1:]),
        len(set(separate.stderr.split())), joined[-1] == joined[-2]])
""",
        way,
    )
    assert out.startswith("data") and out.removeprefix("data").split() == ["0", "1", "2", "3"]
    assert (err, joined) == (2, True)


def test_dev_null_above_many_descriptors() -> None:
    kinds = run_script(
        f"""{MANY}
null = subprocess.DEVNULL
script = "readlink /proc/$$/fd/0 /proc/$$/fd/1; grep flags: /proc/$$/fdinfo/0; ls /proc/self/fd"
done = subprocess.run(["sh", "-c", script], stdin=null, stdout=-1, stderr=null)
quiet = subprocess.run(["sh", "-c", "cat; echo x; echo y >&2"], stdin=null, stdout=null,
                       stderr=subprocess.STDOUT)
report([done.stdout.decode().split(), quiet.returncode])
"""
    )
    (null, pipe, flags, mode, *fds), status = kinds
    assert (null, pipe[:5], flags, mode[-1], fds) == (
        "/dev/null",
        "pipe:",
        "flags:",
        "2",
        list("0123"),
    )
    assert status == 0


def test_high_descriptors_of_the_users_are_passed() -> None:
    seen = run_script(
        f"""{MANY}
fd = os.open("/etc/hostname", os.O_RDONLY)
out = subprocess.run(["ls", "/proc/self/fd"], pass_fds=[fd], capture_output=True).stdout.split()
file = os.open("/dev/null", os.O_WRONLY)
quiet = subprocess.run(["echo", "x"], stdout=file, stderr=-1)
read, write = os.pipe()
subprocess.run(["readlink", f"/proc/self/fd/1"], stdout=write)
os.close(write)
text = os.read(read, 100).decode()
report([fd > 14000, fd in map(int, out), len(out), quiet.stderr == b"", text.startswith("pipe:")])
"""
    )
    assert seen == [True, True, 5, True, True]


@pytest.mark.root
@pytest.mark.skipif(
    not os.path.exists("/proc/sys/kernel/ns_last_pid"), reason="the kernel lets nobody choose pids"
)
def test_proc_of_another_namespace_is_left_alone(tmp_path: Path) -> None:
    seen = run_script(
        """
        fifo = sys.argv[2] + "/fifo"
        os.mkfifo(fifo)
        stranger = os.fork()
        if stranger == 0:  # to open it for reading once more would take for ever
            fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
            for number in range(128, 200):
                os.dup2(fd, number)
            time.sleep(30)
            os._exit(0)
        while os.dup(0) < 140:
            pass
        result = os.memfd_create("result")
        assert libc.unshare(0x20000000) == 0  # CLONE_NEWPID
        inner = os.fork()
        if inner == 0:
            with open("/proc/sys/kernel/ns_last_pid", "w") as file:
                file.write(str(stranger - 1))
            twin = os.fork()
            if twin == 0:
                signal.alarm(10)
                done = subprocess.run(["cat"], input=b"data", stdout=subprocess.PIPE)
                os.write(result, b"%d %s" % (os.getpid() == stranger, done.stdout))
                os._exit(0)
            os.waitpid(twin, 0)
            os._exit(0)
        os.waitpid(inner, 0)
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)
        report(os.pread(result, 100, 0).decode())
        """,
        args=[tmp_path],
    )
    assert seen == "1 data"


def test_inheritable_descriptors_without_close_fds(subprocess: Any) -> None:
    read, write = os.pipe()
    try:
        os.set_inheritable(write, True)
        script = f"echo x >/proc/self/fd/{write}; test ! -e /proc/self/fd/{read}"
        command = ["sh", "-c", script]
        assert subprocess.run(command, close_fds=False).returncode == 0
        assert os.read(read, 10) == b"x\n"
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.slow
def test_threads_that_open_and_close_descriptors_all_the_while() -> None:
    over = threading.Event()

    def churn() -> None:
        while not over.is_set():
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
            for fd in fds:
                os.close(fd)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(150):
            text = str(number).encode()
            script = "cat; for fd in /proc/self/fd/*; do echo $fd; done"
            out = errand_boy.run(["sh", "-c", script], input=text, capture_output=True)
            assert out.stdout.startswith(text + b"/proc"), out
            # The shell has its listing open as 3.
            assert len(out.stdout.splitlines()) <= 4, out
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("option", ["stdin", "stdout", "stderr", "umask", "process_group"])
def test_numbers_that_c_cannot_hold(option: str, subprocess: Any) -> None:
    if option == "process_group" and sys.version_info < (3, 11):
        pytest.skip("it came with Python 3.11")
    if (
        option == "process_group"
        and subprocess.__name__ == "subprocess"
        and sys.version_info[:2] == (3, 12)
    ):
        pytest.skip("Python 3.12's own cuts off the number's upper half")
    with pytest.raises(OverflowError):
        subprocess.Popen(["true"], **{option: 1 << 32})


# -- threads, signals, forks --


@pytest.mark.slow
def test_storm_of_signals_with_handlers() -> None:
    wrong, handled, foreign = run_script(
        """
        me, handled, foreign = os.getpid(), [0], []
        def handle(number, frame):
            handled[0] += 1
            if os.getpid() != me:
                foreign.append(number)
        for number in signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1:
            signal.signal(number, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        over = threading.Event()
        def storm():
            while not over.is_set():
                os.kill(me, signal.SIGUSR1)
                time.sleep(0)
        threading.Thread(target=storm).start()
        # The shell says whether a signal is blocked or ignored in it that isn't so by default.
        command = ["sh", "-c", "grep -E '^Sig(Blk|Ign)' /proc/self/status; exit 3"]
        expected = None
        wrong = 0
        for _ in range(300):
            done = subprocess.run(command, capture_output=True)
            expected = expected or done.stdout
            wrong += (done.returncode, done.stdout) != (3, expected)
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        wrong += b"SigBlk:\\t0000000000000000" not in expected
        report([wrong, handled[0] > 300, foreign])
        """
    )
    assert (wrong, handled, foreign) == (0, True, [])


@pytest.mark.slow
@pytest.mark.parametrize("error", ["Exception", "TimeoutError"])
@pytest.mark.parametrize("way", ["direct", "helper"])
def test_handler_that_raises_loses_no_child(way: str, error: str) -> None:
    left = run_script(
        f"""
        import gc
        if {way!r} == "helper":
            subprocess.start()
        class Interrupt({error}):
            pass
        def handle(number, frame):
            raise Interrupt
        signal.signal(signal.SIGALRM, handle)
        subprocess.run(["true"])  # now: all is imported
        interrupted = 0
        for turn in range(400):
            process = None  # now: an interrupt of its end is lost, and so is the child then
            while stdlib._active:  # now: to its clean-up an OSError says that there is no child
                stdlib._cleanup()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00002 * (turn % 20 + 1))
                process = subprocess.Popen(["true"])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupted += 1
                process = None  # not while the next timer runs: __del__ must not be interrupted
            else:
                process.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        process = None
        gc.collect()
        # What an interrupted constructor has started is in the library's list of such children.
        known = {{process.pid for process in stdlib._active}}
        deadline = time.monotonic() + 20
        while stdlib._active and time.monotonic() < deadline:
            stdlib._cleanup()
        lost = []
        try:
            while (left := os.waitpid(-1, os.WNOHANG)[0]) and left not in known:
                lost.append(left)
        except ChildProcessError:
            pass
        report([lost, interrupted > 0])
        """
    )
    assert left == [[], True]


@pytest.mark.parametrize("error", ["Exception", "TimeoutError"])
def test_exception_as_soon_as_a_request_is_sent(error: str) -> None:
    """No other command gets the answer, and the child is known."""
    seen = run_script(
        f"""
        subprocess.start()
        subprocess.run(["true"])
        class Interrupt({error}):
            pass
        def interrupt(frame, event, arg):
            if event == "return" and frame.f_code.co_name == "prepare":
                sys.setprofile(None)
                raise Interrupt
        sys.setprofile(interrupt)
        interrupted = False
        try:
            subprocess.Popen(["true"])
        except Interrupt:
            interrupted = True
        seen = [interrupted, subprocess.run(["sh", "-c", "exit 7"]).returncode]
        while stdlib._active:
            stdlib._cleanup()
        report([*seen, open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
            == [str(subprocess.helper_pid())]])
        """
    )
    assert seen == [True, 7, True]


@pytest.mark.slow
def test_threads_that_start_and_end() -> None:
    wrong: list[object] = []

    def run(number: int) -> None:
        done = errand_boy.run(["sh", "-c", f"exit {number % 250}"])
        if done.returncode != number % 250:
            wrong.append(done)

    for first in range(0, 400, 20):
        threads = [threading.Thread(target=run, args=[first + n]) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.slow
def test_forks_in_another_thread() -> None:
    codes = run_script(
        """
        over, codes = threading.Event(), []
        def fork():
            while not over.is_set():
                pid = os.fork()
                if pid == 0:
                    os._exit(subprocess.run(["sh", "-c", "exit 7"]).returncode)
                codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        warnings.simplefilter("ignore")
        thread = threading.Thread(target=fork)
        thread.start()
        own = [subprocess.run(["sh", "-c", "exit 5"]).returncode for _ in range(200)]
        over.set()
        thread.join()
        report([set(own) == {5}, set(codes) == {7}])
        """
    )
    assert codes == [True, True]


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="a free-threaded Python loads no extension with cffi's way of initialization there",
)
def test_subinterpreter() -> None:
    name, kind = "_xxsubinterpreters", "isolated=False"
    if sys.version_info >= (3, 13):
        name, kind = "_interpreters", "'legacy'"
    code = run_script(
        f"""
        import {name} as interpreters
        inner = interpreters.create({kind})
        first = subprocess.run(["sh", "-c", "exit 4"]).returncode
        read, write = os.pipe()
        text = (
            f"import os, sys; sys.path[:] = {{sys.path}}; import errand_boy; "
            f"done = errand_boy.run(['sh', '-c', 'exit 5']); "
            f"os.write({{write}}, b'%d' % done.returncode)"
        )
        failed = interpreters.run_string(inner, text)
        os.close(write)
        report([first, os.read(read, 10).decode(), str(failed or "")])
        """
    )
    assert code == [4, "5", ""]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_end_of_the_process_in_the_middle(end: str) -> None:
    for _ in range(5):
        with started_script(
            f"""
            def run():
                while True:
                    subprocess.run(["true"])
            for _ in range(4):
                threading.Thread(target=run, daemon=True).start()
            report("ready")
            sys.stdin.readline()
            {end}
            """
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.communicate("\n", timeout=20)
            assert process.returncode == (-9 if "kill" in end else 0)


def test_sigchld_that_is_ignored(subprocess: Any) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(FileNotFoundError):
            subprocess.Popen(["/nowhere/nothing"])
        assert subprocess.run(["sh", "-c", "exit 3"]).returncode == 0
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_failed_start_leaves_no_child() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(FileNotFoundError):
        errand_boy.Popen(["/nowhere/nothing"])
    with pytest.raises(PermissionError):
        errand_boy.Popen(["/etc/passwd"])
    assert set(psutil.Process().children()) <= before


def test_references_are_counted() -> None:
    """This also holds for a wheel that was built for a newer Python, where None is immortal."""
    for _ in range(10):
        errand_boy.run(["true"])
    before = sys.getrefcount(None), sys.getrefcount(True)
    for _ in range(200):
        errand_boy.run(["true"])
    after = sys.getrefcount(None), sys.getrefcount(True)
    assert [abs(one - other) < 100 for one, other in zip(before, after, strict=True)] == [
        True,
        True,
    ]


# -- a slow exec --


@pytest.mark.root
def test_slow_exec_can_be_interrupted(slow: Path) -> None:
    class Interrupt(Exception):
        pass

    def handle(number: int, frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with Guard(slow) as guard:
            main = threading.main_thread().ident
            assert main is not None

            def interrupt() -> None:
                guard.held()
                signal.pthread_kill(main, signal.SIGUSR1)

            interrupter = threading.Thread(target=interrupt)
            interrupter.start()
            with pytest.raises(Interrupt):
                errand_boy.Popen([slow, "/dev/null"], stdout=errand_boy.PIPE)
            interrupter.join()
            (child,) = psutil.Process().children()[-1:]
            guard.release()
            child.wait(20)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.root
def test_slow_exec_does_not_hold_a_fork_of_its_caller(slow: Path) -> None:
    forks: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: forks.append(os.fork()))
    main = threading.main_thread().ident
    assert main is not None
    try:
        with Guard(slow) as guard:

            def interrupt() -> None:
                guard.held()
                signal.pthread_kill(main, signal.SIGUSR1)
                try:
                    until(lambda: forks)
                    until(lambda: has_ended(forks[0]))
                    codes.append(os.waitpid(forks[0], 0)[1])
                finally:
                    guard.release()

            codes: list[int] = []
            interrupter = threading.Thread(target=interrupt)
            interrupter.start()
            process = errand_boy.Popen([slow, "/dev/null"])
            if forks == [0]:  # nobody will tell this process the outcome of the start
                os._exit(errand_boy.run(["true"]).returncode)
            assert process.wait() == 0
            interrupter.join()
            assert codes == [0]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.root
def test_slow_exec_lets_other_threads_have_the_gil(slow: Path) -> None:
    with Guard(slow) as guard:
        thread = threading.Thread(target=errand_boy.run, args=[[slow, "/dev/null"]])
        thread.start()
        guard.held()
        end = time.monotonic() + 20
        for _ in range(20):
            assert errand_boy.run(["true"]).returncode == 0
        assert thread.is_alive() and time.monotonic() < end
        guard.release()
        thread.join()


# -- waits --


@pytest.mark.slow
def test_wait_with_a_timeout_ends_with_the_command(subprocess: Any) -> None:
    if not hasattr(subprocess, "helper_pid"):
        pytest.skip("subprocess itself polls before Python 3.15, up to 50 ms late")

    def sleeps() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    with subprocess.Popen(["sleep", "1"]) as process:
        before = sleeps()
        assert process.wait(timeout=PATIENCE) == 0
        assert sleeps() - before < 10  # by polling, it would be more than 20


@pytest.mark.parametrize("timeout", [3e6, 1e10, float("inf"), float("nan")])
def test_wait_with_a_timeout_beyond_all_bounds(timeout: float, subprocess: Any) -> None:
    with subprocess.Popen(["sleep", "0.1"]) as process:
        assert process.wait(timeout=timeout) == 0


def test_wait_in_many_threads_at_once() -> None:
    with errand_boy.Popen(["cat"], stdin=errand_boy.PIPE) as process:
        codes: list[int] = []
        waits: list[Any] = [None, 20, None, 20, 20, 20]
        threads = [
            threading.Thread(target=lambda w=wait: codes.append(process.wait(timeout=w)))
            for wait in waits
        ]
        for thread in threads:
            thread.start()
        with pytest.raises(errand_boy.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(0)
        process.terminate()
        for thread in threads:
            thread.join()
    assert codes == [-signal.SIGTERM] * len(waits)


@pytest.mark.parametrize(
    "lack",
    [
        "del os.waitid, os.pidfd_open",
        "refuse(WAITID, errno.EPERM); refuse(PIDFD_OPEN, errno.EPERM)",
    ],
)
def test_wait_without_what_it_is_made_of(lack: str) -> None:
    codes = run_script(
        f"""{REFUSING}
import errno
WAITID, PIDFD_OPEN = 247 if os.uname().machine == "x86_64" else 95, 434
{lack}
report([subprocess.Popen(["sh", "-c", "exit 3"]).wait(timeout=wait) for wait in [None, 20]])
"""
    )
    assert codes == [3, 3]


def test_wait_without_a_descriptor_to_spare() -> None:
    code = run_script(
        """
        process = subprocess.Popen(["sh", "-c", "sleep 0.1; exit 3"])
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 4096))
        report(process.wait(timeout=20))
        """
    )
    assert code == 3
