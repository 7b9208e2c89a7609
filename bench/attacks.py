"""What a hostile user does to a daemon and to its other users; for bench.hostile.

Each attack is a round of about a second at most. Whatever it opens is in `Attacker.stack`, and is
closed when the round is over. An attack that should have been impossible is a breach.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from errand_boy._native import lib
from errand_boy._wire import frames

MOST_SOCKETS = 200  # of one round
ROUND = 1.0  # seconds: how long a round holds what it has opened
PAUSE = 0.01  # seconds, after a round that failed early
BIG = 16 << 20
END = b"\r\n\r\n"
HELLO = frames.OPENING
STATUS = b"\0" + frames.HEADER.pack(4, lib.EB_STATUS) + struct.pack("<I", lib.EB_VERSION)
PRIVATE = ("environ", "maps", "mem", "pagemap", "auxv", "syscall")  # of /proc/PID
BOMB = "bomb() { bomb | bomb & }; bomb; sleep 5"
SYS_PIDFD_GETFD = 438


def spawn(*argv: str, options: bytes = b"") -> bytes:
    """Return a SPAWN whose command leads a group of its own."""
    words = [os.fsencode(word) for word in argv]
    return frames.frame(
        lib.EB_SPAWN,
        [
            frames.strings(lib.EB_TAG_EXECUTABLES, words[:1]),
            frames.strings(lib.EB_TAG_ARGV, words),
            frames.number(lib.EB_TAG_PGROUP, 0),
            options,
        ],
    )


def uid_of(pid: int) -> int | None:
    """Return the real user of a process, or None if it has gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Uid:")).split()[1])
    return None


def parent_of(pid: int) -> int | None:
    """Return the parent of a process, or None if it has gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def pids() -> list[int]:
    """Return all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


class Attacker:
    """A hostile user's process. `victims` are processes of others."""

    def __init__(self, path: str, server: int, victims: list[int], seed: int) -> None:
        self.path = path
        self.server = server
        self.victims = victims
        self.random = random.Random(seed)
        self.stack = ExitStack()
        self.breaches = 0

    def round(self, attack: Callable[[Attacker], None]) -> None:
        """Attack once."""
        with ExitStack() as self.stack:
            try:
                attack(self)
            except OSError:  # refused, or too many connections
                self.hold(PAUSE)

    def breach(self, text: str) -> None:
        """Record a breach."""
        self.breaches += 1
        print(f"BREACH: user {os.getuid()}: {text}", file=sys.stderr, flush=True)

    def connect(self, first: bytes = b"") -> socket.socket:
        """Return a connection over which `first` has been sent. Raises OSError."""
        sock = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # connect() waits for room, too
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(ROUND), 0))
        sock.connect(self.path)
        sock.sendall(first, socket.MSG_NOSIGNAL)
        return sock

    def greeted(self) -> socket.socket:
        """Return a connection that a helper serves. Raises OSError."""
        sock = self.connect(HELLO)
        sock.recv(9)
        return sock

    def hold(self, seconds: float = ROUND) -> None:
        """Do nothing for a while."""
        select.select([], [], [], seconds)

    def helpers(self) -> Iterator[int]:
        """Yield this user's own helpers."""
        for pid in pids():
            if parent_of(pid) == self.server and uid_of(pid) == os.getuid():
                with suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"errand-boy: helper"):
                        yield pid

    def others(self) -> Iterator[int]:
        """Yield the server, its children that are not this user's, and the other victims."""
        yield self.server
        yield from self.victims
        for pid in pids():
            if parent_of(pid) == self.server and uid_of(pid) not in (None, os.getuid()):
                yield pid

    def is_anothers(self, pid: int) -> bool:
        """Return whether a process is still another user's: a new helper becomes this user's."""
        return pid == self.server or pid in self.victims or uid_of(pid) not in (None, os.getuid())

    def lingering(self, count: int) -> list[int]:
        """Return TCP sockets whose last close takes 20 seconds, and which are closed by then."""
        listener = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made = []
        for _ in range(count):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.connect(listener.getsockname())
            self.stack.enter_context(listener.accept()[0])  # which does not read
            sock.setblocking(False)
            with suppress(BlockingIOError):
                for _ in range(100):
                    sock.send(bytes(1 << 16))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
            made.append(sock.detach())
        return made

    def send_lingering(self, sock: socket.socket, data: bytes, fds: list[int]) -> None:
        """Send them, so that the last copies are where `sock` ends. Raises OSError."""
        try:
            socket.send_fds(sock, [data], fds)
        except OSError:
            for fd in fds:
                with socket.socket(fileno=os.dup(fd)) as copy:
                    copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
            raise
        finally:
            for fd in fds:
                os.close(fd)


