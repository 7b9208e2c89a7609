"""Limits, and the verdict: each cause on each front, by resource limits and by a cgroup."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from conftest import has_ended, run_script, until

import errand_boy
import errand_boy.asyncio
from errand_boy._process import cgroups
from errand_boy._quantities import seconds, size

pytestmark = pytest.mark.slow

run, Popen = cast(Any, errand_boy.run), cast(Any, errand_boy.Popen)
REPEAT = int(os.environ.get("ERRAND_BOY_REPEAT", "3"))

LIMITS = {"wall": 30, "cpu": 30, "memory": "150M", "output": "100K", "processes": 10}
PYTHON = [sys.executable, "-I", "-S", "-c"]
# Bounded, should the limit not hold.
FORKS = "for i in $(seq 100); do sleep 1000 & done; wait"
CAUSES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "exit": (["true"], {}),
    "signal": (["sh", "-c", "kill -SEGV $$"], {}),
    "timeout": (["sleep", "1000"], {"wall": 0.2}),
    "cpu": (["sh", "-c", "while :; do :; done"], {"cpu": 0.5}),
    "memory": (["tail", "/dev/zero"], {}),
    "output": (["yes"], {}),
    "processes": (["sh", "-c", FORKS], {}),
}
BY = ["rlimits", "cgroup"]


@pytest.fixture(autouse=True)
def no_helper() -> Iterator[None]:
    yield
    errand_boy.stop()


def limits_of(cause: str) -> errand_boy.Limits:
    return cast(errand_boy.Limits, {**LIMITS, **CAUSES[cause][1]})


def need(by: str) -> None:
    if by == "cgroup" and cgroups.directory() is None:
        pytest.skip("no cgroup with controllers is delegated to this process")


def check(done: Any, cause: str) -> None:
    assert done.cause == cause, (done.cause, done.returncode, done.peak_memory, done.rusage)
    assert (done.returncode == 0) == (cause == "exit")
    assert done.duration > 0


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause(cause: str, by: str) -> None:
    """ERRAND_BOY_REPEAT sets how often."""
    need(by)
    for _ in range(REPEAT):
        done = run(CAUSES[cause][0], limits=limits_of(cause), limits_by=by, capture_output=True)
        check(done, cause)
        assert done.limits_by == by


@pytest.mark.parametrize("cause", CAUSES)
def test_each_front(cause: str, client: Any) -> None:
    command, limits = CAUSES[cause][0], limits_of(cause)

    async def by_asyncio() -> Any:
        return await errand_boy.asyncio.run(command, limits=limits, capture_output=True)

    check(asyncio.run(by_asyncio()), cause)
    check(next(errand_boy.map([command], limits=limits)), cause)
    check(next(errand_boy.map([cast(Any, {"args": command, "limits": limits})])), cause)
    check(client.run(command, limits=limits, capture_output=True), cause)
    check(next(client.map([command], limits=limits)), cause)
    celery = pytest.importorskip("errand_boy.celery")
    outcome = celery.run_command(command, limits=limits)
    check(SimpleNamespace(**outcome), cause)
    assert len(outcome["stdout"]) <= 100 << 10
    for front in Popen, client.Popen:
        with front(
            command, limits=limits, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            process.communicate()
        check(process, cause)


@pytest.mark.parametrize("name", ["gevent", "eventlet"])
def test_each_front_of_greenlets(name: str) -> None:
    pytest.importorskip(name)
    found = run_script(
        """
        ours = importlib.import_module(f"errand_boy.{sys.argv[2]}")
        found = []
        for command, limits in json.loads(sys.argv[3]):
            done = ours.run(command, limits=limits, capture_output=True)
            assert isinstance(done, ours.CompletedProcess)
            with ours.Popen(command, limits=limits, stdout=-1, stderr=-2) as process:
                output, _ = process.communicate()
            for each, size in (done, len(done.stdout)), (process, len(output)):
                assert each.duration > 0 and each.peak_memory > 0 and size <= 100 << 10
                found.append([each.cause, each.returncode == 0])
        report(found)
        """,
        args=[name, json.dumps([(CAUSES[cause][0], limits_of(cause)) for cause in CAUSES])],
    )
    assert found == [[cause, cause == "exit"] for cause in CAUSES for _ in range(2)]


@pytest.mark.parametrize("by", BY)
def test_output_is_kept_up_to_its_limit(by: str) -> None:
    need(by)
    script = "head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2; echo more; echo more >&2"
    for most, cause in (120_010, "exit"), (120_009, "output"):
        done = run(["sh", "-c", script], limits={"output": most}, limits_by=by, capture_output=True)
        assert done.cause == cause
        assert len(done.stdout) + len(done.stderr) == most
    done = run(["yes"], limits={"output": "1K"}, limits_by=by, capture_output=True, text=True)
    assert (done.cause, done.stdout) == ("output", "y\n" * 512)


def test_a_limit_of_output_that_nobody_reads_is_refused(client: Any, tmp_path: Path) -> None:
    pipe, null, limits = subprocess.PIPE, subprocess.DEVNULL, {"output": 10}
    command: Any = ["sh", "-c", "echo; echo >&2"]

    def by_asyncio(command: Any, **more: Any) -> Any:
        return asyncio.run(cast(Any, errand_boy.asyncio.run)(command, **more))

    with open(tmp_path / "file", "wb") as file, open(os.devnull, "wb") as opened:
        unread: list[dict[str, Any]] = [
            {},
            {"stdout": pipe},
            {"stderr": pipe},
            {"stderr": subprocess.STDOUT},
            {"stdout": null},
            {"stdout": pipe, "stderr": file},
            {"stdout": file, "stderr": subprocess.STDOUT},
        ]
        read: list[dict[str, Any]] = [
            {"stdout": pipe, "stderr": pipe},
            {"stdout": pipe, "stderr": subprocess.STDOUT},
            {"stdout": pipe, "stderr": null},
            {"stdout": opened, "stderr": pipe},
            {"stdout": null, "stderr": null},
        ]
        for front in run, client.run, by_asyncio:
            for more in unread:
                with pytest.raises(ValueError, match="output is counted where it is read"):
                    front(command, limits=limits, **more)
            for more in read:
                assert front(command, limits=limits, **more).cause == "exit"
        for maps in cast(Any, errand_boy.map), client.map:
            for more in unread:
                with pytest.raises(ValueError, match="output is counted where it is read"):
                    list(maps([command], limits=limits, capture_output=False, **more))
                one = {"args": command, "limits": limits}
                [result] = maps([one], capture_output=False, **more)
                assert isinstance(result.error, ValueError)
            for more in read:
                [result] = maps([command], limits=limits, **more)
                assert result.cause == "exit"
    with pytest.raises(ValueError, match="output can't be given for a job"):
        client.start(command, limits=limits)
    assert not (tmp_path / "file").stat().st_size


@pytest.mark.parametrize("by", BY)
def test_nothing_is_left_of_the_tree(by: str) -> None:
    need(by)
    session = "{ setsid sh -c 'sleep 1000 & echo $!; sleep 1000' & }"
    script = f"{session} | {{ read pid; sleep 1000 & echo $pid $!; "
    for more, cause in ("sleep 1000; }", "timeout"), ("exit 0; }", "exit"):
        command, limits = ["sh", "-c", script + more], {"wall": 5}
        done = run(command, limits=limits, limits_by=by, stdout=subprocess.PIPE)
        assert done.cause == cause
        pids = [int(word) for word in done.stdout.split()]
        assert len(pids) == 2
        assert not any(psutil.pid_exists(pid) for pid in pids)
    if by == "cgroup":
        assert not list(Path(str(cgroups.directory())).glob(f"errand-boy-{os.getpid()}-*"))


THREE = """
import subprocess, sys, time
all = [subprocess.Popen([sys.executable, "-ISc", {!r}], stdin=-1, stdout=-1) for _ in range(3)]
for each in all:
    each.stdout.readline()
