"""How commands are ended: `stop`, `tree`, `drain` and `dies_with_caller`, on every front."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest
from conftest import INTERRUPT, find_program, run_script, started_script, until
from daemon import started_daemon

import errand_boy
from errand_boy._options import ends
from errand_boy._process import helper as _helper

ours: Any = errand_boy  # subprocess's own types know no other options

# Ignores SIGTERM, keeps its output, and has a descendant that forked twice and left the session.
ESCAPES = """
trap "" TERM
echo out
(setsid sh -c 'sleep 1000 & exec sleep 1000' &)
while :; do sleep 1000; done
"""
STEPS = ((SIGTERM, 0.1), SIGKILL)


class Marked:
    """The processes that have inherited a mark in the environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        value = str(uuid.uuid4())
        self._mark = f"ERRAND_BOY_MARK={value}".encode()
        monkeypatch.setenv("ERRAND_BOY_MARK", value)
        self.env = dict(os.environ)

    def pids(self) -> list[int]:
        """Those that have it now: at its exec, a process has no environment for a moment."""
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdecimal() and self._mark in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
        return found

    def are_gone(self) -> bool:
        return not self.pids()


@pytest.fixture(autouse=True)
def no_helper(nothing_left_behind: None) -> Iterator[None]:
    yield
    errand_boy.stop()


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    marked = Marked(monkeypatch)
    yield marked
    left = marked.pids()
    for pid in left:
        os.kill(pid, SIGKILL)
    assert not left


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- each front runs ESCAPES until its time-out, with `tree` and STEPS, and returns the output --


def expired(run: Callable[..., Any], marked: Marked, tree: str, **options: Any) -> bytes:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run(
            ["sh", "-c", ESCAPES],
            timeout=0.5,
            stop=STEPS,
            tree=tree,
            env=marked.env,
            **(options or {"stdout": subprocess.PIPE}),
        )
    output: bytes = caught.value.output
    return output


def by_run(marked: Marked, tree: str, client: Any, **options: Any) -> bytes:
    return expired(ours.run, marked, tree, **options)


def by_the_daemon(marked: Marked, tree: str, client: Any, **options: Any) -> bytes:
    return expired(client.run, marked, tree, **options)


def by_asyncio(marked: Marked, tree: str, client: Any, **options: Any) -> bytes:
    import errand_boy.asyncio as on_loops  # noqa: PLC0415

    def run(*args: Any, **options: Any) -> None:
        asyncio.run(on_loops.run(*args, **options))

    return expired(run, marked, tree, **options)


def by_map(marked: Marked, tree: str, client: Any, **options: Any) -> bytes:
    args = ["sh", "-c", ESCAPES]
    (result,) = ours.map([args], timeout=0.5, stop=STEPS, tree=tree, env=marked.env, **options)
    assert isinstance(result.error, subprocess.TimeoutExpired)
    assert result.returncode == -SIGKILL
    return bytes(result.stdout)


def by_greenlets(name: str) -> Callable[..., bytes]:
    def run(marked: Marked, tree: str, client: Any, **options: Any) -> bytes:
        pytest.importorskip(name)
        script = f"""
import sys, warnings
warnings.simplefilter("ignore")
import errand_boy.{name} as ours
try:
    ours.run(["sh", "-c", sys.argv[2]], timeout=0.5, stop=((15, 0.1), 9), tree=sys.argv[3],
             **{options or dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)})
except ours.TimeoutExpired as error:
    report(error.output.decode())
"""
        output: str = run_script(script, name, [ESCAPES, tree])
        return output.encode()

    return run


def by_celery(marked: Marked, tree: str, client: Any) -> bytes:
    celery = pytest.importorskip("errand_boy.celery")
    args = ["sh", "-c", ESCAPES]
    outcome = celery.run_command(args, timeout=0.5, stop=[[15, 0.1], 9], tree=tree, env=marked.env)
    assert outcome["error"].startswith("TimeoutExpired")
    output: str = outcome["stdout"]
    return output.encode()


def by_the_command_line(marked: Marked, tree: str, client: Any) -> bytes:
    command = [sys.executable, "-m", "errand_boy", "run", "--local"]
    command += ["--timeout", "0.5", "--stop", "TERM:0.1,KILL", "--tree", tree, "sh", "-c", ESCAPES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=marked.env) as process:
        assert process.stdout is not None
        output = process.stdout.readline()  # others may hold it
        assert process.wait() == 124
        return output


