"""Decides who may start a command next, if not everybody may."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from errand_boy._daemon.limits import Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOST_BUCKETS = 1000  # kept for users who start nothing


class _Bucket:
    """Tokens, one for each start: at most `burst`, refilled at a number per second."""

    __slots__ = ("time", "tokens")

    def __init__(self, limits: Limits, now: float) -> None:
        self.tokens = float(limits.burst)
        self.time = now

    def fill(self, limits: Limits, now: float) -> None:
        gained = (now - self.time) * limits.starts_per_second
        self.tokens = min(float(limits.burst), self.tokens + gained)
        self.time = now


class _User:
    __slots__ = ("clients", "running")

    def __init__(self) -> None:
        self.running = 0
        self.clients: OrderedDict[int, OrderedDict[int, None]] = OrderedDict()  # that wait

    def pop(self) -> int:
        """Take the first client's first connection, and move the client behind the others."""
        client, connections = self.clients.popitem(last=False)
        connection, _ = connections.popitem(last=False)
        if connections:
            self.clients[client] = connections
        return connection


class Turns:
    """The commands that wait. Users take turns, and so do the clients of each user.

    At most `most` commands run at a time (0: no limit), and for each user as many as `limits`
    returns for the uid.
    """

    def __init__(self, most: int, limits: Callable[[int], Limits]) -> None:
        self.next_at: float | None = None  # when a user who has started too many commands may go on
        self._most = most
        self._limits = limits
        self._running = 0
        self._granted: dict[int, int] = {}  # connections, and their users
        self._waiting: dict[int, tuple[int, int]] = {}  # connections, their users and clients
        self._users: dict[int, _User] = {}
        self._ready: OrderedDict[int, _User] = OrderedDict()  # who may run one more
        self._buckets: dict[int, _Bucket] = {}

    def __len__(self) -> int:
        """Return how many commands wait."""
        return len(self._waiting)

    def users(self) -> set[int]:
        """Return the users who have running or waiting commands."""
        return set(self._users)

    def waiting(self, user: int) -> int:
        """Return how many commands of `user` wait."""
        clients = self._users[user].clients if user in self._users else {}
        return sum(map(len, clients.values()))

    def running(self, user: int) -> int:
        """Return how many commands of `user` run."""
        return self._users[user].running if user in self._users else 0

    def want(self, connection: int, user: int, client: int) -> None:
        """Add `connection`, which belongs to `client` of `user`, to those that wait."""
        if connection not in self._waiting and connection not in self._granted:
            self._waiting[connection] = user, client
            state = self._users.setdefault(user, _User())
            state.clients.setdefault(client, OrderedDict())[connection] = None
            self._update(user)

    def done(self, connection: int) -> None:
        """Remove a connection, which no longer runs a command or waits."""
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

    def next(self, now: float) -> Iterator[int]:
        """Yield the connections whose turn it is. From then on they count as running.

        `now` is by the same clock in all calls, and so is `next_at`.
        """
        early = []
        self.next_at = None
        while self._ready and (not self._most or self._running < self._most):
            user, state = self._ready.popitem(last=False)
            at = self._take_token(user, now)
            if at > now:
                early.append((user, state))
                self.next_at = at if self.next_at is None else min(at, self.next_at)
                continue
            connection = state.pop()
            self._granted[connection], _ = self._waiting.pop(connection)
            self._running += 1
            state.running += 1
            self._update(user)  # behind the others, if it has more to start
            yield connection
        self._ready.update(early)

    def state(self) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `restore`."""
        return {
            "granted": list(self._granted.items()),
            "waiting": [(connection, *who) for connection, who in self._waiting.items()],
            "buckets": [
                (user, bucket.time, bucket.tokens) for user, bucket in self._buckets.items()
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`."""
        for user, at, tokens in state["buckets"]:
            bucket = self._buckets[user] = _Bucket(self._limits(user), at)
            bucket.tokens = tokens
        for connection, user in state["granted"]:
            self._granted[connection] = user
            self._running += 1
            self._users.setdefault(user, _User()).running += 1
        for connection, user, client in state["waiting"]:
            self.want(connection, user, client)

    def refresh(self) -> None:
        """Apply changed limits."""
        for user in list(self._users):
            self._update(user)

    def _update(self, user: int) -> None:
        state = self._users[user]
        if not state.clients and not state.running:
            del self._users[user]
        most = self._limits(user).commands
        if not state.clients or (most and state.running >= most):
            self._ready.pop(user, None)
        elif user not in self._ready:
            self._ready[user] = state

    def _take_token(self, user: int, now: float) -> float:
        """Take a token and return `now`; if there is none, return when the next one comes."""
        limits = self._limits(user)
        if not limits.starts_per_second:
            return now
        if user not in self._buckets and len(self._buckets) >= _MOST_BUCKETS:
            self._drop_full_buckets(now)
        bucket = self._buckets.setdefault(user, _Bucket(limits, now))
        bucket.fill(limits, now)
        if bucket.tokens < 1:
            return now + (1 - bucket.tokens) / limits.starts_per_second
        bucket.tokens -= 1
        return now

    def _drop_full_buckets(self, now: float) -> None:
        for user, bucket in list(self._buckets.items()):
            limits = self._limits(user)
            bucket.fill(limits, now)
            if bucket.tokens >= limits.burst:
                del self._buckets[user]
