"""A preexec_fn that is known does what the function does, without a fork and without a warning."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import errand_boy
from errand_boy._options import preexec

SCRIPT = """
grep -E 'Sig|Cpus_allowed_list|Uid|Gid|Groups|Umask' /proc/self/status | grep -v SigQ
nice; ulimit -c; pwd; ps -o pid=,pgid=,sid= -p $$ | awk '{print $1 == $2, $1 == $3}'
"""

cpu = min(os.sched_getaffinity(0))
NO_CORE = partial(resource.setrlimit, resource.RLIMIT_CORE, (0, 0))
KNOWN: dict[str, Callable[[], Any]] = {
    "setsid": os.setsid,
    "setpgrp": os.setpgrp,
    "setpgid": partial(os.setpgid, 0, 0),
    "nice": partial(os.nice, 4),
    "umask": partial(os.umask, 0o77),
    "chdir": partial(os.chdir, "/usr"),
    "sched_setaffinity": partial(os.sched_setaffinity, 0, [cpu]),
    "setrlimit": NO_CORE,
    "ignore": partial(signal.signal, signal.SIGINT, signal.SIG_IGN),
    "ignore what is restored": partial(signal.signal, signal.SIGPIPE, signal.SIG_IGN),
    "default": partial(signal.signal, signal.SIGPIPE, signal.SIG_DFL),
    "block": partial(signal.pthread_sigmask, signal.SIG_BLOCK, [signal.SIGUSR1]),
    "unblock": partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, [signal.SIGUSR1]),
    "set mask": partial(signal.pthread_sigmask, signal.SIG_SETMASK, [signal.SIGHUP]),
    "chain": errand_boy.chain(
        os.setsid, partial(os.nice, 1), errand_boy.chain(NO_CORE, partial(os.nice, 1))
    ),
}
FOR_ROOT: dict[str, Callable[[], Any]] = {
    "setuid": partial(os.setuid, 12345),
    "setgid": partial(os.setgid, 12345),
    "setgroups": partial(os.setgroups, [5, 6]),
    "initgroups": partial(os.initgroups, "daemon", 7),
    "setreuid": partial(os.setreuid, 3, 3),
    "setregid": partial(os.setregid, 3, 3),
    "setresuid": partial(os.setresuid, 3, 3, 3),
    "setresgid": partial(os.setresgid, 3, 3, 3),
    "all ids": errand_boy.chain(
        partial(os.setgroups, []), partial(os.setgid, 2), partial(os.setuid, 1)
    ),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "of another process": partial(os.setpgid, os.getpid(), 0),
    "descriptor": partial(os.chdir, 0),
    "handler": partial(signal.signal, signal.SIGINT, print),
    "ids that differ": partial(os.setresuid, 1, 2, 3),
    "user before group": errand_boy.chain(partial(os.setuid, 1), partial(os.setgid, 1)),
    "one that is not known": errand_boy.chain(os.setsid, print),
    "too few arguments": partial(os.umask),
    "names": partial(os.chdir, path="/"),
    "lambda": lambda: None,
}


def found(module: Any, function: Callable[[], Any], **options: Any) -> str:
    done = module.run(
        SCRIPT, shell=True, stdout=-1, text=True, preexec_fn=function, check=True, **options
    )
    text: str = done.stdout
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str, spawn: str) -> None:
    if spawn == "posix" and name not in ("setsid", "setpgrp", "setpgid", "umask", "chdir"):
        pytest.skip("posix_spawn can't do it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = found(errand_boy, KNOWN[name])
    theirs = found(subprocess, KNOWN[name])
    if spawn == "posix":  # the C library's knows nothing of its own two signals
        ours, theirs = (re.sub("SigIgn.*", "", text) for text in (ours, theirs))
    assert ours == theirs


@pytest.mark.root
@pytest.mark.parametrize("name", FOR_ROOT)
def test_known_for_root(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = found(errand_boy, FOR_ROOT[name])
    assert ours == found(subprocess, FOR_ROOT[name])


def test_known_beside_parameters_and_options() -> None:
    """The effects of the function come after those of the parameters."""
    function = errand_boy.chain(
        partial(os.chdir, "lib"), partial(os.umask, 0o70), partial(os.nice, 2), NO_CORE
    )
    text = found(
        errand_boy, function, cwd="/usr", umask=0o7, nice=1, rlimits={"core": 1, "nofile": 50}
    )
    nice = os.getpriority(os.PRIO_PROCESS, 0) + 3
    assert re.search(rf"Umask:\t0070\n(.*\n)*{nice}\n0\n/usr/lib\n", text)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_known(name: str) -> None:
    given = dict.fromkeys(preexec.PARAMETERS)
    assert preexec.translate(OTHERS[name], given) is None


def test_chain_is_a_function() -> None:
    called: list[int] = []
    errand_boy.chain(partial(called.append, 1), partial(called.append, 2))()
    assert called == [1, 2]
    with pytest.raises(TypeError, match="1 can't be called"):
        errand_boy.chain(1)  # type: ignore[arg-type]


def test_warning_names_the_option() -> None:
    def prepare() -> None:
        for _ in range(1):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(0)

    with pytest.warns(RuntimeWarning, match="Use rlimits=, nice= instead"):
        errand_boy.run(["true"], preexec_fn=prepare, check=True)
    with pytest.warns(RuntimeWarning, match="Use an option instead"):
        errand_boy.run(["true"], preexec_fn=lambda: None, check=True)


@pytest.mark.slow
def test_daemon_takes_what_is_known(client: Any) -> None:
    assert found(client, KNOWN["chain"]) == found(subprocess, KNOWN["chain"])
    with pytest.raises(ValueError, match="use rlimits= instead"):
        client.run(["true"], preexec_fn=lambda: resource.setrlimit(1, (1, 1)))