FRONTS: dict[str, Callable[..., bytes]] = {
    "run": by_run,
    "daemon": by_the_daemon,
    "asyncio": by_asyncio,
    "map": by_map,
    "gevent": by_greenlets("gevent"),
    "eventlet": by_greenlets("eventlet"),
    "celery": by_celery,
    "errand-boy run": by_the_command_line,
}
NO_TERMINAL = ("celery", "errand-boy run")


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
def test_tree_all_leaves_nothing(front: str, marked: Marked, client: Any) -> None:
    assert FRONTS[front](marked, "all", client) == b"out\n"
    until(marked.are_gone)


@pytest.mark.slow
@pytest.mark.parametrize("front", [front for front in FRONTS if front not in NO_TERMINAL])
@pytest.mark.parametrize("tree", ["all", "process"])
def test_what_was_on_the_terminal_is_kept(
    tree: str, front: str, marked: Marked, client: Any
) -> None:
    # In a tree, the shell may be the last to end, and write about it.
    assert FRONTS[front](marked, tree, client, pty=True).splitlines()[0] == b"out"
    if tree == "process":
        for pid in until(lambda: [p for p in marked.pids() if os.getsid(p) in marked.pids()]):
            os.kill(pid, SIGKILL)
    until(marked.are_gone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gevent", "eventlet"])
def test_greenlets_without_a_time_out(name: str) -> None:
    pytest.importorskip(name)
    script = f"""
import warnings
warnings.simplefilter("ignore")
import errand_boy.{name} as ours
report(ours.run(["echo", "out"], stdout=-1, stop=15, drain=1).stdout.decode())
"""
    assert run_script(script, name) == "out\n"


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
def test_tree_group_leaves_those_that_left_the_session(
    front: str, marked: Marked, client: Any
) -> None:
    assert FRONTS[front](marked, "group", client) == b"out\n"

    def others() -> list[int]:
        left = marked.pids()
        with contextlib.suppress(ProcessLookupError):
            return left if {os.getsid(pid) for pid in left} <= set(left) else []
        return []

    for pid in until(others):  # those of a new session
        os.kill(pid, SIGKILL)
    until(marked.are_gone)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "helper", "asyncio", "map", "daemon"])
def test_what_a_group_leaves_is_killed(
    way: str, marked: Marked, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader ends at the first signal, and another process ignores it."""
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper" if way == "helper" else "direct")
    script = "trap 'exit 3' TERM; (trap '' TERM; echo; while :; do sleep 1000; done) & "
    args = ["sh", "-c", script + "while :; do sleep 0.1; done"]
    options: dict[str, Any] = {"tree": "group", "stop": ((SIGTERM, 1000), SIGKILL), "stdout": -1}
    if way == "map":
        del options["stdout"]
        (result,) = ours.map([args], timeout=1, env=marked.env, **options)
        assert result.returncode == 3
    elif way == "asyncio":
        expired_on_loops(args, marked, options)
    else:
        popen = client.Popen if way == "daemon" else ours.Popen
        with popen(args, env=marked.env, **options) as process:
            process.stdout.readline()
            assert process.stop() == 3
            assert process.stdout.read() == b""
    until(marked.are_gone)


def test_what_a_group_leaves_is_killed_if_its_leader_ends_between_two_calls(
    marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader ends after waitid(2) has found it alive, and before it is waited for."""
    script = "(echo; while :; do sleep 1000; done) & read line; exit 3"
    options: dict[str, Any] = {"tree": "group", "stop": ((signal.SIGURG, 1000), SIGKILL)}
    waitid = os.waitid
    with ours.Popen(
        ["sh", "-c", script], env=marked.env, stdin=-1, stdout=-1, bufsize=0, **options
    ) as process:

        def look(kind: int, number: int, flags: int) -> Any:
            found = waitid(kind, number, flags)
            if found is None:
                process.stdin.write(b"\n")
                waitid(kind, number, os.WEXITED | os.WNOWAIT)
            return found

        assert process.stdout.readline() == b"\n"
        monkeypatch.setattr(os, "waitid", look)
        assert process.stop() == 3
        assert process.stdout.read() == b""


def expired_on_loops(args: list[str], marked: Marked, options: dict[str, Any]) -> None:
    import errand_boy.asyncio as on_loops  # noqa: PLC0415

    async def main() -> None:
        process: Any = await on_loops.create_subprocess_exec(*args, env=marked.env, **options)
        await process.stdout.readline()
        await process.stop()
        assert process.returncode == 3

    asyncio.run(main())


# -- tree="cgroup" --


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A new cgroup of version 2; it needs no controllers."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if found is None:
        pytest.skip("no cgroup v2 is mounted")
    path = found / f"errand-boy-test-{uuid.uuid4()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {found}: {error.strerror}")
    yield path
    until(lambda: not (path / "cgroup.procs").read_text(), "the end of all in the cgroup")
    path.rmdir()


