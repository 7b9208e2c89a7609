"""The caller's side of a command's terminal, the attribute `terminal` of a Popen with ``pty=``.

Writing to it types at the terminal; reading from it returns what the screen would show.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import io
import os
import select
import struct
import termios
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from operator import index

from errand_boy._descriptors import above_standard
from errand_boy._hints import SEE_DOCTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

_WINSIZE = struct.Struct("HHHH")  # rows, columns, and the same in pixels
_UNLOCK = 0x40045431  # TIOCSPTLCK
_OPEN_PEER = 0x5441  # TIOCGPTPEER
_FLAGS = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
_CHUNK = 1 << 16  # bytes
_LFLAG, _CC = 3, 6  # indices of tcgetattr's result
_MOST = 0xFFFF  # rows, columns or pixels
_NO_CHARACTER = b"\0"  # _POSIX_VDISABLE


class Pty:
    """The properties of a new terminal, for the `pty` of Popen.

    - `rows`, `columns`: its size; `xpixel`, `ypixel`: its size in pixels, or 0 if not known.
    - `echo`: whether the terminal shows what is typed; by default it does.
    - `raw`: the terminal interprets and translates nothing, as after cfmakeraw(3).
    - `termios`: its attributes, as from termios.tcgetattr, before `echo` and `raw` are applied.

    Raises ValueError for an impossible size.
    """

    def __init__(
        self,
        rows: int = 24,
        columns: int = 80,
        *,
        echo: bool | None = None,
        raw: bool = False,
        xpixel: int = 0,
        ypixel: int = 0,
        termios: Sequence[Any] | None = None,
    ) -> None:
        self.size: tuple[int, int, int, int] = _size((rows, columns, xpixel, ypixel))
        self.echo = echo
        self.raw = raw
        self.termios = termios

    def __repr__(self) -> str:
        return f"Pty({self.size[0]}, {self.size[1]}, echo={self.echo}, raw={self.raw})"

    @property
    def is_plain(self) -> bool:
        """Whether it has the attributes that the kernel gives a new terminal."""
        return self.echo is None and not self.raw and self.termios is None


def as_pty(given: Any) -> Pty:
    """Return the `pty` of Popen as a Pty. Raises TypeError and ValueError."""
    if given is True:
        return Pty()
    if isinstance(given, Pty):
        return given
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"pty must be true, (rows, columns) or a Pty, not {given!r}")
    return Pty(*given)


def open_pair(pty: Pty) -> tuple[int, int]:
    """Open a new terminal; return the caller's side and the command's.

    No other process inherits them, not even one that another thread forks meanwhile. Raises
    OSError, with ENOSPC if the system has the maximum number of terminals.
    """
    master = slave = -1
    try:
        [master] = above_standard(os.open("/dev/ptmx", _FLAGS))
        fcntl.ioctl(master, _UNLOCK, b"\0\0\0\0")
        [slave] = above_standard(fcntl.ioctl(master, _OPEN_PEER, _FLAGS))
        fcntl.ioctl(master, termios.TIOCSWINSZ, _WINSIZE.pack(*pty.size))
        if not pty.is_plain:
            _set_attributes(slave, pty)
    except BaseException as error:
        for fd in master, slave:
            if fd >= 0:
                os.close(fd)
        if isinstance(error, OSError):
            text = f"cannot open a terminal: {os.strerror(error.errno or 0)}"
            if error.errno == errno.ENOSPC:
                text = "the system has as many terminals as it may (sysctl kernel.pty.max)"
            if error.errno not in (errno.EMFILE, errno.ENFILE):  # else the system has terminals
                text += SEE_DOCTOR
            raise OSError(error.errno, text) from None
        raise
    return master, slave


def _set_attributes(fd: int, pty: Pty) -> None:
    attributes = list(termios.tcgetattr(fd) if pty.termios is None else pty.termios)
    if pty.raw:
        make_raw(attributes)
    if pty.echo is not None:
        attributes[_LFLAG] &= ~termios.ECHO
        attributes[_LFLAG] |= termios.ECHO if pty.echo else 0
    termios.tcsetattr(fd, termios.TCSANOW, attributes)


def make_raw(attributes: list[Any]) -> None:
    """Change attributes from tcgetattr as cfmakeraw(3) does."""
    attributes[0] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    attributes[1] &= ~termios.OPOST
    attributes[2] = attributes[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    attributes[_LFLAG] &= ~(
        termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
    )
    attributes[_CC] = list(attributes[_CC])
    attributes[_CC][termios.VMIN] = 1
    attributes[_CC][termios.VTIME] = 0


def _size(given: Sequence[int]) -> tuple[int, int, int, int]:
    rows, columns, xpixel, ypixel = map(index, given)
    if not 0 <= min(rows, columns, xpixel, ypixel) <= max(rows, columns, xpixel, ypixel) <= _MOST:
        raise ValueError(f"a terminal has 0 to {_MOST} rows, columns and pixels, not {given!r}")
    return rows, columns, xpixel, ypixel


def get_size(fd: int) -> tuple[int, int, int, int]:
    """Return the rows and columns of a terminal, and its size in pixels. Raises OSError."""
    found: tuple[int, int, int, int] = _WINSIZE.unpack(
        fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_WINSIZE.size))
    )
    return found


def wait_for(
    select: Any, reading: Collection[int], writing: Collection[int], seconds: float | None = None
) -> tuple[Collection[int], Collection[int]]:
    """Wait at most `seconds` for descriptors; return those that are readable, and writable.

    `select` is the module of that name, or the replacement of gevent or eventlet.
    """
    if not hasattr(select, "poll"):  # eventlet's select has no limit of descriptors
        readable, writable, _ = select.select(reading, writing, [], seconds)
        return readable, writable
    poll = select.poll()
    for fd in {*reading, *writing}:
        poll.register(fd, (fd in reading) * select.POLLIN | (fd in writing) * select.POLLOUT)
    found = poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
    # A hang-up counts as both.
    return (
        [fd for fd, events in found if fd in reading and events & ~select.POLLOUT],
        [fd for fd, events in found if fd in writing and events & ~select.POLLIN],
    )


def _is_kernels(select: Any) -> bool:
    """Return whether this is the real module, so that waiting in the kernel blocks one thread."""
    return type(getattr(select, "poll", None)) is type(len)  # else a framework's class, or None


@contextmanager
def non_blocking(fd: int) -> Iterator[None]:
    """Make writes return if there is no more room."""
    blocking = os.get_blocking(fd)
    os.set_blocking(fd, False)
    try:
        yield
    finally:
        os.set_blocking(fd, blocking)


class Terminal:
    """The caller's side of a terminal. As a context manager, it closes itself.

    It takes ownership of `fd`. With `encoding` and `errors`, as for open(), it is in text mode:
    `read` returns str, with lines that end in a newline as with Popen's pipes, and `write` takes
    str. `select` is as for `wait_for`. The attribute `at_end` says whether `read` has reached the
    end.
    """

    def __init__(
        self,
        fd: int,
        encoding: str | None = None,
        errors: str | None = None,
        select: Any = select,
    ) -> None:
        self._file = io.FileIO(fd, "r+")
        self.select = select
        self.encoding = encoding
        self.errors = errors
        self._decoder: Any = None
        if encoding is not None:
            decoder = codecs.getincrementaldecoder(encoding)(errors or "strict")
            self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        self._nothing: Any = b"" if encoding is None else ""
        self.at_end: bool = False

    def __repr__(self) -> str:
        where = "closed" if self.closed else f"fd={self.fileno()}"
        return f"<errand_boy.terminal.Terminal {where}>"

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up: the command's session gets SIGHUP, and its reads end.

        Calling it again has no effect.
        """
        self._file.close()

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._file.closed

    def fileno(self) -> int:
        """Return the descriptor. Raises ValueError after `close`."""
        return self._file.fileno()

    def isatty(self) -> bool:
        """Return whether it is open."""
        return self._file.isatty()

    # -- output and input --

    def read(self, size: int = -1) -> Any:
        """Return output of the command, at most `size` bytes; wait until there is some.

        The result is empty at the end, when no process has the terminal open any more. Without
        `size`, return everything up to the end. In text mode, decode at most `size` bytes. Raises
        OSError, and UnicodeDecodeError in text mode.
        """
        if size is None or size < 0:
            parts = []
            while part := self.read(_CHUNK):
                parts.append(part)
            return self._nothing.join(parts)
        if size == 0:
            return self._nothing
        blocks = _is_kernels(self.select)
        while True:
            if not blocks:
                wait_for(self.select, [self.fileno()], [])
            data = read_some(self.fileno(), size)
            if data is None:
                blocks = False
                continue
            text = self.decode(data)
            if text or not data:
                return text

    def decode(self, data: bytes) -> Any:
        """Decode `data`, the next bytes that were read; b"" means the end."""
        self.at_end = not data
        return data if self._decoder is None else self._decoder.decode(data, final=not data)

    def write(self, data: Any) -> int:
        """Type all of `data`; return its length. Wait while the command does not read.

        The kernel cuts lines of more than 4,095 bytes, unless the terminal is raw. Input after the
        command's end is lost. Raises OSError.
        """
        self._write(self.encode(data))
        return len(data)

    def _write(self, data: bytes) -> None:
        rest, fd = memoryview(data), self.fileno()
        with non_blocking(fd):  # else the write of one greenlet would block the others
            while rest:
                wait_for(self.select, [], [fd])
                rest = rest[write_some(fd, rest) :]

    def encode(self, data: Any) -> bytes:
        """Return the bytes to write for `data`. Raises TypeError."""
        if self.encoding is not None:
            encoded: bytes = data.encode(self.encoding, self.errors or "strict")
            return encoded
        return bytes(memoryview(data).cast("B"))

    def eof(self) -> None:
        """Type ^D, or the terminal's own character, which ends the input after a newline."""
        self._type(termios.VEOF)

    def intr(self) -> None:
        """Type ^C, or the terminal's own character: the foreground group gets SIGINT."""
        self._type(termios.VINTR)

    def _type(self, which: int) -> None:
        character = self.attributes()[_CC][which]
        if character != _NO_CHARACTER:
            self._write(character)

    def end_of_input(self, at_line_start: bool) -> bytes:
        """Return the bytes that end the input, or b"" if the terminal does not read lines."""
        attributes = self.attributes()
        character: bytes = attributes[_CC][termios.VEOF]
        if not attributes[_LFLAG] & termios.ICANON or character == _NO_CHARACTER:
            return b""
        return character if at_line_start else 2 * character  # the first one sends the line

    # -- the terminal's state --

    @property
    def winsize(self) -> tuple[int, int]:
        """The rows and columns. Setting them sends SIGWINCH to the foreground group.

        If you set four numbers, the last two are the width and height in pixels. Raises OSError,
        and ValueError for an impossible size.
        """
        return get_size(self.fileno())[:2]

    @winsize.setter
    def winsize(self, size: Sequence[int]) -> None:
        whole = _size(size if len(size) != 2 else (*size, *self.pixels))
        fcntl.ioctl(self.fileno(), termios.TIOCSWINSZ, _WINSIZE.pack(*whole))

    @property
    def pixels(self) -> tuple[int, int]:
        """The width and height in pixels, or 0 if not known."""
        return get_size(self.fileno())[2:]

    @property
    def echo(self) -> bool:
        """Whether the terminal shows what is typed. Can be set."""
        return bool(self.attributes()[_LFLAG] & termios.ECHO)

    @echo.setter
    def echo(self, value: bool) -> None:
        attributes = self.attributes()
        attributes[_LFLAG] &= ~termios.ECHO
        attributes[_LFLAG] |= termios.ECHO if value else 0
        termios.tcsetattr(self.fileno(), termios.TCSANOW, attributes)

    @property
    def foreground_pgid(self) -> int:
        """The process group that gets the input, or 0 if there is none. Raises OSError."""
        return os.tcgetpgrp(self.fileno())

    def attributes(self) -> list[Any]:
        """Return the attributes of the command's side, as from tcgetattr. Raises OSError."""
        try:
            return termios.tcgetattr(self.fileno())  # on Linux both sides have the same
        except termios.error as error:
            raise OSError(*error.args) from None


def read_some(fd: int, size: int) -> bytes | None:
    """Return available bytes, b"" at the end, or None if there are none now. Raises OSError."""
    try:
        return os.read(fd, size)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno != errno.EIO:  # nobody has the other side open
            raise
        return b""


def write_some(fd: int, data: memoryview) -> int:
    """Write as much as there is room for; return how many bytes. Raises OSError."""
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0
