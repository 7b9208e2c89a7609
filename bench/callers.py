"""A caller like heavy.py's that knows more ways to start a command, and may have a busy thread.

Its answer to a request that fails is a JSON string, the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import heavy
from bench.heavy import TRUE, Caller

SOCKET = "ERRAND_BOY_BENCH_SOCKET"  # the daemon's; ERRAND_BOY_SOCKET would take the private helper
PAUSE = 0.001  # seconds
SHORTEST_SLEEP, LONGEST_SLEEP = 0.2, 0.3  # seconds
TIMEOUT = 5.0


class CallerError(Exception):
    """The caller could not do what it was asked to do."""


def daemon(library: Any) -> None:
    library.connect(os.environ[SOCKET]).Popen(TRUE).wait()


def sh(library: Any) -> None:
    library.Command(TRUE[0])()


def pexpect(library: Any) -> None:
    child = library.spawn(TRUE[0], use_poll=True)
    child.expect(library.EOF)
    child.wait()
    child.ptyproc.delayafterclose = 0  # its default sleeps for 100 ms
    child.close()


def nothing(_library: Any) -> None:
    time.sleep(PAUSE)


CASES = heavy.CASES | {case.__name__: case for case in (daemon, sh, pexpect, nothing)}


def on_loop(loop: asyncio.AbstractEventLoop, library: Any, count: int) -> list[int]:
    async def nanoseconds() -> list[int]:
        taken = []
        for _ in range(count):
            start = time.perf_counter_ns()
            process = await library.create_subprocess_exec(*TRUE)
            await process.wait()
            taken.append(time.perf_counter_ns() - start)
        return taken

    return loop.run_until_complete(nanoseconds())


def one_by_one(library: Any, count: int) -> list[int]:
    """Return the times between the results of a map with one worker."""
    taken = []
    before = time.perf_counter_ns()
    for _ in library.map([TRUE] * count, max_workers=1):
        now = time.perf_counter_ns()
        taken.append(now - before)
        before = now
    return taken


def stalls(case: Callable[[Any], None], library: Any, count: int) -> list[int]:
    """Return for each start the longest time (ns) for which another thread could not tick."""
    longest = 0
    ticking = True

    def tick() -> None:
        nonlocal longest
        before = time.perf_counter_ns()
        while ticking:
            now = time.perf_counter_ns()
            longest = max(longest, now - before)
            before = now

    case(library)
    ticker = threading.Thread(target=tick)
    ticker.start()
    found = []
    for _ in range(count):
        longest = 0
        case(library)
        time.sleep(0)  # the ticker must see a stall's end before it counts
        found.append(longest)
    ticking = False
    ticker.join()
    return found


def late(timeout: float | None, library: Any, count: int) -> list[int]:
    """Return by how much (ns) a sleep took longer than it slept; the start is part of that."""
    taken = []
    for number in range(count):
        seconds = SHORTEST_SLEEP + (LONGEST_SLEEP - SHORTEST_SLEEP) * number / count
        start = time.perf_counter_ns()
        library.Popen(["sleep", f"{seconds:.4f}"]).wait(timeout)
        taken.append(time.perf_counter_ns() - start - round(seconds * 1e9))
    return taken


def peak_kib(case: str, library: Any) -> int:
    """Return the peak resident set that a command is reported with."""
    if case == "popen":
        return heavy.peak_kib(library)
    if case == "daemon":
        process = library.connect(os.environ[SOCKET]).Popen(TRUE)
        process.wait()
        return int(process.rusage.ru_maxrss)
    if case == "map":
        return int(next(library.map([TRUE])).rusage.ru_maxrss)
    if case == "fork_exec":
        pid = os.fork()
        if pid == 0:
            try:
                os.execv(TRUE[0], TRUE)
            finally:
                os._exit(127)
    else:
        pid = os.posix_spawn(TRUE[0], TRUE, os.environ)
    return os.wait4(pid, 0)[2].ru_maxrss


def status_kib(*names: str) -> list[int]:
    """Return figures of this process's /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return [int(found[name].split()[0]) for name in names]


class Service:
    def __init__(self) -> None:
        self._loops: dict[str, asyncio.AbstractEventLoop] = {}

    def answer(self, case: str, library_name: str, count: int) -> list[int]:
        library = importlib.import_module(library_name)
        kind, _, case = case.rpartition(":")
        if kind == "peak":
            return [peak_kib(case, library) for _ in range(count)]
        if kind == "stall":
            return stalls(CASES[case], library, count)
        if kind == "parts":
            found = heavy.parts(library, heavy.CONSTRUCTORS[case], count)
            return [figure for part in found for figure in part]
        if kind == "late":
            return late(TIMEOUT if case == "timeout" else None, library, count)
        if kind == "loop":
            if case not in self._loops:
                self._loops[case] = importlib.import_module(case).new_event_loop()
                asyncio.set_event_loop(self._loops[case])
            return on_loop(self._loops[case], library, count)
        if case == "map":
            return one_by_one(library, count)
        if case == "status":
            return [*status_kib("VmRSS", "VmPTE"), len(os.listdir("/proc/self/fd"))]
        return heavy.nanoseconds(CASES[case], library, count)


def turn_forever() -> None:
    while True:
        pass


def serve(resident: float, descriptors: int, busy: bool) -> None:
    service: list[Service] = []  # made once the memory is held, as the libraries that it imports

    def answer(case: str, library_name: str, count: int) -> list[int] | str:
        if not service:
            if busy:
                threading.Thread(target=turn_forever, daemon=True).start()
            service.append(Service())
        try:
            return service[0].answer(case, library_name, count)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    heavy.serve(resident, descriptors, answer)


def start(
    resident: float = 0,
    descriptors: int = 0,
    busy: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Caller:
    command = [sys.executable, "-W", "ignore", "-m", "bench.callers"]
    command += [f"--resident={resident}", f"--descriptors={descriptors}"]
    return Caller(command + ["--busy"] * busy, variables)


def ask(caller: Caller, case: str, library: str, count: int) -> list[int]:
    """Ask a caller for numbers; raises CallerError if it has none, with its reason."""
    answer: list[int] | str = caller.ask(case, library, count)
    if isinstance(answer, str):
        raise CallerError(answer)
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resident", type=float, default=0, metavar="GIB")
    parser.add_argument("--descriptors", type=int, default=0, metavar="N")
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    serve(arguments.resident, arguments.descriptors, arguments.busy)
