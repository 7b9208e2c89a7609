"""The system calls of a start's caller or helper, and of the new process, as strace counts them.

    python -m bench.syscalls WAY COUNT

is the program that is traced: it starts commands, and prints its own pid and those of its helpers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import errand_boy
from bench.bulk import helpers
from bench.heavy import TRUE, package_parent

WAYS = {
    "direct": "`Popen(…).wait()`",
    "helper": "`Popen(…).wait()`, after `errand_boy.start()`",
    "map": "`map`, one worker, output captured",
}
FEW = 5
MOST_LINES = 20  # of a library's start-up; a process that starts commands has more

CALLER = "caller"
HELPER = "helper"
CHILD = "new process, up to the exec"

# The reason for each. A call that is not named here shows up as "unexplained".
REASONS = {
    (CALLER, "clone3"): "the new process, in the caller's memory and with its table of descriptors",
    (CALLER, "rt_sigprocmask"): "no signal may be handled in the new process: all are blocked for "
    "a moment",
    (CALLER, "futex"): "sleep until the program runs, or has failed to",
    (CALLER, "getpid"): "whether this process began the start, or is a fork with a copy of it",
    (CALLER, "wait4"): "sleep until the command has ended, and reap it",
    (CALLER, "fcntl"): "whether 0 to 2 are open and inheritable",
    (CALLER, "mmap"): "memory of Python's own",
    (CALLER, "munmap"): "memory of Python's own",
    (CALLER, "brk"): "memory of Python's own",
    (HELPER, "epoll_wait"): "sleep until a request, an exec's end or a child's end comes",
    (HELPER, "recvmsg"): "the request, with its descriptors",
    (
        HELPER,
        "pipe2",
    ): "tells when a program runs, by its close-on-exec end, where a client waits for "
    "that; for captured output, one for each stream",
    (HELPER, "clone"): "the new process, in the helper's memory and without waiting for its exec",
    (HELPER, "close"): "the ends of these pipes, and the descriptors that came with the request",
    (
        HELPER,
        "epoll_ctl",
    ): "watch, and forget, the pipe of the exec and those of streams; not those "
    "of a short command under `map`",
    (HELPER, "sendmsg"): "the answer; under `map` one for all of a short command's frames",
    (HELPER, "read"): "streams: output and its end; signalfd: that children have ended",
    (HELPER, "wait4"): "reap, until none is left, with the resource usage; the caller's own "
    "children are not reaped here",
    (HELPER, "fcntl"): "streams: the helper's end of a pipe must not block",
    (HELPER, "mmap"): "a stack for the new process, where the spare one is in use",
    (HELPER, "munmap"): "that stack again",
    (HELPER, "mprotect"): "the guard below that stack",
    (HELPER, "openat"): "`/dev/null`, where the request names it and sends no descriptor",
    (HELPER, "prlimit64"): "RLIMIT_NPROC counts when the process is made: it must be the caller's",
    (HELPER, "brk"): "memory, given back when the helper has been at rest",
    (CHILD, "dup3"): "a descriptor of the request to its number",
    (CHILD, "fcntl"): "keep open one that has its number already, or move one out of the way",
    (
        CHILD,
        "close_range",
    ): "all others at once, so that a slow exec keeps nobody's pipe open; in the caller's process "
    "first a table of its own, with those that are needed",
    (CHILD, "futex"): "tell the caller that this table is there, should it wait for that",
    (CHILD, "rt_sigaction"): "SIGPIPE and SIGXFSZ, which Python ignores, back to their default",
    (CHILD, "rt_sigprocmask"): "the signal mask of the calling thread: all are blocked up to here",
    (CHILD, "setpgid"): "`map`'s commands lead process groups, so that they can be ended whole",
    (
        CHILD,
        "clock_gettime",
    ): "when its exec begins, for the daemon's latencies, where nobody waits for the exec",
    (CHILD, "execve"): "the command",
    (CHILD, "fchdir"): "the caller's working directory, where the helper does not share it",
    (CHILD, "umask"): "the caller's umask, where the helper does not share it",
}
UNEXPLAINED = "unexplained"

CALL = re.compile(r"(\w+)\(")


def calls(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the line of each call of a trace."""
    with path.open(errors="replace") as file:
        for line in file:
            if match := CALL.match(line):
                yield match[1], line


def of_child(path: Path) -> Counter[str] | None:
    """Return a command's calls up to its exec, if this is the trace of a command."""
    found: Counter[str] = Counter()
    for name, line in calls(path):
        found[name] += 1
        if name == "execve" and f'"{TRUE[0]}"' in line:
            return found
        if found.total() > MOST_LINES:
            return None
    return None


def trace(way: str, count: int) -> dict[str, Counter[str]]:
    """Return all calls of the caller or helper, and of all new processes."""
    with tempfile.TemporaryDirectory() as directory:
        options = ["-ff", "-qq", "-e", "signal=none", "-o", os.path.join(directory, "trace")]
        program = [sys.executable, "-m", "bench.syscalls", way, str(count)]
        environment = os.environ | {"PYTHONPATH": package_parent()}
        output = subprocess.check_output(["strace", *options, *program], env=environment)
        caller, *helpers_pids = json.loads(output)
        found = {who: Counter[str]() for who in (CALLER, HELPER, CHILD)}
        for path in Path(directory).iterdir():
            pid = int(path.suffix[1:])
            if pid in helpers_pids:
                found[HELPER].update(name for name, _ in calls(path))
            elif pid == caller:
                # If there is a helper, its calls are of interest.
                if not helpers_pids:
                    found[CALLER].update(name for name, _ in calls(path))
            elif of_it := of_child(path):
                found[CHILD] += of_it
    return found


def per_start(way: str, count: int) -> dict[tuple[str, str], float]:
    """Return calls per start by who makes them.

    It is the difference of two runs, which leaves out their own start and end.
    """
    few, many = trace(way, FEW), trace(way, FEW + count)
    return {
        (who, name): (many[who][name] - few[who][name]) / count
        for who in few
        for name in sorted(many[who])
        if many[who][name] > few[who][name]
    }


def main() -> None:
    way, count = sys.argv[1], int(sys.argv[2])
    if way == "helper":
        errand_boy.start()
    if way != "map":
        for _ in range(count):
            errand_boy.Popen(TRUE).wait()
    else:
        for _ in errand_boy.map([TRUE] * count, max_workers=1):
            pass
    print(json.dumps([os.getpid(), *helpers()]))


if __name__ == "__main__":
    main()
