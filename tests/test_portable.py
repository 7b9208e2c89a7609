"""Pythons, kernels and systems that lack something."""

from __future__ import annotations

import errno
import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import PRELUDE, run_script, started_script
from daemon import started_daemon
from test_direct import REFUSING

import errand_boy

PACKAGE = Path(errand_boy.__file__).parent

OLD_PYTHON = """
for module, names in (os, ("pidfd_open", "memfd_create")), (signal, ("pidfd_send_signal",)):
    for name in names:
        delattr(module, name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["errand_boy", "errand_boy-helper"])
def test_python_that_was_built_for_older_kernels(implementation: str) -> None:
    source = """
    import asyncio, atexit
    from errand_boy import asyncio as ours

    async def run():
        process = await ours.create_subprocess_exec("true")
        return await process.wait()

    start()
    with subprocess.Popen(["sleep", "0.1"]) as process:
        found = [process.wait(timeout=30), asyncio.run(run())]
    found += [result.returncode for result in subprocess.map([["true"], ["false"]])]
    subprocess.stop()
    report(found)
    """
    lines = "\n".join("    " + line for line in OLD_PYTHON.splitlines())
    assert run_script(lines + source, implementation) == [0, 0, 0, 1]


def test_package_takes_these_calls_from_nowhere_else() -> None:
    names = ("os.pidfd_open", "os.memfd_create", "signal.pidfd_send_signal")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not [name for name in names if name in text], path


# Filters, and errors that name the step

EXECVEAT = '(322 if os.uname().machine == "x86_64" else 281)'
PIDFD_OPEN, MEMFD_CREATE = 434, '(319 if os.uname().machine == "x86_64" else 279)'


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_helper_starts_where_execveat_is_refused(error: str) -> None:
    source = f"""{REFUSING}
import errno
refuse({EXECVEAT}, errno.{error})
subprocess.start()
report([subprocess.run(["true"]).returncode, helper_pid() is not None])
"""
    assert run_script(source) == [0, True]


def test_refused_call_is_named() -> None:
    source = f"""{REFUSING}
import errno
refuse({PIDFD_OPEN}, errno.EPERM)
try:
    subprocess.start()
except subprocess.HelperError as error:
    report([str(error), error.filename])
"""
    text, name = run_script(source)
    assert "pidfd_open: Operation not permitted" in text
    assert "filter" in text
    assert name is None


@pytest.mark.parametrize("command", ["exit 3", "echo broken >&2; exit 3"])
def test_program_that_is_no_helper(tmp_path: Path, command: str) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    source = """
    os.environ["ERRAND_BOY_HELPER"] = sys.argv[2]
    found = []
    for attempt in subprocess.start, lambda: list(subprocess.map([["true"]])):
        try:
            attempt()
        except subprocess.HelperError as error:
            found.append([str(error), error.filename])
    report(found)
    """
    found = run_script(source, args=[program])
    assert len(found) == 2
    for text, name in found:
        assert name == str(program)
        assert "with exit status 3" in text
        assert ("3: broken" in text) == ("broken" in command)


@pytest.mark.slow
def test_daemon_without_memfd_create_and_clone(public_dir: Path) -> None:
    """Under a filter that refuses both, with a helper that uses posix_spawn."""
    filters = f"""{REFUSING}
import errno
refuse({MEMFD_CREATE}, errno.EPERM)
refuse(CLONE, errno.EPERM, 0x200000 | signal.SIGCHLD)  # CLONE_CHILD_CLEARTID, but no thread
os.execv(sys.argv[2], sys.argv[2:])
"""
    under = [sys.executable, "-c", PRELUDE + filters, "errand_boy"]
    with (
        started_daemon(public_dir, under=under) as daemon,
        closing(errand_boy.connect(daemon.path)) as client,
    ):
        with pytest.raises(OSError, match="ERRAND_BOY_SPAWN=posix") as caught:
            client.run(["true"])
        assert caught.value.errno == errno.EPERM
        assert daemon.stop() == 0
    env = {"ERRAND_BOY_SPAWN": "posix"}
    with (
        started_daemon(public_dir, under=under, env=env) as daemon,
        closing(errand_boy.connect(daemon.path)) as client,
    ):
        assert client.run(["echo", "x"], capture_output=True).stdout == b"x\n"
        with client.Popen(["cat"], stdin=errand_boy.PIPE, stdout=errand_boy.PIPE) as process:
            assert process.communicate(b"y") == (b"y", None)
        assert daemon.status()["helpers"]
        assert daemon.stop() == 0


# Files that are not there


def without(folder: str) -> list[str]:
    """A command that runs another where `folder` is empty."""
    mount = f'mount -t tmpfs none {folder} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


@pytest.mark.root
@pytest.mark.parametrize("implementation", ["errand_boy", "errand_boy-helper"])
def test_no_proc(implementation: str) -> None:
    source = """
    start()
    r, w = os.pipe()
    os.set_inheritable(w, True)
    found = [subprocess.run(["sh", "-c", f"echo x >&{w}"], close_fds=False).returncode]
    found += [os.read(r, 10).decode(), os.path.exists("/proc/self")]
    found += [result.returncode for result in subprocess.map([["true"], ["false"]])]
    with subprocess.Popen(["sleep", "0.1"], user=0) as process:
        found.append(process.wait(timeout=30))
    report(found)
    """
    with started_script(source, implementation, under=without("/proc")) as process:
        out, err = process.communicate(timeout=50)
    assert json.loads(out) == [0, "x\n", False, 0, 1, 0], err


@pytest.mark.root
def test_daemon_without_proc(public_dir: Path) -> None:
    with started_daemon(public_dir, under=without("/proc")) as daemon:
        with closing(errand_boy.connect(daemon.path)) as client:
            assert client.run(["echo", "x"], capture_output=True).stdout == b"x\n"
        assert "no /proc" in daemon.log()
        assert daemon.stop() == 0


@pytest.mark.root
def test_error_names_dev_null_where_there_is_none() -> None:
    source = """
    (result,) = subprocess.map([["true"]])
    report([result.error.errno, result.error.filename])
    """
    with started_script(source, under=without("/dev")) as process:
        out, err = process.communicate(timeout=50)
    assert json.loads(out) == [errno.ENOENT, "/dev/null"], err


@pytest.mark.root
@pytest.mark.parametrize("implementation", ["subprocess", "errand_boy", "errand_boy-helper"])
def test_process_group_of_another_pid_namespace(implementation: str) -> None:
    """In a container that it has entered, a process's group has no number: getpgrp returns 0."""
    source = """
    start()
    mine = os.getpgrp()
    found = []
    for options in {}, {"start_new_session": True}, *([{"process_group": 0}] if NEW else []):
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, **options) as process:
            found.append([os.getpgid(process.pid) == process.pid, os.getpgid(process.pid) == mine])
    if subprocess is not stdlib:
        for tree in "group", "all":
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE, tree=tree) as process:
                found.append(os.getpgid(process.pid) == process.pid)
    report([mine, found])
    """
    source = source.replace("NEW", str(sys.version_info >= (3, 11)))
    under = ["unshare", "--pid", "--fork", "--mount-proc"]
    with started_script(source, implementation, under=under) as process:
        out, err = process.communicate(timeout=50)
    own, callers = [True, False], [False, True]
    expected: list[object] = [callers, own, own] if sys.version_info >= (3, 11) else [callers, own]
    if implementation != "subprocess":
        expected += [True, True]
    assert json.loads(out) == [0, expected], err
