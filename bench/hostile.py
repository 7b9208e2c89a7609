"""Eight hostile users of root's daemon, and an honest one beside them; then the accounts.

    python -m bench.hostile [--minutes 10] [--commands 10000] [--base 1000] [--only NAME ...]

As root. The honest user starts commands one after another, at an even pace, first alone and then
beside the others, who attack the daemon, their helpers and everybody else in turns (attacks.py).
Says how long his starts took, and those by `subprocess` among them, which tell what is the
machine's; and what is left when all have gone. Exit status 1 if he has lost a command, if something
was possible that should not be, or if something is left.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import errand_boy
from bench.attacks import ATTACKS, Attacker, parent_of, pids, uid_of
from bench.stress import pss_kib, zombies
from errand_boy._wire import status as _status
from errand_boy._wire.address import Address

FIRST_HOSTILE, HOSTILE, HONEST = 12001, 8, 12009
UIDS = range(FIRST_HOSTILE, HONEST + 1)
MOST_PROCESSES = 50  # of each user
MOST_FILES = 4096
MOST_MEMORY = 1 << 30  # of a hostile process
IDLE = 2.0  # seconds: --idle
TURN = 4.0  # seconds that a hostile user repeats one attack
PATIENCE = 60.0  # seconds: for one command, for the daemon's start, for the rest to end
MOST_GROWTH = 4096  # KiB of the server; it was 2,200 to 3,200 after 0.8 and 2.5 million connections
ROUNDS = struct.Struct("<2Q")  # rounds, breaches
LIMITS = {"default": {"commands": 20, "connections": 100, "starts_per_second": 50, "burst": 200}}

START, NEW, RUN, PLAIN = "start", "start, new connection", "run, output captured", "subprocess"


def fork_as(uid: int, work: Callable[[], None]) -> int:
    """Have a child with the rights of `uid` do some work; return its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, after the change of ids
        if os.getppid() == parent:
            work()
            status = 0
    except BaseException as error:
        print(f"user {uid}: {error!r}", file=sys.stderr, flush=True)
    os._exit(status)


# -- the honest user --


def honest(path: str, commands: int, seconds: float, pipe: int) -> None:
    """Start commands up to this number or until the time is over; write how it went."""
    client = errand_boy.connect(path)
    times: dict[str, list[float]] = defaultdict(list)
    lost = []
    begin = time.monotonic()
    number = 0
    for number in range(commands):
        now = time.monotonic()
        if now - begin > seconds:
            break
        time.sleep(max(0.0, begin + number * seconds / commands - now))
        code, word = number % 200, f"word {number}"
        kind = NEW if number % 50 == 0 else START if number % 2 else RUN
        if kind == NEW:
            client.close()
        start = time.perf_counter()
        try:
            if kind == RUN:
                done = client.run(["/bin/echo", word], capture_output=True, timeout=PATIENCE)
                times[kind].append(time.perf_counter() - start)
                seen: object = (done.returncode, done.stdout, done.stderr)
                expected: object = (0, f"{word}\n".encode(), b"")
            else:
                process = client.Popen(["/bin/sh", "-c", f"exit {code}"])
                times[kind].append(time.perf_counter() - start)
                seen, expected = process.wait(PATIENCE), code
        except Exception as error:
            seen, expected = repr(error), ""
        if seen != expected:
            lost.append(f"{kind} {number}: {seen} in place of {expected}")
        if number % 5 == 0:
            start = time.perf_counter()
            plain = subprocess.Popen(["/bin/sh", "-c", "exit 0"])
            times[PLAIN].append(time.perf_counter() - start)
            plain.wait()
    else:
        number = commands
    client.close()
    with open(pipe, "w") as file:
        json.dump({"begun": number, "times": times, "lost": lost}, file)


def start_honest(path: str, commands: int, seconds: float) -> tuple[int, int]:
    """Return the honest user's pid, and the descriptor from which `outcome` reads."""
    reader, writer = os.pipe()
    pid = fork_as(HONEST, lambda: honest(path, commands, seconds, writer))
    os.close(writer)
    return pid, reader


def outcome(pid: int, reader: int, seconds: float) -> dict[str, Any]:
    """Wait `seconds`, and some more for the last commands, for the honest user to end."""
    deadline = time.monotonic() + seconds + 3 * PATIENCE
    data = b""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    os.waitpid(pid, 0)
    if not data:
        return {"begun": 0, "times": {}, "lost": ["the honest user has not come to an end"]}
    result: dict[str, Any] = json.loads(data)
    return result


