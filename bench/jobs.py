"""The cost of a job's keeper: 100 MB through a job, with and without followers.

``python -m bench.jobs [MB [ROUNDS]]``: in turns, the same command with its output in a pipe that a
``cat`` writes to a file, and as a job. Prints medians, and the job's rate beside the pipe's.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import errand_boy
from errand_boy._jobs.blocking import Output

MEGABYTE = 10**6


def command(size: int) -> list[str]:
    """Return a command that writes this many bytes."""
    return ["/bin/sh", "-c", f"exec head -c {size} /dev/zero"]


def by_pipe(size: int, directory: Path) -> float:
    """Return the seconds that the command takes with its output in a pipe to a file."""
    begun = time.perf_counter()
    with open(directory / "file", "wb") as file:
        writer = subprocess.Popen(command(size), stdout=subprocess.PIPE)
        reader = subprocess.Popen(["cat"], stdin=writer.stdout, stdout=file)
        assert writer.stdout is not None
        writer.stdout.close()
        assert writer.wait() == reader.wait() == 0
    return time.perf_counter() - begun


def by_job(client: errand_boy._client.client.Client, size: int, follower: str) -> float:
    """Return the same for a job; `follower`: "none", "stopped", or one who "reads"."""
    begun = time.perf_counter()
    job = client.start(command(size))
    thread = None
    events = job.logs(follow=True)
    if follower == "stopped":
        next(events)
    elif follower == "reads":
        thread = threading.Thread(target=lambda: read(events))
        thread.start()
    assert job.wait().returncode == 0
    seconds = time.perf_counter() - begun
    if thread is not None:
        thread.join()
    events.close()
    assert job.wait().bytes[0] == size
    job.remove()
    return seconds


def read(events: object) -> None:
    """Read all events."""
    for event in events:  # type: ignore[attr-defined]
        assert isinstance(event, (Output, errand_boy.Missed))


def main() -> None:
    """Measure, and print."""
    size = int(float(sys.argv[1]) if len(sys.argv) > 1 else 100) * MEGABYTE
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = str(directory / "socket")
        places = ["--job-state", name + "/state", "--job-runtime", f"/dev/shm/eb-{Path(name).name}"]
        daemon = subprocess.Popen(
            [sys.executable, "-m", "errand_boy", "serve", "--socket", path, *places]
        )
        try:
            client = errand_boy.connect(path)
            while True:
                try:
                    client.status()
                    break
                except errand_boy.NoDaemonError:
                    time.sleep(0.05)
            ways: dict[str, Callable[[], float]] = {
                "pipe to a file": lambda: by_pipe(size, directory),
                "job": lambda: by_job(client, size, "none"),
                "job, followed": lambda: by_job(client, size, "reads"),
                "job, a follower is stopped": lambda: by_job(client, size, "stopped"),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, measure in ways.items():
                    times[way].append(measure())
        finally:
            daemon.terminate()
            daemon.wait()
            subprocess.run(["rm", "-rf", places[-1]], check=True)
    base = statistics.median(times["pipe to a file"])
    for way, seconds in times.items():
        middle = statistics.median(seconds)
        print(
            f"{way:28} {middle * 1000:7.0f} ms {size / middle / 1e6:7.0f} MB/s {base / middle:6.2f}"
        )


if __name__ == "__main__":
    main()
