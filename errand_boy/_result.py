"""What becomes of a command of `map`."""

from __future__ import annotations

import subprocess
import time

from errand_boy import _wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any

    from errand_boy._stream import Ended


class Result(subprocess.CompletedProcess):  # type: ignore[type-arg]
    """What became of one command of `map`.

    `args`, `returncode`, `stdout` and `stderr` are those of subprocess.CompletedProcess, and

    `index`: which command it was, from 0.
    `error`: None, or why there is no ordinary end: the OSError or ValueError for which the command
    could not be started (`returncode` is then 127 if it was not found, else 126),
    subprocess.TimeoutExpired, UnicodeError (the output is then bytes), or HelperDiedError
    (`returncode` is then -9, and may not be the command's).
    `started`: seconds since 1970, and `duration`: seconds from the start to the end.
    `rusage`: a resource.struct_rusage, or None if it did not end by itself or by a signal.
    `truncated`: whether output is missing, for `max_output`.
    `stdout_file`, `stderr_file`: where all output is, if it was spooled; temporary files.
    """

    index = 0
    error: Exception | None = None
    duration = 0.0
    truncated = False
    stdout_file: Any = None
    stderr_file: Any = None
    _begun = 0.0  # of the monotonic clock
    _end: Ended | None = None

    @property
    def started(self) -> float:
        """When the command was started."""
        return time.time() - time.monotonic() + self._begun

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What the command, and the children it waited for, have used."""
        return None if self._end is None else _wire.rusage(self._end.usage)

    def check_returncode(self) -> None:
        """Raise `error`, or CalledProcessError if the return code is not 0."""
        if self.error is not None:
            raise self.error
        super().check_returncode()
