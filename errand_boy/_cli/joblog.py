"""The job log of `errand-boy map`: what has been run, and what is not to be run again."""

from __future__ import annotations

import os
import shlex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._result import Result

_TITLE = "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command MaxRSS\n"


class JobLog:
    """What has been run, a line for each command, in the order of their ends.

    The columns are GNU parallel's, and MaxRSS (KiB). `done` are the numbers (from 1) of the
    commands that it had already. Raises OSError.
    """

    def __init__(self, path: str, resume: bool) -> None:
        self.done: set[int] = set()
        start = 0 if resume else os.O_TRUNC
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | start, 0o666)
        if resume:
            self._read()
        if not self.done:
            self._write(_TITLE.replace(" ", "\t").encode())

    def _read(self) -> None:
        whole = 0
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n"):  # it was cut short: that command is run again
                    break
                number = line.split(b"\t", 1)[0]
                if number.isdigit():
                    self.done.add(int(number))
                whole += len(line)
        os.ftruncate(self._fd, whole if self.done else 0)

    def add(self, seq: int, result: Result) -> None:
        """Write the line of a command that has ended."""
        usage = result.rusage
        code = result.returncode
        fields = (
            seq,
            ":",  # the local host
            f"{result.started:.3f}",
            f"{result.duration:10.3f}",
            0,
            _size(result.stdout, result.stdout_file),
            max(0, code),
            max(0, -code),
        )
        peak = usage.ru_maxrss if usage is not None else 0
        line = "\t".join(map(str, fields)).encode()
        self._write(b"%b\t%b\t%d\n" % (line, written(result.args), peak))

    def _write(self, line: bytes) -> None:
        """Write it at once: who is killed leaves a log to resume from."""
        while line:
            line = line[os.write(self._fd, line) :]


def written(args: list[bytes] | bytes) -> bytes:
    """Return a command as one line, for a shell."""
    if isinstance(args, list):
        args = os.fsencode(shlex.join(os.fsdecode(word) for word in args))
    return args.replace(b"\n", b"\\n")


def _size(data: bytes | None, file: Any) -> int:
    return len(data or b"") if file is None else int(os.fstat(file.fileno()).st_size)
