"""Many commands at once, by a private helper and by a daemon."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from conftest import (
    INTERRUPT,
    PATIENCE,
    PRELUDE,
    find_program,
    run_script,
    script_environment,
    started_script,
    until,
    with_enough_time,
)
from daemon import started_daemon

import errand_boy
import errand_boy.asyncio
from errand_boy import Result
from errand_boy._map import batch
from errand_boy._process import helper

Map = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_helper_left() -> Iterator[None]:
    yield
    errand_boy.stop()


@pytest.fixture(scope="module")
def daemon_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started_daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon.path
        errand_boy.connect(daemon.path).close()


@pytest.fixture(params=["helper", "daemon"])
def run_map(request: pytest.FixtureRequest, daemon_path: str) -> Map:
    """errand_boy.map, or the map of a daemon's client."""
    return errand_boy.map if request.param == "helper" else errand_boy.connect(daemon_path).map


def pids_in(path: Path, count: int) -> list[int]:
    """Wait until commands have written this many numbers to a file, and return them."""
    return [int(pid) for pid in until(lambda: complete_lines(path, count))]


def complete_lines(path: Path, count: int) -> list[str]:
    text = path.read_text() if path.exists() else ""
    return text.split() if text.count("\n") >= count else []


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


SLEEP = ["sleep", "1000"]


# -- results --


def test_results_are_as_by_run(run_map: Map) -> None:
    commands = [
        ["/bin/echo", "one"],
        shell("echo out; echo err >&2; exit 3"),
        shell("kill -9 $$"),
        shell("kill -TERM $$"),
        ["false"],
        ["sort"],
    ]
    results = list(run_map(commands))
    for result, command in zip(results, commands, strict=True):
        expected = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        assert vars(result).items() >= vars(expected).items()
        assert result.error is None
    assert [result.index for result in results] == list(range(6))


@pytest.mark.slow
def test_results_come_in_order(run_map: Map) -> None:
    commands = [shell(f"[ {n % 3} != 0 ] || sleep 0.1; echo {n}") for n in range(30)]
    results = run_map(commands, max_workers=8, text=True)
    assert [int(result.stdout) for result in results] == list(range(30))


def test_results_come_as_commands_end(run_map: Map, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    commands = [["cat", fifo], shell(f"echo > {fifo}")]
    results = run_map(commands, max_workers=2, ordered=False)
    # The first can't end before the second has begun; and it ends by that.
    assert {result.index for result in results} == {0, 1}
    commands = [["cat", fifo], ["true"], ["true"]]
    results = run_map(commands, max_workers=2, ordered=False)
    assert [next(results).index, next(results).index] == [1, 2]
    fifo.write_text("end")
    last = next(results)
    assert (last.index, last.stdout) == (0, b"end")


def test_rusage_duration_and_start(run_map: Map) -> None:
    before = time.time()
    [result] = run_map([shell("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")])
    assert isinstance(result.rusage, resource.struct_rusage)
    assert 0 < result.rusage.ru_utime + result.rusage.ru_stime <= result.duration * os.cpu_count()
    assert result.rusage.ru_maxrss > 500
    assert before - 1 < result.started < time.time()


def test_no_commands(run_map: Map) -> None:
    assert list(run_map([])) == []


def test_endless_generator_is_read_lazily(run_map: Map) -> None:
    given = 0

    def commands() -> Iterator[list[str]]:
        nonlocal given
        while True:
            given += 1
            yield ["true"]

    with closing(run_map(commands(), max_workers=3)) as results:
        for result in itertools.islice(results, 100):
            assert result.returncode == 0
        assert 100 <= given <= 100 + batch._LEAST_AHEAD


@pytest.mark.slow
def test_at_most_max_workers_live(run_map: Map, tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = f"echo + >> {log}; sleep 0.05; echo - >> {log}"
    list(run_map([shell(line)] * 20, max_workers=3))
    live = list(itertools.accumulate(1 if word == "+" else -1 for word in log.read_text().split()))
    assert max(live) <= 3
    assert len(live) == 40


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 16])
def test_at_most_max_workers_live_of_quick_commands(
    run_map: Map, workers: int, tmp_path: Path
) -> None:
    """Quick ones are requested ahead."""
    log = tmp_path / "log"
    results = list(run_map([shell(f"echo + >> {log}; echo - >> {log}")] * 300, max_workers=workers))
    live = list(itertools.accumulate(1 if word == "+" else -1 for word in log.read_text().split()))
    assert max(live) <= workers
    assert len(live) == 600
    assert {result.slot for result in results} <= set(range(1, workers + 1))


