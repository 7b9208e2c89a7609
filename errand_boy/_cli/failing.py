"""When `errand-boy map` runs a command again, goes on after a failure, or ends."""

from __future__ import annotations

import argparse

from errand_boy._cli.parsing import UsageError, duration, number
from errand_boy._map.policy import Halt, Retries, Timeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from errand_boy._cli.inputs import Source


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("when commands fail")
    group.add_argument(
        "--timeout",
        type=_timeout,
        metavar="TIME",
        help="kill a command's process group after TIME (90, 1.5s, 500ms, 2m, 1h) or a "
        "share of the median duration of the others (200%%); the command then counts as failed",
    )
    group.add_argument(
        "--retries",
        type=number(int, 0),
        metavar="N",
        help="run a command up to N times until it succeeds; 0: without a limit",
    )
    group.add_argument(
        "--retry-delay",
        type=duration,
        metavar="TIME",
        default=0.0,
        help="wait TIME before the second run, twice as long before the third, and so on, up to a "
        "minute",
    )
    group.add_argument(
        "--halt",
        default="never",
        metavar="POLICY",
        help="when to end early: never (the default); soon,fail=N, to start no more commands when "
        "N have failed; now,fail=N, to end the running ones too. success=N counts those that "
        "succeed, done=N all that end. N%% is a share of all commands if their number is known, "
        "else of at least three that have ended",
    )
    group.add_argument(
        "--joblog",
        metavar="FILE",
        help="write a line to FILE when a command ends: GNU parallel's columns, and the peak "
        "resident set in KiB",
    )
    group.add_argument(
        "--resume", action="store_true", help="skip the commands whose numbers are in the job log"
    )
    group.add_argument(
        "--resume-failed",
        action="store_true",
        help="the same, but run failed commands again",
    )


def _timeout(text: str) -> float | str:
    if not text.endswith("%"):
        return duration(text)
    try:
        Timeout(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def retries(options: argparse.Namespace) -> Retries | None:
    """Return the Retries that the options ask for."""
    if options.retries is None:
        return None
    most = options.retries - 1 if options.retries else float("inf")
    return Retries(most, delay=options.retry_delay)


def halt(options: argparse.Namespace) -> Halt:
    """Return the Halt that the options ask for. Raises UsageError."""
    try:
        return Halt(options.halt)
    except ValueError as error:
        raise UsageError(error) from None


def set_total(policy: Halt, source: Source) -> None:
    """Set the number of commands in `policy`; read all of the input if it needs the number."""
    if policy.needs_total:
        source.read_all()
    policy.total = source.total
    if policy.needs_total and policy.total is None:
        raise UsageError("--halt done=N% needs a known number of commands")
