"""The reports of helpers."""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_COUNT = struct.Struct("<I")
_HEAD = struct.Struct("<QQI")
_FAILURE = struct.Struct("<BiQ")
_LIVE = struct.Struct("<iIQH")
_FIGURES = struct.Struct("<QQQ96Q")
_KIND = struct.Struct("<IiQ")

_TIED = struct.Struct("<7900Q")  # pid and milliseconds
_TIED_AT = _FIGURES.size + 64 * _KIND.size

FILE_SIZE = 64 << 10  # bytes of the file in which a helper keeps its figures


class Command:
    """A live command. `since`: its start in seconds since 1970; `argv` may be cut short."""

    __slots__ = ("argv", "connection", "pid", "since")

    def __init__(self, pid: int, connection: int, since: float, argv: list[str]) -> None:
        self.pid = pid
        self.connection = connection
        self.since = since
        self.argv = argv


class Report:
    """The counts of a helper. Those of several helpers can be added up.

    `failures` counts by stage and errno. `latency[i]` counts the starts that took less than
    2**(i/4) microseconds, but not less than the limit before it. `tied` are the commands that were
    to end with their connections, left by a killed helper: pids, and milliseconds from SIGTERM to
    SIGKILL.
    """

    __slots__ = ("commands", "ended", "failures", "latency", "started", "tied")

    def __init__(self) -> None:
        self.started = 0
        self.ended = 0
        self.failures: dict[tuple[int, int], int] = {}
        self.latency: list[int] = []
        self.commands: list[Command] = []
        self.tied: list[tuple[int, int]] = []

    @classmethod
    def decode(cls, payload: bytes) -> Report:
        """Decode a REPORT. Raises struct.error if it is malformed."""
        report = cls()
        report.started, report.ended, _ = _HEAD.unpack_from(payload)
        at = _HEAD.size

        def count() -> int:
            nonlocal at
            (n,) = _COUNT.unpack_from(payload, at)
            at += _COUNT.size
            return int(n)

        for _ in range(count()):
            stage, error, times = _FAILURE.unpack_from(payload, at)
            report.failures[stage, error] = times
            at += _FAILURE.size
        n = count()
        report.latency = list(struct.unpack_from(f"<{n}Q", payload, at))
        at += 8 * n
        for _ in range(count()):
            pid, connection, milliseconds, size = _LIVE.unpack_from(payload, at)
            at += _LIVE.size
            text = payload[at : at + size]
            at += size
            argv = [os.fsdecode(word) for word in text.removesuffix(b"\0").split(b"\0")]
            report.commands.append(Command(pid, connection, milliseconds / 1000, argv))
        return report

    @classmethod
    def read(cls, fd: int) -> Report:
        """Return the report in the file of figures of a helper that has ended.

        The helper's user can write to the file, so impossible values are ignored.
        """
        report = cls()
        data = os.pread(fd, FILE_SIZE, 0)
        try:
            report.started, report.ended, kinds, *latency = _FIGURES.unpack_from(data)
            report.latency = list(latency)
            tied = _TIED.unpack_from(data, _TIED_AT)
            report.tied = [
                (entry & 0xFFFFFFFF, entry >> 32)
                for entry in tied
                if 0 < entry & 0xFFFFFFFF < 1 << 31
            ]
            for i in range(kinds):
                stage, error, times = _KIND.unpack_from(data, _FIGURES.size + i * _KIND.size)
                report.failures[stage, error] = times
        except struct.error:
            pass
        return report

    def state(self) -> dict[str, Any]:
        """Return the counts, for `of_state`."""
        return {
            "started": self.started,
            "ended": self.ended,
            "failures": [(*key, times) for key, times in self.failures.items()],
            "latency": self.latency,
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Report:
        """Return a report with the counts of `state`."""
        report = cls()
        report.started, report.ended = state["started"], state["ended"]
        report.failures = {(stage, error): times for stage, error, times in state["failures"]}
        report.latency = state["latency"]
        return report

    def add(self, other: Report) -> None:
        """Add the counts of `other`, but not its live commands."""
        self.started += other.started
        self.ended += other.ended
        for key, times in other.failures.items():
            self.failures[key] = self.failures.get(key, 0) + times
        self.latency += [0] * (len(other.latency) - len(self.latency))
        for i, times in enumerate(other.latency):
            self.latency[i] += times
