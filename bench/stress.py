"""Many clients of one daemon; clients and helpers are killed now and then; then the accounts.

    python -m bench.stress [--commands 200000] [--clients 50] [--live 10000]

First --clients processes run --commands commands, while now and then a client (replaced by another)
or a helper is killed; then --live commands live at the same time. Prints what is left afterwards,
and whether the counts add up. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import errand_boy
from errand_boy._wire import status as _status
from errand_boy._wire.address import Address

COUNTS = struct.Struct("<4Q")  # begun, ended well, told that a helper died, failed otherwise
HELPER_EVERY = 1.0  # seconds
CLIENT_EVERY = 0.5
PATIENCE = 60.0


def client_process(path: str, slot: int, counts: mmap.mmap, commands: int) -> None:
    """Run commands until all clients together have begun enough; a forked child."""
    client = errand_boy.connect(path)
    begun = ended = told = other = 0

    def note() -> None:
        COUNTS.pack_into(counts, slot * COUNTS.size, begun, ended, told, other)

    while sum(COUNTS.unpack_from(counts, at)[0] for at in range(0, len(counts), COUNTS.size)) < (
        commands
    ):
        for _ in range(20):
            begun += 1
            note()
            try:
                code = client.Popen(["/bin/true"]).wait()
            except errand_boy.HelperDiedError:
                told += 1
            except OSError as error:
                other += 1
                print(f"client: {error!r}", file=sys.stderr)
            else:
                ended += code == 0
                other += code != 0
            note()
    os._exit(0)


class Daemon:
    def __init__(self, directory: str, *options: str) -> None:
        self.path = os.path.join(directory, "socket")
        command = [sys.executable, "-m", "errand_boy", "serve", "--socket", self.path, *options]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(_status.NoAnswerError):
                self.status()
                return
            if time.monotonic() > deadline:
                raise TimeoutError("the daemon does not answer")

    def status(self) -> dict[str, Any]:
        return _status.fetch(Address(self.path))

    def state(self) -> dict[str, Any]:
        seen = self.status()
        pids = [self.process.pid, *(helper["pid"] for helper in seen["helpers"])]
        return {
            "helpers": len(pids) - 1,
            "descriptors": [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids],
            "zombies": zombies(pids),
            "server_kib": pss_kib(pids[0]),
            "helpers_kib": sum(map(pss_kib, pids[1:])),
            "live": len(seen["commands"]),
            "queue": seen["queue"],
        }

    def settled(self) -> dict[str, Any]:
        """The state when no client is connected any more."""
        deadline = time.monotonic() + PATIENCE
        while any(helper["connections"] for helper in self.status()["helpers"]):
            if time.monotonic() > deadline:
                break
            select.select([], [], [], 0.05)
        return self.state()


def pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def zombies(parents: list[int]) -> int:
    found = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            found += state == "Z" and int(parent) in parents
    return found


def many_short(daemon: Daemon, commands: int, clients: int) -> bool:
    most = clients * 100  # slots: each that replaces a killed client has its own
    counts = mmap.mmap(-1, most * COUNTS.size)
    before = daemon.settled()
    live: dict[int, int] = {}
    slots = iter(range(most))
    killed_clients = killed_helpers = 0

    def begin() -> None:
        slot = next(slots)
        pid = os.fork()
        if pid == 0:
            client_process(daemon.path, slot, counts, commands)
        live[pid] = slot

    for _ in range(clients):
        begin()
    start = time.monotonic()
    next_client, next_helper = start + CLIENT_EVERY, start + HELPER_EVERY
    while live:
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                live.pop(pid, None)
        now = time.monotonic()
        finishing = totals(counts)[0] >= commands
        if now > next_client and not finishing:
            next_client = now + CLIENT_EVERY
            victim = random.choice(list(live))
            os.kill(victim, signal.SIGKILL)
            killed_clients += 1
            begin()
        if now > next_helper and not finishing:
            next_helper = now + HELPER_EVERY
            victim = random.choice(daemon.status()["helpers"])["pid"]
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                killed_helpers += 1
        select.select([], [], [], 0.05)
    seconds = time.monotonic() - start
    after = daemon.settled()
    begun, ended, told, other = totals(counts)
    seen = daemon.status()["totals"]
    # The last command of a killed client, or of a client whose helper died, may have been started.
    unsure = killed_clients + told
    sums = ended <= seen["ended"] + seen["commands_lost"] and (
        ended <= seen["started"] <= begun and begun - seen["started"] <= unsure
    )
    balanced = seen["started"] == seen["ended"] + seen["commands_lost"]
    print(f"{begun} commands from {clients} clients in {seconds:.0f} s, {begun / seconds:.0f}/s")
    print(f"killed: {killed_clients} clients, {killed_helpers} helpers")
    print(f"clients: {ended} ended well, {told} told that a helper died, {other} failed otherwise")
    print(f"daemon: {json.dumps(seen)}")
    print(f"before: {json.dumps(before)}")
    print(f"after:  {json.dumps(after)}")
    good = sums and balanced and other == 0 and not after["zombies"] and not after["live"]
    print("the counts add up" if sums and balanced else "THE COUNTS DO NOT ADD UP")
    return good


def totals(counts: mmap.mmap) -> tuple[int, ...]:
    each = [COUNTS.unpack_from(counts, at) for at in range(0, len(counts), COUNTS.size)]
    return tuple(map(sum, zip(*each, strict=True)))


def start_microseconds(client: Any, count: int = 200) -> float:
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        process = client.Popen(["/bin/true"])
        taken.append((time.perf_counter() - start) * 1e6)
        process.wait()
    return statistics.median(taken)


def many_live(daemon: Daemon, count: int) -> bool:
    client = errand_boy.connect(daemon.path)
    idle = start_microseconds(client)
    before = daemon.state()
    start = time.monotonic()
    processes = [client.Popen(["/bin/sleep", "1000"]) for _ in range(count)]
    seconds = time.monotonic() - start
    crowded = start_microseconds(client)
    during = daemon.state()
    expected = {}
    for number, process in enumerate(processes):
        expected[process.pid] = [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1][number % 3]
        process.send_signal(expected[process.pid])
    right = sum(process.wait(PATIENCE) == -expected[process.pid] for process in processes)
    client.close()
    after = daemon.settled()
    more = [(during[name] - before[name]) / count for name in ("helpers_kib", "server_kib")]
    print(f"{count} live at once, started in {seconds:.0f} s; {right} exit statuses right")
    print(f"a start: {idle:.0f} us before, {crowded:.0f} us with them: {crowded / idle:.2f}")
    print(f"{more[0]:.2f} KiB of the helpers and {more[1]:.2f} of the server for each (PSS)")
    print(f"before: {json.dumps(before | {'descriptors': sum(before['descriptors'])})}")
    print(f"during: {json.dumps(during | {'descriptors': sum(during['descriptors'])})}")
    print(f"after:  {json.dumps(after)}")
    return right == count and not after["zombies"] and not after["live"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--live", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        daemon = Daemon(directory, "--pool-size", "2")
        try:
            good = not options.commands or many_short(daemon, options.commands, options.clients)
            good = (not options.live or many_live(daemon, options.live)) and good
        finally:
            daemon.process.terminate()
            code = daemon.process.wait()
    print(f"the daemon's exit status: {code}")
    return 0 if good and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
