"""The server's loop: events of descriptors, timers, and closing in the background."""

from __future__ import annotations

import os
import select
import selectors
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable

from errand_boy import _native
from errand_boy._daemon.log import Complaints, Log
from errand_boy._daemon.strangers import Closer
from errand_boy._timers import Timer, Timers

_SLICE = 0.001  # seconds of CPU time before it checks again which sockets are ready
_HALF_LIFE = 0.25  # seconds after which the time spent on an owner counts half

NEWCOMERS = -1  # owner of connections whose user is not known yet
_SHARE = 4  # times another owner's share, since everybody who connects waits for it
URGENT = -2  # owner of signals, which come before everything else


class Pidfd:
    """A descriptor by which a selector reports the end of a process. Raises OSError."""

    def __init__(self, pid: int) -> None:
        self._fd = int(_native.pidfd_open(pid))

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)
        self._fd = -1


class _Source:
    """The callbacks of a descriptor, or those posted by an owner. `turn` numbers its last turn."""

    __slots__ = ("callback", "owner", "turn")

    def __init__(self, callback: Callable[[int], None], owner: int) -> None:
        self.callback = callback
        self.owner = owner
        self.turn = 0


class Loop:
    """Calls the callbacks of ready sockets, with their events, and of timers that are due.

    Each socket has an owner, the number of a user, and the loop counts the time that it spends on
    each owner. It serves those ready sockets first whose owners have taken the least time recently,
    so an owner who keeps the loop busy delays only himself. This works if no callback takes more
    than a millisecond. Of one owner's sockets, the one that has waited longest comes first. The
    time is this thread's CPU time, because other programs are not the owner's fault.

    If a callback raises an exception, it is logged, and the loop goes on.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self._selector = selectors.DefaultSelector()
        self._taken: defaultdict[int, float] = defaultdict(float)  # seconds of CPU time, by owner
        self._halved_at = 0.0  # of time.monotonic()
        self._turn = 0
        self._posted: dict[int, tuple[_Source, deque[Callable[[], None]]]] = {}  # by owner
        self._timers = Timers()
        self.complaints = Complaints(log, self.call_later)
        self.closer = Closer(self.call_later)
        # Selectors have no event for a hang-up alone, and report EVENT_READ all the time after the
        # peer has shut down its side. The epoll is made here, while descriptors are available.
        self._hangups = select.epoll()
        self._on_hangup: dict[int, Callable[[], None]] = {}
        self.watch(self._hangups, selectors.EVENT_READ, self._on_hangups, NEWCOMERS)

    def watch(
        self,
        file: socket.socket | select.epoll | Pidfd,
        events: int,
        callback: Callable[[int], None] | None = None,
        owner: int = 0,
    ) -> None:
        """Call `callback` with those of `events` that occur, on behalf of `owner`; 0 stops this.

        Stop it before you close `file`, since other processes may have a copy.
        """
        if file.fileno() < 0:
            return
        key = self._selector.get_map().get(file)
        if key is None:
            if events:
                assert callback is not None
                self._selector.register(file, events, _Source(callback, owner))
        elif not events:
            self._selector.unregister(file)
        elif key.events != events:
            assert callback is not None
            key.data.callback = callback
            self._selector.modify(file, events, key.data)

    def is_watched(self, file: socket.socket) -> bool:
        """Return whether `file` has a callback."""
        return file.fileno() >= 0 and file in self._selector.get_map()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` after `seconds`, unless the returned timer is cancelled."""
        return self._timers.after(seconds, lambda: self.call(callback))

    def post(self, owner: int, callback: Callable[[], None]) -> None:
        """Call `callback` when it is the turn of `owner`."""
        if owner not in self._posted:
            source = _Source(lambda events: self._call_posted(owner), owner)
            self._posted[owner] = source, deque()
        self._posted[owner][1].append(callback)

    def _call_posted(self, owner: int) -> None:
        _, callbacks = self._posted[owner]
        callback = callbacks.popleft()
        if not callbacks:
            del self._posted[owner]
        callback()

    def await_hangup(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call `callback` when the peer has closed its socket completely."""
        self._hangups.register(sock, 0)
        self._on_hangup[sock.fileno()] = callback

    def forget_hangup(self, sock: socket.socket) -> None:
        """Stop waiting for the hang-up of `sock`."""
        self._hangups.unregister(sock)
        del self._on_hangup[sock.fileno()]

    def _on_hangups(self, events: int) -> None:
        for fd, _ in self._hangups.poll(0):
            callback = self._on_hangup.get(fd)
            if callback is not None:
                self.call(callback)

    def run(self, is_finished: Callable[[], bool]) -> None:
        """Run until `is_finished` returns true."""
        while not is_finished():
            self.closer.flush()
            rest = 0.0 if self._posted else self._timers.rest()
            ready: list[tuple[_Source, selectors.SelectorKey | None, int]] = [
                (key.data, key, events) for key, events in self._selector.select(rest)
            ]
            ready += [(source, None, 0) for source, _ in self._posted.values()]
            self._forget_the_past(time.monotonic())
            begun = before = time.thread_time()
            if len(ready) > 1:
                ready.sort(key=self._order)
            for source, key, events in ready:
                if key is not None:
                    current = self._selector.get_map().get(key.fd)
                    if current is None or current.data is not source:
                        continue
                self._turn += 1
                source.turn = self._turn
                self.call(source.callback, events)
                now = time.thread_time()
                share = _SHARE if source.owner == NEWCOMERS else 1
                self._taken[source.owner] += (now - before) / share
                before = now
                if now - begun > _SLICE:
                    break  # the sockets that have not had their turn stay ready
            self._timers.ring()

    def _order(self, ready: tuple[_Source, object, int]) -> tuple[float, int]:
        source = ready[0]
        taken = -1.0 if source.owner == URGENT else self._taken.get(source.owner, 0.0)
        return taken, source.turn

    def _forget_the_past(self, now: float) -> None:
        if now - self._halved_at > _HALF_LIFE:
            self._halved_at = now
            for owner, taken in list(self._taken.items()):
                self._taken[owner] = taken / 2
                if taken < _SLICE / 100:
                    del self._taken[owner]

    def call(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call `callback`; log an exception, so that other connections go on."""
        try:
            callback(*arguments)
        except Exception as error:
            self.log.error("internal error", error=repr(error), trace=_trace(error))


def _trace(error: BaseException) -> str:
    """Return where an exception was raised. (Importing traceback would cost 1 MB.)"""
    places = []
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{at.tb_lineno}:{code.co_name}")
        at = at.tb_next
    return " ".join(places[-10:])
