"""The language of ``errand-boy map``: sources, replacement strings, packing, slots, blocks, output.

test_map_parallel.py compares it with GNU parallel. Here are the cases without a comparison.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, until
from daemon import started_daemon

from errand_boy._cli import inputs, jobs, map as cli_map, packing, pipe
from errand_boy._cli.parsing import UsageError
from errand_boy._cli.template import Template, split
from errand_boy._map.batch import NOT_NOW

MAP = [sys.executable, "-m", "errand_boy", "map"]


def run(
    *arguments: str, input: bytes | None = None, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    return subprocess.run([*MAP, *arguments], capture_output=True, timeout=50, **stdin, **options)


def parsed(*arguments: str) -> tuple[Namespace, list[str]]:
    return cli_map.parse(cli_map.parser("errand-boy map"), arguments)


# -- where the options end --


@pytest.mark.parametrize(
    ("arguments", "jobs", "words"),
    [
        (["-j2", "make", "-j3"], "2", ["make", "-j3"]),
        (["-j", "-1", "make", "-j", "-3"], "-1", ["make", "-j", "-3"]),
        (["-kj", "-1", "echo"], "-1", ["echo"]),
        (["--jobs", "+1", "--", "-k"], "+1", ["-k"]),
        (["-P", "4", ":::", "a"], "4", [":::", "a"]),
        (["-I", "-", "-j3", "echo", "-"], "3", ["echo", "-"]),
        (["-a", "file", "-tv", "-j4", "echo"], "4", ["echo"]),
        (["-j5", "-"], "5", ["-"]),
        ([], None, []),
    ],
)
def test_options_end_where_the_command_begins(
    arguments: list[str], jobs: str | None, words: list[str]
) -> None:
    options, rest = parsed(*arguments)
    assert (options.jobs, rest) == (jobs, words)


def test_options_of_xargs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a b\nc\n")
    done = run("-P2", "-k", "-I%", "-t", "-a", str(file), "echo", "<%>")
    assert done.stdout == b"<a b>\n<c>\n"
    assert done.stderr == b"echo '<a b>'\necho '<c>'\n"
    assert run("-v", "-n", "2", "echo", ":::", "a", "b").stdout == b"echo a b\na b\n"


# -- how many at once --


def test_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    found = [jobs.parse(text) for text in ("3", "+1", "-2", "-9", "50%", "10%", "200%", " 4\n")]
    assert found == [3, 7, 4, 1, 3, 1, 12, 4]
    assert jobs.parse("0") > 100
    for text in ("", "x", "+50%", "1.5", "%", "--1"):
        with pytest.raises(ValueError, match="not a number of commands"):
            jobs.parse(text)


def test_more_jobs_than_cpus_run_at_once(tmp_path: Path) -> None:
    """Each of them waits until all others run."""
    count = len(os.sched_getaffinity(0)) + 1
    script = f'mkdir {tmp_path}/{{}}; until [ "$(ls {tmp_path} | wc -l)" = {count} ]; do :; done'
    names = [str(number) for number in range(count)]
    assert run("-j", "+1", "--shell", script, ":::", *names).returncode == 0


def test_file_of_jobs_is_read_again(tmp_path: Path) -> None:
    file, there = tmp_path / "jobs", tmp_path / "there"
    file.write_text("1\n")
    there.mkdir()
    # The first alone; when it has ended, the other three at the same time.
    script = (
        f'if [ {{}} = 1 ]; then [ -z "$(ls {there})" ] && echo 3 > {file}; exit; fi;'
        f' mkdir {there}/{{}}; until [ "$(ls {there} | wc -l)" = 3 ]; do :; done'
    )
    done = run("-j", str(file), "--shell", script, ":::", "1", "2", "3", "4")
    assert (done.stderr, done.returncode) == (b"", 0)


def test_file_that_says_no_number(tmp_path: Path) -> None:
    file = tmp_path / "jobs"
    file.write_text("many\n")
    done = run("-j", str(file), "echo", ":::", "1")
    assert done.returncode == 2
    assert b"contains no number of commands" in done.stderr


@pytest.mark.slow
def test_slots_are_one_command_s_each(tmp_path: Path) -> None:
    # The first three run at the same time.
    script = "mkdir {%} || exit 1; touch seen{%}; until [ -e seen3 ]; do sleep 0.01; done;"
    script += " sleep 0.0{#}; rmdir {%}; echo {%}"
    done = run("-j3", "--shell", script, ":::", *"abcdefghi", cwd=tmp_path)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert set(done.stdout.split()) == {b"1", b"2", b"3"}


# -- sources --


def test_arguments_are_taken_whatever_standard_input_is() -> None:
    assert run("-k", "echo", "{}", ":::", "a", "b", "c").stdout == b"a\nb\nc\n"


def test_terminal_is_told_that_it_is_waited_for() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*MAP, "echo"], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        os.close(theirs)
        assert process.stderr is not None
        message = process.stderr.readline()
        assert message.startswith(b"errand-boy: reading from the terminal")
        os.write(ours, b"a\n\x04")
        out, err = process.communicate(timeout=PATIENCE)
    os.close(ours)
    assert (out, err) == (b"a\n", b"")


def test_files_that_are_not_there() -> None:
    for arguments in (["-a", "/nonexistent"], ["echo", "::::", "/nonexistent"]):
        done = run(*arguments)
        assert done.returncode == 125
        assert b"/nonexistent" in done.stderr


def test_lines_are_the_same_however_they_come() -> None:
    random = Random(1)
    text = b"".join(bytes(random.choices(b'ab,"\n', k=8)) + b"\n" for _ in range(200))
    for at_once, in_parts in (
        (inputs.Lines(b"\n"), inputs.Lines(b"\n")),
        (inputs.CsvLines(), inputs.CsvLines()),
    ):
        expected = at_once.feed(text) + at_once.end()
        found: list[bytes] = []
        at = 0
        while at < len(text):
            size = random.randint(1, 9)
            found += in_parts.feed(text[at : at + size])
            at += size
        assert found + in_parts.end() == expected
    assert b"\n".join(expected) in text


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (b'a,"b,1"\n"c\nd","e""f"\n', ["--csv"], b'b,1|a\ne"f|c\nd\n'),
        (b"a;b\n", ["--csv", "--colsep", ";"], b"b|a\n"),
        (b"a\tb\n", ["--csv", "--colsep", r"\t"], b"b|a\n"),
        (b"a1b2c\n", ["--colsep", "([0-9])"], b"b|a\n"),
        (b"x,y\n1,2\n", ["--csv", "--header", ":"], b"2|1\n"),
    ],
)
def test_columns(text: bytes, arguments: list[str], expected: bytes) -> None:
    assert run("-k", *arguments, "echo", "{2}|{1}", input=text).stdout == expected


def test_header_names_columns_with_changes() -> None:
    done = run("--csv", "--header", ":", "echo", "{f/}", "{f.}", "{n}", input=b"n,f\n1,/a/b.c\n")
    assert done.stdout == b"b.c /a/b 1\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--colsep", "", "echo"],
        ["--header", "3", "echo"],
        ["-d", "", "echo"],
        ["-I", "", "echo"],
        ["-a", "+file", "echo"],
        ["--pipe", "--block", "1x", "cat"],
        ["--pipe", "--block", "0", "cat"],
        ["--pipe", "-X", "cat"],
        ["--pipe", "cat", ":::", "a"],
        ["--pipe-part", "cat"],
        ["-u", "--tag", "echo"],
        ["--halt", "soon,done=0", "echo"],
    ],
)
def test_what_makes_no_sense(arguments: list[str]) -> None:
    done = run(*arguments, input=b"1\n")
    assert (done.stdout, done.returncode) == (b"", 2)
    assert b"errand-boy map: error: " in done.stderr


# -- commands --


@pytest.mark.slow
@pytest.mark.parametrize("line", ["echo hi {}", "cd / && ls {}", "/bin/echo hi"])
def test_line_in_quotes_names_the_shell_option(line: str) -> None:
    done = run(line, ":::", "1")
    assert (done.stdout, done.returncode) == (b"", 2)
    assert b"'%b' is one word" % line.encode() in done.stderr
    assert b"--shell" in done.stderr


def test_program_with_a_space_in_its_name(tmp_path: Path) -> None:
    program = tmp_path / "my program"
    program.write_text("#!/bin/sh\necho $1\n")
    program.chmod(0o755)
    assert run(str(program), ":::", "1").stdout == b"1\n"


def test_split() -> None:
    assert split(b"echo 'a  b' \"c|d\" e\\ f") == [b"echo", b"a  b", b"c|d", b"e f"]
    for line in (b"a | b", b"a > b", b"a; b", b"a & b", b"echo $HOME", b'echo "$HOME"', b"ls *.c"):
        with pytest.raises(UsageError, match="--shell"):
            split(line)
    with pytest.raises(UsageError, match="No closing quotation"):
        split(b"echo 'a")


def test_lines_as_commands_end_at_one_that_needs_a_shell() -> None:
    done = run("-k", input=b"echo 1\n\necho 2 | cat\necho 3\n")
    assert (done.stdout, done.returncode) == (b"1\n", 125)
    assert done.stderr.startswith(b"errand-boy: echo 2 | cat: the | needs a shell")
    assert run("-k", "--shell", input=b"echo 1\n\necho 2 | cat\n").stdout == b"1\n2\n"


HOSTILE = ["; touch x", "$(touch x)", "`touch x`", "' ; touch x '", '" ; touch x "', "a  b", "a\nb"]


@pytest.mark.parametrize(
    "command", ["echo {1} {2}", "echo '{1}' \"{2}\"", "echo {}; : {1.} '{2/}'"]
)
def test_shell_parses_no_argument(command: str, tmp_path: Path) -> None:
    arguments = ["-0", "-k", "-n2", "--shell", command]
    done = run(*arguments, input="\0".join(HOSTILE).encode(), cwd=tmp_path)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert not list(tmp_path.iterdir())


def test_quoted_arguments_can_be_read_where_the_command_is_plain() -> None:
    make = Template(["echo {} {1}"], shell=True)
    assert make([b"a b", b"c"], 1, 1) == b"echo 'a b' c 'a b'"
    assert Template(["echo '{}'"], shell=True)([b"c"], 1, 1) == b"echo 'c'"


@pytest.mark.parametrize(
    ("words", "values", "expected"),
    [
        (["a{}b", "{}"], ["1", "2"], ["a1", "2b", "1", "2"]),
        (
            ["{1}{2}{3}", "{-1}", "{0}"],
            ["1", "2"],
            [
                "12",
                "2",
                "{0}",
            ],
        ),
        (["{#}:{%}", "{##}"], ["1"], ["7:3", "{##}"]),
        (["{}{}"], ["1"], ["11"]),
        (["{", "}", "{x}", "{1"], ["1"], ["{", "}", "{x}", "{1", "1"]),
        ([""], ["1"], ["", "1"]),
    ],
)
def test_template(words: list[str], values: list[str], expected: list[str]) -> None:
    make = Template(words)
    found = make([value.encode() for value in values], 7, 3)
    assert found == [word.encode() for word in expected]


def test_template_repeats_the_context() -> None:
    make = Template(["a{}b{1}", "x"], contexts=True)
    assert make([b"1", b"2"], 1, 1) == [b"a1b1", b"a2b1", b"x"]


# -- packing --


def pieces(values: Iterable[bytes]) -> Iterator[Any]:
    for value in values:
        yield NOT_NOW
        yield [value]


def packed(values: list[bytes], *arguments: str, jobs: int = 1) -> list[int]:
    """Return how many values each command has, and check that none is lost or moved."""
    options, words = parsed(*arguments)
    make = Template(words, shell=options.shell)
    found = packing.packed(pieces(values), options, lambda given: make(given, 1, 1), jobs)
    groups = [group for group in found if group is not NOT_NOW]
    assert [value for group in groups for value in group] == values
    return [len(group) for group in groups]


def test_packing() -> None:
    ten = [b"%d" % number for number in range(10)]
    assert packed(ten, "-n4", "echo") == [4, 4, 2]
    assert packed(ten, "-X", "echo") == [10]
    assert packed(ten, "-X", "echo", jobs=3) == [4, 4, 2]
    assert packed(ten, "--xargs", "echo", jobs=3) == [10]
    assert packed(ten, "--xargs", "-n3", "echo") == [3, 3, 3, 1]
    assert packed(ten, "--xargs", "-s11", "echo") == [3, 3, 3, 1]  # "echo 0 1 2" and its end
    assert packed([], "-X", "echo") == []
    with pytest.raises(UsageError, match="too long"):
        packed([b"x" * 20], "--xargs", "-s11", "echo")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--xargs"], ["--xargs", "--shell"]])
def test_packed_commands_can_be_started(arguments: list[str]) -> None:
    count = 400_000
    input = b"".join(b"%d\n" % number for number in range(count))
    done = run("-k", *arguments, "echo", input=input)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert done.stdout.split() == input.split()
    assert done.stdout.count(b"\n") < 40


# -- blocks --


def blocks(text: bytes, parts: int, *given: Any) -> list[bytes]:
    divider, found = pipe.Divider(*given), []
    for at in range(0, len(text), parts):
        divider.feed(text[at : at + parts])
        while (block := divider.block(False)) is not None:
            found.append(block)
    while (block := divider.block(True)) is not None:
        found.append(block)
    assert b"".join(found) == text
    return found


@pytest.mark.parametrize("parts", [1, 3, 1000])
def test_blocks_are_whole_records(parts: int) -> None:
    text = b"1\n22\n\n333\n4444"
    assert blocks(text, parts, b"\n", b"", 5, None) == [b"1\n22\n", b"\n333\n", b"4444"]
    assert blocks(text, parts, b"\n", b"", 1, None) == [b"1\n", b"22\n", b"\n", b"333\n", b"4444"]
    assert blocks(text, parts, b"\n", b"", 99, 2) == [b"1\n22\n", b"\n333\n", b"4444"]
    assert blocks(b">a>b>>c", parts, b"", b">", 99, 1) == [b">a", b">b", b">", b">c"]
    assert blocks(b">a>b>>c", parts, b"", b">", 3, None) == [b">a", b">b>", b">c"]
    assert blocks(b"a;>b;c;>d", parts, b";", b">", 1, None) == [b"a;", b">b;c;", b">d"]


@pytest.mark.parametrize("block", ["1", "7", "30k", "-3"])
@pytest.mark.parametrize("header", [[], ["--header", "2"]])
def test_parts_of_a_file(block: str, header: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    text = b"".join(b"line %d\n" % number for number in range(20_000 if block[-1] == "k" else 50))
    file.write_bytes(text)
    options, _ = parsed("--pipe-part", "--block", block, *header, "cat")
    parts = pipe.Parts(options, [str(file)], 2)
    found = [parts.data for _ in parts.records]
    top = b"line 0\nline 1\n" if header else b""
    assert all(part.startswith(top) and part.endswith(b"\n") for part in found)
    assert top + b"".join(part.removeprefix(top) for part in found) == text
    assert len(found) > (5 if block[0] == "-" else 6) - 1


def test_size() -> None:
    assert [pipe.size(text) for text in ("5", "2k", "2K", "1.5M", "-1")] == [
        *(5, 2000, 2048, 3 << 19, -1)
    ]


# -- output --


def test_lines_are_written_as_they_come(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [*MAP, "--line-buffer", "--tag", "--shell", f"echo a; printf b; cat {fifo}; : {{}}"]
    with subprocess.Popen([*command, ":::", "x"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"x\ta\n"
        fifo.write_bytes(b"c\n")
        assert process.stdout.read() == b"x\tbc\n"
    assert process.returncode == 0


def test_lines_in_order_as_they_come(tmp_path: Path) -> None:
    """The second command has ended before the first one writes its last line."""
    ended = tmp_path / "ended"
    script = (
        f"if [ {{}} = 1 ]; then echo 1; until [ -e {ended} ]; do sleep 0.01; done; echo 1;"
        f" else echo 2; echo e >&2; echo 2; touch {ended}; fi"
    )
    done = run("-k", "-j2", "--line-buffer", "--shell", script, ":::", "1", "2")
    assert (done.stdout, done.stderr) == (b"1\n1\n2\n2\n", b"e\n")


def test_results_of_names_that_are_none(tmp_path: Path) -> None:
    values = ["", ".", "..", "../../x", "a/b"]
    done = run("--results", "out", "echo", "<{}>", ":::", *values, cwd=tmp_path)
    assert (done.stdout, done.returncode) == (b"", 0)
    found = {path.read_text() for path in tmp_path.glob("out/1/*/stdout")}
    assert found == {f"<{value}>\n" for value in values}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_much_output_of_many_is_in_files(tmp_path: Path) -> None:
    script = "yes {} | head -c 2000000; echo {} >&2"
    done = run("-k", "--files", "--tmpdir", str(tmp_path), "--shell", script, ":::", "1", "2")
    assert done.stderr == b"1\n2\n"
    first, second = done.stdout.splitlines()
    assert Path(os.fsdecode(first)).read_bytes() == b"1\n" * 1_000_000
    assert Path(os.fsdecode(second)).read_bytes() == b"2\n" * 1_000_000


# -- by a daemon --


@pytest.mark.slow
@pytest.mark.parametrize("how", ["option", "environment"])
def test_daemon_runs_the_commands(how: str, tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        option = ["--socket", daemon.path] if how == "option" else []
        env = {**os.environ, "ERRAND_BOY_SOCKET": "/nonexistent" if option else daemon.path}
        done = run("-j2", *option, "--shell", "echo $PPID; : {}", ":::", *"abc", env=env)
        assert (done.stderr, done.returncode) == (b"", 0)
        helpers = {psutil.Process(int(pid)) for pid in done.stdout.split()}
        pid = daemon.process.pid
        assert all(pid in [parent.pid for parent in helper.parents()] for helper in helpers)
        # And ends them when this ends.
        command = [*MAP, *option, "--shell", f"echo $$ > {tmp_path}/pid; exec sleep 1000; : {{}}"]
        with subprocess.Popen([*command, ":::", "a"], env=env) as process:
            text = until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
            sleep = psutil.Process(int(text))
            process.kill()
        sleep.wait(PATIENCE)


def test_daemon_that_is_not_there() -> None:
    done = run("--socket", "/nonexistent/socket", "echo", ":::", "a")
    assert (done.stdout, done.returncode) == (b"", 125)
    assert b"no errand-boy daemon listens here" in done.stderr
    assert b"/nonexistent/socket" in done.stderr


# -- its page --


def test_page_names_options_that_there_are() -> None:
    """docs/map.md, the second column, and GNU parallel's of the same name."""
    page = Path(__file__).parent.parent / "docs" / "map.md"
    if not page.exists():
        pytest.skip("the tests run without the documentation")
    known = {
        option
        for action in cli_map.parser("errand-boy map")._actions
        for option in action.option_strings
    }
    rows = [row.split(" | ") for row in page.read_text().splitlines() if row.startswith("| `")]
    assert len(rows) > 60
    for _, ours, *_ in rows:
        named = {word.split()[0] for word in re.findall(r"`(-[^`]+)`", ours)}
        assert named <= known | {"-N"}, ours
