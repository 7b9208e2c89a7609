"""Constructor, and start to reaped: errand_boy over others, and heavy callers over light ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest

from bench.heavy import Caller
from bench.ratios import Measure

CallerOf = Callable[..., Caller]
Compare = Callable[..., None]

AT_MOST = {"constructor": 0.95, "constructor_piped": 0.95, "popen": 0.98, "run": 0.98}
AT_MOST_ITSELF = 1.05
AT_MOST_USER = 1 / 50
CASES = list(AT_MOST)

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="user= needs root")

WRITTEN = {
    "constructor": "Popen()",
    "constructor_piped": "Popen(pipes)",
    "popen": "Popen.wait",
    "run": "run(capture)",
    "user": "Popen(user=)",
    "preexec_setsid": "Popen(preexec_fn=setsid)",
    "new_session": "Popen(start_new_session)",
    "posix_spawn": "os.posix_spawn",
    "fork_exec": "os.fork, exec",
}


def ask(caller: CallerOf, weight: str, case: str, library: str) -> Measure:
    # gevent's loop installs a SIGCHLD handler, so it has a process of its own.
    name = "gevent" if library == "gevent.subprocess" else ""
    return partial(caller(weight, name).ask, case, library)


def test_noise(caller: CallerOf, compare: Compare) -> None:
    compare(
        partial(caller("small").ask, "popen", "subprocess"),
        partial(caller("small", "other").ask, "popen", "subprocess"),
        name="noise: subprocess over itself, small, Popen.wait",
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight", ["small", "large", "crowded"])
def test_over_subprocess(caller: CallerOf, compare: Compare, weight: str, case: str) -> None:
    compare(
        ask(caller, weight, case, "errand_boy"),
        ask(caller, weight, case, "subprocess"),
        name=f"errand_boy over subprocess, {weight}, {WRITTEN[case]}",
        at_most=AT_MOST[case],
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight", ["small", "large", "crowded"])
def test_helper_over_subprocess(caller: CallerOf, compare: Compare, weight: str, case: str) -> None:
    helped = caller(weight, "helper", ERRAND_BOY_SPAWN="helper")
    compare(
        partial(helped.ask, case, "errand_boy"),
        ask(caller, weight, case, "subprocess"),
        name=f"errand_boy, helper over subprocess, {weight}, {WRITTEN[case]}",
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight", ["large", "crowded"])
def test_over_small(caller: CallerOf, compare: Compare, weight: str, case: str) -> None:
    compare(
        ask(caller, weight, case, "errand_boy"),
        ask(caller, "small", case, "errand_boy"),
        name=f"errand_boy, {weight} over small, {WRITTEN[case]}",
        at_most=AT_MOST_ITSELF,
    )


@pytest.mark.parametrize("weight", ["large", "crowded"])
def test_subprocess_over_small(caller: CallerOf, compare: Compare, weight: str) -> None:
    compare(
        ask(caller, weight, "popen", "subprocess"),
        ask(caller, "small", "popen", "subprocess"),
        name=f"subprocess, {weight} over small, Popen.wait",
    )


@only_root
@pytest.mark.parametrize("weight", ["small", "large"])
def test_user(caller: CallerOf, compare: Compare, weight: str) -> None:
    compare(
        ask(caller, weight, "user", "errand_boy"),
        ask(caller, weight, "user", "subprocess"),
        name=f"errand_boy over subprocess, {weight}, {WRITTEN['user']}",
        at_most=AT_MOST_USER if weight == "large" else None,
    )


@pytest.mark.parametrize("case", ["preexec_setsid", "new_session"])
@pytest.mark.parametrize("weight", ["small", "large"])
def test_session(caller: CallerOf, compare: Compare, weight: str, case: str) -> None:
    compare(
        ask(caller, weight, case, "errand_boy"),
        ask(caller, weight, case, "subprocess"),
        name=f"errand_boy over subprocess, {weight}, {WRITTEN[case]}",
    )


@pytest.mark.parametrize("case", ["popen", "run"])
@pytest.mark.parametrize("weight", ["small", "large"])
def test_over_gevent(caller: CallerOf, compare: Compare, weight: str, case: str) -> None:
    pytest.importorskip("gevent")
    compare(
        ask(caller, weight, case, "errand_boy"),
        ask(caller, weight, case, "gevent.subprocess"),
        name=f"errand_boy over gevent.subprocess, {weight}, {WRITTEN[case]}",
    )


@pytest.mark.parametrize("case", ["posix_spawn", "fork_exec"])
@pytest.mark.parametrize("weight", ["small", "large"])
def test_over_os(caller: CallerOf, compare: Compare, weight: str, case: str) -> None:
    compare(
        ask(caller, weight, "popen", "errand_boy"),
        ask(caller, weight, case, "os"),
        name=f"errand_boy over {WRITTEN[case]}, {weight}, Popen.wait",
    )


@pytest.mark.parametrize("library", ["errand_boy", "subprocess"])
def test_over_c(caller: CallerOf, compare: Compare, c_loop: Measure, library: str) -> None:
    compare(
        ask(caller, "small", "popen", library),
        c_loop,
        name=f"{library} over vfork, exec, wait in C, small, Popen.wait",
    )


def test_peak_memory_of_child(caller: CallerOf, note: Callable[[str], None]) -> None:
    for weight in "small", "large":
        helped = caller(weight, "helper", ERRAND_BOY_SPAWN="helper")
        for name, process in {
            "subprocess": caller(weight),
            "errand_boy": caller(weight),
            "errand_boy, helper": helped,
        }.items():
            [kib] = process.ask("peak_kib", name.partition(",")[0], 1)
            note(f"ru_maxrss of /bin/true by {name}, {weight}: {kib / 1024:.1f} MiB")
