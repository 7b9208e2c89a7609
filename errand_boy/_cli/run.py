"""Runs one command in the foreground of a terminal: `errand-boy run`."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import errand_boy
from errand_boy._cli.parsing import message
from errand_boy._cli.waiting import said
from errand_boy._client import client as _client
from errand_boy._process import popen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    from errand_boy._jobs.blocking import JobResult

_EXPIRED = 124  # the exit status

# Signals that a supervisor or a user sends to one process. The terminal's go to the whole group.
_FORWARDED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
}
# The daemon's commands are not in this session, so the terminal stops only this process.

_JOB_CONTROL = {signal.SIGTSTP, signal.SIGCONT}


def run(
    argv: Sequence[str],
    socket: str | Literal[False] | None = None,
    options: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    stats: str | None = None,
    *,
    classic: bool = False,
) -> int:
    """Run a command; return its exit status as a shell does: 128 + n after signal n.

    After `timeout` seconds the command is ended, and the status is 124, as for timeout(1). The
    status is also 124 after the limit `wall`.

    The daemon at `socket` or at ``$ERRAND_BOY_SOCKET`` runs the command; without both, the daemon
    at a default path. If none listens there, or if `socket` is False, the command is a child of
    this process.

    `options` are Popen's. `stats` is the format for the usage on standard error, or None.
    `classic`: look for the daemon where those of 2014 listen.
    """
    early: list[int] = []
    # Signals that are ignored (nohup, a shell's background job) stay ignored, in the command too.
    candidates = _FORWARDED | _JOB_CONTROL
    forwarded = {n for n in candidates if signal.getsignal(n) is not signal.SIG_IGN}
    for number in forwarded:
        signal.signal(number, lambda number, frame: early.append(number))

    def block_signals() -> dict[str, Any]:
        """Prepare for a child of our own; return its options."""
        for number in _JOB_CONTROL & forwarded:
            signal.signal(number, signal.SIG_DFL)
        # As soon as there is a child, the terminal signals it too, and a handler can't tell that.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*forwarded - _JOB_CONTROL, signal.SIGCHLD})
        mask = (options or {}).get("signals_blocked", mask)
        # This becomes the option signals_blocked, except where only a fork can do it.
        return {"preexec_fn": partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask)}

    process = start(argv, socket, block_signals, classic=classic, **(options or {}))
    if isinstance(process, int):
        return process
    if not isinstance(process, _client.Popen):
        forwarded -= _JOB_CONTROL
    awaited = {*forwarded, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    failures: list[OSError] = []
    expired = threading.Event()
    arguments = [process, failures, timeout, expired]
    waiter = threading.Thread(target=_await_end, args=arguments, daemon=True)
    waiter.start()
    for early_one in early:
        _forward(process, early_one)
    while process.returncode is None:
        info = signal.sigwaitinfo(awaited)
        # A positive code means the terminal, which has also sent the signal to our own child.
        by_terminal = info.si_code > 0 and not isinstance(process, _client.Popen)
        if info.si_signo != signal.SIGCHLD and not by_terminal:
            _forward(process, info.si_signo)
    waiter.join()
    for failure in failures:
        print(f"errand-boy: {message(failure)}", file=sys.stderr)
        return 125
    if stats is not None:
        from errand_boy._cli.stats import show  # noqa: PLC0415

        show(process, argv, stats, "timeout" if expired.is_set() else process.cause)
    elif not expired.is_set():
        tell_limit(process, argv)
    return _EXPIRED if expired.is_set() else exit_status(process)


# For each cause of an end by a limit, the limit; errand-boy map alone has one of the output.
_LIMITS = {
    "timeout": "wall",
    "cpu": "cpu",
    "memory": "memory",
    "processes": "processes",
    "output": "file_size",
}


def tell_limit(process: popen.Popen[Any], argv: Sequence[str]) -> None:
    """Write to standard error which limit the ended command exceeded, if it exceeded one."""
    limit = _LIMITS.get(process.cause or "")
    if limit is not None:
        print(f"errand-boy: {shlex.quote(argv[0])}: exceeded its limit {limit}", file=sys.stderr)


def exit_status(ended: popen.Popen[Any] | JobResult) -> int:
    """Return the exit status for a command that has ended."""
    if ended.cause == "timeout":  # its limit, wall
        return _EXPIRED
    status: int = ended.returncode
    return status if status >= 0 else 128 - status


def start(
    argv: Sequence[str],
    socket: str | Literal[False] | None,
    prepare: Callable[[], Mapping[str, Any]] = dict,
    *,
    classic: bool = False,
    **options: Any,
) -> popen.Popen[Any] | int:
    """Start a command as `run` does; return its process object.

    `prepare` is called right before the start of a child of this process, and returns options for
    it. If the start fails, write the reason to standard error, and return the exit status.
    """
    try:
        if socket is not False:
            client = _client.connect(socket, classic=classic)
            try:
                with said(f"waiting for the daemon on {client.address.path} to start {argv[0]}"):
                    return client.Popen(argv, **options)
            except errand_boy.NoDaemonError:
                # A user who names a daemon wants its rights and limits, not those of this process.
                if not client.address.is_default:
                    raise
        return popen.Popen(argv, **{**prepare(), **options})
    except (OSError, ValueError) as error:
        return failure(error, argv, options)


def failure(error: OSError | ValueError, argv: Sequence[str], options: Mapping[str, Any]) -> int:
    """Write the reason for a failed start to standard error; return the exit status."""
    if not isinstance(error, OSError):
        print(f"errand-boy: {error}", file=sys.stderr)
        return 125
    if isinstance(error, errand_boy.ErrandBoyError):
        print(f"errand-boy: {message(error)}", file=sys.stderr)
        return 125
    named = os.fsdecode(error.filename or argv[0])  # perhaps a directory that an option names
    missing = isinstance(error, FileNotFoundError) and named == argv[0]
    hint = ""
    if missing and len(argv) == 1 and len(named.split()) > 1:
        hint = "; this is one word: write the command without the quotes around it"
    elif isinstance(error, PermissionError) and named == argv[0] and options.get("sandbox"):
        hint = "; in the sandbox, programs need --sandbox system=yes or execute=PATH"
    elif error.errno == errno.EPERM and not options.keys().isdisjoint(("user", "group")):
        hint = "; --user and --group need root's rights"
    print(f"errand-boy: {shlex.quote(named)}: {error.strerror}{hint}", file=sys.stderr)
    return 127 if missing and error.filename is not None else 126


def _await_end(
    process: popen.Popen[Any],
    failures: list[OSError],
    timeout: float | None,
    expired: threading.Event,
) -> None:
    try:
        if timeout is not None:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                expired.set()
                process.stop()
        process.wait()
    except OSError as error:
        failures.append(error)
    # The kernel sends SIGCHLD only for our own child, and maybe before this wait.
    os.kill(os.getpid(), signal.SIGCHLD)


def _forward(process: popen.Popen[Any], number: int) -> None:
    if not isinstance(process, _client.Popen):
        process.send_signal(number)
        return
    process.send_group_signal(number)
    if number == signal.SIGTSTP:
        os.kill(os.getpid(), signal.SIGSTOP)
