"""The helpers of one user."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from errand_boy._daemon.helper import Helper, Keep, OnExit, OnFrame, Process, Unserved, start
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.peer import Credentials
from errand_boy._timers import Timer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CROWD = 256  # connections of a helper: a start copies its descriptors, which they fill
_MOST_HELPERS = 64
_TOO_SOON = 1.0  # seconds
_MOST_TOO_SOON = 10  # helpers in a row that may die this soon and be replaced at once


class User:
    """The helpers for one set of credentials, or for this process's own if these are None.

    At most `size` helpers serve, unless each has many connections. Replaced ones stay until their
    last command has ended. `start` starts our own. Another user's are started when there is work
    for them, and end when they have had no connection for `idle` seconds.
    """

    def __init__(
        self,
        loop: Loop,
        credentials: Credentials | None,
        size: int,
        idle: float,
        options: Sequence[str],
        on_frame: OnFrame,
        on_exit: OnExit,
        patience: float,
    ) -> None:
        self.credentials = credentials
        self.helpers: list[Helper] = []  # those that serve, and those that are draining
        self.last_used = time.monotonic()
        self.failed_until = 0.0  # of time.monotonic(), after a helper could not become its user
        self._loop = loop
        self._size = size
        self._idle = idle
        self._options = options
        self._on_frame = on_frame
        self._exited = on_exit
        self._patience = patience
        self._timers: dict[Helper, Timer] = {}  # for those without a connection
        self._too_soon = 0
        self._closing = False

    @property
    def is_idle(self) -> bool:
        """Whether no helper has a connection."""
        return not any(helper.connections for helper in self.helpers)

    @property
    def is_over(self) -> bool:
        """Whether all helpers have ended and no more will be started."""
        return not self.helpers and time.monotonic() >= self.failed_until

    def start(self) -> None:
        """Start as many helpers as may serve. Raises OSError."""
        while len(self._serving()) < self._size:
            self._start_one()

    def choose(self) -> Helper:
        """Return the helper for one more connection: the least busy one, or a new one.

        Raises OSError if there is none and none can be started.
        """
        if self._closing:
            raise OSError("the daemon is about to end")
        if time.monotonic() < self.failed_until:
            raise OSError("its helper could not become this user: the daemon's log says why")
        serving = self._serving()
        helper = min(serving, key=lambda helper: len(helper.connections), default=None)
        if helper is None or self._needs_more(len(serving), len(helper.connections)):
            try:
                helper = self._start_one()
            except OSError:
                if helper is None:  # otherwise, a busy one will do
                    raise
        self._use(helper)
        return helper

    def forget(self, helper: Helper, connection: int) -> None:
        """Forget a connection of `helper` that has ended."""
        helper.forget(connection)
        if helper.connections or helper.draining:
            return
        if self.credentials is not None:
            self.last_used = time.monotonic()
            self._timers[helper] = self._loop.call_later(self._idle, helper.drain)
        elif len(self._serving()) > self._size:
            helper.drain()  # no longer needed: it is beyond `size`

    def replace(self, helper: Helper) -> None:
        """Replace a helper that has started its maximum of commands."""
        if self._closing or helper.draining or helper not in self.helpers:
            return
        helper.is_full = True
        try:
            self._start_one()
        except OSError as error:
            self._loop.log.error("cannot start a helper", error=error.strerror or str(error))
            self._loop.call_later(_TOO_SOON, lambda: self.replace(helper))
            return
        self._loop.log.debug("helper replaced", pid=helper.pid)
        helper.drain()

    def drain(self) -> None:
        """Have all helpers end when their commands have ended, and start no more."""
        self._closing = True
        for helper in self.helpers:
            helper.drain()

    def state(self, keep: Keep) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `restore`."""
        return {
            "credentials": self.credentials,
            "last_used": self.last_used,
            "failed_until": self.failed_until,
            "too_soon": self._too_soon,
            "helpers": [helper.state(keep) for helper in self.helpers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`."""
        self.last_used = state["last_used"]
        self.failed_until = state["failed_until"]
        self._too_soon = state["too_soon"]
        for known in state["helpers"]:
            pid, sock, figures, program = known["process"]
            process = Process(pid, socket.socket(fileno=sock), figures, tuple(program))
            helper = self._add(process)
            helper.restore(known)
            if helper.is_full or helper.is_outdated:
                self.replace(helper)
            elif self.credentials is not None and not (helper.connections or helper.draining):
                idle = self.last_used + self._idle - time.monotonic()
                self._timers[helper] = self._loop.call_later(max(0.0, idle), helper.drain)

    def _serving(self) -> list[Helper]:
        return [helper for helper in self.helpers if not (helper.draining or helper.gone)]

    def _needs_more(self, count: int, least: int) -> bool:
        """Return whether `count` helpers with at least `least` connections each are too few."""
        return least >= _CROWD or (count < self._size and least > 0)

    def _start_one(self) -> Helper:
        if len(self.helpers) >= _MOST_HELPERS:
            raise OSError(f"this user has {_MOST_HELPERS} helpers already, all with live commands")
        helper = self._add(start(self._options, self.credentials))
        self._loop.log.debug("helper started", pid=helper.pid, user=self._name())
        return helper

    def _add(self, process: Process) -> Helper:
        helper = Helper(
            self._loop, process, self.credentials, self._on_frame, self._on_exit, self._patience
        )
        self.helpers.append(helper)
        return helper

    def _name(self) -> object:
        return "own" if self.credentials is None else self.credentials.uid

    def _use(self, helper: Helper) -> None:
        timer = self._timers.pop(helper, None)
        if timer is not None:
            timer.cancel()

    def _on_exit(self, helper: Helper, status: int, unserved: Unserved) -> None:
        self.helpers.remove(helper)
        self._use(helper)
        if not helper.is_ready:
            self.failed_until = time.monotonic() + _TOO_SOON
        elif self.credentials is None and (not helper.draining or status != 0):
            young = time.monotonic() - helper.started < _TOO_SOON
            self._too_soon = self._too_soon + 1 if young else 0
            if self._too_soon > _MOST_TOO_SOON:
                self._loop.call_later(_TOO_SOON, self.refill)
            else:
                self.refill()
        self._exited(helper, status, unserved)

    def refill(self) -> None:
        """Start missing helpers, now or, if that fails, a little later."""
        if self._closing:
            return
        try:
            self.start()
        except OSError as error:
            self._loop.log.error("cannot start a helper", error=error.strerror)
            self._loop.call_later(_TOO_SOON, self.refill)
