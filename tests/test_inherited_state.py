"""What a child inherits, even if the state has changed since the helper was started.

Each case changes one thing in a fresh process whose helper is already running, and examines a
command that is started afterwards. The standard library shows the right result. The change must
make a difference there, or the case would prove nothing.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess as stdlib
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import compare_scripts, run_script

OBSERVE = '''
import _cffi_backend  # with it loaded, musl ignores a signal of its own, whoever starts commands

STATUS = """
    Umask Uid Gid Groups SigBlk SigIgn CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp
    Seccomp_filters Speculation_Store_Bypass Cpus_allowed Mems_allowed THP_enabled TracerPid
""".split()

def run(*command, **options):
    done = subprocess.run(command, stdout=subprocess.PIPE, **options)
    return done.stdout.decode(errors="replace")

def observe(**options):
    """Everything there is to see about a child."""
    seen = {}
    for line in run("cat", "/proc/self/status", **options).splitlines():
        name, _, value = line.partition(":")
        if name in STATUS:
            seen[name] = value.strip()
    stat = run("cat", "/proc/self/stat", **options)
    pid, fields = stat.split()[0], stat.rpartition(") ")[2].split()
    names = {
        str(number): name
        for number, name in [
            (os.getsid(0), "caller's session"),
            (os.getpgrp(), "caller's group"),
            (os.getpid(), "caller"),
            (pid, "itself"),
        ]
    }
    for index, name in {1: "parent", 2: "group", 3: "session"}.items():
        seen[name] = names.get(fields[index], "foreign")
    for index, name in {4: "tty", 15: "priority", 16: "nice", 37: "rt", 38: "policy"}.items():
        seen[name] = fields[index]
    for line in run("cat", "/proc/self/limits", **options).splitlines()[1:]:
        seen[line[:25].strip()] = line[25:].split()[:2]
    seen["cwd"], seen["root"] = run("readlink", "/proc/self/cwd", "/proc/self/root").splitlines()
    seen["environ"] = sorted(run("cat", "/proc/self/environ", **options).split("\\0"))
    seen["descriptors"] = run("ls", "/proc/self/fd", **options).split()
    return seen

def prctl(*args):
    if libc.prctl(*[ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]):
        raise OSError(ctypes.get_errno(), "prctl")

def capset(effective, permitted, inheritable):
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = [effective, permitted, inheritable]
    data = (ctypes.c_uint32 * 6)(*[s & 0xFFFFFFFF for s in sets], *[s >> 32 for s in sets])
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")

def capabilities(name):
    with open("/proc/thread-self/status") as status:
        return int(next(line for line in status if line.startswith(name)).split()[1], 16)

def seccomp():
    """Install a filter that allows everything."""
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    bpf_ret, seccomp_ret_allow = 0x06, 0x7FFF0000
    code = (ctypes.c_uint64 * 1)(bpf_ret | seccomp_ret_allow << 32)
    pr_set_seccomp, seccomp_mode_filter = 22, 2
    prctl(pr_set_seccomp, seccomp_mode_filter, ctypes.byref(Program(1, ctypes.addressof(code))))

def unshare_fs():
    clone_fs = 0x200
    if libc.unshare(clone_fs):
        raise OSError(ctypes.get_errno(), "unshare")

def in_thread(function):
    failures = []
    def run_and_keep():
        try:
            function()
        except BaseException as error:
            failures.append(error)
    thread = threading.Thread(target=run_and_keep)
    thread.start()
    thread.join()
    for failure in failures:
        raise failure

work = sys.argv[2]
options = {}
'''


@dataclass
class Case:
    """One change; `differs` is what must change in a child, if anything."""

    name: str
    source: str
    differs: str | None = None
    where: str = "main"
    root: bool = False
    skip: str = ""


def may_raise_limits() -> bool:
    cap_sys_resource = 24
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) & 1 << cap_sys_resource)


def limit(name: str, soft: int, *, hard: bool = False) -> Case:
    number = f"resource.RLIMIT_{name}"
    highest = soft if hard else f"max({soft}, resource.getrlimit({number})[1], key=rank)"
    label = {
        "AS": "Max address space",
        "CORE": "Max core file size",
        "CPU": "Max cpu time",
        "DATA": "Max data size",
        "FSIZE": "Max file size",
        "MEMLOCK": "Max locked memory",
        "MSGQUEUE": "Max msgqueue size",
        "NICE": "Max nice priority",
        "NOFILE": "Max open files",
        "NPROC": "Max processes",
        "RSS": "Max resident set",
        "RTPRIO": "Max realtime priority",
        "RTTIME": "Max realtime timeout",
        "SIGPENDING": "Max pending signals",
        "STACK": "Max stack size",
    }[name]
    source = (
        "rank = lambda value: (value == resource.RLIM_INFINITY, value)\n"
        f"resource.setrlimit({number}, ({soft}, {highest}))"
    )
    _, now = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    skip = "" if not 0 <= now < soft or may_raise_limits() else "the hard limit is lower already"
    return Case(f"limit {name}{' hard' if hard else ''}", source, label, skip=skip)


def past_environ(name: str, source: str) -> Case:
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    skip = "" if has_gil else "without the GIL, the environment is what os.environ has"
    return Case(name, source, "environ", skip=skip)


NO_CHOICE = "" if len(os.sched_getaffinity(0)) > 1 else "there is one CPU only"

CASES = [
    Case("nothing", "pass"),
    # Files
    Case("directory", "os.chdir('/usr')", "cwd"),
    Case("directory by descriptor", "os.fchdir(os.open('/usr', os.O_RDONLY))", "cwd"),
    Case("directory deleted", "os.chdir(work); os.rmdir(work)", "cwd"),
    Case("directory changed in another thread", "in_thread(lambda: os.chdir('/usr'))", "cwd"),
    Case("relative cwd", "os.chdir(work); os.mkdir('sub'); options['cwd'] = 'sub'"),
    Case("umask", "os.umask(0o27)", "Umask"),
    Case("umask in another thread", "in_thread(lambda: os.umask(0o27))", "Umask"),
    Case("own directory of a thread", "unshare_fs(); os.chdir('/usr')", "cwd", "thread"),
    Case("own umask of a thread", "unshare_fs(); os.umask(0o27)", "Umask", "thread"),
    Case("own directory of the main thread", "unshare_fs(); os.chdir('/usr')", "cwd"),
    Case("own umask of the main thread", "unshare_fs(); os.umask(0o27)", "Umask"),
    Case(
        "directory that another thread left behind",
        """
        def leave():
            unshare_fs()
            os.chdir('/usr')
            subprocess.run(["true"])
        in_thread(leave)
        """,
    ),
    Case("descriptors", "os.dup(0); os.open('/', os.O_RDONLY)"),
    Case("descriptors moved", "os.dup2(0, 200, inheritable=True)"),
    # Signals
    Case(
        "blocked signals",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])",
        "SigBlk",
    ),
    Case("all signals blocked", "signal.pthread_sigmask(0, signal.valid_signals())", "SigBlk"),
    Case(
        "signals blocked in a thread",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGRTMIN])",
        "SigBlk",
        "thread",
    ),
    Case(
        "signals blocked in the main thread only",
        """
        def unblock():
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        options['before'] = unblock
        """,
        None,
        "thread",
    ),
    Case("ignored signal", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "SigIgn"),
    Case("ignored interrupt", "signal.signal(signal.SIGINT, signal.SIG_IGN)", "SigIgn"),
    Case("ignored SIGCHLD", "signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "SigIgn"),
    Case("ignored real-time signal", "signal.signal(signal.SIGRTMAX, signal.SIG_IGN)", "SigIgn"),
    Case("ignored and not restored", "options['restore_signals'] = False", "SigIgn"),
    Case(
        "no longer ignored",
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        subprocess.run(["true"])
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        """,
    ),
    Case("handled signal", "signal.signal(signal.SIGTERM, lambda *args: None)"),
    # Groups and sessions
    Case("process group", "os.setpgid(0, 0)"),
    Case("session", "os.setsid()"),
    Case(
        "process group of another",
        "peer = stdlib.Popen(['cat'], stdin=stdlib.PIPE, "
        "preexec_fn=lambda: os.setpgid(0, 0)); os.setpgid(0, peer.pid)",
    ),
    # Limits and scheduling
    limit("AS", 2**33),
    limit("CORE", 4096),
    limit("CPU", 1000),
    limit("DATA", 2**33),
    limit("FSIZE", 2**30),
    limit("MEMLOCK", 65536),
    limit("MSGQUEUE", 4096),
    limit("NICE", 5),
    limit("NOFILE", 64),
    limit("NPROC", 5000),
    limit("RSS", 2**30),
    limit("RTPRIO", 5),
    limit("RTTIME", 10**6),
    limit("SIGPENDING", 100),
    limit("STACK", 2**22),
    limit("NOFILE", 64, hard=True),
    limit("CORE", 0, hard=True),
    limit("NPROC", 5000, hard=True),
    Case("niceness", "os.nice(5)", "nice"),
    Case("niceness of a thread", "os.setpriority(os.PRIO_PROCESS, 0, 7)", "nice", "thread"),
    Case("raised niceness", "os.nice(-5)", "nice", root=True),
    Case(
        "affinity",
        "os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})",
        "Cpus_allowed",
        skip=NO_CHOICE,
    ),
    Case(
        "affinity of a thread",
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
        "Cpus_allowed",
        "thread",
        skip=NO_CHOICE,
    ),
    # The environment
    Case("os.environ", "os.environ['ERRAND_BOY_TEST'] = '1'", "environ"),
    Case("os.environ emptied", "os.environ.clear()", "environ"),
    past_environ("os.putenv", "os.putenv('ERRAND_BOY_TEST', '1')"),
    past_environ("os.unsetenv", "os.unsetenv('PYTHONPATH')"),
    past_environ("setenv in C", "libc.setenv(b'ERRAND_BOY_TEST', b'\\xff', 1)"),
    # Rights
    Case("bounding set", "prctl(24, 13)", "CapBnd", root=True),
    Case("bounding set of a thread", "prctl(24, 13)", "CapBnd", "thread", root=True),
    Case(
        "effective capabilities",
        "permitted = capabilities('CapPrm'); capset(0, permitted, 0)",
        root=True,
    ),
    Case("permitted capabilities", "capset(0, 0, 0)", root=True),
    Case(
        "inheritable capabilities",
        "all = capabilities('CapPrm'); capset(all, all, 1 << 10)",
        "CapInh",
        root=True,
    ),
    Case(
        "ambient capabilities",
        """
        prctl(8, 1)  # PR_SET_KEEPCAPS
        os.setresuid(65534, 65534, 65534)
        capset(1 << 10, 1 << 10, 1 << 10)
        prctl(47, 2, 10, 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE
        """,
        "CapAmb",
        root=True,
    ),
    Case(
        "no capabilities for root (securebits)",
        "prctl(28, 1 << 0)  # PR_SET_SECUREBITS, SECBIT_NOROOT",
        "CapEff",
        root=True,
    ),
    Case("no new privileges", "prctl(38, 1, 0, 0, 0)", "NoNewPrivs"),
    Case("no new privileges of a thread", "prctl(38, 1, 0, 0, 0)", "NoNewPrivs", "thread"),
    Case("seccomp filter", "seccomp()", "Seccomp", root=True),
    Case("seccomp filter without root", "prctl(38, 1, 0, 0, 0); seccomp()", "Seccomp"),
    Case("seccomp filter of a thread", "seccomp()", "Seccomp", "thread", root=True),
    Case(
        "second seccomp filter",
        "seccomp(); subprocess.run(['true']); seccomp()",
        "Seccomp_filters",
        root=True,
    ),
    Case("user", "os.setresuid(65534, 65534, 65534)", "Uid", root=True),
    Case("group", "os.setresgid(65534, 65534, 65534)", "Gid", root=True),
    Case("supplementary groups", "os.setgroups([5, 6])", "Groups", root=True),
    Case(
        "all ids in a forked process",
        "os.setgroups([7]); os.setresgid(2, 2, 2); os.setresuid(65534, 65534, 65534)",
        "Uid",
        "fork",
        root=True,
    ),
    Case("effective user", "os.seteuid(65534)", "Uid", root=True),
    Case("effective group", "os.setegid(65534)", "Gid", root=True),
    Case("real user", "os.setreuid(65534, 0)", "Uid", root=True),
    Case(
        "effective user and a limit",
        "os.seteuid(65534); resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))",
        "Max core file size",
        root=True,
    ),
    Case(
        "user and back",
        "os.seteuid(65534); subprocess.run(['true']); os.seteuid(0)",
        root=True,
    ),
    Case("nothing in a forked process", "pass", None, "fork"),
    Case("directory in a forked process", "os.chdir('/usr')", "cwd", "fork"),
]

