"""Completions of the command line, as shells make them, and the manual page."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PATIENCE, find_program, script_environment
from daemon import started_daemon

import errand_boy
from errand_boy._cli import args
from errand_boy._cli.outline import outlines
from errand_boy._options.limits import NAMES

ERRAND_BOY = [sys.executable, "-m", "errand_boy"]
SHELLS = ["bash", "zsh", "fish"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and the directory where the shells run, with errand-boy in PATH."""
    for name, value in script_environment().items():
        monkeypatch.setenv(name, value)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "errand-boy").write_text(f'#!/bin/sh\nexec {shlex.join(ERRAND_BOY)} "$@"\n')
    (programs / "errand-boy").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(shell: str) -> str:
    return subprocess.check_output([*ERRAND_BOY, "completion", shell], text=True, timeout=PATIENCE)


@contextmanager
def started_job(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a daemon that has one job, and yield its name."""
    places = ["--job-state", directory / "state", "--job-runtime", directory / "runtime"]
    with started_daemon(directory, *places) as daemon:
        monkeypatch.setenv("ERRAND_BOY_SOCKET", daemon.path)
        job = errand_boy.connect(daemon.path).start(["sleep", "60"], "of-this-test")
        try:
            yield job.name
        finally:
            job.stop()
            job.remove()


BASH = r"""
source completion
IFS=$'\n'
COMP_WORDS=(%s)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_errand_boy
printf '%%s\n' "${COMPREPLY[@]}"
"""


def completed(shell: str, line: str) -> set[str]:
    """Return what the shell offers for the last word of a line."""
    if shell == "bash":
        words = " ".join(map(quoted, line.split(" ")))
        command = ["bash", "--norc", "--noprofile", "-c", BASH % words]
        Path("completion").write_text(written("bash"))
    else:
        Path("completion").write_text(written("fish"))
        script = f"source completion; complete -C {shlex.quote(line)}"
        command = ["fish", "--no-config", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr == ""
    return {found.split("\t")[0] for found in done.stdout.splitlines()}


def quoted(word: str) -> str:
    return word if word in ("=", "") and word else shlex.quote(word)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_it(shell: str, home: Path) -> None:
    find_program(shell)
    Path("script").write_text(written(shell))
    done = subprocess.run([shell, "-n", "script"], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "fish"])
class TestCompletion:
    @pytest.fixture(autouse=True)
    def shell_is_there(self, shell: str, home: Path) -> None:
        find_program(shell)

    @pytest.mark.slow
    def test_commands(self, shell: str) -> None:
        assert completed(shell, "errand-boy ") >= set(args.COMMANDS)
        assert completed(shell, "errand-boy sta") == {"status"}

    @pytest.mark.slow
    @pytest.mark.parametrize("command", args.COMMANDS)
    def test_options(self, shell: str, command: str) -> None:
        (outline,) = (outline for outline in outlines() if outline.name == command)
        long = {name for each in outline.options for name in each.names if name.startswith("--")}
        assert completed(shell, f"errand-boy {command} --") == long

    @pytest.mark.slow
    def test_values(self, shell: str) -> None:
        tree = {"process", "group", "cgroup", "all"}
        assert completed(shell, "errand-boy run --tree ") == tree
        assert completed(shell, "errand-boy serve --log-level w") == {"warning"}
        assert completed(shell, "errand-boy completion ") == set(SHELLS)
        assert completed(shell, "errand-boy run --timeout ") <= {""}
        assert completed(shell, "errand-boy map --limit ") == {f"{name}=" for name in NAMES}
        assert completed(shell, "errand-boy run --sandbox s") == {"system=yes"}

    def test_files(self, shell: str, home: Path) -> None:
        (home / "a-file").touch()
        assert completed(shell, "errand-boy run --record a-f") == {"a-file"}

    @pytest.mark.slow
    def test_the_program(self, shell: str, home: Path) -> None:
        program = home / "bin" / "program-of-this-test"
        program.write_text("")
        program.chmod(0o755)
        for before in "run", "run --pty", "run --tree all", "run --", "map --":
            line = f"errand-boy {before} program-of-th"
            assert completed(shell, line) >= {"program-of-this-test"}, line

    @pytest.mark.slow
    def test_names_of_jobs(self, shell: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with started_job(home, monkeypatch) as name:
            for command in "logs", "attach --read-only", "wait", "stop", "rm":
                assert completed(shell, f"errand-boy {command} of-th") == {name}


@pytest.mark.slow
def test_bash_takes_an_option_and_its_value_for_three_words(home: Path) -> None:
    find_program("bash")
    assert completed("bash", "errand-boy run --tree = g") == {"group"}
    program = "errand-boy run --limit wall = 60 errand-b"
    assert completed("bash", program) >= {"errand-boy"}
    assert completed("bash", "errand-boy serve --log-format = ") == {"text", "json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("errand-boy stat\t", "errand-boy status "),
        ("errand-boy run --tree c\t", "errand-boy run --tree cgroup "),
        ("errand-boy run --dies\t", "errand-boy run --dies-with-caller "),
        ("errand-boy run --limit wa\t60", "errand-boy run --limit wall=60"),
        ("errand-boy completion f\t", "errand-boy completion fish "),
        ("errand-boy run program-of-\t", "errand-boy run program-of-this-test "),
        ("errand-boy run --record a-f\t", "errand-boy run --record a-file "),
    ],
)
def test_zsh_at_a_terminal(home: Path, typed: str, line: str) -> None:
    find_program("zsh")
    (home / "bin" / "program-of-this-test").write_text("")
    (home / "bin" / "program-of-this-test").chmod(0o755)
    (home / "a-file").touch()
    assert completed_by_zsh(home, typed) == line


@pytest.mark.slow
def test_names_of_jobs_by_zsh(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_program("zsh")
    with started_job(home, monkeypatch) as name:
        assert completed_by_zsh(home, "errand-boy logs --follow of-th\t").rstrip().endswith(name)


def completed_by_zsh(home: Path, typed: str) -> str:
    """Return the line that zsh has at a terminal when it has completed what was typed."""
    (home / "_errand-boy").write_text(written("zsh"))
    setup = """\
PS1=; fpath=($PWD $fpath); autoload -U compinit; compinit -u -D
keep() { print -r -- "$BUFFER|" >line; exit }; zle -N keep; bindkey '^X' keep; print rea""dy
"""
    shell = errand_boy.Popen(["zsh", "-f", "-i"], pty=(50, 200))
    assert shell.terminal is not None
    with shell, shell.terminal as terminal:
        terminal.write(setup.encode())
        seen = b""
        while b"ready\r\n" not in seen:
            part = terminal.read(1000)
            assert part, seen
            seen += part
        terminal.write(typed.encode() + b"\x18")
        assert terminal.read() is not None  # to its end
        shell.wait(PATIENCE)
    return (home / "line").read_text().removesuffix("|\n")


# -- the manual page --


def manual() -> str:
    return subprocess.check_output([*ERRAND_BOY, "man"], text=True, timeout=PATIENCE)


def test_manual_page_has_all_options() -> None:
    page = manual().replace("\\-", "-")
    for outline in outlines():
        section = page.split(f"\n.SH {outline.name.upper()}\n")[1].split("\n.SH ")[0]
        for option in outline.options:
            for name in option.names:
                assert f"\\fB{name}\\fR" in section


def test_manual_page_in_docs_is_up_to_date() -> None:
    """If not: errand-boy man > docs/errand-boy.1."""
    assert (Path(__file__).parent.parent / "docs/errand-boy.1").read_text() == manual()


def test_manual_page_is_well_formed() -> None:
    mandoc = find_program("mandoc")
    done = subprocess.run(
        [mandoc, "-T", "lint", "-W", "warning"], input=manual(), capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if "missing date" not in line]
    assert (found, done.stderr) == ([], "")
