"""Reads and closes the sockets of strangers without ever sleeping.

Descriptors that were sent over a Unix socket wait in its queue. If one is taken off the queue and
there is no other copy, it is closed. This may take as long as its sender likes, for example for a
TCP socket with SO_LINGER. So the server takes no descriptors off the queue, and does not close such
a Unix socket itself.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import time
from _queue import Empty, SimpleQueue
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from errand_boy._native import lib

INTERRUPT = signal.SIGUSR1  # must have a handler
_LOOK = 0.02  # seconds that a close may sleep before it is interrupted
_REST = 5.0  # seconds without work after which a thread ends, except the first one
_BATCH = 16  # sockets closed in one call without the GIL, so that the loop waits less often
_MOST_THREADS = 8
_MOST_WAITING = 64  # batches


class DescriptorsError(OSError):
    """Unexpected descriptors have arrived; they are still in the queue."""


def peek(sock: socket.socket, size: int) -> tuple[bytes, bool]:
    """Return up to `size` bytes, which stay unread, and whether descriptors came with them.

    Raises OSError, and BlockingIOError if nothing is there.
    """
    # After a peek, the queue still has a copy of each descriptor.
    data, _, flags, _ = sock.recvmsg(size, 0, socket.MSG_PEEK)
    return data, bool(flags & socket.MSG_CTRUNC)


def receive(sock: socket.socket, size: int) -> bytes:
    """Return up to `size` bytes, b"" at the end. Raises DescriptorsError, and OSError."""
    data, has_descriptors = peek(sock, size)
    if has_descriptors:
        raise DescriptorsError("it came with descriptors")
    # Not more, since bytes with descriptors may have arrived after these.
    return sock.recv(len(data)) if data else b""


class Closer:
    """Closes such sockets in its own threads, and interrupts a close that sleeps.

    The loop calls `flush` before it waits. `call_later` is the loop's method.
    """

    def __init__(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._call_later = call_later
        self._fds: list[int] = []  # the next batch,
        self._unread: list[bool] = []  # and whether to read these first
        self._queue: SimpleQueue[tuple[int, list[int], bytes]] = SimpleQueue()
        self._number = count()
        self._unclosed: set[int] = set()  # batches, by number
        self._since: dict[int, float] = {}  # when the current batch began, by thread
        self._threads: set[int] = set()
        self._is_looking = False
        self._start_thread(None)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being closed or waits to be closed."""
        return not (self._fds or self._unclosed)

    @property
    def is_behind(self) -> bool:
        """Whether so many sockets wait to be closed that no more should be accepted."""
        return self._queue.qsize() > _MOST_WAITING

    def close(self, sock: socket.socket, *, read: bool = False) -> None:
        """Close `sock` a little later. If `read`, read it first, so that the peer gets no error."""
        fd = sock.detach()
        if fd >= 0:
            self._fds.append(fd)
            self._unread.append(read)
            if len(self._fds) == _BATCH:
                self.flush()

    def flush(self) -> None:
        """Give the threads the sockets that were passed to `close` since the last call."""
        if self._fds:
            number = next(self._number)
            self._unclosed.add(number)
            self._queue.put((number, self._fds, bytes(self._unread)))
            self._fds, self._unread = [], []
            self._look_later()

    def _start_thread(self, rest: float | None) -> None:
        """Start a thread that ends after `rest` seconds without work (None: never)."""
        self._threads.add(_thread.start_new_thread(self._run, (rest,)))

    def _run(self, rest: float | None) -> None:
        # The main thread handles other signals, and may leave them to the server's successor.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {INTERRUPT})
        me = _thread.get_ident()
        with suppress(OSError):  # as high as the main thread, which may need a lock of ours
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, os.getpid()))
        while True:
            try:
                number, fds, unread = self._queue.get(timeout=rest)
            except Empty:
                self._threads.discard(me)
                return
            self._since[me] = time.monotonic()
            lib.eb_close_all(fds, unread, len(fds))
            del self._since[me]
            self._unclosed.remove(number)

    def _look_later(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self._call_later(_LOOK, self._look)

    def _look(self) -> None:
        self._is_looking = False
        late = time.monotonic() - _LOOK
        sleepers = [thread for thread, since in list(self._since.items()) if since < late]
        for thread in sleepers:
            signal.pthread_kill(thread, INTERRUPT)
        if len(sleepers) == len(self._threads) < _MOST_THREADS:
            with suppress(RuntimeError):  # out of memory
                self._start_thread(_REST)
        # `_since` does not show whether work is left: between two batches it is empty. After the
        # last close the loop must wake, because a successor may wait for it.
        if self._unclosed:
            self._look_later()
