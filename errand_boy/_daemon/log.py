"""The daemon's log."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable

LEVELS = ("debug", "info", "warning", "error")


class Log:
    """Writes lines to standard error. A line that can't be written is lost; nothing waits."""

    _longest = 4096  # PIPE_BUF: bytes that go into a pipe together or not at all

    def __init__(self, level: str, form: str) -> None:
        self._least = LEVELS.index(level)
        self._json = form == "json"
        self._lost = 0
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)

    def debug(self, message: str, **fields: object) -> None:
        """Write an event that matters only for debugging."""
        self._log(0, message, fields)

    def info(self, message: str, **fields: object) -> None:
        """Write an event in the daemon's life."""
        self._log(1, message, fields)

    def warning(self, message: str, **fields: object) -> None:
        """Write an event that somebody may have to look at."""
        self._log(2, message, fields)

    def error(self, message: str, **fields: object) -> None:
        """Write an event that keeps the daemon from doing its work."""
        self._log(3, message, fields)

    def _log(self, level: int, message: str, fields: dict[str, object]) -> None:
        if level < self._least:
            return
        if self._lost:
            fields["lost"] = self._lost
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
        if self._json:
            entry = {"time": stamp, "level": LEVELS[level], "message": message, **fields}
            line = json.dumps(entry, default=str)
        else:
            pairs = "".join(f" {name}={_quoted(value)}" for name, value in fields.items())
            line = f"{stamp} {LEVELS[level].upper()} {message}{pairs}"
        data = line.encode("utf-8", "backslashreplace")[: self._longest - 1] + b"\n"
        try:
            # A reader that has stopped must not stop us. O_NONBLOCK would affect other processes.
            if self._poll.poll(0) and os.write(2, data) == len(data):
                self._lost = 0
                return
        except OSError:
            pass
        self._lost += 1


class Complaints:
    """Warnings that clients can cause at will. In each period, only some of each kind are written.

    At its end, the number of those left out is written. `call_later` is the loop's method.
    """

    def __init__(
        self,
        log: Log,
        call_later: Callable[[float, Callable[[], None]], object],
        most: int = 20,
        seconds: float = 10.0,
    ) -> None:
        self._log = log
        self._call_later = call_later
        self._most = most
        self._seconds = seconds
        self._counts: dict[str, int] = {}  # of this period, by message

    def warning(self, message: str, **fields: object) -> None:
        """Write a warning, or count it as left out."""
        if not self._counts:
            self._call_later(self._seconds, self.conclude)
        count = self._counts[message] = self._counts.get(message, 0) + 1
        if count <= self._most:
            self._log.warning(message, **fields)

    def conclude(self) -> None:
        """Write how many warnings were left out, and start counting again."""
        for message, count in self._counts.items():
            if count > self._most:
                self._log.warning(message, left_out=count - self._most)
        self._counts.clear()


def _quoted(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)
