"""Jobs with followers that come and go, while the daemon is executed anew and killed.

``python tests/soak_jobs.py [JOBS [UPGRADES [KILLS]]]``: 1,000, 20 and 5 by default. Each exit
status and each byte must be right, or its loss must have been reported. At the end nothing may be
left, and the memory of the daemon must be what it was.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import psutil
from conftest import until
from daemon import Daemon, started_daemon
from jobs import files, keepers

import errand_boy
from errand_boy._client.client import Client
from errand_boy._jobs.blocking import Job, Missed, Output

T = TypeVar("T")

LIVE = 40  # at the same time
FOLLOWERS = 6
RING = 16 << 10
PATIENCE = 60.0


class Soak:
    """One run, in `directory`. `wrong`: the errors that were found."""

    def __init__(self, directory: Path, jobs: int, upgrades: int, kills: int, seed: int) -> None:
        self.wrong: list[str] = []
        self._directory = directory
        self._jobs = jobs
        self._random = random.Random(seed)
        self._seed = seed
        # When, in jobs that have been started.
        changes = ["upgrade"] * upgrades + ["kill"] * kills
        self._changes = dict(
            zip(self._random.sample(range(1, jobs), len(changes)), changes, strict=True)
        )
        self._running: list[tuple[Job, int, int]] = []  # with its status, and lines
        self._lock = threading.Lock()
        self._is_over = False
        self.followed = self.missed = self.done = 0
        self.memory = 0, 0  # KiB of the daemon, at the beginning and at the end

    def __repr__(self) -> str:
        return (
            f"seed {self._seed}: {self.done} jobs right, {self.followed} followers that read all, "
            f"{self.missed} bytes missed and told, daemon {self.memory[0]} KiB, "
            f"at the end {self.memory[1]} KiB, wrong: {self.wrong[:5]}"
        )

    def run(self) -> None:
        """Do it."""
        limits = self._directory / "limits.json"
        limits.write_text('{"default": {"jobs": 0, "kept_jobs": 0, "ring": 0, "connections": 0}}')
        with ExitStack() as stack:
            daemon = self._daemon(stack)
            client = errand_boy.connect(daemon.path)
            client.start(["true"]).wait(PATIENCE)
            before = memory(daemon)
            followers = [
                threading.Thread(target=self._follow_some, args=(n,)) for n in range(FOLLOWERS)
            ]
            for thread in followers:
                thread.start()
            try:
                for number in range(self._jobs):
                    self._start(client, number)
                    kind = self._changes.get(number)
                    if kind == "upgrade":
                        upgrade(daemon)
                    elif kind == "kill":
                        daemon.process.kill()
                        daemon.process.wait(PATIENCE)
                        daemon = self._daemon(stack)
                    while len(self._running) >= LIVE:
                        self._finish(client)
                while self._running:
                    self._finish(client)
            finally:
                self._is_over = True
                for thread in followers:
                    thread.join(PATIENCE)
            until(lambda: not keepers(self._directory), "the end of all keepers")
            until(lambda: daemon.status()["jobs"]["jobs_running"] == 0)
            for job in again(lambda: client.jobs(all=True)):
                again(job.remove)
            if left := files(self._directory):
                self.wrong.append(f"left: {left}")
            if "internal error" in daemon.log():
                self.wrong.append("internal error")
            self.memory = before, memory(daemon)
            client.close()
            daemon.stop()

    def _daemon(self, stack: ExitStack) -> Daemon:
        places = "--job-state", self._directory / "state", "--job-runtime", self._directory / "run"
        limits = "--limits", self._directory / "limits.json"
        return stack.enter_context(started_daemon(self._directory, *places, *limits))

    def _start(self, client: Client, number: int) -> None:
        status = self._random.choice((0, 0, 1, 7, 200))
        lines = self._random.choice((1, 50, 500, 20_000))
        pause = self._random.choice((0, 0.05, 0.5))
        script = f"seq {lines}; sleep {pause}; seq {lines} >&2; exit {status}"
        name = f"soak-{number}"
        try:
            job = client.start(["/bin/sh", "-c", script], name=name, ring=RING)
        except OSError:  # the daemon has just been killed: it runs, or does not
            job = again(lambda: self._find_or_start(client, name, script))
        with self._lock:
            self._running.append((job, status, lines))

    def _find_or_start(self, client: Client, name: str, script: str) -> Job:
        try:
            job = client.job(name)
            if job.pid is not None:
                return job
        except errand_boy.NoJobError:
            pass
        return client.start(["/bin/sh", "-c", script], name=name, ring=RING)

    def _finish(self, client: Client) -> None:
        """Wait for a job, and check its result."""
        with self._lock:
            job, status, lines = self._running.pop(self._random.randrange(len(self._running)))
        try:
            result = again(lambda: job.wait(PATIENCE))
            if result.returncode != status:
                self.wrong.append(f"{job}: {result.returncode} in place of {status}")
            self._compare(job, lines, again(lambda: list(job.logs())), "kept")
            again(job.remove)
            self.done += 1
        except Exception as error:
            self.wrong.append(f"{job}: {error!r}")

    def _follow_some(self, number: int) -> None:
        """Follow jobs: some to their end, of some only the beginning."""
        choice = random.Random(self._seed + number)
        while not self._is_over:
            with self._lock:
                job, _, lines = choice.choice(self._running or [(None, 0, 0)])
            if job is None:
                time.sleep(0.01)
                continue
            events = []
            wanted = choice.choice((1, 3, 1 << 30))
            try:
                for event in job.logs(follow=True):
                    events.append(event)
                    if len(events) == wanted:
                        break
                else:
                    self._compare(job, lines, events, "followed")
                    self.followed += 1
            except errand_boy.NoJobError:
                pass  # it has been removed
            except OSError:
                pass  # the daemon is away; who is connected to a keeper does not notice
            except Exception as error:
                self.wrong.append(f"{job}, followed: {error!r}")

    def _compare(self, job: Job, lines: int, events: list[Output | Missed], how: str) -> None:
        whole = b"".join(b"%d\n" % n for n in range(1, lines + 1))
        at = {1: 0, 2: 0}
        for event in events:
            if isinstance(event, Missed):
                at[event.stream] += event.size
                self.missed += event.size
            else:
                begin = at[event.stream]
                at[event.stream] = end = begin + len(event.data)
                if whole[begin:end] != event.data:
                    self.wrong.append(f"{job}, {how}: bytes {begin} to {end} of {event.stream}")
                    return
        if at != {1: len(whole), 2: len(whole)}:
            self.wrong.append(f"{job}, {how}: {at} bytes of {len(whole)}")


def again(act: Callable[[], T]) -> T:
    """Call a function that needs a daemon, which may be away for a moment."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return act()
        except errand_boy.NoJobError:
            raise
        except errand_boy.JobLostError:
            raise
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def upgrade(daemon: Daemon) -> None:
    """Make the daemon execute itself anew; nobody else waits for this."""
    before = daemon.log().count(" upgraded ")
    daemon.process.send_signal(signal.SIGUSR2)
    until(lambda: daemon.log().count(" upgraded ") > before)


def memory(daemon: Daemon) -> int:
    """Return the private memory of the daemon's server, in KiB."""
    return int(psutil.Process(daemon.process.pid).memory_full_info().uss) >> 10


def main() -> int:
    numbers = [*map(int, sys.argv[1:]), *(1000, 20, 5)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        jobs, upgrades, kills = numbers[:3]
        soak = Soak(directory, jobs, upgrades, kills, seed=random.randrange(1 << 30))
        begun = time.monotonic()
        try:
            soak.run()
        finally:
            for keeper in keepers(directory):
                with suppress(psutil.NoSuchProcess):
                    keeper.kill()
    print(soak, f"{time.monotonic() - begun:.0f} s, pid {os.getpid()}")
    return bool(soak.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
