"""Programs of users, for type checkers: nothing here is run.

What must be an error is ignored by its code, and mypy complains of an ignored error that is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from signal import SIGKILL, SIGTERM

from typing_extensions import assert_type

import errand_boy
from errand_boy import PIPE, Sandbox


def popen() -> None:
    assert_type(errand_boy.Popen(["ls"], stdout=PIPE), errand_boy.Popen[bytes])
    assert_type(errand_boy.Popen("ls", shell=True, text=True), errand_boy.Popen[str])
    assert_type(errand_boy.Popen(["ls"], encoding="utf-8", cwd="/"), errand_boy.Popen[str])
    assert_type(errand_boy.Popen(["ls"], -1, None, PIPE, PIPE), errand_boy.Popen[bytes])
    process = errand_boy.Popen(["ls"], tree="all", stop=((SIGTERM, 5), SIGKILL), pty=(24, 80))
    assert_type(process.stop(), int)
    assert_type(process.cause, str | None)
    errand_boy.Popen(["ls"], rlimits={"nofile": 10}, sandbox=Sandbox(read=["/usr"]), nice=5)
    errand_boy.Popen(["ls"], rlimit={"nofile": 10})  # type: ignore[call-overload]
    errand_boy.Popen(["ls"], nice="5")  # type: ignore[call-overload]


def run() -> None:
    assert_type(errand_boy.run(["ls"], capture_output=True).stdout, bytes)
    assert_type(errand_boy.run(["ls"], text=True, timeout=5, tree="all").cause, str)
    errand_boy.run(["ls"], input="text", text=True, limits={"memory": "1G", "cpu": 10})
    errand_boy.run(["ls"], timeot=5)  # type: ignore[call-overload]
    assert_type(errand_boy.check_output(["ls"]), bytes)
    assert_type(errand_boy.check_output(["ls"], text=True), str)
    assert_type(errand_boy.call(["ls"], timeout=1, umask=0o77), int)
    errand_boy.call(["ls"], capture_output=True)  # type: ignore[call-arg]


def client() -> None:
    daemon = errand_boy.connect()
    assert_type(daemon.check_output(["ls"], encoding="utf-8"), str)
    assert_type(daemon.run(["ls"], check=True).returncode, int)


def lines(commands: list[list[str]]) -> Iterator[int]:
    for done in errand_boy.map(commands, max_workers=8, timeout=60):
        yield done.returncode
