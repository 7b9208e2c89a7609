"""Runs all code blocks of a Markdown page in order.

Run ``python code_blocks.py PAGE`` in an empty folder. The Python blocks share one namespace, and
the shell blocks (``sh``) the folder; JSON is parsed. A comment on the line before a block marks a
special block:

``<!-- not run: why -->``: it is only shown. All languages except those and ``text`` need this.
``<!-- needs: root gevent -->``: it is left out unless all of these are available.
``<!-- background -->``: a shell command that goes on, until the end of the page.
``<!-- raises: ValueError -->``: how a Python block ends.
``<!-- exits: 124 -->``: the status of a shell block.
``<!-- output -->``: a ``text`` block with the output of the last block; ``…`` stands for anything.

``<!-- setup python`` or ``<!-- setup sh`` begins a block that readers don't see, up to ``-->``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"( *)(```+|~~~+)\s*([\w{}-]*)")
_MARK = re.compile(r" *<!-- ?(not run|needs|background|raises|exits|output)(?:: *(.*?))? ?-->")
_SETUP = re.compile(r"<!-- setup (python|sh)")
_RUN = ("python", "sh", "json", "text")


@dataclass
class Block:
    language: str
    text: str
    line: int  # of its first line, from 1
    mark: str = ""
    about: str = ""


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page. Raises ValueError for one that lacks a mark."""
    lines = page.read_text().split("\n")
    found: list[Block] = []
    mark, about, last = "", "", ""
    numbers = iter(range(len(lines)))
    for number in numbers:
        line = lines[number]
        fence, setup = _FENCE.match(line), _SETUP.match(line)
        if marked := _MARK.fullmatch(line):
            mark, about = marked[1], marked[2] or ""
            continue
        block = None
        if setup or fence:
            indent, end = (len(fence[1]), fence[2]) if fence else (0, "-->")
            language = fence[3] if fence else setup[1] if setup else ""
            text = []
            for inner in numbers:
                if lines[inner].strip() == end:
                    break
                text.append(lines[inner][indent:])
            block = Block(language, "\n".join(text) + "\n", number + 2, mark, about)
        elif re.match(r" {4}\S", line) and not last:
            block = Block("indented", line.strip() + "\n", number + 1, mark, about)
        if block is not None and not block.language.startswith("{"):  # else a directive of Sphinx
            if block.language not in _RUN and block.mark != "not run":
                text_ = f"{page.name}:{block.line}: a block of {block.language or 'no language'}"
                raise ValueError(f"{text_} needs a reason why it is not run")
            if block.mark in ("not run", "needs", "raises", "exits") and not block.about:
                raise ValueError(f"{page.name}:{block.line}: {block.mark} needs a text")
            found.append(block)
        if line.strip():
            mark = about = ""
        last = line.strip()
    return found


def _has(need: str) -> bool:
    if need == "root":
        return os.geteuid() == 0
    if need == "landlock":
        from errand_boy._native import lib  # noqa: PLC0415

        return bool(lib.eb_landlock_version() >= 6)
    if shutil.which(need):
        return True
    return importlib.util.find_spec(need) is not None


class Reader:
    """Runs the blocks of one page in the current folder."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._output = b""
        self._background: list[subprocess.Popen[bytes]] = []

    def try_all(self) -> None:
        """Run all blocks. Raises what a block raises."""
        try:
            for block in blocks(self._page):
                self._try(block)
        finally:
            for process in self._background:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()

    def _try(self, block: Block) -> None:
        if block.mark == "not run":
            return
        if block.mark == "needs" and not all(map(_has, block.about.split())):
            return
        where = f"{self._page.name}:{block.line}"
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "text":
            if block.mark == "output":
                self._compare(block.text, where)
        elif block.mark == "background":
            command = ["bash", "-c", f"exec {block.text.strip()}"]
            self._background.append(subprocess.Popen(command, process_group=0))
            _wait_for_daemon(self._background[-1])
        else:
            with self._captured():
                self._run_python(block) if block.language == "python" else self._run_sh(block)

    def _run_python(self, block: Block) -> None:
        source = "\n" * (block.line - 1) + block.text
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, str(self._page), "exec", flags)
        try:
            made = eval(code, self._names)
            if made is not None:
                import asyncio  # noqa: PLC0415

                asyncio.run(made)
        except BaseException as error:
            if block.mark != "raises" or type(error).__name__ != block.about:
                raise
        else:
            if block.mark == "raises":
                raise AssertionError(f"{self._page.name}:{block.line} did not raise {block.about}")

    def _run_sh(self, block: Block) -> None:
        status = subprocess.run(["bash", "-e", "-u", "-c", block.text]).returncode
        wanted = int(block.about) if block.mark == "exits" else 0
        if status != wanted:
            raise AssertionError(f"{self._page.name}:{block.line} exited with {status}")

    @contextlib.contextmanager
    def _captured(self) -> Iterator[None]:
        """Capture what a block writes to standard output in `_output`."""
        sys.stdout.flush()
        kept = os.dup(1)
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 1)
            try:
                yield
            finally:
                sys.stdout.flush()
                os.dup2(kept, 1)
                os.close(kept)
                file.seek(0)
                self._output = file.read()
                os.write(1, self._output)

    def _compare(self, wanted: str, where: str) -> None:
        pattern = re.escape(wanted.strip()).replace("…", ".*")
        found = self._output.decode().strip()
        if not re.fullmatch(pattern, found, re.DOTALL):
            raise AssertionError(f"{where}: wanted\n{wanted}\nfound\n{found}")


def _wait_for_daemon(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while subprocess.run(["errand-boy", "status"], capture_output=True).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError("the daemon does not answer")


if __name__ == "__main__":
    try:
        Reader(Path(sys.argv[1])).try_all()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
