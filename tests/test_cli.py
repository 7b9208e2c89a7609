"""The command line of `errand-boy`: help, errors, and where it must not fall back."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, script_environment
from daemon import Daemon, started_daemon

import errand_boy
from errand_boy._cli import args
from errand_boy._native import lib

ERRAND_BOY = [sys.executable, "-m", "errand_boy"]


@pytest.fixture(autouse=True)
def environment(no_daemon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(
    *arguments: str, program: list[str] = ERRAND_BOY, **options: Any
) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": PATIENCE, **options}
    return subprocess.run([*program, *arguments], **options)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-c", code, *arguments, program=[sys.executable], env=script_environment())


# -- which subcommand --


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_there_is_help(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: errand-boy COMMAND")
    for name in args.COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", args.COMMANDS)
def test_each_help_shows_its_own_options(name: str) -> None:
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: errand-boy {name}")
    parser = args.parser_of(name)
    assert parser.prog == f"errand-boy {name}"
    for action in parser._actions:
        if action.help != "==SUPPRESS==":
            for option in action.option_strings:
                assert option in done.stdout


@pytest.mark.parametrize("name", args.COMMANDS)
def test_an_unknown_option_shows_the_subcommands_usage(name: str) -> None:
    done = run(name, "--no-such-option", "bash")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: errand-boy {name} ")
    assert "--no-such-option" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "--limt", "wall=1", "ls"], "--limt; try --limit"),
        (["map", "--keep-ordr=yes", "ls"], "; try --keep-order"),
        (["--helpp"], "unknown option --helpp; try --help"),
        (["--pool-size=2"], "; the daemon's come after its name: errand-boy serve --pool-size=2"),
        (["ps", "--no-such-option"], "; errand-boy ps --help lists the options"),
        (["run", "--quux=/", "ls"], "; errand-boy run --help lists the options"),
    ],
)
def test_a_misspelt_option(arguments: list[str], hint: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr.endswith(f"{hint}\n")) == (2, True)


def test_a_program_in_the_place_of_a_command() -> None:
    done = run("ls", "-l", "a b")
    assert (done.returncode, done.stdout) == (2, "")
    suggestion = "errand-boy ps, or errand-boy run -- ls -l 'a b'"
    assert done.stderr.endswith(f"there is no command ls; try {suggestion}\n")


@pytest.mark.parametrize(("name", "likely"), [("restart", "stop"), ("top", "status --watch")])
def test_a_command_of_other_programs(name: str, likely: str) -> None:
    assert f"try errand-boy {likely}, or errand-boy run -- {name}" in run(name).stderr


def test_a_misspelt_command() -> None:
    done = run("stauts")
    assert done.returncode == 2
    assert "there is no command stauts; try errand-boy status, or errand-boy run" in done.stderr


@pytest.mark.parametrize(
    ("name", "meant"), [("jobs", "ps"), ("exec", "run"), ("version", "--version")]
)
def test_another_programs_name_of_a_command(name: str, meant: str) -> None:
    done = run(name, "7")
    assert done.stderr.endswith(f"try errand-boy {meant}, or errand-boy run -- {name} 7\n")


def test_help_is_a_command_too() -> None:
    assert run("help").stdout == run("--help").stdout
    assert run("help", "run").stdout == run("run", "--help").stdout


def test_version() -> None:
    assert run("-V").stdout == run("--version").stdout == f"{errand_boy.__version__}\n"


@pytest.mark.parametrize("name", ["map", "run"])
def test_help_is_as_wide_as_the_terminal(name: str) -> None:
    def longest(columns: int) -> int:
        done = run(name, "--help", env=script_environment() | {"COLUMNS": str(columns)})
        return max(map(len, done.stdout.splitlines()))

    assert longest(60) < 120 < longest(200) < 200


@pytest.mark.parametrize("name", ["map", "run"])
def test_a_command_line_without_help_needs_no_shutil(name: str) -> None:
    code = """
