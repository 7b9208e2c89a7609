"""A client of the protocol: frames as bytes, replies, connections, and helpers to connect to.

It parses replies without the library, since both sides could have the same mistake.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from conftest import PATIENCE, until

import errand_boy
from errand_boy._native import lib
from errand_boy._wire import frames

HELPER = os.environ.get("ERRAND_BOY_HELPER") or str(
    Path(errand_boy.__file__).with_name("errand-boy-helper")
)
USAGE = tuple(range(1, 10))


# What is sent


def frame(kind: int, *parts: bytes) -> bytes:
    return frames.frame(kind, parts)


def option(tag: int, value: bytes = b"") -> bytes:
    return frames.option(tag, value)


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def strings(tag: int, *values: str) -> bytes:
    return frames.strings(tag, [os.fsencode(value) for value in values])


def request(*argv: str, options: Sequence[bytes] = (), targets: Sequence[int] = ()) -> bytes:
    """A request without signals and limits."""
    parts = [
        strings(lib.EB_TAG_EXECUTABLES, argv[0]),
        strings(lib.EB_TAG_ARGV, *argv),
        *options,
    ]
    if targets:
        parts.append(frames.numbers(lib.EB_TAG_FDS, targets))
    return frame(lib.EB_SPAWN, *parts)


def spawn(*argv: str, targets: Sequence[int] = ()) -> bytes:
    """A request as clients send it, since the helper itself blocks all signals."""
    return request(*argv, options=[option(lib.EB_TAG_SIGMASK, bytes(8))], targets=targets)


def slow(program: str, tries: int = 200_000, options: Sequence[bytes] = ()) -> bytes:
    """A request whose exec takes tenths of a second, because it tries many missing names."""
    names = [*["/-"] * tries, program]
    argv = strings(lib.EB_TAG_ARGV, "slow")
    return frame(lib.EB_SPAWN, strings(lib.EB_TAG_EXECUTABLES, *names), argv, *options)


def signal_frame(pid: int, number: int) -> bytes:
    return frame(lib.EB_SIGNAL, struct.pack("<ii", pid, number))


def in_queue(number: int, places: int) -> bytes:
    return option(lib.EB_TAG_QUEUE, struct.pack("<IB", number, places))


TRUE = strings(lib.EB_TAG_EXECUTABLES, "/bin/true") + strings(lib.EB_TAG_ARGV, "true")
OWN_GROUP = option(lib.EB_TAG_PGROUP, u32(0))
COALESCE = option(lib.EB_TAG_COALESCE)


# What a helper answers


def spawned(pid: int = 77, owner: int = lib.EB_OWNER_HELPER) -> bytes:
    return frame(lib.EB_SPAWNED, struct.pack("<iB", pid, owner))


def exited(status: int = 0, more: bytes = b"") -> bytes:
    return frame(lib.EB_EXITED, frames.EXITED.pack(status, *USAGE), more)


NOT_FOUND = frame(lib.EB_FAILED, struct.pack("<iiBB", 0, errno.ENOENT, lib.EB_STAGE_EXEC, 0))


class Spawned(NamedTuple):
    pid: int
    owner: int

    @property
    def by_helper(self) -> bool:
        return bool(self.owner == lib.EB_OWNER_HELPER)


class Failed(NamedTuple):
    pid: int
    errno: int
    stage: int
    member: int = 0


class Exited(NamedTuple):
    status: int
    usage: tuple[int, ...]


Reply = Spawned | Failed | Exited


def decode(kind: int, payload: bytes) -> Reply:
    if kind == lib.EB_SPAWNED:
        return Spawned(*struct.unpack("<iB", payload))
    if kind == lib.EB_FAILED:
        return Failed(*struct.unpack("<iiBB", payload))
    assert kind == lib.EB_EXITED, (kind, payload)
    status, *usage = struct.unpack("<i9Q", payload)
    return Exited(status, tuple(usage))


# Both ends


def pair() -> tuple[socket.socket, socket.socket]:
    """Our end of a connection, and the helper's. A private helper checks who sends."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


