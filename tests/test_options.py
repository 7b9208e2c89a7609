"""What errand_boy can give a command and subprocess can't: the same on every front and each way."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import run_script

import errand_boy
from errand_boy import _direct
from errand_boy.asyncio import create_subprocess_exec

STATUS = ["grep", "NoNewPrivs", "/proc/self/status"]
SET, UNSET = b"NoNewPrivs:\t1\n", b"NoNewPrivs:\t0\n"

# A type checker knows the parameters of subprocess.
Popen, run = cast(Any, errand_boy.Popen), cast(Any, errand_boy.run)


def own() -> bytes:
    lines = Path("/proc/self/status").read_bytes().splitlines(keepends=True)
    return next(line for line in lines if line.startswith(b"NoNewPrivs"))


@pytest.mark.parametrize("value", [True, False])
def test_no_new_privs_of_each_front(value: bool, spawn: str, client: Any) -> None:
    if spawn == "posix" and value:
        pytest.skip("posix_spawn can't set it")

    async def by_asyncio() -> bytes:
        pipe = subprocess.PIPE
        process = await create_subprocess_exec(*STATUS, stdout=pipe, no_new_privs=value)
        return (await process.communicate())[0]

    with Popen(STATUS, stdout=subprocess.PIPE, no_new_privs=value) as process:
        found = {"Popen": process.communicate()[0]}
    found["run"] = run(STATUS, capture_output=True, no_new_privs=value).stdout
    found["check_output"] = cast(Any, errand_boy.check_output)(STATUS, no_new_privs=value)
    found["map"] = next(errand_boy.map([STATUS], no_new_privs=value)).stdout
    mapping = cast(Any, {"args": STATUS, "no_new_privs": value})
    found["one of a map"] = next(errand_boy.map([mapping])).stdout
    found["asyncio"] = asyncio.run(by_asyncio())
    found["client.run"] = client.run(STATUS, capture_output=True, no_new_privs=value).stdout
    with client.Popen(
        STATUS, stdout=subprocess.PIPE, no_new_privs=value, kill_on_client_exit=True
    ) as process:
        found["client.Popen"] = process.communicate()[0]
    found["client.map"] = next(client.map([STATUS], no_new_privs=value)).stdout
    assert found == dict.fromkeys(found, SET if value else UNSET)
    assert own() == UNSET


@pytest.mark.root
def test_no_new_privs_with_other_ids() -> None:
    done = run(STATUS, stdout=subprocess.PIPE, user=65534, no_new_privs=True)
    assert done.stdout == SET


@pytest.mark.root
def test_set_user_id_bit_has_no_effect(public_dir: Path) -> None:
    program = public_dir / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    command = [program, "-u"]
    for value, uid in (False, 0), (True, 65534):
        done = run(command, stdout=subprocess.PIPE, user=65534, no_new_privs=value)
        assert int(done.stdout) == uid


def test_no_new_privs_by_posix_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "posix")
    errand_boy.stop()
    with pytest.raises(OSError, match="no_new_privs") as caught:
        run(["true"], no_new_privs=True)
    errand_boy.stop()
    assert caught.value.errno == errno.ENOTSUP


def test_no_new_privs_and_a_fork() -> None:
    with pytest.raises(ValueError, match="no_new_privs= can't be given with a preexec_fn"):
        run(["true"], preexec_fn=print, no_new_privs=True)


def test_no_new_privs_where_only_the_standard_library_starts_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_direct, "works", lambda: False)
    with pytest.raises(OSError, match="no_new_privs=") as caught:
        run(["true"], no_new_privs=True)
    assert caught.value.errno == errno.ENOTSUP
    assert run(["true"]).returncode == 0


def test_no_new_privs_under_a_filter_that_refuses_it() -> None:
    """No program runs without it: the failure names the step."""
    source = """
        import platform, struct
        prctl = {"x86_64": 157, "aarch64": 167}[platform.machine()]
        load, equal, give = 0x20, 0x15, 0x06
        instructions = [
            (load, 0, 0, 0), (equal, 0, 3, prctl), (load, 0, 0, 16), (equal, 0, 1, 38),
            (give, 0, 0, 0x50000 | 1), (give, 0, 0, 0x7FFF0000),
        ]
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
        filter = struct.pack("@HP", len(instructions), ctypes.addressof(code))
        filter = ctypes.create_string_buffer(filter)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, filter, 0, 0) == 0
        try:
            subprocess.run(["true"], no_new_privs=True)
        except OSError as error:
            report([error.errno, str(error)])
    """
    for way in ("errand_boy", "errand_boy-helper"):
        number, text = run_script(source, way)
        assert number == errno.EPERM
        assert "no_new_privs" in text
