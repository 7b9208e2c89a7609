"""The pool of helpers: starts and replaces them, hands connections over, lets commands start."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

from errand_boy._daemon.helper import ID, Helper, Unserved
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.report import Report
from errand_boy._daemon.turns import Turns
from errand_boy._native import lib

_CROWD = 256  # connections: a start copies the helper's table of descriptors, which they fill
_TOO_SOON = 1.0  # seconds
_MOST_TOO_SOON = 10  # helpers that die so young, one after another, are replaced at once


class Pool:
    """The helpers of a server.

    `size` of them serve; those that are replaced stay until their last command has ended.
    """

    def __init__(
        self, loop: Loop, size: int, max_tasks: int, turns: Turns | None, as_peer: bool
    ) -> None:
        self.helpers: list[Helper] = []  # that serve, and those that are draining
        self.retired = Report()  # the counts of those that have ended
        self.lost = 0  # helpers that ended without being told to
        self.lost_commands = 0  # that they had live: their ends are not known
        self.turns = turns
        self.peers: dict[int, tuple[Helper, Peer]] = {}  # by connection id
        self._loop = loop
        self._size = size
        self._arguments = [f"--max-tasks={max_tasks}"] if max_tasks else []
        self._as_peer = as_peer
        self._flags = (lib.EB_AS_PEER if as_peer else 0) | (lib.EB_ASK if turns is not None else 0)
        self._last_id = 0
        self._too_soon = 0
        self._closing = False

    def start(self) -> None:
        """Start the helpers. Raises OSError."""
        while self._serving() < self._size:
            self._start_one()

    def _serving(self) -> int:
        return sum(not helper.draining for helper in self.helpers)

    def _start_one(self) -> Helper:
        helper = Helper(self._loop, self._arguments, self._on_frame, self._on_exit)
        self.helpers.append(helper)
        self._loop.log.debug("helper started", pid=helper.pid)
        return helper

    def _refill(self) -> None:
        """Start what is missing, now or, where that fails, a little later."""
        if self._closing:
            return
        try:
            self.start()
        except OSError as error:
            self._loop.log.error("cannot start a helper", error=error.strerror)
            self._loop.call_later(_TOO_SOON, self._refill)

    def hand_over(self, sock: socket.socket, peer: Peer) -> None:
        """Have `sock`, which is taken, served by the least busy helper.

        Raises OSError if there is none and none can be started; then `sock` stays the caller's.
        """
        helpers = [helper for helper in self.helpers if not (helper.draining or helper.gone)]
        if not helpers:
            if self._closing:
                raise OSError("the daemon is about to end")
            helpers = [self._start_one()]
        helper = min(helpers, key=lambda helper: len(helper.connections))
        if len(helper.connections) >= _CROWD and not self._closing:
            with suppress(OSError):  # crowded is better than not at all
                helper = self._start_one()
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        while self._last_id in self.peers:
            self._last_id = self._last_id % 0xFFFFFFFF + 1
        self.peers[self._last_id] = (helper, peer)
        helper.adopt(self._last_id, self._flags, sock)

    def connect(self, peer: Peer) -> socket.socket:
        """Return a new connection to the least busy helper, on behalf of `peer`. Raises OSError."""
        ours, theirs = self._pair_as(peer) if self._as_peer else socket.socketpair()
        try:
            self.hand_over(theirs, peer)
        except OSError:
            ours.close()
            theirs.close()
            raise
        return ours

    def _pair_as(self, peer: Peer) -> tuple[socket.socket, socket.socket]:
        # The helper takes the ids from the kernel, which notes the effective ones of who made it.
        groups, gid, uid = os.getgroups(), os.getegid(), os.geteuid()
        os.setgroups(peer.groups)
        os.setegid(peer.gid)
        os.seteuid(peer.uid)
        try:
            return socket.socketpair()
        finally:
            os.seteuid(uid)
            os.setegid(gid)
            os.setgroups(groups)

    def drain(self) -> None:
        """Let all helpers end when their commands have."""
        self._closing = True
        for helper in self.helpers:
            helper.drain()

    def end(self, number: int) -> None:
        """Send signal `number` to the process groups of all live commands."""
        for helper in self.helpers:
            helper.send(lib.EB_END, bytes([number]))

    def _on_frame(self, helper: Helper, kind: int, payload: bytes) -> None:
        if kind == lib.EB_FULL:
            self._replace(helper)
        elif kind == lib.EB_REFUSED:
            reason = payload.decode("utf-8", "replace")
            self._loop.log.error("a helper refused", pid=helper.pid, reason=reason)
        elif kind in (lib.EB_WANT, lib.EB_DONE, lib.EB_CLOSED):
            (connection,) = ID.unpack(payload)
            if connection in helper.connections:
                self._on_connection(helper, kind, connection)

    def _on_connection(self, helper: Helper, kind: int, connection: int) -> None:
        if self.turns is not None:
            if kind == lib.EB_WANT:
                self.turns.want(connection, self.peers[connection][1].pid)
            else:
                self.turns.done(connection)
            self._grant()
        if kind == lib.EB_CLOSED:
            del self.peers[connection]
            helper.forget(connection)
            if not helper.connections and not helper.draining and self._serving() > self._size:
                helper.drain()  # it was for a crowd

    def _grant(self) -> None:
        if self.turns is not None:
            for connection in self.turns.next():
                self.peers[connection][0].send(lib.EB_GRANT, ID.pack(connection))

    def _replace(self, helper: Helper) -> None:
        """Put a new helper in the place of one that has started its share of commands."""
        if self._closing or helper.draining or helper not in self.helpers:
            return
        try:
            self._start_one()
        except OSError as error:
            self._loop.log.error("cannot start a helper", error=error.strerror)
            self._loop.call_later(_TOO_SOON, lambda: self._replace(helper))
            return
        self._loop.log.debug("helper replaced", pid=helper.pid)
        helper.drain()

    def _on_exit(self, helper: Helper, status: int, unserved: Unserved) -> None:
        self.helpers.remove(helper)
        waiting = [(sock, self.peers[connection][1]) for connection, sock in unserved]
        for connection in helper.connections:
            del self.peers[connection]
            if self.turns is not None:
                self.turns.done(connection)
        if not helper.draining or status != 0:
            self._mourn(helper, status)
        self.retired.add(helper.report)
        for sock, peer in waiting:
            try:
                self.hand_over(sock, peer)
            except OSError:
                sock.close()
        self._grant()

    def _mourn(self, helper: Helper, status: int) -> None:
        """Take note of the death of a helper that was not told to end, and replace it."""
        clients = len(helper.connections)
        self.lost += 1
        self.lost_commands += helper.report.started - helper.report.ended
        self._loop.log.warning("a helper has died", pid=helper.pid, status=status, clients=clients)
        young = time.monotonic() - helper.started < _TOO_SOON
        self._too_soon = self._too_soon + 1 if young else 0
        if self._too_soon > _MOST_TOO_SOON:
            self._loop.call_later(_TOO_SOON, self._refill)
        else:
            self._refill()
