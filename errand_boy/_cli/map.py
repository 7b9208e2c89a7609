"""Runs many commands at once: `errand-boy map`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Generator, Sequence

from errand_boy._cli import (
    cluster,
    command_options,
    failing,
    inputs,
    jobs,
    output,
    packing,
    pipe,
    progress,
    template,
    throttle,
)
from errand_boy._cli.commands import Commands
from errand_boy._cli.joblog import JobLog, written
from errand_boy._cli.parsing import Parser, UsageError, add_socket, message
from errand_boy._environment import variable
from errand_boy._map import map as _map
from errand_boy._map.batch import NOT_NOW, Batch
from errand_boy._map.result import Result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._cli.commands import Origin
    from errand_boy._cli.template import Template

_MOST_FAILED = 101  # the exit status if that many or more commands failed
_TROUBLE = 125  # the exit status if errand-boy itself failed


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line up to `:::`."""
    parser = Parser(
        prog=prog,
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
    add_socket(
        parser,
        "have the daemon that listens at PATH run the commands (default: $ERRAND_BOY_SOCKET, else "
        "a private helper)",
        or_local=True,
    )
    modules = inputs, template, packing, jobs, output, failing, throttle, progress, pipe, cluster
    for module in (*modules, command_options):
        module.add_options(parser)
    return parser


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run `errand-boy map` with these arguments; return the exit status."""
    options, words = parse(parser, arguments)
    try:
        return run(options, words)
    except UsageError as error:
        parser.error(str(error))


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the words from the command on.

    The options end where the command begins. In `-j -1`, the value looks like an option.
    """
    takes_value = {
        option: action.nargs != 0 for action in parser._actions for option in action.option_strings
    }
    options: list[str] = []
    at = 0
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] != "-":
        word = arguments[at]
        at += 1
        if word == "--":
            break
        if word.startswith("--"):
            awaits = takes_value.get(word, False)
            joint = "="
        else:
            valued = [n for n, letter in enumerate(word) if takes_value.get("-" + letter, False)]
            awaits = bool(valued) and valued[0] == len(word) - 1
            joint = ""
        if awaits and at < len(arguments):
            value = arguments[at]
            at += 1
            options += [word + joint + value] if value.startswith("-") else [word, value]
        else:
            options.append(word)
    return parser.parse_args(options), list(arguments[at:])


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the commands; return the exit status.

    It is the number of commands that failed, 101 for more than 100 of them; after a halt the
    return code of the command that caused it; 125 if errand-boy itself failed.
    Raises UsageError.
    """
    policy = failing.halt(options)
    if (options.resume or options.resume_failed) and options.joblog is None:
        raise UsageError("--resume and --resume-failed need --joblog")
    workers = cluster.of(options)
    try:
        count = jobs.Jobs(
            options.jobs or (jobs.DEFAULT if workers is None else str(_map.MOST_SENT))
        )
    except ValueError as error:
        raise UsageError(f"--jobs: {error}") from None
    given = inputs.Inputs(options, words)
    try:
        source = _source(options, given, count.count)
        renamed = template.renamed(options)
        make = template.Template(
            given.command,
            shell=options.shell,
            contexts=options.pack == "X",
            names=given.names,
            renamed=renamed,
            appends=not _pipes(options) and options.max_args != 0,
        )
        _check_program(given.command, make)
        watch = progress.Progress(options)
        log = None
        if options.joblog is not None and not options.dry_run:
            log = JobLog(options.joblog, options.resume, options.resume_failed)
        if not _pipes(options):
            watch.read_ahead(source)
            failing.set_total(policy, source)
        commands = Commands(source.records, make, log.done if log else ())
        if not _pipes(options):
            commands.records = packing.packed(source.records, options, commands.sample, count.count)
            if commands.records is not source.records:
                policy.total = source.total = None
        if options.dry_run:
            return _show(source, commands)
        out = output.Output(options, given.names, renamed, commands.origins)
        work = _map.make(
            commands,
            client=_client(options) if workers is None else None,
            on=workers,
            max_workers=count.count,
            shell=options.shell,
            ordered=options.keep_order,
            timeout=options.timeout,
            capture_output=out.captures,
            max_output=output.KEPT if out.captures else None,
            spool=True,
            halt=policy,
            retries=failing.retries(options),
            gate=throttle.gate(options),
            with_pids=bool(options.memsuspend),
            may_queue=not (make.uses_slot or out.uses_slot or out.notes_starts),
            **command_options.given(options),
        )
        if options.memsuspend:
            throttle.Pauses(work, options.memsuspend)
        if make.uses_slot or out.uses_slot:
            commands.next_slot = lambda: work.next_slot
        if source.total is not None:
            watch.total = source.total - (log.count if log else 0)
        return _run(work, source, commands, out, count, log, watch, options)
    except cluster.Interrupted as interrupted:
        cluster.end_by(interrupted)
    except OSError as error:
        print(f"errand-boy: {message(error)}", file=sys.stderr)
    return _TROUBLE


def _pipes(options: argparse.Namespace) -> bool:
    return bool(options.pipe or options.pipe_part)


def _client(options: argparse.Namespace) -> Any:
    path = options.socket or variable("ERRAND_BOY_SOCKET")
    if options.local or not path:
        return None
    from errand_boy._client import client  # noqa: PLC0415

    return client.connect(path)


def _source(options: argparse.Namespace, given: inputs.Inputs, count: int) -> inputs.Source:
    if not _pipes(options):
        given.open()
        return given.source
    if not given.command:
        raise UsageError("which command?")
    paths = [path for kind, items, _ in given.given if kind == "file" for path in items]
    if len(paths) < len(given.given) or (paths and not options.pipe_part):
        raise UsageError("a command gets blocks or arguments, not both")
    return pipe.blocks(options, paths, count)


def _check_program(command: Sequence[str], make: Template) -> None:
    """Raise UsageError if a whole command line is given as one word, without --shell."""
    if make.shell or not command or len(command[0].split()) < 2:
        return
    from shutil import which  # noqa: PLC0415  it takes 2 ms to import, and only this needs it

    if which(command[0]):
        return
    word = command[0]
    program = word.split()[0]
    if "/" not in program or which(program):  # otherwise {} may still make it a path
        raise UsageError(
            f"{word!r} is one word, and no program has that name: write its words without "
            "the quotes around them all, or use --shell to have a shell read it"
        )


def _run(
    work: Batch,
    source: inputs.Source,
    commands: Commands,
    out: output.Output,
    count: jobs.Jobs,
    log: JobLog | None,
    watch: progress.Progress,
    options: argparse.Namespace,
) -> int:
    failed = 0
    origins = commands.origins

    def on_made(origin: Origin, command: list[bytes] | bytes) -> Any:
        out.started(origin, command)
        if isinstance(source, (pipe.Blocks, pipe.Parts)):
            return {"args": command, "input": source.data}
        return command

    def on_result(result: Result) -> None:
        nonlocal failed
        failed += result.failed
        if log is not None:
            log.add(origins[result.index].seq, result, out.size(result))
        watch.count(origins[result.index].seq, result)
        out.ended(result.index)
        if count.path is not None and count.read():
            work.max_workers = count.count

    work.on_result = on_result
    work.open_output = out.open_output
    if out.notes_starts or _pipes(options):
        commands.on_made = on_made
    if options.celery is not None:
        cluster.take_signals()
    else:  # die of the signal: the helper then ends the running commands
        for number in (signal.SIGINT, signal.SIGPIPE):
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGPIPE:
                signal.signal(number, signal.SIG_DFL)
    results = _drive(work, source)
    with contextlib.closing(work):
        out.before_writing = watch.clear
        watch.begin(work.timers)
        try:
            for result in results:
                out.write(result)
                for note in cluster.notes(result) if options.celery else ():
                    output.tell(result, note)
                del origins[result.index]
        except UsageError as error:  # of a line of the input
            watch.clear()
            print(f"errand-boy: {error}", file=sys.stderr)
            return _TROUBLE
        finally:
            sys.stdout.flush()
            watch.end()
    if work.halt.result is not None:
        code = work.halt.result.returncode
        if code == 0 and work.halt.result.failed:  # its output was still open at the halt
            return 1
        return code if code >= 0 else 128 - code
    return min(failed, _MOST_FAILED)


def _show(source: inputs.Source, commands: Commands) -> int:
    """Write the commands without running them."""
    commands.next_slot = lambda: 1
    for command in commands:
        if command is NOT_NOW:
            sys.stdout.flush()
            source.read()
        else:
            sys.stdout.buffer.write(written(command) + b"\n")
    sys.stdout.flush()
    return 0


def _drive(work: Batch, source: inputs.Source) -> Generator[Result, None, None]:
    """Do as drive of _map/map.py, but also wait for input."""
    wait = _map.waiter(work)
    reads = False
    while True:
        work.fill()
        while (result := work.take()) is not None:
            yield result
            work.fill()
        sys.stdout.flush()
        if not work.pending():
            return
        wanted = source.wanted() and work.halt.due is None
        if wanted != reads:
            reads = wanted
            assert source.fd is not None
            if reads:
                work.watch(source.fd, False)
            else:
                work.unwatch(source.fd)
        for fd in wait(work.timers.rest()):
            if fd == source.fd:
                source.read()
            else:
                work.on_ready(fd)
        work.timers.ring()
