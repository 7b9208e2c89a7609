"""Each way out of a sandbox is tried without one, where it must work, and in one."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import tty
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import run_script

import errand_boy
import errand_boy.asyncio
from errand_boy import Sandbox, sandbox
from errand_boy._native import lib

run = cast(Any, errand_boy.run)
VERSION = lib.eb_landlock_version()
pytestmark = pytest.mark.skipif(VERSION < 1, reason="this kernel has no Landlock")
PYTHON = [sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))]
PYTHON += [path for path in sys.path if path.endswith("lib-dynload")]


def make(**given: Any) -> Sandbox:
    """A sandbox in which this Python runs, as strict as the kernel allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        execute = [*PYTHON, *given.pop("execute", [])]
        return Sandbox(system=True, execute=execute, strict=False, **given)


# A world of which the sandbox is `inside` only.

PRELUDE = """
import array, ctypes, errno, fcntl, json, os, platform, socket, stat, struct, sys, termios
world = json.loads(sys.argv[1])
globals().update(world)
os.chdir(inside)
libc = ctypes.CDLL(None, use_errno=True)

def syscall(x86, arm, *args):
    number = x86 if platform.machine() == "x86_64" else arm
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def pair(family):
    # Any other error comes from the family itself, so the call has reached it.
    try:
        socket.socketpair(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EACCES:
            raise

def mount(source, target, kind, flags):
    if libc.mount(source, target.encode(), kind, flags, None):
        raise OSError(ctypes.get_errno(), "mount")

def main():
    CODE

try:
    main()
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print("out")
"""


class World:
    def __init__(self, top: Path) -> None:
        self.inside = top / "inside"
        self.inside.mkdir()
        self.outside = top / "outside"
        self.outside.mkdir()
        (self.outside / "empty").mkdir()
        self.secret = top / "secret"
        self.secret.write_text("secret")
        (self.inside / "link").symlink_to(self.secret)
        (self.inside / "own").write_text("own")
        (self.inside / "directory").symlink_to(self.outside)
        self.tool = top / "tool"
        self.tool.write_bytes(Path("/bin/true").read_bytes())
        self.tool.chmod(0o755)
        self.directory_fd = os.open(top, os.O_RDONLY)
        self.secret_fd = os.open(self.secret, os.O_RDONLY)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("")
        self.abstract.listen()
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagram.bind("")
        self.pathname = socket.socket(socket.AF_UNIX)
        self.pathname.bind(os.fspath(top / "socket"))
        self.pathname.listen()
        self.victim = subprocess.Popen(["sleep", "1000"])
        self.facts = {
            "top": str(top),
            "inside": str(self.inside),
            "outside": str(self.outside),
            "secret": str(self.secret),
            "tool": str(self.tool),
            "directory_fd": self.directory_fd,
            "secret_fd": self.secret_fd,
            "port": self.tcp.getsockname()[1],
            "abstract": self.abstract.getsockname().decode(),
            "datagram": self.datagram.getsockname().decode(),
            "pathname": str(top / "socket"),
            "victim": self.victim.pid,
            "caller": os.getpid(),
        }

    def attempt(self, code: str, **options: Any) -> str:
        """The outcome of an attempt: the name of an errno, or "out"."""
        source = PRELUDE.replace("CODE", code.strip().replace("\n", "\n    "))
        done = run(
            [sys.executable, "-I", "-c", source, json.dumps(self.facts)],
            pass_fds=(self.directory_fd, self.secret_fd),
            capture_output=True,
            text=True,
            **options,
        )
        if done.returncode == 0 and done.stdout == "":
            return "out"  # it has become another program
        assert done.returncode == 0, done.stderr
        return str(done.stdout).strip()

    def close(self) -> None:
        os.close(self.directory_fd)
        os.close(self.secret_fd)
        for each in self.tcp, self.abstract, self.datagram, self.pathname:
            each.close()
        self.victim.kill()
        self.victim.wait()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    it = World(tmp_path.resolve())
    yield it
    it.close()


