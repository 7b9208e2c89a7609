"""The process of a job's journal: how long it runs, and its end if it has lost its keeper."""

from __future__ import annotations

import errno
import os
import select
import time
from contextlib import suppress

from errand_boy import _native

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_PROCESS_GROUP = 4  # PIDFD_SIGNAL_PROCESS_GROUP, since Linux 6.9


def _stat(pid: int) -> tuple[bytes, int] | None:
    """Return a process's state and when it began, in ticks since the boot; None: it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def start_of(pid: int) -> int | None:
    """Return when a process began, in ticks since the boot, or None if it has gone."""
    found = _stat(pid)
    return None if found is None else found[1]


def seconds_since(begun: int) -> float:
    """Return how long ago a process with this start began, whatever the clock has been set to."""
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - begun / _TICKS)


def is_left(entry: dict[str, Any]) -> bool:
    """Return whether the process of a job's journal, of this boot, runs.

    The time of its start tells it from others that get its number.
    """
    begun = entry.get("begun")
    found = _stat(entry["pid"]) if begun else None
    return found is not None and found[1] == begun and found[0] not in (b"Z", b"X")


def namespace() -> str:
    """Return the name of this process's PID namespace, or "" if it is not known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Left:
    """The command of the entry of a lost job. `group`: also signal the process group that it leads.

    Raises ProcessLookupError if it has ended.
    """

    def __init__(self, entry: dict[str, Any], *, group: bool) -> None:
        self._pid: int = entry["pid"]
        self.pidfd: int = _native.pidfd_open(self._pid)
        try:
            # From here on, the descriptor and not the number says which process is meant.
            if not is_left(entry):
                raise ProcessLookupError(errno.ESRCH, "it has ended")
            self._flags = _PROCESS_GROUP if group and os.getpgid(self._pid) == self._pid else 0
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave it alone."""
        os.close(self.pidfd)

    def has_ended(self) -> bool:
        """Return whether it has ended."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, number: int) -> None:
        """Send it a signal. Raises PermissionError."""
        with suppress(ProcessLookupError):
            try:
                _native.pidfd_send_signal(self.pidfd, number, self._flags)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._flags:
                    raise
                if not self.has_ended():  # else another group may have its number
                    os.killpg(self._pid, number)
