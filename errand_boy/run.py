"""``python -m errand_boy.run``, as in 2014: the daemon or, with a command, its client."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from errand_boy._cli import args, serve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m errand_boy.run",
        description="Be the daemon, like errand-boy serve; or, with COMMAND, have a shell run it, "
        "like errand-boy run -- sh -c COMMAND, with the same exit status. Where users have no "
        "$XDG_RUNTIME_DIR, all but root listen in errand-boy-UID in $TMPDIR or /tmp.",
    )
    parser.add_argument(
        "command_line", nargs="?", metavar="COMMAND", help="a line for /bin/sh, as one argument"
    )
    serve.add_options(parser, or_local=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or run the given command line; return the exit status."""
    args.open_standard_streams()
    reader = parser()
    options = reader.parse_args(arguments)
    command, local = options.command_line, options.local
    del options.command_line, options.local
    if command is None:
        if local:
            reader.error("--local needs a command")
        return serve.run_server(reader, options, classic=True)
    from errand_boy._cli.run import run  # noqa: PLC0415

    by: str | Literal[False] | None = False if local else options.socket
    return run(["/bin/sh", "-c", command], by, classic=True)


if __name__ == "__main__":
    raise SystemExit(main())
