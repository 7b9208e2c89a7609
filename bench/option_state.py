#!/usr/bin/env python3
"""Starts commands with every option in eight threads, and checks that the caller is unchanged.

    bench/option_state.py [STARTS]

Prints the number of starts, and exits with status 1 if anything of the process's own has changed:
limits, niceness, CPUs, scheduling, OOM score, signals, dumpable, capabilities, namespaces, root.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import errand_boy

THREADS = 8
NEEDS_ROOT = ("capabilities", "root")
PR_GET_DUMPABLE, PR_GET_TIMERSLACK, PR_GET_KEEPCAPS = 3, 30, 7

run = cast(Any, errand_boy.run)


def state() -> dict[str, object]:
    """Return what commands inherit from this process, and what a start might have changed."""
    libc = ctypes.CDLL(None)
    fields = ("Umask", "Groups", "SigBlk", "SigIgn", "SigCgt", "Cap", "NoNewPrivs", "Seccomp")
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return {
        "status": [line for line in lines if line.startswith(fields)],
        "affinity": os.sched_getaffinity(0),
        "limits": [resource.getrlimit(n) for n in range(16)],
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "scheduler": (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority),
        "ionice": libc.syscall({"x86_64": 252, "aarch64": 31}[os.uname().machine], 1, 0),
        "oom_score_adj": Path("/proc/self/oom_score_adj").read_text(),
        "dumpable": libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0),
        "keepcaps": libc.prctl(PR_GET_KEEPCAPS, 0, 0, 0, 0),
        "slack": libc.prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0),
        "namespaces": [
            os.readlink(f"/proc/self/ns/{n}") for n in sorted(os.listdir("/proc/self/ns"))
        ],
        "places": [os.readlink(f"/proc/self/{name}") for name in ("cwd", "root")],
        "session": (os.getpgrp(), os.getsid(0)),
        "handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)],
        "threads": len(os.listdir("/proc/self/task")),
    }


def options(terminal: int) -> dict[str, Any]:
    """Return all options that this user and this system can use."""
    given: dict[str, Any] = {
        "capabilities": ["kill"],
        "controlling_terminal": terminal,
        "cpu_affinity": {min(os.sched_getaffinity(0))},
        "foreground": True,
        "ionice": "idle",
        "namespaces": {"uts"} if os.geteuid() == 0 else {"user", "uts"},
        "nice": 1,
        "no_new_privs": True,
        "oom_score_adj": 500,
        "rlimits": {"nofile": 50, "core": 0},
        "root": "/",
        "sandbox": {"system": True, "strict": False},
        "scheduler": "batch",
        "signals_blocked": {signal.SIGUSR1},
        "signals_default": {signal.SIGUSR2},
        "signals_ignored": {signal.SIGHUP},
        "timer_slack": 1234,
        "start_new_session": True,
    }
    for name in NEEDS_ROOT if os.geteuid() else ():
        del given[name]
    return given


def await_threads() -> None:
    """Wait until the kernel has removed the threads that have ended."""
    end = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
        time.sleep(0.001)


def start(count: int, failures: list[str]) -> None:
    """Start this many commands, every second one without success."""
    master, terminal = os.openpty()
    try:
        for number in range(count):
            command = ["true"] if number % 2 else ["/no/such"]
            try:
                run(command, **options(terminal), check=True)
            except FileNotFoundError:
                if number % 2:
                    raise
    except Exception as error:
        failures.append(repr(error))
    finally:
        os.close(terminal)
        os.close(master)


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    run(["true"])  # a first start leaves things that stay,
    first = threading.Thread(target=int)  # and a first thread leaves the C library's handler
    first.start()
    first.join()
    await_threads()
    before, failures = state(), cast(list[str], [])
    threads = [
        threading.Thread(target=start, args=[count // THREADS, failures]) for _ in range(THREADS)
    ]
    seen: dict[str, object] = {}
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        now = state()  # also while they run
        seen.update((name, now[name]) for name in before if now[name] != before[name])
    for thread in threads:
        thread.join()
    seen.pop("threads", None)  # they were ours
    await_threads()
    after = state()
    seen.update((name, after[name]) for name in before if after[name] != before[name])
    print(f"{count} starts, {len(failures)} threads failed {failures[:1]}")
    for name, value in seen.items():
        print(f"{name}: {before[name]} has become {value}")
    return 1 if seen or failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
