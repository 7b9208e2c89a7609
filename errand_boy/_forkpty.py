"""Starts programs on a new terminal, and returns a pid and a descriptor, as os.forkpty does.

ptyprocess and pty.spawn need this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

from errand_boy._native import lib
from errand_boy._process import start as _start, way
from errand_boy.terminal import Pty, open_pair


class _Child:
    """The process object of a start: see begin in _process/start.py."""

    pid = 0
    _child_created = False
    _closed_child_pipe_fds = True  # there are none
    returncode = None

    def _on_child(self, watcher: object) -> None:
        pass


def start(
    argv: list[Any],
    pty: Pty | None,
    *,
    cwd: Any = None,
    env: Mapping[Any, Any] | None = None,
    close_fds: bool = True,
    pass_fds: Sequence[int] = (),
    preexec_fn: Any = None,
) -> tuple[int, int]:
    """Start a program as os.forkpty and an exec would; return its pid and the caller's side.

    It is a child of this process, and ignores the same signals. Without a `pty`, the terminal has
    no size. Raises OSError.
    """
    if pty is None:
        pty = Pty(0, 0)
    master, slave = open_pair(pty)
    try:
        # fmt: off
        given = (
            argv, None, preexec_fn, close_fds, pass_fds, cwd, env, None, 0, False,
            slave, -1, -1, slave, -1, slave,
            False, None, None, None, -1, True, -1,
        )
        # fmt: on
        more = {"controlling_terminal": slave}
        gevent = sys.modules.get("gevent.monkey")
        child = _Child()
        if gevent is not None and gevent.is_object_patched("os", "fork"):
            from errand_boy import gevent as hub  # noqa: PLC0415

            hub.start(_no_original, child, given, more)
        else:
            _start.execute(child, given, _no_original, more=more)
    except BaseException:
        os.close(master)
        raise
    finally:
        os.close(slave)
    return child.pid, master


def spawn(original: Any, argv: Any, *args: Any, **kwargs: Any) -> Any:
    """Do what pty.spawn does, which is `original`, without a fork.

    Raises OSError for a program that can't be started.
    """
    if not can_start():
        return original(argv, *args, **kwargs)

    def fork() -> tuple[int, int]:
        words = [argv] if isinstance(argv, str) else list(argv)
        return start(words, None, close_fds=False)

    # The code of the original, with another fork().
    namespace = {**original.__globals__, "fork": fork}
    function = FunctionType(original.__code__, namespace, original.__name__, original.__defaults__)
    return function(argv, *args, **kwargs)


def can_start() -> bool:
    """Return whether `start` can start children of this process on this system."""
    return bool(lib.EB_HAVE_RAW) and way.way(False) != "subprocess"


def _no_original(*_: Any) -> None:
    raise AssertionError("the standard library lacks these options")