@pytest.mark.parametrize("front", ["run", "daemon", "asyncio", "map", "gevent", "eventlet"])
def test_tree_cgroup_leaves_nothing(front: str, marked: Marked, client: Any, cgroup: Path) -> None:
    options: dict[str, Any] = {"cgroup": str(cgroup)}
    if front != "map":
        options["stdout"] = subprocess.PIPE
    assert FRONTS[front](marked, "cgroup", client, **options) == b"out\n"
    until(marked.are_gone)


def test_what_a_cgroup_has_left_is_stopped_later(marked: Marked, cgroup: Path) -> None:
    script = "setsid sleep 1000 & exit 3"
    with ours.Popen(["sh", "-c", script], tree="cgroup", cgroup=cgroup, env=marked.env) as process:
        assert process.wait() == 3
        until(marked.pids)
        assert process.stop() == 3
    until(marked.are_gone)


def test_every_process_of_a_cgroup_gets_the_steps(marked: Marked, cgroup: Path) -> None:
    inner = "trap 'echo inner; exit' TERM; echo ready; while :; do sleep 0.01; done"
    script = f'(setsid sh -c "{inner}" &); exec cat'
    with ours.Popen(["sh", "-c", script], stdin=-1, stdout=-1, tree="cgroup", cgroup=cgroup,
                    env=marked.env) as process:  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        assert process.stop(((SIGTERM, 1000), SIGKILL)) == -SIGTERM
    until(marked.are_gone)


def test_cgroup_of_ones_own_is_not_ended(cgroup: Path) -> None:
    script = """
    with open(sys.argv[2] + "/cgroup.procs", "w") as file:
        file.write("0")
    process = subprocess.Popen(["sleep", "1000"], tree="cgroup", cgroup=sys.argv[2])
    try:
        process.stop()
    except ValueError as error:
        report(str(error))
    process.kill()
    """
    assert "contains this process" in run_script(script, args=[cgroup])


# -- tree="all" --


def test_command_is_as_any_other(marked: Marked) -> None:
    script = "echo $$; sleep 1000 & exit 3"
    with ours.Popen(["sh", "-c", script], stdout=-1, tree="all", env=marked.env) as process:
        assert int(process.communicate()[0]) == process.pid
    assert process.returncode == 3
    until(marked.are_gone)  # what the command leaves ends with it


@pytest.mark.slow
def test_drain_gives_what_the_command_leaves_time(marked: Marked) -> None:
    script = "(sleep 0.2; echo late) & sleep 1000 & echo early"
    done = ours.run(
        ["sh", "-c", script], stdout=-1, tree="all", drain=1.5, env=marked.env, text=True
    )
    assert done.stdout == "early\nlate\n"
    until(marked.are_gone)


def test_every_process_gets_the_signal(marked: Marked, tmp_path: Path) -> None:
    file = tmp_path / "file"
    inner = f"trap 'echo inner; : > {file}; exit' TERM; echo ready; while :; do sleep 0.01; done"
    end = f"while [ ! -e {file} ]; do sleep 0.01; done; echo outer; exit 5"
    # No long command: a shell that gets the signal just before it starts one waits until it ends.
    script = f"trap '{end}' TERM; (setsid sh -c \"{inner}\" &); while :; do sleep 0.01; done"
    with ours.Popen(["sh", "-c", script], stdout=-1, tree="all", env=marked.env) as process:
        assert process.stdout.readline() == b"ready\n"
        assert process.stop(((SIGTERM, 100), SIGKILL)) == 5
        assert process.stdout.read() == b"inner\nouter\n"


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_with_leaves_nothing(exception: type[BaseException], marked: Marked) -> None:
    with (
        pytest.raises(exception),
        ours.Popen(["sh", "-c", ESCAPES], stdout=-1, tree="all", env=marked.env) as process,
    ):
        process.stdout.readline()
        raise exception
    assert process.returncode == -SIGKILL
    until(marked.are_gone)


