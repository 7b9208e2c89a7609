"""Commands that outlive their client: `errand-boy run --detach`, `ps`, `attach` and so on."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import errand_boy
from errand_boy._cli import command_options
from errand_boy._cli.parsing import Parser, add_socket, duration, message, number, size, user
from errand_boy._cli.waiting import said
from errand_boy._environment import variable
from errand_boy._hints import page
from errand_boy._quantities import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._jobs.blocking import Job

_EXPIRED = 124  # the exit status
_FAILED = 125
_NAME = "the job's name or number; if several have that name, the newest one"


# -- the options --


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `errand-boy run` for jobs."""
    group = parser.add_argument_group(
        "jobs: commands that go on without errand-boy run", f"See {page('jobs')}"
    )
    group.add_argument(
        "-d",
        "--detach",
        action="store_true",
        help="print the job's name and number when the command runs, and leave it to the daemon",
    )
    text = "the job's name (default: the program's name and the job's number)"
    group.add_argument("--name", help=text)
    group.add_argument(
        "-i",
        "--interactive",
        action="store_true",
        help="let those who attach write to standard input (default: it is empty, or a terminal)",
    )
    group.add_argument(
        "--ring",
        type=size,
        metavar="SIZE",
        help="how much of each output is kept (default: 256K)",
    )
    group.add_argument("--log", metavar="FILE", help="also write all output to FILE")
    group.add_argument(
        "--log-size", type=size, metavar="SIZE", help="rename FILE to FILE.1 at this size"
    )
    text = "how many renamed files are kept"
    group.add_argument("--log-count", type=number(int, 0), metavar="N", help=text)
    group.add_argument(
        "--notify",
        metavar="COMMAND",
        help="run this shell command when the job ends, with ERRAND_BOY_JOB, ERRAND_BOY_NAME, "
        "ERRAND_BOY_STATUS and ERRAND_BOY_CAUSE in its environment",
    )


_START = ("name", "ring", "log", "log_size", "log_count", "notify")
ONLY_DETACHED = ("interactive", *_START)


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line of `ps`, `attach` and so on."""
    command = prog.rpartition(" ")[2]
    add_options, handler, description = _COMMANDS[command]
    parser = Parser(prog=prog, description=description)
    parser.set_defaults(handler=handler)
    add_socket(parser)
    add_options(parser)
    return parser


def _ps_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="also list jobs that are over")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="write JSON, for programs")
    form.add_argument("-q", "--quiet", action="store_true", help="write only the names")
    _add_user(parser, "list the jobs of this user, or of all users (all); for root")


def _attach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help=_NAME)
    parser.add_argument("-r", "--read-only", action="store_true", help="only show the output")
    parser.add_argument(
        "--detach-keys",
        metavar="KEYS",
        default=variable("ERRAND_BOY_DETACH_KEYS") or "^P^Q",
        help="the keys that detach, such as ^P^Q, ctrl-a,d or none (default: "
        "$ERRAND_BOY_DETACH_KEYS, else ^P^Q)",
    )
    _add_raw(parser)
    _add_user(parser)


def _logs_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", metavar="JOB", nargs="+", help=_NAME)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new output")
    parser.add_argument(
        "--since",
        type=_moment,
        metavar="WHEN",
        help="only output since then: 90 (seconds), 10m, 2h or 1d ago, or 2026-11-25T20:15",
    )
    text = "of the existing output, write only the last N lines"
    parser.add_argument("-n", "--tail", type=number(int, 0), metavar="N", help=text)
    text = "begin each line with the time"
    parser.add_argument("-t", "--timestamps", action="store_true", help=text)
    _add_raw(parser)
    _add_user(parser)


def _wait_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", metavar="JOB", nargs="+", help=_NAME)
    text = "how long to wait for all of them together"
    parser.add_argument("--timeout", type=duration, metavar="TIME", help=text)
    parser.set_defaults(end=None)
    _add_user(parser)


def _stop_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", metavar="JOB", nargs="+", help=_NAME)
    command_options.add_options(parser, ("stop", "tree"))
    _add_user(parser)


def _rm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", metavar="JOB", nargs="+", help=_NAME)
    _add_user(parser)


def _add_raw(parser: argparse.ArgumentParser) -> None:
    text = "let another user's program write control characters to this terminal"
    parser.add_argument("--raw", action="store_true", help=text)


def _add_user(parser: argparse.ArgumentParser, text: str = "the job's user; for root") -> None:
    parser.add_argument("--user", type=_user if "all" in text else user, help=text)


def _user(text: str) -> int | str:
    return text if text == "all" else user(text)


def _moment(text: str) -> float:
    with suppress(ValueError):
        return time.time() - seconds(text)
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        message = f"{text!r} is not a time such as 10m (ago) or 2026-11-25T20:15"
        raise argparse.ArgumentTypeError(message) from None


# -- what they do --


def start(argv: Sequence[str], options: argparse.Namespace, wanted: Mapping[str, Any]) -> int:
    """Start a job; return the exit status."""
    from errand_boy._cli.run import failure  # noqa: PLC0415

    more: dict[str, Any] = {name: getattr(options, name) for name in _START}
    if options.pty:
        from errand_boy._cli.terminal import Outer  # noqa: PLC0415
        from errand_boy.terminal import Pty  # noqa: PLC0415

        more["pty"] = Pty(*Outer().size()[:2])
    elif options.interactive:
        more["stdin"] = errand_boy.PIPE
    try:
        job = errand_boy.connect(options.socket).start(argv, **more, **wanted)
    except (OSError, ValueError) as error:
        return failure(error, argv, wanted)
    print(job.name, job.id, flush=True)
    return 0


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the subcommand; return the exit status."""
    options = parser.parse_args(arguments)
    try:
        if hasattr(options, "jobs"):
            return max(_of_one(options, name) for name in options.jobs)
        status: int = options.handler(options)
        return status
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, ValueError) as error:
        return _failed(error)


