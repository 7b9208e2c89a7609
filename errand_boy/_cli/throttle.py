"""Keeps `errand-boy map` from starting commands for a while, and pauses some."""

from __future__ import annotations

import os
import re
import signal
import time

from errand_boy._cli.parsing import UsageError, duration, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from errand_boy._map.batch import Batch
    from errand_boy._map.command import Job

_INTERVAL = 0.1  # seconds between looks at the kernel's counts
_PAUSE = 0.5  # seconds between looks at the memory, for those that may have to pause


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("when to start")
    group.add_argument(
        "--delay",
        type=duration,
        metavar="TIME",
        default=0.0,
        help="wait TIME between two starts",
    )
    group.add_argument(
        "--load",
        metavar="N",
        help="start no command while N or more processes of the system are runnable; N%% is "
        "relative to the number of CPUs",
    )
    group.add_argument(
        "--memfree",
        type=size,
        metavar="SIZE",
        help="start no command while less memory than SIZE (512M, 2G) is available",
    )
    group.add_argument(
        "--memsuspend",
        type=size,
        metavar="SIZE",
        help="the same, and pause the youngest commands, one after another, until as much is "
        "available again; the oldest goes on",
    )


class Gate:
    """Decides when a command may be started, by the options of this module. Raises UsageError."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._delay = options.delay
        self._next_start = 0.0
        self._most_running = None if options.load is None else _load(options.load)
        self._least_free = max(options.memfree or 0, options.memsuspend or 0)
        self._looked = 0.0
        self._running = self._live = 0  # then
        self._free = 0

    def closed_for(self, live: int) -> float:
        """Return in how many seconds to ask again, or 0 if a command may start now."""
        now = time.monotonic()
        if now < self._next_start:
            return self._next_start - now
        if self._most_running is None and not self._least_free:
            return 0.0
        if now - self._looked >= _INTERVAL:
            self._look(live)
            self._looked = now
        # The kernel's figures don't include commands that have started since then.
        running = self._running + live - self._live
        if self._most_running is not None and running >= self._most_running:
            return _INTERVAL
        if self._free < self._least_free:
            return _INTERVAL
        return 0.0

    def count_start(self) -> None:
        """Count a command that has started."""
        if self._delay:
            self._next_start = time.monotonic() + self._delay

    def _look(self, live: int) -> None:
        self._live = live
        if self._most_running is not None:
            self._running = runnable()
        if self._least_free:
            self._free = available_memory()


def gate(options: argparse.Namespace) -> Gate | None:
    """Return the gate that the options ask for."""
    wanted = options.delay or options.load is not None or options.memfree or options.memsuspend
    return Gate(options) if wanted else None


class Pauses:
    """Pauses commands of `batch` while less than `least` bytes of memory are available."""

    def __init__(self, batch: Batch, least: int) -> None:
        self._batch = batch
        self._least = least
        self._paused: list[Job] = []
        batch.timers.after(_PAUSE, self._look)

    def _look(self) -> None:
        running = self._batch.running()
        self._paused = [job for job in self._paused if job in running]
        awake = [job for job in running if job not in self._paused]
        if available_memory() < self._least:
            if len(awake) > 1:
                self._batch.signal_group(awake[-1], signal.SIGSTOP)
                self._paused.append(awake[-1])
        elif self._paused:
            self._batch.signal_group(self._paused.pop(), signal.SIGCONT)
        self._batch.timers.after(_PAUSE, self._look)


def runnable() -> int:
    """Return how many other processes and threads of the system are runnable."""
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[0]) - 1


def available_memory() -> int:
    """Return how many bytes new processes may use without swapping."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _load(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%?)", text)
    if match is None or not float(match[1]):
        raise UsageError(f"--load {text} is neither a number nor a percentage of the CPUs")
    number = float(match[1])
    return max(1.0, number / 100 * len(os.sched_getaffinity(0))) if match[2] else number
