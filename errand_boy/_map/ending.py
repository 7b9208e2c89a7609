"""Ends the commands of one `map`, at their time-outs or if descendants hold their output open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from errand_boy._options import ends as _ends

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._map.channel import Channel
    from errand_boy._map.command import Job
    from errand_boy._timers import Timers
    from errand_boy._wire.stream import Ended


class Ending:
    """Ends commands as their `stop`, `tree` and `drain` say, or those of `options`.

    `send` is called with a channel that has something to send; `over` for a command that has ended,
    if its output is no longer awaited.
    """

    def __init__(
        self,
        timers: Timers,
        options: Mapping[str, Any],
        send: Callable[[Channel], Any],
        over: Callable[[Channel, Job, Ended], Any],
    ) -> None:
        self._timers = timers
        self._options = options
        self._send = send
        self._over = over

    def _given(self, job: Job) -> Mapping[str, Any]:
        return self._options if job.options is None else job.options

    def end(self, channel: Channel, job: Job) -> None:
        """End a command: by default, its process group gets SIGKILL."""
        ends = _ends.of(self._given(job), "group")
        if ends is None:
            self._kill(channel, job, -channel.stream.pid, channel.stream.pid)  # no leader, maybe
        else:
            course = ends.course(_ends.signaller(channel.stream, ends, self._given(job)))
            self._step(channel, job, course, None)

    def drains(self, job: Job) -> bool:
        """Return whether `drain` is set, so that EXITED must come before the end of the output."""
        return self._given(job).get("drain") is not None

    def drain(self, channel: Channel, job: Job) -> None:
        """After the end of a command, read for `drain` seconds what descendants write."""
        if not job.drains and self.drains(job):
            job.drains = True
            kill = partial(self._kill, channel, job)
            self._timers.after(self._given(job)["drain"], kill)

    def _step(self, channel: Channel, job: Job, course: Any, has_ended: bool | None) -> None:
        if channel.job is not job:
            return
        try:
            seconds = next(course) if has_ended is None else course.send(has_ended)
        except StopIteration:
            seconds = None
        if seconds is None:  # the last signal has been sent
            self._kill(channel, job)
            return
        self._send(channel)

        def go_on() -> None:
            self._step(channel, job, course, channel.stream.ended is not None)

        job.timer = self._timers.after(seconds, go_on)

    def _kill(self, channel: Channel, job: Job, *pids: int) -> None:
        if channel.job is not job:
            return
        ended = channel.stream.kill(*pids)
        if ended is None:
            self._send(channel)
        else:  # only descendants still hold its output open
            self._over(channel, job, ended)