# Name: what is tried, and since which version of Landlock it is refused. All must work without a
# sandbox. With "root", that is for root only.
ESCAPES: dict[str, tuple[int, str]] = {
    # files
    "absolute path": (1, "open(secret)"),
    "dot dot": (1, "open('../secret')"),
    "symbolic link": (1, "open('link')"),
    "symbolic link to a directory": (1, "os.listdir('directory')"),
    "another working directory": (1, "os.chdir(top); open('secret')"),
    "/proc/self/root": (1, "open('/proc/self/root' + secret)"),
    "/proc/self/cwd": (1, "open('/proc/self/cwd/../secret')"),
    "/proc/PID/root": (1, "open(f'/proc/{caller}/root{secret}')"),
    "inherited directory": (1, "os.open('secret', os.O_RDONLY, dir_fd=directory_fd)"),
    "/proc/self/fd of a directory": (1, "open(f'/proc/self/fd/{directory_fd}/secret')"),
    "/proc/self/fd, to write": (1, "open(f'/proc/self/fd/{secret_fd}', 'a')"),
    "O_PATH first": (1, "open(f'/proc/self/fd/{os.open(secret, os.O_PATH)}')"),
    "list": (1, "os.listdir(outside)"),
    "write": (1, "open(secret, 'a')"),
    "create": (1, "open(outside + '/new', 'w')"),
    "unnamed file": (1, "os.open(outside, os.O_TMPFILE | os.O_RDWR)"),
    "remove": (1, "os.unlink(secret)"),
    "make directory": (1, "os.mkdir(outside + '/new')"),
    "remove directory": (1, "os.rmdir(outside + '/empty')"),
    "make symbolic link": (1, "os.symlink('x', outside + '/new')"),
    "make FIFO": (1, "os.mkfifo(outside + '/new')"),
    "bind a Unix socket": (1, "socket.socket(socket.AF_UNIX).bind(outside + '/new')"),
    "rename out": (1, "os.rename('own', outside + '/new')"),
    "rename in": (1, "os.rename(secret, 'new')"),
    "exchange": (1, "syscall(316, 276, -100, b'own', -100, secret.encode(), 2)"),
    "link in": (1, "os.link(secret, 'new')"),
    "link out": (1, "os.link('own', outside + '/new')"),
    "truncate": (3, "os.truncate(secret, 0)"),
    "truncate by opening": (1, "os.open(secret, os.O_WRONLY | os.O_TRUNC)"),
    "file handle, root": (
        1,
        """
handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
mount_id = ctypes.c_int()
syscall(303, 264, -100, secret.encode(), handle, ctypes.byref(mount_id), 0)
fd = syscall(304, 265, os.open("own", os.O_RDONLY), handle, os.O_RDONLY)
""",
    ),
    # programs
    "execute": (1, "os.execv(tool, ['x'])"),
    "execute by the loader": (
        1,
        """
import glob, subprocess
(loader, *_) = glob.glob('/lib64/ld-linux*') + glob.glob('/lib/ld-linux*')
if subprocess.run([loader, tool], stderr=subprocess.DEVNULL).returncode:
    raise PermissionError(errno.EACCES, "the loader")
""",
    ),
    "execute what was written": (
        1,
        """
with open('program', 'wb') as file:
    file.write(open('/bin/true', 'rb').read())
os.chmod('program', 0o755)
os.execv('./program', ['x'])
""",
    ),
    # devices
    "make device, root": (1, "os.mknod('null', stat.S_IFCHR | 0o600, os.makedev(1, 3))"),
    "make block device, root": (1, "os.mknod('ram', stat.S_IFBLK | 0o600, os.makedev(1, 0))"),
    "ioctl on a device": (
        5,
        "fcntl.ioctl(os.open('/dev/urandom', os.O_RDONLY), 0x80045200, b'1234')",
    ),
    "terminal": (1, "os.open('/dev/ptmx', os.O_RDWR)"),
    # processes
    "ptrace": (
        1,
        """
if libc.ptrace(16, victim, None, None):
    raise OSError(ctypes.get_errno(), "ptrace")
""",
    ),
    "another's memory": (
        1,
        """
buffer = ctypes.create_string_buffer(8)
address = 4096
if os.access(f"/proc/{victim}/maps", os.R_OK):
    try:
        address = int(open(f"/proc/{victim}/maps").read(12), 16)
    except PermissionError:
        pass
local = struct.pack("PN", ctypes.addressof(buffer), 8)
syscall(310, 270, victim, local, 1, struct.pack("PN", address, 8), 1, 0)
""",
    ),
    "/proc/PID/mem": (1, "os.open(f'/proc/{victim}/mem', os.O_RDWR)"),
    "/proc/PID/environ": (1, "open(f'/proc/{victim}/environ')"),
    "another's descriptor": (1, "syscall(438, 438, syscall(434, 434, caller, 0), secret_fd, 0)"),
    "signal": (6, "os.kill(victim, 0)"),
    "signal to the caller": (6, "os.kill(caller, 0)"),
    "signal by pidfd": (6, "syscall(424, 424, syscall(434, 434, victim, 0), 0, None, 0)"),
    # network
    "TCP": (1, "socket.create_connection(('127.0.0.1', port))"),
    "bind": (1, "socket.socket().bind(('127.0.0.1', 0))"),
    "listen": (1, "socket.socket().listen()"),
    "UDP": (1, "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"),
    "IPv6": (1, "socket.socket(socket.AF_INET6)"),
    "raw, root": (1, "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    "packets, root": (1, "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "netlink": (1, "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    "netlink, a pair": (1, "pair(socket.AF_NETLINK)"),
    "vsock, a pair": (1, "pair(socket.AF_VSOCK)"),
    "abstract socket": (6, "socket.socket(socket.AF_UNIX).connect(abstract)"),
    "abstract datagram": (
        6,
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', datagram)",
    ),
    "socket with a name": (9, "socket.socket(socket.AF_UNIX).connect(pathname)"),
    # the view of the file system
    "mount, root": (1, "mount(b'none', inside, b'tmpfs', 0)"),
    "bind mount, root": (1, "mount(outside.encode(), inside, None, 4096)"),
    "open_tree, root": (
        1,
        """
tree = syscall(428, 428, -100, outside.encode(), 1)
syscall(429, 429, tree, b'', -100, inside.encode(), 4)
""",
    ),
    "mount in namespaces": (
        1,
        "syscall(272, 97, 0x10020000); mount(b'none', inside, b'tmpfs', 0)",
    ),
    "chroot, root": (1, "os.chroot(top); open('/secret')"),
    # the rest
    "keyring": (1, "syscall(248, 217, b'user', b'errand', b'boy', 3, -2)"),
    "io_uring": (1, "syscall(425, 425, 4, ctypes.create_string_buffer(120))"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ESCAPES)
def test_escape(name: str, world: World) -> None:
    since, code = ESCAPES[name]
    if name.endswith(", root") and os.geteuid() != 0:
        pytest.skip("needs the rights of root")
    (world.outside / "new").unlink(missing_ok=True)
    box = make(read=[world.inside], write=[world.inside])
    refused = world.attempt(code, sandbox=box)
    if since <= VERSION:
        assert refused in ("EACCES", "EPERM", "EXDEV")
        assert world.secret.read_text() == "secret"
    if name in ("mount, root", "bind mount, root", "open_tree, root"):
        return  # it would stay
    outside = world.attempt(code)
    # Some kernels have no io_uring, some file systems no handles or exchange, and a process whose
    # root was changed can't have a user namespace.
    missing = ("io_uring", "keyring", "file handle, root", "exchange", "mount in namespaces")
    assert outside == "out" or name in missing


# The ports of a mapping


@pytest.mark.slow
def test_tcp_ports(world: World) -> None:
    if VERSION < 4:
        pytest.skip("Landlock knows TCP ports from version 4 on")
    port = world.facts["port"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        attempts = {
            "allowed": f"socket.create_connection(('127.0.0.1', {port}))",
            "another": f"socket.create_connection(('127.0.0.1', {number}))",
            "without connect": f"socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', {number}))",
            "message": f"socket.socket().sendmsg([b'x'], [], 0x20000000, ('127.0.0.1', {number}))",
            "messages": "syscall(307, 269, socket.socket().fileno(), 0, 0, 0x20000000)",
            "bind": "socket.socket().bind(('127.0.0.1', 0))",
            "multipath": "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)",
            "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "UDP, IPv6": "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
            "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "IPv6": "socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)",
            "Unix": "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
        }
        box = make(network={"connect": [port]})
        found = {name: world.attempt(code, sandbox=box) for name, code in attempts.items()}
        allowed = ("allowed", "IPv6", "Unix")
        assert found == {name: "out" if name in allowed else "EACCES" for name in attempts}
    box = make(network={"bind": [0]})
    assert world.attempt(attempts["bind"], sandbox=box) == "out"
    assert world.attempt(attempts["allowed"], sandbox=box) == "EACCES"


def test_whole_network(world: World) -> None:
    box = make(network=True)
    assert world.attempt(ESCAPES["UDP"][1], sandbox=box) == "out"
    assert world.attempt(ESCAPES["TCP"][1], sandbox=box) == "out"


# Terminals

# Typing on the terminal that is the program's standard input. The kernel takes no notice of the
# upper half of a request.
TYPING = {
    "TIOCSTI": "fcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "upper half": "syscall(16, 29, 0, 0x700000000 + termios.TIOCSTI, b'x')",
    "TIOCLINUX": "fcntl.ioctl(0, 0x541C, b'\\3')",
    "32 bits": """
import mmap
if platform.machine() != 'x86_64':
    fcntl.ioctl(0, termios.TIOCSTI, b'x')
    return
low = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, 7)  # MAP_32BIT
address = ctypes.addressof(ctypes.c_char.from_buffer(low))
code = b"\\x53\\xb8\\x36\\0\\0\\0\\x31\\xdb\\xb9" + struct.pack("I", termios.TIOCSTI)
code += b"\\xba" + struct.pack("I", address + 64) + b"\\xcd\\x80\\x5b\\xc3"  # int 0x80
low[:] = (code.ljust(64, b"\\0") + b"x").ljust(4096, b"\\0")
result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
if result < 0:
    raise OSError(-result, os.strerror(-result))
""",
}


@pytest.mark.parametrize("network", [False, {"connect": [443]}, True])
@pytest.mark.parametrize("name", TYPING)
def test_typing_on_the_terminal(name: str, network: Any, world: World) -> None:
    """Whoever reads from the terminal next takes it for the user's input."""
    if VERSION < 4 and isinstance(network, dict):
        pytest.skip("Landlock knows TCP ports from version 4 on")
    upper, lower = os.openpty()
    options = {"start_new_session": True, "controlling_terminal": lower, "stdin": lower}
    box = make(network=network)
    try:
        tty.setraw(lower)
        os.set_blocking(lower, False)
        try:
            outside = world.attempt(TYPING[name], **options)
        except AssertionError:
            if name == "32 bits":
                pytest.skip("this kernel runs no 32-bit programs")
            raise
        # A pseudo-terminal knows no TIOCLINUX; an administrator may have turned TIOCSTI off.
        assert outside in ("ENOTTY" if name == "TIOCLINUX" else "out", "EIO")
        assert outside != "out" or os.read(lower, 1) == b"x"
        if name == "32 bits" and network is not True:
            with pytest.raises(AssertionError):  # it is killed
                world.attempt(TYPING[name], sandbox=box, **options)
        else:
            assert world.attempt(TYPING[name], sandbox=box, **options) == "EACCES"
        with pytest.raises(BlockingIOError):
            os.read(lower, 1)
    finally:
        os.close(upper)
        os.close(lower)


# What it lets in


def test_what_is_allowed(world: World) -> None:
    code = """
open('own').read()
os.listdir('.')
open('new', 'w').write('new')
os.truncate('new', 1)
os.rename('new', 'newer')
os.mkdir('a')
os.rename('newer', 'a/newer')
os.link('a/newer', 'link2')
os.symlink('x', 'link3')
os.mkfifo('fifo')
socket.socket(socket.AF_UNIX).bind('socket')
os.unlink('a/newer')
os.rmdir('a')
os.kill(os.getpid(), 0)
"""
    assert world.attempt(code, sandbox=make(read=[world.inside], write=[world.inside])) == "out"


def test_one_file(world: World) -> None:
    box = make(read=[world.secret], write=[world.secret], execute=[world.tool])
    assert world.attempt("open(secret, 'r+').read()", sandbox=box) == "out"
    assert world.attempt("os.execv(tool, ['x'])", sandbox=box) == "out"
    assert world.attempt("os.unlink(secret)", sandbox=box) == "EACCES"


# What it doesn't keep out: docs/running-untrusted.md has the list.

NOT_COVERED = {
    "look at": "os.stat(secret)",
    "change the mode": "os.chmod(secret, 0o600)",
    "change the times": "os.utime(secret)",
    "read what is open": "assert os.pread(secret_fd, 6, 0) == b'secret'",
    "execute from memory": """
fd = os.memfd_create('program')
os.write(fd, open('/bin/true', 'rb').read())
os.execve(fd, ['x'], {})
""",
    "watch": """
fd = libc.inotify_init()
assert libc.inotify_add_watch(fd, secret.encode(), 0xFFF) > 0
""",
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_not_covered(name: str, world: World) -> None:
    box = make(read=[world.inside], write=[world.inside])
    assert world.attempt(NOT_COVERED[name], sandbox=box) == "out"


# Fronts, ways, and the caller's own state

CODE = "import sys; open('/etc/hostname')"
COMMAND = [sys.executable, "-I", "-c", CODE]


@pytest.mark.slow
def test_each_front(spawn: str, client: Any) -> None:
    if spawn == "posix":
        with pytest.raises(OSError, match="sandbox") as caught:
            run(["true"], sandbox=make())
        assert caught.value.errno == errno.ENOTSUP
        return
    box = make()

    async def by_asyncio() -> Any:
        return await errand_boy.asyncio.run(COMMAND, capture_output=True, sandbox=box)

    mapping = cast(Any, {"args": COMMAND, "sandbox": box})
    results = {
        "run": run(COMMAND, capture_output=True, sandbox=box),
        "arguments": run(
            COMMAND,
            capture_output=True,
            sandbox={"system": True, "execute": PYTHON, "strict": VERSION >= 6},
        ),
        "asyncio": asyncio.run(by_asyncio()),
        "map": next(errand_boy.map([COMMAND], sandbox=box)),
        "one of a map": next(errand_boy.map([mapping])),
        "client.run": client.run(COMMAND, capture_output=True, sandbox=box),
        "client.map": next(client.map([COMMAND], sandbox=box)),
    }
    with client.Popen(COMMAND, stderr=subprocess.PIPE, sandbox=box) as process:
        results["client.Popen"] = subprocess.CompletedProcess(
            COMMAND, process.wait(), b"", process.stderr.read()
        )
    with cast(Any, errand_boy.Popen)(COMMAND, stderr=subprocess.PIPE, sandbox=box) as process:
        results["Popen"] = subprocess.CompletedProcess(
            COMMAND, process.wait(), b"", process.stderr.read()
        )
    refused = {name for name, done in results.items() if b"PermissionError" in done.stderr}
    assert refused == set(results), {name: done.stderr for name, done in results.items()}
    assert run(COMMAND).returncode == 0


@pytest.mark.root
def test_with_another_user() -> None:
    done = run(["cat", "/etc/hostname"], capture_output=True, user=65534, sandbox=make())
    assert b"Permission denied" in done.stderr


def test_the_caller_stays_as_it_is(tmp_path: Path) -> None:
    """Commands in a sandbox that share the caller's memory, in several threads."""
    source = """
        import errand_boy
        def state():
            lines = open("/proc/self/status").readlines()
            names = "NoNewPrivs", "Seccomp", "Seccomp_filters", "CapEff"
            return [line for line in lines if line.split(":")[0] in names]
        before = state()
        box = errand_boy.Sandbox(system=True, strict=False)
        def many():
            for _ in range(25):
                subprocess.run(["true"], sandbox=box, check=True)
        threads = [threading.Thread(target=many) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert state() == before
        open(sys.argv[2], "w").close()
        open("/etc/hostname").close()
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        os.kill(os.getppid(), 0)
        report("free")
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_script(source, args=[tmp_path / "file"]) == "free"


def test_sandboxes_in_a_sandbox(world: World) -> None:
    """Each one can only restrict further."""
    inner = f"open({os.fspath(world.secret)!r})"
    code = f"""
sys.path[:0] = {sys.path!r}
from errand_boy import Sandbox, run
box = Sandbox(system=True, execute={PYTHON!r}, read=['/'], network=True, strict=False)
done = run([sys.executable, '-I', '-c', {inner!r}], sandbox=box, capture_output=True)
if b'PermissionError' in done.stderr:
    raise PermissionError(errno.EACCES, 'inner')
"""
    outer = make(read=[*filter(os.path.exists, sys.path)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert world.attempt(code, sandbox=outer) == "EACCES"


# Arguments


def test_bad_arguments(tmp_path: Path) -> None:
    for given, error, words in (
        ({"read": "/usr"}, TypeError, "read must be a list of paths"),
        ({"read": [tmp_path / "missing"]}, FileNotFoundError, "sandbox: No such file.*missing"),
        ({"network": "yes"}, TypeError, "network='yes'"),
        ({"network": {"listen": [1]}}, TypeError, "connect or bind"),
        ({"network": {"connect": [70000]}}, ValueError, "70000 is not a TCP port"),
    ):
        with pytest.raises(error, match=words):
            Sandbox(strict=False, **cast(Any, given))
    with pytest.raises(TypeError, match="it must be a Sandbox"):
        run(["true"], sandbox="tight")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_misspelt_argument_is_the_only_error() -> None:
    with pytest.raises(TypeError, match="systems"):
        Sandbox(**cast(Any, {"systems": True}))


def test_what_the_kernel_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        eb_landlock_version = staticmethod(lambda: 2)

        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

    monkeypatch.setattr(sandbox, "lib", Older())
    monkeypatch.setattr(sandbox, "_warned", set())
    with pytest.raises(OSError, match=r"truncation of files \(Linux 6.2\).*strict=False") as caught:
        Sandbox()
    assert caught.value.errno == errno.ENOTSUP
    with pytest.warns(RuntimeWarning, match="signals and abstract sockets") as warned:
        box = Sandbox(strict=False, system=True)
    assert warned[0].filename == __file__
    assert len(box.missing) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        box = Sandbox(strict=False, system=True)  # it has been said
    assert run(["true"], sandbox=box).returncode == 0

    Older.eb_landlock_version = staticmethod(lambda: -errno.ENOSYS)
    with pytest.warns(RuntimeWarning, match="no Landlock"):
        box = Sandbox(strict=False)
    assert box.fileno() == -1
    done = run(["cat", "/proc/self/status"], capture_output=True, sandbox=box)
    assert b"NoNewPrivs:\t1" in done.stdout
    assert b"Seccomp:\t2" in done.stdout


def test_descriptor_is_closed_with_the_sandbox() -> None:
    box = make()
    fd = box.fileno()
    assert os.get_inheritable(fd) is False
    del box
    with pytest.raises(OSError):
        os.fstat(fd)


def test_command_without_its_loader_does_not_start() -> None:
    """The sandbox lacks the loader, so the exec fails."""
    with pytest.raises(PermissionError) as caught:
        run(["/bin/true"], sandbox=Sandbox(strict=False))
    assert caught.value.filename == "/bin/true"


def test_threads_may_share_one() -> None:
    box = make()
    codes: list[int] = []

    def work() -> None:
        codes.extend(run(["true"], sandbox=box).returncode for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 160
