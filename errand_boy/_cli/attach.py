"""Shows a detached command on this terminal: `errand-boy attach`."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import sys
import time

from errand_boy._cli.escaping import Writer, is_anothers, write_all
from errand_boy._cli.run import exit_status
from errand_boy._cli.terminal import Outer, catching
from errand_boy._jobs.blocking import Attachment, Job, Missed
from errand_boy._jobs.modes import Modes
from errand_boy.errors import JobLostError

_CHUNK = 1 << 12  # bytes that are typed at once
_LEAST_ROOM = 2 * _CHUNK  # for these and for keys that were held back
_MOST_SHOWN = 64  # pieces of output before the next check for keys
_LOOK = 0.05  # seconds, while there is no descriptor to wait for
_BETWEEN_REDRAWS = 0.2  # seconds
_HELD = 0.5  # seconds for which the first of the detach keys is held back
_KEY = re.compile(r"(?:ctrl-|\^)(?P<control>.)|(?P<plain>[^,])|,", re.IGNORECASE | re.DOTALL)
_STREAMS = {1: "standard output", 2: "standard error"}
_LEAVING = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}


class DetachKeys:
    """Finds the detach keys among the keys that are typed.

    `text` is for example ``^P^Q``, ``ctrl-a,d`` or ``none``. Raises ValueError.
    """

    def __init__(self, text: str) -> None:
        self._keys = b"" if text == "none" else b"".join(map(_key, _KEY.finditer(text)))
        if not self._keys and text != "none":
            raise ValueError("--detach-keys: no keys; none turns them off")
        self.held = b""  # typed keys that may begin the detach keys

    def take(self, typed: bytes) -> tuple[bytes, bool]:
        """Return the typed keys that the command gets, and whether to detach after them."""
        data = self.held + typed
        before, found, _ = data.partition(self._keys) if self._keys else (data, b"", b"")
        if found:
            self.held = b""
            return before, True
        sizes = range(min(len(self._keys) - 1, len(data)), 0, -1)
        size = next((size for size in sizes if data.endswith(self._keys[:size])), 0)
        self.held = data[len(data) - size :]
        return data[: len(data) - size], False


def _key(match: re.Match[str]) -> bytes:
    control = match["control"]
    if control is None:
        return (match["plain"] or "").encode()
    code = ord(control.upper())
    if not 0x40 <= code < 0x60:
        raise ValueError(f"--detach-keys: there is no key ctrl-{control}")
    return bytes([code & 0x1F])


def run(job: Job, read_only: bool, keys: str, *, raw: bool) -> int:
    """Show a job until it is over or the user detaches; return the exit status.

    Raises PermissionError.
    """
    detach_keys = DetachKeys(keys)
    has_terminal = job.has_terminal
    if has_terminal and is_anothers(job) and os.isatty(1) and not raw:
        raise PermissionError(
            errno.EPERM,
            "a program of another user would write whatever it likes to this terminal: --raw lets "
            "it; errand-boy logs --follow shows control characters escaped",
        )
    outer = Outer(interrupts=read_only)
    window = outer.size() if has_terminal and outer.has_size else None
    handled = _LEAVING | {signal.SIGWINCH, signal.SIGTSTP}
    in_raw_mode = outer if has_terminal else contextlib.nullcontext()
    with catching(handled) as arrived, job.attach(read_only, window) as attachment, in_raw_mode:
        session = _Session(attachment, outer, arrived, detach_keys, Writer(job, raw=raw))
        try:
            number = session.run()
        finally:
            session.restore()
    if attachment.lost_input:
        text = f"{attachment.lost_input} bytes of input may not have reached {job.name}"
        print(f"errand-boy: {text}", file=sys.stderr)
    if number is not None:
        print(f"errand-boy: detached from {job.name}", file=sys.stderr)
        return 128 + number if number else 0
    try:
        return exit_status(job.wait())
    except JobLostError as error:
        print(f"errand-boy: {error.strerror}", file=sys.stderr)
        return 125


def print_missed(event: Missed) -> None:
    """Say that output was lost to the reader."""
    where = _STREAMS[event.stream]
    print(f"errand-boy: {event.size} bytes of {where} are not kept any more", file=sys.stderr)


class _Session:
    def __init__(
        self,
        attachment: Attachment,
        outer: Outer,
        arrived: int,
        keys: DetachKeys,
        writer: Writer,
    ) -> None:
        self._attachment = attachment
        self._writer = writer
        self._outer = outer
        self._arrived = arrived
        self._keys = keys
        self._held_until: float | None = None
        self._redraws_at: float | None = None
        self._has_terminal = attachment.has_terminal
        self._modes = Modes()
        self._reads_keys = True
        self._left: int | None = None

    def run(self) -> int | None:
        """Return None if the job is over, 0 after the detach keys, else the number of a signal."""
        while self._left is None and not self._attachment.is_over:
            has_more = self._show_some()
            if self._left is None and not self._attachment.is_over:
                self._wait(has_more)
        return self._left

    def restore(self) -> None:
        """Undo the changes that the program's output has made to this terminal."""
        with contextlib.suppress(OSError):
            self._writer.close()
        if self._has_terminal and os.isatty(1):
            with contextlib.suppress(OSError):
                write_all(1, self._modes.undoing() + b"\r\n" * (self._left is not None))

    def _show_some(self) -> bool:
        """Show some output, but not for long; return whether there may be more."""
        for _ in range(_MOST_SHOWN):
            event = self._attachment.read_some()
            if event is None:
                return False
            if isinstance(event, Missed):
                self._on_missed(event)
            else:
                self._show(event.stream, event.data)
        return True

    def _on_missed(self, event: Missed) -> None:
        if not self._has_terminal:
            print_missed(event)
        elif self._redraws_at is None:  # the screen is wrong now
            self._redraws_at = time.monotonic() + _BETWEEN_REDRAWS

    def _wait(self, has_more: bool) -> None:
        fd = self._attachment.fileno()
        poll = select.poll()
        poll.register(self._arrived, select.POLLIN)
        if self._reads_keys and self._attachment.room > _LEAST_ROOM:
            poll.register(0, select.POLLIN)
        seconds = None
        if fd < 0:
            seconds = _LOOK
        else:
            poll.register(fd, select.POLLIN | select.POLLOUT * self._attachment.wants_write)
        for moment in self._held_until, self._redraws_at:
            if moment is not None:
                rest = max(0.0, moment - time.monotonic())
                seconds = rest if seconds is None else min(rest, seconds)
        if has_more:
            seconds = 0.0
        ready = {number for number, _ in poll.poll(None if seconds is None else seconds * 1000)}
        if self._arrived in ready:
            for number in os.read(self._arrived, 100):
                self._on_signal(number)
        if self._redraws_at is not None and time.monotonic() >= self._redraws_at:
            self._redraws_at = None
            self._attachment.redraw()
        if 0 in ready:
            self._read_keys()
        elif self._held_until is not None and time.monotonic() >= self._held_until:
            self._held_until = None
            held, self._keys.held = self._keys.held, b""
            self._type(held)

    def _show(self, stream: int, data: bytes) -> None:
        if self._has_terminal:
            self._modes.feed(data)
        try:
            self._writer.write(stream, data)
        except OSError:  # nobody reads the output any more
            self._left = signal.SIGPIPE

    def _read_keys(self) -> None:
        try:
            typed = os.read(0, _CHUNK)
        except BlockingIOError:
            return
        except OSError:  # it has hung up
            typed = b""
        if not typed:
            self._reads_keys = False
            if self._has_terminal and self._outer.saved is not None:
                self._left = signal.SIGHUP
            elif not self._attachment.read_only and not self._has_terminal:
                self._attachment.end_input()
            return
        if self._has_terminal and self._outer.saved is not None:
            typed, leaves = self._keys.take(typed)
            self._held_until = time.monotonic() + _HELD if self._keys.held else None
            if leaves:
                self._left = 0
        self._type(typed)

    def _type(self, typed: bytes) -> None:
        if typed and not self._attachment.read_only:
            self._attachment.write(typed)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP:
            self._suspend()
        elif number in _LEAVING:
            self._left = number

    def _resize(self) -> None:
        if self._has_terminal and self._outer.has_size:
            self._attachment.winsize = self._outer.size()

    def _suspend(self) -> None:
        """Stop this process only. After `fg` it shows the job's output of the meantime."""
        raw = self._outer if self._has_terminal else contextlib.nullcontext()
        raw.__exit__(None, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        raw.__enter__()
        self._resize()
        if self._has_terminal:
            self._attachment.redraw()