def test_cancelled_call_returns_when_the_tree_has_ended(marked: Marked) -> None:
    import errand_boy.asyncio as on_loops  # noqa: PLC0415

    async def main() -> None:
        args = ["sh", "-c", ESCAPES]
        run = on_loops.run(args, stdout=subprocess.PIPE, tree="all", stop=STEPS, env=marked.env)
        task = asyncio.ensure_future(run)
        while len(marked.pids()) < 4:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not any(parent(pid) != os.getpid() for pid in marked.pids())

    asyncio.run(main())
    until(marked.are_gone)


@pytest.mark.parametrize("which", ["supervisor", "guard", "helper"])
@pytest.mark.parametrize("option", ["tree", "dies_with_caller"])
def test_killed_supervisor_leaves_nothing(which: str, option: str, marked: Marked) -> None:
    given: dict[str, tuple[str, dict[str, Any]]] = {
        "tree": (ESCAPES, {"tree": "all"}),
        "dies_with_caller": ("echo; exec sleep 1000", {"dies_with_caller": True}),
    }
    script, options = given[option]
    process = ours.Popen(["sh", "-c", script], stdout=-1, env=marked.env, **options)
    with process.stdout:
        process.stdout.readline()
        supervisor = parent(process.pid)
        guard = parent(supervisor)
        assert _helper.runner.current is not None
        helper = _helper.runner.current.pid
        assert parent(guard) == helper
        os.kill({"supervisor": supervisor, "guard": guard, "helper": helper}[which], SIGKILL)
        if which == "helper":
            with pytest.raises(errand_boy.HelperDiedError):
                process.wait()
        else:
            assert process.wait() == -SIGKILL
    until(marked.are_gone)


@pytest.mark.parametrize("option", [{"tree": "all"}, {"dies_with_caller": True}])
def test_supervisor_killed_as_the_command_ends(option: dict[str, Any]) -> None:
    """It has just waited for the command, so nobody else can learn the status any more."""
    strace = find_program("strace")
    late = ["-e", "trace=wait4", "-e", "inject=wait4:delay_exit=60000000"]
    process = ours.Popen(["sh", "-c", "echo; read x; exit 7"], stdin=-1, stdout=-1, **option)
    with process.stdin, process.stdout:
        process.stdout.readline()
        supervisor = parent(process.pid)
        command = [strace, "-p", str(supervisor), "-o", os.devnull, *late]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            process.stdin.close()
            if b"attached" not in said:
                process.wait()
                pytest.skip(f"strace may not trace here: {said.decode()}")
            until(lambda: not Path(f"/proc/{process.pid}").exists())
            os.kill(supervisor, SIGKILL)
            tracer.kill()  # otherwise it would keep the supervisor until the delay is over
            assert process.wait() == 7


# Refuses close_range(2) to the helper that it becomes, like a filter older than that call.
FILTERED = """#!{python} -ISE
import ctypes, os, struct, sys

libc = ctypes.CDLL(None, use_errno=True)
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 436), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
data = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(data)))
if libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0:
    os.execv({helper!r}, [{helper!r}, *sys.argv[1:]])
"""


@pytest.fixture
def helper_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have a script become the helper, whose path it gets as `helper`."""

    def use(text: str) -> None:
        package = Path(errand_boy.__file__).parent
        helper = os.environ.get("ERRAND_BOY_HELPER") or str(package / "errand-boy-helper")
        wrapper = tmp_path / "helper"
        wrapper.write_text(text.format(python=sys.executable, helper=helper))
        wrapper.chmod(0o755)
        monkeypatch.setenv("ERRAND_BOY_HELPER", str(wrapper))

    return use


def test_helper_without_close_range(helper_wrapper: Callable[[str], None]) -> None:
    """The start fails. Otherwise it would wait for a pipe that guard and supervisor can't close."""
    helper_wrapper(FILTERED)
    with pytest.raises(OSError, match=r"close_range\(2\)"):
        ours.run(["true"], tree="all")
    assert next(errand_boy.map([["true"]])).returncode == 0