def lingering_to_server(a: Attacker) -> None:
    """Sockets whose close sleeps, sent before any frame."""
    for first in (HELLO[:3], HELLO, STATUS, b"true" + END + END, bytes(20)):
        with suppress(OSError):
            sock = a.connect()
            a.send_lingering(sock, first, a.lingering(4))
            sock.close()


def lingering_to_helper(a: Attacker) -> None:
    """The same in the helper, with whole requests, half requests and none."""
    for data in (spawn("/bin/true"), spawn("/bin/true")[:7], b"\xff" * 9, b"x"):
        with suppress(OSError):
            sock = a.greeted()
            a.send_lingering(sock, data, a.lingering(4))
            sock.close()
    a.hold()


def parked_files(a: Attacker) -> None:
    """Files and pipes that a helper has to keep for requests that are never completed."""
    with tempfile.TemporaryFile() as file:
        r, w = os.pipe()
        a.stack.callback(os.close, r)
        a.stack.callback(os.close, w)
        for _ in range(20):
            with suppress(OSError):
                sock = a.greeted()
                head = spawn("/bin/true")
                for i in range(4):
                    socket.send_fds(sock, [head[i : i + 1]], [file.fileno(), r, w] * 80)
        a.hold()


def half_frames(a: Attacker) -> None:
    """Almost all of the longest frame, and then nothing more."""
    part = bytes(1 << 20)
    for _ in range(4):
        with suppress(OSError):
            sock = a.greeted()
            sock.sendall(frames.HEADER.pack(BIG, lib.EB_SPAWN))
            for _ in range(15):
                sock.sendall(part, socket.MSG_NOSIGNAL)
    a.hold()


def descriptor_flood(a: Attacker) -> None:
    """As many descriptors as the kernel takes, to server and helper."""
    with open(os.devnull) as null:
        for make in (a.greeted, a.connect):
            with suppress(OSError):
                sock = make()
                for _ in range(200):
                    socket.send_fds(sock, [b"\0"], [null.fileno()] * 253)


def garbage(a: Attacker) -> None:
    """Random bytes, and frames of which some bytes are random."""
    for _ in range(50):
        with suppress(OSError):
            kind = a.random.randrange(3)
            if kind == 0:
                sock = a.connect(a.random.randbytes(a.random.randrange(1, 5000)))
            else:
                data = bytearray(spawn("/bin/true") if kind == 1 else STATUS + spawn("/bin/true"))
                for _ in range(a.random.randrange(1, 6)):
                    data[a.random.randrange(len(data))] = a.random.randrange(256)
                sock = a.connect(HELLO if kind == 1 else b"")
                sock.sendall(data, socket.MSG_NOSIGNAL)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(0.05)
            sock.recv(4096)


def connection_flood(a: Attacker) -> None:
    """Connections as fast as possible, of each kind and of none."""
    end = time.monotonic() + ROUND
    kept: list[socket.socket] = []
    while time.monotonic() < end:
        try:
            kept.append(a.connect(a.random.choice([b"", b"\0", HELLO, STATUS, b"true"])))
        except OSError:
            kept.append(a.stack.enter_context(socket.socket()))
        if len(kept) > MOST_SOCKETS:
            for sock in kept:
                sock.close()
            kept.clear()


def never_reading(a: Attacker) -> None:
    """Many requests, and answers that nobody reads."""
    for _ in range(20):
        with suppress(OSError):
            sock = a.connect(HELLO)
            sock.setblocking(False)
            request = spawn("/bin/true") * 20
            for _ in range(50):
                sock.send(request, socket.MSG_NOSIGNAL)
    for line in (b"yes", b"yes >&2"):
        with suppress(OSError):
            a.connect(line + END + END)
    a.hold()


def fork_bomb(a: Attacker) -> None:
    """Commands that start as many processes as the kernel allows."""
    sock = a.greeted()
    sock.sendall(spawn("/bin/sh", "-c", BOMB, options=frames.number(lib.EB_TAG_ON_CLOSE, 0)))
    a.hold()
    spared = {os.getpid(), *a.helpers()}
    for pid in pids():
        if pid not in spared and uid_of(pid) == os.getuid():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def kill_own_helper(a: Attacker) -> None:
    """SIGKILL, while commands run."""
    for _ in range(5):
        with suppress(OSError):
            sock = a.greeted()
            tied = frames.number(lib.EB_TAG_ON_CLOSE, a.random.randrange(500))
            sock.sendall(spawn("/bin/sleep", "2", options=tied))
            sock.recv(100)
    for pid in a.helpers():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    a.hold(0.2)


def stop_own_helper(a: Attacker) -> None:
    """SIGSTOP, and then connections and queries that it has to take."""
    a.greeted()
    stopped = list(a.helpers())
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    for _ in range(MOST_SOCKETS):
        with suppress(OSError):
            a.connect(HELLO + spawn("/bin/true"))
            a.connect(STATUS)
    a.hold()
    for pid in stopped:
        if a.random.randrange(2):
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)


