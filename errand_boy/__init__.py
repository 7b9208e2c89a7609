"""Starts commands at a cost that does not depend on the process that starts them.

``import errand_boy as subprocess``: the same functions, constants and exceptions. Every command is
started without a fork: by this process, or by a small helper in C for `user`, `group` and
`extra_groups`, for `limits`, ``tree="all"`` and `dies_with_caller`, after start(), or if
``ERRAND_BOY_SPAWN`` says so. If ``ERRAND_BOY_SOCKET`` is in the environment when this module is
imported, the daemon that listens there starts the commands.

Popen, run and the other functions also take the options that `Options` names: how the command ends,
its limits, its sandbox, its terminal and so on. errand_boy.map and errand_boy.Executor run many
commands at once, errand_boy.connect returns the client of a daemon, and errand_boy.patch makes a
whole program start its commands through errand-boy. errand_boy.asyncio, errand_boy.gevent,
errand_boy.eventlet and errand_boy.celery wait as those frameworks do.
"""

from __future__ import annotations

import os
from subprocess import (
    DEVNULL,
    PIPE,
    STDOUT,
    CalledProcessError,
    CompletedProcess,
    SubprocessError,
    TimeoutExpired,
    getoutput,
    getstatusoutput,
    list2cmdline,
)

from errand_boy._environment import variable as _variable
from errand_boy._process import way as _way
from errand_boy._process.functions import NAMES, rebind
from errand_boy._process.popen import Popen
from errand_boy._process.way import helper_pid, start, stop
from errand_boy.errors import (
    ErrandBoyError,
    HelperDiedError,
    HelperError,
    JobError,
    JobLostError,
    NoDaemonError,
    NoJobError,
    ProtocolError,
    RefusedError,
    SessionClosedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from typing import Any

    from errand_boy._client.client import Client
    from errand_boy._client.executor import Executor
    from errand_boy._jobs.blocking import Job, JobResult, Missed, Output
    from errand_boy._map.command import Command
    from errand_boy._map.policy import Retries
    from errand_boy._map.result import Result
    from errand_boy._map.signatures import Map
    from errand_boy._options.names import Limits, Options
    from errand_boy._options.preexec import chain
    from errand_boy._shell.shell import Shell, ShellCommand, ShellResult
    from errand_boy._types.signatures import Call, CheckOutput, Run
    from errand_boy.sandbox import Sandbox

    def _overloaded(
        function: Callable[..., Any],
    ) -> Map[
        Generator[Result[str], None, None],
        Generator[Result[bytes], None, None],
        Generator[Result[Any], None, None],
    ]: ...

else:

    def _overloaded(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


def connect(path: str | os.PathLike[str] | None = None, *, peer_uid: int | None = None) -> Client:
    """Return a client of the daemon that listens at `path`, or at the default path.

    The client has the functions, constants and exceptions of subprocess, and the daemon runs its
    commands. The default path is ``$ERRAND_BOY_SOCKET``, else ``errand-boy.sock`` in
    ``$XDG_RUNTIME_DIR`` if that directory belongs to the user, else in ``/run``. If only ``/run``
    has a socket, that one is used. Threads may share the client, and so may forked processes.

    Nothing is sent before the first command, which raises

    - NoDaemonError if nobody listens;
    - RefusedError if the daemon does not serve this user, or if the listener is not the user
      `peer_uid`. Without `peer_uid`, the listener at a default path must be this user or root; at
      a path that you name, here or in ``$ERRAND_BOY_SOCKET``, any listener is trusted.
    """
    from errand_boy._client import client as _client  # noqa: PLC0415  only those who need it pay

    return _client.connect(path, peer_uid=peer_uid)


@_overloaded
def map(commands: Iterable[Command | None], **options: Any) -> Generator[Result, None, None]:
    """Run many commands at once, and yield a Result, which is a CompletedProcess, for each.

    `commands` is an iterable of

    - argument lists, or with ``shell=True`` strings;
    - strings, each of which is the name of a program without arguments;
    - mappings with `args` and, for this command only, `input`, `timeout`, `retries`, `shell`,
      `cwd`, `env`, `umask`, `start_new_session`, `process_group`, `restore_signals`, `user`,
      `group`, `extra_groups` or any of `Options`;
    - None, which means that there is no command yet, but that results may lead to more. The map
      asks the iterator again when a command has ended and when a result has been taken. It ends if
      the iterator gives None when nothing runs and all results have been taken.

    Commands are taken from it as results are taken, so it may be endless. If it raises an
    exception, the map raises that exception after the results of the commands before it.

    The keywords are

    - `max_workers`: how many commands run at once; by default four for each CPU.
    - `ordered` (true): yield the results in the order of the commands; if false, as they end.
    - `capture_output`, `stdout`, `stderr`, `text`, `encoding`, `errors`, `input`, `timeout`: as in
      subprocess.run, except that each output is captured unless `capture_output` is false or it is
      given, and that without `input` standard input is /dev/null. `timeout` is in seconds, or a
      percentage of the median duration of the others, such as ``"200%"``.
    - `retries`: how often a command that fails is run again, as a number or a Retries.
    - `halt`: when to end early. ``"never"`` is the default; ``"soon,fail=N"`` starts no more
      commands when N have failed; ``"now,fail=N"`` also ends those that run, which have no
      results. ``success=N`` counts commands that succeed, ``done=N`` all that end. ``N%`` is a
      share of all commands if `commands` has a length, else of at least three that have ended.
    - `max_output`: how many bytes of each output are kept. With `spool`, a longer output is in a
      temporary file in full.
    - `check`: raise an exception at the first Result that is not a success. Without it, a command
      that can't be started has a Result too.
    - `on`: a Celery app, or an errand_boy.celery.Cluster, whose workers run the commands.
      `max_workers` is then how many tasks are in progress at once, by default 1,000.
    - `progress`: show a bar on a terminal, if tqdm is installed.
    - `shell`, `cwd`, `env`, `umask`, `start_new_session`, `process_group`, `restore_signals`,
      `user`, `group`, `extra_groups` and those of `Options`: as in Popen, for all commands whose
      mappings don't say otherwise.

    Each command leads a process group of its own, unless `process_group` or `start_new_session`
    says otherwise, and that group is killed at its `timeout`. When the iterator is closed or this
    process ends, the groups that run get SIGTERM, and SIGKILL a second later.

    A private helper starts the commands or, if ``ERRAND_BOY_SOCKET`` was set at import, the daemon.
    Environment, limits and so on are those of this process when the first command is started; with
    a daemon, working directory and umask too. If this process changes its ids, that applies to the
    next command; a change of its capabilities applies 5 ms later. In a process forked from this
    one, the iterator raises ChildProcessError.

    Raises HelperError if there is no helper; with a daemon, NoDaemonError and RefusedError;
    with `on`, ConnectionError.
    """
    from errand_boy._map import map as _map  # noqa: PLC0415

    return _map.map(commands, client=_way.daemon, **options)


def patch() -> None:
    """Make the standard library's subprocess.Popen start commands through errand-boy.

    This covers all code that uses the class, also where it was imported before; the Popen of gevent
    and of eventlet, asyncio's loops and uvloop, whether they are loaded before or after; ptyprocess
    and pty.spawn. os.system, os.fork, os.posix_spawn and multiprocessing stay as they are. No
    command goes to a daemon, even if ``ERRAND_BOY_SOCKET`` names one. Calling patch() again has no
    effect; unpatch() undoes it.
    """
    from errand_boy import _patching  # noqa: PLC0415

    _patching.patch()


def unpatch() -> None:
    """Undo what patch() did.

    If a helper owns the children, as with ``ERRAND_BOY_SPAWN=posix``, wait first for those that
    were started under patch().
    """
    from errand_boy import _patching  # noqa: PLC0415

    _patching.unpatch()


_LATER = {
    "Executor": "errand_boy._client.executor",
    "Job": "errand_boy._jobs.blocking",
    "JobResult": "errand_boy._jobs.blocking",
    "Limits": "errand_boy._options.names",
    "Missed": "errand_boy._jobs.blocking",
    "Options": "errand_boy._options.names",
    "Output": "errand_boy._jobs.blocking",
    "Result": "errand_boy._map.result",
    "Retries": "errand_boy._map.policy",
    "chain": "errand_boy._options.preexec",
    "Sandbox": "errand_boy.sandbox",
    "Shell": "errand_boy._shell.shell",
    "ShellCommand": "errand_boy._shell.shell",
    "ShellResult": "errand_boy._shell.shell",
}

_way.daemon = connect() if _variable("ERRAND_BOY_SOCKET") else None

if TYPE_CHECKING:
    run: Run
    call: Call
    check_call: Call
    check_output: CheckOutput
else:

    def __getattr__(name: str) -> Any:
        if name in _LATER:  # only those who need it pay
            from importlib import import_module  # noqa: PLC0415

            return getattr(import_module(_LATER[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    if _way.daemon is not None:
        Popen = _way.daemon.Popen
        globals().update((name, getattr(_way.daemon, name)) for name in NAMES)
    else:
        globals().update(rebind(Popen))

__version__ = "1.0.0.dev0"

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "CalledProcessError",
    "CompletedProcess",
    "ErrandBoyError",
    "Executor",
    "HelperDiedError",
    "HelperError",
    "Job",
    "JobError",
    "JobLostError",
    "JobResult",
    "Limits",
    "Missed",
    "NoDaemonError",
    "NoJobError",
    "Options",
    "Output",
    "Popen",
    "ProtocolError",
    "RefusedError",
    "Result",
    "Retries",
    "Sandbox",
    "SessionClosedError",
    "Shell",
    "ShellCommand",
    "ShellResult",
    "SubprocessError",
    "TimeoutExpired",
    "call",
    "chain",
    "check_call",
    "check_output",
    "connect",
    "getoutput",
    "getstatusoutput",
    "helper_pid",
    "list2cmdline",
    "map",
    "patch",
    "run",
    "start",
    "stop",
    "unpatch",
]
