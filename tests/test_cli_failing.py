"""`errand-boy map` when commands fail, wait, are resumed or watched."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import pytest
from conftest import PATIENCE, find_program, until

from errand_boy import Result
from errand_boy._cli import throttle
from errand_boy._cli.report import Report
from errand_boy._map.progress import Tally

MAP = [sys.executable, "-m", "errand_boy", "map"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def run(*arguments: object, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    words = [str(argument) for argument in arguments]
    return subprocess.run([*MAP, *words], input=input, capture_output=True, timeout=2 * PATIENCE)


def rows(path: Path) -> list[list[str]]:
    title, *lines = path.read_text().splitlines()
    assert title.startswith("Seq\tHost\tStarttime\t")
    return [line.split("\t") for line in lines]


def counting(path: Path, succeeds_at: int) -> str:
    """A shell command that fails until it has been run several times; it takes an argument."""
    return f"echo x >> {path}; echo {{}}; [ $(wc -l < {path}) -ge {succeeds_at} ]"


# -- retries, time-outs, halting --


@pytest.mark.slow
def test_retries_are_runs_in_all_as_in_parallel(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run("--retries", 3, "--joblog", log, "--shell", counting(tmp_path / "x", 3), ":::", 1)
    assert (done.stdout, done.returncode) == (b"1\n", 0)
    assert [(row[0], row[6]) for row in rows(log)] == [("1", "0")]  # the last run only
    assert run("--retries", 2, "--shell", counting(tmp_path / "y", 3), ":::", 1).returncode == 1
    assert (tmp_path / "y").read_text() == "x\nx\n"
    assert run("--retries", 0, "--shell", counting(tmp_path / "z", 9), ":::", 1).returncode == 0


@pytest.mark.slow
def test_retry_delay(tmp_path: Path) -> None:
    before = time.monotonic()
    options = ("--retries", 3, "--retry-delay", "0.05s")
    assert run(*options, "--shell", counting(tmp_path / "x", 3), ":::", 1).returncode == 0
    assert time.monotonic() - before >= 0.05 + 0.1


@pytest.mark.slow
def test_timeout_of_a_share_of_the_median() -> None:
    done = run("-j2", "--timeout", "1000%", "sleep", ":::", 0.1, 0.1, 0.1, 1000)
    assert done.returncode == 1
    assert done.stderr == b"errand-boy: sleep 1000: timed out\n"


@pytest.mark.slow
def test_times_have_units() -> None:
    assert run("--timeout", "0.001m", "sleep", ":::", 1000).returncode == 1
    for wrong in ("x", "1w", "-1", "%"):
        done = run("--timeout", wrong, "true", ":::", 1)
        assert done.returncode == 2
        assert b"--timeout" in done.stderr


@pytest.mark.slow
def test_halt_done() -> None:
    assert run("-j1", "--halt", "soon,done=2", "echo", ":::", 1, 2, 3, 4).stdout == b"1\n2\n"
    share = run("-j1", "--halt", "now,done=50%", "echo", input=b"1\n2\n3\n4\n")
    assert share.stdout == b"1\n2\n"
    done = run("-j1", "--halt", "later,fail=1", "true", ":::", 1)
    assert done.returncode == 2
    assert b"halt=later,fail=1 is not" in done.stderr


@pytest.mark.slow
def test_halt_for_a_command_whose_output_outlives_it() -> None:
    script = "sleep 600 & echo $!"
    done = run("--halt", "now,fail=1", "--timeout", 3, "sh", "-c", script, ":::", 1)
    os.kill(int(done.stdout), signal.SIGKILL)
    assert (done.returncode, done.stderr.count(b"timed out")) == (1, 1)


def test_halt_counts_shares_of_all_if_their_number_is_known() -> None:
    codes = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    script = ["sh", "-c", "echo; exit {}"]
    known = run("-j1", "--halt", "soon,fail=40%", *script, ":::", *codes)
    assert known.stdout.count(b"\n") == 10
    lines = b"".join(b"%d\n" % code for code in codes)
    assert run("-j1", "--halt", "soon,fail=40%", *script, input=lines).stdout.count(b"\n") == 3


def test_dry_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run("--dry-run", "--joblog", log, "touch", "{}", "{#}", ":::", tmp_path / "a b")
    assert done.stdout == f"touch '{tmp_path}/a b' 1\n".encode()
    assert list(tmp_path.iterdir()) == []
    assert run("--dry-run", "echo", input=b"1\n2\n").stdout == b"echo 1\necho 2\n"


# -- waiting --


@pytest.mark.slow
def test_delay() -> None:
    before = time.monotonic()
    assert run("-j4", "--delay", "0.5", "true", ":::", 1, 2, 3, 4).returncode == 0
    assert time.monotonic() - before >= 1.5


@pytest.mark.slow
def test_memfree_and_load() -> None:
    fits = run("--memfree", "1k", "--memsuspend", "1k", "--load", "100000", "echo", ":::", 1, 2)
    assert sorted(fits.stdout.split()) == [b"1", b"2"]
    for wrong in (["--load", "x"], ["--load", "0"], ["--memfree", "x"]):
        assert run(*wrong, "true", ":::", 1).returncode == 2


def gate_of(monkeypatch: pytest.MonkeyPatch, **given: object) -> throttle.Gate:
    monkeypatch.setattr(throttle, "_INTERVAL", 1e-9)
    none = {"delay": 0.0, "load": None, "memfree": None, "memsuspend": None}
    return throttle.Gate(argparse.Namespace(**{**none, **given}))


def test_gate_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of(monkeypatch, memfree=1000)
    for free, is_open in ((999, False), (1000, True), (0, False)):
        monkeypatch.setattr(throttle, "available_memory", lambda free=free: free)
        assert (gate.closed_for(3) == 0) == is_open
    monkeypatch.undo()
    assert throttle.available_memory() > 1 << 20


def test_gate_for_load(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of(monkeypatch, load="4")
    monkeypatch.setattr(throttle, "runnable", lambda: 3)
    assert gate.closed_for(2) == 0
    monkeypatch.setattr(throttle, "_INTERVAL", 1000.0)  # and so it is not looked at again
    assert gate.closed_for(3) > 0  # the one that has been started makes four
    assert gate.closed_for(2) == 0
    monkeypatch.undo()
    assert throttle.runnable() >= 0


def test_gate_for_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of(monkeypatch, delay=1000.0)
    assert gate.closed_for(0) == 0
    gate.count_start()
    assert 900 < gate.closed_for(0) <= 1000


def test_commands_pause_while_memory_is_short(tmp_path: Path) -> None:
    """This replaces the kernel's figure, since a test must not use up the machine's memory."""
    source = f"""
        import sys
        from errand_boy._cli import args, throttle
        throttle._PAUSE = throttle._INTERVAL = 0.05
        free = {str(tmp_path / "free")!r}
        throttle.available_memory = lambda: int(open(free).read())
        sys.exit(args.main(["map", "-j2", "--memsuspend", "1k", "sh", "-c",
            "echo $$ > {tmp_path}/{{}}; read x < {tmp_path}/fifo{{}}; echo {{}}", ":::", "1", "2"]))
    """
    (tmp_path / "free").write_text("5000")
    for n in (1, 2):
        os.mkfifo(tmp_path / f"fifo{n}")
    code = "\n".join(line[8:] for line in source.splitlines())
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        pids = {n: int(until(partial(_text_of, tmp_path / n))) for n in ("1", "2")}

        def state(n: str) -> str:
            return Path(f"/proc/{pids[n]}/stat").read_text().rpartition(")")[2].split()[0]

        draft = tmp_path / "draft"
        draft.write_text("10")
        draft.rename(tmp_path / "free")
        until(lambda: "T" in (state("1"), state("2")))
        assert {state("1"), state("2")} != {"T"}  # the oldest goes on
        draft.write_text("5000")
        draft.rename(tmp_path / "free")
        until(lambda: "T" not in (state("1"), state("2")))
        for n in (1, 2):
            (tmp_path / f"fifo{n}").write_text("x\n")
        out, _ = process.communicate(timeout=PATIENCE)
    assert (sorted(out.split()), process.returncode) == ([b"1", b"2"], 0)


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_nice() -> None:
    assert run("--nice", 7, "sh", "-c", "nice; : {}", ":::", 1).stdout == b"7\n"


# -- the job log --


@pytest.mark.slow
def test_resume_failed_runs_what_failed_and_what_is_missing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = ["sh", "-c", "echo {}; exit {}"]
    assert run("-k", "--joblog", log, *script, ":::", 0, 3, 0).stdout == b"0\n3\n0\n"
    again = ("--joblog", log, "-k")
    assert run("--resume", *again, *script, ":::", 0, 3, 0, 4).stdout == b"4\n"
    succeeds = ["sh", "-c", "echo {}"]
    assert run("--resume-failed", *again, *succeeds, ":::", 0, 3, 0, 4, 5).stdout == b"3\n4\n5\n"
    assert run("--resume-failed", *again, *succeeds, ":::", 0, 3, 0, 4, 5).stdout == b""
    assert Counter(row[0] for row in rows(log)) == {"1": 1, "2": 2, "3": 1, "4": 2, "5": 1}
    assert run("--resume-failed", *succeeds, ":::", 1).returncode == 2  # of which log?


@pytest.mark.slow
def test_log_that_parallel_wrote(tmp_path: Path) -> None:
    parallel = find_program("parallel")
    log = tmp_path / "log"
    command = [parallel, "--will-cite", "--joblog", str(log), "exit", ":::", "0", "1"]
    environment = {**os.environ, "PARALLEL_HOME": str(tmp_path)}
    subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE)
    done = run("-k", "--joblog", log, "--resume-failed", "echo", ":::", "a", "b", "c")
    assert done.stdout == b"b\nc\n"


@pytest.mark.parametrize("digits", [11, 5000])
def test_log_with_an_absurd_number(tmp_path: Path, digits: int) -> None:
    log = tmp_path / "log"
    log.write_text(f"Seq\tHost\tStarttime\n{'9' * digits}\t:\t0\n")
    done = run("--joblog", log, "--resume", "true", ":::", 1)
    assert done.returncode == 125
    assert f"{digits} digits" in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_log_with_a_large_number_takes_no_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Seq\tHost\tStarttime\n8589934592\t:\t0\n")
    words = [*MAP, "--joblog", str(log), "--resume", "echo", ":::", "1"]
    few = ["prlimit", f"--as={600 << 20}"]
    done = subprocess.run([*few, *words], capture_output=True, timeout=PATIENCE)
    assert (done.stdout, done.returncode) == (b"1\n", 0)


@pytest.mark.parametrize("text", ["1\tmilk\n2\teggs\n", "dear diary\n", "no end of line"])
def test_file_that_is_no_log_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    done = run("--joblog", file, "--resume", "echo", ":::", 1)
    assert (done.stdout, done.returncode) == (b"", 125)
    assert b"not a job log" in done.stderr
    assert file.read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_and_resumed(seed: int, tmp_path: Path) -> None:
    """No logged command runs twice, and none is lost."""
    random = Random(seed)
    log, ran, count = tmp_path / "log", tmp_path / "ran", 400
    lines = b"".join(b"%d\n" % n for n in range(count))
    command = [*MAP, "-j4", "--joblog", str(log), "--resume", "sh", "-c", f"echo {{}} >> {ran}"]
    kills = 0
    while True:
        logged = {row[0] for row in rows(log)} if log.exists() and log.stat().st_size else set()
        before = Counter(ran.read_text().split() if ran.exists() else ())
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            process.stdin.write(lines)
            process.stdin.close()
            if kills < 6:
                wanted = len(logged) + random.randrange(1, 80)
                _await_rows(process, log, wanted)
                process.kill()
                kills += 1
            process.wait(2 * PATIENCE)
        # Commands that the helper still had to end must not write any more.
        until(lambda: not _users_of(ran))
        after = Counter(ran.read_text().split())
        for seq in logged:  # it was not run again
            assert after[str(int(seq) - 1)] == before[str(int(seq) - 1)]
        if process.returncode == 0:
            break
    assert Counter(row[0] for row in rows(log)) == Counter(map(str, range(1, count + 1)))
    assert after.keys() == set(map(str, range(count)))


def _await_rows(process: subprocess.Popen[bytes], log: Path, wanted: int) -> None:
    def there() -> bool:
        has_rows = log.exists() and log.stat().st_size > 0
        return process.poll() is not None or (has_rows and len(rows(log)) >= wanted)

    until(there)


def _users_of(path: Path) -> list[str]:
    """The running commands that have this path in their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"sh\0") and os.fsencode(path) in line:
            found.append(directory.name)
    return found


