"""The services of the server that a text connection uses."""

from __future__ import annotations

import socket
from collections.abc import Callable

from errand_boy._daemon.loop import Loop
from errand_boy._daemon.options import Options
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.pool import Pool


class _ClientPool:
    """The pool, restricted to what one client of the text protocol may do."""

    def __init__(self, pool: Pool, peer: Peer) -> None:
        self._pool = pool
        self._peer = peer

    def connect(self) -> socket.socket:
        """Return a new connection to the least busy helper. Raises OSError."""
        return self._pool.connect(self._peer)


class Services:
    """The services for a text connection of `peer`.

    `limits` are the server's options. `close` closes the socket of a stranger. `forget` is called
    with a connection that has been closed.
    """

    def __init__(
        self,
        loop: Loop,
        pool: Pool,
        peer: Peer,
        limits: Options,
        forget: Callable[[object], None],
    ) -> None:
        self._loop = loop
        self.call_later = loop.call_later
        self.await_hangup = loop.await_hangup
        self.forget_hangup = loop.forget_hangup
        self.close = loop.closer.close
        self.log = loop.complaints
        self.pool = _ClientPool(pool, peer)
        self.limits = limits
        self._holdings = pool.holdings
        self._uid = peer.uid
        self.held = 0  # bytes
        self._forget = forget

    def watch(
        self, sock: socket.socket, events: int, callback: Callable[[int], None] | None = None
    ) -> None:
        """Call `callback` with those of `events` that occur; 0 stops this."""
        self._loop.watch(sock, events, callback, self._uid)

    def take(self, size: int) -> None:
        """Count bytes that the connection holds until its end. Raises OSError if too many."""
        self._holdings.take(self._uid, size)
        self.held += size

    def forget(self, connection: object) -> None:
        """Forget a connection that has been closed."""
        self._holdings.give_back(self._uid, self.held)
        self.held = 0
        self._forget(connection)
