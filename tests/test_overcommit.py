"""Strict overcommit: a caller that is too large to fork still starts commands.

The setting is the whole machine's. A supervising process makes the change, keeps it for as long as
the few starts take, and restores it in any case; the caller under test maps memory, but touches
none of it, and leaves room for everybody else.
"""

from __future__ import annotations

import os
import subprocess as stdlib
import sys
from pathlib import Path

import pytest
from conftest import run_script

pytestmark = pytest.mark.slow

SETTINGS = Path("/proc/sys/vm")

SUPERVISE = """
import ctypes, math, signal, subprocess, sys

def write(name, value):
    with open(f"/proc/sys/vm/{name}", "w") as file:
        file.write(value)

def read(name):
    with open(f"/proc/sys/vm/{name}") as file:
        return file.read().strip()

def memory():
    with open("/proc/meminfo") as file:
        return {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}

def leave(number, frame):
    sys.exit(f"signal {number}")

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
    signal.signal(number, leave)
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
signal.alarm(30)

before = {name: read(name) for name in ("overcommit_ratio", "overcommit_memory")}
ours = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
try:
    assert ours.stdout.readline() == "started\\n"
    # Room for half as much again as is spoken for already, and 8 GiB.
    now = memory()
    wanted = now["Committed_AS"] * 1.5 + (8 << 30)
    if now["CommitLimit"] < wanted:
        # The ratio has no effect before the mode is strict.
        write("overcommit_ratio", str(math.ceil(wanted * 100 / now["MemTotal"])))
        now = memory()
    mapped = int((now["CommitLimit"] - now["Committed_AS"]) * 0.6)
    ours.stdin.write(f"{mapped}\\n")
    ours.stdin.flush()
    assert ours.stdout.readline() == "mapped\\n"
    write("overcommit_memory", "2")
    out, _ = ours.communicate("go\\n", timeout=20)
finally:
    for name in before:
        write(name, before[name])
    ours.kill()
    ours.wait()
sys.stdout.write(out)
sys.exit(ours.returncode)
"""

SCRIPT = """
import errno, mmap

def outcome(function, *args, **options):
    try:
        function(*args, **options)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "works"

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

start()
subprocess.run(["true"])
print("started", flush=True)
size = int(sys.stdin.readline())
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("mapped", flush=True)
assert sys.stdin.readline() == "go\\n"
seen = {"fork": outcome(fork), "run": outcome(subprocess.run, ["true"], check=True)}
seen["setsid"] = outcome(subprocess.run, ["true"], preexec_fn=os.setsid, check=True)
seen["user"] = outcome(subprocess.run, ["true"], user=os.getuid(), check=True)
getattr(subprocess, "stop", lambda: None)()
seen["new helper"] = outcome(subprocess.run, ["true"], check=True)
report(seen)
"""


def read_settings() -> list[str]:
    return [(SETTINGS / name).read_text() for name in ("overcommit_memory", "overcommit_ratio")]


@pytest.mark.root
def test_command_starts_where_fork_has_no_memory() -> None:
    if not os.access(SETTINGS / "overcommit_memory", os.W_OK):
        pytest.skip("vm.overcommit_memory can't be written here")
    before = read_settings()
    supervisor = [sys.executable, "-I", "-c", SUPERVISE]
    try:
        seen = run_script(SCRIPT, under=supervisor, stdin=stdlib.DEVNULL, start_new_session=True)
    finally:
        assert read_settings() == before
    assert seen["fork"] == "ENOMEM"
    assert seen == {
        "fork": "ENOMEM",
        "run": "works",
        "setsid": "works",
        "user": "works",
        "new helper": "works",
    }