SCENARIO = """
def change():
    global options
@CHANGE@

def scenario():
    change()
    options.pop("before", lambda: None)()
    result.append(observe(**options))

result = []
start()
subprocess.run(["true"])
if where == "thread":
    in_thread(scenario)
elif where == "fork":
    pid = os.fork()
    if pid == 0:
        scenario()
        report(result[0])
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
else:
    scenario()
report(result[0])
"""


def observe(case: Case, implementation: str, work: Path) -> Any:
    work.mkdir()
    work.chmod(0o777)
    body = textwrap.indent(textwrap.dedent(case.source).strip(), "    ")
    scenario = SCENARIO.replace("@CHANGE@", body)
    code = f"{OBSERVE}\nwhere = {case.where!r}\n{scenario}"
    try:
        return run_script(code, implementation, [work], cwd="/")
    finally:
        shutil.rmtree(work, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[
                *[pytest.mark.root for _ in [1] if case.root],
                *[pytest.mark.skip(reason=case.skip) for _ in [1] if case.skip],
            ],
        )
        for case in CASES
    ],
)
def test_change_after_the_helpers_start_reaches_the_child(case: Case, public_dir: Path) -> None:
    work = public_dir / "work"
    expected = observe(case, "subprocess", work)
    if case.differs is not None:
        unchanged = observe(Case("nothing", "pass"), "subprocess", work)
        assert expected[case.differs] != unchanged[case.differs]
    assert observe(case, "errand_boy", work) == expected


