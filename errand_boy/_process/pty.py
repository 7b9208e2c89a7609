"""A Popen with a terminal, of which the command gets one side and the caller the other."""

from __future__ import annotations

import contextlib
import os
import time

from errand_boy._process.functions import CAPTURED
from errand_boy._spool import coding, to_text
from errand_boy.terminal import (
    Terminal,
    as_pty,
    non_blocking,
    open_pair,
    read_some,
    wait_for,
    write_some,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


_STANDARD = ("stdin", "stdout", "stderr")
_CHUNK = 1 << 16  # bytes
_LOOK = 0.05  # seconds between checks whether a process has opened the terminal again


def construct(
    process: Any,
    construct: Callable[..., None],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Run the constructor of a Popen of any class with `pty`.

    The command's standard streams are the terminal, except those that are redirected. Those that
    run() would capture are the terminal, too.
    """
    more = {**process._more}
    pty = as_pty(more.pop("pty"))
    for name in _STANDARD:
        if options.get(name) is CAPTURED:
            options[name] = None
    options["start_new_session"] = True
    master, slave = open_pair(pty)
    get_handles = process._get_handles

    def handles(*standard: Any) -> Any:
        del process._get_handles
        return get_handles(*(slave if what is None else what for what in standard))

    process._get_handles = handles
    process._slave = slave  # until the start is over
    process._more = {**more, "controlling_terminal": slave}
    try:
        construct(*args, **options)
    except BaseException:
        if vars(process).pop("_slave", None) is not None:
            os.close(slave)
        os.close(master)
        raise
    encoding = errors = None
    if is_text(process):
        encoding, errors = coding(process.encoding, process.errors)
    process.terminal = Terminal(master, encoding, errors, process._select)


def is_text(process: Any) -> bool:
    """Return whether a Popen is in text mode. gevent's class only has an attribute of type str."""
    known = vars(process)
    return bool(known.get("text_mode")) or known.get("_communicate_empty_value") == ""


def communicate(process: Any, input: Any, timeout: float | None) -> tuple[Any, Any]:
    """Do what Popen.communicate does for `process`, which has a terminal.

    Unless there is a pipe to the command, `input` and then the end of the input are typed. Unless
    there is a pipe for the output, the terminal's output is returned instead.
    """
    exchange: _Exchange | None = vars(process).get("_exchange")
    if exchange is None:
        exchange = process._exchange = _Exchange(process, input)
    elif input:
        raise ValueError("Cannot send input after starting communication")  # subprocess's words
    end = None if timeout is None else time.monotonic() + timeout
    while exchange.go_on(None if end is None else end - time.monotonic()):
        if end is not None and time.monotonic() >= end:
            raise process._expired[0](process.args, timeout or 0, *exchange.output())
    process.wait(None if end is None else max(0.0, end - time.monotonic()))
    process.terminal.close()
    return exchange.result()


class _Exchange:
    """The state of a communicate(), which may go on after a time-out."""

    def __init__(self, process: Any, input: Any) -> None:
        terminal: Terminal = process.terminal
        self._process = process
        self._terminal = terminal
        self._pipe = process.stdin
        files = [terminal, *filter(None, (process.stdout, process.stderr))]
        self._reading = {file.fileno(): (file, bytearray()) for file in files}
        self._output = self._reading[(process.stdout or terminal).fileno()][1]
        self._errors = None
        if process.stderr is not None:
            self._errors = self._reading[process.stderr.fileno()][1]
        data = b"" if input is None else terminal.encode(input)
        self._into: int | None = (self._pipe or terminal).fileno()
        if self._pipe is None:
            data += terminal.end_of_input(not data or data.endswith(b"\n"))
        else:
            with contextlib.suppress(BrokenPipeError):
                self._pipe.flush()
        self._rest = memoryview(data)
        self._is_idle = False  # no process has the terminal open, but the command may open /dev/tty
        self._end_input()

    def output(self) -> tuple[bytes, bytes | None]:
        """Return what has been read so far."""
        return bytes(self._output), None if self._errors is None else bytes(self._errors)

    def result(self, is_whole: bool = True) -> tuple[Any, Any]:
        """Return what has been read, as `communicate` does."""
        output, errors = self.output()
        if self._terminal.encoding is None:
            return output, errors
        how = self._terminal.encoding, self._terminal.errors or "strict", is_whole
        return to_text(output, *how), None if errors is None else to_text(errors, *how)

    def go_on(self, seconds: float | None) -> bool:
        """Wait at most `seconds`, and move data; return whether more may come."""
        if not self._reading:
            return False
        has_ended = False
        if self._is_idle:
            has_ended = self._pause(_LOOK if seconds is None else max(0.0, min(_LOOK, seconds)))
            seconds = 0
        writing = () if self._into is None else (self._into,)
        readable, writable = wait_for(self._terminal.select, self._reading, writing, seconds)
        self._is_idle = False
        for fd in list(readable):
            file, got = self._reading[fd]
            data = read_some(fd, _CHUNK)
            if data:
                limited = self._process._limited
                got += data if limited is None else limited.keep(self._process, data)
            elif data is not None and file is self._terminal and not has_ended:
                self._is_idle = True
            elif data is not None:
                del self._reading[fd]
                if file is not self._terminal:  # SIGHUP could hit a command that is about to end
                    file.close()
        if writable and self._into is not None and not (self._is_idle and self._pipe is None):
            self._write(self._into)
        return bool(self._reading)

    def _pause(self, seconds: float) -> bool:
        """Wait for all but the terminal, which is idle; return whether the command has ended."""
        reading = self._reading.keys() - {self._terminal.fileno()}
        writing = () if self._into is None or self._pipe is None else (self._into,)
        if reading or writing:
            wait_for(self._terminal.select, reading, writing, seconds)
        else:
            with contextlib.suppress(*self._process._expired):
                self._process.wait(seconds)
        return self._process.poll() is not None

    def _write(self, fd: int) -> None:
        try:
            with non_blocking(fd):
                self._rest = self._rest[write_some(fd, self._rest) :]
        except OSError:  # EPIPE, EIO: the command has closed it or ended
            self._rest = self._rest[:0]
        self._end_input()

    def _end_input(self) -> None:
        if not self._rest:
            self._into = None
            if self._pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._pipe.close()
