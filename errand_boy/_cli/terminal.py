"""Runs one command on its own terminal, shown on this one: `errand-boy run --pty`."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from errand_boy._cli.run import exit_status, start, tell_limit
from errand_boy._client import client
from errand_boy._process import popen
from errand_boy.terminal import (
    Pty,
    Terminal,
    get_size,
    make_raw,
    non_blocking,
    wait_for,
    write_some,
)

_CHUNK = 1 << 16  # bytes
_FULL = 4095  # bytes: a terminal gives no more at once
_FILL = _CHUNK - _FULL
_MOST_TYPED = 1 << 16  # bytes that wait until the command reads
_FORWARDED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_HANDLED = {*_FORWARDED, signal.SIGWINCH, signal.SIGTSTP}


def run(
    argv: Sequence[str],
    socket: str | Literal[False] | None = None,
    record: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Run a command on a new terminal; return its exit status as a shell does.

    If standard input is a terminal, the new one gets its attributes, and standard input is raw
    while the command runs. With `record`, the output is also written to that file, as asciicast v2.
    `options` are Popen's.
    """
    outer = Outer()
    ignored = {n for n in _FORWARDED if signal.getsignal(n) is signal.SIG_IGN}
    with catching(_HANDLED - ignored) as arrived:
        recording = None
        try:
            if record is not None:
                recording = Recording(record, outer.size(), argv)
        except OSError as error:
            print(f"errand-boy: {record}: {error.strerror}", file=sys.stderr)
            return 125
        try:
            process = start(
                argv, socket, pty=Pty(*outer.size()[:2], termios=outer.saved), **(options or {})
            )
        except BaseException:
            if recording is not None:
                recording.discard()
            raise
        if isinstance(process, int):
            if recording is not None:
                recording.discard()
            return process
        with outer:
            status = _Session(process, outer, arrived, recording).run()
        tell_limit(process, argv)
        return status


@contextlib.contextmanager
def catching(numbers: set[signal.Signals]) -> Iterator[int]:
    """Have each signal write a byte to a pipe; yield the pipe's reading end."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


class Outer:
    """The terminal of this process, if there is one. As a context manager, make it raw.

    With `interrupts`, ^C and ^Z keep their meaning.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._interrupts = interrupts
        self.saved = None
        with contextlib.suppress(termios.error):
            self.saved = termios.tcgetattr(0)
        self._tty = next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)

    def size(self) -> tuple[int, int, int, int]:
        """Return the rows and columns, and the size in pixels."""
        found = (0, 0, 0, 0) if self._tty is None else get_size(self._tty)
        return found if found[0] and found[1] else (24, 80, 0, 0)

    @property
    def has_size(self) -> bool:
        return self._tty is not None

    def __enter__(self) -> None:
        if self.saved is not None:
            attributes = [*self.saved]
            make_raw(attributes)
            if self._interrupts:
                attributes[3] |= termios.ISIG
            self._set(attributes)

    def __exit__(self, *_: object) -> None:
        if self.saved is not None:
            self._set(self.saved)

    def _set(self, attributes: list[Any]) -> None:
        # A terminal that has hung up has no attributes.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, attributes)

    def is_suspend(self, typed: bytes) -> bool:
        """Return whether `typed` is the key that suspends a program."""
        return self.saved is not None and typed == self.saved[6][termios.VSUSP] != b"\0"


def poll_of(wanted: Mapping[int, int]) -> select.poll:
    """Return a poll object for these descriptors and events."""
    poll = select.poll()
    for fd, events in wanted.items():
        poll.register(fd, events)
    return poll


