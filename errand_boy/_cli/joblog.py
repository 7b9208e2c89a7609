"""The job log of `errand-boy map`: which commands have run, and must not run again."""

from __future__ import annotations

import errno
import os
import shlex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from errand_boy._map.result import Result

_MOST_DIGITS = 10  # of a command's number
_PAGE = 256  # numbers
_TITLE = "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command MaxRSS\n"
_FIRST = b"Seq\tHost\t"  # GNU parallel's title has fewer columns


class Seqs:
    """A set of command numbers, with a bit for each, since there may be millions.

    A large number alone costs no more than a small one.
    """

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}

    def __contains__(self, seq: object) -> bool:
        assert isinstance(seq, int)
        return bool(self._pages.get(seq // _PAGE, 0) >> seq % _PAGE & 1)

    def put(self, seq: int, there: bool) -> None:
        """Add or remove a number."""
        page, bit = self._pages.get(seq // _PAGE, 0), 1 << seq % _PAGE
        self._pages[seq // _PAGE] = page | bit if there else page & ~bit


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
        """Read the existing log; return whether there is anything in it.

        Raises OSError for another file, which is left as it is.
        """
        whole = rows = 0
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                if not whole and not (line.startswith(_FIRST) or _FIRST.startswith(line)):
                    raise OSError(errno.EINVAL, "it is not a job log, and is left as it is")
                if not line.endswith(b"\n"):  # cut short: that command runs again
                    break
                whole += len(line)
                fields = line.split(b"\t", 8)
                if not fields[0].isdigit():
                    continue
                if len(fields[0]) > _MOST_DIGITS:
                    text = f"a command's number in the job log has {len(fields[0])} digits"
                    raise OSError(errno.EINVAL, text)
                rows += 1
                seq = int(fields[0])
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
