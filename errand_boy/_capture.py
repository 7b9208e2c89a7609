"""A daemon's commands whose output is wanted whole: it comes with their end, in one message."""

from __future__ import annotations

import contextlib
import errno
import functools
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping

from errand_boy import _helper, _remote, _wire
from errand_boy._connection import Connection
from errand_boy._frame import MOST_ATTEMPTS, acquire
from errand_boy._native import lib
from errand_boy._request import Request, made_by_helper
from errand_boy._wire import Failed
from errand_boy.errors import HelperDiedError, NotServedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, AnyStr
else:
    AnyStr = str

_CHUNK = 1 << 16  # bytes
_PIPE = subprocess.PIPE
_INPUTS = (None, subprocess.DEVNULL)
_OUTPUTS = (None, subprocess.DEVNULL, _PIPE)
_OUTPUT_KINDS = lib.EB_STDOUT, lib.EB_STDERR
_HEADER_SIZE = _wire.HEADER.size
_MORE = struct.Struct("<Qi")  # of a brief command's EXITED: microseconds and pid
_KILL = _wire.frame(lib.EB_SIGNAL, [struct.pack("<ii", 0, signal.SIGKILL)])
_BRIEF = _wire.option(lib.EB_TAG_BRIEF)

_unpack_header = _wire.HEADER.unpack_from


def can_be(options: Mapping[str, Any]) -> bool:
    """Return whether a command with Popen's `options` can be one of these."""
    outputs = options.get("stdout"), options.get("stderr")
    return (
        options.get("stdin") in _INPUTS
        and outputs[0] in _OUTPUTS
        and outputs[1] in (*_OUTPUTS, subprocess.STDOUT)
        and _PIPE in outputs
    )


