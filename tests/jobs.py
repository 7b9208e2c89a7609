"""A daemon with jobs, for tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from conftest import PATIENCE, has_ended, until
from daemon import Daemon, started_daemon

import errand_boy
from errand_boy._client.client import Client
from errand_boy._jobs.blocking import Job, Output


@contextmanager
def keeping_jobs(directory: Path, *options: object, **more: Any) -> Iterator[tuple[Daemon, Client]]:
    """Run a daemon whose jobs are in `directory`, and yield it with a client of its."""
    places = "--job-state", directory / "state", "--job-runtime", directory / "run"
    with started_daemon(directory, *places, *options, **more) as daemon:
        client = errand_boy.connect(daemon.path)
        try:
            yield daemon, client
        finally:
            client.close()
            end_all(directory)


def end_all(directory: Path) -> None:
    """Kill the keepers of all jobs in `directory`, and with them the jobs."""
    for process in keepers(directory):
        with suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(PATIENCE)


def keepers(directory: Path) -> list[psutil.Process]:
    """Return the keepers of jobs in `directory`: the processes that have journals there open."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if "keeper of a job" in " ".join(process.cmdline()[:1]):
                target = os.readlink(f"/proc/{process.pid}/fd/6")
                if target.startswith(f"{directory.resolve()}/"):
                    found.append(process)
    return found


def keeper_of(job: Job) -> psutil.Process:
    """Return the keeper of a job that runs."""
    return psutil.Process(job.status()["keeper"])


def kill_keeper(job: Job) -> None:
    """Kill a job's keeper, and wait until it has gone."""
    keeper = keeper_of(job)
    keeper.send_signal(signal.SIGKILL)
    until(lambda: has_ended(keeper.pid))


def text(job: Job, stream: int | None = None, **options: Any) -> bytes:
    """Return the output of a job, of one stream or of both."""
    return b"".join(
        event.data
        for event in job.logs(**options)
        if isinstance(event, Output) and stream in (None, event.stream)
    )


def await_output(job: Job, data: bytes) -> None:
    """Wait until a job has written `data`."""
    until(lambda: data in text(job), f"{data!r} of a job")


def files(directory: Path) -> list[str]:
    """Return the files of jobs in `directory`, without those of the daemon itself."""
    return sorted(
        str(path.relative_to(directory))
        for part in ("state", "run")
        for path in (directory / part).rglob("*")
        if not path.is_dir() and path.name != "last"
    )