def test_quick_commands_and_those_with_options_of_their_own(run_map: Map, tmp_path: Path) -> None:
    log = tmp_path / "log"
    quick = shell(f"echo + >> {log}; echo - >> {log}")
    own = {"args": quick, "cwd": tmp_path, "timeout": PATIENCE}
    found = list(run_map([*[quick] * 50, own, ["/none"], *[quick] * 50, own], max_workers=2))
    assert [result.returncode for result in found] == [0] * 51 + [127] + [0] * 51
    live = list(itertools.accumulate(1 if word == "+" else -1 for word in log.read_text().split()))
    assert max(live) <= 2
    assert {result.slot for result in found} <= {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_begun_at_the_end(number: int, tmp_path: Path) -> None:
    """What has been requested ahead is not run when its map is closed, or its process killed."""
    log = tmp_path / "log"
    source = """
        quick = [["true"]] * 200
        slow = [["sh", "-c", f"echo $$ >> {sys.argv[2]}; exec sleep 1000"]] * 20
        with contextlib.suppress(KeyboardInterrupt):
            list(subprocess.map(quick + slow, max_workers=2))
        subprocess.stop()
    """
    with started_script("import contextlib\n" + textwrap.dedent(source), args=[log]) as process:
        found = [psutil.Process(pid) for pid in pids_in(log, 2)]
        found += psutil.Process(process.pid).children()
        process.send_signal(number)
        assert not psutil.wait_procs(found, timeout=PATIENCE)[1]
        assert len(log.read_text().split()) == 2


def test_result_is_public_but_costs_no_import() -> None:
    report = run_script(
        """
        loaded = [name for name in sys.modules if name.startswith("errand_boy._map")]
        [result] = subprocess.map([["true"]])
        report([loaded, isinstance(result, subprocess.Result), "Result" in subprocess.__all__])
        """
    )
    assert report == [[], True, True]


# -- options --


def test_standard_input(run_map: Map) -> None:
    assert [r.stdout for r in run_map([["cat"]])] == [b""]
    assert [r.stdout for r in run_map([["cat"]] * 3, input=b"all")] == [b"all"] * 3
    big = os.urandom(1 << 20)
    commands = [{"args": ["cat"], "input": big}, ["cat"], {"args": ["cat"], "input": b""}]
    results = list(run_map(commands * 3, max_workers=2))
    assert [r.stdout for r in results] == [big, b"", b""] * 3
    assert [r.args for r in results] == [["cat"]] * 9


def test_input_that_nobody_reads(run_map: Map) -> None:
    big = bytes(1 << 20)
    results = list(run_map([{"args": ["true"], "input": big}, ["echo", "x"]] * 5, max_workers=1))
    assert [r.returncode for r in results] == [0] * 10
    assert [r.stdout for r in results] == [b"", b"x\n"] * 5


def test_text(run_map: Map) -> None:
    command = [sys.executable, "-c", r"print(end='a\r\nb\rc\n\u00e9'); print(ascii(input()))"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    [result] = run_map([command], encoding="utf-8", input="\u00fc\n", env=env)
    assert result.stdout == "a\nb\nc\n\u00e9'\\xfc'\n"
    assert result.stderr == ""
    [result] = run_map([["printf", r"\351"]], encoding="utf-8", errors="replace")
    assert result.stdout == "\ufffd"


def test_output_that_is_no_text_is_told(run_map: Map) -> None:
    bad, good = run_map([["printf", r"x\351"], ["echo", "x"]], encoding="utf-8")
    assert isinstance(bad.error, UnicodeDecodeError)
    assert (bad.returncode, bad.stdout, good.stdout) == (125, "x\\xe9", "x\n")
    with pytest.raises(UnicodeDecodeError):
        bad.check_returncode()


def test_where_output_goes(run_map: Map, tmp_path: Path) -> None:
    both = [shell("echo out; echo err >&2")]
    [result] = run_map(both, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (result.stdout, result.stderr) == (b"out\nerr\n", None)
    [result] = run_map(both, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert (result.stdout, result.stderr) == (None, b"err\n")
    for named, out, err in ("stderr", b"out\n", None), ("stdout", None, b"err\n"):
        [result] = run_map(both, **{named: subprocess.DEVNULL})
        assert (result.stdout, result.stderr) == (out, err)
    [result] = run_map(both, stderr=subprocess.STDOUT)
    assert (result.stdout, result.stderr) == (b"out\nerr\n", None)
    [result] = run_map(both, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    assert (result.stdout, result.stderr) == (None, None)
    path = tmp_path / "file"
    with path.open("wb") as file:
        list(run_map(both * 3, stdout=file, stderr=subprocess.STDOUT, max_workers=1))
    assert path.read_text() == "out\nerr\n" * 3
    with path.open("wb") as file:
        list(run_map(both, stdout=file.fileno(), stderr=subprocess.DEVNULL))
    assert path.read_text() == "out\n"


def test_output_is_inherited_without_capture(run_map: Map, capfd: Any) -> None:
    [result] = run_map([shell("echo out; echo err >&2")], capture_output=False)
    assert (result.stdout, result.stderr) == (None, None)
    assert capfd.readouterr() == ("out\n", "err\n")


def test_options_of_all_and_of_one(run_map: Map, tmp_path: Path) -> None:
    find_program("ps", "procps")
    show = shell("pwd; umask; echo $VALUE; ps -o sid= -p $$")
    commands = [show, {"args": show, "cwd": "/", "env": {"VALUE": "2"}, "start_new_session": True}]
    first, second, third = run_map(
        [*commands, show], text=True, cwd=tmp_path, umask=0o27, env={**os.environ, "VALUE": "1"}
    )
    assert first.stdout.split()[:3] == [str(tmp_path), "0027", "1"]
    assert second.stdout.split()[:3] == ["/", "0027", "2"]
    # Not the session: a daemon's helpers have one each.
    assert third.stdout.split()[:3] == first.stdout.split()[:3]
    assert second.stdout.split()[3] not in (first.stdout.split()[3], third.stdout.split()[3])


def test_shell(run_map: Map) -> None:
    results = list(run_map(["echo $((1 + 1))", {"args": ["echo"], "shell": False}], shell=True))
    assert [r.stdout for r in results] == [b"2\n", b"\n"]
    assert results[0].args == "echo $((1 + 1))"


def test_words_of_every_kind(run_map: Map, tmp_path: Path) -> None:
    name = b"\xff\xfe"
    path = tmp_path / "script"
    path.write_text('#!/bin/sh\nprintf %s "$1"\n')
    path.chmod(0o755)
    commands = [
        ("printf", "%s", ""),
        ["printf", "%s", os.fsdecode(name)],
        [b"printf", b"%s", name],
        [path, "mixed"],
        path,
        "true",
        iter(["echo", "iterator"]),
    ]
    found = [result.stdout for result in run_map(commands)]
    assert found == [b"", name, name, b"mixed", b"", b"", b"iterator\n"]


@pytest.mark.parametrize(
    "options",
    [{"max_workers": 0}, {"max_output": -1}, {"bogus": 1}],
)
def test_bad_options_raise_at_once(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        errand_boy.map([["true"]], **options)


# -- failures --


def test_failing_start_is_a_result(run_map: Map, tmp_path: Path) -> None:
    not_executable = tmp_path / "file"
    not_executable.touch()
    commands: list[Any] = [
        ["/nonexistent"],
        ["nonexistent-program"],
        [not_executable],
        ["a\0b"],
        [],
        {"args": ["true"], "cwd": "/nonexistent-directory"},
        ["true", "x" * (1 << 20)],
        ["true", *["y" * 1000] * 20_000],
        ["true"],
    ]
    results = list(run_map(commands, max_workers=2))
    kinds = [type(result.error) for result in results]
    expected: list[type] = [FileNotFoundError, FileNotFoundError, PermissionError, ValueError]
    expected += [ValueError, FileNotFoundError, OSError, OSError, type(None)]
    assert kinds == expected
    assert [r.returncode for r in results] == [127, 127, 126, 126, 126, 127, 126, 126, 0]
    names = [getattr(result.error, "filename", None) for result in results]
    assert names[:3] == ["/nonexistent", "nonexistent-program", not_executable]
    assert names[5:8] == ["/nonexistent-directory", "true", "true"]
    assert results[6].error.errno == results[7].error.errno == errno.E2BIG
    assert all((r.stdout, r.stderr, r.rusage) == (b"", b"", None) for r in results[:8])


@pytest.mark.slow
def test_endless_failures_do_not_recurse() -> None:
    results = errand_boy.map(itertools.repeat(["a\0b"]), max_workers=1000)
    assert all(result.returncode == 126 for result in itertools.islice(results, 10_000))


def test_check_raises_at_the_first(run_map: Map) -> None:
    results = run_map([["true"], ["false"], ["true"]], check=True)
    assert next(results).returncode == 0
    with pytest.raises(subprocess.CalledProcessError) as caught:
        next(results)
    assert (caught.value.returncode, caught.value.cmd) == (1, ["false"])
    assert list(results) == []
    with pytest.raises(FileNotFoundError):
        list(run_map([["/nonexistent"]], check=True))


def test_exception_of_the_iterator_comes_in_its_place(run_map: Map) -> None:
    def commands() -> Iterator[list[str]]:
        yield ["echo", "one"]
        yield ["sleep", "0.1"]
        raise ZeroDivisionError

    results = run_map(commands(), max_workers=8)
    assert [next(results).stdout, next(results).stdout] == [b"one\n", b""]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


@pytest.mark.parametrize("command", [{"args": ["true"], "bogus": 1}, {"input": b""}, 1])
def test_what_is_no_command_raises(command: Any) -> None:
    results = errand_boy.map([["true"], command])
    assert next(results).returncode == 0
    with pytest.raises(TypeError):
        next(results)


def test_bad_common_option_raises(run_map: Map) -> None:
    with pytest.raises(ValueError, match="environment"):
        list(run_map([["true"]], env={"a=b": "c"}))


# -- time --


def written_before_the_timeout(run_map: Map, command: list[str], **options: Any) -> Result:
    """Return the result of a command that ends by its time-out, after it has written something."""

    def result(timeout: float) -> Result | None:
        [found] = run_map([command], timeout=timeout, **options)
        return found if found.stdout else None

    return with_enough_time(result)


@pytest.mark.slow
def test_timeout_has_what_was_written(run_map: Map) -> None:
    slow = shell("echo out; echo err >&2; exec sleep 1000")

    def results(timeout: float) -> list[Result] | None:
        found = list(run_map([{"args": slow, "timeout": timeout}, ["true"]]))
        return found if found[0].stderr else None

    first, second = with_enough_time(results)
    assert isinstance(first.error, subprocess.TimeoutExpired)
    assert (first.error.output, first.error.stderr) == (b"out\n", b"err\n")
    assert (first.returncode, first.stdout, first.stderr) == (-9, b"out\n", b"err\n")
    assert (second.returncode, second.error) == (0, None)


@pytest.mark.slow
def test_timeout_ends_the_whole_group(run_map: Map, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = shell(f"sleep 1000 & echo $! >> {pids}; echo out; wait")
    for options in {}, {"start_new_session": True}:  # type: dict[str, Any]
        result = written_before_the_timeout(run_map, command, **options)
        assert isinstance(result.error, subprocess.TimeoutExpired)
        assert (result.returncode, result.stdout) == (-9, b"out\n")
    found = []
    for pid in pids_in(pids, 2):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    assert not psutil.wait_procs(found, timeout=PATIENCE)[1]


def test_timeout_of_one_in_another_group() -> None:
    [result] = errand_boy.map([SLEEP], timeout=0.1, process_group=os.getpgrp())
    assert isinstance(result.error, subprocess.TimeoutExpired)
    assert result.returncode == -9


@pytest.mark.slow
def test_timeout_does_not_wait_for_the_end_of_output(run_map: Map, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"setsid sh -c 'echo $$ >> {pids}; exec sleep 1000' &"
    command = shell(f"{script} until test -s {pids}; do sleep 0.01; done; echo out; wait")
    result = written_before_the_timeout(run_map, command)
    assert isinstance(result.error, subprocess.TimeoutExpired)
    assert result.stdout == b"out\n"
    for pid in pids_in(pids, 1):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_timeout_of_output_that_outlives_its_command(run_map: Map, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = shell(f"sleep 1000 & echo $! >> {pids}; echo out; exit 3")

    def result(timeout: float) -> Result | None:
        [found] = run_map([command], timeout=timeout)
        return found if found.returncode == 3 else None

    found = with_enough_time(result)
    assert isinstance(found.error, subprocess.TimeoutExpired)
    assert found.stdout == b"out\n"
    os.kill(pids_in(pids, 1)[-1], signal.SIGKILL)


@pytest.mark.slow
def test_result_waits_for_the_end_of_output(run_map: Map) -> None:
    [result] = run_map([shell("(sleep 0.2; echo late) & echo early")])
    assert result.stdout == b"early\nlate\n"


@pytest.mark.slow
def test_timeouts_of_one(run_map: Map, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    commands = [{"args": SLEEP, "timeout": 0.1}, ["cat", fifo], {"args": SLEEP, "timeout": 0}]
    results = run_map(commands, max_workers=3, ordered=False)
    assert {(r.index, r.returncode) for r in itertools.islice(results, 2)} == {(0, -9), (2, -9)}
    fifo.write_text("end")
    assert [(r.index, r.returncode, r.stdout) for r in results] == [(1, 0, b"end")]


def test_timeout_that_poll_cannot_wait_for(run_map: Map) -> None:
    assert [r.error for r in run_map([["true"]], timeout=1e10)] == [None]


@pytest.mark.slow
def test_connections_are_reused_after_timeouts(run_map: Map) -> None:
    commands = [{"args": SLEEP, "timeout": 0.2}, ["echo", "x"]] * 5
    results = list(run_map(commands, max_workers=1))
    assert [r.stdout for r in results] == [b"", b"x\n"] * 5


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [None, 60])
def test_duration_is_without_the_wait_for_a_turn(tmp_path: Path, timeout: float | None) -> None:
    with started_daemon(tmp_path, "--max-processes=1") as daemon:
        client = errand_boy.connect(daemon.path)
        start = time.monotonic()
        results = list(client.map([["sleep", "0.1"]] * 3, max_workers=3, timeout=timeout))
        elapsed = time.monotonic() - start
    durations = [result.duration for result in results]
    assert min(durations) > 0
    assert sum(durations) <= elapsed  # one after another


@pytest.mark.slow
def test_time_in_a_daemons_queue_does_not_count(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-processes=1") as daemon:
        client = errand_boy.connect(daemon.path)
        results = list(client.map([["sleep", "0.4"]] * 10, max_workers=10, timeout=3))
        client.close()
    assert [(r.returncode, r.error) for r in results] == [(0, None)] * 10


# -- the size of output --


def test_much_output(run_map: Map) -> None:
    [result] = run_map([["head", "-c", "30000000", "/dev/zero"]])
    assert result.stdout == bytes(30_000_000)


def test_max_output_cuts(run_map: Map) -> None:
    commands = [["head", "-c", f"{n}", "/dev/zero"] for n in (100_000_000, 999, 1000, 1001)]
    results = list(run_map(commands, max_output=1000))
    assert [len(r.stdout) for r in results] == [1000, 999, 1000, 1000]
    assert [r.truncated for r in results] == [True, False, False, True]


def test_cut_text_ends_with_a_character(run_map: Map) -> None:
    [result] = run_map([["printf", r"\303\251\303\251"]], max_output=3, encoding="utf-8")
    assert (result.stdout, result.truncated, result.error) == ("\u00e9", True, None)


def test_spooled_output_is_whole(run_map: Map) -> None:
    commands = [shell("yes | head -c 3000000; echo err >&2"), ["echo", "short"]]
    first, second = run_map(commands, max_output=1000, spool=True)
    assert first.stdout == b"y\n" * 500
    assert first.stdout_file.read() == b"y\n" * 1_500_000
    assert (first.stderr, first.stderr_file, first.truncated) == (b"err\n", None, False)
    assert (second.stdout, second.stdout_file) == (b"short\n", None)
    first.stdout_file.close()


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    report = run_script(
        """
        command = ["head", "-c", "20000000", "/dev/zero"]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results = subprocess.map([command] * 20, max_output=1000, max_workers=4)
        sizes = [len(result.stdout) for result in results]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report([sizes, after - before])
        """
    )
    assert report[0] == [1000] * 20
    assert report[1] < 10_000  # KiB


# -- ending early --


@pytest.mark.slow
def test_closing_ends_what_runs(run_map: Map, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # A shell with a child, a command that ignores SIGTERM, and one that is stopped.
    commands = [
        shell(f"sleep 1000 & echo $! >> {pids}; echo $$ >> {pids}; wait"),
        shell(f"trap '' TERM; echo $$ >> {pids}; while :; do sleep 1000; done"),
        shell(f"echo $$ >> {pids}; kill -STOP $$"),
        ["true"],
    ]
    results = run_map(commands, ordered=False)
    assert next(results).index == 3
    found = [psutil.Process(pid) for pid in pids_in(pids, 4)]
    results.close()
    assert not psutil.wait_procs(found, timeout=PATIENCE)[1]


@pytest.mark.slow
def test_killing_the_caller_ends_what_runs(tmp_path: Path) -> None:
    """This includes commands that ignore SIGTERM, though the helper has no client left."""
    pids = tmp_path / "pids"
    source = """
        pids = sys.argv[2]
        commands = [
            f"trap '' TERM; echo $$ >> {pids}; while :; do sleep 1000; done",
            f"sleep 1000 & echo $! >> {pids}; echo $$ >> {pids}; wait",
        ]
        list(subprocess.map(commands, shell=True))
    """
    with started_script(source, args=[pids]) as process:
        found = [psutil.Process(pid) for pid in pids_in(pids, 3)]
        found += [child for child in psutil.Process(process.pid).children()]
        process.kill()
        assert not psutil.wait_procs(found, timeout=PATIENCE)[1]


@pytest.mark.parametrize("options", [{}, {"capture_output": False}, {"input": b"x"}])
def test_forgetting_the_iterator_ends_what_runs(options: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    results = errand_boy.map(
        [["true"], shell(f"echo $$ >> {pids}; exec sleep 1000")], ordered=False, **options
    )
    assert next(results).index == 0
    found = [psutil.Process(pid) for pid in pids_in(pids, 1)]
    del results
    assert not psutil.wait_procs(found, timeout=PATIENCE)[1]


def test_connections_are_reused(run_map: Map, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    # All four at the same time, each over its own connection.
    wait = f"until [ -e {tmp_path}/3 ]; do sleep 0.01; done"
    list(run_map([shell(f"touch {tmp_path}/{n}; {wait}") for n in range(4)], max_workers=4))
    before = descriptors()
    for _ in range(5):
        list(run_map([["true"]] * 20, max_workers=4))
        list(run_map([["/nonexistent"]] * 20, max_workers=4))
        results = run_map([["true"], *[SLEEP] * 3], max_workers=4)
        next(results)
        results.close()
    assert descriptors() <= before + batch._AHEAD  # those of requests that wait for a place


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_end_of_the_process_ends_what_runs(number: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    source = """
        command = ["sh", "-c", f"echo $$ >> {sys.argv[2]}; sleep 1000; :"]
        for result in subprocess.map([command] * 3):
            pass
    """
    with started_script(source, args=[pids]) as process:
        found = [psutil.Process(pid) for pid in pids_in(pids, 3)]
        children = [child for one in found for child in one.children()]
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -number
        assert not psutil.wait_procs([*found, *children], timeout=PATIENCE)[1]


# -- the helper --


def owner_pid() -> int:
    assert helper.runner.current is not None
    return helper.runner.current.pid


def test_helper_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def commands() -> Iterator[list[str]]:
        for n in range(6):
            yield shell(f"echo {n} >> {log}; exec sleep 1000")
        for n in range(6, 20):
            yield shell(f"echo {n} >> {log}")

    results = errand_boy.map(commands(), max_workers=6)

    def kill() -> None:
        complete(log, 6)
        os.kill(owner_pid(), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = list(results)
    killer.join()
    assert [type(r.error) for r in found[:6]] == [errand_boy.HelperDiedError] * 6
    assert [r.returncode for r in found] == [-9] * 6 + [0] * 14
    # None was run twice.
    assert sorted(map(int, log.read_text().split())) == list(range(20))
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if (process.info["cmdline"], process.info["ppid"]) == (SLEEP, os.getpid()):
            process.kill()


def complete(path: Path, count: int) -> None:
    until(lambda: complete_lines(path, count))


def test_helper_killed_between_maps_is_not_noticed() -> None:
    assert [r.returncode for r in errand_boy.map([["true"]] * 8, max_workers=8)] == [0] * 8
    os.kill(owner_pid(), signal.SIGKILL)
    assert [r.returncode for r in errand_boy.map([["true"]] * 8, max_workers=8)] == [0] * 8


@pytest.mark.slow
def test_helper_killed_between_results(tmp_path: Path) -> None:
    killed = set()
    for result in errand_boy.map([["true"]] * 300, max_workers=4):
        assert result.error is None or isinstance(result.error, errand_boy.HelperDiedError)
        if result.index % 100 == 0:
            killed.add(owner_pid())
            os.kill(owner_pid(), signal.SIGKILL)
    assert len(killed) == 3


@pytest.mark.slow
def test_helper_that_was_stopped_never_runs_a_command_twice(tmp_path: Path) -> None:
    """Requests that a killed helper had not read go to another one."""
    log = tmp_path / "log"
    errand_boy.map([])
    list(errand_boy.map([["true"]] * 4, max_workers=4))
    pid = owner_pid()
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, [pid, signal.SIGKILL])
    killer.start()
    commands = [shell(f"echo {n} >> {log}") for n in range(10)]
    found = list(errand_boy.map(commands, max_workers=4))
    killer.join()
    assert [r.error for r in found] == [None] * 10
    assert sorted(map(int, log.read_text().split())) == list(range(10))


@pytest.mark.slow
def test_helpers_killed_at_random(tmp_path: Path) -> None:
    """Whatever the result says, no command ran twice."""
    log = tmp_path / "log"
    over = threading.Event()
    random = Random(7)

    def commands() -> Iterator[Any]:
        for n in range(600):
            yield {"args": shell(f"cat > {os.devnull}; echo {n} >> {log}"), "input": bytes(n * 200)}

    def kill() -> None:
        while not over.wait(random.random() / 20):
            current = helper.runner.current
            if current is not None:
                with suppress(ProcessLookupError):
                    os.kill(current.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = list(errand_boy.map(commands(), max_workers=6))
    over.set()
    killer.join()
    assert [result.index for result in found] == list(range(600))
    runs = Counter(map(int, log.read_text().split()))
    assert not [n for n, count in runs.items() if count > 1]
    for result in found:
        if result.error is None:
            assert (result.returncode, runs[result.index]) == (0, 1)
        else:
            assert isinstance(result.error, errand_boy.HelperDiedError)


def test_stop_in_the_middle() -> None:
    results = errand_boy.map([["echo", str(n)] for n in range(200)], max_workers=4)
    found = []
    for result in results:
        found.append(int(result.stdout))
        if result.index == 50:
            errand_boy.stop()
    assert found == list(range(200))


# -- processes and threads --


def test_fork_in_the_middle(run_map: Map) -> None:
    results = run_map([["echo", str(n)] for n in range(50)], max_workers=4)
    assert next(results).stdout == b"0\n"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            next(results)
        except ChildProcessError:
            again = [r.stdout for r in run_map([["echo", "x"]] * 10)]
            status = 0 if again == [b"x\n"] * 10 else 2
        finally:
            errand_boy.stop()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert [int(result.stdout) for result in results] == list(range(1, 50))


@pytest.mark.slow
def test_dropped_by_a_fork(run_map: Map) -> None:
    results = run_map([["sh", "-c", f"sleep 0.2; echo {n}"] for n in range(4)], max_workers=2)
    assert next(results).stdout == b"0\n"
    pid = os.fork()
    if pid == 0:
        del results
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert [(r.stdout, r.error) for r in results] == [(b"%d\n" % n, None) for n in (1, 2, 3)]


@pytest.mark.slow
def test_threads_with_maps_of_their_own(run_map: Map) -> None:
    found: dict[int, list[bytes]] = {}

    def work(number: int) -> None:
        for _ in range(3):
            results = run_map([["echo", f"{number} {n}"] for n in range(40)], max_workers=4)
            found[number] = [result.stdout for result in results]

    threads = [threading.Thread(target=work, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [f"{k} {n}\n".encode() for n in range(40)] for k in range(6)}


def test_maps_in_maps_and_commands_that_take_commands(run_map: Map) -> None:
    def commands() -> Iterator[list[str]]:
        for n in range(10):
            value = errand_boy.check_output(["echo", str(n)], text=True).strip()
            [inner] = run_map([["echo", value]], text=True)
            yield ["echo", inner.stdout.strip()]

    for result in run_map(commands(), text=True, max_workers=3):
        again = [r.stdout for r in run_map([["echo", result.stdout.strip()]] * 3, text=True)]
        assert again == [f"{result.index}\n"] * 3


@pytest.mark.root
@pytest.mark.parametrize("what", ["os.seteuid(65534)", "os.setegid(65534)", "os.setgroups([7])"])
def test_ids_go_for_the_next_command(what: str) -> None:
    report = run_script(
        f"""
        show = ["grep", "-E", "^(Uid|Gid|Groups)", "/proc/self/status"]
        given, found = 0, {{}}
        def commands():
            global given
            for given in range(1, 41):
                yield show
        for result in subprocess.map(commands(), max_workers=2, ordered=False, text=True):
            found[result.index] = result.stdout.split()
            if len(found) == 10:
                before = list(found.values())
                {what}
                started = given
        after = [found[index] for index in range(started, 40)]
        report([before, after, subprocess.check_output(show, text=True).split()])
        """
    )
    before, after, expected = report
    assert len(after) > 20
    assert all(ids == expected for ids in after)
    assert all(ids != expected for ids in before)


@pytest.mark.slow
def test_descriptors_run_short() -> None:
    report = run_script(
        """
        list(subprocess.map([["true"]]))
        limit = len(os.listdir("/proc/self/fd")) + 4
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        results = subprocess.map([["echo", str(n)] for n in range(50)], max_workers=30)
        report([result.stdout.decode().strip() for result in results])
        """
    )
    assert report == [str(n) for n in range(50)]


@pytest.mark.slow
def test_many_workers(run_map: Map) -> None:
    results = run_map([["echo", str(n)] for n in range(600)], max_workers=200)
    assert [int(result.stdout) for result in results] == list(range(600))


@pytest.mark.slow
def test_eventlet_has_no_poll() -> None:
    pytest.importorskip("eventlet")
    report = run_script(
        """
        warnings.simplefilter("ignore")
        import eventlet
        eventlet.monkey_patch()
        ticks = []
        def tick():
            while True:
                ticks.append(None)
                eventlet.sleep(0.01)
        ticker = eventlet.spawn(tick)
        results = list(subprocess.map([["sleep", "0.2"]] * 4, max_workers=2))
        ticker.kill()
        report([[result.returncode for result in results], len(ticks)])
        """
    )
    assert report[0] == [0] * 4
    assert report[1] > 4  # others ran meanwhile


@pytest.mark.slow
def test_gevent_runs_others_meanwhile() -> None:
    pytest.importorskip("gevent")
    report = run_script(
        """
        from gevent import monkey
        monkey.patch_all()
        import gevent
        ticks = []
        def tick():
            while True:
                ticks.append(None)
                gevent.sleep(0.01)
        ticker = gevent.spawn(tick)
        results = list(subprocess.map([["sleep", "0.2"]] * 4, max_workers=2))
        ticker.kill()
        report([[result.returncode for result in results], len(ticks)])
        """
    )
    assert report[0] == [0] * 4
    assert report[1] > 4


# -- progress --


def test_no_progress_bar_where_there_is_no_terminal(capfd: Any) -> None:
    results: list[Result] = list(errand_boy.map([["true"]] * 3, progress=True))
    assert len(results) == 3
    assert capfd.readouterr().err == ""


IN_ORDER = """
        results = subprocess.map([["true"]] * 3, progress=True)
        next(results)
        results.close()
        report(len(list(subprocess.map([["true"]] * 3, progress=True))))
"""
BY_ASYNCIO = """
        import asyncio, errand_boy.asyncio
        async def main():
            commands = [["true"]] * 3
            results = errand_boy.asyncio.map(commands, progress=True)
            await results.__anext__()
            await results.aclose()
            return len([done async for done in errand_boy.asyncio.map(commands, progress=True)])
        report(asyncio.run(main()))
"""


@pytest.mark.parametrize("source", [IN_ORDER, BY_ASYNCIO], ids=["map", "asyncio"])
def test_progress_bar_on_a_terminal(source: str) -> None:
    pytest.importorskip("tqdm")
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with started_script(source, stderr=slave) as process:
        os.close(slave)
        out, _ = process.communicate(timeout=PATIENCE)
    assert out == "3\n"
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while True:
            shown += os.read(master, 1 << 16)
    os.close(master)
    assert b"0/3" in shown
    assert b"3/3" in shown


# -- the daemon of the environment, and asyncio --


@pytest.mark.slow
def test_daemon_of_the_environment(tmp_path: Path) -> None:
    source = """
        [result] = subprocess.map([["sh", "-c", "echo $PPID"]], text=True)
        report([int(result.stdout), os.getpid()])
    """
    with started_daemon(tmp_path) as daemon:
        env = {**script_environment(), "ERRAND_BOY_SOCKET": daemon.path}
        process = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(source), "errand_boy"],
            env=env,
            stdout=subprocess.PIPE,
            check=True,
        )
        parent, _ = json.loads(process.stdout)
        assert parent in daemon.helpers()


@pytest.fixture(params=["asyncio", "uvloop"])
def run_async(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    if request.param == "asyncio":
        return asyncio.run
    uvloop = pytest.importorskip("uvloop")

    def run(main: Any) -> Any:
        loop = uvloop.new_event_loop()
        try:
            return loop.run_until_complete(main)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return run


@pytest.fixture(params=["helper", "daemon"])
def async_map(request: pytest.FixtureRequest, daemon_path: str) -> Map:
    if request.param == "helper":
        return errand_boy.asyncio.map
    return errand_boy.asyncio.connect(daemon_path).map


def test_async_results(run_async: Callable[[Any], Any], async_map: Map) -> None:
    async def main() -> list[Any]:
        commands = [["echo", str(n)] for n in range(100)]
        big = os.urandom(1 << 20)
        commands += [{"args": ["cat"], "input": big}, ["false"]]  # type: ignore[list-item]
        found = [result async for result in async_map(commands, max_workers=4)]
        assert found[100].stdout == big
        return [*(int(result.stdout) for result in found[:100]), found[101].returncode]

    assert run_async(main()) == [*range(100), 1]


def test_async_runs_beside_others(run_async: Callable[[Any], Any], async_map: Map) -> None:
    async def one(number: int) -> list[bytes]:
        return [r.stdout async for r in async_map([["echo", str(number)]] * 20, max_workers=3)]

    async def main() -> Any:
        return await asyncio.gather(*map(one, range(5)))

    assert run_async(main()) == [[b"%d\n" % n] * 20 for n in range(5)]


@pytest.mark.slow
def test_async_timeout_and_failures(run_async: Callable[[Any], Any], async_map: Map) -> None:
    async def main() -> None:
        slow = shell("echo out; exec sleep 1000")
        for timeout in 0.3, PATIENCE / 2:  # the first may be too short, at high load
            commands = [{"args": slow, "timeout": timeout}, ["/nonexistent"], ["true"]]
            first, second, third = [r async for r in async_map(commands)]
            if first.stdout:
                break
        assert isinstance(first.error, subprocess.TimeoutExpired)
        assert (first.stdout, second.returncode, third.returncode) == (b"out\n", 127, 0)
        with pytest.raises(subprocess.CalledProcessError):
            async for _ in async_map([["false"]], check=True):
                pass

    run_async(main())


def test_async_closing_ends_what_runs(
    run_async: Callable[[Any], Any], async_map: Map, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"

    async def main() -> list[psutil.Process]:
        commands = [["true"], *[shell(f"echo $$ >> {pids}; exec sleep 1000")] * 2]
        results = async_map(commands, ordered=False)
        assert (await anext(results)).index == 0
        found = [psutil.Process(pid) for pid in pids_in(pids, 2)]
        waiter = asyncio.ensure_future(anext(results))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await results.aclose()
        return found

    assert not psutil.wait_procs(run_async(main()), timeout=PATIENCE)[1]


def test_async_helper_killed(run_async: Callable[[Any], Any], tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def main() -> list[Result]:
        commands = [["true"], *[shell(f"echo $$ >> {pids}; exec sleep 1000")] * 2]
        results = errand_boy.asyncio.map(commands, ordered=False, max_workers=3)
        found = [await anext(results)]
        pids_in(pids, 2)
        os.kill(owner_pid(), signal.SIGKILL)
        found += [result async for result in results]
        again = [result.stdout async for result in errand_boy.asyncio.map([["echo", "x"]] * 4)]
        assert again == [b"x\n"] * 4
        return found

    found = run_async(main())
    for pid in pids_in(pids, 2):
        os.kill(pid, signal.SIGKILL)
    errors = {result.index: type(result.error) for result in found}
    died = errand_boy.HelperDiedError
    assert errors == {0: type(None), 1: died, 2: died}


def test_map_that_is_interrupted_anywhere_raises_that_exception() -> None:
    source = f"""{INTERRUPT}
interrupted, codes = 0, []
for count in range(1, 200):
    interrupt(count)
    try:
        codes = [each.returncode for each in subprocess.map([["true"]] * 2, max_workers=2)]
    except Interrupt:
        interrupted += 1
    finally:
        sys.settrace(None)
report([interrupted > 50, codes])
"""
    assert run_script(source) == [True, [0, 0]]
