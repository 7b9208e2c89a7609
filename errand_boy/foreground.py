"""One command in the foreground of a terminal: `errand-boy run`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import errand_boy

# What a supervisor or a user sends to one process; the terminal sends its own to the whole group.
_FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)


def run(argv: Sequence[str]) -> int:
    """Run a command; return its status as a shell gives it: 128 + n for an end by signal n."""
    early: list[int] = []
    # What is ignored (nohup, a shell's background job) stays so, for the command too.
    forwarded = [n for n in _FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    for number in forwarded:
        signal.signal(number, lambda number, frame: early.append(number))
    try:
        process = errand_boy.Popen(argv)
    except OSError as error:
        print(f"errand-boy: {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    # Only now, since the child inherits the mask.
    awaited = {*forwarded, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    for early_one in early:
        process.send_signal(early_one)
    while process.poll() is None:
        # No SIGCHLD where the helper owns the child; there the time-out finds its end.
        info = signal.sigtimedwait(awaited, 0.1)
        # A positive code: the kernel's, for the terminal, which has told the child too.
        if info is not None and info.si_signo != signal.SIGCHLD and info.si_code <= 0:
            process.send_signal(info.si_signo)
    status: int = process.returncode
    return status if status >= 0 else 128 - status
