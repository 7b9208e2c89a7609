"""The results of `map`."""

from __future__ import annotations

import subprocess
import time
from collections import deque

from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import IO, Any

    from typing_extensions import TypeVar

    from errand_boy._process.tracker import Tracker
    from errand_boy._wire.stream import Ended

    OutputT = TypeVar("OutputT", default=Any)  # str or bytes
else:
    OutputT = str  # typing takes milliseconds to import


class Result(subprocess.CompletedProcess[OutputT]):
    """The result of one command of `map`: a subprocess.CompletedProcess with more attributes.

    - `index`: the number of the command, from 0; `slot`: its number among those that ran at the
      same time, from 1.
    - `runs`: how often the command was run. It is more than once with `retries`, or if Celery gave
      it to another worker because one disappeared; all else is about the last run.
    - `host`: with `on` the worker's host, else None.
    - `error`: None, or why the command did not end normally: the OSError or ValueError of its start
      (`returncode` is then 127 if it was not found, else 126); subprocess.TimeoutExpired;
      UnicodeError (undecodable output then has escapes, the error's `object` has the bytes, and
      `returncode` is 125 if it would be 0); or HelperDiedError (`returncode` is then -9, and may
      not be the command's).
    - `started`, in seconds since 1970, and `duration`, in seconds from the start to the end.
    - `rusage`: a resource.struct_rusage, or None if the command's end is not known.
    - `cause` and `peak_memory`, as in Popen; None if the command was not started.
    - `truncated`: whether output is missing because of `max_output`.
    - `stdout_file`, `stderr_file`: temporary files with the full output, if it was spooled.
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
    _place = 1  # as the helper tells

    def __repr__(self) -> str:
        if self.error is None:
            return super().__repr__()
        return f"{super().__repr__()[:-1]}, error={self.error!r})"

    @property
    def failed(self) -> bool:
        """Whether the command failed, so that check_returncode() raises an exception."""
        return self.returncode != 0 or self.error is not None

    @property
    def started(self) -> float:
        """When the command started, in seconds since 1970."""
        return time.time() - time.monotonic() + self._begun

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """The resources used by the command and the children that it has waited for."""
        return None if self._end is None else frames.rusage(self._end.usage, self._end.tree)

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
        """The peak memory of the command, in bytes."""
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
        self._following = 0  # index of the next result
        self._by_index: dict[int, Result] | None = {} if ordered else None
        self._done: deque[Result] = deque()

    def put(self, result: Result) -> None:
        """Add one."""
        if self._by_index is None:
            self._done.append(result)
        else:
            self._by_index[result.index] = result

    def drop(self, index: int) -> None:
        """Do without a result that has not been taken, whether it is here or not."""
        self._done = deque(result for result in self._done if result.index != index)
        self.taken += 1

    def take(self, with_gaps: bool) -> Result | None:
        """Remove and return the next result, or None. `with_gaps`: some will never come."""
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
