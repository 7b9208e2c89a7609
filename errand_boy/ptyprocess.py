"""The classes of ptyprocess, which start programs without forking this process.

``PtyProcess`` and ``PtyProcessUnicode`` are those of ptyprocess, except for `spawn`. After
errand_boy.patch(), ptyprocess itself does the same, and with it pexpect, terminado, IPython and
Jupyter.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ptyprocess
from ptyprocess import PtyProcessError
from ptyprocess.util import which

from errand_boy import _forkpty
from errand_boy._options import preexec as _preexec
from errand_boy._options.preexec import chain
from errand_boy._process import start as _start
from errand_boy.terminal import Pty

__all__ = ["PtyProcess", "PtyProcessError", "PtyProcessUnicode"]


if TYPE_CHECKING:
    from errand_boy._types.ptyprocess import PtyProcess as _Bytes, PtyProcessUnicode as _Text
else:
    _Bytes, _Text = ptyprocess.PtyProcess, ptyprocess.PtyProcessUnicode


class _Spawn:
    """Replaces `spawn` in a class of ptyprocess."""

    if not TYPE_CHECKING:

        @classmethod
        def spawn(cls, *args: Any, **kwargs: Any) -> Any:
            """Start a program on a new terminal; see ptyprocess.PtyProcess.spawn.

            The program is a child of this process. A `preexec_fn` is treated as in
            errand_boy.Popen; those of pexpect (`ignore_sighup`) and terminado are known too. Raises
            OSError, also for a `cwd` that can't be entered.
            """
            return spawn(super().spawn, cls, *args, **kwargs)


class PtyProcess(_Spawn, _Bytes):
    """ptyprocess.PtyProcess whose program is started without a fork."""


class PtyProcessUnicode(_Spawn, _Text):
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
    """Do what `cls.spawn` does; `original` is the class's own method, for starts that must fork."""
    function = None if preexec_fn is None else _known(preexec_fn)
    if (function is None and preexec_fn is not None) or not _forkpty.can_start():
        if preexec_fn is not None:
            _start.LOCAL.check_function(preexec_fn, {})
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
        preexec_fn=function,
    )
    process = cls(pid, fd)
    process.argv = argv
    if env is not None:
        process.env = env
    if cwd is not None:
        process.launch_dir = cwd
    return process


def _known(preexec_fn: Callable[[], Any]) -> Callable[[], Any] | None:
    """Return a known function that does the same, so that no fork is needed, or None."""
    function = _equivalent(preexec_fn)
    parameters = dict.fromkeys(_preexec.PARAMETERS)
    return None if _preexec.translate(function, parameters) is None else function


def _equivalent(preexec_fn: Any) -> Any:
    """Return a known function that does what a function of pexpect or terminado does."""
    code = getattr(preexec_fn, "__code__", None)
    if code is None:
        return preexec_fn
    module, names = preexec_fn.__module__, (*code.co_freevars, *code.co_names)
    if module == "pexpect.pty_spawn" and code.co_name == "preexec_wrapper":
        if names == ("preexec_fn", "signal", "SIGHUP", "SIG_IGN"):  # pexpect's `ignore_sighup`
            given = preexec_fn.__closure__[0].cell_contents
            ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
            return ignore if given is None else chain(ignore, _equivalent(given))
    elif module == "terminado.management" and names == ("signal", "SIGPIPE", "SIG_DFL"):
        return partial(signal.signal, signal.SIGPIPE, signal.SIG_DFL)
    return preexec_fn