import sys
from errand_boy._cli.args import parser_of
sys.modules.pop("shutil", None)
parser_of(sys.argv[1])
print("shutil" in sys.modules)
"""
    assert python(code, name).stdout == "False\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--timeout", "-1"], "--timeout: '-1' is not a duration such as"),
        (["--limit", "wall"], "--limit: 'wall' has no value, as wall=60 or memory=1G has"),
        (["--limit", "wall=x"], "--limit: limits: wall: 'x' is not a duration such as"),
        (["--rlimit", "nofile=many"], "--rlimit: 'many' is not an integer"),
        (["--nice", "abc"], "--nice: 'abc' is not an integer"),
        (["--drain", "abc"], "--drain: 'abc' is not a duration such as 10, 1.5s, 500ms, 2m"),
        (["--sandbox", "systems=yes"], "--sandbox: 'systems=yes' is not one of read=PATH"),
    ],
)
def test_a_wrong_value(options: list[str], words: str) -> None:
    done = run("run", *options, "--", "true")
    assert (done.returncode, words in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--timeout", "20ms"],
        ["run", "--limit", "wall=0.02s"],
        ["run", "--timeout", ".02", "--stop", "CONT:1ms,KILL"],
        ["map", "--timeout", "20ms", "--halt", "now,fail=1"],
    ],
)
def test_durations_are_written_alike(arguments: list[str]) -> None:
    tail = [":::", "x"] if arguments[0] == "map" else []
    done = run(*arguments, "--drain", "500ms", "--", "sh", "-c", "exec sleep 1000", *tail)
    assert done.returncode in (124, 128 + signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["ls -l"], 127, "'ls -l': No such file or directory; this is one word"),
        (["--sandbox", "read=.", "--", "ls"], 126, "ls: Permission denied; in the sandbox"),
        (["--sandbox", "read=/nowhere", "--", "ls"], 126, "/nowhere: sandbox: No such file"),
    ],
)
def test_a_start_that_fails_says_what_to_change(
    arguments: list[str], status: int, words: str
) -> None:
    if "--sandbox" in arguments and lib.eb_landlock_version() < 6:
        pytest.skip("needs Landlock")
    done = run("run", *arguments)
    assert (done.returncode, words in done.stderr) == (status, True)


def test_map_of_a_missing_file() -> None:
    done = run("map", "-a", "missing", "echo")
    assert (done.returncode, done.stderr) == (
        125,
        "errand-boy: missing: No such file or directory\n",
    )


def test_an_option_of_the_daemon_without_its_name() -> None:
    done = run("--max-accepts", "1")
    assert done.returncode == 2
    assert "errand-boy serve --max-accepts" in done.stderr


def test_classic_help_has_both_uses() -> None:
    done = run("--help", program=[sys.executable, "-m", "errand_boy.run"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m errand_boy.run ")
    for option in "COMMAND", "--local", "--pool-size":
        assert option in done.stdout


# -- a daemon that is named --


CLASSIC = [sys.executable, "-m", "errand_boy.run"]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ([*ERRAND_BOY, "run"], ["--", "id"]),
        ([*ERRAND_BOY, "run", "-t"], ["--", "id"]),
        (CLASSIC, ["id"]),
        ([*ERRAND_BOY, "map"], ["echo", ":::", "1"]),
    ],
    ids=["run", "run -t", "classic", "map"],
)
@pytest.mark.parametrize("how", ["option", "environment"])
def test_no_other_way_where_a_daemon_is_named(
    how: str,
    program: list[str],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    none = f"{tmp_path}/none"
    if how == "option":
        command = ["--socket", none, *command]
    else:
        monkeypatch.setenv("ERRAND_BOY_SOCKET", none)
    done = run(*command, program=program)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(f"errand-boy: {none}: no errand-boy daemon listens here; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("program", [[*ERRAND_BOY, "run"], CLASSIC], ids=["run", "classic"])
def test_local_asks_no_daemon(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRAND_BOY_SOCKET", f"{tmp_path}/none")
    assert run("--local", "true", program=program).returncode == 0
    done = run("--local", "--socket", "x", "true", program=program)
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


def test_map_with_local_asks_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SOCKET", f"{tmp_path}/none")
    assert run("map", "--local", "echo", ":::", "1").stdout == "1\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", [[*ERRAND_BOY, "run"], CLASSIC], ids=["run", "classic"])
@pytest.mark.parametrize("script", ["echo out; exit 3", "kill -TERM $$", "echo err >&2; cat"])
def test_both_spellings_agree(program: list[str], script: str, daemon: Daemon) -> None:
    command = ["--", "/bin/sh", "-c", script] if program is not CLASSIC else [script]
    for where in ["--local"], ["--socket", daemon.path], []:
        done = run(*where, *command, program=program, input="in")
        expected = run("-c", script, program=["/bin/sh"], input="in")
        assert (done.stdout, done.stderr) == (expected.stdout, expected.stderr)
        code = expected.returncode
        assert done.returncode == (code if code >= 0 else 128 - code)


# -- no daemon: what to do --


@pytest.mark.slow
def test_the_suggested_command_works(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "socket"
    code = """if True:
        import sys, errand_boy
        errand_boy.connect(sys.argv[1]).run(["true"])"""
    done = python(code, str(path))
    assert done.stderr.count("Traceback") == 1
    assert "direct cause" not in done.stderr and "During handling" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"errand_boy.errors.NoDaemonError: {path}: no errand-boy daemon ")
    suggestion = last.partition("to start one: ")[2]
    assert suggestion.endswith(f"errand-boy serve --socket {shlex.quote(str(path))}")
    before, _, rest = suggestion.rpartition("errand-boy ")
    subprocess.run(["sh", "-c", before.rstrip("& ")], check=True)
    command = [*ERRAND_BOY, *shlex.split(rest)]
    with subprocess.Popen(command, env=script_environment(), stderr=subprocess.PIPE) as daemon:
        assert daemon.stderr is not None
        while b"listening" not in (line := daemon.stderr.readline()):
            assert line
        assert python(code, str(path)).returncode == 0
        daemon.terminate()


@pytest.mark.root
def test_the_suggestion_names_who_can(tmp_path: Path) -> None:
    code = """if True:
        import os, shlex, errand_boy, errand_boy._client.client  # nothing is imported after this
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            errand_boy.connect("/run/none.sock").run(["true"])
        except errand_boy.NoDaemonError as error:
            print(error)"""
    text = python(code).stdout
    assert "as a user who may write in /run: errand-boy serve --socket /run/none.sock" in text


def test_a_named_daemon_in_python(tmp_path: Path) -> None:
    code = """if True:
        import errand_boy, errno
        for call in errand_boy.run, errand_boy.Popen, lambda c: list(errand_boy.map([c])):
            try:
                call(["true"])
            except errand_boy.NoDaemonError as error:
                print(errno.errorcode[error.errno], error.filename)"""
    env = {**script_environment(), "ERRAND_BOY_SOCKET": f"{tmp_path}/none"}
    done = run("-c", code, program=[sys.executable], env=env)
    assert done.stdout == f"ENOENT {tmp_path}/none\n" * 3


# -- other habits --


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        read, write = os.pipe()
        os.close(read)
        done = run(
            "status",
            "--json",
            "--socket",
            daemon.path,
            stdout=write,
            stderr=subprocess.PIPE,
            capture_output=False,
        )
        os.close(write)
        assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


def test_celery_that_is_missing(tmp_path: Path) -> None:
    code = """if True:
        import sys
        sys.modules["celery"] = None
        import errand_boy.celery"""
    done = python(code)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith(
        "ModuleNotFoundError: errand_boy.celery needs Celery: pip install 'errand-boy[celery]'\n"
    )


PATCH = [sys.executable, "-m", "errand_boy.patch"]


def test_patch_explains_itself() -> None:
    done = run("--help", program=PATCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m errand_boy.patch (SCRIPT | -m MODULE)")
    assert "subprocess" in done.stdout
    done = run(program=PATCH)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("as_module", [False, True])
def test_tracebacks_under_patch_begin_in_the_program(tmp_path: Path, as_module: bool) -> None:
    script = tmp_path / "program.py"
    script.write_text("def f():\n    raise KeyError('x')\n\nf()\n")
    arguments = ["-m", "program"] if as_module else [str(script)]
    done = run(*arguments, program=PATCH, cwd=tmp_path, env=script_environment())
    plain = run(str(script), program=[sys.executable])
    assert done.returncode == 1
    assert done.stderr == plain.stderr


def test_syntax_errors_and_exits_under_patch(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text("import sys; sys.exit(7)")
    assert run(str(script), program=PATCH).returncode == 7
    script.write_text("def\n")
    done = run(str(script), program=PATCH)
    assert (done.returncode, done.stderr) == (1, run(str(script), program=[sys.executable]).stderr)
    done = run(str(tmp_path / "none.py"), program=PATCH)
    assert "runpy" not in done.stderr and "none.py" in done.stderr


def test_status_without_a_daemon(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with pytest.raises(errand_boy.NoDaemonError) as caught:
        errand_boy.connect(path).status()
    assert caught.value.filename == path
    assert str(caught.value).startswith(f"{path}: no errand-boy daemon listens here; to start one")


def test_name_of_the_error_has_the_path_first() -> None:
    error = errand_boy.NoDaemonError(2, "nobody", "/path")
    assert str(error) == "/path: nobody"
    assert str(errand_boy.NoDaemonError(2, "nobody")) == "[Errno 2] nobody"
