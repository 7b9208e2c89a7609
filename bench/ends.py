"""Time-outs of a program that escapes the usual ends: ``python -m bench.ends [count]``.

It forks twice, calls setsid, ignores SIGTERM and keeps the pipe. Prints how long after its steps
each time-out returned, how many processes were left, and what a start with tree="all" costs.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import errand_boy

ours: Any = errand_boy  # subprocess's own types know no other options
SCRIPT = "trap '' TERM; (setsid sh -c 'sleep 600 & exec sleep 600' &); while :; do sleep 600; done"
TIMEOUT, GRACE = 0.05, 0.05  # seconds
STARTS = 300


def left(mark: str) -> int:
    """Return how many processes have `mark` in their environment."""
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            count += mark.encode() in Path("/proc", name, "environ").read_bytes()
    return count


def timeouts(count: int) -> list[float]:
    """Return how long (seconds) after its steps each of them was over."""
    mark = f"ERRAND_BOY_BENCH={os.getpid()}"
    env = {**os.environ, "ERRAND_BOY_BENCH": str(os.getpid())}
    late, found = [], 0
    for _ in range(count):
        begun = time.monotonic()
        try:
            ours.run(
                ["sh", "-c", SCRIPT],
                capture_output=True,
                timeout=TIMEOUT,
                stop=((SIGTERM, GRACE), SIGKILL),
                tree="all",
                env=env,
            )
        except subprocess.TimeoutExpired:
            late.append(time.monotonic() - begun - TIMEOUT - GRACE)
        found += left(mark)
    print(f"{len(late)} of {count} time-outs, {found} processes left")
    return late


def start(tree: str | None) -> tuple[float, float]:
    """Return how long (microseconds) the constructor takes, and until /bin/true is reaped."""
    begun = time.perf_counter()
    process = ours.Popen(["/bin/true"], tree=tree)
    made = time.perf_counter()
    process.wait()
    return (made - begun) * 1e6, (time.perf_counter() - begun) * 1e6


def main() -> None:
    """Print the figures."""
    late = sorted(timeouts(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
    for share in (0.5, 0.9, 0.99, 0.999, 1):
        print(f"  {share:6.1%} over within {late[int(share * (len(late) - 1))]:.3f} s")
    starts: dict[str | None, list[tuple[float, float]]] = {None: [], "all": []}
    for _ in range(STARTS):
        for tree, found in starts.items():
            found.append(start(tree))
    for tree, found in starts.items():
        made, reaped = (statistics.median(times) for times in zip(*found, strict=True))
        print(f"tree={tree!r}: constructor {made:.0f} µs, reaped after {reaped:.0f} µs")


main()
