"""Who may start a command next, when not all may."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class _Client:
    __slots__ = ("running", "wishes")

    def __init__(self) -> None:
        self.running = 0
        self.wishes: OrderedDict[int, None] = OrderedDict()


class Turns:
    """Who may start a command next, when not all may: clients take turns.

    At most `most` commands run at a time, and `most_per_client` of each client; 0 is no limit.
    """

    def __init__(self, most: int, most_per_client: int) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._running = 0
        self._granted: dict[int, int] = {}  # connections, and their clients
        self._wishing: dict[int, int] = {}
        self._clients: dict[int, _Client] = {}
        self._ready: OrderedDict[int, _Client] = (
            OrderedDict()
        )  # that have a wish and are allowed it

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._wishing)

    def want(self, connection: int, client: int) -> None:
        """Take note that `connection`, which is one of `client`, waits for its turn."""
        if connection not in self._wishing and connection not in self._granted:
            self._wishing[connection] = client
            self._clients.setdefault(client, _Client()).wishes[connection] = None
            self._update(client)

    def done(self, connection: int) -> None:
        """Take note that it does not run a command, nor waits for its turn, any more."""
        client = self._wishing.pop(connection, None)
        if client is not None:
            del self._clients[client].wishes[connection]
        else:
            client = self._granted.pop(connection, None)
            if client is None:
                return
            self._running -= 1
            self._clients[client].running -= 1
        self._update(client)

    def next(self) -> Iterator[int]:
        """Yield the connections whose turn it is; they count as running from then on."""
        while self._ready and (not self._most or self._running < self._most):
            client, state = self._ready.popitem(last=False)
            connection, _ = state.wishes.popitem(last=False)
            self._granted[connection] = self._wishing.pop(connection)
            self._running += 1
            state.running += 1
            self._update(client)  # behind the others, if it has another wish
            yield connection

    def _update(self, client: int) -> None:
        state = self._clients[client]
        if not state.wishes and not state.running:
            del self._clients[client]
        below = not self._most_per_client or state.running < self._most_per_client
        if not state.wishes or not below:
            self._ready.pop(client, None)
        elif client not in self._ready:
            self._ready[client] = state
