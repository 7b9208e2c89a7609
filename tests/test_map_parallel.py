"""Command lines as GNU parallel's users write them: `errand-boy map` writes what parallel writes.

docs/map.md has the table of options. A line of ours differs from parallel's in that a shell is
asked for, and is then given its command as one word.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import find_program, script_environment

pytestmark = pytest.mark.slow

LONGEST = 60  # seconds

# The line for parallel; the line for `map`, where that is not the same.
LINES: list[str | tuple[str, str]] = [
    # -- where arguments come from --
    "parallel -k echo ::: A B C",
    "parallel -k -a abc echo",
    "cat abc | parallel -k echo",
    "parallel -k echo ::: A B C ::: D E F",
    "parallel -k -a abc -a def echo",
    "cat abc | parallel -k -a - -a def echo",
    "cat abc | parallel -k echo :::: - def",
    "parallel -k echo ::: A B C :::: def",
    "parallel -k --link echo ::: A B C ::: D E F",
    "parallel -k --link echo ::: A B C D E ::: F G",
    "parallel -k --xapply echo {2}-{1} ::: A B ::: 1 2 3",
    "parallel -k echo :::: abc :::+ G H I :::: def",
    "parallel -k echo :::: abc ::: G H I ::::+ def",
    "parallel -k echo ::: A B C D E :::+ F G",
    "parallel -k --arg-sep ,, echo ,, A B C :::: def",
    "parallel -k --arg-file-sep // echo ::: A B C // def",
    "parallel -k -d _ echo :::: abc_",
    r"parallel -k -d '\0' echo :::: abc0",
    "parallel -k -0 echo :::: abc0",
    "parallel -k -E stop echo ::: A B stop C D",
    "(echo 1; echo; echo 2) | parallel -k echo x",
    "(echo 1; echo; echo 2) | parallel -k --no-run-if-empty echo x",
    "parallel -k echo </dev/null",
    "parallel -k echo ::: A B </dev/null",
    "parallel -k ::: ls 'echo foo' pwd",
    "printf 'echo a\\necho \"b  c\"\\n' | parallel -k",
    (
        "parallel -k ::: 'echo a | tr a b' 'exit 3'; echo $?",
        "map -k --shell ::: 'echo a | tr a b' 'exit 3'; echo $?",
    ),
    # -- replacement strings --
    "parallel -k echo {} ::: A/B.C",
    "parallel -k echo {.} ::: A/B.C A.B/C .C",
    "parallel -k echo {/} ::: A/B.C B",
    "parallel -k echo {//} ::: A/B.C B /C",
    "parallel -k echo {/.} ::: A/B.C",
    "parallel -k echo {#} ::: A B C",
    "parallel -k -j1 echo {%} ::: A B C",
    "parallel -k -I ,, echo ,, ::: A/B.C",
    "parallel -k --extensionreplace ,, echo ,, ::: A/B.C",
    "parallel -k --basenamereplace ,, echo ,, ::: A/B.C",
    "parallel -k --dirnamereplace ,, echo ,, ::: A/B.C",
    "parallel -k --basenameextensionreplace ,, echo ,, ::: A/B.C",
    "parallel -k --seqreplace ,, echo ,, ::: A B C",
    "parallel -k -j1 --slotreplace ,, echo ,, ::: A B C",
    "parallel -k echo {1} and {2} ::: A B ::: C D",
    "parallel -k echo /={1/} //={1//} /.={1/.} .={1.} ::: A/B.C D/E.F",
    "parallel -k echo 1={1} 2={2} -1={-1} -2={-2} ::: A B ::: C D",
    "parallel -k --colsep '\\t' echo 1={1} 2={2} :::: tsv",
    "parallel -k --colsep ' +' echo {2} {1} ::: 'a  b' 'c d'",
    "parallel -k --colsep , echo {} ::: a,b",
    "parallel -k --header : echo f1={f1} f2={f2} ::: f1 A B ::: f2 C D",
    "parallel -k --header : --colsep '\\t' echo f1={f1} f2={f2} :::: tsv-header",
    "parallel -k --plus echo {+/}/{/} {.}.{+.} ::: dir/sub/file.ex1.ex2.ex3",
    "parallel -k --plus echo {+/}/{/..}.{+..} {..}.{+..} ::: dir/sub/file.ex1.ex2.ex3 a/b.c",
    "parallel -k --plus echo {+/}/{/...}.{+...} {...}.{+...} ::: dir/sub/file.ex1.ex2.ex3",
    "parallel -k -q perl -e 'print \"@ARGV\\n\"' ::: This works",
    (
        "parallel -k echo {} '>' {.}.out ::: x.y; cat x.out",
        "map -k --shell 'echo {} > {.}.out' ::: x.y; cat x.out",
    ),
    (
        "parallel -k 'echo {} | wc -c' ::: \"it's\" '$HOME' 'a  b' '\"'",
        "map -k --shell 'echo {} | wc -c' ::: \"it's\" '$HOME' 'a  b' '\"'",
    ),
    (
        "parallel -k 'for i in 1 2; do echo {} $i; done' ::: 'a b' c",
        "map -k --shell 'for i in 1 2; do echo {} $i; done' ::: 'a b' c",
    ),
    # -- how many arguments --
    "parallel -j1 --xargs -s 10000 echo :::: num30000 | wc -l",
    "parallel -k --jobs 4 -m echo ::: 1 2 3 4 5 6 7 8 9 10",
    "parallel -k --jobs 4 -m echo pre-{}-post ::: A B C D E F G",
    "parallel -k --jobs 4 -X echo pre-{}-post ::: A B C D E F G",
    "parallel -k -N3 echo ::: A B C D E F G H",
    "parallel -k -N3 echo 1={1} 2={2} 3={3} ::: A B C D E F G H",
    "parallel -k -n2 echo pre-{}-post ::: A B C",
    "parallel -k -N0 echo foo ::: 1 2 3",
    "seq 5 | parallel -k -L2 echo",
    "parallel -k --trim r echo pre-{}-post ::: ' A '",
    "parallel -k --trim l echo pre-{}-post ::: ' A '",
    "parallel -k --trim lr echo pre-{}-post ::: ' A '",
    # -- output --
    "parallel -k --tag echo foo-{} ::: A B C",
    "parallel -k --tag -n2 echo ::: A B C",
    "parallel -k --tagstring {}-bar echo foo-{} ::: A B C",
    "parallel -k --tagstring '{#}:{/.}' echo ::: a/b.c d/e.f",
    "parallel -k -v echo {} ::: A B C",
    "parallel -k --dry-run echo {} ::: A B C",
    "parallel -j1 -t echo {} ::: A B C 2>&1 >/dev/null",
    (
        "parallel -j2 -k 'printf \"%s-start\\n%s\" {} {}; sleep 0.{}; echo -end' ::: 4 2 1",
        "map -j2 -k --shell 'printf \"%s-start\\n%s\" {} {}; sleep 0.{}; echo -end' ::: 4 2 1",
    ),
    (
        "parallel -j1 --line-buffer --tag 'echo a {}; echo b' ::: 1 2",
        "map -j1 --line-buffer --tag --shell 'echo a {}; echo b' ::: 1 2",
    ),
    (
        "parallel -j1 --ungroup 'echo a {}; echo b' ::: 1 2",
        "map -j1 --ungroup --shell 'echo a {}; echo b' ::: 1 2",
    ),
    "parallel -k --files echo ::: A B C | xargs cat",
    "parallel -k --tmpdir . --files echo ::: A B C | xargs cat",
    "parallel -k --results out echo ::: A B/C ::: D; cd out; find | sort; cat */*/*/*/*",
    "parallel -k --header : --results out echo ::: f1 A ::: f2 C D; find out | sort",
    "parallel -k --results 'out/{1}/{2}.txt' echo ::: A ::: C D; find out | sort",
    # -- blocks --
    "cat num30000 | parallel -k --pipe -N9000 wc",
    "seq 6 | parallel -k --pipe --block 4 wc",
    (
        "seq 6 | parallel -k --pipe --header : -N2 'echo {#}; cat'",
        "seq 6 | map -k --pipe --header : -N2 --shell 'echo {#}; cat'",
    ),
    (
        "cat header | parallel -k --pipe --header 2 -N3 'echo JOB{#};cat'",
        "cat header | map -k --pipe --header 2 -N3 --shell 'echo JOB{#};cat'",
    ),
    (
        "echo /foo, bar/, /baz, qux/, |"
        " parallel -kN1 --recend ', ' --pipe 'echo JOB{#};cat;echo END'",
        "echo /foo, bar/, /baz, qux/, |"
        " map -kN1 --recend ', ' --pipe --shell 'echo JOB{#};cat;echo END'",
    ),
    (
        "echo /foo, bar/, /baz, qux/, |"
        " parallel -kN1 --recstart / --pipe 'echo JOB{#};cat;echo END'",
        "echo /foo, bar/, /baz, qux/, |"
        " map -kN1 --recstart / --pipe --shell 'echo JOB{#};cat;echo END'",
    ),
    (
        "echo /foo, bar/, /baz, qux/, |"
        " parallel -kN1 --recend ', ' --recstart / --pipe 'echo JOB{#};cat;echo END'",
        "echo /foo, bar/, /baz, qux/, |"
        " map -kN1 --recend ', ' --recstart / --pipe --shell 'echo JOB{#};cat;echo END'",
    ),
    "parallel -k --pipepart -a num30000 --block 30k cat | cmp - num30000 && echo same",
    # -- how it ends --
    ("parallel exit ::: 1 2 3 0; echo $?", "map --shell exit ::: 1 2 3 0; echo $?"),
    ("seq 200 | parallel 'exit {}' 2>&1; echo $?", "seq 200 | map --shell 'exit {}'; echo $?"),
    (
        "parallel -j1 --joblog log exit ::: 1 2 0; cut -f1,7,8,9 log",
        "map -j1 --joblog log --shell exit ::: 1 2 0; cut -f1,7,8,9 log",
    ),
    (
        "parallel -j1 --joblog log exit ::: 1 2;"
        " parallel -j1 --resume --joblog log exit ::: 1 2 3 4; cut -f1,7 log",
        "map -j1 --joblog log --shell exit ::: 1 2;"
        " map -j1 --resume --joblog log --shell exit ::: 1 2 3 4; cut -f1,7 log",
    ),
    (
        "parallel -j1 --halt now,fail=1 'echo {}; exit {}' ::: 0 0 1 2 3; echo $?",
        "map -j1 --halt now,fail=1 --shell 'echo {}; exit {}' ::: 0 0 1 2 3; echo $?",
    ),
    (
        "parallel -j1 --halt soon,success=1 'echo {}; exit {}' ::: 1 2 0 3; echo $?",
        "map -j1 --halt soon,success=1 --shell 'echo {}; exit {}' ::: 1 2 0 3; echo $?",
    ),
    (
        "parallel --timeout 3 'sleep {}; echo {}' ::: 0 1000",
        "map --timeout 3 --shell 'sleep {}; echo {}' ::: 0 1000",
    ),
    # -- what it is used for --
    "parallel gzip --best ::: abc def; zcat abc.gz def.gz",
    "ls | sort | parallel -k -j1 --max-args 2 echo {1} {2}",
    "mkdir to; ls *c | parallel mv {} to; ls to",
    "find . -name 'num*' -print0 | parallel -0 -k wc -c",
    (
        "cut -c1 num30000 | parallel --pipe --block 20k 'sort -n | uniq -c' |"
        " awk '{a[$2] += $1} END {for (d in a) print d, a[d]}' | sort",
        "cut -c1 num30000 | map --pipe --block 20k --shell 'sort -n | uniq -c' |"
        " awk '{a[$2] += $1} END {for (d in a) print d, a[d]}' | sort",
    ),
    (
        "cat num30000 | parallel --pipe grep -c 7 | awk '{n += $1} END {print n}'",
        "cat num30000 | map --pipe grep -c 7 | awk '{n += $1} END {print n}'",
    ),
]

FILES = {
    "abc": "A\nB\nC\n",
    "def": "D\nE\nF\n",
    "abc_": "A_B_C_",
    "abc0": "A\0B\0C\0",
    "tsv": "A\tB\nC\tD\n",
    "tsv-header": "f1\tf2\nA\tB\nC\tD\n",
    "header": "%head1\n%head2\n" + "".join(f"{n}\n" for n in range(10)),
    "num30000": "".join(f"{n}\n" for n in range(1, 30001)),
}


def pair(line: str | tuple[str, str]) -> tuple[str, str]:
    return (line, line.replace("parallel", "map")) if isinstance(line, str) else line


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_program("parallel")
    folder = tmp_path_factory.mktemp("programs")
    program = folder / "map"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m errand_boy map "$@"\n')
    program.chmod(0o755)
    return folder


def run(line: str, folder: Path, programs: Path) -> bytes:
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    environment = {
        **script_environment(),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(programs),
        "LC_ALL": "C.UTF-8",
        "SHELL": "/bin/sh",
    }
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, timeout=LONGEST
    )
    # Their paths differ, and are of the same length.
    return done.stdout.replace(bytes(folder), b"FOLDER")


@pytest.mark.parametrize("theirs_and_ours", LINES, ids=lambda line: pair(line)[0][:60])
def test_same_as_parallel(
    theirs_and_ours: str | tuple[str, str], programs: Path, tmp_path: Path
) -> None:
    theirs, ours = pair(theirs_and_ours)
    expected = run(theirs, tmp_path / "their", programs)
    assert expected or "</dev/null" in theirs
    assert run(ours, tmp_path / "ours", programs) == expected


def test_enough_lines() -> None:
    assert len(LINES) >= 60
