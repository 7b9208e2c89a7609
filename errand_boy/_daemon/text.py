"""The text protocol: a command line and its input in, one answer out; see docs/protocol.md."""

from __future__ import annotations

import errno
import os
import select
import selectors
import socket
import time
from collections.abc import Callable

from errand_boy._daemon.strangers import receive
from errand_boy._native import lib
from errand_boy._spool import Spool, nameless_file
from errand_boy._wire import frames
from errand_boy._wire.frames import Failed
from errand_boy._wire.stream import Ended, Event, Lost, Output, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._daemon.helper import Keep
    from errand_boy._daemon.peer import Peer
    from errand_boy._daemon.services import Services

_END = b"\r\n\r\n"
_SHELL = b"/bin/sh"

_LONGEST_LINE = (128 << 10) - 1  # bytes: MAX_ARG_STRLEN, without the NUL
_MOST_INPUT = 64 << 20  # bytes
_MOST_ERRORS = 64 << 20
_IN_MEMORY = 32 << 10  # bytes of input or errors; more are in a file
_CHUNK = 32 << 10
_STREAMS = 0b111  # all three

_NOT_RUN = 127  # a shell's return code for a command that is not found,
_NOT_RUNNABLE = 126  # and for one that can't be run;
_UNKNOWN = 255  # ssh's, if the command's own is not known

_MOST_ATTEMPTS = 50
_MOST_SILENCES = 10  # times `patience` until a request must be complete
_PAUSE = 0.02  # seconds between attempts: a helper's sockets close before its death is known


class _Request:
    """A client's request. `refusal`: why it is refused, or ""; `whole`: whether it is complete.

    Refused requests are read to the end too, because the client reads the answer only then.
    """

    def __init__(self, server: Services) -> None:
        self.line = bytearray()
        self._server = server
        self.input = Spool(_IN_MEMORY, nameless_file)
        self.refusal = ""
        self.whole = False
        self._has_line = False
        self._tail = b""  # the last bytes, if they may begin the end mark

    def feed(self, data: bytes) -> None:
        """Add data; drop what comes after the end of the request."""
        data = self._tail + data
        while not self.whole:
            part, end, data = data.partition(_END)
            if not end:
                self._take(part[: 1 - len(_END)])
                self._tail = part[1 - len(_END) :]
                return
            self._take(part)
            if not self._has_line and _is_http(self.line):
                self._refuse("this is not an HTTP server")
            self.whole, self._has_line = self._has_line, True

    def end(self) -> None:
        """Handle the end of the stream. It completes the input, but not a command line."""
        if self._has_line and not self.whole:
            self._take(self._tail)
            self.whole = True

    def state(self, keep: Keep) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `restore`."""
        return {
            "line": self.line.hex(),
            "has_line": self._has_line,
            "input": self.input.state(keep),
            "tail": self._tail.hex(),
            "refusal": self.refusal,
            "whole": self.whole,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`."""
        self.line += bytes.fromhex(state["line"])
        self._has_line = state["has_line"]
        self.input.restore(state["input"])
        self._tail = bytes.fromhex(state["tail"])
        self.refusal = state["refusal"]
        self.whole = state["whole"]

    def _take(self, part: bytes) -> None:
        if self.refusal:
            return
        if not self._has_line:
            self.line += part
            if len(self.line) > _LONGEST_LINE:
                self._refuse(f"a command line has at most {_LONGEST_LINE} bytes")
            elif 0 in part:
                self._refuse("a command line must not hold a NUL byte")
        elif self.input.size + len(part) > _MOST_INPUT:
            self._refuse(f"the input has at most {_MOST_INPUT} bytes")
        else:
            try:
                self._server.take(len(part))
                self.input.write(part)
            except OSError as error:
                self._refuse(f"cannot keep the input: {error.strerror}")

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self.close()

    def close(self) -> None:
        """Drop the data of the request."""
        self.line.clear()
        self.input.close()


def _is_http(line: bytearray) -> bool:
    """Return whether a command line begins like an HTTP request.

    If the socket is forwarded to TCP, a web page can make the user's browser send one.
    """
    first = line.partition(b"\n")[0].rstrip()
    return first[-9:-1] == b" HTTP/1."


