"""Ends commands that were to end with their connections, if their helper has been killed.

The server is the subreaper of everything that its helpers start, so it becomes the parent of these
commands. The helper has left their pids in a file that is open to its user, who may have written
anything there. So the server sends signals only to processes that this user may signal.

For that it checks every process of the machine, a little at a time, and one pass serves all helpers
that have ended: users who kill their helpers must not keep the server busy.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from errand_boy import _native
from errand_boy._daemon.loop import Loop
from errand_boy._orphan import start_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_SLICE = 0.0005  # seconds of work at a time
_NOT_REAPED = os.WEXITED | os.WNOHANG | os.WNOWAIT


class Orphans:
    """The process groups that get SIGTERM and later SIGKILL."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._left: list[tuple[Iterable[tuple[int, int]], int]] = []  # by helpers; with their users
        self._jobs: list[_Job] = []
        self._doomed: list[_Doomed] = []
        self._work: Iterator[None] | None = None  # in progress

    def end(self, commands: Iterable[tuple[int, int]], uid: int) -> None:
        """End the process groups of `commands` soon, with the rights of the user `uid`.

        Each command is a pid and the milliseconds from SIGTERM to SIGKILL.
        """
        self._left.append((commands, uid))
        self._begin()

    def state(self) -> list[Any]:
        """Return what the server's successor needs to know, for `restore`."""
        for _ in self._work or ():
            pass
        return list(self._doomed)

    def restore(self, state: list[Any]) -> None:
        """Restore the predecessor's `state`."""
        for doomed in state:
            self._doom(_Doomed(*doomed))

    def _begin(self) -> None:
        if self._work is None:
            self._work = self._steps()
            self._go_on()

    def _go_on(self) -> None:
        end = time.monotonic() + _SLICE
        for _ in self._work or ():
            if time.monotonic() > end:
                self._loop.call_later(0, self._go_on)
                return
        self._work = None

    def _steps(self) -> Iterator[None]:
        while self._left or self._jobs:
            while self._left:
                yield from self._look_for(*self._left.pop())
            jobs, self._jobs = self._jobs, []
            if jobs:
                yield from _signal(jobs)

    def _look_for(self, commands: Iterable[tuple[int, int]], uid: int) -> Iterator[None]:
        groups: dict[int, set[int]] = {}
        for pid, grace in commands:
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, _NOT_REAPED)
                groups.setdefault(grace, set()).add(pid)
            yield
        if groups:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            every = set().union(*groups.values())
            self._jobs.append(_Job(every, uid, (signal.SIGTERM, signal.SIGCONT)))
            for grace, some in groups.items():
                self._doom(_Doomed(sorted(some), uid, now, time.monotonic() + grace / 1000))

    def _doom(self, doomed: _Doomed) -> None:
        self._doomed.append(doomed)
        rest = max(0.0, doomed.at - time.monotonic())
        self._loop.call_later(rest, partial(self._kill, doomed))

    def _kill(self, doomed: _Doomed) -> None:
        self._doomed.remove(doomed)
        starts = {pid: start_of(pid) for pid in doomed.groups}
        since = doomed.since * _TICKS
        groups = {pid for pid, start in starts.items() if start is None or start <= since}
        self._jobs.append(_Job(groups, doomed.uid, (signal.SIGKILL,)))
        self._begin()


class _Job(NamedTuple):
    """A signal for those processes of `groups` that the user `uid` may signal."""

    groups: set[int]
    uid: int
    numbers: tuple[int, ...]


class _Doomed(NamedTuple):
    """Groups that get SIGKILL, unless their leader's number was reused after they were orphaned."""

    groups: list[int]
    uid: int
    since: float  # of CLOCK_BOOTTIME
    at: float  # of time.monotonic()


def _users(pid: int) -> set[int]:
    """Return which users besides root may signal it: the real and the saved one. Raises OSError."""
    with open(f"/proc/{pid}/status", "rb") as file:
        uids = file.read().partition(b"\nUid:")[2].split(None, 4)
    return {int(uids[0]), int(uids[2])}


def _signal(jobs: list[_Job]) -> Iterator[None]:
    groups = set().union(*(job.groups for job in jobs))
    try:
        names = os.listdir("/proc")
    except OSError:  # the log has reported it
        return
    for name in names:
        if not name.isdecimal():
            continue
        pid = int(name)
        yield
        with suppress(OSError):  # it has just ended
            if os.getpgid(pid) not in groups:
                continue
            pidfd = _native.pidfd_open(pid)
            try:
                # Check again: from now on, another process can't get this number unnoticed.
                group, users = os.getpgid(pid), _users(pid)
                for job in jobs:
                    if group in job.groups and (job.uid == 0 or job.uid in users):
                        for number in job.numbers:
                            _native.pidfd_send_signal(pidfd, number, 0)
            finally:
                os.close(pidfd)
