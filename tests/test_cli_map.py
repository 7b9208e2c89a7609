"""``errand-boy map``, as a user at a shell sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, until

MAP = [sys.executable, "-m", "errand_boy", "map"]


def run(*arguments: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*MAP, *arguments], input=input, capture_output=True, timeout=50)


def lines(*values: object) -> bytes:
    return b"".join(b"%d\n" % v if isinstance(v, int) else f"{v}\n".encode() for v in values)


def log_rows(path: Path) -> list[list[str]]:
    title, *rows = path.read_text().splitlines()
    assert title.split("\t") == [
        *("Seq", "Host", "Starttime", "JobRuntime", "Send", "Receive", "Exitval", "Signal"),
        *("Command", "MaxRSS"),
    ]
    return [row.split("\t") for row in rows]


# -- the lines and the commands --


def test_results_as_json() -> None:
    script = 'printf "out\\377\\n"; echo err >&2; exit "$0"'
    done = run("-k", "--json", "sh", "-c", script, ":::", "0", "3")
    assert (done.returncode, done.stderr) == (1, b"")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(it["seq"], it["values"], it["returncode"], it["failed"]) for it in results] == [
        (1, ["0"], 0, False),
        (2, ["3"], 3, True),
    ]
    for it in results:
        assert it["args"] == ["sh", "-c", script, *it["values"]]
        assert (it["stdout"], it["stderr"], it["error"]) == ("out\ufffd\n", "err\n", None)
        assert it["duration"] >= 0


def test_failures_and_much_output_as_json() -> None:
    found = json.loads(run("--json", "/none", ":::", "1").stdout)
    assert (found["returncode"], found["error"]) == (127, "No such file or directory")
    done = run("--json", "seq", ":::", "300000")  # more than is kept in memory
    assert json.loads(done.stdout)["stdout"] == "".join(f"{n}\n" for n in range(1, 300001))
    done = run("--json", "--tag", "true", ":::", "1")
    assert done.returncode == 2
    assert b"--json can't be combined with --tag" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["{}", "a{}b{}"])
def test_same_as_xargs(place: str) -> None:
    input = b"".join(b"%d 'x\" \\y \xff\n" % n for n in range(100))
    by_xargs = subprocess.run(
        ["xargs", "-P4", "-d", "\n", "-I{}", "printf", r"%s\n", place],
        input=input,
        stdout=subprocess.PIPE,
        check=True,
    )
    done = run("-j4", "printf", r"%s\n", place, input=input)
    assert sorted(done.stdout.splitlines()) == sorted(by_xargs.stdout.splitlines())
    assert (done.stderr, done.returncode) == (b"", 0)
    ordered = run("-j4", "-k", "printf", r"%s\n", place, input=input)
    one_by_one = [place.encode().replace(b"{}", line) for line in input.splitlines()]
    assert ordered.stdout.splitlines() == one_by_one


def test_line_is_the_last_argument_without_a_place() -> None:
    assert run("-k", "echo", "x", input=b"1\n2").stdout == b"x 1\nx 2\n"
    assert run("-k", "--", "echo", "--", input=b"1\n\n2\n").stdout == b"-- 1\n-- \n-- 2\n"


def test_nul_ends_lines() -> None:
    assert run("-0", "-k", "echo", "x", input=b"1\n2\0003\0").stdout == b"x 1\n2\nx 3\n"


def test_shell_quotes_the_line() -> None:
    done = run("-k", "--shell", "echo {} | tr a-z A-Z; echo", "-{}", input=b"a 'b\n$HOME; exit\n")
    assert done.stdout == b"A 'B\n-a 'b\n$HOME; EXIT\n-$HOME; exit\n"


HOSTILE = ["; touch x", "$(touch x)", "`touch x`", "' ; touch x '", '" ; touch x "', "a  b", "a\nb"]


@pytest.mark.parametrize(
    "words",
    [
        ["printf '<%s>' {}"],
        ["printf '<%s>'", "{}"],
        ["printf '<%s>'"],
        ["printf '<x%sx>' {}"],
        ["printf '<%s>'", "x{}x"],
    ],
)
def test_line_is_one_word_of_a_shell(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("-0", "-k", "--shell", *words, input="\0".join(HOSTILE).encode())
    assert (done.stderr, done.returncode) == (b"", 0)
    form = "<x%sx>" if "x" in "".join(words) else "<%s>"
    assert done.stdout.decode() == "".join(form % line for line in HOSTILE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "cat <<E\n{}\nE",
        "echo '{}'",
        'echo "{}"',
        'echo "$(echo "{}")"',
        "# don't\necho '{}'",
    ],
)
def test_line_within_quotes_is_not_parsed_either(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("-0", "--shell", command, input="\0".join(HOSTILE).encode())
    assert (done.stderr, done.returncode) == (b"", 0)
    assert not list(tmp_path.iterdir())


def test_shell_quotes_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("--shell", "printf '<%s>'", "a b", "; touch x", "it's", '{}"', input=b"*\n")
    assert done.stdout == b"<a b><; touch x><it's><*\">"
    assert not list(tmp_path.iterdir())


def test_no_lines() -> None:
    done = run("echo")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


@pytest.mark.slow
def test_output_is_not_mixed() -> None:
    script = "for i in 1 2 3 4 5; do echo {}; echo {} >&2; sleep 0.01; done"
    done = run("-j8", "--shell", script, input=lines(*range(20)))
    for output in done.stdout, done.stderr:
        found = output.split()
        assert sorted(found[::5]) == sorted(b"%d" % n for n in range(20))
        assert all(found[n] == found[n // 5 * 5] for n in range(100))


def test_much_output_is_whole() -> None:
    done = run("-k", "--shell", "yes {} | head -c 3000000", input=b"1\n2\n")
    assert done.stdout == b"1\n" * 1_500_000 + b"2\n" * 1_500_000


def test_commands_run_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = run("-j2", "--shell", f"[ {{}} = 1 ] && cat {fifo} || echo x > {fifo}", input=b"1\n2\n")
    assert (done.stdout, done.returncode) == (b"x\n", 0)


def test_results_do_not_wait_for_more_lines() -> None:
    with subprocess.Popen(
        [*MAP, "-j2", "echo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in b"1\n", b"2\n":
            process.stdin.write(line)
            assert process.stdout.read(2) == line
        process.stdin.write(b"3")
        process.stdin.close()
        assert process.stdout.read() == b"3\n"
    assert process.returncode == 0


def test_lines_are_not_read_ahead_of_need() -> None:
    """The source is endless, and the reader takes only the first lines."""
    done = subprocess.run(
        ["/bin/sh", "-c", 'yes | "$@" | head -3', "sh", *MAP, "echo"],
        capture_output=True,
        timeout=50,
    )
    assert (done.stdout, done.stderr) == (b"y\n" * 3, b"")


# -- exit status --


@pytest.mark.slow
def test_exit_status_counts_failures() -> None:
    assert run("--shell", "exit {}", input=lines(0, 1, 2, 0)).returncode == 2
    assert run("--shell", "exit {}", input=lines(*[1] * 100)).returncode == 100
    assert run("--shell", "exit {}", input=lines(*[1] * 103)).returncode == 101
    assert run("--shell", "kill -{} $$", input=lines(9, 15)).returncode == 2


def test_command_that_does_not_exist() -> None:
    done = run("/nonexistent/program", input=b"1\n2\n")
    assert done.returncode == 2
    message = b"errand-boy: /nonexistent/program 1: No such file or directory"
    assert message in done.stderr.splitlines()


@pytest.mark.slow
def test_timeout() -> None:
    done = run("--timeout=3", "--shell", "echo {}; exec sleep {}", input=b"1000\n0\n")
    assert sorted(done.stdout.split()) == [b"0", b"1000"]
    assert done.stderr == b"errand-boy: echo 1000; exec sleep 1000: timed out\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-jx", "true"],
        ["-j+50%", "true"],
        ["--colsep=(", "true"],
        ["--pipe"],
        ["--halt=x", "true"],
        ["--halt=now,fail=101%", "true"],
        ["--resume", "true"],
        ["--timeout=x", "true"],
        ["--ungroup", "--limit=output=1K", "true"],
    ],
)
def test_bad_arguments(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert b"usage: errand-boy map" in done.stderr


def test_job_log_that_cannot_be_written() -> None:
    done = run("--joblog=/nonexistent/log", "echo", input=b"1\n")
    assert (done.stdout, done.returncode) == (b"", 125)
    assert b"/nonexistent/log" in done.stderr
    done = run("--joblog=/dev/full", "echo", input=b"1\n")
    assert done.returncode == 125


# -- the job log --


@pytest.mark.parametrize("how", [[], ["--line-buffer"], ["--files"]])
def test_job_log(how: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = time.time()
    script = "echo {}; sleep 0.0{}; [ {} != 2 ] || exit 7; [ {} != 3 ] || kill -9 $$"
    run("-j1", *how, f"--joblog={log}", "--shell", script, input=b"1\n2\n3\n")
    rows = log_rows(log)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[4:8] for row in rows] == [
        ["0", "2", "0", "0"],
        ["0", "2", "7", "0"],
        ["0", "2", "0", "9"],
    ]
    assert rows[0][8] == script.replace("{}", "1")
    assert all(before - 1 < float(row[2]) < time.time() for row in rows)
    assert all(int(row[0]) / 100 <= float(row[3]) < PATIENCE for row in rows)
    assert all(int(row[9]) > 500 for row in rows)


def test_job_log_has_the_command_on_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run("-0", f"--joblog={log}", "echo", "a b", input=b"c\nd\0")
    assert [row[8] for row in log_rows(log)] == [r"echo 'a b' 'c\nd'"]


@pytest.mark.slow
def test_resume(tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["-k", f"--joblog={log}", "--shell", "echo {}; exit 1"]
    assert run(*arguments, input=lines(1, 2, 3)).returncode == 3
    done = run("--resume", *arguments, input=lines(1, 2, 3, 4, 5))
    assert (done.stdout, done.returncode) == (b"4\n5\n", 2)
    assert sorted(row[0] for row in log_rows(log)) == ["1", "2", "3", "4", "5"]
    # Without --resume it begins anew.
    run(*arguments, input=lines(1))
    assert [row[0] for row in log_rows(log)] == ["1"]


def test_resume_after_a_line_was_cut(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run("-j1", f"--joblog={log}", "echo", input=lines(1, 2, 3))
    text = log.read_text()
    log.write_text(text[:-3])
    done = run("--resume", f"--joblog={log}", "echo", input=lines(1, 2, 3))
    assert done.stdout == b"3\n"
    assert [row[0] for row in log_rows(log)] == ["1", "2", "3"]


@pytest.mark.slow
def test_resume_after_a_kill(tmp_path: Path) -> None:
    log, ran = tmp_path / "log", tmp_path / "ran"
    arguments = ["-j2", f"--joblog={log}", "--shell", f"echo {{}} >> {ran}; sleep 0.02"]
    with subprocess.Popen([*MAP, *arguments], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(lines(*range(1, 41)))
        process.stdin.flush()
        until(lambda: log.exists() and log.read_text().count("\n") > 10)
        process.kill()
    before = {int(row[0]) for row in log_rows(log)}
    assert run("--resume", *arguments, input=lines(*range(1, 41))).returncode == 0
    assert sorted(int(row[0]) for row in log_rows(log)) == list(range(1, 41))
    # Those that were running are run again, and no others.
    numbers = [int(word) for word in ran.read_text().split()]
    assert set(numbers) == set(range(1, 41))
    assert all(numbers.count(number) == 1 for number in before)
    assert len(numbers) <= 42


# -- halting --


@pytest.mark.slow
def test_halt_soon_lets_the_others_end(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"if [ {{}} = 1 ]; then read x < {fifo}; echo 1; exit 3; fi"
    script += f"; echo > {fifo}; sleep 1; echo 3"
    done = run("-j2", "--halt=soon,fail=1", "--shell", script, input=lines(*[1, 3] * 10))
    assert (done.stdout, done.returncode) == (b"1\n3\n", 3)


def test_halt_now_ends_the_others(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"if [ {{}} = 1 ]; then echo $$ > {pid}; exec sleep 1000; fi"
    script += f"; until [ -s {pid} ]; do sleep 0.01; done; echo failed; kill -9 $$"
    done = run("-j2", "--halt=now,fail=1", "--shell", script, input=lines(*range(1, 10)))
    assert (done.stdout, done.returncode) == (b"failed\n", 128 + 9)
    ended = int(pid.read_text())
    until(lambda: not psutil.pid_exists(ended) or psutil.Process(ended).status() == "zombie")


@pytest.mark.parametrize(
    ("policy", "ran", "status"),
    [
        ("never", 20, 10),
        ("now,fail=3", 5, 1),
        ("soon,success=2", 4, 0),
        ("now,fail=50%", 3, 1),
        ("now,fail=60%", 3, 1),
        ("now,fail=100%", 20, 10),
    ],
)
def test_halt_policies(policy: str, ran: int, status: int) -> None:
    done = run("-j1", f"--halt={policy}", "--shell", "echo; exit {}", input=lines(*[1, 0] * 10))
    assert (done.stdout.count(b"\n"), done.returncode) == (ran, status)


def test_halt_notices_an_end_before_its_turn(tmp_path: Path) -> None:
    script = "[ {} = 1 ] && exec sleep 1000; echo {}; exit 5"
    done = run("-k", "-j2", "--halt=now,fail=1", "--shell", script, input=lines(1, 2))
    assert (done.stdout, done.returncode) == (b"2\n", 5)


# -- its own end --


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_its_end_ends_all(number: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = [*MAP, "-j3", "--shell", f"echo $$ >> {pids}; sleep 1000; : {{}}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(lines(1, 2, 3, 4))
        process.stdin.flush()
        until(lambda: pids.exists() and pids.read_text().count("\n") == 3)
        shells = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        sleeps = until(lambda: (found := [c for s in shells for c in s.children()])[2:] and found)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as the terminal does
        else:
            process.send_signal(number)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == -number
    assert not psutil.wait_procs([*shells, *sleeps], timeout=PATIENCE)[1]