# -- looking on --


def on_terminal(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Return what a command line shows on a terminal."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    shown = bytearray()

    def collect() -> None:
        while True:
            try:
                data = os.read(master, 1 << 16)
            except OSError:
                return
            if not data:
                return
            shown.extend(data)

    command = [*MAP, *arguments]
    environment = {**os.environ, **(env or {})}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        thread = threading.Thread(target=collect)
        thread.start()
        process.wait(2 * PATIENCE)
    thread.join(PATIENCE)
    os.close(master)
    return shown.decode()


@pytest.fixture
def without_tqdm(tmp_path: Path) -> dict[str, str]:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "tqdm.py").write_text("raise ImportError\n")
    path = os.pathsep.join(filter(None, [str(blocked), os.environ.get("PYTHONPATH", os.getcwd())]))
    return {"PYTHONPATH": path}


def test_progress_without_tqdm(without_tqdm: dict[str, str]) -> None:
    script = ["sh", "-c", "echo out {}; exit {}"]
    shown = on_terminal("-j1", "--progress", *script, ":::", "0", "1", "0", env=without_tqdm)
    assert re.search(r"0/3 done, 0 failed", shown)
    assert re.search(r"3/3 done, 1 failed, [0-9.]+/s, ETA 0:00\r\n$", shown)
    for line in re.findall(r"[^\r\n]*out .", shown):  # each on a line of its own
        assert re.fullmatch(r"(\x1b\[K)?out .", line)