def _of_one(options: argparse.Namespace, name: str) -> int:
    """Do it with one of several jobs; return the exit status. The others get their turn anyway."""
    try:
        status: int = options.handler(options, find(options, name))
        return status
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        return _failed(error)


def _failed(error: OSError | ValueError) -> int:
    is_unknown = isinstance(error, errand_boy.NoJobError)
    hint = "; errand-boy ps --all lists the jobs" if is_unknown else ""
    print(f"errand-boy: {message(error)}{hint}", file=sys.stderr)
    return _FAILED


def find(options: argparse.Namespace, name: str) -> Job:
    """Return a job. Raises what Client.job raises."""
    job = int(name) if name.isdecimal() else name
    with said(f"waiting for the daemon, to ask for {name}"):
        return errand_boy.connect(options.socket).job(job, uid=options.user)


def _ps(options: argparse.Namespace) -> int:
    with said("waiting for the daemon, to ask for its jobs"):
        jobs = errand_boy.connect(options.socket).jobs(options.all, uid=options.user)
    if options.quiet:
        print(*dict.fromkeys(job.name for job in jobs), sep="\n", end="\n" if jobs else "")
    elif options.json:
        print(json.dumps([_described(job) for job in jobs], indent=2))
    else:
        with_user = options.user == "all"
        head = ("NAME", "ID", *["USER"] * with_user, "STATE", "STARTED", "TIME", "COMMAND")
        _print_table([head, *(_row(job, with_user) for job in jobs)])
    return 0


def _described(job: Job) -> dict[str, Any]:
    return {
        "name": job.name,
        "id": job.id,
        "uid": job.uid,
        "pid": job.pid,
        "args": job.args,
        "terminal": job.has_terminal,
        "state": job.state,
        "cause": job.cause,
        "left": job.is_left,
        "returncode": job.returncode,
        "started": job.started,
        "ended": job.ended,
        "duration": job.duration,
    }


def _row(job: Job, with_user: bool) -> tuple[str, ...]:
    return (
        job.name,
        str(job.id),
        *[_user_name(job.uid)] * with_user,
        _state(job),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)),
        "" if job.duration is None else _duration(job.duration),
        _shown(job.args),
    )


