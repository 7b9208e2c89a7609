"""Each system call of a job's keeper, and of the daemon for its jobs, is made to fail once.

``python tests/fault_jobs.py [keeper|daemon [CALL...]]`` runs one job after another under `strace`,
each with another fault. The client must be told of each loss, nothing may hang, and in the end
nothing may be left: no process, no file. Prints what was not as it should be.
"""

from __future__ import annotations

import collections
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import has_ended, until
from daemon import Daemon, started_daemon
from jobs import files
from wire import HELPER

import errand_boy
from errand_boy._client.client import Client
from errand_boy._jobs.blocking import Job, Missed, Output

ERRORS = "ENOSPC", "EIO", "ENOMEM", "EMFILE", "EINTR"
MOST = 3  # of the calls of one name, about
LINES = 300
SIZE = sum(len(b"%d\n" % n) for n in range(1, LINES + 1))
SCRIPT = f"setsid sleep 1000 & read x; seq {LINES}; echo error >&2; exit 3"
PATIENCE = 20  # seconds
MARK = "ERRAND_BOY_FAULTS"

# What never fails in this way, or is not done for a job. A close(2) that fails closes all the same;
# with WNOHANG, only the lack of children fails the two that wait.
WITHOUT = re.compile(
    "get.*id|close|exit.*|restart_syscall|rt_sig.*|execve|clone.*|vfork|futex|brk|madvise|mprotect|"
    "access|arch_prctl|set_.*|rseq|pread64|prlimit64|newfstatat|clock_.*|epoll_wait|wait4|waitid"
)

WRAPPER = """#!/bin/bash
case " $* " in
    *" --job "*) exec strace -D -qq $(cat {spec}) {helper} "$@" ;;
esac
exec {helper} "$@"
"""


class Wrong(Exception):
    """Something is not as it should be."""


def hung(*_: object) -> None:
    raise Wrong("it hangs")


class Place:
    """A daemon, whose keepers run under strace with what `spec` says."""

    def __init__(self, daemon: Daemon, client: Client, directory: Path) -> None:
        self.daemon = daemon
        self.client = client
        self.directory = directory
        self.spec = directory / "spec"
        self.trace = directory / "trace"

    def marked(self) -> list[int]:
        """Return the processes of jobs."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == str(os.getpid()) or (
                    process.ppid() == self.daemon.process.pid and "--job" in process.cmdline()
                ):
                    found.append(process.pid)
        return [pid for pid in found if pid != os.getpid() and not has_ended(pid)]

    def kill_marked(self) -> None:
        for pid in self.marked():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self) -> str:
        """Run one job; return how it went. Raises Wrong."""
        signal.alarm(PATIENCE)
        try:
            told = self._run()
            until(lambda: not self.marked(), "a process is left")
            until(self.is_removed, "a job is left")
            until(lambda: not files(self.directory), "a file is left")
        finally:
            signal.alarm(0)
        return told

    def is_removed(self) -> bool:
        """Remove what is listed; return whether nothing was."""
        jobs = None
        with suppress(OSError):
            jobs = self.client.jobs(all=True)
        for job in jobs or ():
            with suppress(OSError):  # its keeper is about to end, or the daemon has removed it
                job.remove()
        return jobs == []

    def _run(self) -> str:
        environment = {**os.environ, MARK: str(os.getpid())}
        try:
            job = self.client.start(["sh", "-c", SCRIPT], stdin=-1, env=environment)
        except OSError as error:
            return f"not started: {error!r}"
        return self._use(job)

    def _use(self, job: Job) -> str:
        told = []
        got = {1: b"", 2: b""}
        missed = 0
        try:
            with job.attach(history=True) as attachment:
                attachment.write(b"x\n")
                while attachment.read_some(2) is None and not attachment.is_over:
                    if not attachment.lost_input:
                        raise Wrong("input was lost without a word")
                    attachment.write(b"x\n")
                    told.append("typed again")
        except OSError as error:
            told.append(f"attach: {error!r}")
            with suppress(OSError):
                job.stop([signal.SIGKILL])
        try:
            for event in job.logs(follow=True):
                if isinstance(event, Missed):
                    missed += event.size
                elif isinstance(event, Output):
                    got[event.stream] += event.data
        except OSError as error:
            told.append(f"logs: {error!r}")
        try:
            result = job.wait()
        except errand_boy.JobLostError as error:
            return "; ".join([*told, str(error)])
        except OSError as error:
            told.append(f"wait: {error!r}")
            try:
                result = job.wait()  # the fault was there only once
            except errand_boy.JobLostError as lost:
                return "; ".join([*told, str(lost)])
        if result.returncode != 3 and not told:
            raise Wrong(f"it ended with {result.returncode}")
        whole = b"".join(b"%d\n" % n for n in range(1, LINES + 1))
        if not told and not missed and (got[1], got[2]) != (whole, b"error\n"):
            raise Wrong(f"output is missing: {len(got[1])}, {len(got[2])} bytes")
        if not told and sum(result.bytes) != SIZE + len("error\n"):
            told.append(f"bytes: {result.bytes}")
        if not told and missed + sum(map(len, got.values())) != sum(result.bytes):
            raise Wrong(f"{missed} missed, {[*map(len, got.values())]} of {result.bytes}")
        return "; ".join([*told, *([f"{missed} missed"] if missed else []), "over"])


@contextmanager
def place() -> Iterator[Place]:
    """Start a daemon."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        package = directory / "errand_boy"  # with another program for helpers and keepers
        package.mkdir()
        for path in Path(errand_boy.__file__).parent.iterdir():
            (package / path.name).symlink_to(path)
        helper = package / Path(HELPER).name
        helper.unlink()
        helper.write_text(WRAPPER.format(spec=directory / "spec", helper=shlex.quote(HELPER)))
        helper.chmod(0o755)
        with started_daemon(directory, env={"PYTHONPATH": name}) as daemon:
            it = Place(daemon, errand_boy.connect(daemon.path), directory)
            it.spec.write_text(f"-o {it.trace}")
            try:
                yield it
            finally:
                it.kill_marked()


