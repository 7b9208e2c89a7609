"""A command has the rights that its caller has now, with any kernel.

Kernels differ in how an exec changes the ids of a process, above all if its real and effective ids
are not the same. The standard library shows what they must be.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from conftest import run_script

import errand_boy

FIELDS = ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"]

CHANGES = {
    "nothing": "pass",
    "effective user": "os.seteuid(65534)",
    "effective group": "os.setegid(65534)",
    "effective user and group": "os.setegid(65534); os.seteuid(65534)",
    "real user": "os.setreuid(65534, 0)",
    "real group": "os.setregid(65534, 0)",
    "saved user": "os.setresuid(65534, 65534, 0)",
    "saved group": "os.setresgid(65534, 65534, 0)",
    "user": "os.setresuid(65534, 65534, 65534)",
    "all ids": "os.setgroups([7]); os.setresgid(2, 2, 2); os.setresuid(65534, 65534, 65534)",
    "effective user and back": "os.seteuid(65534); run('true'); os.seteuid(0)",
    "real user and back": "os.setreuid(65534, 0); run('true'); os.setreuid(0, 0)",
}

FRONT_ENDS = {
    "run": """
def run(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
""",
    "map": """
def run(*command):
    return next(subprocess.map([command])).stdout
""",
    "asyncio": """
import asyncio
import errand_boy.asyncio

def run(*command):
    async def wait():
        process = await errand_boy.asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return (await process.communicate())[0]
    return asyncio.run(wait())
""",
}

OBSERVE = """
def observe():
    status = run("cat", "/proc/self/status").decode()
    seen = dict(line.split(":") for line in status.splitlines())
    secret = run("cat", sys.argv[2])
    return [{name: seen[name].split() for name in sys.argv[3:]}, secret.decode()]
"""


def observed(implementation: str, front_end: str, change: str, secret: Path) -> object:
    changed = f"start()\nrun('true')\n{change}\nreport(observe())"
    source = FRONT_ENDS[front_end] + OBSERVE + changed
    return run_script(source, implementation, [secret, *FIELDS], cwd="/")


@pytest.fixture
def secret(public_dir: Path) -> Path:
    """A file that only root may read."""
    path = public_dir / "secret"
    path.touch(0o600)
    path.write_text("for root only")
    return path


@pytest.mark.root
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_commands_have_the_ids_that_their_caller_has_now(
    change: str, front_end: str, secret: Path
) -> None:
    expected = observed("subprocess", "run", CHANGES[change], secret)
    for implementation in ("errand_boy", "errand_boy-helper"):
        assert observed(implementation, front_end, CHANGES[change], secret) == expected


@pytest.mark.root
@pytest.mark.parametrize("change", ["effective user", "real user", "saved group"])
def test_commands_of_a_helper_that_owns_them_have_the_callers_ids_too(
    change: str, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = observed("subprocess", "run", CHANGES[change], secret)
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "posix")
    assert observed("errand_boy", "run", CHANGES[change], secret) == expected


@pytest.mark.root
@pytest.mark.parametrize("bit", [stat.S_ISUID, stat.S_ISGID])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_helper_with_other_ids_than_its_callers_is_refused(
    bit: int, front_end: str, public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.environ.get("ERRAND_BOY_HELPER") or Path(errand_boy.__file__).with_name(
        "errand-boy-helper"
    )
    program = public_dir / "helper"
    shutil.copy(original, program)
    os.chown(program, 65534, 65534)
    program.chmod(0o755 | bit)
    monkeypatch.setenv("ERRAND_BOY_HELPER", str(program))
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper")
    source = f"""{FRONT_ENDS[front_end]}
try:
    run("touch", sys.argv[2])
except subprocess.HelperError as error:
    report([error.errno, error.filename, str(error)])
subprocess.stop()
"""
    marker = public_dir / "marker"
    error, filename, text = run_script(source, "errand_boy", [marker])
    assert (error, filename) == (errno.EPERM, str(program))
    kind = "user" if bit == stat.S_ISUID else "group"
    assert f"its {kind} ids (real, effective, saved) are (0, 65534, 65534), not (0, 0, 0)" in text
    assert not marker.exists()


SEND = """
from errand_boy._process import helper
from errand_boy._wire import connection, frames as protocol
from errand_boy._native import lib

def strings(tag, *values):
    return protocol.strings(tag, [os.fsencode(value) for value in values])

def send(line, *argv):
    \"\"\"Write a request as anybody can who has the descriptor; return what becomes of it.\"\"\"
    options = [strings(lib.EB_TAG_EXECUTABLES, argv[0]), strings(lib.EB_TAG_ARGV, *argv)]
    try:
        line.sock.sendall(protocol.frame(lib.EB_SPAWN, options))
        reply = line.answer(10.0)
    except subprocess.ProtocolError as error:
        return str(error)
    except (OSError, connection.NotServedError):
        return "closed"
    if reply.by_helper:
        line.receive(10.0)
    else:
        os.waitpid(reply.pid, 0)
    return "run"

def started(manager):
    \"\"\"Have both helpers, each with an idle connection; return one of them, and its pidfd.\"\"\"
    start()
    subprocess.run(["true"], check=True)
    list(subprocess.map([["true"]]))
    it = getattr(helper, manager).current
    return it, os.pidfd_open(it.pid)

def ended(pidfd):
    return bool(select.select([pidfd], [], [], 10.0)[0])
"""


@pytest.mark.usefixtures("by_helper")
@pytest.mark.root
@pytest.mark.parametrize("over", ["connection", "new connection"])
@pytest.mark.parametrize("manager", ["launcher", "runner"])
def test_helper_serves_nobody_who_has_given_up_the_rights_it_was_started_with(
    manager: str, over: str, public_dir: Path
) -> None:
    public_dir.chmod(0o777)
    marker = public_dir / "marker"
    source = f"""{SEND}
it, pidfd = started("{manager}")
os.setgroups([])
os.setresgid(2002, 2002, 2002)
os.setresuid(2002, 2002, 2002)
line = it.connect() if {over == "new connection"} else it.idle[-1]
outcome = send(line, "/usr/bin/touch", {str(marker)!r})
out = subprocess.run(["id", "-u"], stdout=subprocess.PIPE).stdout
mapped = next(subprocess.map([["id", "-u"]])).stdout
report([outcome, ended(pidfd), int(out), int(mapped)])
"""
    outcome, ended, *ids = run_script(source)
    assert not marker.exists(), f"made by user {marker.stat().st_uid}"
    if over == "connection":
        assert "SPAWN from another sender than process" in outcome
    else:
        assert outcome == "closed"
    assert ended
    assert ids == [2002, 2002]


@pytest.mark.usefixtures("by_helper")
@pytest.mark.parametrize("manager", ["launcher", "runner"])
def test_helper_serves_no_other_process_than_the_one_that_started_it(
    manager: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    source = f"""{SEND}
it, pidfd = started("{manager}")
ours, theirs = socket.socketpair()
line = it.idle[-1]
fd = os.dup(line.sock.fileno())
pid = os.fork()
if pid == 0:
    line = connection.Connection(socket.socket(fileno=fd))
    line.greeted = True
    theirs.sendall(send(line, "/usr/bin/touch", {str(marker)!r}).encode())
    os._exit(0)
theirs.close()
outcome = ours.recv(1000).decode()
os.waitpid(pid, 0)
report([outcome, ended(pidfd), subprocess.run(["true"]).returncode])
"""
    outcome, ended, status = run_script(source)
    assert "SPAWN from another sender than process" in outcome
    assert not marker.exists()
    assert ended
    assert status == 0


@pytest.mark.root
def test_commands_that_run_already_keep_their_input_and_their_time_limit() -> None:
    """A process may give up its rights while a `map` runs."""
    source = """
def commands():
    yield {"args": ["sh", "-c", "wc -c; id -u"], "input": bytes(1 << 20)}
    yield {"args": ["sleep", "60"], "timeout": 0.5}
    os.setgroups([])
    os.setresgid(2002, 2002, 2002)
    os.setresuid(2002, 2002, 2002)
    yield ["id", "-u"]

results = list(subprocess.map(commands(), max_workers=3))
report([[done.stdout.decode().split(), done.returncode] for done in results])
"""
    expected = [[[str(1 << 20), "0"], 0], [[], -signal.SIGKILL], [["2002"], 0]]
    assert run_script(source) == expected