def signal_others(a: Attacker) -> None:
    """Signals to the server, to others' helpers and to their clients."""
    for pid in a.others():
        for number in (0, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
            if not a.is_anothers(pid):
                break
            try:
                os.kill(pid, number)
            except OSError:
                continue
            if a.is_anothers(pid):
                a.breach(f"signal {number} to {pid}")
    sock = a.greeted()
    for pid in a.others():
        for target in (pid, -pid):
            frame = struct.pack("<ii", target, signal.SIGKILL)
            sock.sendall(frames.frame(lib.EB_SIGNAL, [frame]), socket.MSG_NOSIGNAL)
    a.hold(0.2)


def read_others(a: Attacker) -> None:
    """What /proc shows of the server, of others' helpers and of their clients."""
    for pid in a.others():
        for name in PRIVATE:
            with suppress(OSError), open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
                if file.read(16) and a.is_anothers(pid):
                    a.breach(f"/proc/{pid}/{name} can be read")
        for name in ("cwd", "exe", "root"):
            with suppress(OSError):
                os.readlink(f"/proc/{pid}/{name}")
                if a.is_anothers(pid):
                    a.breach(f"/proc/{pid}/{name} can be read")
        with suppress(OSError):
            os.listdir(f"/proc/{pid}/fd")
            if a.is_anothers(pid):
                a.breach(f"/proc/{pid}/fd can be read")
        sock = take_descriptor(a, pid, 3)
        if sock is not None and a.is_anothers(pid):
            a.breach(f"a descriptor of {pid} can be had")
    a.hold(0.2)  # the daemon has no part in this: without it, the test would measure busy CPUs


def take_descriptor(a: Attacker, pid: int, number: int) -> socket.socket | None:
    """Return a copy of a process's socket, or None if that is forbidden."""
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
        fd = ctypes.CDLL(None).syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
        os.close(pidfd)
        if fd >= 0:
            return a.stack.enter_context(socket.socket(fileno=fd))
    return None


def helper_taken_over(a: Attacker) -> None:
    """Frames to the server that a user writes for their helper: lies, nonsense, far too much."""
    a.greeted()
    for pid in a.helpers():
        control = take_descriptor(a, pid, 3)
        if control is None:
            continue
        number = struct.pack("<I", a.random.randrange(1, 2000))
        lies = [
            frames.frame(lib.EB_WANT, [number]) + frames.frame(lib.EB_DONE, [number]),
            frames.frame(lib.EB_CLOSED, [number]),
            frames.frame(lib.EB_REFUSED, [b"x" * 50]),
            frames.frame(lib.EB_FULL, []),
            a.random.randbytes(64),
        ]
        lie = a.random.choice(lies) * 200
        end = time.monotonic() + ROUND / 2
        with suppress(OSError):
            while time.monotonic() < end:
                if select.select([], [control], [], 0.01)[1]:
                    control.send(lie, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        if a.random.randrange(2):
            with suppress(OSError):
                a.send_lingering(control, frames.HEADER.pack(0, lib.EB_FULL), a.lingering(1))


def endless_text(a: Attacker) -> None:
    """Text requests without end: bytes one by one, and an endless input."""
    slow = [a.connect(b"cat" + END * (i % 2)) for i in range(20)]
    fast = a.connect(b"cat" + END)
    fast.setblocking(False)
    end = time.monotonic() + ROUND
    while time.monotonic() < end:
        for sock in slow:
            sock.send(b"x", socket.MSG_NOSIGNAL)
        with suppress(BlockingIOError):
            for _ in range(10):
                fast.send(bytes(1 << 16), socket.MSG_NOSIGNAL)
        a.hold(0.01)


def status_flood(a: Attacker) -> None:
    """As many queries as possible."""
    end = time.monotonic() + ROUND
    while time.monotonic() < end:
        with suppress(OSError):
            for sock in [a.connect(STATUS) for _ in range(10)]:
                sock.close()


ATTACKS: dict[str, Callable[[Attacker], None]] = {
    "lingering sockets to the server": lingering_to_server,
    "fork bombs": fork_bomb,
    "lingering sockets to the helper": lingering_to_helper,
    "connection floods": connection_flood,
    "parked files": parked_files,
    "half frames of 16 MiB": half_frames,
    "floods of descriptors": descriptor_flood,
    "garbage": garbage,
    "answers never read": never_reading,
    "SIGKILL to its own helper": kill_own_helper,
    "SIGSTOP to its own helper": stop_own_helper,
    "signals to others": signal_others,
    "endless text requests": endless_text,
    "/proc of others": read_others,
    "floods of status queries": status_flood,
    "its helper's voice": helper_taken_over,
}
