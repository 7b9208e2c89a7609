"""Shows what the daemon is doing: `errand-boy status`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from errand_boy._cli.parsing import Parser, add_socket, duration
from errand_boy._cli.waiting import said
from errand_boy._wire import address as _address, status


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog,
        description="Show what the daemon is doing: its helpers, its live commands, totals, and "
        "how long starts take. The exit status is 1 if no daemon answers.",
    )
    add_socket(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="write JSON, for programs")
    form.add_argument("--metrics", action="store_true", help="write Prometheus's text format")
    form.add_argument(
        "--watch",
        nargs="?",
        type=_interval,
        const=1.0,
        metavar="TIME",
        help="show a live screen, with rates, updated every TIME (default: 1s); needs rich",
    )
    return parser


def _interval(text: str) -> float:
    return max(0.05, duration(text))


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Show the status; return the exit status."""
    options = parser.parse_args(arguments)
    address = _address.find(options.socket)
    if options.watch is not None:
        from errand_boy._cli import watch  # noqa: PLC0415

        return watch.run(address, options.watch)
    try:
        with said(f"waiting for the daemon on {address.path}"):
            value = status.fetch(address)
    except status.NoAnswerError as error:
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(value, indent=2))
    else:
        sys.stdout.write(status.metrics(value) if options.metrics else status.table(value))
    return 0
