"""Says on a terminal what a command waits for, if that takes long."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SILENCE = 2.0  # seconds until it is said


@contextmanager
def said(text: str) -> Iterator[None]:
    """Write `text` to standard error, a terminal, if the block takes longer than two seconds.

    This needs SIGALRM, and does nothing if somebody else uses it. A thread would take the signals
    that `errand-boy run` waits for.
    """

    def say(number: int, frame: object) -> None:
        print(f"errand-boy: {text}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty() or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGALRM, say)
    signal.setitimer(signal.ITIMER_REAL, _SILENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
