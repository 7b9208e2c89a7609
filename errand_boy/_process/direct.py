"""Commands that are started in this process, without a helper: the default way.

`spawn(owner, options, stdin, stdout, stderr, others, carried, flags, microseconds)` begins a start
with the fields of a Request. It waits for the outcome, for at most so many microseconds, without
releasing the GIL. As soon as there is a process, it sets the owner's `pid` and `_child_created`. It
returns

- None if the program runs;
- ``(errno, stage, member)`` if the start failed; there is no child to wait for;
- a start object if the start is pending, because the exec is slow or a signal has arrived.

`await_spawn(owner, start, microseconds)` goes on waiting, without the GIL, and returns the same. It
may return early after a signal. `leave_spawn(start)` must be called once for each pending start,
whatever its outcome; the destructor of the start object calls it too.
"""

from __future__ import annotations

from errand_boy import _native
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

# The longest time in microseconds that a start keeps the GIL, or an event loop. An exec takes 60,
# and a busy thread keeps the GIL for 5,000 (sys.getswitchinterval()). A wait that ends before the
# kernel's next tick sets a timer, which costs 25 in a virtual machine.
PATIENCE_US = 5000
LOOP_PATIENCE_US = 200

spawn: Callable[..., Any] = _native.spawn
await_spawn: Callable[[Any, object, int], Any] = _native.await_spawn
leave_spawn: Callable[[object], None] = _native.leave_spawn


def pauses() -> Iterator[float]:
    """Yield the seconds that an event loop waits between checks of a pending start."""
    pause = 0.0005
    while True:
        yield pause
        pause = min(pause * 1.25, 0.02)


WITHOUT_C: str | None = getattr(_native, "WITHOUT_C", None)  # why it is not the extension


def _look() -> str | None:
    if WITHOUT_C is not None:
        return WITHOUT_C
    if not lib.EB_HAVE_RAW:
        return "errand-boy can't use clone(2) on this processor, only on x86-64 and aarch64"
    if not lib.eb_direct_works():
        return "close_range(2) is missing or forbidden here: it came with Linux 5.9"
    return None


_missing = _look()  # a filter that is installed later makes a start fail, see give_up


def missing() -> str | None:
    """Return in words what the system lacks or forbids, or None, as far as is known."""
    return _missing


def works() -> bool:
    """Return whether the system has everything that is needed, as far as is known."""
    return _missing is None


def give_up() -> None:
    """Record that a start failed because the kernel or a filter refuses what it needs."""
    global _missing
    _missing = "a seccomp filter forbids clone(2) or close_range(2)"