time.sleep(0.5)  # between two polls, each has what it takes
for each in all:
    each.communicate(b"\\n")
"""


@pytest.mark.parametrize("by", BY)
def test_usage_is_the_trees(by: str) -> None:
    need(by)
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    memory = "a = b'x' * 30000000 + b'y'\nprint(flush=True)\ninput()"
    limits = {"cpu": 60, "memory": "1G"}
    done = run([*PYTHON, THREE.format(busy)], limits=limits, limits_by=by)
    assert done.rusage.ru_utime + done.rusage.ru_stime >= 0.9
    done = run([*PYTHON, THREE.format(memory)], limits=limits, limits_by=by)
    assert 90_000_000 < done.peak_memory < 1 << 30


def test_a_tree_is_counted_whole() -> None:
    """Each process uses less than the limit of CPU time, and ended processes count too."""
    busy = "import time\nwhile time.process_time() < 0.2: pass"
    script = f"while true; do {sys.executable} -ISc '{busy}'; done"
    done = run(["sh", "-c", script], limits={"cpu": 0.5, "wall": 60})
    assert done.cause == "cpu"


def test_limits_of_each_process(tmp_path: Path) -> None:
    script = f"ulimit -n; exec dd if=/dev/zero of={tmp_path}/file bs=64K"
    limits = {"file_size": "100K", "open_files": 55}
    done = run(["sh", "-c", script], limits=limits, capture_output=True)
    assert (done.cause, done.stdout) == ("output", b"55\n")
    done = run(["sh", "-c", "ulimit -n"], limits={"open_files": 55}, rlimits={"nofile": 44},
               capture_output=True)  # fmt: skip
    assert done.stdout == b"44\n"


def test_a_timeout_of_the_caller(client: Any) -> None:
    for function in run, client.run:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            function(
                ["sh", "-c", "echo so far; sleep 1000"],
                limits={"wall": 60},
                timeout=0.3,
                capture_output=True,
            )
        found = cast(Any, caught.value)
        assert (found.cause, found.output, found.limits_by) == ("timeout", b"so far\n", "rlimits")
        assert found.peak_memory > 0


def test_command_ended_by_its_caller() -> None:
    with Popen(["sleep", "1000"], limits={"wall": 60}) as process:
        process.kill()
    assert (process.cause, process.limits_by) == ("client", "rlimits")


def test_its_caller_ends() -> None:
    with Popen(["sh", "-c", "setsid sleep 1000 & echo $!; wait"], limits={"wall": 60},
               stdout=subprocess.PIPE) as process:  # fmt: skip
        pid = int(process.stdout.readline())
        process.kill()
    until(lambda: not psutil.pid_exists(pid), "the end of what it has started")


def test_bad_limits() -> None:
    bad: list[tuple[Any, str]] = [
        ({"walls": 1}, "limits: 'walls' is not one of wall, cpu"),
        ({"wall": 0}, "limits: wall: 0 is out of range"),
        ({"wall": "soon"}, "limits: wall: 'soon' is not a duration"),
        ({"memory": "1 gig"}, "limits: memory: '1 gig' is not a size"),
        ({"processes": 5000}, "limits: processes: 5000 is not from 1 to 4096"),
        ({"output": -1}, "limits: output: -1 is out of range"),
        ({"cpu": True}, "limits: cpu: True is not a duration"),
        ({"open_files": "many"}, "limits: open_files: 'many' is not an integer"),
    ]
    for given, words in bad:
        with pytest.raises(ValueError, match=words):
            run(["true"], limits=given)
        with pytest.raises(ValueError, match=words):
            list(errand_boy.map([["true"]], limits=given))
    no_mapping: Any = "1G"
    with pytest.raises(TypeError, match="limits: '1G' is not a dictionary such as "):
        run(["true"], limits=no_mapping)
    with pytest.raises(TypeError, match="limits: '1G' is not a dictionary such as "):
        next(errand_boy.map([["true"]], limits=no_mapping))
    with pytest.raises(ValueError, match="limits_by: 'luck' is neither"):
        run(["true"], limits={"wall": 1}, limits_by="luck")
    with pytest.raises(
        ValueError, match="limits count all that is started, so tree can't be 'group'"
    ):
        run(["true"], limits={"wall": 1}, tree="group")


def test_a_cgroup_that_is_required(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"limits": {"wall": 1}, "limits_by": "cgroup"}
    for function in (
        lambda: client.run(["true"], **given),
        lambda: list(errand_boy.map([["true"]], check=True, **given)),
    ):
        with pytest.raises(OSError, match="limits_by='cgroup': no cgroup can be had") as caught:
            function()
        assert caught.value.errno == errno.ENOTSUP
    monkeypatch.setattr(cgroups, "directory", lambda: None)
    with pytest.raises(OSError, match="limits_by='cgroup': no cgroup can be had here") as caught:
        run(["true"], limits={"wall": 1}, limits_by="cgroup")
    assert caught.value.errno == errno.ENOTSUP
    assert run(["true"], limits={"wall": 1}).limits_by == "rlimits"


def test_sizes() -> None:
    for text, number in (
        ("4096", 4096), ("64K", 65536), ("10M", 10 << 20), ("1.5G", 3 << 29), ("1 GiB", 1 << 30),
        ("2tb", 2 << 40), (77, 77),
    ):  # fmt: skip
        assert size(text) == number


def test_durations() -> None:
    for text, number in (
        ("90", 90), ("1.5s", 1.5), ("500ms", 0.5), ("2m", 120), (".5h", 1800), ("1d", 86400),
        (0.25, 0.25),
    ):  # fmt: skip
        assert seconds(text) == number
    for wrong in "", "-1", "1 week", "m", "1e3", "inf":
        with pytest.raises(ValueError, match="is not a duration such as 10,"):
            seconds(wrong)
    assert run(["sleep", "1000"], limits={"wall": "20ms"}).cause == "timeout"


def test_limits_hold_if_nobody_waits() -> None:
    """The supervisor ends a tree even if nobody waits for it."""
    process = Popen(["sleep", "1000"], limits={"wall": 0.2})
    until(lambda: has_ended(process.pid))
    begun = time.monotonic()
    process.wait()
    assert process.cause == "timeout"
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("terminal", [(), ("--pty",)])
def test_the_command_line_says_which_limit(terminal: tuple[str, ...]) -> None:
    for limit, script in ("wall=0.2", "sleep 1000"), ("memory=20M", "x=$(yes | head -c 200M)"):
        command = [sys.executable, "-m", "errand_boy", "run", *terminal, "--limit", limit]
        done = subprocess.run([*command, "--", "sh", "-c", script], capture_output=True, text=True)
        name = limit.partition("=")[0]
        assert done.stderr.endswith(f"errand-boy: sh: exceeded its limit {name}\n")


def test_on_the_command_line() -> None:
    command = [sys.executable, "-m", "errand_boy", "run", "--limit", "wall=0.2", "--limit"]
    command += ["memory=1G", "--stats=json", "--", "sleep", "1000"]
    done = subprocess.run(command, stderr=subprocess.PIPE)
    told = json.loads(done.stderr)
    assert (told["cause"], told["returncode"], told["args"]) == ("timeout", -9, ["sleep", "1000"])
    assert told["duration"] >= 0.2
    assert told["peak_memory"] > 0
    assert told["rusage"]["ru_utime"] >= 0
    assert done.returncode == 124
    for limit, code in (("wall=0.2", 124), ("cpu=0.2", 128 + 9)):
        script = f"exec {sys.executable} -m errand_boy run -t --limit {limit} -- "
        script += "sh -c 'while :; do :; done'"
        assert Popen(["sh", "-c", script], pty=True).wait() == code
        assert Popen(["sh", "-c", script.replace(" -t ", " ")]).wait() == code
    command = [*command[:4], "--stats", "--", "false"]
    done = subprocess.run(command, stderr=subprocess.PIPE)
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert lines[:3] == ["\tCommand: false", "\tCause of its end: exit", "\tExit status: 1"]
    command = [*command[:4], "--limit", "memory=lots", "--", "true"]
    done = subprocess.run(command, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert b"limits: memory: 'lots' is not a size" in done.stderr