def _shown(argv: Sequence[str]) -> str:
    """Return a command for the terminal, without control characters that another user chose."""
    return shlex.join(word if word.isprintable() else ascii(word)[1:-1] for word in argv)


def _state(job: Job) -> str:
    code = job.returncode
    if job.state != "ended" or code is None:
        left = f", but process {job.pid} runs" if job.is_left else ""
        return job.state if job.cause is None else f"{job.state}: {job.cause}{left}"
    if job.cause not in ("exit", "signal"):
        return f"limit: {job.cause}"
    if code >= 0:
        return f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _user_name(uid: int) -> str:
    import pwd  # noqa: PLC0415

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    most = os.get_terminal_size(1).columns if os.isatty(1) else None
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip()[: most or None])


def _attach(options: argparse.Namespace) -> int:
    from errand_boy._cli.attach import run  # noqa: PLC0415

    job = find(options, options.job)
    if job.state not in ("running", "starting"):
        print(f"errand-boy: {job.name} is over: see errand-boy logs {job.name}", file=sys.stderr)
        return _FAILED
    return run(job, options.read_only, options.detach_keys, raw=options.raw)


def _logs(options: argparse.Namespace, job: Job) -> int:
    from errand_boy._cli.attach import print_missed  # noqa: PLC0415
    from errand_boy._cli.escaping import Writer  # noqa: PLC0415
    from errand_boy._jobs.blocking import Missed  # noqa: PLC0415

    writer = Writer(job, raw=options.raw)
    at_start = {1: True, 2: True}
    for event in job.logs(options.follow, options.since, options.tail):
        if isinstance(event, Missed):
            print_missed(event)
            continue
        data = event.data
        if options.timestamps and data:
            moment = datetime.datetime.fromtimestamp(event.time).astimezone()
            stamp = moment.isoformat(timespec="milliseconds").encode() + b" "
            begins, at_start[event.stream] = at_start[event.stream], data.endswith(b"\n")
            lines = data.splitlines(keepends=True)
            data = stamp * begins + stamp.join(lines)
        if data:
            writer.write(event.stream, data)
    writer.close()
    with suppress(errand_boy.NoJobError):
        if job.status()["state"] == "lost":
            job.wait()
    return 0


def _wait(options: argparse.Namespace, job: Job) -> int:
    from errand_boy._cli.run import exit_status  # noqa: PLC0415

    if options.end is None and options.timeout is not None:
        options.end = time.monotonic() + options.timeout  # of all of them together
    try:
        with said(f"waiting for {job.name} to end"):
            done = job.wait(
                None if options.end is None else max(0.0, options.end - time.monotonic())
            )
    except errand_boy.TimeoutExpired:
        print(f"errand-boy: {job.name} has not ended", file=sys.stderr)
        return _EXPIRED
    return exit_status(done)


def _stop(options: argparse.Namespace, job: Job) -> int:
    with said(f"waiting for {job.name} to end: it has its signal, and gets the next one in time"):
        job.stop(**command_options.given(options))
    return 0


def _rm(options: argparse.Namespace, job: Job) -> int:
    job.remove()
    return 0


_Handler = Callable[..., int]
_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], _Handler, str]] = {
    "ps": (_ps_options, _ps, "List the commands that run detached."),
    "attach": (
        _attach_options,
        _attach,
        "Show a detached command here, and type to it. If it has a terminal, this terminal is in "
        "raw mode, and the command's has the size of the smallest one that is attached. The exit "
        "status is the command's if it ends meanwhile, and 0 after the detach keys.",
    ),
    "logs": (_logs_options, _logs, "Write the output of detached commands, one after the other."),
    "wait": (
        _wait_options,
        _wait,
        "Wait for detached commands. The exit status is the highest of theirs, as run returns it; "
        "124 after --timeout; 125 if nobody knows how one ended, or which it is.",
    ),
    "stop": (
        _stop_options,
        _stop,
        "End detached commands, by default in the way that --stop and --tree of run set, else by "
        "SIGTERM and, ten seconds later, SIGKILL; one with a terminal also gets SIGHUP after a "
        "second.",
    ),
    "rm": (_rm_options, _rm, "Remove detached commands that are over, and their output."),
}
