"""Commands of a daemon whose output is captured, and comes with their end in one message."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from subprocess import CompletedProcess

from errand_boy._native import lib
from errand_boy._options import request as _request
from errand_boy._process.child import VERDICT
from errand_boy._process.streamed import StreamedCommand, tracker, verdict
from errand_boy._spool import Spool, coding, to_text
from errand_boy._wire.frames import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_PIPE = subprocess.PIPE
_INPUTS = (None, subprocess.DEVNULL)
_OUTPUTS = (None, subprocess.DEVNULL, _PIPE)
_SETTINGS = {"cwd", "env", "umask", "restore_signals", "start_new_session"}
if sys.version_info >= (3, 11):
    _SETTINGS.add("process_group")
_ENDS = ("stop", "tree", "drain")  # only Popen handles these
_TEXT = {"text", "universal_newlines", "encoding", "errors"}
_NOT_SETTINGS = {"stdin", "stdout", "stderr", "shell", "executable", *_TEXT}
_STANDARD = _SETTINGS | _NOT_SETTINGS


def can_capture(options: Mapping[str, Any]) -> bool:
    """Return whether `capture` can take these `options` of Popen. The rarer ones it leaves out."""
    outputs = options.get("stdout"), options.get("stderr")
    return (
        options.get("stdin") in _INPUTS
        and outputs[0] in _OUTPUTS
        and outputs[1] in (*_OUTPUTS, subprocess.STDOUT)
        and _PIPE in outputs
        and options.keys().isdisjoint(_ENDS)
        and not options.get("pty")  # the caller needs its descriptor
        and not _request.unknown(options.keys() - _STANDARD)
        and not options.keys() >= {"text", "universal_newlines"}  # they may contradict each other
    )


def capture(
    client: Any, args: Any, options: Mapping[str, Any], time_limit: float | None
) -> tuple[CompletedProcess[Any], int, tuple[int, ...]]:
    """Run a command by `client`'s daemon until it ends and its output ends.

    Return the result of run(), the pid, and the usage in the order of wire.h. Raises what Popen
    and `communicate` raise. After `time_limit` seconds the command is killed, and TimeoutExpired
    has the output up to then.
    """
    get = options.get
    executable, env, cwd = get("executable"), get("env"), get("cwd")
    argv = _request.arguments(args, get("shell", False), executable)
    program = argv[0] if executable is None else executable
    sys.audit("subprocess.Popen", program, argv, cwd, env)
    # A command may wait for its turn in the daemon, so the time begins with its start.
    brief = time_limit is None
    streams, request = _request.streamed(
        _request.command(argv, program, env),
        *(get("stdin"), get("stdout"), get("stderr")),
        on_close=lib.EB_LIVES_ON,
        brief=brief,
        **{name: value for name, value in options.items() if name not in _NOT_SETTINGS},
    )
    text = None
    if get("text") or get("universal_newlines") or get("encoding") or get("errors"):
        text = coding(get("encoding"), get("errors"))
    limited = tracker(options)
    spools = Spool(), Spool()
    begun = time.monotonic()
    is_late = False

    def expire() -> None:
        nonlocal is_late
        is_late = True
        command.kill(0)

    def start_clock() -> None:
        if time_limit is not None:
            command.timers.after(time_limit, expire)

    def output(of: Callable[[Spool], Any]) -> list[Any]:
        return [of(spool) if streams >> 1 + n & 1 else None for n, spool in enumerate(spools)]

    command = StreamedCommand(
        client, request, streams, brief, spools, on_started=start_clock, limited=limited
    )
    try:
        end = command.run()
    except BaseException as error:
        command.abandon(kill=True)
        _request.name_program(error, program)
        raise
    if isinstance(end, Failed):
        raise _request.spawn_error(end, program, cwd, options)
    known = verdict(end, begun, limited, is_late)
    if is_late:
        stdout, stderr = output(lambda spool: bytes(spool.data) or None)
        expired = subprocess.TimeoutExpired(args, time_limit or 0, stdout, stderr)
        vars(expired).update(known)
        raise expired
    stdout, stderr = output(lambda spool: to_text(spool.data, *text) if text else bytes(spool.data))
    pid = end.brief[1] if end.brief else command.pid
    done = CompletedProcess(args, end.returncode, stdout, stderr)
    vars(done).update(known)
    return done, pid, end.usage


def runner(client: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a run() that calls `capture` where that is possible, else `plain`."""

    @functools.wraps(plain)
    def run(
        *args: Any,
        input: Any = None,
        capture_output: bool = False,
        timeout: float | None = None,
        check: bool = False,
        **options: Any,
    ) -> CompletedProcess[Any]:
        wanted = options
        if capture_output and options.get("stdout") is options.get("stderr") is None:
            wanted = {**options, "stdout": _PIPE, "stderr": _PIPE}
            capture_output = False
        if options.get("pty"):
            wanted, capture_output = options, capture_output or wanted is not options
        if input is not None or capture_output or len(args) != 1 or not can_capture(wanted):
            given = {"input": input, "capture_output": capture_output, "timeout": timeout}
            done: CompletedProcess[Any] = plain(*args, **given, check=check, **wanted)
            return done
        done, _, _ = capture(client, args[0], wanted, timeout)
        if check and done.returncode:
            failed = subprocess.CalledProcessError(
                done.returncode, done.args, done.stdout, done.stderr
            )
            vars(failed).update((name, vars(done)[name]) for name in VERDICT)
            raise failed
        return done

    return run
