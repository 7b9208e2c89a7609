"""Connections whose first bytes have not arrived yet."""

from __future__ import annotations

import select
import selectors
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

from errand_boy._daemon.loop import NEWCOMERS, Loop
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.strangers import peek
from errand_boy._native import lib
from errand_boy._wire import frames

FIRST = 1 + frames.HEADER.size + 4  # bytes that show which protocol a connection speaks
_EDGES = 8  # events in one turn
_MOST_UNSEEN = 100  # of a user who has too many connections already
_STRANGERS = 64  # of users who may not use the daemon


class Newcomer:
    """A new connection. `refusal`: why it will not be served, or ""."""

    __slots__ = ("deadline", "fd", "has_descriptors", "peer", "refusal", "sock")

    def __init__(self, sock: socket.socket, peer: Peer, refusal: str, deadline: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.refusal = refusal
        self.has_descriptors = False  # they came with its first bytes
        self.deadline = deadline  # of time.monotonic()

    def first(self) -> bytes | None:
        """Peek at its first bytes; return them, b"" if it has gone, or None if some are missing."""
        size = FIRST
        try:
            first, self.has_descriptors = peek(self.sock, size)
            if len(first) == FIRST and first[0] == 0:
                length, kind = frames.HEADER.unpack_from(first, 1)
                if kind == lib.EB_JOB and length <= lib.EB_MAX_JOB:  # with the whole request
                    size = 1 + frames.HEADER.size + length
                    first, self.has_descriptors = peek(self.sock, size)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        return None if first[:1] == b"\0" and len(first) < size else first

    def has_gone(self) -> bool:
        """Return whether its peer has closed it, even if something is unread."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return bool(poll.poll(0))


class Newcomers:
    """Waits for the first bytes of connections.

    `on_first` is called with each connection and its first bytes, or b"" if it has gone; `on_late`
    if its time is over or there is no room for it.
    """

    def __init__(
        self,
        loop: Loop,
        on_first: Callable[[Newcomer, bytes], None],
        on_late: Callable[[Newcomer], None],
    ) -> None:
        self._loop = loop
        self._on_first = on_first
        self._on_late = on_late
        self._unseen: dict[int, Newcomer] = {}  # by descriptor, as below
        self._unseen_of: dict[int, int] = {}  # how many of them are a user's
        self._waiting: OrderedDict[int, Newcomer] = OrderedDict()  # in the order of deadlines
        self._strangers = 0
        self._is_timed = False
        # Edge-triggered: it reports each further byte, and not the same half of a frame for ever.
        self._edges = select.epoll()
        loop.watch(self._edges, selectors.EVENT_READ, self._on_edges, NEWCOMERS)

    def __iter__(self) -> Iterator[Newcomer]:
        """Iterate over the waiting connections."""
        return iter([*self._unseen.values(), *self._waiting.values()])

    def __len__(self) -> int:
        """Return the number of waiting connections."""
        return len(self._unseen) + len(self._waiting)

    def add(self, newcomer: Newcomer) -> None:
        """Look at the first bytes of `newcomer` at its user's turn, or wait for them."""
        uid = newcomer.peer.uid
        unseen = self._unseen_of.get(uid, 0)
        if newcomer.refusal and unseen >= _MOST_UNSEEN:
            self._on_late(newcomer)
            return
        self._unseen[newcomer.fd] = newcomer
        self._unseen_of[uid] = unseen + 1
        self._loop.post(uid, partial(self._look_at, newcomer))

    def _look_at(self, newcomer: Newcomer) -> None:
        if self._unseen.get(newcomer.fd) is not newcomer:
            return
        self._saw(newcomer)
        first = newcomer.first()
        if first is not None:
            self._on_first(newcomer, first)
        elif newcomer.refusal and self._strangers >= _STRANGERS:
            self._on_late(newcomer)
        else:
            self._edges.register(newcomer.sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            self._waiting[newcomer.fd] = newcomer
            self._strangers += bool(newcomer.refusal)
            self._watch_time()

    def clear(self) -> list[Newcomer]:
        """Stop waiting, and return the connections."""
        all_of_them = list(self)
        for newcomer in list(self._unseen.values()):
            self._saw(newcomer)
        for newcomer in list(self._waiting.values()):
            self._forget(newcomer)
        return all_of_them

    def _saw(self, newcomer: Newcomer) -> None:
        del self._unseen[newcomer.fd]
        uid = newcomer.peer.uid
        self._unseen_of[uid] -= 1
        if not self._unseen_of[uid]:
            del self._unseen_of[uid]

    def _forget(self, newcomer: Newcomer) -> None:
        # Closing would not be enough: the helper's copy would still cause events.
        self._edges.unregister(newcomer.fd)
        del self._waiting[newcomer.fd]
        self._strangers -= bool(newcomer.refusal)

    def _on_edges(self, events: int) -> None:
        for fd, flags in self._edges.poll(0, _EDGES):
            newcomer = self._waiting.get(fd)
            if newcomer is None:
                continue
            first = newcomer.first()
            if first is None and flags & select.EPOLLRDHUP:
                first = b""
            if first is not None:
                self._forget(newcomer)
                self._loop.call(self._on_first, newcomer, first)

    def _watch_time(self) -> None:
        if self._waiting and not self._is_timed:
            self._is_timed = True
            first = next(iter(self._waiting.values()))
            self._loop.call_later(first.deadline - time.monotonic(), self._on_time)

    def _on_time(self) -> None:
        self._is_timed = False
        now = time.monotonic()
        while self._waiting:
            newcomer = next(iter(self._waiting.values()))
            if newcomer.deadline > now:
                break
            self._forget(newcomer)
            self._loop.call(self._on_late, newcomer)
        self._watch_time()