class Client:
    """One end of a connection; every wait is bounded."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
        sent = self.sock.sendmsg([data], rights if fds else [])
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except ConnectionResetError:  # it was closed with bytes that nobody had read
                more = b""
            if not more:
                break
            data += more
        return data

    def frame(self) -> tuple[int, bytes]:
        header = self._read(frames.HEADER.size)
        assert len(header) == frames.HEADER.size, f"closed after {header!r}"
        size, kind = frames.HEADER.unpack(header)
        payload = self._read(size)
        assert len(payload) == size
        return kind, payload

    def reply(self) -> Reply:
        return decode(*self.frame())

    def refusal(self) -> str:
        """The reason, after which the connection is closed."""
        kind, payload = self.frame()
        assert kind == lib.EB_REFUSED, (kind, payload)
        assert self.closed()
        return payload.decode()

    def closed(self) -> bool:
        return self._read(1) == b""

    def run(self, *argv: str, fds: Sequence[int] = (), targets: Sequence[int] = ()) -> Reply:
        self.send(spawn(*argv, targets=targets), fds)
        return self.reply()

    def status(self, *argv: str) -> int:
        """Run a command, whoever owns it; return its wait status."""
        started = self.run(*argv)
        assert isinstance(started, Spawned), started
        if not started.by_helper:
            return os.waitpid(started.pid, 0)[1]
        ended = self.reply()
        assert isinstance(ended, Exited)
        return ended.status


class Helper:
    def __init__(self, *arguments: str, under: Sequence[str] = ()) -> None:
        """`under` is a command that becomes the helper, such as a shell's `exec "$@"`."""
        ours, theirs = pair()
        caller = os.pidfd_open(os.getpid())
        # Out of the way of the numbers that they are to get.
        control = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 10)
        moved = fcntl.fcntl(caller, fcntl.F_DUPFD_CLOEXEC, 10)
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)),
            (os.POSIX_SPAWN_DUP2, control, 3),
            (os.POSIX_SPAWN_DUP2, moved, 4),
        ]
        command = [*under, HELPER, *arguments]
        self.pid = os.posix_spawn(command[0], command, {}, file_actions=actions)
        theirs.close()
        for fd in (caller, control, moved):
            os.close(fd)
        self.pidfd = os.pidfd_open(self.pid)
        self.clients: list[Client] = []
        self.control = Client(ours)
        self.control.send(frames.OPENING)
        self.private = "--private" in arguments
        if self.private:
            kind, payload = self.control.frame()
            assert (kind, struct.unpack("<6I", payload[:24])) == (lib.EB_IDS, ids())

    def adopt(self, fd: int) -> None:
        self.control.send(frame(lib.EB_ADOPT), [fd])

    def unopened(self) -> Client:
        """A connection over which we have sent nothing."""
        ours, theirs = pair()
        with theirs:
            self.adopt(theirs.fileno())
        client = Client(ours)
        self.clients.append(client)
        return client

    def connect(self) -> Client:
        client = self.unopened()
        client.send(frames.OPENING)
        assert client.frame() == (lib.EB_HELLO, struct.pack("<I", lib.EB_VERSION))
        return client

    def part(self, client: Client) -> None:
        """Close a connection, and expect the helper to report it."""
        client.sock.close()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def comes_to(self, descriptors: int) -> bool:
        """Return whether its descriptors become this many, since it acts a little later."""
        return until(lambda: self.descriptors() == descriptors)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def children(self) -> list[int]:
        return list(
            map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
        )

    def ended(self, seconds: float = PATIENCE) -> bool:
        return bool(select.select([self.pidfd], [], [], seconds)[0])

    def close(self) -> None:
        for client in (*self.clients, self.control):
            client.sock.close()


def ids() -> tuple[int, ...]:
    """Our real, effective and saved ids after an exec."""
    (uid, euid, _), (gid, egid, _) = os.getresuid(), os.getresgid()
    return uid, euid, euid, gid, egid, egid


AnyHelper = TypeVar("AnyHelper", bound=Helper)


