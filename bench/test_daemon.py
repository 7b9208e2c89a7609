"""Start to reaped by the daemon, over a private helper and over subprocess."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from bench.heavy import THREADS, Caller, package_parent
from bench.ratios import CPUS, MANY, Measure, timed

CallerOf = Callable[..., Caller]
Compare = Callable[..., None]

AT_MOST_POPEN = 1.15
AT_MOST_RUN_CMD = 1.25
CLIENTS = 4
LONGEST_START = 20.0  # seconds


@pytest.fixture(scope="module")
def remote(caller: CallerOf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CallerOf]:
    """Callers by weight, whose errand_boy is a daemon's."""
    path = str(tmp_path_factory.mktemp("daemon") / "socket")
    command = [sys.executable, "-m", "errand_boy", "serve", "--socket", path]
    environment = os.environ | {"PYTHONPATH": package_parent()}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            await_daemon(path)
            yield partial(caller, ERRAND_BOY_SOCKET=path)
        finally:
            process.kill()


def await_daemon(path: str) -> None:
    deadline = time.monotonic() + LONGEST_START
    with socket.socket(socket.AF_UNIX) as sock:
        while sock.connect_ex(path) != 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no daemon listens on {path}")
            os.sched_yield()


@pytest.mark.parametrize("weight", ["small", "large"])
def test_popen_over_private_helper(
    caller: CallerOf, remote: CallerOf, compare: Compare, weight: str
) -> None:
    compare(
        measure(remote(weight, "remote"), "popen", "errand_boy"),
        measure(caller(weight, "helper", ERRAND_BOY_SPAWN="helper"), "popen", "errand_boy"),
        name=f"daemon over private helper, {weight}, Popen.wait",
        at_most=AT_MOST_POPEN,
    )


@pytest.mark.parametrize("case", ["popen", "run"])
@pytest.mark.parametrize("weight", ["small", "large"])
def test_over_subprocess(
    caller: CallerOf, remote: CallerOf, compare: Compare, weight: str, case: str
) -> None:
    compare(
        measure(remote(weight, "remote"), case, "errand_boy"),
        measure(caller(weight), case, "subprocess"),
        name=f"daemon over subprocess, {weight}, {case}",
    )


@pytest.mark.parametrize("weight", ["small", "large"])
def test_run_cmd_over_subprocess(
    caller: CallerOf, remote: CallerOf, compare: Compare, weight: str
) -> None:
    compare(
        measure(remote(weight, "remote"), "run_cmd", "errand_boy.transports.unixsocket"),
        measure(caller(weight), "run_shell", "subprocess"),
        name=f"UNIXSocketTransport().run_cmd over subprocess.run(shell=True), {weight}",
        at_most=AT_MOST_RUN_CMD,
    )


def measure(caller: Caller, case: str, library: str) -> Measure:
    return partial(caller.ask, case, library)


def test_threads_over_c_limit(
    remote: CallerOf, compare: Compare, c_limit: Callable[[int], Measure]
) -> None:
    """Enough client threads and processes to saturate the CPUs."""
    clients = [remote("small", f"client {n}") for n in range(CLIENTS)]

    def act(count: int) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            share = count // CLIENTS
            list(pool.map(lambda c: c.ask("popen_in_threads", "errand_boy", share), clients))

    compare(
        timed(act, MANY),
        c_limit(MANY),
        name=f"daemon, {CLIENTS * THREADS} threads in {CLIENTS} processes over {CPUS} C loops",
        at_most=1 / 0.8,
    )