# -- the hostile ones --


def hostile(
    path: str, server: int, victim: int, number: int, names: list[str], counts: mmap.mmap
) -> None:
    """Attack until killed, one attack after another, each user with a different one."""
    limits = (
        (resource.RLIMIT_NOFILE, MOST_FILES),
        (resource.RLIMIT_AS, MOST_MEMORY),
        (resource.RLIMIT_CORE, 0),
    )
    for name, most in limits:
        resource.setrlimit(name, (most, most))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    attacker = Attacker(path, server, [victim], number)
    turn = number * len(names) // HOSTILE
    while True:
        attack = turn % len(names)
        end = time.monotonic() + TURN
        while time.monotonic() < end:
            attacker.round(ATTACKS[names[attack]])
            at = attack * ROUNDS.size
            rounds, breaches = ROUNDS.unpack_from(counts, at)
            ROUNDS.pack_into(counts, at, rounds + 1, breaches + attacker.breaches)
            attacker.breaches = 0
        turn += 1


def kill_all(users: range) -> int:
    """Kill all processes of those users, which only this program uses; return how many.

    They are stopped first, because some may fork faster than they are found.
    """
    killed = set()
    for number in [signal.SIGSTOP, *[signal.SIGKILL] * 100]:
        found = [pid for pid in pids() if uid_of(pid) in users and not is_zombie(pid)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                if uid_of(pid) in users:
                    signal.pidfd_send_signal(pidfd, number)
                    killed.add(pid)
                os.close(pidfd)
        if number == signal.SIGKILL and not found:
            break
    return len(killed)


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


# -- the daemon --


class Daemon:
    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "socket")
        self._log = directory / "log"
        limits = directory / "limits.json"
        limits.write_text(json.dumps(LIMITS))
        command = [sys.executable, "-m", "errand_boy", "serve", "--socket", self.path]
        command += [f"--allow-uid={uid}" for uid in UIDS]
        command += [f"--max-users={len(UIDS)}", "--pool-size=2", f"--idle={IDLE}"]
        command += [f"--limits={limits}", "--grace=1"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, start_new_session=True)
        self.pid = self.process.pid
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(_status.NoAnswerError):
                self.status()
                return
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                raise RuntimeError(self._log.read_text())

    def status(self) -> dict[str, Any]:
        return _status.fetch(Address(self.path), PATIENCE)

    def messages(self) -> Counter[str]:
        """What the log says, and how often."""
        found: Counter[str] = Counter()
        for line in self._log.read_text().splitlines():
            _, level, text = line.split(" ", 2) if line.count(" ") > 1 else ("", "", line)
            left_out = re.search(r" left_out=(\d+)", text)
            message = re.split(r" \w+=", text)[0]
            found[f"{level} {message}"] += int(left_out[1]) if left_out else 1
        return found

    def errors(self) -> list[str]:
        """What the log says about failures in the daemon itself."""
        return [line for line in self._log.read_text().splitlines() if " ERROR " in line]

    def state(self) -> dict[str, int]:
        children = [pid for pid in pids() if parent_of(pid) == self.pid]
        return {
            "PSS (KiB)": pss_kib(self.pid),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
            "children": len(children),
            "zombies": zombies([self.pid, *children]),
            "processes of users": sum(uid_of(pid) in UIDS for pid in pids()),
        }

    def settled(self, like: dict[str, int] | None) -> dict[str, int]:
        """Return its state once the users have gone and, if given, it is no worse than `like`."""
        deadline = time.monotonic() + PATIENCE
        while True:
            state = self.state()
            there = state["processes of users"] == 0
            if like is not None:
                same = ("descriptors", "children", "zombies")
                there = there and all(state[name] <= like[name] for name in same)
                there = there and state["PSS (KiB)"] <= like["PSS (KiB)"] + MOST_GROWTH
            if there or time.monotonic() > deadline:
                return state
            time.sleep(0.1)


# -- the accounts --


