"""Starts one command, in any way and for any kind of caller.

`begin` does as much as possible without waiting, and returns the rest as a generator for a driver.
If a start is interrupted after its request was sent, it is concluded, so that no child is lost.
"""

from __future__ import annotations

import errno
import os
import posix
import sys
import warnings
from collections.abc import Callable, Mapping

from errand_boy._environment import variable
from errand_boy._hints import SEE_DOCTOR, page
from errand_boy._native import lib
from errand_boy._options import request as _request
from errand_boy._options.request import Request
from errand_boy._process import direct, way as _way
from errand_boy._process.driver import BLOCKING, Driver
from errand_boy._wire import frames
from errand_boy._wire.frames import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._options.spawn_frame import SpawnFrame
    from errand_boy._process.driver import Outcome, Steps
    from errand_boy._wire.connection import Connection

NOTHING: Mapping[str, Any] = {}
_LOOK = 100_000  # microseconds between checks of a pending start
_TAKES_ANY = 8  # inspect.CO_VARKEYWORDS
# Parameters of run, which calls Popen with all others: a misspelt one may mean them.
_OF_RUN = frozenset(("capture_output", "check", "input", "timeout"))


class Local:
    """Starts commands in this process or by its helper."""

    default_group = -1  # the caller's group
    is_daemon = False
    way = staticmethod(_way.way)

    def acquire(self, request: Request, spawn_frame: SpawnFrame) -> Connection:
        from errand_boy._process import helper  # noqa: PLC0415  most processes need none

        return helper.launcher.acquire(request, spawn_frame)

    def until_reachable(self) -> Steps:
        from errand_boy._process import helper  # noqa: PLC0415

        return helper.launcher.until_reachable()

    def check_function(self, preexec_fn: Callable[[], Any], more: Mapping[str, Any]) -> None:
        """Warn that a `preexec_fn` needs a fork; raise ValueError if `more` has options."""
        if more:
            raise ValueError(f"{_names(more)} can't be given with a preexec_fn that needs a fork")
        _warn_of_fork(preexec_fn)


LOCAL: Local = Local()


def take_options(
    process: Any,
    construct: Any,
    standard: frozenset[str],
    args: tuple[Any, ...],
    given: dict[str, Any],
) -> bool:
    """Move the options from the keywords of a constructor to `process`.

    `standard` are the names that the base class's constructor, `construct`, knows. With a terminal,
    call `construct` with other arguments. Return whether it has been called. Raises TypeError for a
    name that is neither.
    """
    from errand_boy._options.table import take  # noqa: PLC0415  only those who need it pay for it

    process._more = {**process._more, **take(given, standard)}
    unknown = given.keys() - standard
    # A monitoring package may have wrapped it, in a callable that names no parameters.
    code = getattr(construct, "__code__", None)
    if unknown and code is not None and not code.co_flags & _TAKES_ANY:
        raise _request.unexpected(f"{construct.__qualname__}()", unknown, standard | _OF_RUN)
    if process._more and direct.WITHOUT_C is not None:
        raise _refusal(process._more)
    if "pty" not in process._more:
        return False
    from errand_boy._process import pty  # noqa: PLC0415

    pty.construct(process, construct, args, given)
    return True


class Owned(Local):
    """Starts commands by the helper of this process that owns its commands."""

    def way(self, with_ids: bool) -> str:
        way = _way.way(with_ids)
        if way == "subprocess" or variable("ERRAND_BOY_SPAWN") == "direct":
            text = "tree='all' and dies_with_caller=True need a helper"
            raise OSError(errno.ENOTSUP, f"{text}, which is not available here{SEE_DOCTOR}")
        return "helper"

    def acquire(self, request: Request, spawn_frame: SpawnFrame) -> Connection:
        from errand_boy._process import helper  # noqa: PLC0415

        return helper.runner.acquire(request, spawn_frame)

    def until_reachable(self) -> Steps:
        from errand_boy._process import helper  # noqa: PLC0415

        return helper.runner.until_reachable()


OWNED: Owned = Owned()


_ENDS = frozenset(("stop", "tree", "drain", "dies_with_caller"))


def stopping() -> Any:
    """Import and return the module that ends commands."""
    from errand_boy._process import stop  # noqa: PLC0415  only those who need it pay for it

    return stop


def _tracker() -> Any:
    from errand_boy._process import tracker as module  # noqa: PLC0415  only those who need it pay

    return module


