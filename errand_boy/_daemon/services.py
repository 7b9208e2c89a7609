"""What the server offers to a text connection."""

from __future__ import annotations

import socket
from collections.abc import Callable

from errand_boy._daemon.log import Complaints
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.options import Options
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.pool import Pool


class _ClientPool:
    """The pool as one client of the text protocol may use it."""

    def __init__(self, pool: Pool, peer: Peer) -> None:
        self._pool = pool
        self._peer = peer

    def connect(self) -> socket.socket:
        """Return a new connection to the least busy helper. Raises OSError."""
        return self._pool.connect(self._peer)


class Services:
    """What a text connection of `peer` may use.

    `selector` calls the data of a registered object with its events, `limits` are the server's
    options, `forget` takes note that a connection has been closed.
    """

    def __init__(
        self,
        loop: Loop,
        pool: Pool,
        peer: Peer,
        limits: Options,
        complaints: Complaints,
        forget: Callable[[object], None],
    ) -> None:
        self.selector = loop.selector
        self.call_later = loop.call_later
        self.log = complaints
        self.pool = _ClientPool(pool, peer)
        self.limits = limits
        self.forget = forget
