"""Programs of users, for mypy and pyright, both strict: nothing here is run.

Expected errors are ignored by their codes, and both complain about unused ignores.
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
from collections.abc import Iterator
from resource import struct_rusage
from signal import SIGKILL, SIGTERM
from typing import Any

from typing_extensions import assert_type

import errand_boy
import errand_boy.asyncio
import errand_boy.celery
import errand_boy.eventlet
import errand_boy.gevent
import errand_boy.ptyprocess
from errand_boy import DEVNULL, PIPE, Executor, Retries, Sandbox
from errand_boy.terminal import Pty, Terminal


def popen(text: bool) -> None:
    assert_type(errand_boy.Popen(["ls"], stdout=PIPE), errand_boy.Popen[bytes])
    assert_type(errand_boy.Popen("ls", shell=True, text=True), errand_boy.Popen[str])
    assert_type(errand_boy.Popen(["ls"], encoding="utf-8", cwd="/"), errand_boy.Popen[str])
    assert_type(errand_boy.Popen(["ls"], errors="replace"), errand_boy.Popen[str])
    assert_type(errand_boy.Popen(["ls"], universal_newlines=True), errand_boy.Popen[str])
    assert_type(errand_boy.Popen(["ls"], -1, None, PIPE, PIPE), errand_boy.Popen[bytes])
    assert_type(errand_boy.Popen(["ls"], text=text), errand_boy.Popen[Any])
    process = errand_boy.Popen(["ls"], tree="all", stop=((SIGTERM, 5), SIGKILL), pty=(24, 80))
    assert_type(process.stop(), int)
    assert_type(process.cause, str | None)
    assert_type(process.rusage, struct_rusage | None)
    assert_type(process.terminal, Terminal | None)
    errand_boy.Popen(["ls"], rlimits={"nofile": 10}, sandbox=Sandbox(read=["/usr"]), nice=5)
    errand_boy.Popen(["ls"], rlimit={"nofile": 10})  # type: ignore[call-overload]
    errand_boy.Popen(["ls"], nice="5")  # type: ignore[call-overload]
    errand_boy.Popen(["ls"], pty=Pty(echo=False), kill_on_client_exit=True)
    errand_boy.Popen(7)  # type: ignore[call-overload]
    errand_boy.Popen(["ls"], limit={"cpu": 1})  # type: ignore[call-overload]
    errand_boy.Popen(["ls"], limits={"mem": "1G"})  # type: ignore[call-overload]
    limits: errand_boy.Limits = {"wall": 0.5, "cpu": 1, "memory": 1 << 30, "output": "10M"}
    limits["processes"] = 50
    errand_boy.Popen(["ls"], limits=limits, text=text)


def takes_the_standard_librarys(process: subprocess.Popen[str]) -> str:
    output: str = process.communicate("input", timeout=5)[0]
    return output


def with_statement() -> str:
    with errand_boy.Popen(["cat"], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write("text")
        return takes_the_standard_librarys(process)


def run(text: bool) -> None:
    done = errand_boy.run(["ls"], capture_output=True)
    assert_type(done.stdout, bytes)
    assert_type(done.cause, str)
    assert_type(done.limits_by, str | None)
    assert_type(errand_boy.run(["ls"], text=True, timeout=5, tree="all").stdout, str)
    assert_type(errand_boy.run("ls", shell=True, stdout=PIPE, encoding="utf-8").stdout, str)
    errand_boy.run(["ls"], input="text", text=True, limits={"memory": "1G", "cpu": 10})
    errand_boy.run(["ls"], text=text, input="text")
    errand_boy.run(["ls"], timeot=5)  # type: ignore[call-overload]
    errand_boy.run(["ls"], limits={"wal": 60})  # type: ignore[call-overload]
    errand_boy.run(["ls"], limits={"processes": "many"})  # type: ignore[call-overload]
    errand_boy.call(["ls"], limits={"wal": 60})  # type: ignore[arg-type]
    errand_boy.Limits(memory="1G", cpus=2)  # type: ignore[typeddict-unknown-key]
    assert_type(errand_boy.check_output(["ls"]), bytes)
    assert_type(errand_boy.check_output(["ls"], text=True), str)
    assert_type(errand_boy.check_output("ls", shell=True, errors="ignore", stderr=DEVNULL), str)
    errand_boy.check_output(["ls"], stdout=PIPE)  # type: ignore[call-overload]
    assert_type(errand_boy.call(["ls"], timeout=1, umask=0o77), int)
    assert_type(errand_boy.check_call("ls", shell=True), int)
    errand_boy.call(["ls"], capture_output=True)  # type: ignore[call-arg]
    assert_type(errand_boy.getoutput("ls"), str)


def others() -> None:
    errand_boy.patch()
    errand_boy.unpatch()
    errand_boy.start()
    assert_type(errand_boy.helper_pid(), int | None)
    errand_boy.stop(5)  # type: ignore[call-arg]
    errand_boy.Popen(["ls"], preexec_fn=errand_boy.chain(os.setsid))
    Sandbox(network={"connect": [443]}, strict=False)
    Sandbox(networks=True)  # type: ignore[call-arg]


def client() -> None:
    daemon = errand_boy.connect("/run/errand-boy.sock", peer_uid=0)
    assert_type(daemon.check_output(["ls"], encoding="utf-8"), str)
    assert_type(daemon.run(["ls"], check=True).returncode, int)
    assert_type(daemon.getstatusoutput("ls"), tuple[int, str])
    with daemon.Popen(["ls"], text=True, kill_on_client_exit=True, kill_grace=2.5) as process:
        process.send_group_signal(SIGTERM)
        takes_the_standard_librarys(process)
    daemon.Popen(["ls"], kill_on_exit=True)  # type: ignore[call-overload]
    for done in daemon.map([["ls"]], text=True):
        assert_type(done.stdout, str)
    job = daemon.start(["make"], "build", ring=1 << 20, log="/tmp/log", tree="all")
    assert_type(job.wait(timeout=5).returncode, int)
    daemon.start(["make"], rings=1)  # type: ignore[call-arg]
    daemon.start(["make"], limits={"mem": 1})  # type: ignore[arg-type]
    daemon.run(["make"], limits={"mem": 1})  # type: ignore[call-overload]
    try:
        daemon.run(["ls"])
    except daemon.CalledProcessError as error:
        assert_type(error.returncode, int)


def result(done: errand_boy.Result) -> None:
    assert_type(done.error, Exception | None)
    assert_type(done.failed, bool)
    assert_type(done.rusage, struct_rusage | None)


def lines(commands: list[list[str]], text: bool) -> Iterator[int]:
    for done in errand_boy.map(commands, max_workers=8, timeout=60):
        assert_type(done, errand_boy.Result[bytes])
        assert_type(done.stdout, bytes)
        result(done)
        yield done.returncode
    mappings = ({"args": command, "timeout": 5} for command in commands)
    for line in errand_boy.map(mappings, text=True, timeout="200%", retries=Retries(3)):
        assert_type(line.stdout, str)
    for either in errand_boy.map(commands, text=text, halt="soon,fail=1", progress=True):
        assert_type(either, errand_boy.Result[Any])
    errand_boy.map(commands, max_worker=8)  # type: ignore[call-overload]
    errand_boy.map(commands, limits={"wal": 60})  # type: ignore[call-overload]
    errand_boy.map(commands, timeout=[60])  # type: ignore[call-overload]


def executor(commands: list[list[str]]) -> None:
    with Executor(4, text=True, limits={"memory": 1 << 30}) as texts:
        future = texts.submit(["ls"], check=True, cwd="/")
        assert_type(future, concurrent.futures.Future[errand_boy.Result[str]])
        for done in texts.map(commands, timeout=5):
            assert_type(done.stdout, str)
        texts.submit(["ls"], wd="/")  # type: ignore[call-arg]
        texts.submit(len)  # type: ignore[arg-type]
    assert_type(Executor(), Executor[bytes])
    Executor(ordered=True)  # type: ignore[call-overload]
    Executor(limits={"mem": 1})  # type: ignore[call-overload]


async def asynchronous(commands: list[list[str]]) -> None:
    process = await errand_boy.asyncio.create_subprocess_exec(
        "ls", "-l", stdout=PIPE, cwd="/", limits={"cpu": 1}, limit=1 << 20
    )
    assert_type(process, errand_boy.asyncio.Process)
    assert_type(await process.communicate(), tuple[bytes, bytes])
    assert_type(await process.stop(), int)
    await errand_boy.asyncio.create_subprocess_shell("ls | wc", stdout=PIPE, nice=5)
    await errand_boy.asyncio.create_subprocess_exec("ls", text=True)  # type: ignore[call-arg]
    await errand_boy.asyncio.create_subprocess_shell(["ls"])  # type: ignore[arg-type]
    assert_type((await errand_boy.asyncio.run(["ls"], capture_output=True)).stdout, bytes)
    done = await errand_boy.asyncio.run(["cat"], input="text", text=True, stdout=PIPE)
    assert_type(done.stdout, str)
    await errand_boy.asyncio.run(["cat"], input=7)  # type: ignore[call-overload]
    await errand_boy.asyncio.run("sleep", "3")  # type: ignore[call-overload]
    await errand_boy.asyncio.run(["cat"], limits={"cpus": 1})  # type: ignore[call-overload]
    async for each in errand_boy.asyncio.map(commands, encoding="utf-8", max_workers=8):
        assert_type(each.stdout, str)
    errand_boy.asyncio.map(commands, max_worker=8)  # type: ignore[call-overload]
    daemon = errand_boy.asyncio.connect()
    assert_type((await daemon.run(["ls"], text=True)).stdout, str)


def green() -> None:
    with errand_boy.gevent.Popen(["ls"], stdout=PIPE, text=True, nice=5) as process:
        takes_the_standard_librarys(process)
    assert_type(errand_boy.gevent.check_output(["ls"]), bytes)
    assert_type(errand_boy.gevent.run(["ls"], text=True).stdout, str)
    errand_boy.gevent.Popen(["ls"], rlimit={})  # type: ignore[call-overload]
    errand_boy.gevent.run(["ls"], limits={"cpus": 1})  # type: ignore[call-overload]
    errand_boy.eventlet.run(["ls"], limits={"cpus": 1})  # type: ignore[call-overload]
    assert_type(errand_boy.eventlet.Popen(["ls"]).wait(), int)
    assert_type(errand_boy.eventlet.check_output(["ls"], encoding="utf-8"), str)
    errand_boy.eventlet.run(["ls"], timeot=5)  # type: ignore[call-overload]


def celery(app: Any) -> None:
    task = errand_boy.celery.run_command
    pending = task.delay(["ls"], timeout=60, limits={"memory": "1G"})
    assert_type(pending.get(timeout=5), errand_boy.celery.Outcome)
    assert_type(pending.get()["returncode"], int | None)
    assert_type(task(["ls"], shell=False)["stdout"], str | None)
    task.apply_async((["ls"],), {"timeout": 60}, queue="slow")
    task.delay(["ls"], timeot=60)  # type: ignore[call-arg]
    task.delay(["ls"], limits={"cpus": 1})  # type: ignore[arg-type]
    task.delay(7)  # type: ignore[arg-type]
    errand_boy.celery.map(app, [["ls"]], timeot=60)  # type: ignore[call-arg]
    for outcome in errand_boy.celery.map(app, [["ls"], {"args": ["ls"]}], ordered=True, within=9):
        assert_type(outcome["duration"], float)


def terminal() -> None:
    process = errand_boy.ptyprocess.PtyProcessUnicode.spawn(["vi"], dimensions=(50, 132))
    assert_type(process.read(), str)
    process.setwinsize(24, 80)
    errand_boy.ptyprocess.PtyProcess.spawn("vi", echoes=True)  # type: ignore[call-arg]