def execute(
    process: Any,
    given: tuple[Any, ...],
    original: Callable[..., None],
    source: Any = LOCAL,
    driver: Driver = BLOCKING,
    more: Mapping[str, Any] = NOTHING,
) -> None:
    """Start a command; the arguments are those of `begin`."""
    steps = begin(process, given, original, source, driver, more)
    if steps is not None:
        driver.run(steps)


def begin(
    process: Any,
    given: tuple[Any, ...],
    original: Callable[..., None],
    source: Any,
    driver: Driver,
    more: Mapping[str, Any],
) -> Steps | None:
    """Start a command as far as possible without waiting; return the remaining steps, or None.

    - `process` may be of any class. Its `pid` and `_child_created` are set as soon as there is a
      child, and `_helper_child` if a helper owns it.
    - `given` are the arguments of subprocess.Popen's _execute_child.
    - `original` is the method to call with both if the standard library has to start the command.
    - `source` is Local or a daemon.
    - `more` are settings that the standard library lacks.
    """
    # This follows CPython 3.13's _execute_child, which gives the reasons.
    args: Any
    (
        args, executable, preexec_fn, close_fds, pass_fds, cwd, env, _, _, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session,
    ) = given[:22]  # fmt: skip
    process_group = given[22] if len(given) > 22 else -1  # Python 3.11
    settings = more
    if preexec_fn is not None:
        # No imports are possible at the end, where subprocess raises its exception.
        if direct.WITHOUT_C is not None or sys.is_finalizing():
            original(process, *given)
            return None
        from errand_boy._options import preexec  # noqa: PLC0415  only those who need it pay for it

        before = (cwd, umask, uid, gid, gids, start_new_session, process_group)
        known = preexec.translate(
            preexec_fn, {**dict(zip(preexec.PARAMETERS, before, strict=True)), **more}
        )
        if known is None:
            source.check_function(preexec_fn, more)
            original(process, *given)
            return None
        after = [known.pop(name) for name in preexec.PARAMETERS]
        cwd, umask, uid, gid, gids, start_new_session, process_group = after
        settings = known
    if settings and "limits" in settings:
        outputs = (c2pread, c2pwrite, 1), (errread, errwrite, 2)
        read = {vars(process).get("_slave"), c2pwrite if c2pread != -1 else None}
        unread = [inherited if fd == -1 else fd for ours, fd, inherited in outputs if ours == -1]
        process._limited, settings = _tracker().prepare(
            settings, source is LOCAL, [fd for fd in unread if fd not in read]
        )
        more = settings
    has_ids = gids is not None or max(-1 if gid is None else gid, -1 if uid is None else uid) >= 0
    if more and not _ENDS.isdisjoint(more):
        from errand_boy._options import ends as _ends  # noqa: PLC0415  only those who need it pay

        ends = _ends.of(more) or _ends.Ends()
        process._ends = ends
        if source is LOCAL and (ends.tree == "all" or "dies_with_caller" in more):
            source = OWNED
        if ends.tree == "group" and not start_new_session and process_group < 0:
            process_group = 0
    way = source.way(has_ids)
    if way == "subprocess":
        _by_the_standard_library(process, given, original, more)
        return None

    args = _request.arguments(args, shell, executable)
    if executable is None:
        executable = args[0]
    sys.audit("subprocess.Popen", executable, args, cwd, env)

    encoded, flags, carried = _request.settings(
        env=env,
        cwd=cwd,
        restore_signals=restore_signals,
        umask=umask,
        start_new_session=start_new_session,
        process_group=process_group,
        default_group=source.default_group,
        gids=gids,
        gid=gid,
        uid=uid,
        **settings,
    )
    options = _request.command(args, executable, env) + encoded
    standard = _request.standard(p2cread, c2pwrite, errwrite)
    others = _request.others(pass_fds) if pass_fds else []

    names = executable, cwd
    if way != "direct":
        if not close_fds:
            others = _request.with_inheritable(others)
        request = Request(options, standard, others, carried, flags)
        from errand_boy._process import by_helper  # noqa: PLC0415  most processes need none

        steps = by_helper.by_helper(process, request, source, driver)
        return _finish(process, given, names, steps, settings)

    if not close_fds:
        flags |= lib.EB_KEEP_FILES
    null = vars(process).get("_devnull")
    if p2cwrite != -1 or p2cread == null:
        flags |= lib.EB_OWN_STDIN
    if c2pread != -1 or c2pwrite == null:
        flags |= lib.EB_OWN_STDOUT | (lib.EB_OWN_STDERR if errwrite == c2pwrite else 0)
    if errread != -1 or errwrite == null:
        flags |= lib.EB_OWN_STDERR
    fds = _request.numbers(carried) if carried else carried
    outcome = direct.spawn(process, options, *standard, others, fds, flags, driver.patience_us)
    if outcome is None:
        if standard != (-1, -1, -1):
            close_ends(process, given)
        return None
    steps = _directly(process, given, original, source, driver, outcome, carried, more)
    return _finish(process, given, names, steps, settings)


