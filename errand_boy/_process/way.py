"""Decides how a command is started: in this process, by a helper, or by the standard library."""

from __future__ import annotations

import errno
import sys

from errand_boy._environment import variable
from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import lib
from errand_boy._process import direct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

daemon: Any = (
    None  # the client of the daemon that ERRAND_BOY_SOCKET named when errand_boy was imported
)
_helper_is_asked_for = False


def way(with_ids: bool) -> str:
    """Return how the next command is to be started: "direct", "helper" or "subprocess".

    `with_ids`: the command gets other ids than this process has. A process that changes its ids
    makes its memory undumpable, and a child that is started directly shares the caller's memory.
    "subprocess" is the standard library's own way, for systems that support neither of the others.
    """
    mode = variable("ERRAND_BOY_SPAWN")
    if mode is None:
        if (with_ids or _helper_is_asked_for) and lib.EB_HAVE_RAW:
            return "helper"
        return "direct" if direct.works() else "subprocess"
    if mode in ("helper", "posix"):
        return "helper"
    if mode != "direct":
        raise ValueError(f"ERRAND_BOY_SPAWN={mode}: it must be direct, helper or posix")
    if with_ids:
        text = (
            "user=, group= and extra_groups= need a helper, which ERRAND_BOY_SPAWN=direct forbids"
        )
        raise OSError(errno.ENOTSUP, text)
    if missing := direct.missing():
        text = f"ERRAND_BOY_SPAWN=direct can't be obeyed: {missing}{SEE_DOCTOR}"
        raise OSError(errno.ENOSYS, text)
    return "direct"


def reason() -> str:
    """Return in words why the next command, without other ids, is started in its way."""
    mode = variable("ERRAND_BOY_SPAWN")
    if mode is not None:
        return f"ERRAND_BOY_SPAWN={mode} says so"
    if _helper_is_asked_for and lib.EB_HAVE_RAW:
        return "errand_boy.start() was called"
    return direct.missing() or "this system has all that it needs"


def start() -> None:
    """Start a helper now, and have it start all further commands of this process, until stop().

    A helper's commands have their own peak memory (`ru_maxrss`). For others the kernel counts the
    peak of the process that started them too, as with subprocess. The helper starts fastest while
    this process is small and single-threaded. Raises HelperError.
    """
    global _helper_is_asked_for
    _helper_is_asked_for = True
    if lib.EB_HAVE_RAW:  # else a helper can't make children of this process
        from errand_boy._process import helper as _helper  # noqa: PLC0415  most processes need none

        _helper.launcher.start()


def stop() -> None:
    """End the helper, if there is one, and wait until it has ended.

    This process then starts further commands itself. A map, or a command that needs a helper,
    starts a new one. Call this before ``os.exec*`` of a set-user-ID program: Linux ignores that bit
    while another process shares the working directory, as the helper does. A helper that still has
    commands of a `map` stays until they end, but no longer shares anything with this process.
    """
    global _helper_is_asked_for
    _helper_is_asked_for = False
    helper = sys.modules.get("errand_boy._process.helper")
    if helper is not None:
        helper.stop()


def helper_pid() -> int | None:
    """Return the pid of the helper that starts children of this process, or None."""
    helper = sys.modules.get("errand_boy._process.helper")
    current = None if helper is None else helper.launcher.current
    return None if current is None else current.pid
