"""Examines this system by trying everything that errand-boy can do."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping

import errand_boy
from errand_boy import _native, sandbox
from errand_boy._environment import variable
from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import lib
from errand_boy._process import cgroups, direct as _direct, way as _way
from errand_boy._wire import address as _address, status as _status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PROGRAM = shutil.which("true") or "/bin/true"
_STARTS = 9  # the shortest counts, since others may keep the processors busy
_PATIENCE = 10.0  # seconds for one command

# The values of ERRAND_BOY_SPAWN, and what they mean.
_WAYS = {
    "direct": "by this process, with clone(2)",
    "helper": "by a helper",
    "posix": "by a helper, with posix_spawn(3)",
}

# Options that don't work on every system.
_OPTIONS: dict[str, dict[str, Any]] = {
    'tree="all"': {"tree": "all"},
    "limits=": {"limits": {"cpu": 10}},
    'limits_by="cgroup"': {"limits": {"memory": "64M"}, "limits_by": "cgroup"},
    "pty=": {"pty": True},
    "sandbox=": {"sandbox": {"system": True, "execute": [_PROGRAM]}},
    "namespaces=": {"namespaces": {"user"}},
    "user=": {"user": os.geteuid()},
}

_ADVICE = {
    'limits_by="cgroup"': "for limits by cgroups, run the program in a cgroup that is delegated to "
    "its user: systemd-run --user --scope -p Delegate=yes PROGRAM",
    "sandbox=": "for a sandbox, boot with landlock among the kernel's lsm=, Linux 6.12 or later; "
    "Sandbox(strict=False) takes what is there",
    "namespaces=": "for namespaces, allow them: sysctl user.max_user_namespaces, and AppArmor's "
    "kernel.apparmor_restrict_unprivileged_userns",
}


def examine(socket: str | None = None) -> dict[str, Any]:
    """Return the findings, in types of JSON; `socket` is where a daemon may listen.

    `way` is how a plain command is started here, `why` is the reason, and `without_fork` is whether
    it needs no fork. `ways` and `options` have a mapping for each one that was tried: `works`;
    `error`, the text of the exception, or None; and for the ways `seconds`, the shortest time that
    a short command takes from its start to its end.
    """
    before = os.environ.get("ERRAND_BOY_SPAWN")
    plain = _try({})  # first, since only a start reveals a filter
    try:
        way = _way.way(False)
    except (OSError, ValueError) as error:
        way = f"none: {_text(error)}"
    why = _way.reason()
    options = {name: _try(given) for name, given in _OPTIONS.items()}
    ways = {name: _measured(_using(name)) for name in _WAYS}
    assert os.environ.get("ERRAND_BOY_SPAWN") == before
    ways["subprocess"] = _measured(contextlib.nullcontext(), subprocess.run)
    errand_boy.stop()
    found = {
        "version": errand_boy.__version__,
        "python": platform.python_version(),
        "system": _system(),
        "environment": {n: v for n, v in os.environ.items() if n.startswith("ERRAND_BOY_")},
        "way": way,
        "why": why,
        "error": plain["error"],
        "without_fork": plain["works"] and way in ("direct", "helper"),
        "ways": ways,
        "options": options,
        "helper": _helper_program(),
        "daemon": _daemon(socket),
    }
    return {**found, "advice": list(_advice(found))}


def _system() -> dict[str, Any]:
    """Return the kernel's version and features."""
    kernel = {
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }
    if _direct.WITHOUT_C is not None:
        return kernel
    status = _proc_status()
    version = lib.eb_landlock_version()
    return {
        **kernel,
        "proc": bool(status),
        "pidfd": _raises(lambda: os.close(_native.pidfd_open(os.getpid()))) is None,
        "clone": bool(lib.EB_HAVE_RAW),
        "close_range": bool(lib.eb_direct_works()),
        "seccomp_filters": _number(status.get("Seccomp_filters", status.get("Seccomp", "0"))),
        "no_new_privs": status.get("NoNewPrivs") == "1",
        "cgroup": cgroups.directory(),
        "landlock": max(0, version),
        "landlock_lacks": list(sandbox.missing(max(0, version))),
    }


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _proc_status() -> dict[str, str]:
    try:
        with open("/proc/self/status") as file:
            pairs = (line.partition(":") for line in file)
            return {name: value.strip() for name, _, value in pairs}
    except OSError:
        return {}


def _try(options: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
    """Run a command with these options, and return whether it works."""
    run = _run if run is None else run
    error = _raises(lambda: run([_PROGRAM], timeout=_PATIENCE, check=True, **options))
    return {"works": error is None, "error": error}


# run() in this process, even if ERRAND_BOY_SOCKET names a daemon.
_run = errand_boy._process.functions.rebind(errand_boy._process.popen.Popen)["run"]


def _raises(function: Any) -> str | None:
    try:
        function()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return _text(error)
    return None


def _text(error: BaseException) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return text.replace(SEE_DOCTOR, "")


@contextlib.contextmanager
def _using(way: str) -> Iterator[None]:
    before = os.environ.get("ERRAND_BOY_SPAWN")
    os.environ["ERRAND_BOY_SPAWN"] = way
    errand_boy.stop()  # a helper may have been started another way
    try:
        yield
    finally:
        if before is None:
            del os.environ["ERRAND_BOY_SPAWN"]
        else:
            os.environ["ERRAND_BOY_SPAWN"] = before


def _measured(way: contextlib.AbstractContextManager[None], run: Any = None) -> dict[str, Any]:
    durations = []
    with way:
        found = _try({}, run)
        for _ in range(_STARTS if found["works"] else 0):
            begin = time.perf_counter()
            _try({}, run)
            durations.append(time.perf_counter() - begin)
    return {**found, "seconds": min(durations) if durations else None}


def _helper_program() -> dict[str, Any]:
    if _direct.WITHOUT_C is not None:
        return {"path": None, "executable": False}
    from errand_boy._process import helper  # noqa: PLC0415  it can't be imported there

    path = variable("ERRAND_BOY_HELPER") or helper._EXECUTABLE
    return {"path": path, "executable": os.access(path, os.X_OK)}


def _daemon(socket: str | None) -> dict[str, Any]:
    if _direct.WITHOUT_C is not None:
        return {"socket": None, "answers": False, "error": _direct.WITHOUT_C}
    address = _address.find(socket)
    found: dict[str, Any] = {"socket": address.path, "answers": False, "error": None}
    try:
        found["version"] = _status.fetch(address).get("version")
    except _status.NoAnswerError as error:
        found["error"] = str(error)
    else:
        found["answers"] = True
    return found


def _advice(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield advice on making starts faster, or possible."""
    if _direct.WITHOUT_C is not None:
        return
    direct = found["ways"]["direct"]
    if found["way"] == "helper" and direct["works"]:
        yield (
            "commands start faster without ERRAND_BOY_SPAWN, and without errand_boy.start(): in "
            "this process"
        )
    if found["way"] == "subprocess" or not direct["works"]:
        yield (
            "for starts without a fork, allow clone(2), clone3(2) and close_range(2) in the "
            "seccomp filter (of the container, of systemd's SystemCallFilter=), on Linux 5.9 or "
            "later"
        )
    if not found["helper"]["executable"]:
        yield f"{found['helper']['path']} must be a program: install errand-boy again"
    if not found["system"]["proc"]:
        yield "mount /proc: many descriptors, tree= and the daemon need it"
    for name, advice in _ADVICE.items():
        if not found["options"][name]["works"]:
            yield advice