def test_progress_with_tqdm() -> None:
    pytest.importorskip("tqdm")
    shown = on_terminal("-j1", "--progress", "echo", "out", ":::", "0", "1", "0")
    assert "100%|" in shown
    assert "3/3 done, 0 failed" in shown
    assert not re.search(r"done[^\r\n]*out", shown)


@pytest.mark.slow
def test_eta_reads_all_before(without_tqdm: dict[str, str], tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("1\n2\n3\n4\n")
    shown = on_terminal("--eta", "true", "::::", str(names), env=without_tqdm)
    assert "0/4 done" in shown
    shown = on_terminal("--progress", "true", "::::", str(names), env=without_tqdm)
    assert "0 done" in shown
    assert "ETA" not in shown


def test_progress_is_silent_where_there_is_no_terminal() -> None:
    assert run("--progress", "true", ":::", 1).stderr == b""


def test_eta_follows_the_median() -> None:
    tally = Tally(10)
    assert "ETA" not in tally.text()
    tally._start -= 10
    for _ in range(4):
        tally.count(False, 5.0)  # two at a time
    assert tally.text() == "4/10 done, 0 failed, 0.4/s, ETA 0:15"
    tally.total = None
    assert "ETA" not in tally.text()


# -- the report --


def test_report(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    script = 'echo "<b>end of ${0}</b>" >&2; exit $0'
    run("-j2", "--html", report, "sh", "-c", script, ":::", 0, 0, 7, 0)
    text = report.read_text()
    assert "&lt;b&gt;end of 7&lt;/b&gt;" in text
    assert "exit 7" in text
    assert "end of 0" not in text  # the output of failures only
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)  # nothing from elsewhere
    found = re.search(r"bars=(\[.*\]);", text)
    assert found is not None
    bars = json.loads(found[1])
    assert [bar[4] for bar in sorted(bars, key=lambda bar: bar[4])] == [1, 2, 3, 4]
    assert {bar[2] for bar in bars} <= {1, 2}
    assert [bar[3] for bar in sorted(bars, key=lambda bar: bar[4])] == [0, 0, 1, 0]


def test_report_of_nothing_and_where_none_can_be_written(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert run("--html", report, "true", input=b"").returncode == 0
    assert "Commands" in report.read_text()
    done = run("--html", tmp_path / "absent" / "x", "echo", ":::", 1)
    assert (done.returncode, done.stdout) == (125, b"")  # it says so before, not after
    assert b"absent" in done.stderr


def big_report(path: Path, count: int) -> None:
    report, random = Report(str(path)), Random(1)
    for n in range(count):
        result = Result([b"convert", b"picture-%d.jpg" % n], int(random.random() < 0.02))
        result.stdout = result.stderr = b"some output\n" * 50
        result.duration = random.lognormvariate(-2, 0.7)
        result._begun = n // 8 * 0.15
        result.slot = n % 8 + 1
        report.add(n + 1, result)
    report.write()


@pytest.mark.slow
def test_many_commands_make_no_large_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    big_report(path, 100_000)
    assert path.stat().st_size < 4_000_000
    found = re.search(r"bars=(\[.*\]);", path.read_text())
    assert found is not None
    assert sum(bar[5] for bar in json.loads(found[1])) == 100_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_browser_draws_the_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    big_report(path, 10_000)
    assert CHROMIUM is not None
    # The page itself says how long that took. The time is for the docs; it is not asserted here.
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    process = subprocess.Popen(
        [CHROMIUM, *options, "--dump-dom", f"file://{path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=2 * PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert b'data-drawn="10000"' in out
    assert re.search(rb'data-took="[0-9]+"', out)
