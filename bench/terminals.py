"""Measures starts on a terminal, and how fast a terminal's output arrives.

    python -m bench.terminals [--gib N] [--rounds N]

`pexpect.spawn` patched and not, in turns, from a small process and from one that holds N GiB; and
the throughput of a terminal through a daemon, read by a program and shown by `errand-boy run`,
beside that of `script`, in turns. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect

import errand_boy
from errand_boy.terminal import Pty

SIZE = 1_000_000_000  # bytes, so that the start of an interpreter does not count
COMMAND = f"head -c {SIZE} /dev/zero | tr '\\0' x"


def start() -> float:
    """Return how long pexpect takes to start a program; then wait for it."""
    begun = time.perf_counter()
    child = pexpect.spawn("true")
    taken = time.perf_counter() - begun
    child.ptyproc.delayafterclose = child.ptyproc.delayafterterminate = 0
    child.expect(pexpect.EOF)
    child.close()
    return taken


def starts(rounds: int) -> tuple[float, float]:
    """Return the medians without and with the patch."""
    plain, patched = [], []
    for _ in range(rounds):
        plain.append(start())
        errand_boy.patch()
        patched.append(start())
        errand_boy.unpatch()
    return statistics.median(plain), statistics.median(patched)


def through_daemon(client: Any) -> float:
    """Return the seconds until all has been read."""
    begun = time.perf_counter()
    total = 0
    with client.Popen(["sh", "-c", COMMAND], pty=Pty(raw=True)) as process:
        while data := process.terminal.read(1 << 16):
            total += len(data)
    assert total == SIZE
    return time.perf_counter() - begun


def shown_by(*command: str) -> float:
    """Return the seconds that a program takes to show what COMMAND writes."""
    begun = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def throughputs(rounds: int) -> list[float]:
    """Return the medians, in MB/s, of `script`, of a program, and of `errand-boy run`."""
    ours = [sys.executable, "-m", "errand_boy"]
    raw = f"stty raw; {COMMAND}"
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "socket")
        command = [*ours, "serve", "--socket", path]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as daemon:
            client: Any = errand_boy.connect(path)
            try:
                while not os.path.exists(path):
                    time.sleep(0.01)
                ways: list[Callable[[], float]] = [
                    lambda: shown_by("script", "-qec", raw, "/dev/null"),
                    lambda: through_daemon(client),
                    lambda: shown_by(*ours, "run", "--socket", path, "--pty", "sh", "-c", raw),
                ]
                taken: list[list[float]] = [[] for _ in ways]
                for turn in range(rounds * len(ways)):  # each is the first one in its turn
                    at = (turn + turn // len(ways)) % len(ways)
                    taken[at].append(ways[at]())
            finally:
                client.close()
                daemon.terminate()
    return [SIZE / 1e6 / statistics.median(column) for column in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    start()
    for size in (0.0, arguments.gib):
        held = bytearray(int(size * (1 << 30)))
        for at in range(0, len(held), 4096):
            held[at] = 1
        plain, patched = starts(arguments.rounds)
        print(
            f"pexpect.spawn, caller of {size:g} GiB: {plain * 1e3:.2f} ms, patched "
            f"{patched * 1e3:.2f} ms: {plain / patched:.1f} times faster",
            flush=True,
        )
        del held
    script, read, shown = throughputs(max(3, arguments.rounds // 3))
    print(
        f"script {script:.0f} MB/s; through a daemon, read {read:.0f} MB/s: {read / script:.2f}, "
        f"by errand-boy run {shown:.0f} MB/s: {shown / script:.2f}"
    )


if __name__ == "__main__":
    main()
