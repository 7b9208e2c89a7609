"""The job log of `errand-boy map`: which commands have run, and must not run again."""

from __future__ import annotations

import errno
import os
import shlex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from errand_boy._map.result import Result

_MOST_SEQ = 1 << 33
_TITLE = "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command MaxRSS\n"


class Seqs:
    """A set of command numbers, with a bit for each, since there may be millions."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def __contains__(self, seq: object) -> bool:
        assert isinstance(seq, int)
        return seq >> 3 < len(self._bits) and bool(self._bits[seq >> 3] & 1 << (seq & 7))

    def put(self, seq: int, there: bool) -> None:
        """Add or remove a number."""
        if seq >> 3 >= len(self._bits):
            self._bits.extend(bytes((seq >> 3) + 1 - len(self._bits) + (len(self._bits) >> 1)))
        if there:
            self._bits[seq >> 3] |= 1 << (seq & 7)
        else:
            self._bits[seq >> 3] &= ~(1 << (seq & 7))


class JobLog:
    """The commands that have run, a line for each, in the order of their ends.

    The columns are GNU parallel's, and MaxRSS (KiB). With `resume`, `done` are the numbers (from 1)
    of the commands that the log had already, which must not run again. `resume_failed` leaves out
    those that failed, so they run again. Raises OSError.
    """

    def __init__(self, path: str, resume: bool, resume_failed: bool = False) -> None:
        self.done = Seqs()
        self.count = 0  # of `done`
        resume = resume or resume_failed
        start = 0 if resume else os.O_TRUNC
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | start, 0o666)
        if not (resume and self._read(resume_failed)):
            self._write(_TITLE.replace(" ", "\t").encode())

    def _read(self, without_failed: bool) -> bool:
        """Read the existing log; return whether there is anything in it."""
        whole = rows = 0
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n"):  # cut short: that command runs again
                    break
                whole += len(line)
                fields = line.split(b"\t", 8)
                if not fields[0].isdigit():
                    continue
                rows += 1
                seq = int(fields[0])
                if seq > _MOST_SEQ:
                    raise OSError(errno.EINVAL, f"the job log has a command {seq}")
                is_done = not without_failed or fields[6:8] == [b"0", b"0"]
                self.count += is_done - (seq in self.done)
                self.done.put(seq, is_done)  # the last line about a command counts
        os.ftruncate(self._fd, whole if rows else 0)
        return rows > 0

    def add(self, seq: int, result: Result, received: int) -> None:
        """Write the line of a command that has ended; `received`: bytes of its standard output."""
        usage = result.rusage
        code = result.returncode
        fields = (
            seq,
            result.host or ":",  # the local host
            f"{result.started:.3f}",
            f"{result.duration:10.3f}",
            0,
            received,
            max(0, code),
            max(0, -code),
        )
        peak = usage.ru_maxrss if usage is not None else 0
        line = "\t".join(map(str, fields)).encode()
        self._write(b"%b\t%b\t%d\n" % (line, written(result.args), peak))

    def _write(self, line: bytes) -> None:
        """Write the line at once, so that the log is useful if this process is killed."""
        while line:
            line = line[os.write(self._fd, line) :]


def written(args: list[bytes] | bytes) -> bytes:
    """Return a command as one line, quoted for a shell."""
    if isinstance(args, list):
        args = os.fsencode(shlex.join(os.fsdecode(word) for word in args))
    return args.replace(b"\n", b"\\n")
