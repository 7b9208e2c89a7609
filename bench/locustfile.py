"""A load test of the daemon: see bench/README.md. Needs Locust and the package, nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, ClassVar

from locust import User, constant, events  # type: ignore[import-not-found]

import errand_boy

PATIENCE = 30.0  # seconds
ERRAND_BOY = [sys.executable, "-m", "errand_boy"]


class Client(User):  # type: ignore[misc]
    """One request after the answer to the last, without pause; its host is the daemon's socket."""

    wait_time = constant(0)

    def measure(self, kind: str, name: str, act: Callable[[], int]) -> None:
        """Call something that returns how many bytes it received; report the result to Locust."""
        failure = None
        size = 0
        start = time.perf_counter()
        try:
            size = act()
        except Exception as error:
            failure = error
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=(time.perf_counter() - start) * 1000,
            response_length=size,
            exception=failure,
            context={},
        )

    def run_cmd(self, line: str) -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(self.host)
            sock.sendall(line.encode() + b"\r\n\r\n\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        if not answer.endswith(b"\r\n\r\n0\r\n\r\n"):
            raise RuntimeError(f"answer: {answer[-200:]!r}")
        return len(answer)

    def spawn(self) -> int:
        status = errand_boy.connect(self.host).Popen(["/bin/true"]).wait(PATIENCE)
        if status != 0:
            raise RuntimeError(f"status {status}")
        return 0

    def ls(self) -> None:
        self.measure("text", "ls -al", lambda: self.run_cmd("ls -al"))

    def date(self) -> None:
        self.measure("text", "date", lambda: self.run_cmd("date"))

    def true(self) -> None:
        self.measure("framed", "/bin/true", self.spawn)

    tasks: ClassVar = [ls, date, true]


def own_daemon(environment: Any) -> None:
    """Start a daemon for this run, and end it with it."""
    directory = tempfile.TemporaryDirectory(prefix="errand-boy-")
    path = os.path.join(directory.name, "socket")
    daemon = subprocess.Popen([*ERRAND_BOY, "serve", "--max-accepts=0", "--socket", path])
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(path):
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the daemon does not start")
        time.sleep(0.01)
    environment.host = path

    def stop(exit_code: int, **others: Any) -> None:
        with directory:
            subprocess.run([*ERRAND_BOY, "status", "--socket", path])
            daemon.terminate()
            daemon.wait()

    events.quit.add_listener(stop)


def prepare(environment: Any, **others: Any) -> None:
    if not environment.host:
        own_daemon(environment)


def summarize(environment: Any, **others: Any) -> None:
    for stats in [*environment.stats.entries.values(), environment.stats.total]:
        p50, p99 = map(stats.get_response_time_percentile, (0.5, 0.99))
        print(
            f"{stats.name:<12}{stats.total_rps:8.0f} requests/s  p50 {p50:4} ms  p99 {p99:4} ms"
            f"  {stats.num_failures} of {stats.num_requests} failed"
        )


events.test_start.add_listener(prepare)
events.quitting.add_listener(summarize)