class _Session:
    def __init__(
        self,
        process: popen.Popen[Any],
        outer: Outer,
        arrived: int,
        recording: Recording | None,
    ) -> None:
        terminal = process.terminal
        assert terminal is not None
        self._process = process
        self._terminal: Terminal = terminal
        self._outer = outer
        self._arrived = arrived
        self._recording = recording
        self._screen = open(terminal.fileno(), "rb", buffering=0, closefd=False)
        self._buffer = memoryview(bytearray(_CHUNK))
        self._typed = b""
        self._reads_keys = True
        self._failure: OSError | None = None

    def run(self) -> int:
        """Pass on keys and output until the command has ended; return the exit status."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        waiter = threading.Thread(target=self._await_end, args=[writer], daemon=True)
        waiter.start()
        fd = self._terminal.fileno()
        with non_blocking(fd):
            shows = True
            ended = False
            state = None
            while True:
                is_typing = bool(self._typed)
                has_room = self._reads_keys and len(self._typed) < _MOST_TYPED
                if state != (state := (shows, ended, is_typing, has_room)):
                    wanted = {self._arrived: select.POLLIN}
                    if not ended:
                        wanted[reader] = select.POLLIN
                    if shows:
                        wanted[fd] = select.POLLIN | (select.POLLOUT if is_typing else 0)
                    if has_room:
                        wanted[0] = select.POLLIN
                    poll = poll_of(wanted)
                # Other processes may keep the terminal open for long. Once the command has
                # ended, show only what is already there.
                found = dict(poll.poll(0 if ended else None))
                on_terminal = found.get(fd, 0)
                if ended and not on_terminal & ~select.POLLOUT:
                    break
                if self._arrived in found:
                    for number in os.read(self._arrived, 100):
                        self._on_signal(number)
                if 0 in found:
                    self._read_keys()
                if on_terminal & ~select.POLLIN and self._typed:
                    self._type()
                if on_terminal & ~select.POLLOUT:
                    shows = self._show()
                ended = ended or reader in found
        self._terminal.close()
        waiter.join()
        os.close(reader)
        os.close(writer)
        if self._recording is not None:
            self._recording.close()
        if self._failure is not None:
            print(f"errand-boy: {self._failure.strerror}\r", file=sys.stderr)
            return 125
        return exit_status(self._process)

    def _await_end(self, writer: int) -> None:
        try:
            self._process.wait()
        except OSError as error:
            self._failure = error
        os.write(writer, b"\0")

    def _show(self) -> bool:
        """Pass on the command's output; return whether more may come."""
        size, goes_on = self._read_screen()
        data = self._buffer[:size]
        if self._recording is not None:
            self._recording.output(bytes(data))
        while data:
            try:
                data = data[os.write(1, data) :]
            except BlockingIOError:
                wait_for(select, [], [1])
            except OSError:  # nobody reads the output any more
                self._hang_up()
                return False
        return goes_on

    def _read_screen(self) -> tuple[int, bool]:
        """Read the available output into the buffer; return its size, and whether more may come.

        One write for many reads halves the time that this process takes.
        """
        size = 0
        read, buffer = self._screen.readinto, self._buffer
        while size <= _FILL:
            try:
                got = read(buffer[size:])
            except OSError as error:
                if error.errno != errno.EIO:  # no process has the other side open
                    raise
                return size, False
            if got is None:
                break
            if got == 0:
                return size, False
            size += got
            if got < _FULL:  # there is no more yet: don't ask
                break
        return size, True

    def _hang_up(self) -> None:
        self._reads_keys = False
        self._signal(signal.SIGHUP)
        self._signal(signal.SIGCONT)

    def _read_keys(self) -> None:
        try:
            data = os.read(0, _CHUNK)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EAGAIN):
                raise
            data = b""
        if not data:
            self._reads_keys = False
            if self._outer.saved is None:
                with contextlib.suppress(OSError):
                    at_line_start = self._typed[-1:] in (b"", b"\n")
                    self._typed += self._terminal.end_of_input(at_line_start)
            else:
                self._hang_up()
        elif self._outer.is_suspend(data) and self._would_ignore_suspend():
            self._suspend()
        else:
            self._typed += data

    def _type(self) -> None:
        try:
            done = write_some(self._terminal.fileno(), memoryview(self._typed))
            self._typed = self._typed[done:]
        except OSError:  # EIO: the command has ended
            self._typed = b""

    # -- signals and job control --

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            if isinstance(self._process, client.Popen):
                self._process.send_group_signal(number)
            elif self._process.poll() is None:
                os.killpg(self._process.pid, number)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP:
            self._suspend()
        elif number in _FORWARDED:
            self._signal(number)

    def _resize(self) -> None:
        if self._outer.has_size:
            size = self._outer.size()
            with contextlib.suppress(OSError):
                self._terminal.winsize = size
            if self._recording is not None:
                self._recording.resize(size)

    def _would_ignore_suspend(self) -> bool:
        # The kernel does not stop the command's own group from the keyboard, since the group is
        # orphaned: no process of the session could continue it. The jobs of a shell are not.
        with contextlib.suppress(OSError):
            flags = self._terminal.attributes()[3]
            return bool(flags & termios.ISIG) and (
                self._terminal.foreground_pgid == self._process.pid
            )
        return False

    def _suspend(self) -> None:
        """Stop the command and this process, as ^Z would if they were one; continue after `fg`."""
        self._signal(signal.SIGSTOP)
        self._outer.__exit__()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._outer.__enter__()
        self._resize()
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGWINCH)  # the screen may have changed by now


class Recording:
    """A file of asciicast v2: a line about the recording, and one for each event."""

    def __init__(self, path: str, size: tuple[int, int, int, int], argv: Sequence[str]) -> None:
        self._file = open(path, "w", encoding="utf-8")
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = time.monotonic()
        environment = {n: os.environ[n] for n in ("SHELL", "TERM") if n in os.environ}
        self._write(
            {
                "version": 2,
                "width": size[1],
                "height": size[0],
                "timestamp": int(time.time()),
                "command": " ".join(argv),
                "env": environment,
            }
        )

    def output(self, data: bytes) -> None:
        """Record some output."""
        text = self._decoder.decode(data)
        if text:
            self._event("o", text)

    def resize(self, size: tuple[int, int, int, int]) -> None:
        """Record a change of the size."""
        self._event("r", f"{size[1]}x{size[0]}")

    def close(self) -> None:
        """Write the rest, and close the file."""
        rest = self._decoder.decode(b"", final=True)
        if rest:
            self._event("o", rest)
        self._file.close()

    def discard(self) -> None:
        """Remove the file, because no command has run."""
        self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _event(self, kind: str, text: str) -> None:
        self._write([round(time.monotonic() - self._begun, 6), kind, text])

    def _write(self, value: object) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
