"""A pytest plugin for tests of programs that start commands through errand-boy.

With ``pytest_plugins = ["errand_boy.testing"]`` in the topmost ``conftest.py``, tests can ask for
the fixture `fake_commands`, a FakeCommands.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from errand_boy._map import command as _command
from errand_boy._options import request as _request
from errand_boy._process import start as _start

__all__ = ["FakeCommands", "UnexpectedCommandError", "fake_commands"]

Command: TypeAlias = "str | Sequence[Any]"

_SHELL, _GIVEN = 9, 2  # index of `shell` in _execute_child's arguments, after args and executable
_SCRIPT = '[ -z "$1" ] || "$0" "$1"; [ -z "$2" ] || "$0" "$2" >&2; '


class UnexpectedCommandError(AssertionError):
    """The program tried to start a command that is not registered; it was not started."""


class FakeCommands:
    """Replaces commands by small ones, with the output and return code that a test has registered.

    These are real processes, so pipes, text mode, time-outs, callbacks and results work as usual.
    This covers Popen, run and the other functions of errand_boy, map and Executor, asyncio, gevent,
    eventlet and Celery's task, the client of a daemon, and everything under errand_boy.patch().
    """

    def __init__(self, directory: Path) -> None:
        self.calls: list[Any] = []  # the args of each command, in order; a str with shell=True
        self._directory = directory
        self._fakes: list[tuple[Command, list[list[str] | None]]] = []

    def register(
        self,
        args: Command,
        *,
        stdout: str | bytes = b"",
        stderr: str | bytes = b"",
        returncode: int = 0,
    ) -> None:
        """Make `args` write this output and end with this return code; -N means signal N.

        `args` is an argument list, or a string: a shell command or a program without arguments. In
        a list, unittest.mock.ANY matches any one argument, and ``...`` at the end any others. Text
        is encoded in UTF-8. Later registrations come first. If the same `args` are registered
        several times, they give these results in turn, and the last one from then on.
        """
        script = _SCRIPT + (f"exit {returncode}" if returncode >= 0 else f"kill -{-returncode} $$")
        files = [self._file(data) for data in (stdout, stderr)]
        self._add(args, ["/bin/sh", "-c", script, shutil.which("cat") or "/bin/cat", *files])

    def allow(self, args: Command) -> None:
        """Let commands that match `args`, which are as in `register`, run."""
        self._add(args, None)

    def _add(self, args: Command, fake: list[str] | None) -> None:
        for registered, fakes in self._fakes:
            if registered == args:
                fakes.append(fake)
                return
        self._fakes.insert(0, (args, [fake]))

    def _file(self, data: str | bytes) -> str:
        if not data:
            return ""
        path = self._directory / f"output-{len(os.listdir(self._directory))}"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    def _instead_of(self, args: Any, shell: bool) -> list[str] | None:
        """Return the replacement of a command, or None to run the command itself."""
        words = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
        given: Any = [os.fsdecode(word) for word in words]
        if shell:
            given = given[0]
        self.calls.append(given)
        for registered, fakes in self._fakes:
            if _matches(registered, given):
                return fakes.pop(0) if len(fakes) > 1 else fakes[0]
        known = "".join(f"\n    {registered!r}" for registered, _ in self._fakes) or " nothing"
        raise UnexpectedCommandError(
            f"the program tried to start {given!r}, which no test has registered. Call "
            f"fake_commands.register({given!r}, stdout=..., returncode=...), or "
            f"fake_commands.allow({given!r}) to have it run. Registered:{known}"
        )


def _matches(registered: Command, given: Any) -> bool:
    if isinstance(registered, str):
        return given in (registered, [registered])
    if isinstance(given, str):
        return False
    wanted = [word if word is ... or _is_wild(word) else os.fsdecode(word) for word in registered]
    if wanted[-1:] == [...]:
        return bool(wanted[:-1] == given[: len(wanted) - 1])
    return bool(wanted == given)


def _is_wild(word: Any) -> bool:
    return not isinstance(word, (str, bytes, os.PathLike))


class _Chosen(list[Any]):
    """Arguments that have been looked up already."""


@pytest.fixture
def fake_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCommands]:
    """Replace commands by those that the test registers."""
    directory = tmp_path / "fake-commands"
    directory.mkdir()
    fakes = FakeCommands(directory)
    begin: Callable[..., Any] = _start.begin
    arguments: Callable[..., list[Any]] = _request.arguments
    make: Callable[..., Any] = _command.Jobs.make

    def begin_fake(process: Any, given: tuple[Any, ...], *rest: Any) -> Any:
        fake = fakes._instead_of(given[0], given[_SHELL])
        if fake is not None:
            between = given[_GIVEN:_SHELL]
            given = (_Chosen(fake), None, *between, False, *given[_SHELL + 1 :])
        else:
            given = (_chosen(given[0]), *given[1:])
        return begin(process, given, *rest)

    def fake_arguments(args: Any, shell: bool, executable: Any = None) -> list[Any]:
        if isinstance(args, _Chosen):
            return arguments(args, shell, executable)
        fake = fakes._instead_of(args, shell)
        return _Chosen(arguments(args, shell, executable) if fake is None else fake)

    def make_fake(jobs: Any, index: int, command: Any) -> Any:
        job = make(jobs, index, command)
        if not isinstance(job.argv, _Chosen):
            job.argv = fake_arguments(job.argv, False)
        return job

    monkeypatch.setattr(_start, "begin", begin_fake)
    monkeypatch.setattr(_request, "arguments", fake_arguments)
    monkeypatch.setattr(_command.Jobs, "make", make_fake)
    yield fakes


def _chosen(args: Any) -> _Chosen:
    return _Chosen([args] if isinstance(args, (str, bytes, os.PathLike)) else args)
