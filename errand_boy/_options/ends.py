"""How a command is ended: by which signals, after which times, and who gets them.

`stop` is a signal, or steps of a signal and seconds; `tree` says which processes get them. No I/O:
callers drive `course`, by blocking, by a hub, by a loop or by timers.
"""

from __future__ import annotations

import contextlib
import signal
import struct
from collections.abc import Generator, Mapping, Sequence

from errand_boy import _native
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from errand_boy._wire.stream import Stream

    Step: TypeAlias = tuple[int, float | None]
    Stop: TypeAlias = int | Sequence[int | tuple[int, float]]

_NAMES = ("stop", "tree", "drain", "dies_with_caller")
TREES = ("process", "group", "cgroup", "all")
KILL: tuple[Step, ...] = ((signal.SIGKILL, None),)

_PROCESS_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP
_SUPERVISE = struct.Struct("<BI")
_STOPS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT)
_MOST_DRAIN = 4e6  # seconds
_AFTERWARDS = 0.05  # seconds to read the output of a command that has been ended


class Ends:
    """How one command is ended. Raises ValueError and TypeError.

    `steps` are pairs of a signal and the seconds until the next one, or None for the last. `drain`
    is how many seconds to read output that descendants hold open after the command's end; None
    means no limit. `is_given`: one of them is set, so `communicate` ends the command at its
    time-out.
    """

    __slots__ = ("drain", "is_given", "steps", "tree")

    def __init__(self, stop: Any = None, tree: str | None = None, drain: Any = None) -> None:
        if tree is not None and tree not in TREES:
            raise ValueError(f"tree: {tree!r} is not one of {', '.join(TREES)}")
        if drain is not None and not 0 <= drain <= _MOST_DRAIN:
            raise ValueError(f"drain: {drain!r} is not a number of seconds")
        self.is_given = stop is not None
        self.steps = KILL if stop is None else steps(stop)
        self.tree = tree or "process"
        self.drain: float | None = drain

    @property
    def patience(self) -> float:
        """How many seconds to read the output of a command that has been ended."""
        return _AFTERWARDS if self.drain is None else self.drain

    def course(self, send: Callable[[int], Any]) -> Generator[float | None, bool, None]:
        """Send the signals in turn; yield the seconds to wait for the command's end after each.

        None means no limit. The caller sends whether the command has ended. Then the rest of the
        group or cgroup gets SIGKILL; the rest of the tree ends by itself.
        """
        for number, seconds in self.steps:
            send(number)
            if number not in _STOPS:
                send(signal.SIGCONT)  # a stopped process would not notice the signal
            if (yield seconds):
                break
        if self.tree in ("group", "cgroup"):
            send(signal.SIGKILL)


def of(given: Mapping[str, Any], tree: str = "process") -> Ends | None:
    """Return the Ends for these options, or None if none is set; `tree` is the default."""
    if not any(given.get(name) is not None for name in _NAMES):
        return None
    ends = Ends(given.get("stop"), given.get("tree") or tree, given.get("drain"))
    if ends.tree == "cgroup" and given.get("cgroup") is None:
        raise ValueError("tree='cgroup' needs a cgroup=")
    return ends


def signaller(stream: Stream, ends: Ends, given: Mapping[str, Any]) -> Callable[[int], Any]:
    """Return a function that sends signals to a streamed command, whose pid must be known."""
    pid = {"process": stream.pid, "all": lib.EB_WHOLE_TREE}.get(ends.tree, -stream.pid)
    flags = lib.EB_ENDS_GROUP if ends.tree == "group" else 0

    def send(number: int) -> None:
        if ends.tree == "cgroup":
            from errand_boy._options import cgroup  # noqa: PLC0415  only those who need it pay

            cgroup.signal_all(given["cgroup"], number)
        elif stream.ended is None:
            stream.signal(pid, number | flags)

    return send


def signal_left(pidfd: int, number: int) -> None:
    """Send a signal to the rest of a process group, given a pidfd of its leader.

    Somebody may have waited for the leader, and another group may have its number by now. This does
    nothing before Linux 6.9, which lacks the call.
    """
    with contextlib.suppress(OSError):
        _native.pidfd_send_signal(pidfd, number, _PROCESS_GROUP)


def steps(stop: Any) -> tuple[Step, ...]:
    """Return `stop` as steps. Raises ValueError and TypeError."""
    given: Sequence[Any] = (stop,) if isinstance(stop, (int, str)) else tuple(stop)
    result: list[Step] = []
    for position, step in enumerate(given):
        pair = step if isinstance(step, (tuple, list)) else (step, None)
        if len(pair) != 2 or not isinstance(pair[0], int):
            raise TypeError(
                f"stop: {step!r} is neither a signal, such as signal.SIGTERM, nor a pair of a "
                "signal and seconds"
            )
        number, seconds = pair
        if not 0 < number < signal.NSIG:
            raise ValueError(f"stop: {number!r} is not a signal")
        if seconds is None and position + 1 < len(given):
            raise ValueError(
                f"stop: {step!r} must be followed by the seconds until the next signal: "
                "((SIGTERM, 5), SIGKILL)"
            )
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise ValueError(f"stop: {seconds!r} is not a number of seconds")
        result.append((int(number), seconds))
        if number == signal.SIGKILL:  # nothing can come after it
            break
    if not result:
        raise ValueError("stop: at least one signal is needed")
    number, seconds = result[-1]
    if number == signal.SIGKILL:
        result[-1] = number, None
    elif seconds is not None:
        result.extend(KILL)
    return tuple(result)


def is_supervised(given: Mapping[str, Any]) -> bool:
    """Return whether the command has a supervisor, so that a helper must own it."""
    return given.get("tree") == "all" or bool(given.get("dies_with_caller"))


def encode(given: Mapping[str, Any]) -> bytes | None:
    """Return the value of the option SUPERVISE, or None. Raises ValueError and TypeError."""
    ends = of(given)
    if ends is None or not is_supervised(given):
        return None
    return _SUPERVISE.pack(ends.tree == "all", round((ends.drain or 0) * 1000))
