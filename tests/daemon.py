"""A daemon for a single test, and raw connections to it."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wire
from conftest import PATIENCE, script_environment
from wire import OWN_GROUP

from errand_boy._wire import status as _status
from errand_boy._wire.address import Address
from errand_boy._wire.connection import Connection
from errand_boy._wire.frames import Exited, Spawned


class Daemon:
    """A running ``errand-boy serve``."""

    def __init__(
        self, process: subprocess.Popen[bytes], path: str, log: Path, notify: socket.socket
    ) -> None:
        self.process = process
        self.path = path
        self.notify = notify
        self._log = log

    def log(self) -> str:
        return self._log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(self.path)
        return sock

    def connect(self) -> Connection:
        connection = Connection(self.socket())
        connection.open()
        return connection

    def status(self) -> dict[str, Any]:
        return _status.fetch(Address(self.path))

    def helpers(self) -> list[int]:
        return [helper["pid"] for helper in self.status()["helpers"]]


@contextmanager
def started_daemon(
    directory: Path,
    *options: object,
    under: Sequence[str] = (),
    env: dict[str, str] | None = None,
    **popen: Any,
) -> Iterator[Daemon]:
    """Run a daemon that listens in `directory`. The block begins when it is ready.

    `under` is a command that runs it.
    """
    path = str(directory / "socket")
    log = directory / "log"
    address = f"\0errand-boy-test-{os.getpid()}-{os.urandom(4).hex()}"
    # Its own directory of jobs, wherever those of other daemons are.
    jobs = ["--job-state", str(directory / "state"), "--job-runtime", str(directory / "run")]
    command = [*under, sys.executable, "-m", "errand_boy", "serve", "--socket", path, *jobs]
    environment = {**script_environment(), "NOTIFY_SOCKET": "@" + address[1:], **(env or {})}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log.open("ab") as stderr:
        notify.bind(address)
        notify.settimeout(PATIENCE)
        with subprocess.Popen(
            [*command, *map(str, options)], env=environment, **{"stderr": stderr, **popen}
        ) as process:
            try:
                pidfd = os.pidfd_open(process.pid)
                ready = select.select([notify.fileno(), pidfd], [], [], PATIENCE)[0]
                os.close(pidfd)
                assert notify.fileno() in ready, log.read_text()
                assert notify.recv(100) == b"READY=1"
                yield Daemon(process, path, log, notify)
            finally:
                process.kill()


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def activated_daemon(directory: Path) -> Iterator[Daemon]:
    """Run a daemon that gets its socket as from systemd."""
    path = str(directory / "activated")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        under = [sys.executable, "-I", "-c", ACTIVATE, str(fd)]
        with started_daemon(directory, under=under, pass_fds=[fd]) as daemon:
            assert not os.path.exists(daemon.path)
            daemon.path = path
            yield daemon


def spawn(connection: Connection, *argv: str, options: bytes = b"", fds: Sequence[int] = ()) -> int:
    """Start a command and return its pid."""
    request(connection, *argv, options=options, fds=fds)
    reply = connection.receive(PATIENCE)
    assert isinstance(reply, Spawned)
    assert reply.by_helper
    return reply.pid


def request(
    connection: Connection, *argv: str, options: bytes = b"", fds: Sequence[int] = ()
) -> None:
    targets = range(len(fds))
    connection.send(wire.request(*argv, options=[OWN_GROUP, options], targets=targets), fds)


def ended(connection: Connection) -> int:
    """Wait for the end of the connection's command; return its exit status as subprocess does."""
    reply = connection.receive(PATIENCE)
    assert isinstance(reply, Exited)
    return os.waitstatus_to_exitcode(reply.status)


def send_signal(connection: Connection, pid: int, number: int) -> None:
    connection.send(wire.signal_frame(pid, number))


@contextmanager
def acting_as(uid: int, gid: int, groups: Sequence[int]) -> Iterator[None]:
    """Connect to a daemon with the rights of this user."""
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


@contextmanager
def taken_from(pid: int, number: int) -> Iterator[socket.socket]:
    """Return a copy of a process's socket, as anybody can get who may trace it."""
    pidfd = os.pidfd_open(pid)
    fd = ctypes.CDLL(None).syscall(438, pidfd, number, 0)  # pidfd_getfd
    os.close(pidfd)
    assert fd >= 0
    with socket.socket(fileno=fd) as sock:
        sock.setblocking(True)
        yield sock
