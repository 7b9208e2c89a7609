"""Holds the exec of a program until a test releases it, like a slow file system.

As a program, `guard.py PROGRAM SECONDS` asks fanotify for the permission events of PROGRAM's
executions. It writes `ready` (or why it can't), then `held PID` for each, and allows the oldest at
each line that it reads. End-of-file, SECONDS since the event, or its own end in any way (the kernel
then allows pending ones) release the rest, so nothing stays stuck after a test that died.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from unittest import SkipTest

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_CLASS_CONTENT = 0x4
FAN_MARK_ADD = 0x1
FAN_OPEN_EXEC_PERM = 0x40000
FAN_ALLOW = 0x1
AT_FDCWD = -100
PR_SET_PDEATHSIG = 1

EVENT = struct.Struct("=IBBHQii")
RESPONSE = struct.Struct("=iI")


class Guard:
    """Holds executions of `program`, a copy that nobody else runs, for at most `seconds`."""

    def __init__(self, program: Path, seconds: float = 60) -> None:
        self.command = [sys.executable, "-I", __file__, str(program), str(seconds)]

    def __enter__(self) -> Guard:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True)
        answer = self._read()
        if answer != "ready":
            self.__exit__(None, None, None)
            raise SkipTest(f"fanotify is not permitted here: {answer}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.__exit__(kind, error, traceback)

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def held(self) -> int:
        """Wait for an execution and return the pid of the process that it stops."""
        word, _, pid = self._read().partition(" ")
        assert word == "held"
        return int(pid)

    def release(self) -> None:
        """Let the oldest held execution go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def main(program: str, seconds: float) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    fanotify = libc.fanotify_init(FAN_CLASS_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK, os.O_RDONLY)
    mask, path = ctypes.c_uint64(FAN_OPEN_EXEC_PERM), os.fsencode(program)
    if fanotify < 0 or libc.fanotify_mark(fanotify, FAN_MARK_ADD, mask, AT_FDCWD, path) < 0:
        print(os.strerror(ctypes.get_errno()), flush=True)
        return
    print("ready", flush=True)
    pending: list[tuple[float, int]] = []

    def allow() -> None:
        _, descriptor = pending.pop(0)
        os.write(fanotify, RESPONSE.pack(descriptor, FAN_ALLOW))
        os.close(descriptor)

    while True:
        wait = max(0.0, pending[0][0] - time.monotonic()) if pending else None
        readable, _, _ = select.select([fanotify, 0], [], [], wait)
        if fanotify in readable:
            events = os.read(fanotify, 4096)
            for *_, descriptor, pid in EVENT.iter_unpack(events):
                pending.append((time.monotonic() + seconds, descriptor))
                print("held", pid, flush=True)
        if 0 in readable:
            lines = os.read(0, 4096)
            if not lines:
                return
            for _ in lines[: len(pending)]:
                allow()
        while pending and pending[0][0] <= time.monotonic():
            allow()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
