"""Keeps output, in memory up to a size, and beyond that in a file."""

from __future__ import annotations

import errno
import io
import os
import sys

from errand_boy._descriptors import above_standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO, Any


class Spool:
    """A buffer of bytes, which are read in the order in which they were written.

    `data` has the first `most` bytes (None: all). If there are more, `open_file` opens `file`,
    which has all of them; without `open_file` the rest is lost, and the spool is `truncated`.
    """

    __slots__ = ("_at", "_open_file", "_room", "data", "file", "size", "truncated")

    def __init__(
        self, most: int | None = None, open_file: Callable[[], IO[bytes]] | None = None
    ) -> None:
        self.data: bytes | bytearray = b""
        self.size = 0
        self.truncated = False
        self.file: IO[bytes] | None = None
        self._at = 0  # the position of the next read
        self._room = sys.maxsize if most is None else most
        self._open_file = open_file

    def write(self, data: bytes) -> None:
        """Append `data`. Raises OSError."""
        size = len(data)
        if self.file is None and size > self._room:
            if self._open_file is None:
                self.truncated = True
            else:
                self.file = self._open_file()
                _write(self.file, self.data)
        if self.file is not None:
            _write(self.file, data)
        self.size += size
        if size > self._room:
            data = data[: self._room]
        self._room -= len(data)
        if not self.data:
            self.data = data
        elif isinstance(self.data, bytearray):
            self.data += data
        else:
            self.data = bytearray(self.data + data)

    def read(self, size: int) -> bytes:
        """Return the next `size` unread bytes, or as many as there are.

        If there is a file, it must be unbuffered. Raises OSError.
        """
        if self.file is None:
            data = bytes(self.data[self._at : self._at + size])
        else:
            data = os.pread(self.file.fileno(), size, self._at)
        self._at += len(data)
        return data

    def rewind(self) -> None:
        """Read from the beginning again."""
        self._at = 0

    def close(self) -> None:
        """Close the file; `data` stays."""
        if self.file is not None:
            self.file.close()

    def state(self, keep: Callable[[int], int]) -> list[Any]:
        """Return the state that `restore` needs after this process has executed another program.

        `keep` keeps a descriptor open across the exec, and returns it.
        """
        file = None if self.file is None or self.file.closed else keep(self.file.fileno())
        return [self.data.hex(), self.size, self._at, file]

    def restore(self, state: list[Any]) -> None:
        """Restore a `state` into this new object, which is not `truncated`."""
        data, self.size, self._at, file = state
        self.data = bytearray.fromhex(data)
        self._room -= len(self.data)
        if file is not None:
            self.file = open(file, "w+b", buffering=0)  # opening by descriptor truncates nothing

    def text(self, encoding: str, errors: str) -> str:
        """Return `data` as text, as subprocess does, without an incomplete last character."""
        return to_text(self.data, encoding, errors, self.file is None and not self.truncated)


def _write(file: IO[bytes], data: bytes | bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def nameless_file() -> IO[bytes]:
    """Open a new file without a name or a buffer, in ``$TMPDIR`` or /tmp. Raises OSError."""
    directory = os.environ.get("TMPDIR") or "/tmp"
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:  # EISDIR: O_TMPFILE is not supported
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        path = os.path.join(directory, f"errand-boy-{os.urandom(16).hex()}")
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(path)
    [fd] = above_standard(fd)
    return open(fd, "w+b", buffering=0)


def coding(encoding: str | None, errors: str | None) -> tuple[str, str]:
    """Return the encoding and error handler that subprocess uses for these arguments."""
    if not encoding or encoding == "locale":
        encoding = io.TextIOWrapper(io.BytesIO()).encoding  # without the module locale
    return encoding, errors or "strict"


def to_text(data: bytes | bytearray, encoding: str, errors: str, is_whole: bool = True) -> str:
    """Return output as text, as subprocess does; unless it `is_whole`, drop a cut character."""
    if is_whole:
        text = data.decode(encoding, errors)
    else:
        from codecs import getincrementaldecoder  # noqa: PLC0415

        text = getincrementaldecoder(encoding)(errors).decode(bytes(data))
    return text.replace("\r\n", "\n").replace("\r", "\n")
