"""Commands that are started in this process, without a helper: the default way.

`spawn(owner, options, stdin, stdout, stderr, others, carried, flags, microseconds)` begins a start,
with the fields of a Request, and waits for its outcome, for so long at most, without giving up the
GIL. As soon as there is a process, the owner's `pid` and `_child_created` say so. It returns

- None if the program runs;
- ``(errno, stage, member)`` if it does not: nothing is left to be waited for;
- the start, of a type of its own, if that is pending: the program is slow to execute, or a signal
  has come.

`await_spawn(owner, start, microseconds)` waits on, without the GIL, and returns the same. It may
return early, where a signal has come. `leave_spawn(start)` must be called once for each that has
been pending, whatever came of it; one that is dropped is left.
"""

from __future__ import annotations

from errand_boy import _native
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

# How long (microseconds) a start keeps the GIL, and an event loop, at most. An exec takes 60, and a
# busy thread keeps the GIL for 5,000, sys.getswitchinterval(). A wait for less than the time to the
# kernel's next tick sets a timer, which costs 25 in a virtual machine.
PATIENCE_US = 5000
LOOP_PATIENCE_US = 200

spawn: Callable[..., Any] = _native.spawn
await_spawn: Callable[[Any, object, int], Any] = _native.await_spawn
leave_spawn: Callable[[object], None] = _native.leave_spawn


def pauses() -> Iterator[float]:
    """Return how long (seconds) an event loop waits between looks at a pending start."""
    pause = 0.0005
    while True:
        yield pause
        pause = min(pause * 1.25, 0.02)


def _look() -> str | None:
    if not lib.EB_HAVE_RAW:
        return "errand-boy can't use clone(2) on this processor, only on x86-64 and aarch64"
    if not lib.eb_direct_works():
        return "close_range(2) is missing or forbidden here: it came with Linux 5.9"
    return None


_missing = _look()  # a filter that comes later is met by a start


def missing() -> str | None:
    """Return what the system lacks or forbids, in words; None for nothing, as far as is known."""
    return _missing


def works() -> bool:
    """Return whether the system has all that is needed, as far as that is known."""
    return _missing is None


def give_up() -> None:
    """Take note that a start has met a kernel or a filter that lacks something."""
    global _missing
    _missing = "a seccomp filter forbids clone(2) or close_range(2)"
