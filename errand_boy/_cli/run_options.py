"""The command line of `errand-boy run`."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from collections.abc import Sequence

from errand_boy._cli import command_options, detached, stats
from errand_boy._cli.parsing import Parser, add_socket, duration, group, message, user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog,
        usage="errand-boy run [option ...] [--] COMMAND [ARGUMENT ...]",
        description="Have the daemon run a command or, if none listens at a default path, run it "
        "as a child of this process. Signals are passed on. The exit status is that of the "
        "command; 128 + N if signal N ended it (signal 9 for a limit); 124 after --timeout or "
        "--limit wall; 127 if the command was not found; 126 if it could not be started; 125 if "
        "errand-boy itself failed, as when it does not reach the daemon that --socket or "
        "$ERRAND_BOY_SOCKET names.",
    )
    add_socket(parser, or_local=True)
    command_options.add_options(parser)
    parser.add_argument(
        "-C",
        "--cwd",
        metavar="DIRECTORY",
        help="the command's working directory (default: this one)",
    )
    parser.add_argument(
        "-e",
        "--env",
        type=_variable,
        action="append",
        metavar="NAME=VALUE",
        help="a variable of the command's environment, besides the present ones; repeatable",
    )
    parser.add_argument(
        "--env-file",
        type=_variables,
        action="append",
        metavar="FILE",
        help="the same for each line of FILE; lines that begin with # are comments, and quotes are "
        "part of the value. --env has precedence",
    )
    # errand-boy map has another --group; errand-boy run --user USER -- errand-boy map does it.
    parser.add_argument(
        "--user",
        type=_account,
        metavar="USER",
        help="run the command as this user, with the user's groups and the present environment; "
        "for root",
    )
    parser.add_argument(
        "--group",
        type=group,
        metavar="GROUP",
        help="run the command with this group, in place of the user's own; for root",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        metavar="TIME",
        help="end the command after TIME (90, 1.5s, 500ms, 2m, 1h), in the way that --stop and "
        "--tree set",
    )
    parser.add_argument(
        "--stats",
        nargs="?",
        choices=stats.FORMS,
        const=stats.FORMS[0],
        help="write to standard error why the command ended and what it used, like time -v or as "
        "JSON",
    )
    parser.add_argument(
        "-t",
        "--pty",
        action="store_true",
        help="give the command a terminal of its own, and show it on this one",
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="the same, and record the screen in FILE, as asciicast v2",
    )
    detached.add_run_options(parser)
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _variables(path: str) -> list[tuple[str, str]]:
    try:
        with open(path, encoding=sys.getfilesystemencoding(), errors="surrogateescape") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise argparse.ArgumentTypeError(message(error)) from None
    return [_variable(line) for line in lines if line.strip() and not line.startswith("#")]


def _surroundings(options: argparse.Namespace) -> dict[str, Any]:
    """Return Popen's keywords for --cwd, --env and --env-file."""
    found: dict[str, Any] = {} if options.cwd is None else {"cwd": options.cwd}
    given = [*(pair for pairs in options.env_file or () for pair in pairs), *(options.env or ())]
    if given:
        found["env"] = {**os.environ, **dict(given)}
    return found


def _account(text: str) -> int:
    uid = user(text)
    try:
        return pwd.getpwuid(uid).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"unknown user {text}, whose groups are needed") from None


def _ids(options: argparse.Namespace) -> dict[str, Any]:
    """Return Popen's keywords for --user and --group.

    With Popen's `user` alone, the command would keep root's groups.
    """
    if options.user is None:
        return {} if options.group is None else {"group": options.group}
    entry = pwd.getpwuid(options.user)
    gid = entry.pw_gid if options.group is None else options.group
    groups = os.getgrouplist(entry.pw_name, gid)
    return {"user": options.user, "group": gid, "extra_groups": groups}


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    options = parser.parse_args(arguments)
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        parser.error("which command?")
    wanted = {**command_options.given(options), **_ids(options), **_surroundings(options)}
    if options.timeout is not None and (options.pty or options.record is not None):
        parser.error("--timeout can't be given with a terminal")
    if "output" in wanted.get("limits", ()):
        parser.error("--limit output needs errand-boy map: here the command writes directly")
    if options.detach:
        if options.timeout is not None or options.stats or options.record is not None:
            parser.error("--timeout, --stats and --record can't be given with --detach")
        if options.local:
            parser.error("--local can't be given with --detach: a daemon keeps the command")
        return detached.start(argv, options, wanted)
    alone = [name for name in detached.ONLY_DETACHED if getattr(options, name)]
    if alone:
        parser.error(f"--{alone[0].replace('_', '-')} needs --detach")
    by: str | Literal[False] | None = False if options.local else options.socket
    if options.pty or options.record is not None:
        from errand_boy._cli import terminal  # noqa: PLC0415

        return terminal.run(argv, by, options.record, wanted)
    from errand_boy._cli.run import run  # noqa: PLC0415

    return run(argv, by, wanted, options.timeout, options.stats)
