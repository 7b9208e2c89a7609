"""ptyprocess's classes, whose programs are started without a fork of this process.

``PtyProcess`` and ``PtyProcessUnicode`` are ptyprocess's own but for `spawn`. errand_boy.patch()
has ptyprocess itself start so, and with it pexpect, terminado, IPython and Jupyter.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ptyprocess
from ptyprocess import PtyProcessError
from ptyprocess.util import which

from errand_boy import _forkpty, _start
from errand_boy.terminal import Pty

__all__ = ["PtyProcess", "PtyProcessError", "PtyProcessUnicode"]

# What is done already: the program leads a session.
_DONE = (None, os.setsid, os.setpgrp)


class _Spawn:
    @classmethod
    def spawn(cls, *args: Any, **kwargs: Any) -> Any:
        """Start a program on a new terminal; see ptyprocess.PtyProcess.spawn.

        It is a child of this process. `preexec_fn` may be None, and what pexpect makes of
        `ignore_sighup`; any other function is called in a fork of this process, with a warning.
        Raises OSError also for a `cwd` that can't be entered.
        """
        return spawn(super().spawn, cls, *args, **kwargs)  # type: ignore[misc]


class PtyProcess(_Spawn, ptyprocess.PtyProcess):  # type: ignore[misc]  # it has no types
    """ptyprocess.PtyProcess whose program is started without a fork."""


class PtyProcessUnicode(_Spawn, ptyprocess.PtyProcessUnicode):  # type: ignore[misc]
    """ptyprocess.PtyProcessUnicode whose program is started without a fork."""


def spawn(
    original: Callable[..., Any],
    cls: Any,
    argv: Sequence[Any],
    cwd: Any = None,
    env: Mapping[Any, Any] | None = None,
    echo: bool = True,
    preexec_fn: Callable[[], Any] | None = None,
    dimensions: tuple[int, int] = (24, 80),
    pass_fds: Sequence[int] = (),
) -> Any:
    """Return what `cls.spawn` does; `original` is the class's own, for what needs a fork."""
    options = _options_for(preexec_fn)
    if options is None or not _forkpty.can_start():
        if options is None:
            _start.LOCAL.check_function(preexec_fn, {})  # type: ignore[arg-type]
        return original(argv, cwd, env, echo, preexec_fn, dimensions, pass_fds)
    if not isinstance(argv, (list, tuple)):
        raise TypeError(f"Expected a list or tuple for argv, got {argv!r}")  # ptyprocess's words
    program = which(argv[0])
    if program is None:
        text = "The command was not found or was not executable: "  # ptyprocess's words
        raise FileNotFoundError(f"{text}{argv[0]}.")
    argv = [program, *argv[1:]]
    pid, fd = _forkpty.start(
        argv,
        Pty(*dimensions, echo=None if echo else False),
        cwd=cwd,
        env=env,
        pass_fds=pass_fds,
        **options,
    )
    process = cls(pid, fd)
    process.argv = argv
    if env is not None:
        process.env = env
    if cwd is not None:
        process.launch_dir = cwd
    return process


def _options_for(preexec_fn: Any) -> dict[str, Any] | None:
    """Return the options that say what a function does, or None if it is not known."""
    if preexec_fn in _DONE:
        return {}
    code = getattr(preexec_fn, "__code__", None)
    pexpect = sys.modules.get("pexpect.pty_spawn")
    if code is None or pexpect is None or code.co_name != "preexec_wrapper":
        return None
    # pexpect's, for ignore_sighup: around the one that was given to it.
    if preexec_fn.__globals__ is not vars(pexpect) or code.co_freevars != ("preexec_fn",):
        return None
    inner = _options_for(preexec_fn.__closure__[0].cell_contents)
    return None if inner is None else {"signals_ignored": [signal.SIGHUP], **inner}