class _Command:
    """A helper's command with streamed output, which begins with `start`. Closing this ends it.

    `on_output` is called with its output; `on_end` once, with its return code and a message from
    errand-boy itself. Its standard error is kept until then.
    """

    def __init__(
        self,
        server: Services,
        request: _Request,
        on_output: Callable[[bytes], None],
        on_end: Callable[[int, str], None],
    ) -> None:
        self.errors = Spool(_IN_MEMORY, nameless_file)
        self._server = server
        self._request = request
        self._on_output = on_output
        self._on_end = on_end
        self._attempts = 0
        self._note = ""
        self._closed = False
        self._paused = False
        self._sock: socket.socket | None = None  # None before `start` and between two attempts

    def start(self) -> None:
        """Have a helper start the command; try another one if it has died. Raises OSError."""
        self._attempts += 1
        self._sock = self._server.pool.connect()
        self._sock.setblocking(False)
        self._stream = Stream()
        self._request.input.rewind()
        request = frames.OPENING + _spawn(bytes(self._request.line))
        self._stream.begin(_STREAMS, False, request, self._request.input)
        self._send()

    def state(self, keep: Keep) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `restore`."""
        return {
            "sock": None if self._sock is None else keep(self._sock.fileno()),
            "stream": None if self._sock is None else self._stream.state(),
            "errors": self.errors.state(keep),
            "attempts": self._attempts,
            "note": self._note,
            "closed": self._closed,
            "paused": self._paused,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`."""
        self.errors.restore(state["errors"])
        self._attempts = state["attempts"]
        self._note = state["note"]
        self._closed = state["closed"]
        self._paused = state["paused"]
        if state["sock"] is not None:
            self._sock = socket.socket(fileno=state["sock"])
            self._sock.setblocking(False)
            self._stream = Stream()
            self._stream.restore(state["stream"], self._request.input)
            self._watch()
        elif not self._closed:
            self._server.call_later(0, self._start_again)

    def pause(self, paused: bool) -> None:
        """Stop taking output, or go on."""
        if self._paused != paused and not self._closed:
            self._paused = paused
            if self._sock is not None:
                self._watch()

    def close(self) -> None:
        """End the command, if it has not ended."""
        if not self._closed:
            self._closed = True
            self._disconnect()

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._server.watch(self._sock, 0)
            self._server.close(self._sock)
            self._sock = None

    def _watch(self) -> None:
        assert self._sock is not None
        events = 0 if self._paused else selectors.EVENT_READ
        if self._stream.unsent:
            events |= selectors.EVENT_WRITE
        self._server.watch(self._sock, events, self._on_events)

    def _on_events(self, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._receive()
            if self._sock is not None:
                self._send()
        except Exception:  # the client must not wait for ever
            if not self._closed:
                self._finish(_UNKNOWN, "internal error; command ended")
            raise

    def _send(self) -> None:
        assert self._sock is not None
        if self._stream.unsent:
            try:
                self._stream.count_sent(self._sock.send(self._stream.unsent, socket.MSG_NOSIGNAL))
            except BlockingIOError:
                pass
            except OSError:  # reading will show why
                self._stream.unsent = b""
        self._watch()

    def _receive(self) -> None:
        assert self._sock is not None
        try:
            data = receive(self._sock, _CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._take(self._stream.end(error.errno == errno.ECONNRESET))
            return
        if not data:
            self._take(self._stream.end())
            return
        for event in self._stream.receive(data):
            self._take(event)
            if self._closed:
                break

    def _take(self, event: Event) -> None:
        if isinstance(event, Output):
            if event.number == 0:
                self._on_output(event.data)
            else:
                self._keep(event.data)
        elif isinstance(event, Ended):
            self._finish(event.returncode, self._note)
        elif isinstance(event, Failed):
            self._finish(*_failure(event))
        elif isinstance(event, Lost):
            self._on_lost(event)

    def _keep(self, errors: bytes) -> None:
        if self.errors.size + len(errors) > _MOST_ERRORS:
            self._note = f"standard error is cut off after {_MOST_ERRORS} bytes"
        if self._note:
            return
        try:
            self._server.take(len(errors))
        except OSError as error:
            self._note = f"standard error is cut off: {error.strerror}"
            return
        try:
            self.errors.write(errors)
        except OSError as error:
            self._finish(_UNKNOWN, f"cannot keep standard error: {error.strerror}; command ended")

    def _finish(self, code: int, note: str) -> None:
        self.close()
        self._on_end(code, note)

    def _on_lost(self, lost: Lost) -> None:
        if lost.reason is not None:
            self._finish(_NOT_RUN, lost.reason)
        elif not lost.may_resend:
            self._finish(_UNKNOWN, "the command's helper has died; it may have been run")
        elif self._attempts == _MOST_ATTEMPTS:
            self._finish(_NOT_RUN, "the daemon's helpers die")
        else:
            self._disconnect()
            self._server.call_later(_PAUSE, self._start_again)

    def _start_again(self) -> None:
        if not self._closed:
            try:
                self.start()
            except OSError as error:
                self._closed = True
                self._on_end(_NOT_RUN, error.strerror or str(error))


def _spawn(line: bytes) -> bytes:
    return frames.frame(
        lib.EB_SPAWN,
        [
            frames.strings(lib.EB_TAG_EXECUTABLES, [_SHELL]),
            frames.strings(lib.EB_TAG_ARGV, [_SHELL, b"-c", line]),
            frames.option(lib.EB_TAG_STREAMS, bytes([_STREAMS])),
            frames.number(lib.EB_TAG_PGROUP, 0),
        ],
    )


def _failure(reply: Failed) -> tuple[int, str]:
    reason = os.strerror(reply.errno)
    code = _NOT_RUN if reply.errno == errno.ENOENT else _NOT_RUNNABLE
    if reply.stage == lib.EB_STAGE_EXEC:
        return code, f"{os.fsdecode(_SHELL)}: {reason}"
    return code, f"cannot start a command: {frames.stage_name(reply.stage)}: {reason}"


def refusal(reason: str) -> bytes:
    """Return the complete answer to a request that is refused."""
    return b"\r\n0:\r\n1:" + _ending(_NOT_RUN, reason)


def _ending(code: int, note: str) -> bytes:
    """Return the end of an answer, after standard error. `note`: errand-boy's message, or ""."""
    said = b"errand-boy: " + os.fsencode(note) + b"\n" if note else b""
    return said + _END + str(code).encode() + _END


class TextConnection:
    """A connection that speaks the text protocol."""

    def __init__(self, sock: socket.socket, peer: Peer, server: Services) -> None:
        self._sock = sock
        self._peer = peer
        self._server = server
        self._request = _Request(server)
        self._command: _Command | None = None
        self._begun = False
        self._closed = False
        self._half_closed = False
        self._out = bytearray()
        self._trailer: bytes | None = None  # the end of the answer, when it is known
        self._heard = time.monotonic()
        self._latest = self._heard + _MOST_SILENCES * server.limits.patience
        self._timer = server.call_later(server.limits.patience, self._on_time)
        self._watch()

    def _watch(self) -> None:
        events = 0 if self._half_closed else selectors.EVENT_READ
        if self._out:
            events |= selectors.EVENT_WRITE
        self._server.watch(self._sock, events, self._on_events)

    def _on_events(self, events: int) -> None:
        if events & selectors.EVENT_WRITE and self._out:
            self._send()
        if events & selectors.EVENT_READ and not (self._closed or self._half_closed):
            self._receive()

    def _on_time(self) -> None:
        patience = self._server.limits.patience
        now = time.monotonic()
        rest = min(self._heard + patience, self._latest) - now
        if rest > 0:
            self._timer = self._server.call_later(rest, self._on_time)
            return
        self._begun = True
        if now >= self._latest:
            patience *= _MOST_SILENCES
            self._refuse(f"the request was not complete after {patience:g} seconds")
        else:
            self._refuse(f"the request was not complete, and nothing came for {patience:g} seconds")

    # -- the request --

    def _receive(self) -> None:
        try:
            data = receive(self._sock, _CHUNK)
        except BlockingIOError:
            return
        except OSError:  # it may have sent descriptors
            self._close()
            return
        if data:
            self._heard = time.monotonic()
            self._request.feed(data)
        elif self._has_gone():
            self._close()
            return
        else:
            self._request.end()
            if not self._request.whole:
                self._close()
                return
            self._await_hangup()
        if self._request.whole and not self._begun:
            self._begin()

    def _has_gone(self) -> bool:
        """Return whether the client has closed its socket, not only its sending side."""
        poll = select.poll()
        poll.register(self._sock, 0)  # POLLHUP
        return bool(poll.poll(0))

    def _await_hangup(self) -> None:
        self._half_closed = True
        self._server.await_hangup(self._sock, self._close)
        self._watch()

    def _begin(self) -> None:
        self._begun = True
        self._timer.cancel()
        if self._request.refusal:
            self._refuse(self._request.refusal)
            return
        self._out += b"\r\n0:"
        command = self._new_command()
        try:
            command.start()
        except OSError as error:
            self._refuse(error.strerror or str(error))
        else:
            self._command = command

    def _new_command(self) -> _Command:
        return _Command(self._server, self._request, self._on_output, self._on_end)

    # -- handing over to the successor --

    def state(self, keep: Keep) -> dict[str, Any]:
        """Return what the server's successor needs to know, for `restore`."""
        return {
            "sock": keep(self._sock.fileno()),
            "request": self._request.state(keep),
            "command": None if self._command is None else self._command.state(keep),
            "begun": self._begun,
            "half_closed": self._half_closed,
            "out": self._out.hex(),
            "trailer": None if self._trailer is None else self._trailer.hex(),
            "heard": self._heard,
            "latest": self._latest,
            "held": self._server.held,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`."""
        self._server.take(state["held"])
        self._request.restore(state["request"])
        self._out += bytes.fromhex(state["out"])
        trailer = state["trailer"]
        self._trailer = None if trailer is None else bytes.fromhex(trailer)
        self._heard = state["heard"]
        self._latest = state["latest"]
        self._begun = state["begun"]
        self._timer.cancel()
        if not self._begun:
            self._timer = self._server.call_later(0, self._on_time)
        if state["half_closed"]:
            self._await_hangup()
        if state["command"] is not None:
            self._command = self._new_command()
            self._command.restore(state["command"])
        self._watch()

    # -- the answer --

    def _refuse(self, reason: str) -> None:
        self._log(reason)
        self._out[:] = refusal(reason)
        self._trailer = b""
        self._send()

    def _on_output(self, data: bytes) -> None:
        self._out += data
        self._send()

    def _on_end(self, code: int, note: str) -> None:
        self._request.close()
        self._out += b"\r\n1:"
        self._trailer = _ending(code, note)
        if note:
            self._log(note)
        self._send()

    def _log(self, note: str) -> None:
        self._server.log.warning(
            "text request", outcome=note, pid=self._peer.pid, uid=self._peer.uid
        )

    def _send(self) -> None:
        while True:
            if not self._out:
                self._out += self._next_output()
                if not self._out:
                    break
            try:
                sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:
                self._close()
                return
            del self._out[:sent]
        if not self._out and self._trailer == b"":
            self._close()
            return
        self._watch()
        if self._command is not None:
            self._command.pause(bool(self._out))

    def _next_output(self) -> bytes:
        if self._trailer is None:
            return b""
        if self._command is not None:
            errors = self._command.errors.read(_CHUNK)
            if errors:
                return errors
        trailer, self._trailer = self._trailer, b""
        return trailer

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        if self._half_closed:
            self._server.forget_hangup(self._sock)
        self._server.watch(self._sock, 0)
        self._server.close(self._sock)
        self._request.close()
        # Break a reference cycle that keeps large buffers.
        command, self._command = self._command, None
        if command is not None:
            command.close()
            command.errors.close()
        self._server.forget(self)
