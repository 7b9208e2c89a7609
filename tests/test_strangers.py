"""Attacks on the daemon by what strangers send or leave to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import until
from daemon import acting_as, spawn, started_daemon, taken_from

from errand_boy._native import lib
from errand_boy._wire import frames

HELLO = frames.OPENING
STATUS = b"\0" + frames.HEADER.pack(4, lib.EB_STATUS) + struct.pack("<I", lib.EB_VERSION)
STRANGER = 12345
END = b"\r\n\r\n"


@pytest.fixture
def lingering() -> Iterator[Callable[[], int]]:
    """Yield descriptors of TCP sockets whose last close takes 100 seconds."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

        def make() -> int:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.connect(listener.getsockname())
            stack.enter_context(listener.accept()[0])  # which does not read
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(1 << 16))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 100))
            return sock.detach()

        yield make


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process, so that what is sent meanwhile stays in its queues."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def send_lingering(sock: socket.socket, data: bytes, make: Callable[[], int]) -> None:
    """Send a lingering socket with `data`, so that only the queue of a stopped process has it."""
    fd = make()
    try:
        socket.send_fds(sock, [data], [fd])
    except OSError:  # it has been refused already
        with socket.socket(fileno=os.dup(fd)) as copy:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
    os.close(fd)


@pytest.mark.root
@pytest.mark.parametrize(
    ("uid", "parts"),
    [
        (STRANGER, [HELLO]),
        (STRANGER, [HELLO[:3]]),
        (STRANGER, [b"true" + END + END]),
        (0, [HELLO[:3]]),
        (0, [STATUS]),
        (0, [STATUS, b"more"]),
        (0, [b"true" + END + END]),
        (0, [b"tr", b"ue" + END + END]),
        (0, [b"true" + END, b"input", b"more" + END]),
        (0, [b"sleep 0.1" + END + END, b"more"]),
        (0, [bytes(20)]),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_descriptor_whose_close_sleeps_holds_up_nobody(
    public_dir: Path, lingering: Callable[[], int], uid: int, parts: list[bytes], half: bool
) -> None:
    with started_daemon(public_dir, "--patience=0.2") as daemon:
        os.chmod(daemon.path, 0o666)
        daemon.status()
        server = psutil.Process(daemon.process.pid)
        before = server.num_fds()
        socks = []
        for _ in range(5):
            with acting_as(uid, uid, []):
                socks.append(daemon.socket())
            for part in parts:
                with stopped(server.pid):
                    send_lingering(socks[-1], part, lingering)
                daemon.status()
            if half:
                with contextlib.suppress(OSError):
                    socks[-1].shutdown(socket.SHUT_WR)
            daemon.status()
        for sock in socks:
            sock.close()
        until(lambda: server.num_fds() <= before)
        assert daemon.stop() == 0


@pytest.mark.root
def test_connections_that_are_never_accepted_hold_up_no_end(
    public_dir: Path, lingering: Callable[[], int]
) -> None:
    with started_daemon(public_dir, "--grace=0.1") as daemon:
        os.chmod(daemon.path, 0o666)
        with stopped(daemon.process.pid), acting_as(STRANGER, STRANGER, []):
            socks = [daemon.socket() for _ in range(100)]  # more than it accepts before it stops
            for sock in socks:
                send_lingering(sock, HELLO, lingering)
        assert daemon.stop() == 0
        for sock in socks:
            sock.close()


@pytest.mark.root
def test_helper_taken_over_by_its_user_sends_descriptors(
    public_dir: Path, lingering: Callable[[], int]
) -> None:
    with started_daemon(public_dir, f"--allow-uid={STRANGER}") as daemon:
        with acting_as(STRANGER, STRANGER, []):
            connection = daemon.connect()
        pid = spawn(connection, "/bin/sleep", "100")
        helper = psutil.Process(pid).ppid()
        with taken_from(helper, 3) as control:
            with stopped(daemon.process.pid):
                for _ in range(10):
                    send_lingering(control, frames.HEADER.pack(0, lib.EB_FULL), lingering)
            daemon.status()
        until(lambda: helper not in daemon.helpers())
        assert "it sent descriptors" in daemon.log()
        connection.close()
        os.kill(pid, signal.SIGKILL)
