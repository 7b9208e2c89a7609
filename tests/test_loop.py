"""The server's loop: whom it serves first, and what it must not keep."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import psutil
import pytest
from conftest import run_script

from errand_boy._daemon.log import Log
from errand_boy._daemon.loop import URGENT, Loop
from errand_boy._daemon.orphans import Orphans

BUSY, CALM = 12345, 12346


@pytest.fixture
def readable() -> Iterator[list[socket.socket]]:
    """Sockets that are always readable."""
    pairs = [socket.socketpair() for _ in range(50)]
    for _, theirs in pairs:
        theirs.send(b"x")
    yield [ours for ours, _ in pairs]
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_busy_owner_delays_only_itself(readable: list[socket.socket]) -> None:
    """Others come before all of that user's ready sockets."""
    loop = Loop(Log("info", "text"))
    ours, theirs = socket.socketpair()
    order: list[int] = []

    def on_busy(events: int) -> None:
        order.append(BUSY)
        if len(order) % 10 == 5:
            theirs.send(b"x")
        spend(0.002)

    def on_calm(events: int) -> None:
        ours.recv(1)
        order.append(CALM)

    for sock in readable:
        loop.watch(sock, selectors.EVENT_READ, on_busy, BUSY)
    loop.watch(ours, selectors.EVENT_READ, on_calm, CALM)
    loop.run(lambda: len(order) >= 100)
    after = [order[i + 1] for i in range(len(order) - 1) if i % 10 == 4]
    assert after == [CALM] * 10
    ours.close()
    theirs.close()


@pytest.mark.slow
def test_all_sockets_of_one_owner_have_their_turns(readable: list[socket.socket]) -> None:
    """This also holds if each callback takes its full time, and all are ready again at once."""
    loop = Loop(Log("info", "text"))
    counts = [0] * len(readable)

    def watch(i: int) -> None:
        def on_ready(events: int) -> None:
            counts[i] += 1
            spend(0.0015)

        loop.watch(readable[i], selectors.EVENT_READ, on_ready, BUSY)

    for i in range(len(readable)):
        watch(i)
    loop.run(lambda: sum(counts) >= 3 * len(readable))
    assert counts == [3] * len(readable)


def test_what_is_posted_takes_turns_as_well(readable: list[socket.socket]) -> None:
    """An owner who posts a lot delays neither another's posts nor another's sockets."""
    loop = Loop(Log("info", "text"))
    order: list[int] = []

    def work(owner: int) -> None:
        order.append(owner)
        spend(0.002)

    for _ in range(50):
        loop.post(BUSY, lambda: work(BUSY))
    loop.post(CALM, lambda: work(CALM))
    loop.watch(readable[0], selectors.EVENT_READ, lambda events: work(CALM + 1), CALM + 1)
    loop.run(lambda: len(order) >= 10)
    assert order.count(BUSY) <= 5
    assert CALM in order[:3]
    assert CALM + 1 in order[:3]


def test_signals_go_before_all(readable: list[socket.socket]) -> None:
    loop = Loop(Log("info", "text"))
    ours, theirs = socket.socketpair()
    order: list[int] = []

    def on_busy(events: int) -> None:
        order.append(BUSY)
        theirs.send(b"x")
        spend(0.0015)

    def on_urgent(events: int) -> None:
        ours.recv(1)
        order.append(URGENT)
        spend(0.01)

    for i, sock in enumerate(readable):
        loop.watch(sock, selectors.EVENT_READ, on_busy, BUSY + i)
    loop.watch(ours, selectors.EVENT_READ, on_urgent, URGENT)
    loop.run(lambda: len(order) >= 20)
    assert order == [BUSY, URGENT] * 10
    ours.close()
    theirs.close()


@pytest.mark.slow
def test_time_on_the_cpu_is_what_counts(readable: list[socket.socket]) -> None:
    """An owner whom another program delayed comes before one who has used the CPU."""
    loop = Loop(Log("info", "text"))
    order: list[int] = []

    def on_calm(events: int) -> None:
        order.append(CALM)
        time.sleep(0.05)

    def on_busy(events: int) -> None:
        order.append(BUSY)
        spend(0.005)

    loop.watch(readable[0], selectors.EVENT_READ, on_calm, CALM)
    loop.watch(readable[1], selectors.EVENT_READ, on_busy, BUSY)
    loop.run(lambda: len(order) >= 20)
    assert (BUSY, BUSY) not in pairwise(order)


def spend(seconds: float) -> None:
    """Use the CPU for some seconds."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.slow
def test_all_who_are_busy_have_their_share(readable: list[socket.socket]) -> None:
    loop = Loop(Log("info", "text"))
    counts = [0] * 5

    def watch(sock: socket.socket, owner: int) -> None:
        def on_ready(events: int) -> None:
            counts[owner] += 1
            spend(0.0005)

        loop.watch(sock, selectors.EVENT_READ, on_ready, owner)

    # One has ten times as many sockets as each of the others.
    for i, sock in enumerate(readable):
        watch(sock, i if i < 5 else 0)
    loop.run(lambda: sum(counts) >= 500)
    assert min(counts) > 0


def test_orphans_that_are_not_our_children_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed helper's user may have named thousands."""
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    opened: list[object] = []
    real = open

    def count(name: object, *arguments: object) -> object:
        opened.append(name)
        return real(name, *arguments)  # type: ignore[call-overload]

    loop = Loop(Log("info", "text"))
    monkeypatch.setattr("builtins.open", count)
    done: list[int] = []
    orphans = Orphans(loop)
    orphans.end([(pid, 0) for pid in range(1, 5000) if pid not in ours], 0)
    loop.call_later(0.1, lambda: done.append(1))
    loop.run(lambda: bool(done))
    monkeypatch.undo()
    assert not opened


KEPT = """
import weakref
from errand_boy._daemon.log import Log
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.options import Options
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.pool import Pool
from errand_boy._daemon.services import Services
from errand_boy._daemon.text import TextConnection

gc.disable()
options = Options(socket="")
loop = Loop(Log("info", "text"))
pool = Pool(loop, options, 1000)
pool.start()

def until(condition):
    def look():
        pool.reap()
        loop.call_later(0.01, look)
    look()
    loop.run(condition)
"""


@pytest.mark.slow
def test_text_connection_that_is_closed_is_gone() -> None:
    """Its buffers are freed too, without waiting for the garbage collector."""
    source = f"""{KEPT}
ours, theirs = socket.socketpair()
theirs.setblocking(False)
gone = []
peer = Peer.of(theirs)
services = Services(loop, pool, peer, options, lambda connection: gone.append(1))
kept = weakref.ref(TextConnection(theirs, peer, services))
ours.sendall(b"echo told; exit 3\\r\\n\\r\\n\\r\\n\\r\\n")
until(lambda: gone)
report([ours.recv(1000).decode(), kept() is None])
pool.drain()
until(lambda: not pool.helpers)
"""
    assert run_script(source) == ["\r\n0:told\n\r\n1:\r\n\r\n3\r\n\r\n", True]


def test_helper_that_has_ended_is_gone() -> None:
    """It has not answered a question. Whoever asked gets None, and the helper is freed."""
    source = f"""{KEPT}
helper = pool.helpers[0]
os.kill(helper.pid, signal.SIGSTOP)
answers = []
helper.ask(lambda answer, helper=helper: answers.append(answer))
pool.drain()
kept = weakref.ref(helper)
os.kill(helper.pid, signal.SIGKILL)
del helper
until(lambda: not pool.helpers)
report([answers, kept() is None])
"""
    assert run_script(source) == [[None], True]
