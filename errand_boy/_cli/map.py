"""One command for each line of standard input: `errand-boy map`."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from subprocess import TimeoutExpired

from errand_boy import _map
from errand_boy._batch import NOT_NOW, Batch
from errand_boy._policy import Halt
from errand_boy._result import Result
from errand_boy.errors import ErrandBoyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CHUNK = 1 << 16  # bytes
_KEPT = 1 << 20  # bytes of output in memory for each command; a longer one is in a file
_MOST_FAILED = 101  # the exit status for so many, or more
_TITLE = "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command MaxRSS\n"
_PLACE = b"{}"
_VARIABLE = b"errand_boy_line"


class UsageError(ValueError):
    """What was asked for makes no sense."""


class _Lines:
    """The commands for the lines of a descriptor, as far as they have come."""

    def __init__(self, fd: int, separator: bytes, make: _Maker, done: set[int]) -> None:
        self._fd = fd
        self._separator = separator
        self._make = make
        self._done = done
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._seq = 0
        self.seqs: list[int] = []  # by the batch's own number
        self.ended = False

    def wanted(self) -> bool:
        """Return whether to read on."""
        return not self._lines and not self.ended

    def read(self) -> None:
        data = os.read(self._fd, _CHUNK)
        *lines, self._rest = (self._rest + data).split(self._separator)
        self._lines.extend(lines)
        if not data:
            self.ended = True
            if self._rest:
                self._lines.append(self._rest)

    def __iter__(self) -> Iterator[Any]:
        while True:
            while self._lines:
                self._seq += 1
                line = self._lines.popleft()
                if self._seq not in self._done:
                    self.seqs.append(self._seq)
                    yield self._make(line)
            if self.ended:
                return
            yield NOT_NOW


class _Maker:
    """Makes the command for a line.

    With `shell` the first word is for the shell to parse; the others, and the line, never are.
    """

    def __init__(self, words: Sequence[str], shell: bool) -> None:
        self._words = [os.fsencode(word) for word in words]
        if not any(_PLACE in word for word in self._words):
            self._words.append(_PLACE)
        self._shell = shell

    def __call__(self, line: bytes) -> list[bytes] | bytes:
        if not self._shell:
            return [word.replace(_PLACE, line) for word in self._words]
        command, *arguments = self._words
        quoted = _quote(line)
        if _PLACE in command and quoted != line:
            # Not pasted: a {} that is within quotes would end them. A variable is not parsed again.
            command = b"%b=%b; %b" % (_VARIABLE, quoted, command)
            line_there = b'"$%b"' % _VARIABLE
        else:
            line_there = line
        words = [_quote(word.replace(_PLACE, line)) for word in arguments]
        return b" ".join([command.replace(_PLACE, line_there), *words])


def _quote(word: bytes) -> bytes:
    return os.fsencode(shlex.quote(os.fsdecode(word)))


def _written(args: list[bytes] | bytes) -> bytes:
    """Return a command as one line, for a shell."""
    if isinstance(args, list):
        args = os.fsencode(shlex.join(os.fsdecode(word) for word in args))
    return args.replace(b"\n", b"\\n")


class JobLog:
    """What has been run, a line for each command, in the order of their ends.

    The columns are GNU parallel's, and MaxRSS (KiB). `done` are the numbers (from 1) of the lines
    of input whose commands it had already. Raises OSError.
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
        self._write(b"%b\t%b\t%d\n" % (line, _written(result.args), peak))

    def _write(self, line: bytes) -> None:
        """Write it at once: who is killed leaves a log to resume from."""
        while line:
            line = line[os.write(self._fd, line) :]


def _size(data: bytes, file: Any) -> int:
    return len(data) if file is None else int(os.fstat(file.fileno()).st_size)


def _write(result: Result) -> None:
    pairs = (
        (sys.stdout.buffer, result.stdout, result.stdout_file),
        (sys.stderr.buffer, result.stderr, result.stderr_file),
    )
    for to, data, file in pairs:
        if file is not None:
            from shutil import copyfileobj  # noqa: PLC0415

            with file:
                copyfileobj(file, to)
        elif data:
            to.write(data)
    error = result.error
    if error is not None:
        why = "timed out" if isinstance(error, TimeoutExpired) else error
        why = getattr(error, "strerror", None) or why
        text = f"errand-boy: {os.fsdecode(_written(result.args))}: {why}\n"
        sys.stderr.buffer.write(os.fsencode(text))
    sys.stderr.buffer.flush()


def run(
    words: Sequence[str],
    *,
    jobs: int | None = None,
    shell: bool = False,
    null: bool = False,
    keep_order: bool = False,
    progress: bool = False,
    joblog: str | None = None,
    resume: bool = False,
    halt: str = "never",
    timeout: float | None = None,
) -> int:
    """Run a command for each line of standard input; return the exit status.

    It is the number of commands that failed, 101 for more than 100 of them; after a halt the
    return code of the command that was the reason; 125 for what errand-boy itself could not do.
    Raises UsageError.
    """
    try:
        policy = Halt(halt)
    except ValueError as error:
        raise UsageError(error) from None
    if policy.needs_total:
        raise UsageError("--halt done=N%: of how many is not known")
    if resume and joblog is None:
        raise UsageError("--resume needs a --joblog")
    try:
        log = None if joblog is None else JobLog(joblog, resume)
        lines = _Lines(
            0, b"\0" if null else b"\n", _Maker(words, shell), log.done if log else set()
        )
        work = _map.make(
            lines,
            max_workers=jobs or len(os.sched_getaffinity(0)),
            shell=shell,
            ordered=keep_order,
            timeout=timeout,
            max_output=_KEPT,
            spool=True,
            halt=policy,
        )
        return _run(work, lines, log, progress)
    except ErrandBoyError as error:
        print(f"errand-boy: {getattr(error, 'strerror', error)}", file=sys.stderr)
    except OSError as error:
        print(f"errand-boy: {error}", file=sys.stderr)
    return 125


def _run(work: Batch, lines: _Lines, log: JobLog | None, progress: bool) -> int:
    failed = 0

    def on_result(result: Result) -> None:
        nonlocal failed
        failed += result.failed
        if log is not None:
            log.add(lines.seqs[result.index], result)

    work.on_result = on_result
    # To die of these is enough: the helper ends what runs when it sees our end.
    for number in (signal.SIGINT, signal.SIGPIPE):
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGPIPE:
            signal.signal(number, signal.SIG_DFL)
    results = _drive(work, lines)
    with contextlib.closing(work):
        for result in _map.with_bar(results, None) if progress else results:
            _write(result)
    sys.stdout.flush()
    if work.halt.result is not None:
        code = work.halt.result.returncode
        return code if code >= 0 else 128 - code
    return min(failed, _MOST_FAILED)


def _drive(work: Batch, lines: _Lines) -> Generator[Result, None, None]:
    """As _map.drive, but wait for lines too."""
    wait = _map.waiter(work)
    reads = False
    while True:
        work.fill()
        while (result := work.take()) is not None:
            yield result
            work.fill()
        sys.stdout.flush()
        if not work.pending():
            return
        wanted = lines.wanted() and work.halt.due is None
        if wanted != reads:
            reads = wanted
            if reads:
                work.watch(0, False)
            else:
                work.unwatch(0)
        for fd in wait(work.timers.rest()):
            if fd == 0:
                lines.read()
            else:
                work.on_ready(fd)
        work.timers.ring()
