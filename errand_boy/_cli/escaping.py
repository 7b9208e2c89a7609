"""Output of another user's program, for a terminal that is not to obey it."""

from __future__ import annotations

import codecs
import os
import select
import sys

from errand_boy._jobs.blocking import Job


def is_anothers(job: Job) -> bool:
    """Return whether somebody else has started the job."""
    return job.uid != os.geteuid()


class Escaper:
    """Shows control characters of a stream as escape sequences of Python, but for ends of lines.

    So are bytes that are no UTF-8, and what is invisible or turns the direction of writing.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""  # "\r", which may be the first half of the end of a line

    def take(self, data: bytes) -> bytes:
        """Return what to write in place of the next piece; b"" stands for the end of the stream."""
        text = self._held + self._decoder.decode(data, final=not data)
        self._held = "\r" if data and text.endswith("\r") else ""
        text = text.removesuffix(self._held).replace("\r\n", "\n")
        shown = "".join(map(_shown, text))
        return shown.encode(sys.stdout.encoding, "backslashreplace")


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode("ascii")


class Writer:
    """Writes output of a job to standard output and standard error. Raises OSError."""

    def __init__(self, job: Job, *, raw: bool) -> None:
        escapes = is_anothers(job) and not raw
        self._escapers = {fd: Escaper() for fd in (1, 2) if escapes and os.isatty(fd)}

    def write(self, stream: int, data: bytes) -> None:
        """Write all of a piece, as the terminal may have it."""
        escaper = self._escapers.get(stream)
        write_all(stream, data if escaper is None else escaper.take(data))

    def close(self) -> None:
        """Write the rest; nothing more comes."""
        for stream in self._escapers:
            self.write(stream, b"")


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, also to a non-blocking descriptor. Raises OSError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select([], [fd], [])