@pytest.mark.slow
def test_supervisor_that_does_not_run_for_long(helper_wrapper: Callable[[str], None]) -> None:
    """On a loaded machine it may have no CPU for seconds. It is not taken for killed."""
    strace = find_program("strace")
    if subprocess.run([strace, "-D", "-o", os.devnull, "true"]).returncode:
        pytest.skip("strace may not trace here")
    late = "-e trace=close_range -e inject=close_range:delay_enter=1500000:when=1"
    helper_wrapper(f'#!/bin/sh\nexec {strace} -D -f -qq -o /dev/null {late} {{helper}} "$@"\n')
    assert ours.run(["true"], tree="all").returncode == 0


@pytest.mark.slow
def test_killed_helper_of_the_daemon_leaves_nothing(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon, pytest.MonkeyPatch.context() as monkeypatch:
        marked = Marked(monkeypatch)
        client: Any = errand_boy.connect(daemon.path)
        process: Any = client.Popen(["sh", "-c", ESCAPES], stdout=-1, tree="all", env=marked.env)
        with process.stdout:
            process.stdout.readline()
            os.kill(parent(parent(parent(process.pid))), SIGKILL)
            with pytest.raises(errand_boy.HelperDiedError):
                process.wait()
        until(marked.are_gone)
        client.close()


@pytest.mark.parametrize("option", ["tree='all'", "dies_with_caller=True"])
def test_caller_is_killed(option: str, marked: Marked) -> None:
    script = f"""
import errand_boy, time
process = errand_boy.Popen(["sh", "-c", "echo; exec sleep 1000"], stdout=-1, close_fds=True,
                           start_new_session=True, {option})
process.stdout.readline()
report(process.pid)
time.sleep(1000)
"""
    with started_script(script, "subprocess") as caller:
        assert caller.stdout is not None
        caller.stdout.readline()
        caller.kill()
        caller.wait()
    until(marked.are_gone)


def test_killed_caller_takes_only_the_command_with_it(marked: Marked) -> None:
    script = """
import errand_boy, time
command = "(setsid sleep 1000 &); sleep 1000 & echo; exec sleep 1000"
process = errand_boy.Popen(["sh", "-c", command], stdout=-1, dies_with_caller=True)
process.stdout.readline()
report(process.pid)
time.sleep(1000)
"""
    with started_script(script, "subprocess") as caller:
        assert caller.stdout is not None
        supervisor = parent(json.loads(caller.stdout.readline()))
        caller.kill()
        caller.wait()
    until(lambda: not Path(f"/proc/{supervisor}").exists())
    left = until(lambda: pids if len(pids := marked.pids()) > 1 else [])
    for process in left:
        os.kill(process, SIGKILL)
    assert len(left) == 2
    until(marked.are_gone)


def test_dies_with_caller_leaves_what_the_command_starts(marked: Marked) -> None:
    script = "(setsid sleep 1000 &); exit 4"
    assert ours.call(["sh", "-c", script], dies_with_caller=True, env=marked.env) == 4
    (left,) = until(marked.pids)
    os.kill(left, SIGKILL)
    until(marked.are_gone)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's processes are limited")
def test_fork_bomb_is_gone(marked: Marked) -> None:
    bomb = "$SIG{TERM} = $SIG{CHLD} = 'IGNORE'; while (1) { fork; }"
    process = ours.Popen(
        ["perl", "-e", bomb],
        user=61235,
        group=61235,
        extra_groups=[],
        rlimits={"nproc": 40},
        tree="all",
        env=marked.env,
    )
    until(lambda: len(marked.pids()) > 20)
    assert process.stop() == -SIGKILL
    until(marked.are_gone)


# -- the rest --


def test_drain_keeps_what_was_read(marked: Marked) -> None:
    script = "echo early; sleep 1000 & exit 3"
    done = ours.run(["sh", "-c", script], stdout=-1, drain=0.1, env=marked.env, text=True)
    assert (done.returncode, done.stdout) == (3, "early\n")
    (left,) = until(marked.pids)
    os.kill(left, SIGKILL)
    until(marked.are_gone)


@pytest.mark.slow
@pytest.mark.parametrize("pty", [False, True])
def test_output_of_the_last_moments_is_kept(pty: bool) -> None:
    script = "trap 'echo bye; exit 4' TERM; echo hello; while :; do sleep 0.01; done"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        ours.check_output(
            ["sh", "-c", script], timeout=0.5, stop=((SIGTERM, 100), SIGKILL), pty=pty
        )
    assert caught.value.output.split() == [b"hello", b"bye"]


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["process", "all"])
def test_drain_of_a_terminal(tree: str, marked: Marked) -> None:
    """A process that ignores the hang-up can't write to it any more, but has it open."""
    script = "trap '' HUP; printf $1; sleep 1000 & exit 3"
    # An incomplete character is an error only at the end, which tree="all" reaches.
    text = "early\\342\\202" if tree == "process" else "early"
    before = os.listdir("/proc/self/fd")
    args = ["sh", "-c", script, "sh", text]
    done = ours.run(args, pty=True, drain=0.2, tree=tree, env=marked.env, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (3, "early", None)
    errand_boy.stop()
    assert os.listdir("/proc/self/fd") == before
    for pid in until(marked.pids) if tree == "process" else ():
        os.kill(pid, SIGKILL)
    until(marked.are_gone)


@pytest.mark.slow
def test_stop_of_a_terminal_beside_a_pipe() -> None:
    script = "echo shown; echo piped >&2; exec sleep 1000"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        ours.run(["sh", "-c", script], pty=True, stderr=-1, timeout=0.5, stop=SIGTERM)
    assert (caught.value.output, caught.value.stderr) == (b"shown\r\n", b"piped\n")


def test_more_on_a_terminal_than_the_limit(marked: Marked) -> None:
    process = ours.Popen(["yes"], pty=True, limits={"output": 1000}, env=marked.env)
    with process:
        assert process.communicate()[0] == 333 * b"y\r\n" + b"y"
    assert process.cause == "output"
    until(marked.are_gone)


def test_wait_that_is_interrupted_anywhere() -> None:
    """An exception from a signal handler must lose neither the end nor the connection."""
    source = f"""{INTERRUPT}
codes, interrupted, is_over = [], 0, False
while not is_over:
    process = subprocess.Popen(["sh", "-c", "exit 7"], tree="all")
    interrupt(interrupted + 1)
    try:
        process.wait(20)
        is_over = True
    except Interrupt:
        interrupted += 1
    finally:
        sys.settrace(None)
    codes.append(process.wait(20))
report([interrupted > 5, list(set(codes))])
"""
    assert run_script(source) == [True, [7]]


def test_stop_by_hand() -> None:
    process = ours.Popen(["sleep", "1000"])
    assert process.stop() == -SIGKILL
    assert process.stop() == -SIGKILL
    assert ours.Popen(["sleep", "1000"], stop=SIGTERM).stop() == -SIGTERM


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (SIGTERM, ((SIGTERM, None),)),
        (STEPS, ((SIGTERM, 0.1), (SIGKILL, None))),
        (((SIGTERM, 5),), ((SIGTERM, 5), (SIGKILL, None))),
        (((SIGTERM, 5), signal.SIGINT), ((SIGTERM, 5), (signal.SIGINT, None))),
    ],
)
def test_steps(given: Any, steps: Any) -> None:
    assert ends.steps(given) == steps


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tree": "forest"}, "tree: 'forest' is not one of process, group, cgroup, all"),
        ({"stop": (SIGTERM, SIGKILL)}, "must be followed by the seconds"),
        ({"stop": 0}, "stop: 0 is not a signal"),
        ({"stop": ()}, "stop: at least one signal is needed"),
        ({"drain": -1}, "drain: -1 is not a number of seconds"),
        ({"tree": "cgroup"}, "tree='cgroup' needs a cgroup="),
    ],
)
def test_bad_values(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        ours.Popen(["true"], **options)


@pytest.mark.parametrize("stop", ["TERM", ["TERM"], [("TERM", 5)], [(SIGTERM, 5, SIGKILL)]])
def test_steps_that_are_no_signals(stop: Any) -> None:
    with pytest.raises(TypeError, match="is neither a signal, such as"):
        ours.Popen(["true"], stop=stop)
