"""A job's keeper, started as the server starts it; its clients, ring file and journal."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from conftest import PATIENCE, until
from wire import HELPER, Client, Exited, Spawned, frame, option, pair, request, u32

from errand_boy._native import lib
from errand_boy._wire import frames as _frames

HEADER = struct.Struct("<8sII")
STATE = struct.Struct("<5Q")
RECORD = struct.Struct("<QQI")
ALL = struct.pack("<BI", 1, 100)


class Piece(NamedTuple):
    sequence: int
    time_us: int
    stream: int
    data: bytes


class Missed(NamedTuple):
    stream: int
    size: int


HELLO = (lib.EB_HELLO, u32(lib.EB_VERSION))


def job(
    *argv: str,
    streams: int = 6,
    options: Sequence[bytes] = (),
    targets: Sequence[int] = (),
) -> bytes:
    """A SPAWN whose output is kept; streams that are not streamed are /dev/null."""
    nulls = 7 & ~(streams | (4 if streams & lib.EB_JOINED else 0))
    return request(
        *argv,
        options=[
            option(lib.EB_TAG_SIGMASK, bytes(8)),
            option(lib.EB_TAG_STREAMS, bytes([streams])),
            *([option(lib.EB_TAG_NULL, bytes([nulls]))] if nulls else ()),
            *options,
        ],
        targets=targets,
    )


def shell(script: str, **how: Any) -> bytes:
    return job("/bin/sh", "-c", script, **how)


SUPERVISED = option(lib.EB_TAG_SUPERVISE, ALL)


def terminal(rows: int = 24, columns: int = 80, flags: int = 0) -> list[bytes]:
    size = struct.pack("<4IB", rows, columns, 0, 0, flags)
    return [option(lib.EB_TAG_SETSID), option(lib.EB_TAG_TERMINAL, size)]


def follow(first: int = 0, flags: int = 0, known: tuple[int, int] = (0, 0)) -> bytes:
    return frame(lib.EB_FOLLOW, struct.pack("<QQQB", first, *known, flags))


def attach(flags: int = lib.EB_ATTACH_WRITES, rows: int = 0, columns: int = 0) -> bytes:
    return frame(lib.EB_ATTACH, struct.pack("<B4I", flags, rows, columns, 0, 0))


class Visitor(Client):
    """A client of a keeper."""

    def answer(self) -> Piece | Missed | Exited | None:
        """The next frame but CREDIT, or None for CAUGHT_UP."""
        kind, payload = self.frame()
        while kind == lib.EB_CREDIT:
            kind, payload = self.frame()
        if kind == lib.EB_EXITED:
            status, *usage = _frames.EXITED.unpack(payload[: _frames.EXITED.size])
            return Exited(status, tuple(usage))
        if kind == lib.EB_CAUGHT_UP:
            assert payload == b""
            return None
        if kind == lib.EB_MISSED:
            return Missed(*struct.unpack("<BQ", payload))
        assert kind == lib.EB_PIECE, (kind, payload)
        sequence, time_us, stream = struct.unpack("<QQB", payload[:17])
        return Piece(sequence, time_us, stream, payload[17:])

    def output(self) -> Piece | Missed | None:
        answer = self.answer()
        assert not isinstance(answer, Exited)
        return answer

    def pieces(self) -> list[Piece | Missed]:
        """All pieces up to CAUGHT_UP."""
        return list(iter(self.output, None))

    def so_far(self) -> list[Piece | Missed]:
        """All that is kept now. The ring file itself changes while it is read."""
        self.send(follow())
        return self.pieces()

    def piece(self) -> Piece:
        """The next piece. Nothing may have been missed."""
        while (piece := self.output()) is None:
            pass
        assert isinstance(piece, Piece), piece
        return piece

    def until(self, data: bytes) -> bytes:
        """Read output until it has `data`, and return it."""
        got = b""
        while data not in got:
            got += self.piece().data
        return got

    def rest(self) -> tuple[list[Piece | Missed], Exited]:
        """All output up to EXITED, after which the keeper closes the connection."""
        got: list[Piece | Missed] = []
        while (answer := self.answer()) is None or not isinstance(answer, Exited):
            if answer is not None:
                got.append(answer)
        assert self.closed()
        return got, answer

    def end(self) -> Exited:
        """EXITED, with no output before it."""
        got, end = self.rest()
        assert not got
        return end

    def exit_status(self) -> int:
        return self.end().status


class Keeper:
    """A keeper's process, whose server is this process."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        ring: int | None = None,
        hands_over: bool = True,
        journal_path: Path | None = None,
    ) -> None:
        self.journal_path = journal_path or directory / "journal"
        if journal_path is None:
            self.journal_path.write_text('{"id": 1}\n')
        self.ring_path = directory / "ring"
        self.address = str(directory / "socket")
        self.control, theirs = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen()
        journal = os.open(self.journal_path, os.O_WRONLY | os.O_APPEND)
        fcntl.flock(journal, fcntl.LOCK_EX)
        ring_fd = os.open(self.ring_path, os.O_RDWR | os.O_CREAT, 0o600)
        given = [theirs.fileno(), listener.fileno(), ring_fd, journal]
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in given]
        command = ["keeper", "--job", *([f"--ring={ring}"] if ring else ()), *arguments]
        actions: list[Any] = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
        actions += [(os.POSIX_SPAWN_DUP2, fd, 3 + i) for i, fd in enumerate(moved)]
        self.pid = os.posix_spawn(HELPER, command, {}, file_actions=actions, setsid=True)
        for sock in theirs, listener:
            sock.close()
        for fd in (*moved, ring_fd, journal):
            os.close(fd)
        self.pidfd = os.pidfd_open(self.pid)
        self.clients: list[Visitor] = []
        self._ours: list[int] = []
        self.status: int | None = None
        self.control.sendall(_frames.OPENING)
        if hands_over:
            self.starter = self.hand_over(self.control)

    def hand_over(self, server: socket.socket, opening: bytes = _frames.OPENING) -> Visitor:
        ours, theirs = pair()
        with theirs:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", theirs.fileno()))]
            server.sendmsg([frame(lib.EB_ADOPT)], rights)
        client = Visitor(ours)
        self.clients.append(client)
        with suppress(BrokenPipeError):  # it has been refused already
            client.send(opening)
        return client

    def dial(self) -> socket.socket:
        server = socket.socket(socket.AF_UNIX)
        server.setblocking(False)
        until(lambda: server.connect_ex(self.address) != errno.EAGAIN)  # its queue is full
        server.settimeout(PATIENCE)
        return server

    def visitor(self, *frames: bytes) -> Visitor:
        """A later client, which has been greeted."""
        with self.dial() as server:
            server.sendall(_frames.OPENING)
            client = self.hand_over(server)
        assert client.frame() == HELLO
        for data in frames:
            client.send(data)
        return client

    def follower(
        self, first: int = 0, flags: int = lib.EB_FOLLOW_ON, known: tuple[int, int] = (0, 0)
    ) -> Visitor:
        return self.visitor(follow(first, flags, known))

    def steps(self, script: str, **how: Any) -> Callable[[], None]:
        """Start a shell script, whose `read x` waits for a call of the returned function."""
        read, write = os.pipe()
        self._ours.append(write)
        try:
            self.start(
                shell(
                    f"exec 9<&3 3<&-; {script.replace('read x', 'read x <&9')}", targets=[3], **how
                ),
                [read],
            )
        finally:
            os.close(read)

        def step() -> None:
            os.write(write, b"\n")

        return step

    def start(self, data: bytes, fds: Sequence[int] = ()) -> int:
        """Start the command; return its pid."""
        assert self.starter.frame() == HELLO
        self.starter.send(data, fds)
        answer = self.starter.reply()
        assert isinstance(answer, Spawned), answer
        assert answer.by_helper
        return answer.pid

    def journal(self) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        for line in self.journal_path.read_text().splitlines():
            if line.isspace():
                continue
            entry.update(json.loads(line))
        return entry

    def is_locked(self) -> bool:
        with open(self.journal_path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def kept(self) -> list[Piece]:
        return read_ring(self.ring_path)

    def private_kib(self) -> int:
        """Its changed memory, and the part of its program that no other keeper shares."""
        kib, program = 0, False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            name, *words = line.split()
            if "-" in name:
                program = words[-1].endswith("errand-boy-helper")
            elif name == "Private_Dirty:" or (name == "Private_Clean:" and program):
                kib += int(words[0])
        return kib

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def ended(self, seconds: float = PATIENCE) -> bool:
        return bool(select.select([self.pidfd], [], [], seconds)[0])

    def wait(self) -> int:
        """Its exit status."""
        if self.status is None:
            assert self.ended()
            self.status = os.waitpid(self.pid, 0)[1]
        return self.status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == signal.SIGKILL

    def close(self) -> None:
        self.control.close()
        for client in self.clients:
            client.sock.close()
        if self.status is None and not self.ended(0):
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        for fd in (self.pidfd, *self._ours):
            os.close(fd)


@contextmanager
def keeping(directory: Path, *arguments: str, **how: Any) -> Iterator[Keeper]:
    keeper = Keeper(directory, *arguments, **how)
    try:
        yield keeper
    finally:
        keeper.close()


def read_ring(path: Path) -> list[Piece]:
    """The records of a ring file, merged. This parses the file without the library."""
    data = path.read_bytes()
    magic, size, count = HEADER.unpack_from(data)
    assert (magic, size, count) == (b"EBRING1\0", 4096, 2)
    pieces: list[Piece] = []
    for i in range(count):
        offset, capacity, head, tail, _ = STATE.unpack_from(data, HEADER.size + i * STATE.size)
        if capacity == 0:
            continue
        assert tail <= head <= tail + capacity
        ring = data[offset : offset + capacity].ljust(capacity, b"\0")

        def get(at: int, size: int, ring: bytes = ring, capacity: int = capacity) -> bytes:
            at %= capacity
            return (ring + ring)[at : at + size]

        while tail < head:
            sequence, time_us, size = RECORD.unpack(get(tail, RECORD.size))
            assert 0 < size <= capacity // 4
            pieces.append(Piece(sequence, time_us, i + 1, get(tail + RECORD.size, size)))
            tail += RECORD.size + size
        assert tail == head
    pieces.sort()
    return pieces


def text(pieces: Sequence[Piece | Missed], stream: int = 1) -> bytes:
    return b"".join(p.data for p in pieces if isinstance(p, Piece) and p.stream == stream)