@contextmanager
def sound(helper: AnyHelper) -> Iterator[AnyHelper]:
    """A helper that, after the block, must have lost nothing and must end normally."""
    try:
        first = helper.connect()  # it has all that it works with when it says HELLO
        before = helper.descriptors() - 1
        helper.part(first)
        assert helper.comes_to(before)
        yield helper
        if helper.control.sock.fileno() != -1:
            for client in helper.clients:
                client.sock.close()
            assert helper.comes_to(before)
    finally:
        helper.close()
        ended = helper.ended()
        if not ended:
            os.kill(helper.pid, signal.SIGKILL)
        _, status = os.waitpid(helper.pid, 0)
        os.close(helper.pidfd)
    assert ended
    assert status == 0


@contextmanager
def room_for(descriptors: int, helper: Helper) -> Iterator[None]:
    used = {int(fd) for fd in os.listdir(f"/proc/{helper.pid}/fd")}
    lowered = 0
    while descriptors or lowered in used:
        descriptors -= lowered not in used
        lowered += 1
    limits = resource.prlimit(helper.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(helper.pid, resource.RLIMIT_NOFILE, (lowered, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(helper.pid, resource.RLIMIT_NOFILE, limits)


# A daemon's helper


class PoolClient(Client):
    id = 0


class Pool(Helper):
    """A helper without --private. `flags` are those of the next connections."""

    def __init__(self, *arguments: str, under: Sequence[str] = ()) -> None:
        super().__init__(*arguments, under=under)
        if any(argument.startswith("--uid=") for argument in arguments):
            assert self.control.frame()[0] == lib.EB_IDS
        self.flags = 0
        self.adopted = 0

    def adopt(self, fd: int) -> None:
        self.adopted += 1
        self.tell(lib.EB_ADOPT, struct.pack("<IB", self.adopted, self.flags), fds=[fd])

    def unopened(self) -> PoolClient:
        client = PoolClient(super().unopened().sock)
        client.id = self.adopted
        self.clients[-1] = client
        return client

    def connect(self) -> PoolClient:
        client = self.unopened()
        client.send(frames.OPENING)
        assert client.frame() == (lib.EB_HELLO, u32(lib.EB_VERSION))
        return client

    def part(self, client: Client) -> None:
        super().part(client)
        assert isinstance(client, PoolClient)
        self.told((lib.EB_CLOSED, client.id))

    def tell(self, kind: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        self.control.send(frame(kind, payload), fds)

    def told(self, *expected: tuple[int, int]) -> None:
        """Expect these messages of (kind, connection id), in this order."""
        for kind, number in expected:
            assert self.control.frame() == (kind, u32(number))

    def silent(self) -> bool:
        """Return whether it sends only its answer, after a round trip through its loop."""
        self.tell(lib.EB_QUERY)
        return bool(self.control.frame()[0] == lib.EB_REPORT)

    def report(self) -> Report:
        self.tell(lib.EB_QUERY)
        kind, payload = self.control.frame()
        assert kind == lib.EB_REPORT
        return Report.decode(payload)

    def private_bytes(self) -> int:
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        fields = dict(line.split(":") for line in rollup.splitlines()[1:])
        return sum(
            int(fields[name].split()[0]) << 10 for name in ("Private_Clean", "Private_Dirty")
        )


class Live(NamedTuple):
    pid: int
    connection: int
    since_ms: int
    title: bytes


class Report(NamedTuple):
    started: int
    ended: int
    connections: int
    failures: dict[tuple[int, int], int]
    buckets: list[int]
    live: dict[int, Live]

    @classmethod
    def decode(cls, payload: bytes) -> Report:
        at = 0

        def get(layout: str) -> tuple[int, ...]:
            nonlocal at
            values = struct.unpack_from("<" + layout, payload, at)
            at += struct.calcsize("<" + layout)
            return values

        started, ended, connections, kinds = get("QQII")
        failures = {}
        for _ in range(kinds):
            stage, error, count = get("BiQ")
            failures[stage, error] = count
        (size,) = get("I")
        buckets = list(get(f"{size}Q"))
        live = {}
        (size,) = get("I")
        for _ in range(size):
            pid, connection, since, length = get("iIQH")
            live[connection] = Live(pid, connection, since, payload[at : at + length])
            at += length
        assert at == len(payload)
        return cls(started, ended, connections, failures, buckets, live)


@contextmanager
def running(*arguments: str, under: Sequence[str] = ()) -> Iterator[Pool]:
    with sound(Pool(*arguments, under=under)) as it:
        yield it


def with_arguments(*arguments: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pool", [arguments], indirect=True, ids=[" ".join(arguments)])


def started(client: Client, data: bytes = b"", fds: Sequence[int] = ()) -> int:
    """Send a request; return the pid of its command."""
    if data:
        client.send(data, fds)
    answer = client.reply()
    assert isinstance(answer, Spawned), answer
    assert answer.by_helper
    return answer.pid


def ended(client: Client) -> int:
    answer = client.reply()
    assert isinstance(answer, Exited), answer
    return answer.status


def output(
    client: Client, *argv: str, options: Sequence[bytes] = (), fds: Sequence[int] = ()
) -> str:
    """Return a command's output; more descriptors, as for a directory, follow its output's."""
    read, write = os.pipe()
    with open(read) as stream:
        try:
            started(client, request(*argv, options=options, targets=[1]), [write, *fds])
        finally:
            os.close(write)
        text = stream.read()
    assert ended(client) == 0
    return text


def gone(pid: int) -> bool:
    """Return whether the process ends. If it is an orphan that we have adopted, reap it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ended = bool(select.select([pidfd], [], [], PATIENCE)[0])
    finally:
        os.close(pidfd)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return ended


def on_close(milliseconds: int) -> bytes:
    return option(lib.EB_TAG_ON_CLOSE, u32(milliseconds))


def unread(client: Client) -> int:
    """How many bytes that the client has sent are still in its socket's queue."""
    siocoutq = 0x5411
    return int(struct.unpack("i", fcntl.ioctl(client.sock, siocoutq, bytes(4)))[0])


def drained(pool: Pool) -> None:
    """Tell it to drain, and wait until it has read that."""
    pool.tell(lib.EB_DRAIN)
    pool.tell(lib.EB_QUERY)


class Result(NamedTuple):
    output: bytes
    error: bytes
    status: int


def streamed(
    *argv: str, streams: int, options: Sequence[bytes] = (), targets: Sequence[int] = ()
) -> bytes:
    bits = option(lib.EB_TAG_STREAMS, bytes([streams]))
    return request(*argv, options=[bits, *options], targets=targets)


EXITED_SIZE = 4 + 9 * 8


def converse(
    client: Client, data: bytes | None = None, streams: int = 0b11, brief: bool = False
) -> Result:
    """Send input, within the window, and read all until the connection is free."""
    texts = {lib.EB_STDOUT: b"", lib.EB_STDERR: b""}
    chunks: dict[int, list[bytes]] = {lib.EB_STDOUT: [], lib.EB_STDERR: []}
    open_streams = {kind for bit, kind in ((2, lib.EB_STDOUT), (4, lib.EB_STDERR)) if streams & bit}
    window, status, at = lib.EB_WINDOW, None, 0
    while open_streams or status is None:
        # A client that waits to send, and does not read meanwhile, may wait for ever.
        sending = [client.sock] if data is not None and (window or at == len(data)) else []
        readable, _, _ = select.select([client.sock], sending, [], PATIENCE)
        if sending and not readable:
            assert data is not None
            part = data[at : at + window]
            client.send(frame(lib.EB_STDIN, part))
            at += len(part)
            window -= len(part)
            if not part:
                data = None
            continue
        kind, payload = client.frame()
        if kind == lib.EB_CREDIT:
            window += struct.unpack("<I", payload)[0]
            assert window <= lib.EB_WINDOW
        elif kind in chunks:
            assert kind in open_streams
            chunks[kind].append(payload)
            if not payload:
                open_streams.remove(kind)
        else:
            answer = decode(kind, payload[:EXITED_SIZE])
            assert isinstance(answer, Exited)
            assert len(payload) == EXITED_SIZE + (13 if brief else 0)
            status = answer.status
    for kind, parts in chunks.items():
        texts[kind] = b"".join(parts)
    return Result(texts[lib.EB_STDOUT], texts[lib.EB_STDERR], status)
