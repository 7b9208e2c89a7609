"""Timers. The clock is time.monotonic()."""

from __future__ import annotations

import time
from heapq import heapify, heappop, heappush
from itertools import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_LONGEST = 3600.0  # seconds
_FEW = 64


class Timer:
    """A timer that has been set."""

    __slots__ = ("_timers", "action")

    def __init__(self, timers: Timers, action: Callable[[], Any]) -> None:
        self.action: Callable[[], Any] | None = action
        self._timers = timers

    def cancel(self) -> None:
        """Cancel it."""
        if self.action is not None:
            self.action = None
            self._timers.count_cancelled()


class Timers:
    """Timers, in the order of their times."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._number = count()  # keeps the order of timers with the same time
        self._cancelled = 0  # cancelled timers in the heap

    def at(self, when: float, action: Callable[[], Any]) -> Timer:
        """Have `ring` call `action` when it is called at `when` or later."""
        timer = Timer(self, action)
        heappush(self._heap, (when, next(self._number), timer))
        return timer

    def after(self, seconds: float, action: Callable[[], Any]) -> Timer:
        """Have `ring` call `action` in `seconds`."""
        return self.at(time.monotonic() + seconds, action)

    def rest(self) -> float | None:
        """Return in how many seconds to call `ring`, or None without a timer.

        The number is at most an hour, since poll(2) takes at most 24 days.
        """
        heap = self._heap
        while heap and heap[0][2].action is None:
            self._pop()
        return min(max(0.0, heap[0][0] - time.monotonic()), _LONGEST) if heap else None

    def ring(self) -> None:
        """Call the actions that are due. If one raises an exception, later ones stay due."""
        heap, now = self._heap, time.monotonic()
        while heap and heap[0][0] <= now:
            action = self._pop()
            if action is not None:
                action()

    def _pop(self) -> Callable[[], Any] | None:
        """Remove the first timer, and return its action, or None if it was cancelled."""
        _, _, timer = heappop(self._heap)
        action, timer.action = timer.action, None
        self._cancelled -= action is None
        return action

    def count_cancelled(self) -> None:
        """Count a cancelled timer; if they are the majority, remove them from the heap."""
        self._cancelled += 1
        if self._cancelled > _FEW and self._cancelled * 2 > len(self._heap):
            self._heap[:] = [entry for entry in self._heap if entry[2].action is not None]
            heapify(self._heap)
            self._cancelled = 0
