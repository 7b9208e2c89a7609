"""The checks and encodings of the options that subprocess lacks.

Each has a line in names.py, where all front ends get the names, and one in `_TABLE`. If the kernel
can refuse an option, its step in wire.h has its name. CONTRIBUTING.md has the whole recipe.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy

from errand_boy._descriptors import above_standard
from errand_boy._hints import SEE_DOCTOR, did_you_mean
from errand_boy._native import lib
from errand_boy._options.names import Options
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._wire.frames import Failed


NAMES = frozenset(Options.__annotations__)
_ENDS = frozenset(("stop", "tree", "drain", "dies_with_caller"))  # together they are one option


def take(given: dict[str, Any], standard: frozenset[str]) -> dict[str, Any]:
    """Remove the options from a function's keywords, and return those that are not None or False.

    `standard` are the names that the function knows itself. Any other name, such as a misspelt
    option, stays.
    """
    taken = {}
    for name in [name for name in given if name not in standard and name in NAMES]:
        value = given.pop(name)
        if value is not None and value is not False:
            taken[name] = value
    return taken


def encode(given: Mapping[str, Any], has_session: bool, has_group: bool) -> tuple[bytes, list[Any]]:
    """Return options of a request, and the descriptors that they carry, in their order there.

    `has_session`: the command leads a session; `has_group`: its process group is given.
    A descriptor is a number, or an object with a `fileno`, which must stay alive until it is used.
    Raises TypeError for an unknown option, and TypeError, ValueError and OSError for a bad value.
    """
    global _last
    form = has_session, has_group
    last = _last  # other threads replace it
    if given == last[0] and form == last[1]:
        return last[2], []
    options: list[bytes] = []
    carried: list[tuple[int, Any]] = []
    if given.get("limits") is not None:
        from errand_boy._options import limits as _limits  # noqa: PLC0415  only those who need it pay

        given = _limits.expand(given)
    for name, value in given.items():
        if name in _ENDS:
            continue
        if name not in _TABLE:
            raise TypeError(f"unknown option {name}{did_you_mean(name, NAMES)}")
        tag, make = _TABLE[name]
        content = None if value is None or value is False else make(value)
        if content is None:
            continue
        for number, part in content if type(content) is list else [(tag, content)]:
            if type(part) is bytes:
                options.append(frames.option(number, part))
            else:
                options.append(frames.option(number))
                carried.append((number, part))
    if not _ENDS.isdisjoint(given):
        from errand_boy._options import ends  # noqa: PLC0415  only those who need it pay for it

        supervise = ends.encode(given)
        if supervise is not None:
            options.append(frames.option(lib.EB_TAG_SUPERVISE, supervise))
    if given.get("controlling_terminal") is not None and not has_session:
        raise ValueError("controlling_terminal needs start_new_session=True")
    default, ignored = given.get("signals_default"), given.get("signals_ignored")
    if default and ignored and (both := {*default} & {*ignored}):
        raise ValueError(f"{_written(both)} can't be in both signals_default and signals_ignored")
    if given.get("foreground") and not (has_session or has_group):
        raise ValueError("foreground needs start_new_session=True or a process_group")
    encoded = b"".join(options)
    if not carried and "sandbox" not in given:  # a Sandbox can't be copied
        _last = ({name: copy(value) for name, value in given.items()}, form, encoded)
    carried.sort(key=lambda pair: pair[0])
    return encoded, [fd for _, fd in carried]


# The last encoding, since many starts have the same options. With copies, since values may change.
_last: tuple[Mapping[str, Any], tuple[bool, bool], bytes] = ({}, (False, False), b"")


def refusal(failed: Failed, given: Mapping[str, Any]) -> str:
    """Return why a start failed, with the name and value of the option, if one of `given` did."""
    text = os.strerror(failed.errno)
    step = frames.stage_name(failed.stage)
    name = "cpu_affinity" if step == "affinity" else step
    value = given.get(name)
    if name == "tree":
        text = "a supervisor needs clone(2), close_range(2), and a /proc that lists children"
        return text + SEE_DOCTOR
    if name not in _TABLE or value is None:
        return text
    if name in _REFUSALS:
        return f"{name}: {_REFUSALS[name](value, failed)}"
    return f"{name}: {text}" if value is True else f"{name}: {value!r}: {text}"


class Descriptor:
    """A descriptor that was opened for an option. It is closed with the last reference."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def __del__(self) -> None:
        os.close(self._fd)


# -- one encoder for each option. It returns the value in the request: bytes, a descriptor to carry,
# -- None for nothing, or for several options of a request a list of pairs of tag and value


def _flag(value: object) -> bytes | None:
    return b"" if value else None


def _number(name: str, least: int, most: int, form: str) -> Callable[[Any], bytes]:
    def encode(value: Any) -> bytes:
        return struct.pack(form, _checked(name, value, least, most))

    return encode


