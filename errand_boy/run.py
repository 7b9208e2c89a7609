"""``python -m errand_boy.run``, the classic spelling: the daemon or, with a command, its client."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from errand_boy._cli import args


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or run the command line that is given; return its exit status."""
    args.open_standard_streams()
    parser = argparse.ArgumentParser(
        prog="python -m errand_boy.run",
        description="Be the daemon, or, with a command line, run that through it. Where users "
        "have no $XDG_RUNTIME_DIR, all but root listen in errand-boy-UID in $TMPDIR or /tmp.",
    )
    parser.add_argument("command_line", nargs="?", metavar="COMMAND")
    args.add_serve_options(parser)
    options = parser.parse_args(arguments)
    command = options.command_line
    del options.command_line
    if command is None:
        return args.run_server(parser, options, classic=True)
    return _run(command, options.socket)


def _run(command: str, path: str | None) -> int:
    from errand_boy.transports.unixsocket import UNIXSocketTransport  # noqa: PLC0415

    try:
        transport = UNIXSocketTransport(path)
        process, stdout, stderr = transport.run_cmd(command, text=False)
    except OSError as error:
        print(f"errand-boy: {error.strerror or error}", file=sys.stderr)
        return 125
    sys.stdout.buffer.write(stdout)
    sys.stderr.buffer.write(stderr)
    status: int = process.returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    raise SystemExit(main())
