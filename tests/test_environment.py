"""Who may choose by environment variables what errand-boy does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

PLACES = [place for place in sys.path if place]
PROGRAM = f"""
import sys
sys.path[:0] = {PLACES!r}
import errand_boy
errand_boy.start()  # a helper
errand_boy.run(["true"], check=True)
errand_boy.stop()
"""
IN_THE_WAY = {
    "ERRAND_BOY_HELPER": "/nonexistent",
    "ERRAND_BOY_SOCKET": "/nonexistent",
    "ERRAND_BOY_SPAWN": "nonsense",
}
OTHER_GROUP = 65534


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("ERRAND_BOY_")}
    return subprocess.run(
        [*words, "-c", PROGRAM],
        env={**environment, **variables},
        capture_output=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_variable_is_used(name: str) -> None:
    done = run(sys.executable, **{name: IN_THE_WAY[name]})
    assert done.returncode == 1
    assert IN_THE_WAY[name].encode() in done.stderr


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_empty_variable_is_unset(name: str) -> None:
    done = run(sys.executable, **{name: ""})
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("option", ["-I", "-E"])
def test_variables_are_ignored_as_pythons_own(option: str) -> None:
    done = run(sys.executable, option, **IN_THE_WAY)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.root
def test_variables_are_ignored_in_a_program_with_other_rights(tmp_path: Path) -> None:
    program = tmp_path / "python"
    shutil.copy(Path(sys.executable).resolve(), program)
    os.chown(program, 0, OTHER_GROUP)
    program.chmod(0o2755)
    group = [str(program), "-c", "import os; print(os.getegid())"]
    home = {"PYTHONHOME": sys.base_prefix}
    told = subprocess.run(group, env=home, capture_output=True, timeout=PATIENCE)
    if told.stdout != b"%d\n" % OTHER_GROUP:
        pytest.skip("this file system, or this process, has no set-group-ID programs")
    done = run(program, **home, **IN_THE_WAY)
    assert (done.returncode, done.stderr) == (0, b"")