@pytest.mark.root
@pytest.mark.parametrize("saved_group", [0, 65534])
def test_root_directory_changed_after_the_helpers_start(tmp_path: Path, saved_group: int) -> None:
    """The old root can't be reached any more, not even /proc.

    A helper whose ids differ among themselves does not share the caller's root.
    """
    cat = shutil.which("cat")
    assert cat is not None
    linked = stdlib.check_output(["ldd", cat], text=True).split()
    for file in [cat, *{word for word in linked if word.startswith("/")}]:
        target = tmp_path / file.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "marker").write_text("inside")
    source = """
        os.setresgid(0, 0, int(sys.argv[4]))
        start()
        subprocess.run(["true"])
        os.chroot(sys.argv[2])
        os.chdir("/")
        cat = sys.argv[3]
        report([subprocess.check_output([cat, name]).decode() for name in ("/marker", "marker")])
    """
    assert compare_scripts(source, [tmp_path, cat, saved_group]) == ["inside", "inside"]


@pytest.mark.slow
def test_two_threads_with_different_masks_at_once() -> None:
    source = """
        start()
        def blocked(number):
            signal.pthread_sigmask(signal.SIG_SETMASK, [number])
            for _ in range(50):
                out = subprocess.check_output(["grep", "SigBlk", "/proc/self/status"])
                seen.add((number, int(out.split()[1], 16)))

        seen = set()
        numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP]
        threads = [threading.Thread(target=blocked, args=[number]) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report(sorted(seen))
    """
    assert len(compare_scripts(source)) == 4


def test_child_changes_nothing_of_its_caller() -> None:
    """The helper shares the caller's directory and umask; its children must not."""
    source = """
        start()
        before = os.getcwd()
        subprocess.run(["sh", "-c", "cd /usr; umask 077"], check=True)
        subprocess.run(["true"], cwd="/usr", umask=0o77, check=True)
        report([os.getcwd() == before, os.umask(0o22)])
    """
    assert compare_scripts(source, umask=0o26) == [True, 0o26]


@pytest.mark.slow
def test_slices_of_the_cpu_are_usual() -> None:
    """A helper's own are short."""
    source = """
look = '''
import ctypes, platform, struct
buffer = ctypes.create_string_buffer(48)
number = {"x86_64": 315, "aarch64": 275}[platform.machine()]  # sched_getattr
assert ctypes.CDLL(None).syscall(number, 0, buffer, 48, 0) == 0
print(struct.unpack("=IIQiIQQQ", buffer.raw))
'''
report(subprocess.check_output([sys.executable, "-c", look], text=True))
"""
    assert compare_scripts(source)
