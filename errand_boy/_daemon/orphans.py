"""Commands that were to end with their connections, when their helper has been killed.

The server is the subreaper of all that its helpers start, so it becomes their parent. Which they
are, the helper has left in a file that is open to its user, who may have written anything there.
So nothing is signalled that this user could not signal himself.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from errand_boy._daemon.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")


class Orphans:
    """Those that have been sent SIGTERM, and will be sent SIGKILL."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._doomed: list[_Doomed] = []

    def end(self, commands: Iterable[tuple[int, int]], uid: int) -> None:
        """End the process groups of `commands`: pids, and milliseconds from SIGTERM to SIGKILL.

        This is done with the rights of the user `uid`.
        """
        groups: dict[int, set[int]] = {}
        for pid, grace in commands:
            process = _look_at(pid)
            if process is not None and process.parent == os.getpid():
                groups.setdefault(grace, set()).add(pid)
        if not groups:
            return
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        _signal(set().union(*groups.values()), uid, signal.SIGTERM, signal.SIGCONT)
        for grace, some in groups.items():
            self._doom(_Doomed(sorted(some), uid, now, time.monotonic() + grace / 1000))

    def state(self) -> list[Any]:
        """Return what the server's successor has to know of them, for `restore`."""
        return list(self._doomed)

    def restore(self, state: list[Any]) -> None:
        """Take the place of those whose `state` this is."""
        for doomed in state:
            self._doom(_Doomed(*doomed))

    def _doom(self, doomed: _Doomed) -> None:
        self._doomed.append(doomed)
        rest = max(0.0, doomed.at - time.monotonic())
        self._loop.call_later(rest, partial(self._kill, doomed))

    def _kill(self, doomed: _Doomed) -> None:
        self._doomed.remove(doomed)
        leaders = {pid: _look_at(pid) for pid in doomed.groups}
        _signal(
            {pid for pid, leader in leaders.items() if not leader or leader.start <= doomed.since},
            doomed.uid,
            signal.SIGKILL,
        )


class _Doomed(NamedTuple):
    """Groups for SIGKILL, but for one whose leader has got its number since they were orphaned."""

    groups: list[int]
    uid: int
    since: float  # of CLOCK_BOOTTIME
    at: float  # of time.monotonic()


class _Process(NamedTuple):
    parent: int
    group: int
    start: float  # of CLOCK_BOOTTIME
    users: frozenset[int]  # who may signal it, but for root: its real and saved user


def _look_at(pid: int) -> _Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/status", "rb") as file:
            uids = file.read().partition(b"\nUid:")[2].split(None, 4)
    except OSError:  # it has ended
        return None
    users = frozenset(map(int, (uids[0], uids[2])))
    return _Process(int(fields[1]), int(fields[2]), int(fields[19]) / _TICKS, users)


def _signal(groups: set[int], uid: int, *numbers: int) -> None:
    """Signal the processes of `groups` that the user `uid` may signal."""
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError):  # it has just ended
            pidfd = os.pidfd_open(int(name))
            try:
                # Looked at while the number cannot become another's unseen.
                process = _look_at(int(name))
                if process and process.group in groups and (uid == 0 or uid in process.users):
                    for number in numbers:
                        signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)
