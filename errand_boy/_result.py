"""The results of `map`."""

from __future__ import annotations

import subprocess
import time
from collections import deque

from errand_boy import _wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import IO, Any

    from typing_extensions import TypeVar

    from errand_boy._limits import Tracker
    from errand_boy._stream import Ended

    OutputT = TypeVar("OutputT", default=Any)  # str or bytes
else:
    OutputT = str  # typing takes milliseconds to import


class Result(subprocess.CompletedProcess[OutputT]):
    """How one command of `map` ended.

    It has `args`, `returncode`, `stdout` and `stderr` as subprocess.CompletedProcess, and

    - `index`: which command it was, from 0; `slot`: which of those that run at the same time,
      from 1.
    - `runs`: how often it was run. That is more than once with `retries`, or if Celery gave it to
      another worker when one had gone; all else is about the last run.
    - `host`: with `on` that of the worker, else None.
    - `error`: None, or why the command has no ordinary end: the OSError or ValueError of its start
      (`returncode` is then 127 if it was not found, else 126); subprocess.TimeoutExpired;
      UnicodeError (the output then has escapes for what can't be decoded, the error's `object` has
      the bytes, and `returncode` is 125 if it would be 0); or HelperDiedError (`returncode` is then
      -9, and may not be the command's).
    - `started`, in seconds since 1970, and `duration`, in seconds from the start to the end.
    - `rusage`: a resource.struct_rusage, or None if it did not end by itself or by a signal.
    - `cause` and `peak_memory`, as Popen has them; None if it was not started.
    - `truncated`: whether output is missing because of `max_output`.
    - `stdout_file`, `stderr_file`: temporary files with all of the output, if it was spooled.
    """

    index: int = 0
    slot: int = 0
    runs: int = 1
    host: str | None = None
    error: Exception | None = None
    duration: float = 0.0
    truncated: bool = False
    stdout_file: IO[bytes] | None = None
    stderr_file: IO[bytes] | None = None
    _begun = 0.0  # of the monotonic clock
    _end: Ended | None = None
    _limited: Tracker | None = None

    def __repr__(self) -> str:
        if self.error is None:
            return super().__repr__()
        return f"{super().__repr__()[:-1]}, error={self.error!r})"

    @property
    def failed(self) -> bool:
        """Whether it failed, so that check_returncode() raises an exception."""
        return self.returncode != 0 or self.error is not None

    @property
    def started(self) -> float:
        """When the command was started, in seconds since 1970."""
        return time.time() - time.monotonic() + self._begun

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What the command and the children that it waited for have used."""
        return None if self._end is None else _wire.rusage(self._end.usage, self._end.tree)

    @property
    def cause(self) -> str | None:
        """Why the command ended: "exit", "signal", "timeout", or the limit that it exceeded."""
        if isinstance(self.error, subprocess.TimeoutExpired):
            return "timeout"
        if self._end is None:
            return None
        if self._limited is not None:
            found = self._limited.cause(self._end.returncode, self._end.tree)
            if found is not None:
                return found
        return "exit" if self._end.returncode >= 0 else "signal"

    @property
    def peak_memory(self) -> int | None:
        """The most memory that the command had, in bytes."""
        if self._limited is not None and self._end is not None:
            peak = self._limited.peak_memory(self._end.tree)
            if peak is not None:
                return peak
        rusage = self.rusage
        return None if rusage is None else rusage.ru_maxrss * 1024

    @property
    def limits_by(self) -> str | None:
        """What enforced its limits: "rlimits" with a supervisor, or None if it had no limits."""
        return None if self._limited is None else "rlimits"

    def close(self) -> None:
        """Close the temporary files, if there are any."""
        for file in (self.stdout_file, self.stderr_file):
            if file is not None:
                file.close()

    def check_returncode(self) -> None:
        """Raise `error`, or CalledProcessError if the return code is not 0."""
        if self.error is not None:
            raise self.error
        super().check_returncode()


class Results:
    """The results that nobody has taken yet, in the order of the commands or of their ends."""

    def __init__(self, ordered: bool) -> None:
        self.taken = 0
        self._following = 0  # index of what comes next
        self._by_index: dict[int, Result] | None = {} if ordered else None
        self._done: deque[Result] = deque()

    def put(self, result: Result) -> None:
        """Add one."""
        if self._by_index is None:
            self._done.append(result)
        else:
            self._by_index[result.index] = result

    def take(self, with_gaps: bool) -> Result | None:
        """Remove and return the next, if it is there; `with_gaps`: some never come."""
        if self._by_index is None:
            if not self._done:
                return None
            result = self._done.popleft()
        elif self._following in self._by_index:
            result = self._by_index.pop(self._following)
        elif with_gaps and self._by_index:
            result = self._by_index.pop(min(self._by_index))
        else:
            return None
        self._following = result.index + 1
        self.taken += 1
        return result
