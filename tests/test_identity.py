"""Whose rights a command has: those that its caller has now, whatever the kernel.

Kernels differ in what becomes of a process's ids when it executes a program, above all where its
real and effective ids are not the same. The standard library says what they must be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_script

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
