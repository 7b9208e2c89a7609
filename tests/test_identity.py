"""Whose rights a command has: those that its caller has now, whatever the kernel.

Kernels differ in what becomes of a process's ids when it executes a program, above all where its
real and effective ids are not the same. The standard library says what they must be.
"""

from __future__ import annotations

import errno
import os
import shutil
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
    assert observed("errand_boy", front_end, CHANGES[change], secret) == expected


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
