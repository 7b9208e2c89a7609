"""Replaces a known `preexec_fn` by parameters and options that do the same without a fork.

It knows functions of os, resource and signal, with their arguments in functools.partial, and chains
of these. The standard library runs any other function, and these with other arguments.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType

from errand_boy._options.table import RESOURCES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The parameters of Popen that functions set besides options, with their names in `begin`.
PARAMETERS = ("cwd", "umask", "uid", "gid", "gids", "start_new_session", "process_group")


class Chain:
    """Calls functions one after the other. See `chain`."""

    __slots__ = ("functions",)

    def __init__(self, functions: tuple[Callable[[], Any], ...]) -> None:
        self.functions: tuple[Callable[[], Any], ...] = functions

    def __call__(self) -> None:
        for function in self.functions:
            function()


def chain(*functions: Callable[[], Any]) -> Chain:
    """Return a `preexec_fn` that calls `functions` in turn.

    If errand-boy knows all of them (the documentation lists those that it knows), Popen uses the
    options that do the same, and starts the command without a fork. Raises TypeError if one of
    them can't be called.
    """
    for function in functions:
        if not callable(function):
            raise TypeError(f"{function!r} can't be called")
    return Chain(functions)


def translate(function: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `given`, a mapping of PARAMETERS and options, as changed by a `preexec_fn`.

    Return None if the function is not known, or if it would fail.
    """
    wanted = dict(given)
    known = _known_functions()
    for called, arguments in _calls(function):
        try:
            change = known.get(called)
        except TypeError:  # it is not hashable
            return None
        if change is None or arguments is None:
            return None
        try:
            if change(wanted, *arguments) is _UNKNOWN:
                return None
        except (TypeError, ValueError, LookupError, OSError):
            return None
    return wanted


def substitutes(function: Any) -> list[str]:
    """Return the names of options that do what `function` seems to do."""
    names: dict[str, None] = {}
    for called, _ in _calls(function):
        code = getattr(called, "__code__", None)
        for name in _names(code) if code is not None else [getattr(called, "__name__", "")]:
            for option in _SUBSTITUTES.get(name, "").split():
                names[option] = None
    return list(names)


def _calls(function: Any) -> Iterator[tuple[Any, tuple[Any, ...] | None]]:
    """Yield each called function and its arguments, or None if some are keywords."""
    if isinstance(function, Chain):
        for part in function.functions:
            yield from _calls(part)
    elif isinstance(function, partial):
        yield function.func, None if function.keywords else function.args
    else:
        yield function, ()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# -- the effect of each function on the parameters; _UNKNOWN: not known with these arguments --

_UNKNOWN = object()


def _known_functions() -> dict[Any, Callable[..., object]]:
    known: dict[Any, Callable[..., object]] = {
        **_KNOWN,
        signal.signal: _signal,
    }  # which gevent replaces
    resource = sys.modules.get("resource")
    if resource is not None:
        known[resource.setrlimit] = _setrlimit
    return known


def _setsid(wanted: dict[str, Any]) -> None:
    wanted["start_new_session"] = True


def _setpgid(wanted: dict[str, Any], pid: int = 0, group: int = 0) -> object:
    if pid != 0 or group < 0:
        return _UNKNOWN
    wanted["process_group"] = group
    return None


def _nice(wanted: dict[str, Any], increment: int) -> None:
    wanted["nice"] = (wanted.get("nice") or 0) + increment


def _umask(wanted: dict[str, Any], mask: int) -> None:
    wanted["umask"] = mask & 0o777


def _chdir(wanted: dict[str, Any], path: Any) -> object:
    if isinstance(path, int):
        return _UNKNOWN
    before, path = wanted["cwd"], os.fsencode(path)
    wanted["cwd"] = path if before is None else os.path.join(os.fsencode(before), path)
    return None


def _setaffinity(wanted: dict[str, Any], pid: int, cpus: Any) -> object:
    if pid != 0:
        return _UNKNOWN
    wanted["cpu_affinity"] = set(cpus)
    return None


def _setrlimit(wanted: dict[str, Any], number: int, limits: Any) -> None:
    soft, hard = limits
    wanted["rlimits"] = {**(wanted.get("rlimits") or {}), RESOURCES[number]: (soft, hard)}


