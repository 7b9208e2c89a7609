"""System calls of a start: the caller never forks, whatever the commands need."""

from __future__ import annotations

import re
import subprocess as stdlib
from pathlib import Path

import pytest
from conftest import find_program, run_script

pytestmark = pytest.mark.slow

SCRIPT = """
start()
options = [
    {},
    {"preexec_fn": os.setsid},
    {"cwd": "/", "umask": 0o77, "start_new_session": True},
    {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "close_fds": False},
]
if helped and os.geteuid() == 0:
    options.append({"user": 65534, "group": 65534, "extra_groups": []})
for number in range(250):
    with subprocess.Popen(["true"], **options[number % len(options)]) as process:
        process.communicate()
    assert process.returncode == 0
report([os.getpid(), helper_pid()])
"""

CALL = re.compile(r"^(?P<pid>\d+) +(?P<name>clone3?|v?fork)\((?P<args>.*)")


def strace_refusal(out: Path) -> str | None:
    strace = find_program("strace")
    done = stdlib.run([strace, "-f", "-o", out, "true"], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


@pytest.mark.parametrize("implementation", ["errand_boy", "errand_boy-helper"])
def test_commands_without_a_fork_of_the_caller(implementation: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    refusal = strace_refusal(trace)
    if refusal:
        pytest.skip(f"strace can't be used: {refusal}")
    strace = ["strace", "-f", "-qq", "-o", trace, "-e", "signal=none"]
    strace += ["-e", "trace=clone,clone3,fork,vfork"]
    caller, helper = run_script(SCRIPT, implementation, under=strace)
    calls: dict[int, list[str]] = {}
    for line in trace.read_text().splitlines():
        match = CALL.match(line)
        if match:
            call = f"{match['name']}({match['args']}"
            calls.setdefault(int(match["pid"]), []).append(call)
    assert [call for call in calls[caller] if "CLONE_VM" not in call] == []
    if helper is None:
        assert len(calls[caller]) == 250
        assert set(calls) == {caller}
    else:
        assert len(calls[caller]) == 1
        assert len(calls[helper]) >= 250
        assert [call for call in calls[helper] if "CLONE_VM" not in call] == []
        assert set(calls) == {caller, helper}
