"""The progress of a `map`: commands done and failed, the rate, and the time left."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from errand_boy._map.policy import Median

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

_INTERVAL = 0.1  # seconds between two updates
_CLEAR = "\r\x1b[K"


class Tally:
    """Counts the commands that have ended. `total` is None if it is not known."""

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self.done = self.failed = 0
        self._busy = 0.0  # seconds that all commands took together
        self._median = Median()
        self._start = time.monotonic()

    def count(self, failed: bool, duration: float) -> None:
        """Count a command that has ended."""
        self.done += 1
        self.failed += failed
        self._busy += duration
        self._median.add(duration)

    def text(self) -> str:
        """Return the progress in words."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        of = "" if self.total is None else f"/{self.total}"
        text = f"{self.done}{of} done, {self.failed} failed, {self.done / elapsed:.1f}/s"
        left = self._left(elapsed)
        return text if left is None else f"{text}, ETA {_clock(left)}"

    def _left(self, elapsed: float) -> float | None:
        """Return the seconds left, or None if they can't be estimated."""
        if self.total is None or not self.done:
            return None
        left = max(0, self.total - self.done)
        median = self._median.get()
        if not median or not self._busy:
            return left * elapsed / self.done
        # A single slow command says nothing about the others. The average number at a time:
        return left * median / max(self._busy / elapsed, 1.0)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Line:
    """A line of words on a terminal."""

    def __init__(self, tally: Tally, file: TextIO) -> None:
        self._tally = tally
        self._file = file

    def show(self) -> None:
        columns = 80
        with contextlib.suppress(OSError):
            columns = os.get_terminal_size(self._file.fileno()).columns or 80
        self._write(_CLEAR + self._tally.text()[: columns - 1])

    def clear(self) -> None:
        self._write(_CLEAR)

    def close(self) -> None:
        self.show()
        self._write("\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may have gone
            self._file.write(text)
            self._file.flush()


class _Tqdm:
    """The same words after tqdm's bar."""

    def __init__(self, tally: Tally, file: TextIO, tqdm: Callable[..., Any]) -> None:
        self._tally = tally
        known = tally.total is not None
        self._bar = tqdm(
            total=tally.total,
            file=file,
            bar_format="{percentage:3.0f}%|{bar}| {desc}" if known else "{desc}",
            desc=tally.text(),
            dynamic_ncols=True,
        )

    def show(self) -> None:
        self._bar.n = self._tally.done
        self._bar.set_description_str(self._tally.text())

    def clear(self) -> None:
        self._bar.clear()

    def close(self) -> None:
        self.show()
        self._bar.close()


class Bar:
    """A line on a terminal that shows `tally`, with a bar if tqdm is installed."""

    def __init__(self, tally: Tally, file: TextIO) -> None:
        self._line: _Line | _Tqdm
        try:
            from tqdm import tqdm  # noqa: PLC0415
        except ImportError:
            self._line = _Line(tally, file)
        else:
            self._line = _Tqdm(tally, file, tqdm)
        self._next = 0.0
        self._is_there = False

    def show(self, at_once: bool = False) -> None:
        """Update the line, but not too often."""
        now = time.monotonic()
        if at_once or now >= self._next:
            self._next = now + _INTERVAL
            self._is_there = True
            self._line.show()

    def clear(self) -> None:
        """Remove the line, to make room for output."""
        if self._is_there:
            self._is_there = False
            self._line.clear()

    def close(self) -> None:
        """Update the line a last time, and leave it there."""
        self._line.close()


def terminal() -> TextIO | None:
    """Return standard error if it is a terminal."""
    return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None