def _signal(wanted: dict[str, Any], number: int, action: Any) -> object:
    if action not in (signal.SIG_IGN, signal.SIG_DFL) or isinstance(action, bool):
        return _UNKNOWN
    names = "signals_ignored", "signals_default"
    into, out_of = names if action == signal.SIG_IGN else reversed(names)
    wanted[into] = {*(wanted.get(into) or ()), int(number)}
    wanted[out_of] = {*(wanted.get(out_of) or ())} - {int(number)}
    return None


def _sigmask(wanted: dict[str, Any], how: int, signals: Any) -> None:
    before = wanted.get("signals_blocked")
    if before is None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    mask, before = {int(number) for number in signals}, {int(number) for number in before}
    if how == signal.SIG_BLOCK:
        mask |= before
    elif how == signal.SIG_UNBLOCK:
        mask = before - mask
    wanted["signals_blocked"] = mask


def _ids(name: str, count: int) -> Callable[..., object]:
    """Return the effect of a function that sets the real, the effective and the saved id."""

    def change(wanted: dict[str, Any], *ids: int) -> object:
        # A function that takes fewer ids sets all three only for root. After a change of the user,
        # the group can't be changed any more.
        all_are_set = count == 3 or os.geteuid() == 0
        if len(ids) != count or len({*ids}) != 1 or ids[0] < 0 or not all_are_set:
            return _UNKNOWN
        if name == "gid" and _has_user(wanted):
            return _UNKNOWN
        wanted[name] = ids[0]
        return None

    return change


def _has_user(wanted: dict[str, Any]) -> bool:
    return wanted["uid"] is not None and wanted["uid"] >= 0


def _setgroups(wanted: dict[str, Any], groups: Any) -> object:
    if _has_user(wanted):
        return _UNKNOWN
    wanted["gids"] = list(groups)
    return None


def _initgroups(wanted: dict[str, Any], user: str, group: int) -> object:
    return _setgroups(wanted, os.getgrouplist(user, group))


_KNOWN: dict[Any, Callable[..., object]] = {
    os.chdir: _chdir,
    os.initgroups: _initgroups,
    os.nice: _nice,
    os.setgid: _ids("gid", 1),
    os.setgroups: _setgroups,
    os.setpgid: _setpgid,
    os.setpgrp: _setpgid,
    os.setregid: _ids("gid", 2),
    os.setreuid: _ids("uid", 2),
    os.setsid: _setsid,
    os.setuid: _ids("uid", 1),
    os.umask: _umask,
    signal.pthread_sigmask: _sigmask,
}
for _name, _change in (
    ("sched_setaffinity", _setaffinity),
    ("setresgid", _ids("gid", 3)),
    ("setresuid", _ids("uid", 3)),
):
    if hasattr(os, _name):  # macOS has none of them
        _KNOWN[getattr(os, _name)] = _change

# Options by the names that a function uses.
_SUBSTITUTES = {
    "PR_SET_NO_NEW_PRIVS": "no_new_privs",
    "PR_SET_PDEATHSIG": "dies_with_caller",
    "TIOCSCTTY": "controlling_terminal",
    "chdir": "cwd",
    "chroot": "root",
    "initgroups": "extra_groups",
    "ioprio_set": "ionice",
    "login_tty": "controlling_terminal",
    "nice": "nice",
    "oom_score_adj": "oom_score_adj",
    "prctl": "no_new_privs dies_with_caller",
    "prlimit": "rlimits",
    "pthread_sigmask": "signals_blocked",
    "sched_setaffinity": "cpu_affinity",
    "sched_setscheduler": "scheduler",
    "set_pdeathsig": "dies_with_caller",
    "setegid": "group",
    "seteuid": "user",
    "setgid": "group",
    "setgroups": "extra_groups",
    "setpgid": "process_group",
    "setpgrp": "process_group",
    "setpriority": "nice",
    "setregid": "group",
    "setresgid": "group",
    "setresuid": "user",
    "setreuid": "user",
    "setrlimit": "rlimits",
    "setsid": "start_new_session",
    "setuid": "user",
    "signal": "signals_ignored signals_default",
    "tcsetpgrp": "foreground",
    "umask": "umask",
    "unshare": "namespaces",
}
