"""`map`'s policies: running failed commands again, ending early, and time-outs. No I/O."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from errand_boy._map.result import Result

_LEAST_ENDED = 3  # commands that must have ended before a share or a median counts
_MOST_DURATIONS = 999  # in a median


class Retries:
    """How often and when `map` runs a failed command again.

    - `most`: how many more runs there may be after the first.
    - `delay`: seconds from the failure to the next run. After each further failure it is `factor`
      times as long, but at most `longest` seconds.
    - `jitter`: the random share of a delay, from 0 to 1.
    - `only_if`: a function that is called with the Result, and returns whether to run again.

    Raises ValueError for a negative number, and for a `jitter` above 1.
    """

    __slots__ = ("_only_if", "_times", "most")

    def __init__(
        self,
        most: float,
        *,
        delay: float = 0.0,
        factor: float = 2.0,
        longest: float = 60.0,
        jitter: float = 0.0,
        only_if: Callable[[Result], bool] | None = None,
    ) -> None:
        if not most >= 0:
            raise ValueError("most must not be negative")
        if not (delay >= 0 and longest >= 0 and factor > 0 and 0 <= jitter <= 1):
            raise ValueError("delay and longest are seconds, factor is positive, jitter 0 to 1")
        self.most: float = most
        self._times = delay, factor, longest, jitter
        self._only_if = only_if

    def delay(self, runs: int, result: Result) -> float | None:
        """Return the seconds to wait after this many runs, or None not to run again."""
        if runs > self.most or not (self._only_if is None or self._only_if(result)):
            return None
        seconds, factor, longest, jitter = self._times
        try:
            seconds *= factor ** (runs - 1)
        except OverflowError:
            seconds = longest
        seconds = min(seconds, longest)
        if not jitter:
            return seconds
        from random import random  # noqa: PLC0415  it takes milliseconds to import

        return seconds - seconds * jitter * random()


def retries(given: int | Retries | None) -> Retries | None:
    """Return the `retries` of `map` as a Retries or None. Raises TypeError and ValueError."""
    if given is None or isinstance(given, Retries):
        return given
    if not isinstance(given, (int, float)):
        raise TypeError(f"retries must be a number or a Retries, not {given!r}")
    return Retries(given)


class Halt:
    """When to start no more commands (soon), or also to end the running ones (now).

    `policy` is ``never``; or ``soon`` or ``now``, a comma, and ``fail=N``, ``success=N`` or
    ``done=N``: when N commands have failed, have succeeded, or have ended. ``N%`` is a share of all
    commands if their number is known, else of at least three that have ended.
    Raises ValueError for any other policy.
    """

    def __init__(self, policy: str) -> None:
        pattern = r"never|(soon|now),(fail|success|done)=([1-9][0-9]*)(%?)"
        match = re.fullmatch(pattern, policy) if isinstance(policy, str) else None
        if match is None or (match[4] and int(match[3]) > 100):
            raise ValueError(
                f"halt={policy} is not never, soon,fail=N or now,fail=N; nor with success, done, N%"
            )
        self._when, self._what, count, self._percent = match.groups()
        self._count = int(count or 0)
        self._ended = self._counted = 0
        self.never = self._when is None
        self.total: int | None = None  # the number of commands, if known
        self.due: str | None = None  # "soon" or "now", once the condition holds
        self.result: Result | None = None  # the one that made it due

    @property
    def needs_total(self) -> bool:
        """Whether the policy needs `total`."""
        return bool(self._percent) and self._what == "done"

    def count(self, result: Result) -> None:
        """Count a command that has ended."""
        self._ended += 1
        if self.never or self.due:
            return
        if self._what != "done" and result.failed != (self._what == "fail"):
            return
        self._counted += 1
        if not self._percent:
            due = self._counted >= self._count
        elif self.total is not None:
            due = self._counted * 100 >= self._count * self.total
        else:
            due = self._ended >= _LEAST_ENDED and self._what != "done"
            due = due and self._counted * 100 >= self._count * self._ended
        if due:
            self.due = self._when
            self.result = result


class Median:
    """The median of the last durations, in seconds."""

    def __init__(self) -> None:
        self._sorted: list[float] = []
        self._in_turn: deque[float] = deque()

    def add(self, duration: float) -> None:
        """Add a duration."""
        if len(self._in_turn) == _MOST_DURATIONS:
            del self._sorted[bisect_left(self._sorted, self._in_turn.popleft())]
        self._in_turn.append(duration)
        insort(self._sorted, duration)

    def get(self) -> float | None:
        """Return the median, or None while there are too few durations."""
        size = len(self._sorted)
        return self._sorted[size // 2] if size >= _LEAST_ENDED else None


class Timeout:
    """A `timeout` such as ``"200%"``, relative to the median of the other commands' durations.

    Raises ValueError for anything but a percentage.
    """

    def __init__(self, percent: str) -> None:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", percent)
        if match is None:
            raise ValueError(f"timeout={percent!r} is neither seconds nor a percentage")
        self._share = float(match[1]) / 100
        self._median = Median()

    def count(self, duration: float) -> None:
        """Add the duration of a command that ended by itself."""
        self._median.add(duration)

    @property
    def seconds(self) -> float | None:
        """The current time-out, or None while too few commands have ended."""
        median = self._median.get()
        return None if median is None else self._share * median
