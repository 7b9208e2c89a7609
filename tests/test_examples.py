"""The examples, run as a reader would run them."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import find_program

from errand_boy._native import lib

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "build_project.py"
GIB = 1 << 30

NEEDED = {"git": "git", "tar": "tar", "gzip": "gzip", "sha256sum": "coreutils", "cc": "gcc"}


def hold_gib() -> float:
    if os.environ.get("CI") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * GIB:
        return 0.1
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 if available > 4 * GIB else 0.1


def test_build_project() -> None:
    for name, package in NEEDED.items():
        find_program(name, package)
    hold = hold_gib()
    done = subprocess.run(
        [sys.executable, EXAMPLE, f"--hold={hold}", "--rounds=1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"holding {hold:.2f} GiB"
    assert re.fullmatch(r"built 240 files in 6 commits, with \d+ commands", lines[1])
    assert re.fullmatch(r"commit [0-9a-f]{40}", lines[2])
    assert re.fullmatch(r"archive [0-9a-f]{64}", lines[3])
    measured = r"\s+[\d.]+ s\s+[\d.]+\s+\d+ ms\s+[\d.]+"
    assert re.fullmatch("errand_boy" + measured, lines[6])
    assert re.fullmatch("subprocess" + measured, lines[7])
    # Near a memory limit the third way may be refused; the line is there all the same.
    assert lines[8].startswith(("gevent.subprocess", "subprocess, preexec_fn"))
    assert len(lines) == 9


def run_example(name: str, *arguments: str | Path) -> str:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
    ).stdout


def without_landlock() -> bool:
    return bool(lib.eb_landlock_version() < 1)


@pytest.mark.skipif(without_landlock(), reason="this kernel has no Landlock")
def test_judge(tmp_path: Path) -> None:
    lines = run_example("judge.py").splitlines()
    assert {line.split()[0]: line[11:21].strip() for line in lines} == {
        "right": "right",
        "wrong": "wrong",
        "slow": "too slow",
        "asleep": "too slow",
        "big": "too big",
        "loud": "too loud",
        "forking": "forking",
        "crashing": "crashing",
        "failing": "crashing",
        "curious": "crashing",
        "dialling": "crashing",
    }
    program = tmp_path / "mine.py"
    program.write_text("print(eval(input().replace(' ', '+')))")
    assert run_example("judge.py", program).split()[:2] == ["mine", "right"]


@pytest.mark.skipif(without_landlock(), reason="this kernel has no Landlock")
def test_agent_tool(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (tmp_path / "secret").write_text("secret")

    def told(command: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(run_example("agent_tool.py", workspace, command))
        return found

    done = told("echo hello > file; cat file; ls")
    assert (done["output"], done["exit_status"]) == ("hello\nfile\n", 0)
    done = told("cat ../secret; echo $?; (sleep 1000 &) ; echo x > /dev/shm/errand-boy")
    assert "secret: Permission denied" in str(done["output"])
    assert done["exit_status"] != 0
    assert "was stopped" in str(told("yes")["stopped"])
    assert told("kill -SEGV $$")["crashed"] == "It was ended by signal 11."


def run_compress_files(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "compress_files.py", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
    )


def test_compress_files(tmp_path: Path) -> None:
    find_program("gzip")
    done = run_compress_files()
    first, second, third = done.stdout.splitlines()
    assert re.fullmatch(r"200 files, \d+ bytes, are \d+ bytes now", first)
    assert re.fullmatch(r"the slowest took \d+ ms: sample-\d+\.log", second)
    assert re.fullmatch(r"failed: gzip: .*missing\.log: No such file or directory", third)
    assert done.returncode == 0

    path = tmp_path / "text"
    path.write_text("x" * 10_000)
    assert run_compress_files(path).returncode == 0
    assert gzip.decompress((tmp_path / "text.gz").read_bytes()) == path.read_bytes()
    assert run_compress_files(path, tmp_path / "missing").returncode == 1


@pytest.mark.parametrize("whose", ["system", "user"])
def test_units_of_systemd(whose: str, tmp_path: Path) -> None:
    verify = find_program("systemd-analyze", "systemd")
    units = sorted((ROOT / "examples" / "systemd" / whose).iterdir())
    assert [unit.name for unit in units] == ["errand-boy.service", "errand-boy.socket"]
    for unit in units:  # with a program that is there
        text = unit.read_text().replace("/usr/bin/errand-boy ", "/bin/true ")
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        [verify, f"--{whose}", "verify", "--man=no", *(tmp_path / unit.name for unit in units)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def printed_unit(program: list[str], *arguments: str) -> str:
    command = [*program, "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=50).stdout


@pytest.mark.parametrize("whose", ["system", "user"])
def test_printed_unit_is_valid(whose: str, tmp_path: Path) -> None:
    verify = find_program("systemd-analyze", "systemd")
    unit = tmp_path / "errand-boy.service"
    unit.write_text(printed_unit([sys.executable, "-m", "errand_boy"], "--print-unit", whose))
    done = subprocess.run(
        [verify, f"--{whose}", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_printed_unit_fits_the_installation(tmp_path: Path) -> None:
    """It names the program that prints it, with the options that it was given."""
    program = tmp_path / "my programs" / "errand-boy"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom errand_boy._cli.args import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    options = ["--log-format", "json", "--print-unit", "user", "--grace=70", "--chdir", "/100% $x"]
    lines = printed_unit([str(program)], *options).splitlines()
    serve = f'"{program}" serve'
    started = '--log-format json --grace=70 --chdir "/100%% $$x" --socket %t/errand-boy.sock'
    assert f"ExecStart={serve} {started}" in lines
    assert f"ExecReload={serve} --upgrade --socket %t/errand-boy.sock" in lines
    assert "TimeoutStopSec=100" in lines
    assert "WantedBy=default.target" in lines

    python = os.path.abspath(sys.executable)
    lines = printed_unit(
        [sys.executable, "-m", "errand_boy"], "--print-unit=system", "--socket", "/x"
    ).splitlines()
    assert f"ExecStart={python} -m errand_boy serve --socket /x" in lines
    assert f"ExecReload={python} -m errand_boy serve --upgrade --socket /x" in lines
    assert "StateDirectory=errand-boy" in lines
    assert "WantedBy=multi-user.target" in lines
