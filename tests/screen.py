"""A program in a terminal, and the screen that it writes on, which pyte emulates."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import PATIENCE, find_program, script_environment

import errand_boy
from errand_boy.terminal import wait_for

pyte: Any = pytest.importorskip("pyte", reason="needs the package pyte")
errand: Any = errand_boy
select = importlib.import_module("select")

# Nothing of the user's; the size that it knows is in the status line.
SIZE = "set laststatus=2 statusline=%{&lines}x%{&columns}"
VIM = ["vim", "-u", "NONE", "-N", "-n", "-c", SIZE]


class Screen:
    """A program, and the screen that it writes on."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.terminal = process.terminal
        rows, columns = self.terminal.winsize
        self.screen = pyte.Screen(columns, rows)
        # Programs ask the terminal what it is, and where its cursor is.
        self.screen.write_process_input = lambda text: self.terminal.write(text.encode())
        self._stream = pyte.ByteStream(self.screen)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def until(self, condition: Callable[[list[str]], Any]) -> None:
        """Show what is written, until the lines are as they should be."""
        while not condition(self.lines()):
            readable, _ = wait_for(select, [self.terminal.fileno()], [], PATIENCE)
            data = self.terminal.read(1 << 16) if readable else b""
            assert data, "\n".join(self.lines())
            self._stream.feed(data)

    def has(self, text: str) -> None:
        self.until(lambda lines: any(text in line for line in lines))

    def type(self, text: str) -> None:
        self.terminal.write(text.encode())

    def end(self) -> int:
        while data := self.terminal.read(1 << 16):
            self._stream.feed(data)
        status: int = self.process.wait(PATIENCE)
        return status


@contextmanager
def program(
    argv: Sequence[str], size: tuple[int, int] = (24, 80), **variables: str
) -> Iterator[Screen]:
    find_program(argv[0], argv[0].replace("top", "procps"))
    environment = {**script_environment(), "TERM": "linux", "LC_ALL": "C.UTF-8", "PS1": "prompt> "}
    environment.update(variables)
    with errand.Popen(argv, pty=size, env=environment) as process:
        yield Screen(process)