def quantile(times: list[float], share: float) -> float:
    """Return microseconds."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e6 if ordered else 0.0


def print_times(alone: dict[str, Any], beside: dict[str, Any]) -> None:
    print(f"{'microseconds':24}{'':6}{'n':>7}{'alone':>9}{'n':>7}{'beside':>9}{'ratio':>7}")
    for kind in (START, NEW, RUN, PLAIN):
        before, after = (phase["times"].get(kind, []) for phase in (alone, beside))
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            a, b = quantile(before, share), quantile(after, share)
            ratio = f"{b / a:7.2f}" if a else ""
            print(f"{kind:24}{name:6}{len(before):7}{a:9.0f}{len(after):7}{b:9.0f}{ratio}")


def print_states(*states: tuple[str, dict[str, int]]) -> None:
    print(f"{'the server':24}" + "".join(f"{name:>16}" for name, _ in states))
    for name in states[0][1]:
        print(f"{name:24}" + "".join(f"{state[name]:16}" for _, state in states))


def run(options: argparse.Namespace, daemon: Daemon) -> bool:
    names = [name for name in ATTACKS if not options.only or name in options.only]
    size = len(names) * ROUNDS.size
    seconds = options.minutes * 60
    attackers = []
    try:
        # Load late imports now, because the users may not be able to read the files.
        client = errand_boy.connect(daemon.path)
        client.run(["/bin/true"], capture_output=True, check=True, timeout=PATIENCE)
        client.Popen(["/bin/true"]).wait(PATIENCE)
        client.close()
        pace = seconds / options.commands
        alone = outcome(
            *start_honest(daemon.path, options.base, options.base * pace), options.base * pace
        )
        before = daemon.settled(None)
        honest_pid, reader = start_honest(daemon.path, options.commands, seconds)
        shares = []
        for number in range(HOSTILE):
            share = mmap.mmap(-1, size)
            shares.append(share)

            def work(number: int = number, share: mmap.mmap = share) -> None:
                os.close(reader)
                hostile(daemon.path, daemon.pid, honest_pid, number, names, share)

            attackers.append(fork_as(FIRST_HOSTILE + number, work))
        beside = outcome(honest_pid, reader, seconds)
        at_work = daemon.state()
    finally:
        for pid in attackers:
            os.kill(pid, signal.SIGKILL)
        kill_all(UIDS)
        ends = [os.waitpid(pid, 0)[1] for pid in attackers]
    after = daemon.settled(before)
    totals = daemon.status()["totals"]
    daemon.process.terminate()
    code = daemon.process.wait(PATIENCE)
    left = kill_all(UIDS)

    print(f"{beside['begun']} commands beside {HOSTILE} hostile users in {seconds:.0f} s")
    lost = alone["lost"] + beside["lost"]
    print(f"lost: {len(lost)}" + "".join(f"\n  {text}" for text in lost[:10]))
    print_times(alone, beside)
    print_states(("before", before), ("at work", at_work), ("after", after))
    breaches = 0
    for number, name in enumerate(names):
        each = [ROUNDS.unpack_from(share, number * ROUNDS.size) for share in shares]
        rounds = sum(rounds for rounds, _ in each)
        breaches += sum(found for _, found in each)
        print(f"{name:36}{rounds:8} rounds")
    gave_up = sum(status != signal.SIGKILL for status in ends)
    print(f"breaches: {breaches}; hostile users that did not go on to the end: {gave_up}")
    print(f"totals: {json.dumps(totals)}")
    for message, times in daemon.messages().most_common():
        print(f"{times:8} {message}")
    errors = daemon.errors()
    print("".join(f"{line}\n" for line in errors[:20]), end="")
    print(f"the daemon's exit status: {code}; processes left: {left}")
    grown = after["PSS (KiB)"] - before["PSS (KiB)"]
    same = all(after[name] <= before[name] for name in ("descriptors", "children", "zombies"))
    good = not (lost or breaches or gave_up or left or errors or code) and same
    if beside["begun"] < options.commands:
        print(f"{options.commands - beside['begun']} commands did not fit")
    if grown > MOST_GROWTH:
        print(f"THE SERVER HAS GROWN by {grown} KiB")
    print("good" if good and grown <= MOST_GROWTH else "NOT GOOD")
    return good and grown <= MOST_GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--commands", type=int, help="(default: 1,000 a minute)")
    parser.add_argument("--base", type=int, default=1000)
    parser.add_argument("--only", action="append", choices=ATTACKS, help="repeatable")
    options = parser.parse_args()
    options.commands = options.commands or max(1, round(1000 * options.minutes))
    if os.geteuid() != 0:
        parser.error("it needs the rights of root")
    if any(uid_of(pid) in UIDS for pid in pids()):
        parser.error(f"there are processes of users {UIDS[0]} to {UIDS[-1]}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    resource.setrlimit(resource.RLIMIT_NPROC, (MOST_PROCESSES, MOST_PROCESSES))
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        daemon = Daemon(Path(name))
        try:
            return 0 if run(options, daemon) else 1
        finally:
            if daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()


if __name__ == "__main__":
    sys.exit(main())
