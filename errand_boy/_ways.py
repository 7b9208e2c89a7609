"""Which way a command is started: in this process, by a helper, or by the standard library."""

from __future__ import annotations

import errno
import os
import sys

from errand_boy import _direct
from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

daemon: Any = (
    None  # the client of the one that ERRAND_BOY_SOCKET named when errand_boy was imported
)
_helper_is_asked_for = False


def way(with_ids: bool) -> str:
    """Return how the next command is to be started: "direct", "helper" or "subprocess".

    `with_ids`: it gets other ids than this process has. If a process that shares memory changes its
    ids, the memory becomes undumpable, and in the direct way that is the caller's memory.
    "subprocess" is the standard library's own way, for systems that have neither of the others.
    """
    mode = os.environ.get("ERRAND_BOY_SPAWN")
    if mode is None:
        if (with_ids or _helper_is_asked_for) and lib.EB_HAVE_RAW:
            return "helper"
        return "direct" if _direct.works() else "subprocess"
    if mode in ("helper", "posix"):
        return "helper"
    if mode != "direct":
        raise ValueError(f"ERRAND_BOY_SPAWN={mode}: it must be direct, helper or posix")
    if with_ids:
        text = (
            "user=, group= and extra_groups= need a helper, which ERRAND_BOY_SPAWN=direct forbids"
        )
        raise OSError(errno.ENOTSUP, text)
    if missing := _direct.missing():
        text = f"ERRAND_BOY_SPAWN=direct can't be obeyed: {missing}{SEE_DOCTOR}"
        raise OSError(errno.ENOSYS, text)
    return "direct"


def reason() -> str:
    """Return in words what decides how the next command without other ids is started."""
    mode = os.environ.get("ERRAND_BOY_SPAWN")
    if mode is not None:
        return f"ERRAND_BOY_SPAWN={mode} says so"
    if _helper_is_asked_for and lib.EB_HAVE_RAW:
        return "errand_boy.start() was called"
    return _direct.missing() or "this system has all that it needs"


def start() -> None:
    """Start a helper now, and have it start all further commands of this process, until stop().

    Only a command that a helper starts has a peak memory (`ru_maxrss`) of its own; otherwise the
    kernel counts the peak of the process that started it, as with subprocess. The helper starts
    fastest while this process is small and single-threaded. Raises HelperError.
    """
    global _helper_is_asked_for
    from errand_boy import _helper  # noqa: PLC0415  most processes need none

    _helper_is_asked_for = True
    if lib.EB_HAVE_RAW:  # else it could not make children of this process's
        _helper.launcher.start()


def stop() -> None:
    """End the helper, if there is one, and wait for its end.

    This process then starts further commands itself; a command that needs a helper, or a map,
    starts a new one. Call this before ``os.exec*`` of a set-user-ID program: Linux ignores that bit
    while another process shares the working directory, as the helper does. A helper that still has
    commands of a `map` stays until they end, but shares nothing with this process any more.
    """
    global _helper_is_asked_for
    _helper_is_asked_for = False
    helper = sys.modules.get("errand_boy._helper")
    if helper is not None:
        helper.stop()


def helper_pid() -> int | None:
    """Return the pid of the helper that starts children of this process, or None without one."""
    helper = sys.modules.get("errand_boy._helper")
    current = None if helper is None else helper.launcher.current
    return None if current is None else current.pid
