"""The command ``errand-boy``: arguments only."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import errand_boy
from errand_boy import _address
from errand_boy._cli import command_options, detached, stats
from errand_boy._cli.parsing import add_socket, number, user

_COMMANDS = ("serve", "run", "map", "status", *detached.COMMANDS)
_GIVEN = ("-h", "--help", "--version")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. To serve, this process becomes the daemon."""
    open_standard_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in (*_COMMANDS, *_GIVEN):
        arguments = ["serve", *arguments]
    parser = argparse.ArgumentParser(
        prog="errand-boy",
        description="Start commands without forking the process that asks for them.",
        epilog="errand-boy COMMAND --help has the options of each.",
    )
    parser.add_argument("--version", action="version", version=errand_boy.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="run the daemon (the default)",
        description="Listen on a Unix socket, or on the one that systemd hands over, and start "
        "commands for this user and for those that the options allow.",
    )
    add_serve_options(serve)
    run = commands.add_parser(
        "run",
        help="run one command on this terminal, and exit with its status",
        usage="errand-boy run [option ...] [--] COMMAND [ARGUMENT ...]",
        description="Have the daemon run a command or, if none listens, run it as a child of this "
        "process. Signals are passed on. The exit status is that of the command; 128 + N if "
        "signal N ended it (signal 9 for a limit); 124 after --timeout or --limit wall; 127 if "
        "the command was not found; 126 if it could not be started; 125 if errand-boy itself "
        "failed.",
    )
    add_socket(run)
    command_options.add_options(run)
    run.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="end the command after SECONDS, as --stop and --tree say",
    )
    run.add_argument(
        "--stats",
        nargs="?",
        choices=stats.FORMS,
        const=stats.FORMS[0],
        help="write to standard error why the command ended and what it used, like time -v or as "
        "JSON",
    )
    run.add_argument(
        "-t",
        "--pty",
        action="store_true",
        help="give the command a terminal of its own, and show it on this one",
    )
    run.add_argument(
        "--record",
        metavar="FILE",
        help="the same, and record what is shown in FILE, as asciicast v2",
    )
    detached.add_run_options(run)
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND")
    many = commands.add_parser(
        "map",
        help="run a command for each line of standard input, or for each argument, several at once",
        usage="errand-boy map [option ...] [--] [COMMAND [ARGUMENT ...]] "
        "[::: ARGUMENT ...] [:::: FILE ...]",
        description="Run a command for each line of standard input, or for each argument that is "
        "given, and write the output of each command when it ends. Without COMMAND, each line is "
        "a command. A private helper runs the commands, whose standard input is /dev/null. The "
        "exit status is the number of commands that failed, or 101 for more than 100; after a "
        "halt, that of the command that caused it (128 + N if signal N ended it); 125 if "
        "errand-boy itself failed.",
        allow_abbrev=False,
    )
    if arguments[0] == "map":
        from errand_boy._cli import map  # noqa: PLC0415

        map.add_options(many)
        return map.main(many, arguments[1:])
    status = commands.add_parser(
        "status",
        help="show what the daemon is doing",
        description="Show what the daemon is doing: its helpers, its live commands, totals, and "
        "how long starts take. The exit status is 1 if no daemon answers.",
    )
    add_socket(status)
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="write JSON, for programs")
    form.add_argument("--metrics", action="store_true", help="write Prometheus's text format")
    form.add_argument(
        "--watch",
        nargs="?",
        type=number(float, 0.05),
        const=1.0,
        metavar="SECONDS",
        help="show a live screen, with rates, every SECONDS (default: 1); needs rich",
    )
    detached.add_parsers(commands)
    options = parser.parse_args(arguments)
    if options.command in detached.COMMANDS:
        return detached.main(options)
    if options.command == "serve":
        return run_server(serve, options)
    if options.command == "status":
        return _status(options)
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        run.error("which command?")
    wanted = command_options.given(options)
    if options.timeout is not None and not options.timeout >= 0:
        run.error("--timeout must not be negative")
    if options.timeout is not None and (options.pty or options.record is not None):
        run.error("--timeout can't be given with a terminal")
    if "output" in wanted.get("limits", ()):
        run.error("--limit output needs errand-boy map: here the command writes by itself")
    if options.detach:
        if options.timeout is not None or options.stats or options.record is not None:
            run.error("--timeout, --stats and --record can't be given with --detach")
        return detached.start(argv, options, wanted)
    alone = [name for name in detached.ONLY_DETACHED if getattr(options, name)]
    if alone:
        run.error(f"--{alone[0].replace('_', '-')} needs --detach")
    if options.pty or options.record is not None:
        from errand_boy._cli import terminal  # noqa: PLC0415

        return terminal.run(argv, options.socket, options.record, wanted)
    from errand_boy._cli.run import run as run_command  # noqa: PLC0415

    return run_command(argv, options.socket, wanted, options.timeout, options.stats)


