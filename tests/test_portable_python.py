"""errand-boy without its part in C, as on macOS.

There is no macOS here. A wheel is built as there, and used where the modules of the standard
library have nothing that Linux has and macOS has not, nor /proc.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from conftest import find_program
from test_packaging import copy_sources, needs_setuptools

import errand_boy
from errand_boy._cli.args import COMMANDS
from errand_boy._options.table import NAMES

ROOT = Path(__file__).parent.parent

# What is imported here looks at what is taken away then. What is not in the modules of C either,
# nobody finds.
MACOS = """
import asyncio, json, logging, os, select, selectors, signal, socket, ssl, subprocess, sys
import fcntl, posix, resource, sysconfig, time, _signal, _socket

def take(modules, *prefixes):
    for module in modules:
        for name in [name for name in vars(module) if name.startswith(prefixes)]:
            delattr(module, name)

for name in FRAMEWORK:
    __import__(name)
sysconfig.get_config_vars()
take([os, posix], "pidfd_", "memfd_", "MFD_", "sched_get", "sched_set", "sched_param", "getres",
     "setres", "O_PATH", "O_TMPFILE", "posix_fa", "eventfd", "EFD_", "splice", "SPLICE_",
     "copy_file_range", "pipe2", "getrandom", "GRND_", "waitid", "P_PID", "P_ALL", "P_PGID",
     "WEXITED", "WNOWAIT", "getxattr", "setxattr", "fdatasync")
take([os, posix], "setns", "unshare", "CLONE_", "timerfd_", "TFD_")
take([select], "epoll", "EPOLL")
selectors.DefaultSelector = selectors.PollSelector
take([socket, _socket], "SO_PEER", "SO_PASS", "SO_DOMAIN", "AF_NETLINK", "AF_PACKET", "AF_VSOCK",
     "SOCK_CLOEXEC", "SOCK_NONBLOCK", "MSG_NOSIGNAL", "MSG_CMSG", "SCM_CRED")
take([signal, _signal], "sigwaitinfo", "sigtimedwait", "SIGRT", "SIGPWR", "SIGSTKFLT", "SIGPOLL",
     "SIGCLD", "pidfd_")
take([fcntl], "F_ADD_SEALS", "F_GET_SEALS", "F_SEAL", "F_SETPIPE", "F_GETPIPE", "F_OFD", "DN_")
take([resource], "prlimit", "RLIMIT_NICE", "RLIMIT_RT", "RLIMIT_SIG", "RLIMIT_MSG", "RUSAGE_THREAD")
take([time], "CLOCK_BOOTTIME")
sys.platform = "darwin"

def hook(event, args):
    if event == "open" and str(args[0]).startswith("/proc"):
        raise AssertionError(f"{args[0]} is opened")

