"""Starts commands at a cost that does not depend on the process that starts them.

``import errand_boy as subprocess``: the same functions, constants and exceptions. Every command is
started without a fork: by this process, or by a small helper in C for `user`, `group` and
`extra_groups`, for `limits`, ``tree="all"`` and `dies_with_caller`, after start(), or if
``ERRAND_BOY_SPAWN`` says so. If ``ERRAND_BOY_SOCKET`` is in the environment when this is imported,
commands are started by the daemon that listens there.

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

try:
    from errand_boy._native import lib as _lib  # noqa: F401  its error names what is missing
except ModuleNotFoundError as _error:
    from sys import implementation as _implementation

    _text = f"errand_boy is partly in C, and that part is not here: {_error}. "
    if _implementation.name != "cpython":
        _text = f"errand_boy is for CPython, and this is {_implementation.name}"
    elif os.path.isdir(os.path.dirname(__file__)):
        _text += "Install it with pip, or build it with python setup.py build_ext --inplace"
    else:
        _text += "It can't be loaded from an archive such as a zipapp: shiv and pex unpack theirs"
    raise ImportError(_text, name=_error.name) from _error

from errand_boy import _ways
from errand_boy._functions import NAMES, rebind
from errand_boy._popen import Popen
from errand_boy._ways import helper_pid, start, stop
from errand_boy.errors import (
    ErrandBoyError,
    HelperDiedError,
    HelperError,
    NoDaemonError,
    ProtocolError,
    RefusedError,
    SessionClosedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from typing import Any

    from errand_boy._client import Client
    from errand_boy._executor import Executor
    from errand_boy._job import Command
    from errand_boy._options import Options
    from errand_boy._policy import Retries
    from errand_boy._preexec import chain
    from errand_boy._result import Result
    from errand_boy._signatures import Call, CheckOutput, Map, Run
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
    """Return the client of the daemon that listens at `path`, or where daemons listen by default.

    It has the functions, constants and exceptions of subprocess, and all of its commands are the
    daemon's. The default is ``$ERRAND_BOY_SOCKET``, else ``errand-boy.sock`` in
    ``$XDG_RUNTIME_DIR`` if that is the user's own directory, else in ``/run``; there too if only
    that has a socket. Threads may share the client, and so may forked processes.

    Nothing is sent before the first command. That raises NoDaemonError if nobody listens, and
    RefusedError if the daemon does not serve this user; also if who listens is not user `peer_uid`
    or, at a default path and without `peer_uid`, neither this user nor root. Whoever listens at a
    path that is named, here or by ``$ERRAND_BOY_SOCKET``, is trusted.
    """
    from errand_boy import _client  # noqa: PLC0415  only those who need it pay for it

    return _client.connect(path, peer_uid=peer_uid)


@_overloaded
def map(commands: Iterable[Command | None], **options: Any) -> Generator[Result, None, None]:
    """Run commands, many at once, and yield a Result for each, which is a CompletedProcess.

    `commands`: argument lists, or with ``shell=True`` strings, or mappings with `args` and, for
    that command, `input`, `timeout`, `retries`, `shell`, `cwd`, `env`, `umask`,
    `start_new_session`, `process_group`, `restore_signals`, `user`, `group`, `extra_groups` and
    those of `Options`. A string is a program's name, without arguments. They are taken as results
    are: an endless iterator will do. What it raises is raised when the results of the commands
    before that have been taken. None from it means that there is no command now, but that results
    may lead to some: the iterator is asked again when a command has ended and when a result has
    been taken, and None is the end once nothing runs and all results are taken.

    `max_workers`: how many run at once; by default four for each CPU.
    `ordered` (true): results come in the order of the commands, else as the commands end.
    `capture_output`, `stdout`, `stderr`, `text`, `encoding`, `errors`, `input`, `timeout`: as
    subprocess.run has them, but that output is captured unless `stdout` or `stderr` is given or
    `capture_output` is false, and that standard input is /dev/null without `input`.
    `timeout` may also be a share of the median of what the others took, ``"200%"``.
    `retries`: how often a command that fails is run again, as a number or a Retries.
    `halt`: when to end early: ``"never"``; ``"soon,fail=N"`` starts no more commands when N have
    failed, ``"now,fail=N"`` ends what runs too, which has no results; ``success=N`` and ``done=N``
    count the others and all, and ``N%`` is a share of all commands if `commands` has a length, else
    of those that have ended, of which there must be three.
    `shell`, `cwd`, `env`, `umask`, `start_new_session`, `process_group`, `restore_signals`, `user`,
    `group`, `extra_groups` and those of `Options`: as Popen has them, for the commands whose
    mappings say nothing else.
    `max_output`: bytes of each output that are kept; with `spool`, all of a longer one is in a
    temporary file.
    `check`: raise at the first Result that is no success. Else a command that can't be started is a
    Result too. `progress`: show a bar on a terminal, if tqdm is installed.

    Each command leads a process group of its own, unless `process_group` or `start_new_session`
    says otherwise; after its `timeout` that group is killed. Closing the iterator ends what runs:
    its process group gets SIGTERM, and SIGKILL a second later; and so does the end of this process.

    The commands are started by a private helper, or if ``ERRAND_BOY_SOCKET`` was set at import by
    the daemon. The environment, the limits and so on are those of the first command's start, the
    working directory and umask too if it is a daemon that runs them. A change of this process's ids
    goes for the next command, one of its capabilities for those that are started 5 ms later. In a
    process forked from this one, the iterator raises ChildProcessError.

    Raises HelperError if there is no helper; by a daemon, NoDaemonError and RefusedError.
    """
    from errand_boy import _map  # noqa: PLC0415

    return _map.map(commands, client=_ways.daemon, **options)


def patch() -> None:
    """Make the process's own subprocess.Popen start commands through errand-boy from now on.

    That goes for all that uses the class, whenever it has imported it, and for the Popen of gevent
    and of eventlet, asyncio's loops and uvloop, be they loaded before or after. os.system, os.fork,
    os.posix_spawn and multiprocessing are left alone, and no command goes to a daemon, whatever
    ``ERRAND_BOY_SOCKET`` says. Calling it again has no effect; unpatch() undoes it.
    """
    from errand_boy import _patching  # noqa: PLC0415

    _patching.patch()


def unpatch() -> None:
    """Undo what patch() did.

    Where the helper owns the children (not on an ordinary Linux), those that were started under
    patch() should have been waited for.
    """
    from errand_boy import _patching  # noqa: PLC0415

    _patching.unpatch()


_LATER = {
    "Executor": "errand_boy._executor",
    "Options": "errand_boy._options",
    "Result": "errand_boy._result",
    "Retries": "errand_boy._policy",
    "chain": "errand_boy._preexec",
    "Sandbox": "errand_boy.sandbox",
}

_ways.daemon = connect() if os.environ.get("ERRAND_BOY_SOCKET") else None

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

    if _ways.daemon is not None:
        Popen = _ways.daemon.Popen
        globals().update((name, getattr(_ways.daemon, name)) for name in NAMES)
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
    "NoDaemonError",
    "Options",
    "Popen",
    "ProtocolError",
    "RefusedError",
    "Result",
    "Retries",
    "Sandbox",
    "SessionClosedError",
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