def open_standard_streams() -> None:
    """Open /dev/null in the place of each standard stream that is closed.

    Else the next file or socket would get its number, and with it what is written there.
    """
    for fd, name, mode in (0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add the daemon's options to `parser`."""
    add_socket(parser)
    count = number(int, 0)
    parser.add_argument(
        "--pool-size",
        type=number(int, 1),
        metavar="N",
        default=len(os.sched_getaffinity(0)),
        help="how many helpers each user has (default: the number of CPUs that the daemon may use)",
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
        type=_group,
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
        help="as root: how many other users are served at the same time (default: 256)",
    )
    parser.add_argument(
        "--idle",
        type=number(float, 0),
        metavar="SECONDS",
        default=60.0,
        help="as root: how long another user's helper waits for a connection (default: 60)",
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
        help="the same for each user (default: 0, no limit)",
    )
    parser.add_argument(
        "--limits",
        metavar="FILE",
        help="a file with the limits of each user, read again on SIGHUP",
    )
    parser.add_argument(
        "--grace",
        type=number(float, 0),
        metavar="SECONDS",
        default=30.0,
        help="how long commands may go on after the daemon gets SIGTERM or SIGINT (default: 30)",
    )
    parser.add_argument("--patience", type=number(float, 0), default=30.0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--helper-patience", type=number(float, 0), default=30.0, help=argparse.SUPPRESS
    )
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
        help="let no command gain rights, as by a set-user-ID program; also the daemon and its "
        "helpers",
    )
    parser.add_argument(
        "--pid-file",
        metavar="PATH",
        help="write the pid to PATH when the daemon listens; the file is removed when it ends",
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


def _group(text: str) -> int:
    import grp  # noqa: PLC0415

    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"unknown group {text}") from None


def run_server(
    parser: argparse.ArgumentParser, options: argparse.Namespace, *, classic: bool = False
) -> int:
    """Become the daemon that `options` describe; does not return but for an error."""
    values = vars(options)
    kept = {name: value for name, value in values.items() if name not in ("command", "transport")}
    kept["socket"] = os.path.abspath(options.socket or _address.default_path(classic=classic))
    kept["job_state"] = options.job_state or _address.job_directory("STATE")
    kept["job_runtime"] = options.job_runtime or _address.job_directory("RUNTIME")
    for name in ("chdir", "limits", "pid_file", "job_state", "job_runtime"):
        if kept[name] is not None:
            kept[name] = os.path.abspath(kept[name])
    kept["version"] = errand_boy.__version__
    program = os.path.join(os.path.dirname(errand_boy.__file__), "_daemon", "serve.py")
    if getattr(sys, "frozen", False) or not sys.executable or not os.path.isfile(program):
        # sys.executable would be the application, which would run once more.
        parser.error(
            "the daemon needs a Python interpreter and errand_boy as files, and this program is "
            "frozen: install errand-boy with pip, and start its daemon"
        )
    argument = json.dumps({"path": _safe_path(), "options": kept})
    sys.stdout.flush()
    sys.stderr.flush()
    # The same process, so that its supervisor finds it, but without what this command line took.
    os.execv(sys.executable, [sys.executable, "-I", "-S", program, argument])


def _safe_path() -> list[str]:
    """Return sys.path without the directory of the script, or, with -m, the current one."""
    is_safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    return [path for path in sys.path[0 if is_safe else 1 :] if path]


def _status(options: argparse.Namespace) -> int:
    from errand_boy import _status  # noqa: PLC0415

    if options.watch is not None:
        from errand_boy._cli import watch  # noqa: PLC0415

        return watch.run(_address.find(options.socket), options.watch)
    try:
        value = _status.fetch(_address.find(options.socket))
    except _status.NoAnswerError as error:
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(value, indent=2))
    else:
        sys.stdout.write(_status.metrics(value) if options.metrics else _status.table(value))
    return 0
