"""How many commands `errand-boy map` runs at once."""

from __future__ import annotations

import os
import re
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_JOBS = re.compile(r"\s*([+-]?)([0-9]+)(%?)\s*")
_OTHERS = 64  # descriptors that are not for connections
_MOST = 1 << 14
DEFAULT = "100%"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("how many at once")
    group.add_argument(
        "-j",
        "--jobs",
        "-P",
        "--max-procs",
        metavar="N",
        help="how many commands run at a time: N; N more (+N) or fewer (-N) than there are CPUs; "
        "N%% of the CPUs; as many as possible (0); or a file with one of these, which is read "
        "again when a command ends (default: 100%%)",
    )


def parse(text: str) -> int:
    """Return the number of commands at a time for the value of -j. Raises ValueError."""
    match = _JOBS.fullmatch(text)
    if match is None or (match[1] and match[3]):
        raise ValueError(f"{text.strip()} is not a number of commands: N, +N, -N, N% or a file")
    sign, number, percent = match[1], int(match[2]), match[3]
    cpus = len(os.sched_getaffinity(0))
    if percent:
        return max(1, cpus * number // 100)
    if sign:
        return max(1, cpus + int(sign + match[2]))
    if not number:
        return max(1, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHERS))
    return number


class Jobs:
    """The number of commands at a time, from the value of -j. Raises ValueError and OSError."""

    def __init__(self, text: str) -> None:
        self.path: str | None = None
        self._seen: tuple[int, int] | None = None
        try:
            self.count = parse(text)
        except ValueError:
            if not os.path.exists(text):
                raise
            self.path = text
            self.count = 0
            self.read()
            if not self.count:
                raise ValueError(f"{text} contains no number of commands") from None

    def read(self) -> bool:
        """Read the file again if it has changed; return whether the number has changed.

        If the file is missing or has no number, nothing changes: somebody may be writing it.
        """
        assert self.path is not None
        before = self.count
        try:
            info = os.stat(self.path)
            seen = (info.st_mtime_ns, info.st_ino)
            if seen != self._seen:
                with open(self.path) as file:
                    self.count = parse(file.read(100))
                self._seen = seen
        except (OSError, ValueError):
            return False
        return self.count != before
