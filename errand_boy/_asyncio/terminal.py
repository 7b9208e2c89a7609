"""The streams of an asyncio process that has a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
from typing import Any

from errand_boy._descriptors import duplicate
from errand_boy.terminal import write_some

_HIGH = 1 << 16  # bytes not typed yet; with more, writers wait


def connect(process: Any, *standard: Any) -> tuple[Any, Any, Any]:
    """Give a Popen a file from which to read its terminal, in place of a pipe.

    `standard` are the arguments for the command's standard streams. Return them with PIPE for the
    stream that this file replaces.
    """
    stdin, stdout, stderr = standard
    if stdout is None:
        stdout, process.stdout = subprocess.PIPE, _copy(process.terminal)
    elif stderr is None:
        stderr, process.stderr = subprocess.PIPE, _copy(process.terminal)
    return stdin, stdout, stderr


def _copy(terminal: Any) -> io.FileIO:
    return io.FileIO(duplicate(terminal.fileno()))


class Keyboard(asyncio.WriteTransport):
    """Types at a terminal, without waiting; close() types the end of the input.

    The loops' transports for pipes do not serve: uvloop's reads too. `owner` is the process's
    transport, which uses this object as the pipe to the command and as that pipe's protocol.
    """

    disconnected = False

    def __init__(self, loop: asyncio.AbstractEventLoop, terminal: Any, owner: Any) -> None:
        super().__init__()
        self.pipe = self
        self._loop = loop
        self._terminal = terminal
        self._owner = owner
        self._rest = bytearray()
        self._closing = False
        self._ended = False
        self._paused = False
        os.set_blocking(terminal.fileno(), False)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        if not self._rest:
            self._loop.add_writer(self._terminal.fileno(), self._go_on)
        self._rest += data
        self._go_on()
        if len(self._rest) > _HIGH and not self._paused:
            self._paused = True
            self._owner._protocol.pause_writing()

    def _go_on(self) -> None:
        if self._ended:
            return
        try:
            with memoryview(self._rest) as rest:
                done = write_some(self._terminal.fileno(), rest)
            del self._rest[:done]
        except OSError as error:  # EIO: the command has ended
            self._end(BrokenPipeError(*error.args))
            return
        if not self._rest:
            self._loop.remove_writer(self._terminal.fileno())
            if self._paused:
                self._paused = False
                self._owner._protocol.resume_writing()
            if self._closing:
                self._end()

    def _end(self, error: Exception | None = None) -> None:
        if self._ended:
            return
        self._closing = self._ended = True
        if not self._terminal.closed:
            if self._rest:
                self._loop.remove_writer(self._terminal.fileno())
            with contextlib.suppress(OSError):
                os.write(self._terminal.fileno(), self._terminal.end_of_input(False))
        self._rest.clear()
        self._loop.call_soon(self._lose, error)

    def _lose(self, error: Exception | None) -> None:
        self.disconnected = True  # not before: the process's transport expects to hear of it
        self._owner._pipe_connection_lost(0, error)

    def close(self) -> None:
        self._closing = True
        if not self._rest:
            self._end()

    def abort(self) -> None:
        self._end()

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return len(self._rest)

    def can_write_eof(self) -> bool:
        return False
