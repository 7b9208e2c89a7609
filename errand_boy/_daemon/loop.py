"""The server's loop: events of descriptors, timers, and what is closed beside it."""

from __future__ import annotations

import os
import select
import selectors
import socket
from collections.abc import Callable

from errand_boy._daemon.log import Complaints, Log
from errand_boy._daemon.strangers import Closer
from errand_boy._timers import Timer, Timers


class Loop:
    """Calls the data of what is registered with `selector`, with its events, and what is due.

    An exception of a callback is logged, and the loop goes on.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.selector = selectors.DefaultSelector()
        self._timers = Timers()
        self.complaints = Complaints(log, self.call_later)
        self.closer = Closer(self.call_later)
        # A selector has no event for a hang-up alone, and its EVENT_READ is true all the time when
        # the peer has ended its side. Made here, where there are descriptors to be had.
        self._hangups = select.epoll()
        self._on_hangup: dict[int, Callable[[], None]] = {}
        self.selector.register(self._hangups, selectors.EVENT_READ, self._on_hangups)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` after so many seconds, unless the timer that is returned is cancelled."""
        return self._timers.after(seconds, lambda: self.call(callback))

    def await_hangup(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call `callback` when the peer has closed its socket altogether."""
        self._hangups.register(sock, 0)
        self._on_hangup[sock.fileno()] = callback

    def forget_hangup(self, sock: socket.socket) -> None:
        """Await it no longer."""
        self._hangups.unregister(sock)
        del self._on_hangup[sock.fileno()]

    def _on_hangups(self, events: int) -> None:
        for fd, _ in self._hangups.poll(0):
            callback = self._on_hangup.get(fd)
            if callback is not None:
                self.call(callback)

    def run(self, is_finished: Callable[[], bool]) -> None:
        """Run until `is_finished`."""
        while not is_finished():
            for key, events in self.selector.select(self._timers.rest()):
                current = self.selector.get_map().get(key.fd)
                if current is not None and current.fileobj is key.fileobj:
                    self.call(key.data, events)
            self._timers.ring()

    def call(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call `callback` for one connection; if that fails, the others go on."""
        try:
            callback(*arguments)
        except Exception as error:
            self.log.error("internal error", error=repr(error), trace=_trace(error))


def _trace(error: BaseException) -> str:
    """Return where it was raised; the module traceback, to be had at any time, costs 1 MB."""
    places = []
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{at.tb_lineno}:{code.co_name}")
        at = at.tb_next
    return " ".join(places[-10:])
