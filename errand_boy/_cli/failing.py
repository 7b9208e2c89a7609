"""When `errand-boy map` goes on after a command that failed, and when it ends."""

from __future__ import annotations

from errand_boy._cli.parsing import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("failing and going on")
    group.add_argument(
        "--timeout",
        type=number(float, 0),
        metavar="SECONDS",
        help="kill a command's process group after that; it has failed",
    )
    group.add_argument(
        "--halt",
        default="never",
        metavar="POLICY",
        help="when to end early: never (the default), soon,fail=N (take no more input when N have "
        "failed) or now,fail=N (end what runs too); success=N counts the others; N%% is a share of "
        "those that have ended, of which there must be three",
    )
    group.add_argument(
        "--joblog",
        metavar="FILE",
        help="a line for each command, at its end: GNU parallel's columns, and the peak resident "
        "set in KiB",
    )
    group.add_argument(
        "--resume", action="store_true", help="skip the commands whose numbers the job log has"
    )
    group.add_argument(
        "--progress",
        action="store_true",
        help="show a bar, if standard error is a terminal and tqdm is installed",
    )