def close_ends(process: Any, given: tuple[Any, ...]) -> None:
    """Close the child's ends of the pipes, unless they are closed already."""
    if process._closed_child_pipe_fds:
        return
    p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = given[10:16]
    null: int | None = getattr(process, "_devnull", None)
    # Not os.close: gevent's version closes later, maybe too late for the end-of-file.
    for ours, theirs in (p2cwrite, p2cread), (c2pread, c2pwrite), (errread, errwrite):
        if ours != -1 and theirs not in (-1, null):
            posix.close(theirs)
    if null is not None:
        posix.close(null)
    slave = vars(process).pop("_slave", None)  # of its terminal, see pty
    if slave is not None:
        posix.close(slave)
    process._closed_child_pipe_fds = True


def _finish(
    process: Any,
    given: tuple[Any, ...],
    names: tuple[Any, Any],
    steps: Outcome,
    more: Mapping[str, Any],
) -> Steps:
    """Run `steps`, and raise subprocess's exception if the start fails."""
    executable, cwd = names
    try:
        failed = yield from steps
    except OSError as error:
        _request.name_program(error, executable)
        raise
    if failed is not None:
        raise _request.spawn_error(failed, executable, cwd, more)
    close_ends(process, given)


def _directly(
    process: Any,
    given: tuple[Any, ...],
    original: Callable[..., None],
    source: Any,
    driver: Driver,
    outcome: Any,
    carried: list[Any],
    more: Mapping[str, Any],
) -> Outcome:
    """Await the outcome of a start in this process; `outcome` is what `spawn` returned.

    `carried` must stay open until the start is left, because the child may still need it.
    """
    if not isinstance(outcome, tuple):
        start, pauses = outcome, direct.pauses()
        look = _LOOK if driver.blocking else 0
        try:
            while (outcome := direct.await_spawn(process, start, look)) is start:
                if not driver.blocking:
                    yield next(pauses)
        finally:
            direct.leave_spawn(start)
        if outcome is None:
            return None
    failed = Failed(0, *outcome)
    if not frames.is_refused(failed):
        return failed
    direct.give_up()
    source.way(False)  # raises if the direct way is forced
    _by_the_standard_library(process, given, original, more)
    return None


def _by_the_standard_library(
    process: Any, given: tuple[Any, ...], original: Callable[..., None], more: Mapping[str, Any]
) -> None:
    if more:
        raise _refusal(more)
    original(process, *given)


def _refusal(more: Mapping[str, Any]) -> OSError:
    text = f"{_names(more)} can't be given on this system: {direct.missing()}{SEE_DOCTOR}"
    return OSError(errno.ENOTSUP, text)


def _names(more: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}=" for name in more)


_warned: set[tuple[str, int]] = set()


def _warn_of_fork(preexec_fn: Callable[[], Any]) -> None:
    modules = ("subprocess", "gevent.subprocess", "eventlet.green.subprocess")
    files = [sys.modules[name].__file__ or "" for name in modules if name in sys.modules]
    inside = (os.path.dirname(os.path.dirname(__file__)) + os.sep, *files)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
        level += 1
    # The warnings module can't do this: os.get_exec_path resets its memory with each command.
    place = (frame.f_code.co_filename, frame.f_lineno)
    if place in _warned:
        return
    _warned.add(place)
    name = getattr(preexec_fn, "__qualname__", repr(preexec_fn))
    warnings.warn(
        f"preexec_fn={name} makes Popen fork this process. Use {instead_of(preexec_fn)}",
        RuntimeWarning,
        stacklevel=level,
    )


def instead_of(preexec_fn: Callable[[], Any]) -> str:
    """Return advice on replacing a `preexec_fn` that is not known."""
    from errand_boy._options import preexec  # noqa: PLC0415

    names = preexec.substitutes(preexec_fn)
    if names:
        return f"{', '.join(f'{name}=' for name in names)} instead: see {page('options')}"
    return (
        f"an option instead ({page('options')} has the list), or start a small program that does "
        "it and then executes the command"
    )
