"""The daemon: `errand-boy serve`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import errand_boy
from errand_boy._cli.parsing import Parser, add_socket, duration, group, number, user
from errand_boy._wire import address


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog,
        description="Listen on a Unix socket, or on the one that systemd hands over, and start "
        "commands for this user and for those that the options allow.",
    )
    add_options(parser)
    parser.add_argument(
        "--upgrade",
        action="store_true",
        help="instead, have the daemon that listens execute the installed version, and wait until "
        "it has; status 1 if it refuses",
    )
    parser.add_argument(
        "--print-unit",
        choices=("system", "user"),
        help="instead, write the service of systemd, of the system or of a user, that runs this "
        "program with the other options",
    )
    return parser


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Become the daemon; return an exit status only if that fails, or for something else."""
    options = parser.parse_args(arguments)
    if options.upgrade or options.print_unit is not None:
        from errand_boy._cli import unit  # noqa: PLC0415

        if options.upgrade:
            return unit.upgrade(options)
        print(unit.written(options, _without(arguments, "--print-unit")))
        return 0
    return run_server(parser, options)


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """Return the arguments without an option and its value."""
    rest = list(arguments)
    while option in rest:
        at = rest.index(option)
        del rest[at : at + 2]
    return [word for word in rest if not word.startswith(f"{option}=")]


def add_options(parser: argparse.ArgumentParser, *, or_local: bool = False) -> None:
    """Add the daemon's options to `parser`."""
    add_socket(parser, or_local=or_local)
    count = number(int, 0)
    parser.add_argument(
        "--pool-size",
        type=number(int, 1),
        metavar="N",
        default=len(os.sched_getaffinity(0)),
        help="how many helpers each user has (default: as many as the daemon may use CPUs)",
    )
    parser.add_argument(
        "--max-accepts",
        type=count,
        metavar="N",
        default=0,
        help="end after N connections, when the running commands have finished (default: 0, no "
        "limit)",
    )
    parser.add_argument(
        "--max-child-tasks",
        type=count,
        metavar="N",
        default=0,
        help="replace a helper after N commands (default: 0, never)",
    )
    parser.add_argument(
        "--allow-uid",
        type=user,
        action="append",
        metavar="USER",
        default=[],
        help="a user who may use the daemon, in addition to its own user; repeatable",
    )
    parser.add_argument(
        "--allow-gid",
        type=group,
        action="append",
        metavar="GROUP",
        default=[],
        help="a group whose members may use the daemon; repeatable",
    )
    parser.add_argument(
        "--max-users",
        type=number(int, 1),
        metavar="N",
        default=256,
        help="as root: how many other users may have helpers at the same time (default: 256)",
    )
    parser.add_argument(
        "--idle",
        type=duration,
        metavar="TIME",
        default=60.0,
        help="as root: how long another user's idle helper stays (default: 60s)",
    )
    parser.add_argument(
        "--chdir",
        metavar="DIRECTORY",
        help="the working directory of commands whose client names none (default: / for other "
        "users of root's daemon, else the directory where the daemon was started)",
    )
    parser.add_argument(
        "--max-processes",
        type=count,
        metavar="N",
        default=0,
        help="how many commands run at a time; the others wait (default: 0, no limit)",
    )
    parser.add_argument(
        "--max-processes-per-user",
        type=count,
        metavar="N",
        default=0,
        help="how many commands of each user run at a time (default: 0, no limit)",
    )
    parser.add_argument(
        "--limits",
        metavar="FILE",
        help="a file with each user's limits, which is read again on SIGHUP",
    )
    parser.add_argument(
        "--grace",
        type=duration,
        metavar="TIME",
        default=30.0,
        help="how long commands may go on after the daemon gets SIGTERM or SIGINT (default: 30s)",
    )
    parser.add_argument("--patience", type=duration, default=30.0, help=argparse.SUPPRESS)
    parser.add_argument("--helper-patience", type=duration, default=30.0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="the lowest level to log on standard error (default: info)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="text, or JSON with one object for each line (default: text)",
    )
    parser.add_argument(
        "--log-commands",
        nargs="?",
        choices=("text", "json"),
        const="text",
        help="log a line for each command: who, what, where, how it ended, what it used; to "
        "systemd's journal, or else to standard error in this format (default: text)",
    )
    parser.add_argument(
        "--no-new-privs",
        action="store_true",
        help="let no command gain rights, as from a set-user-ID program; also the daemon and its "
        "helpers",
    )
    parser.add_argument(
        "--pid-file",
        metavar="PATH",
        help="write the pid to PATH when the daemon listens, and remove the file when it ends",
    )
    parser.add_argument(
        "--job-state",
        metavar="DIRECTORY",
        help="where the journals of jobs are kept (default: jobs in $STATE_DIRECTORY, "
        "/var/lib/errand-boy, or $XDG_STATE_HOME/errand-boy)",
    )
    parser.add_argument(
        "--job-runtime",
        metavar="DIRECTORY",
        help="where the output of jobs is kept while they run and afterwards, in memory if "
        "possible (default: jobs in $RUNTIME_DIRECTORY, /run/errand-boy, or "
        "$XDG_RUNTIME_DIR/errand-boy)",
    )
    parser.add_argument(
        "-t",
        "--transport",
        choices=("unixsocket",),
        default="unixsocket",
        help="the only transport; for compatibility",
    )


_NOT_KEPT = ("transport", "upgrade", "print_unit")


def run_server(
    parser: argparse.ArgumentParser, options: argparse.Namespace, *, classic: bool = False
) -> int:
    """Become the daemon that `options` describe; return an exit status only if that fails."""
    values = vars(options)
    kept = {name: value for name, value in values.items() if name not in _NOT_KEPT}
    kept["socket"] = os.path.abspath(options.socket or address.default_path(classic=classic))
    kept["job_state"] = options.job_state or address.job_directory("STATE")
    kept["job_runtime"] = options.job_runtime or address.job_directory("RUNTIME")
    for name in ("chdir", "limits", "pid_file", "job_state", "job_runtime"):
        if kept[name] is not None:
            kept[name] = os.path.abspath(kept[name])
    kept["version"] = errand_boy.__version__
    program = os.path.join(os.path.dirname(errand_boy.__file__), "_daemon", "serve.py")
    if getattr(sys, "frozen", False) or not sys.executable or not os.path.isfile(program):
        # sys.executable is the application, which would run a second time.
        parser.error(
            "the daemon needs a Python interpreter and errand_boy as files, and this program is "
            "frozen: install errand-boy with pip, and start its daemon"
        )
    argument = json.dumps({"path": _safe_path(), "options": kept})
    sys.stdout.flush()
    sys.stderr.flush()
    # Stay in the same process, for its supervisor, but free the memory of this command line.
    os.execv(sys.executable, [sys.executable, "-I", "-S", program, argument])


def _safe_path() -> list[str]:
    """Return sys.path without the script's directory or, with -m, the current one."""
    is_safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    return [path for path in sys.path[0 if is_safe else 1 :] if path]