def _checked(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {value!r} is not an integer")
    if not least <= value <= most:
        raise ValueError(f"{name}: {value!r} is not in {least} to {most}")
    return value


def _signals(name: str) -> Callable[[Any], bytes]:
    def encode(value: Iterable[Any]) -> bytes:
        numbers = {_checked(name, number, 1, 64) for number in value}
        if name != "signals_blocked" and numbers & {signal.SIGKILL, signal.SIGSTOP}:
            raise ValueError(f"{name}: the action of SIGKILL and SIGSTOP can't be changed")
        return struct.pack("<Q", sum(1 << number - 1 for number in numbers))

    return encode


def _written(values: Iterable[Any]) -> str:
    return ", ".join(sorted(map(repr, values)))


def _affinity(value: Iterable[Any]) -> bytes:
    cpus = {_checked("cpu_affinity", cpu, 0, 8 * lib.EB_MAX_AFFINITY - 1) for cpu in value}
    if not cpus:
        raise ValueError("cpu_affinity: at least one CPU is needed")
    return sum(1 << cpu for cpu in cpus).to_bytes(max(cpus) // 64 * 8 + 8, "little")


_POLICIES = {"other": 0, "fifo": 1, "rr": 2, "batch": 3, "idle": 5}  # numbers of linux/sched.h


def _scheduler(value: Any) -> bytes:
    policy, priority = value if isinstance(value, (tuple, list)) else (value, 0)
    if policy not in _POLICIES:
        raise ValueError(f"scheduler: {policy!r} is not one of {', '.join(_POLICIES)}")
    real_time = policy in ("fifo", "rr")
    _checked(f"scheduler: {policy}: priority", priority, *((1, 99) if real_time else (0, 0)))
    return struct.pack("<II", _POLICIES[policy], priority)


_CLASSES = {"realtime": 1, "best-effort": 2, "idle": 3}  # numbers of linux/ioprio.h


def _ionice(value: Any) -> bytes:
    name, level = (
        value if isinstance(value, (tuple, list)) else (value, 4 if value != "idle" else 0)
    )
    if name not in _CLASSES:
        raise ValueError(f"ionice: {name!r} is not one of {', '.join(_CLASSES)}")
    return struct.pack("<I", _CLASSES[name] << 13 | _checked(f"ionice: {name}: level", level, 0, 7))


def _root(value: Any) -> bytes:
    path = os.fsencode(value)
    if 0 in path:
        raise ValueError("root: embedded null byte")
    return path + b"\0"


_CAPABILITIES = (  # by their numbers, in linux/capability.h
    *("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid"),
    *("setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw"),
    *("ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct"),
    *("sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod"),
    *("lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog"),
    *("wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore"),
)


def _capabilities(value: Iterable[str]) -> bytes:
    if isinstance(value, str):
        raise TypeError(f"capabilities: {value!r} is not a collection of names")
    kept = 0
    for name in value:
        plain = name.lower().removeprefix("cap_")
        if plain not in _CAPABILITIES:
            raise ValueError(f"capabilities: {name!r} is not one of {', '.join(_CAPABILITIES)}")
        kept |= 1 << _CAPABILITIES.index(plain)
    return struct.pack("<Q", kept)


def _descriptor(value: Any) -> Any:
    number = value if isinstance(value, int) else value.fileno()
    if number < 0:
        raise ValueError(f"{value!r} is not a descriptor")
    return value


RESOURCES = (  # by their numbers
    *("cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as"),
    *("locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime"),
)


def _rlimits(value: Mapping[str, Any]) -> bytes:
    entries = []
    for name, limit in value.items():
        if name not in RESOURCES:
            raise ValueError(f"rlimits: {name!r} is not one of {', '.join(RESOURCES)}")
        pair = limit if isinstance(limit, (tuple, list)) else (limit, limit)
        if len(pair) != 2 or not all(isinstance(n, int) and -1 <= n < 1 << 64 for n in pair):
            raise ValueError(
                f"rlimits: {name}: {limit!r} is neither a number nor a pair of a soft and a hard "
                "limit, from 0 on, or resource.RLIM_INFINITY"
            )
        soft, hard = (n % (1 << 64) for n in pair)  # RLIM_INFINITY is -1
        if soft > hard:
            raise ValueError(f"rlimits: {name}: the soft limit of {limit!r} is above the hard one")
        entries.append(struct.pack("<BQQ", RESOURCES.index(name), soft, hard))
    return b"".join(entries)


def _rlimit_refused(value: Mapping[str, Any], failed: Failed) -> str:
    name = RESOURCES[failed.member]
    limit = value.get(name)
    if failed.errno != errno.EPERM or limit is None:
        return f"{name}: {limit!r}: {os.strerror(failed.errno)}"
    hard = limit[1] if isinstance(limit, (tuple, list)) else limit
    return f"{name}: {hard} is above the hard limit"


def _cgroup(value: Any) -> Any:
    if isinstance(value, (str, bytes, os.PathLike)):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return Descriptor(*above_standard(os.open(value, flags)))
    return _descriptor(value)


_NAMESPACES = {  # flags of clone(2)
    "cgroup": 0x02000000,
    "ipc": 0x08000000,
    "mount": 0x00020000,
    "net": 0x40000000,
    "pid": 0x20000000,
    "user": 0x10000000,
    "uts": 0x04000000,
}


def _namespaces(value: Collection[str]) -> bytes | None:
    if isinstance(value, str):
        raise TypeError(f"namespaces: {value!r} must be a set of names")
    names = set(value)
    unknown = names - _NAMESPACES.keys()
    if unknown:
        raise ValueError(f"namespaces: {min(unknown)!r} is not one of {', '.join(_NAMESPACES)}")
    return struct.pack("<I", sum(_NAMESPACES[name] for name in names)) if names else None


def _namespaces_refused(value: Collection[str], failed: Failed) -> str:
    names = ", ".join(sorted(value))
    text = os.strerror(failed.errno)
    if failed.errno == errno.ENOSPC:
        return f"{names}: {text}: see the limits in /proc/sys/user"
    if failed.errno in (errno.EPERM, errno.EACCES):
        if "user" not in set(value):
            return f'{names}: {text}: without root\'s rights, "user" must be among them'
        text += ": this machine forbids it, by a sysctl, a filter or AppArmor"
        return f"{names}: {text}{SEE_DOCTOR}"
    if failed.errno == errno.EINVAL:
        return f"{names}: {text}: this kernel lacks one of them{SEE_DOCTOR}"
    return f"{names}: {text}"


def _sandbox(value: Any) -> list[tuple[int, Any]]:
    from errand_boy import sandbox  # noqa: PLC0415  only those who need it pay for it

    box = sandbox.of(value)
    parts: list[tuple[int, Any]] = [(lib.EB_TAG_SOCKETS, bytes([box.sockets]))]
    if box.fileno() >= 0:
        parts.append((lib.EB_TAG_SANDBOX, box))
    return parts


def _capability_refused(value: Iterable[str], failed: Failed) -> str:
    return (
        f"{_written(value)}: {os.strerror(failed.errno)}: the caller must have these, and "
        "CAP_SETPCAP to take others away"
    )


def _affinity_refused(value: Iterable[int], failed: Failed) -> str:
    return f"{_written(value)}: {os.strerror(failed.errno)}: none is a CPU that the caller may use"


def _terminal(value: Any) -> bytes:
    # For a terminal that a helper opens. A Popen opens its own: see _process/pty.py.
    from errand_boy.terminal import as_pty  # noqa: PLC0415  only those who need it pay for it

    pty = as_pty(value)
    if pty.termios is not None:
        raise ValueError("pty: termios can't be given for a terminal that a helper opens")
    flags = lib.EB_RAW * pty.raw | lib.EB_NO_ECHO * (pty.echo is False)
    return struct.pack("<4IB", *pty.size, flags)


_TABLE: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "capabilities": (lib.EB_TAG_CAPABILITIES, _capabilities),
    "cgroup": (lib.EB_TAG_CGROUP, _cgroup),
    "controlling_terminal": (lib.EB_TAG_CONTROLLING_TERMINAL, _descriptor),
    "cpu_affinity": (lib.EB_TAG_AFFINITY, _affinity),
    "foreground": (lib.EB_TAG_FOREGROUND, _flag),
    "ionice": (lib.EB_TAG_IONICE, _ionice),
    "limits": (lib.EB_TAG_LIMITS, lambda limits: limits.encode()),
    "namespaces": (lib.EB_TAG_NAMESPACES, _namespaces),
    "nice": (lib.EB_TAG_RENICE, _number("nice", -40, 40, "<i")),
    "no_new_privs": (lib.EB_TAG_NO_NEW_PRIVS, _flag),
    "oom_score_adj": (lib.EB_TAG_OOM_SCORE_ADJ, _number("oom_score_adj", -1000, 1000, "<i")),
    "pty": (lib.EB_TAG_TERMINAL, _terminal),
    "rlimits": (lib.EB_TAG_SET_RLIMITS, _rlimits),
    "root": (lib.EB_TAG_ROOT, _root),
    "sandbox": (lib.EB_TAG_SANDBOX, _sandbox),
    "scheduler": (lib.EB_TAG_SCHEDULER, _scheduler),
    "signals_blocked": (lib.EB_TAG_SIGMASK, _signals("signals_blocked")),
    "signals_default": (lib.EB_TAG_SIGNALS_DEFAULT, _signals("signals_default")),
    "signals_ignored": (lib.EB_TAG_SIGNALS_IGNORED, _signals("signals_ignored")),
    "timer_slack": (lib.EB_TAG_TIMER_SLACK, _number("timer_slack", 0, (1 << 63) - 1, "<Q")),
}

# Options whose errors say more than the value and the kernel's error.
_REFUSALS: dict[str, Callable[[Any, Failed], str]] = {
    "capabilities": _capability_refused,
    "cpu_affinity": _affinity_refused,
    "namespaces": _namespaces_refused,
    "rlimits": _rlimit_refused,
}