def runner(popen: type[Popen[Any]], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return subprocess.run by `popen` for the commands that it is for, else by `plain`."""

    @functools.wraps(plain)
    def run(
        *args: Any,
        input: Any = None,
        capture_output: bool = False,
        timeout: float | None = None,
        check: bool = False,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        wanted = options
        if capture_output and options.get("stdout") is options.get("stderr") is None:
            wanted = {**options, "stdout": _PIPE, "stderr": _PIPE}
            capture_output = False
        if input is not None or capture_output or len(args) > 1 or not can_be(wanted):
            given = {"input": input, "capture_output": capture_output, "timeout": timeout}
            done: subprocess.CompletedProcess[Any] = plain(*args, **given, check=check, **wanted)
            return done
        process = popen(*args, time_limit=timeout, **wanted)
        done = subprocess.CompletedProcess(process.args, process.returncode, *process.streams)
        if check:
            done.check_returncode()
        return done

    return run


class Popen(_remote.Popen[AnyStr]):
    """A command that has ended: the constructor waits for that, and for the end of its output.

    `streams` are its standard output and error output, None where they are not PIPE. After
    `time_limit` seconds the command is killed, and TimeoutExpired has what it wrote until then.
    """

    if TYPE_CHECKING:
        text_mode: bool

        def _translate_newlines(self, data: bytes, encoding: str, errors: str) -> str: ...

    def __init__(self, *args: Any, time_limit: float | None, **kwargs: Any) -> None:
        self._time_limit = time_limit
        self._chunks: list[list[bytes]] = [[], []]
        super().__init__(*args, **kwargs)
        self.streams = self._output(True)

    def _get_handles(self, stdin: Any, stdout: Any, stderr: Any) -> tuple[int, ...]:
        # In place of the ends of pipes, which the helper makes.
        self._piped, options, fds = made_by_helper(stdin, stdout, stderr)
        # The time of one that waits for its turn in the daemon begins with the news of its start.
        if self._time_limit is None:
            options += _BRIEF
        if not self._more_options:
            options += _wire.number(lib.EB_TAG_ON_CLOSE, lib.EB_LIVES_ON)
        self._more_options += options
        return fds[0], -1, -1, fds[1], -1, fds[2]

    def _start(self, request: Request) -> Failed | None:
        request.flags |= lib.EB_WITHOUT_STANDARD
        spawn_frame = acquire()
        try:
            for _ in range(MOST_ATTEMPTS):
                try:
                    connection = self._client.acquire(request, spawn_frame)
                    if not spawn_frame.is_sent:
                        connection.send(spawn_frame.rest, spawn_frame.fds)
                    failed = self._collect(connection)
                except BaseException as error:
                    _abandon(spawn_frame.connection)
                    if isinstance(error, NotServedError):
                        continue
                    raise
                connection.give_back()
                return failed
        finally:
            spawn_frame.done()
        raise _helper.ends_at_once()

    def _collect(self, connection: Connection) -> Failed | None:
        sock, chunks, rest = connection.sock, self._chunks, b""
        deadline: float | None = None
        left = (self._piped >> 1 & 1) + (self._piped >> 2 & 1)  # outputs that have not ended
        killed = False
        while left or self.returncode is None:
            try:
                data = _receive(sock, deadline)
            except TimeoutError:
                if killed or self.returncode is not None:
                    raise self._expired() from None
                sock.sendall(_KILL, socket.MSG_NOSIGNAL)
                killed, deadline = True, None
                continue
            except ConnectionResetError:
                data = b""
                if not killed:  # what the helper has not read is the request
                    raise NotServedError from None
            if not data:
                if not connection.greeted:
                    raise NotServedError
                raise HelperDiedError(
                    errno.EPIPE, "errand-boy's helper ended: the command may have been started"
                )
            rest += data
            at = 0
            while len(rest) - at >= _HEADER_SIZE:
                length, kind = _unpack_header(rest, at)
                end = at + _HEADER_SIZE + length
                if end > len(rest):
                    break
                payload = rest[at + _HEADER_SIZE : end]
                at = end
                if kind in _OUTPUT_KINDS:
                    if payload:
                        chunks[kind - _OUTPUT_KINDS[0]].append(payload)
                    else:
                        left -= 1
                elif kind == lib.EB_EXITED:
                    status, *usage = _wire.EXITED.unpack_from(payload)
                    self._usage = tuple(usage)
                    if len(payload) > _wire.EXITED.size:
                        _, self.pid = _MORE.unpack_from(payload, _wire.EXITED.size)
                    self._handle_exitstatus(status)
                elif kind == lib.EB_SPAWNED:
                    self.pid = int.from_bytes(payload[:4], "little")
                    if self._time_limit is not None:
                        deadline = time.monotonic() + self._time_limit
                elif kind == lib.EB_FAILED:
                    failed = _wire.reply(kind, payload)
                    assert isinstance(failed, Failed)
                    return failed
                else:
                    connection.take_other(kind, payload)
            rest = rest[at:]
            if killed and self.returncode is not None:
                raise self._expired()
        return None

    def _expired(self) -> subprocess.TimeoutExpired:
        stdout, stderr = self._output(False)
        limit = self._time_limit or 0
        return subprocess.TimeoutExpired(self.args, limit, output=stdout, stderr=stderr)

    def _output(self, whole: bool) -> list[Any]:
        """Return both outputs; in bytes, as subprocess has them, if they are not whole."""
        streams: list[Any] = [None, None]
        for number in (0, 1):
            if self._piped >> (number + 1) & 1:
                data = b"".join(self._chunks[number])
                streams[number] = data if whole else data or None
                if whole and self.text_mode:
                    streams[number] = self._translate_newlines(data, *_coding(self))
        return streams


def _coding(process: Any) -> tuple[str, str]:
    encoding = process.encoding
    if not encoding or encoding == "locale":
        import locale  # noqa: PLC0415

        encoding = locale.getpreferredencoding(False)
    return encoding, process.errors or "strict"


def _abandon(connection: Connection | None) -> None:
    """End what runs over a connection, if anything, and close it."""
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.sock.send(_KILL, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        connection.close()


def _receive(sock: socket.socket, deadline: float | None) -> bytes:
    if deadline is None:
        return sock.recv(_CHUNK)
    sock.settimeout(max(0.0, deadline - time.monotonic()))
    try:
        return sock.recv(_CHUNK)
    except BlockingIOError:
        raise TimeoutError from None
    finally:
        sock.settimeout(None)