def calls(trace: Path) -> dict[str, int]:
    """Return the names of the calls in a trace, and how many there are of each."""
    names = re.findall(r"^(?:\d+ +)?(\w+)\(", trace.read_text(), re.MULTILINE)
    return dict(collections.Counter(name for name in names if not WITHOUT.fullmatch(name)))


@contextmanager
def traced(it: Place, *options: str) -> Iterator[None]:
    """Have strace attached to the daemon."""
    command = ["strace", "-o", str(it.trace), *options, "-p", str(it.daemon.process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        assert b"attached" in strace.stderr.readline()
        threading.Thread(target=strace.stderr.read, daemon=True).start()
        try:
            yield
        finally:
            strace.terminate()


def one(it: Place, side: str, fault: str) -> str:
    """Run one job with a fault; return how it went. Raises Wrong."""
    if side == "keeper":
        it.spec.write_text(f"-o {it.trace} -e inject={fault}")
        return it.run()
    it.spec.write_text("-o /dev/null -e trace=none")
    with traced(it, "-e", f"inject={fault}"):
        return it.run()


def faults(found: dict[str, int]) -> Iterator[str]:
    """Yield the faults to try, of the last calls of each name first."""
    for name, count in found.items():
        for when in range(count, 0, -max(1, count // MOST)):
            for error in ERRORS:
                if (name, error) == ("epoll_ctl", "EINTR"):
                    continue  # no wait in it can be interrupted, and it is not in its manual
                yield f"{name}:error={error}:when={when}"


def every(side: str, wanted: list[str]) -> int:
    """Try all faults of one side; return how many were wrong."""
    with place() as it:
        if side == "keeper":
            print("without a fault:", it.run())
            found = calls(it.trace)
        else:
            it.run()  # its directories are there from now on
            with traced(it):
                print("without a fault:", it.run())
            found = calls(it.trace)
    print(found)
    left = list(faults({name: n for name, n in found.items() if not wanted or name in wanted}))
    ways: collections.Counter[str] = collections.Counter()
    wrong = 0
    while left:
        with place() as it:  # another one after each that was wrong
            it.run()
            while left:
                fault = left.pop(0)
                try:
                    told = one(it, side, fault)
                except (Exception, pytest.fail.Exception) as problem:
                    wrong += 1
                    print(
                        f"{fault}: WRONG: {problem!r}",
                        *it.daemon.log().splitlines()[1:],
                        sep="\n    ",
                    )
                    break
                ways[re.sub(r"job \d+", "a job", told)] += 1
                print(f"{fault}: {told}", flush=True)
    for told, times in ways.most_common():
        print(f"{times:5} {told}")
    print(f"{sum(ways.values())} faults of the {side}, {wrong} wrong")
    return wrong


def main() -> int:
    """Do what the arguments say; return the exit status."""
    signal.signal(signal.SIGALRM, hung)
    sides = sys.argv[1:2] or ["keeper", "daemon"]
    return 1 if sum(every(side, sys.argv[2:]) for side in sides) else 0


if __name__ == "__main__":
    sys.exit(main())
