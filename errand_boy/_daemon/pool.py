"""The helpers of all users: which one serves a connection, and which command may start."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

from errand_boy._daemon.audit import Audit, Ended
from errand_boy._daemon.helper import ID, Helper, Keep, Unserved
from errand_boy._daemon.limits import Holdings, Limits, LimitsError, Table
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.options import Options
from errand_boy._daemon.orphans import Orphans
from errand_boy._daemon.peer import Credentials, Peer
from errand_boy._daemon.report import Report
from errand_boy._daemon.turns import Turns
from errand_boy._daemon.user import User
from errand_boy._native import lib
from errand_boy._timers import Timer
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_TRIM = 5.0  # seconds from a helper's end until the memory for its clients is given back
_MOST_SETS = 8  # sets of credentials of one user: newgrp(1) makes a new one


class Pool:
    """The helpers of a server.

    As root it has helpers for each set of credentials that clients have, else only its own user's.
    `open_files` is the soft limit of open files for commands whose request has none.
    """

    def __init__(self, loop: Loop, options: Options, open_files: int) -> None:
        self.retired = Report()  # the counts of helpers that have ended
        self.lost = 0  # helpers that ended unexpectedly
        self.lost_commands = 0  # their live commands, whose exit statuses are lost
        self.limits = Table(options.limits, Limits(commands=options.max_processes_per_user))
        self.holdings = Holdings(self.limits.of)
        self.turns: Turns | None = None
        if options.max_processes or self.limits.is_used:
            self.turns = Turns(options.max_processes, self.limits.of)
        self.peers: dict[int, tuple[Helper, Peer]] = {}  # by connection id
        self.connections: dict[int, int] = {}  # of clients at helpers, by user
        self._clients: set[int] = set()  # their ids; the others are the server's own
        self.processes: dict[int, Callable[[int], None]] = {}  # called at the ends of others
        self._leftover: set[int] = set()  # helpers that speak another version of the protocol
        self._turn_timer: Timer | None = None
        self._trim_timer: Timer | None = None
        self._loop = loop
        self._orphans = Orphans(loop)
        self._settings = options
        self.audit = Audit(options.log_commands) if options.log_commands else None
        self._flags = (lib.EB_ASK if self.turns is not None else 0) | (
            lib.EB_TELL_ENDS if self.audit is not None else 0
        )
        self._options = [f"--open-files={open_files}"]
        # Not by variable(): the daemon always runs with -I. This is where clone is forbidden.
        if os.environ.get("ERRAND_BOY_SPAWN") == "posix":
            self._options.append("--posix-spawn")
        most = options.max_child_tasks
        self._more_options = [f"--max-tasks={most}"] if most else []  # keepers don't have it
        self._is_root = os.geteuid() == 0
        self._own = Credentials.own()
        self._users: dict[Credentials | None, User] = {None: self._new_user(None)}
        self._leaving: list[User] = []  # users whose helpers end to make room for others
        self._last_id = 0

    @property
    def helpers(self) -> list[Helper]:
        """All helpers, including those that are draining."""
        users = [*self._users.values(), *self._leaving]
        return [helper for user in users for helper in user.helpers]

    @property
    def is_over(self) -> bool:
        """Whether all helpers have ended."""
        return not (self.helpers or self._leftover)

    def start(self) -> None:
        """Start the helpers of our own user. Raises LimitsError and OSError."""
        self.limits.read()
        self._users[None].start()

    def read_limits(self) -> None:
        """Read the file of limits again, if there is one."""
        if self._settings.limits is None:
            return
        try:
            self.limits.read()
        except LimitsError as error:
            self._loop.log.error("the limits stay as they were", error=error)
            return
        self._loop.log.info("limits have been read")
        if self.turns is not None:
            self.turns.refresh()
            self._grant()

    def hand_over(self, sock: socket.socket, peer: Peer, *, is_client: bool = False) -> None:
        """Have a helper of the user `peer` serve `sock`, and take ownership of it.

        If it `is_client`, it counts as a connection of that user. Raises OSError if there is no
        helper and none can be started; then `sock` still belongs to the caller.
        """
        helper = self._user(peer).choose()
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        while self._last_id in self.peers:
            self._last_id = self._last_id % 0xFFFFFFFF + 1
        self._remember(self._last_id, helper, peer, is_client=is_client)
        helper.adopt(self._last_id, self._flags, sock)

    def _remember(self, connection: int, helper: Helper, peer: Peer, *, is_client: bool) -> None:
        self.peers[connection] = (helper, peer)
        if is_client:
            self._clients.add(connection)
            self.connections[peer.uid] = self.connections.get(peer.uid, 0) + 1

    def reap(self) -> None:
        """Reap all children that have ended: helpers, and orphans that they left.

        Each is waited for last, so that what handles its end can signal nobody else by its number.
        """
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            self._leftover.discard(pid)
            if pid in self.processes:
                self._loop.call(self.processes.pop(pid), status)
            for helper in self.helpers:
                if helper.pid == pid:
                    self._loop.call(helper.on_exit, status)
            os.waitpid(pid, os.WNOHANG)

    def connect(self, peer: Peer) -> socket.socket:
        """Return a new connection to a helper of the user `peer`. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            self.hand_over(theirs, peer)
        except OSError:
            ours.close()
            theirs.close()
            raise
        return ours

    def drain(self) -> None:
        """Have all helpers end when their commands have ended."""
        for user in self._users.values():
            user.drain()

    def end(self, number: int) -> None:
        """Send signal `number` to the process groups of all live commands."""
        for helper in self.helpers:
            helper.send(lib.EB_END, bytes([number]))

    # -- handing over to the successor --

    def state(self, keep: Keep) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `restore`."""
        everybody: dict[Credentials, int] = {}  # each with its place in a list
        peers = [
            (
                connection,
                helper.pid,
                peer.pid,
                everybody.setdefault(peer.credentials, len(everybody)),
                connection in self._clients,
            )
            for connection, (helper, peer) in self.peers.items()
        ]
        return {
            **self._common_state(self.retired),
            "users": [user.state(keep) for user in self._users.values()],
            "leaving": [user.state(keep) for user in self._leaving],
            "peers": peers,
            "credentials": list(everybody),
            "turns": None if self.turns is None else self.turns.state(),
            "leftover": list(self._leftover),
        }

    def state_without_helpers(self) -> dict[str, Any]:
        """Return the same for a successor that can't talk to the existing helpers.

        These see the end of their control sockets, and end with their last commands.
        """
        retired = Report()
        retired.add(self.retired)
        for helper in self.helpers:
            retired.add(helper.counted())
        return {
            **self._common_state(retired),
            "users": [],
            "leaving": [],
            "peers": [],
            "credentials": [],
            "turns": None,
            "leftover": [*self._leftover, *(helper.pid for helper in self.helpers)],
        }

    def _common_state(self, retired: Report) -> dict[str, Any]:
        return {
            "retired": retired.state(),
            "lost": self.lost,
            "lost_commands": self.lost_commands,
            "limits": self.limits.state(),
            "last_id": self._last_id,
            "orphans": self._orphans.state(),
        }

    def unsent(self, uid: int) -> int:
        """Return how many sockets wait here because the helpers of `uid` have no room yet."""
        helpers = (helper for user in self._of(uid) for helper in user.helpers)
        return sum(helper.unsent for helper in helpers)

    def _of(self, uid: int) -> Iterator[User]:
        for user in [*self._users.values(), *self._leaving]:
            if (user.credentials or self._own).uid == uid:
                yield user

    def unserved(self) -> list[socket.socket]:
        """Return the connections that no helper has received yet."""
        return [sock for helper in self.helpers for _, sock in helper.unserved()]

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`, instead of `start`."""
        self.retired = Report.of_state(state["retired"])
        self.lost = state["lost"]
        self.lost_commands = state["lost_commands"]
        self.limits.restore(state["limits"])
        self._last_id = state["last_id"]
        self._orphans.restore(state["orphans"])
        self._leftover.update(state["leftover"])
        # Know all connections before helpers report anything about them.
        for known in state["users"]:
            user = self._restored(known)
            self._users[user.credentials] = user
        for known in state["leaving"]:
            user = self._restored(known)
            self._leaving.append(user)
            user.drain()
        everybody = [Credentials.of_state(known) for known in state["credentials"]]
        helpers = {helper.pid: helper for helper in self.helpers}
        for connection, helper, client, place, is_client in state["peers"]:
            self._remember(
                connection, helpers[helper], Peer(client, everybody[place]), is_client=is_client
            )
        if self.turns is not None and state["turns"] is not None:
            self.turns.restore(state["turns"])
        self._users[None].refill()
        self.read_limits()
        self._grant()
        self.reap()

    def _restored(self, state: dict[str, Any]) -> User:
        known = state["credentials"]
        user = self._new_user(None if known is None else Credentials.of_state(known))
        user.restore(state)
        return user

    # -- users --

    def identity(self, peer: Peer) -> tuple[Credentials | None, list[str]]:
        """Return the user that a process for `peer` becomes (None: our own), and its options."""
        credentials = peer.credentials if self._is_root and peer.credentials != self._own else None
        return credentials, self._options_of(credentials)

    def _options_of(self, credentials: Credentials | None) -> list[str]:
        # The directory of this process concerns only its own user.
        directory = self._settings.chdir or (None if credentials is None else "/")
        return [*self._options, *([] if directory is None else [f"--chdir={directory}"])]

    def _new_user(self, credentials: Credentials | None) -> User:
        limits = self._settings
        return User(
            self._loop,
            credentials,
            limits.pool_size,
            limits.idle,
            [*self._options_of(credentials), *self._more_options],
            self._on_frame,
            self._on_exit,
            limits.helper_patience,
        )

    def _user(self, peer: Peer) -> User:
        credentials, _ = self.identity(peer)
        user = self._users.get(credentials)
        if user is None:
            assert credentials is not None
            self._make_room(credentials.uid)
            user = self._users[credentials] = self._new_user(credentials)
        return user

    def _make_room(self, uid: int) -> None:
        """Make room for one more set of credentials, of user `uid`. Raises OSError."""
        others = [user for user in self._users.values() if user.credentials is not None]
        same = [user for user in others if user.credentials and user.credentials.uid == uid]
        if len(same) >= _MOST_SETS:
            self._send_away(same, f"user {uid} is connected with {_MOST_SETS} other sets of groups")
        elif len(others) >= self._settings.max_users:
            most = self._settings.max_users
            self._send_away(others, f"{most} users are served, and --max-users allows no more")

    def _send_away(self, users: list[User], refusal: str) -> None:
        """End the helpers that have been unused for the longest time. Raises OSError."""
        idle = [user for user in users if user.is_idle]
        if not idle:
            raise OSError(refusal)
        user = min(idle, key=lambda user: user.last_used)
        del self._users[user.credentials]
        self._leaving.append(user)
        user.drain()

    def _user_of(self, helper: Helper) -> User:
        user = self._users.get(helper.credentials)
        if user is not None and helper in user.helpers:
            return user
        return next(user for user in self._leaving if helper in user.helpers)

    # -- frames from helpers --

    def _on_frame(self, helper: Helper, kind: int, payload: bytes) -> None:
        if kind == lib.EB_FULL and self._settings.max_child_tasks:
            self._user_of(helper).replace(helper)
        elif kind == lib.EB_REFUSED:
            reason = payload.decode("utf-8", "replace")
            self._loop.complaints.warning("a helper refused", pid=helper.pid, reason=reason)
        elif kind == lib.EB_ENDED and self.audit is not None:
            ended = Ended(payload)
            if ended.connection in helper.connections:
                self.audit.write(self.peers[ended.connection][1], ended)
        elif kind in (lib.EB_WANT, lib.EB_DONE, lib.EB_CLOSED):
            (connection,) = ID.unpack(payload)
            if connection in helper.connections:
                self._on_connection(helper, kind, connection)

    def _on_connection(self, helper: Helper, kind: int, connection: int) -> None:
        if self.turns is not None:
            if kind == lib.EB_WANT:
                _, peer = self.peers[connection]
                self.turns.want(connection, peer.uid, peer.pid)
            else:
                self.turns.done(connection)
            self._grant()
        if kind == lib.EB_CLOSED:
            self._forget(connection)
            self._user_of(helper).forget(helper, connection)

    def _grant(self) -> None:
        if self.turns is None:
            return
        if self._turn_timer is not None:
            self._turn_timer.cancel()
        now = time.monotonic()
        for connection in self.turns.next(now):
            self.peers[connection][0].send(lib.EB_GRANT, ID.pack(connection))
        at = self.turns.next_at
        self._turn_timer = None if at is None else self._loop.call_later(at - now, self._grant)

    def _on_exit(self, helper: Helper, status: int, unserved: Unserved) -> None:
        self._forget_users_without_helpers()
        waiting = [
            (sock, self.peers[connection][1], connection in self._clients)
            for connection, sock in unserved
        ]
        for connection in helper.connections:
            self._forget(connection)
            if self.turns is not None:
                self.turns.done(connection)
        if not helper.draining or status != 0:
            self.lost += 1
            self.lost_commands += max(0, helper.report.started - helper.report.ended)
            self._loop.complaints.warning(
                "a helper has died",
                pid=helper.pid,
                status=status,
                clients=len(helper.connections),
            )
        self.retired.add(helper.report)
        self._trim_timer = self._trim_timer or self._loop.call_later(_TRIM, self._trim)
        uid = self._own.uid if helper.credentials is None else helper.credentials.uid
        self._orphans.end(helper.report.tied, uid)
        for sock, peer, is_client in waiting:
            try:
                self.hand_over(sock, peer, is_client=is_client)
            except OSError as error:
                self._refuse(sock, error.strerror or str(error))
        self._grant()

    def _trim(self) -> None:
        self._trim_timer = None
        lib.eb_trim_heap()

    def _forget(self, connection: int) -> None:
        _, peer = self.peers.pop(connection)
        if connection in self._clients:
            self._clients.remove(connection)
            self.connections[peer.uid] -= 1
            if not self.connections[peer.uid]:
                del self.connections[peer.uid]

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        with suppress(OSError):
            sock.send(frames.frame(lib.EB_REFUSED, [reason.encode()[: lib.EB_MAX_REASON]]))
        self._loop.closer.close(sock, read=True)

    def _forget_users_without_helpers(self) -> None:
        self._leaving = [user for user in self._leaving if user.helpers]
        for user in list(self._users.values()):
            if user.credentials is not None and user.is_over:
                del self._users[user.credentials]
