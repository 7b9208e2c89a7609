"""How starts use an asyncio loop: turns, many readers, and a driver of their steps."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import select
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from errand_boy._descriptors import duplicate

_STARTS_IN_A_TURN = 4

# The starts that are awaited. A coroutine may become garbage together with its loop. Its start can
# then be concluded only if the garbage collector has not finalized the connection before.
_driven: dict[int, Any] = {}


async def drive(steps: Any) -> None:
    """Run the steps of a start to their end, and raise their exceptions."""
    loop = asyncio.get_running_loop()
    _driven[id(steps)] = steps
    try:
        for wanted in steps:
            if isinstance(wanted, float):
                await asyncio.sleep(wanted)
            else:
                await _ready(loop, *wanted)
    finally:
        steps.close()
        del _driven[id(steps)]


async def _ready(loop: asyncio.AbstractEventLoop, fd: int, writing: bool) -> None:
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    readers = readers_of(loop)
    (loop.add_writer if writing else readers.add_reader)(fd, tell)
    try:
        await ready
    finally:
        (loop.remove_writer if writing else readers.remove_reader)(fd)


class _Turns:
    """Spreads the starts of a loop over its iterations, so that many leave time for other tasks."""

    def __init__(self) -> None:
        self._count = 0  # in this iteration
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until a start may begin."""
        if self._count < _STARTS_IN_A_TURN:
            if not self._count:
                loop.call_soon(self._next, loop)
            self._count += 1
        else:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._count = 0
        while self._waiting and self._count < _STARTS_IN_A_TURN:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                self._count += 1
        if self._count:
            loop.call_soon(self._next, loop)


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = weakref.WeakKeyDictionary()


async def take_turn(loop: asyncio.AbstractEventLoop) -> None:
    """Wait until a start may begin in this loop."""
    turns = _turns.get(loop)
    if turns is None:
        # Drop closed loops, which their waiting starts would keep for ever. Iterate over a copy of
        # the keys, since other threads add their loops meanwhile.
        for reference in _turns.keyrefs():
            other = reference()
            if other is not None and other.is_closed():
                _turns.pop(other, None)
        turns = _turns.setdefault(loop, _Turns())
    await turns.take(loop)


def _epoll() -> select.epoll:
    epoll = select.epoll()
    if epoll.fileno() > 2:
        return epoll
    with epoll:
        return select.epoll.fromfd(duplicate(epoll.fileno()))


class _Readers:
    """A cheaper add_reader and remove_reader: the loop watches one epoll for all descriptors.

    Only the loop refers to this object for long. So when a loop has been closed and forgotten, the
    garbage collector finds whatever still waits in it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = _epoll()
        self._calls: dict[int, Callable[[], Any]] = {}
        # With an empty context, because the loop would keep that of the first start.
        contextvars.Context().run(loop.add_reader, self._epoll.fileno(), self._look)

    def add_reader(self, fd: int, call: Callable[[], Any]) -> None:
        self._calls[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def remove_reader(self, fd: int) -> None:
        # Closing it would not be enough: a forked process may have a copy.
        if self._calls.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # somebody else has closed it
                self._epoll.unregister(fd)

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0, max(1, len(self._calls))):
            call = self._calls.get(fd)
            if call is not None:  # else an earlier callback has removed it
                call()


_readers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Readers]] = (
    weakref.WeakKeyDictionary()
)


def readers_of(loop: asyncio.AbstractEventLoop) -> _Readers | asyncio.AbstractEventLoop:
    """Return an object with add_reader and remove_reader for the loop."""
    if not hasattr(select, "epoll"):  # eventlet takes it away
        return loop
    known = _readers.get(loop)
    readers = None if known is None else known()
    if readers is None:
        readers = _Readers(loop)
        _readers[loop] = weakref.ref(readers)
    return readers
