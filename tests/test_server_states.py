"""The server and its status after any sequence of client actions and mishaps."""

from __future__ import annotations

import os
import select
import signal
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from daemon import ended, request, send_signal, spawn, started_daemon

from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.connection import Connection
from errand_boy._wire.frames import Failed, Spawned
from errand_boy.errors import HelperDiedError, NotServedError

pytestmark = pytest.mark.slow

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
stateful = pytest.importorskip("hypothesis.stateful")
rule, precondition, invariant = stateful.rule, stateful.precondition, stateful.invariant

MOST = 2  # commands at a time
CLIENTS = 8
WHICH = hypothesis.strategies.integers(0, CLIENTS - 1)
END = b"\r\n\r\n"


BASE: Any = stateful.RuleBasedStateMachine


class Machine(BASE):
    """A daemon, with a model of its connections."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = ExitStack()
        directory = Path(self.undo.enter_context(tempfile.TemporaryDirectory()))
        options = (f"--max-processes={MOST}", "--pool-size=1", "--patience=600")
        self.daemon = self.undo.enter_context(started_daemon(directory, *options))
        self.idle: list[Connection] = []
        self.live: dict[Connection, int] = {}  # and the pid of its command
        self.waiting: list[Connection] = []  # for their turns
        self.halves: list[Any] = []  # sockets over which half of something has come
        self.started = self.failed = self.accepted = self.lost = 0

    def teardown(self) -> None:
        try:
            for closing in (*self.halves, *self.waiting):
                closing.close()
            self.waiting.clear()
            self.tells_what_is_known()  # so that none of them is given its turn by what follows
            for connection, pid in self.live.items():
                send_signal(connection, pid, signal.SIGKILL)
            for connection in (*self.idle, *self.live):
                connection.close()
            self.live.clear()
            self.status(connections=0)
            assert self.daemon.stop() == 0
            assert " ERROR " not in self.daemon.log()
        finally:
            self.undo.close()

    # -- what is known --

    def status(self, connections: int) -> None:
        """Ask until the status matches the model: the daemon notices some actions later."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self.accepted += 1
            status = self.daemon.status()
            helpers = status["helpers"]
            seen = (
                sum(helper["live"] for helper in helpers),
                sum(helper["connections"] for helper in helpers),
                status["queue"],
            )
            if seen == (len(self.live), connections, len(self.waiting)):
                break
            assert time.monotonic() < deadline, seen
        totals = status["totals"]
        assert totals["accepted"] == self.accepted
        assert (totals["started"], totals["failed"]) == (self.started, self.failed)
        assert totals["helpers_lost"] == self.lost
        assert sorted(command["pid"] for command in status["commands"]) == sorted(
            self.live.values()
        )

    @invariant()
    def tells_what_is_known(self) -> None:
        self.status(len(self.idle) + len(self.live) + len(self.waiting))

    def may_start(self) -> bool:
        return len(self.live) < MOST

    def has_room(self) -> bool:
        return len(self.idle) + len(self.live) + len(self.waiting) + len(self.halves) < CLIENTS

    def let_next_start(self) -> None:
        """A command has ended: one of those that wait gets its turn."""
        if self.waiting:
            ready, _, _ = select.select([c.sock for c in self.waiting], [], [], PATIENCE)
            (connection,) = (c for c in self.waiting if c.sock in ready)
            reply = connection.receive(PATIENCE)
            assert isinstance(reply, Spawned)
            self.waiting.remove(connection)
            self.live[connection] = reply.pid
            self.started += 1

    # -- clients --

    @precondition(has_room)
    @rule()
    def connect(self) -> None:
        connection = self.daemon.connect()
        assert select.select([connection.sock], [], [], PATIENCE)[0]  # a helper has it
        self.idle.append(connection)
        self.accepted += 1

    @precondition(lambda self: self.idle)
    @rule(which=WHICH)
    def start(self, which: int) -> None:
        connection = self.idle.pop(which % len(self.idle))
        if self.may_start():
            self.live[connection] = spawn(connection, "/bin/sleep", "1000")
            self.started += 1
        else:
            request(connection, "/bin/sleep", "1000")
            self.waiting.append(connection)

    @precondition(lambda self: self.idle and self.may_start())
    @rule(which=WHICH)
    def run(self, which: int) -> None:
        connection = self.idle[which % len(self.idle)]
        spawn(connection, "/bin/sh", "-c", "exit 7")
        assert ended(connection) == 7
        self.started += 1

    @precondition(lambda self: self.idle and self.may_start())
    @rule(which=WHICH)
    def fail(self, which: int) -> None:
        connection = self.idle[which % len(self.idle)]
        request(connection, "/none")
        assert isinstance(connection.receive(PATIENCE), Failed)
        self.failed += 1

    @precondition(lambda self: self.live)
    @rule(which=WHICH)
    def end(self, which: int) -> None:
        connection, pid = list(self.live.items())[which % len(self.live)]
        send_signal(connection, pid, signal.SIGTERM)
        assert ended(connection) == -signal.SIGTERM
        del self.live[connection]
        self.idle.append(connection)
        self.let_next_start()

    @precondition(lambda self: self.idle)
    @rule(which=WHICH)
    def close_idle(self, which: int) -> None:
        self.idle.pop(which % len(self.idle)).close()

    @precondition(lambda self: self.waiting)
    @rule(which=WHICH)
    def close_waiting(self, which: int) -> None:
        self.waiting.pop(which % len(self.waiting)).close()

    @precondition(lambda self: self.idle)
    @rule(which=WHICH, kind=hypothesis.strategies.sampled_from([0, lib.EB_ADOPT, 200]))
    def say_nonsense(self, which: int, kind: int) -> None:
        connection = self.idle.pop(which % len(self.idle))
        connection.send(frames.frame(kind, []))
        with pytest.raises(OSError, match="refused"):
            connection.receive(PATIENCE)
        connection.close()

    @precondition(has_room)
    @rule(half=hypothesis.strategies.sampled_from([b"", b"\0", b"\0\4\0\0", b"echo", b"cat" + END]))
    def begin(self, half: bytes) -> None:
        sock = self.daemon.socket()
        sock.sendall(half)
        self.halves.append(sock)
        self.accepted += 1

    @precondition(lambda self: self.halves)
    @rule(which=WHICH)
    def give_up(self, which: int) -> None:
        self.halves.pop(which % len(self.halves)).close()

    @precondition(may_start)
    @rule()
    def run_by_text(self) -> None:
        with self.daemon.socket() as sock:
            sock.sendall(b"cat; exit 3" + END + b"in" + END)
            answer = b"".join(iter(lambda: sock.recv(1000), b""))
        assert answer == b"\r\n0:in\r\n1:" + END + b"3" + END
        self.accepted += 1
        self.started += 1

    # -- mishaps --

    def helper(self) -> int:
        """Return the serving helper; for a moment there is none, if the last ones died young."""
        while True:
            self.accepted += 1
            helpers = self.daemon.helpers()
            if helpers:
                return helpers[0]

    @precondition(lambda self: self.lost < 3)  # ten young ones, and the next have to wait
    @rule()
    def kill_the_helper(self) -> None:
        helper = self.helper()
        pidfd = os.pidfd_open(helper)
        os.kill(helper, signal.SIGKILL)
        select.select([pidfd], [], [], PATIENCE)
        os.close(pidfd)
        for connection in (*self.idle, *self.live, *self.waiting):
            with pytest.raises((NotServedError, HelperDiedError)):
                connection.receive(PATIENCE)
            connection.close()
        for pid in self.live.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.idle.clear()
        self.live.clear()
        self.waiting.clear()
        self.lost += 1

    @rule()
    def stop_the_helper_for_a_moment(self) -> None:
        helper = self.helper()
        os.kill(helper, signal.SIGSTOP)
        os.kill(helper, signal.SIGCONT)


SETTINGS = hypothesis.settings(
    max_examples=12,
    database=None,
    print_blob=True,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def test_any_sequence() -> None:
    stateful.run_state_machine_as_test(Machine, settings=SETTINGS)