sys.addaudithook(hook)
"""


def build(tree: Path, **env: str) -> Path:
    """Build the wheel without a part in C, where there is no compiler."""
    needs_setuptools()
    wheels = tree / "wheels"
    wheels.mkdir()
    source = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    command = [sys.executable, "-c", source]
    env = {**os.environ, "ERRAND_BOY_WITHOUT_C": "1", "CC": "/nowhere/cc", **env}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    return wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel has been installed."""
    scratch = tmp_path_factory.mktemp("portable")
    wheel = build(copy_sources(scratch), _PYTHON_HOST_PLATFORM="macosx-14.0-arm64")
    version = errand_boy.__version__
    assert wheel.name == f"errand_boy-{version}-py3-none-macosx_14_0_arm64.whl"
    folder = scratch / "site"
    with zipfile.ZipFile(wheel) as file:
        assert not [name for name in file.namelist() if name.endswith((".so", "-helper", ".c"))]
        (metadata,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        required = [
            line
            for line in file.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist") and "extra" not in line
        ]
        assert ["darwin" not in line and "linux" in line for line in required] == [True]
        file.extractall(folder)
    return folder


def run(
    site: Path, source: str, framework: Sequence[str] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a program as on macOS, in an empty folder."""
    empty = site.parent / "empty"
    empty.mkdir(exist_ok=True)
    program = f"FRAMEWORK = {framework!r}\n{MACOS}\n{dedent(source)}"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONWARNINGS": "", **env},
        capture_output=True,
        text=True,
    )


def found(site: Path, source: str, framework: Sequence[str] = (), **env: str) -> Any:
    """Run a program as on macOS; return what it prints, which is JSON."""
    done = run(site, source, framework, **env)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_in_place_of_subprocess(site: Path) -> None:
    source = """
    import subprocess as stdlib
    import errand_boy as subprocess

    done = subprocess.run(["sh", "-c", "cat; exit 3"], input="x", capture_output=True, text=True)
    results = [done.returncode, done.stdout, done.cause, done.duration > 0, done.rusage is not None]
    # As many bytes as macOS says, and not as many KiB.
    results += [done.peak_memory == done.rusage.ru_maxrss]
    results += [subprocess.call(["true"]), subprocess.getoutput("echo y")]
    results += [subprocess.check_output("echo z", shell=True, cwd="/", umask=7).decode()]
    for attempt, error in (
        (lambda: subprocess.run(["sleep", "60"], timeout=0.01), stdlib.TimeoutExpired),
        (lambda: subprocess.check_call(["false"]), subprocess.CalledProcessError),
        (lambda: subprocess.Popen(["/nowhere"]), FileNotFoundError),
    ):
        try:
            attempt()
        except error as caught:
            results.append(type(caught).__name__)
    with subprocess.Popen(["sleep", "60"]) as process:
        process.terminate()
        results += [process.wait(timeout=30), process.cause, process.poll(), process.stop()]
    assert isinstance(process, stdlib.Popen)
    print(json.dumps(results))
    """
    assert found(site, source) == [
        *(3, "x", "exit", True, True, True, 0, "y", "z\n"),
        *("TimeoutExpired", "CalledProcessError", "FileNotFoundError"),
        *(-15, "client", -15, -15),
    ]


def test_preexec_fn_is_called_without_a_warning(site: Path) -> None:
    source = """
    import errand_boy
    from functools import partial

    def function():
        os.write(1, b"x")

    results = []
    chained = errand_boy.chain(function, os.setsid)
    for given in function, os.setsid, partial(os.nice, 1), chained:
        results.append(errand_boy.check_output(["echo", "y"], text=True, preexec_fn=given))
    print(json.dumps(results))
    """
    assert found(site, source) == ["xy\n", "y\n", "y\n", "xy\n"]


def test_there_is_no_helper(site: Path) -> None:
    source = """
    import errand_boy

    errand_boy.start()
    results = [errand_boy.helper_pid(), errand_boy.call(["true"])]
    errand_boy.stop()
    print(json.dumps(results))
    """
    assert found(site, source) == [None, 0]


def test_every_option_is_refused(site: Path) -> None:
    source = f"""
    import errand_boy

    errors = {{}}
    for name in {sorted(NAMES)}:
        assert errand_boy.call(["true"], **{{name: None}}) == 0
        try:
            errand_boy.run(["true"], **{{name: 1}})
        except OSError as error:
            errors[name] = [error.errno, str(error)]
    try:
        errand_boy.run(["true"], limit={{}})
    except TypeError as error:
        errors["limit"] = [0, str(error)]
    print(json.dumps(errors))
    """
    errors = found(site, source)
    assert errors.pop("limit")[0] == 0
    assert errors.keys() == NAMES
    for name, (number, text) in errors.items():
        assert number == errno.ENOTSUP
        assert f"{name}= can't be given on this system: errand-boy needs Linux and CPython" in text
        assert "docs/portability.md; errand-boy doctor shows" in text


USES = (
    "list(errand_boy.map([['true']]))",
    "errand_boy.Executor()",
    "errand_boy.Job",
    "errand_boy.Sandbox(system=True)",
    "errand_boy.connect()",
    "errand_boy.asyncio.connect()",
    "errand_boy.asyncio.map([['true']])",
    "__import__('errand_boy.celery')",
    "__import__('errand_boy.transports.unixsocket')",
)


def test_what_else_needs_linux_says_so(site: Path) -> None:
    celery = ["celery"] if find_spec("celery") else []
    uses = [use for use in USES if celery or "celery" not in use]
    source = f"""
    import errand_boy.asyncio

    errors = {{}}
    for use in {uses}:
        try:
            eval(use)
        except errand_boy.HelperError as error:
            errors[use] = [error.errno, str(error)]
    print(json.dumps(errors))
    """
    errors = found(site, source, celery)
    assert [*errors] == uses
    for number, text in errors.values():
        assert number == errno.ENOTSUP
        assert "errand-boy needs Linux and CPython for what subprocess can't do" in text
        assert "docs/portability.md; errand-boy doctor shows" in text


@pytest.mark.parametrize(
    "variable", ["ERRAND_BOY_SOCKET=/nowhere", "ERRAND_BOY_SPAWN=direct", "ERRAND_BOY_SPAWN=helper"]
)
def test_what_the_environment_asks_for_is_not_ignored(site: Path, variable: str) -> None:
    name, value = variable.split("=")
    done = run(site, "import errand_boy; errand_boy.run(['true'])", **{name: value})
    assert done.returncode == 1
    assert "errand-boy needs Linux and CPython" in done.stderr.splitlines()[-1]


def test_patched_program(site: Path) -> None:
    source = """
    import errand_boy, pty

    errand_boy.patch()
    async def run():
        process = await asyncio.create_subprocess_exec("sh", "-c", "exit 3")
        return await process.wait()

    results = [subprocess.check_output(["echo", "x"], text=True), asyncio.run(run())]
    results.append(os.waitstatus_to_exitcode(pty.spawn(["sh", "-c", "exit 4"])))
    errand_boy.unpatch()
    results.append(subprocess.check_output(["echo", "y"], text=True))
    print(json.dumps(results))
    """
    assert found(site, source) == ["x\n", 3, 4, "y\n"]


def test_asyncio(site: Path) -> None:
    source = """
    import errand_boy.asyncio as ours

    async def main():
        done = await ours.run(["cat"], input="x", capture_output=True, text=True)
        results = [done.returncode, done.stdout, done.cause]
        process = await ours.create_subprocess_exec("sleep", "60")
        process.terminate()
        results.append(await process.wait())
        process = await ours.create_subprocess_shell("exec sleep 60")
        results.append(await process.stop())
        try:
            await ours.run(["sleep", "60"], timeout=0.01)
        except subprocess.TimeoutExpired:
            results.append("expired")
        task = asyncio.create_task(ours.run(["sleep", "60"]))
        await asyncio.sleep(0)
        task.cancel()
        (cancelled,) = await asyncio.gather(task, return_exceptions=True)
        results.append(type(cancelled).__name__)
        many = [ours.run(["sh", "-c", f"exit {i}"]) for i in range(20)]
        results.append([done.returncode for done in await asyncio.gather(*many)] == [*range(20)])
        return results

    results = asyncio.run(main())
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        results.append("no child is left")
    print(json.dumps(results))
    """
    results = [0, "x", "exit", -15, -9, "expired", "CancelledError", True, "no child is left"]
    assert found(site, source) == results


@pytest.mark.parametrize("framework", ["gevent", "eventlet"])
def test_frameworks_start_commands_their_own_way(site: Path, framework: str) -> None:
    pytest.importorskip(framework)
    modules = {
        "gevent": ["gevent.socket", "gevent.subprocess"],
        "eventlet": ["eventlet.green.subprocess"],
    }
    source = f"""
    from errand_boy.{framework} import Popen, TimeoutExpired, run

    done = run(["cat"], input=b"x", capture_output=True)
    results = [done.returncode, done.stdout.decode(), done.cause]
    with Popen(["sleep", "60"]) as process:
        try:
            process.wait(timeout=0.01)
        except TimeoutExpired:
            process.kill()
        results += [process.wait(), process.cause]
    print(json.dumps(results))
    """
    warnings = {"PYTHONWARNINGS": "ignore"}  # that eventlet is deprecated
    assert found(site, source, modules[framework], **warnings) == [0, "x", "exit", -9, "client"]


def test_doctor(site: Path) -> None:
    source = "from errand_boy._cli.args import main; sys.exit(main(['doctor', '--json']))"
    done = run(site, source)
    assert (done.returncode, done.stderr) == (1, "")
    value = json.loads(done.stdout)
    assert value["way"] == "subprocess"
    assert "errand-boy needs Linux and CPython" in value["why"]
    assert [name for name, tried in value["ways"].items() if tried["works"]] == ["subprocess"]
    assert [name for name, tried in value["options"].items() if tried["works"]] == ["user="]
    assert not value["daemon"]["answers"]
    assert value["advice"] == []

    done = run(site, source.replace(", '--json'", ""))
    assert (done.returncode, done.stderr) == (1, "")
    assert "A command is started:     subprocess (errand-boy needs Linux and CPython" in done.stdout


def test_other_subcommands_say_why_not(site: Path) -> None:
    commands = sorted(COMMANDS.keys() - {"doctor"})
    source = f"""
    from errand_boy._cli.args import main

    print(json.dumps([main(given) for given in (["--help"], ["--version"])]), file=sys.stderr)
    for command in {commands}:
        print(json.dumps([main([command, "true"])]), file=sys.stderr)
    """
    first, *lines = run(site, source).stderr.splitlines()
    assert first == "[0, 0]"
    assert lines[1::2] == ["[125]"] * len(commands)
    for command, line in zip(commands, lines[::2], strict=True):
        assert line.startswith(f"errand-boy {command}: errand-boy needs Linux and CPython")


def test_linux_is_not_served_by_mistake(site: Path) -> None:
    """There the same files are what is left of an installation without the extension."""
    command = [sys.executable, "-c", "import errand_boy"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    env.pop("ERRAND_BOY_WITHOUT_C", None)
    done = subprocess.run(command, cwd=site.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: errand_boy is partly in C, and that part is missing" in done.stderr
    env["ERRAND_BOY_WITHOUT_C"] = "1"
    assert subprocess.run(command, cwd=site.parent, env=env).returncode == 0


def test_pypy(site: Path) -> None:
    pypy = find_program("pypy3")
    source = """if True:
        import asyncio, sys
        if sys.version_info < (3, 10):
            sys.exit(77)
        import errand_boy, errand_boy.asyncio
        done = errand_boy.run(["cat"], input="x", capture_output=True, text=True)
        print(done.returncode, done.stdout, done.cause)
        print(asyncio.run(errand_boy.asyncio.run(["sh", "-c", "exit 3"])).returncode)
        try:
            errand_boy.run(["true"], limits={"wall": 1})
        except OSError as error:
            print(error)
    """
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [pypy, "-c", source], cwd=site.parent, env=env, stdout=subprocess.PIPE, text=True
    )
    if done.returncode == 77:
        pytest.skip("needs PyPy 3.10")
    first, second, error = done.stdout.splitlines()
    assert (done.returncode, first, second) == (0, "0 x exit", "3")
    assert "errand-boy needs Linux and CPython" in error
