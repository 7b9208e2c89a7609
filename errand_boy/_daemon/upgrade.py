"""Replaces a server by the installed version, which the same process executes.

First a child process finds out whether that version starts at all, while the server goes on. Then
the server waits until it has nothing to do itself, and writes its state as JSON into a file in
memory. The new program finds this file, the listening socket, the helpers' sockets and those of
connections that nobody serves yet open at the same numbers.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

from errand_boy._daemon.loop import Loop
from errand_boy._descriptors import open_descriptors
from errand_boy._memory import open_memory
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STATE_VERSION = 1  # of the JSON

_PATIENCE = 30.0  # seconds
_MOST_SAID = 4 << 10  # bytes
_SPARE = 64  # descriptors that a program needs to start


class Successor(NamedTuple):
    """A program that can take over. `version`: of errand-boy; `protocol`: of the protocol."""

    version: str
    protocol: int
    state: int  # STATE_VERSION


def introduce() -> str:
    """Return this program's answer to `check`, after importing the whole package."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(sys.argv[0]))))
    for name in [name for name in sys.modules if name.partition(".")[0] == "errand_boy"]:
        del sys.modules[name]
    import errand_boy  # noqa: PLC0415

    return json.dumps(Successor(errand_boy.__version__, lib.EB_VERSION, STATE_VERSION))


def check(
    loop: Loop,
    processes: dict[int, Callable[[int], None]],
    done: Callable[[Successor | str], None],
) -> None:
    """Find out whether the installed version can take over.

    `done` is called with a Successor, or with the reason why there is none. `processes` has
    functions by pid, which are called with the exit status.
    """
    said = open_memory("errand-boy-check")
    try:
        pid = os.posix_spawn(
            sys.executable,
            _command("--check", sys.argv[-1]),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, said, 1), (os.POSIX_SPAWN_DUP2, said, 2)],
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
    except OSError as error:
        os.close(said)
        done(f"{sys.executable}: {error.strerror}")
        return
    late = loop.call_later(_PATIENCE, lambda: os.kill(pid, signal.SIGKILL))

    def on_exit(status: int) -> None:
        late.cancel()
        size = os.fstat(said).st_size
        text = os.pread(said, _MOST_SAID, max(0, size - _MOST_SAID)).decode("utf-8", "replace")
        os.close(said)
        done(_judge(status, text))

    processes[pid] = on_exit


def _judge(status: int, said: str) -> Successor | str:
    line = (said.splitlines() or ["it says nothing"])[-1]
    if status != 0:
        return f"the installed version does not start: {line}"
    try:
        found = Successor(*json.loads(line))
    except (ValueError, TypeError):
        return f"the installed version gave no valid answer: {line}"
    if found.state != STATE_VERSION:
        return f"version {found.version} cannot take over: restart the daemon"
    return found


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", sys.argv[0], *arguments]


class Handover:
    """The descriptors and the state for the successor."""

    def __init__(self) -> None:
        self._kept: list[int] = []

    def keep(self, fd: int) -> int:
        """Keep a descriptor open, and return it."""
        os.set_inheritable(fd, True)
        self._kept.append(fd)
        return fd

    def execute(self, version: str, state: dict[str, Any]) -> None:
        """Execute the successor, of `version`, with `state`. Raises OSError, and never returns."""
        if len(open_descriptors()) + _SPARE > os.sysconf("SC_OPEN_MAX"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        fd = open_memory("errand-boy-state")
        os.set_inheritable(fd, True)
        try:
            with open(fd, "w", encoding="ascii", closefd=False) as file:
                json.dump(state, file)
            os.lseek(fd, 0, os.SEEK_SET)
            argument = json.loads(sys.argv[-1])
            argument["options"]["version"] = version
            argument["state"] = fd
            os.execv(sys.executable, _command(json.dumps(argument)))
        finally:
            os.close(fd)

    def undo(self) -> None:
        """Mark the descriptors close-on-exec again."""
        for fd in self._kept:
            os.set_inheritable(fd, False)


def read(fd: int) -> dict[str, Any]:
    """Read the state that a predecessor has left in descriptor `fd`, and close it."""
    with open(fd, encoding="ascii") as file:
        state: dict[str, Any] = json.load(file)
    return state
