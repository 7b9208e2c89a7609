"""How fast a command's bulk output arrives, and how much memory the helpers use meanwhile.

    python -m bench.bulk MIB ROUNDS

prints JSON: MiB per second by way, in turns, and the helpers' KiB before and after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import errand_boy
from bench.soak import PRIVATE, memory_kib

BUFFER = 1 << 18
KEPT = 1 << 16


def by_pipe(library: Any, path: str, size: int) -> None:
    buffer = memoryview(bytearray(BUFFER))
    received = 0
    with library.Popen(["cat", path], stdout=subprocess.PIPE, bufsize=0) as process:
        while count := process.stdout.readinto(buffer):
            received += count
    assert (process.returncode, received) == (0, size)


def by_streams(path: str, size: int) -> None:
    [result] = errand_boy.map([["cat", path]], max_output=KEPT, check=True)
    assert len(result.stdout) == min(KEPT, size)


def helpers() -> list[int]:
    """Return the pids of this process's helpers."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "errand-boy-helper":
                found.append(int(pid))
    return found


def memory() -> tuple[int, int]:
    """Return the helpers' private KiB, and the sum of their peak resident sets so far."""
    peak = 0
    for pid in helpers():
        status = Path(f"/proc/{pid}/status").read_text()
        peak += int(status.partition("VmHWM:")[2].split()[0])
    return sum(memory_kib(pid, *PRIVATE) for pid in helpers()), peak


def main() -> None:
    size, rounds = int(sys.argv[1]) << 20, int(sys.argv[2])
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        block = os.urandom(1 << 20)
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        ways: dict[str, Callable[[], None]] = {
            "subprocess": partial(by_pipe, subprocess, file.name, size),
            "errand_boy": partial(by_pipe, errand_boy, file.name, size),
            "streams": partial(by_streams, file.name, size),
        }
        with tempfile.NamedTemporaryFile() as little:
            by_pipe(errand_boy, little.name, 0)
            by_streams(little.name, 0)
        before = memory()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                rates[name].append((size >> 20) / (time.perf_counter() - start))
    print(json.dumps({"rates": rates, "before": before, "after": memory()}))


if __name__ == "__main__":
    main()
