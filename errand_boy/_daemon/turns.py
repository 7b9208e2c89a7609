"""Who may start a command next, when not all may."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class _User:
    __slots__ = ("clients", "running")

    def __init__(self) -> None:
        self.running = 0
        self.clients: OrderedDict[int, OrderedDict[int, None]] = OrderedDict()  # that wait

    def pop(self) -> int:
        """Take the first client's first connection; the client goes behind the others."""
        client, connections = self.clients.popitem(last=False)
        connection, _ = connections.popitem(last=False)
        if connections:
            self.clients[client] = connections
        return connection


class Turns:
    """Who may start a command next: users take turns, and each user's clients among themselves.

    At most `most` commands run at a time, and `most_per_user` of each user; 0 is no limit.
    """

    def __init__(self, most: int, most_per_user: int) -> None:
        self._most = most
        self._most_per_user = most_per_user
        self._running = 0
        self._granted: dict[int, int] = {}  # connections, and their users
        self._waiting: dict[int, tuple[int, int]] = {}  # connections, their users and clients
        self._users: dict[int, _User] = {}
        self._ready: OrderedDict[int, _User] = OrderedDict()  # that wait, and may start one more

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def want(self, connection: int, user: int, client: int) -> None:
        """Take note that `connection`, which is one of `client` of `user`, waits for its turn."""
        if connection not in self._waiting and connection not in self._granted:
            self._waiting[connection] = user, client
            state = self._users.setdefault(user, _User())
            state.clients.setdefault(client, OrderedDict())[connection] = None
            self._update(user)

    def done(self, connection: int) -> None:
        """Take note that it does not run a command, nor waits for its turn, any more."""
        if connection in self._waiting:
            user, client = self._waiting.pop(connection)
            clients = self._users[user].clients
            del clients[client][connection]
            if not clients[client]:
                del clients[client]
        elif connection in self._granted:
            user = self._granted.pop(connection)
            self._running -= 1
            self._users[user].running -= 1
        else:
            return
        self._update(user)

    def next(self) -> Iterator[int]:
        """Yield the connections whose turn it is; they count as running from then on."""
        while self._ready and (not self._most or self._running < self._most):
            user, state = self._ready.popitem(last=False)
            connection = state.pop()
            self._granted[connection], _ = self._waiting.pop(connection)
            self._running += 1
            state.running += 1
            self._update(user)  # behind the others, if it waits for more
            yield connection

    def _update(self, user: int) -> None:
        state = self._users[user]
        if not state.clients and not state.running:
            del self._users[user]
        below = not self._most_per_user or state.running < self._most_per_user
        if not state.clients or not below:
            self._ready.pop(user, None)
        elif user not in self._ready:
            self._ready[user] = state
