"""The time-outs of `map`'s commands."""

from __future__ import annotations

import time
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from errand_boy._map.channel import Channel
    from errand_boy._map.command import Job
    from errand_boy._map.policy import Timeout
    from errand_boy._map.result import Result
    from errand_boy._timers import Timer, Timers


class Expiry:
    """Calls `expire` with each command that reaches its time-out.

    Commands without their own time-out have `timeout`, which may change but is the same for all of
    them. So one timer, for the oldest, is enough.
    """

    def __init__(
        self, timers: Timers, expire: Callable[[Channel, Job], Any], timeout: Timeout | None
    ) -> None:
        self._timers = timers
        self._expire = expire
        self._timeout = timeout
        self._by_age: dict[Job, Channel] = {}
        self._timer: Timer | None = None
        self._due = 0.0  # when the timer is due

    def begin(self, channel: Channel, job: Job) -> None:
        """Start the time-out of a command that was started at ``job.begun``."""
        if job.timeout is not None:
            due = job.begun + job.timeout
            job.timer = self._timers.at(due, partial(self._expire, channel, job))
        elif self._timeout is not None:
            self._by_age[job] = channel
            self._look()

    def end(self, job: Job, result: Result | None = None) -> None:
        """Cancel the time-out of a command that is over."""
        if job.timer is not None:
            job.timer.cancel()
        if self._timeout is not None:
            self._by_age.pop(job, None)
            if result is not None and result._end is not None and not job.timed_out:
                self._timeout.count(result.duration)
            self._look()

    def _look(self) -> None:
        """Set the timer, unless it is early enough."""
        assert self._timeout is not None
        seconds = self._timeout.seconds
        if seconds is None or not self._by_age:
            return
        due = next(iter(self._by_age)).begun + seconds
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = self._timers.at(due, self._ring)

    def _ring(self) -> None:
        assert self._timeout is not None
        self._timer = None
        seconds = self._timeout.seconds
        assert seconds is not None
        late = time.monotonic() - seconds
        for job, channel in list(self._by_age.items()):
            if job.begun > late:
                break
            self._by_age.pop(job, None)
            job.timeout = seconds
            self._expire(channel, job)
        self._look()
