"""The command ``errand-boy``: arguments only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import errand_boy
from errand_boy import foreground

def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="errand-boy", description="Start commands without forking the process that wants them."
    )
    parser.add_argument("--version", action="version", version=errand_boy.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run one command, with this terminal, and exit with its status",
        usage="errand-boy run [-h] [--] COMMAND [ARGUMENT ...]",
    )
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args(arguments)
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        run.error("which command?")
    return foreground.run(argv)
