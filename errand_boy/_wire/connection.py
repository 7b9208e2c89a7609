"""One framed connection to a helper."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Sequence

from errand_boy._native import (
    ffi as _ffi,  # noqa: F401  without the extension it says why
    lib,
)
from errand_boy._wire import frames
from errand_boy._wire.frames import Exited, Failed, Reply, Spawned
from errand_boy.errors import HelperDiedError, NotServedError, ProtocolError

TYPE_CHECKING = False  # typing takes milliseconds to import
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any

_NOSIGNAL = socket.MSG_NOSIGNAL  # SIGPIPE may have its default action here
SEND_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
_BUFFER_SIZE = 512  # bytes, more than the longest reply, a REFUSED
_HEADER_SIZE = frames.HEADER.size
_KIND = _HEADER_SIZE - 1  # the offset of a frame's kind

_unpack_header = frames.HEADER.unpack_from

_Ancillary = list[tuple[int, int, bytes]]


def _rights(fds: Sequence[int]) -> _Ancillary:
    if not fds:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def close_all() -> None:
    """Close the parent's connections in a forked process."""
    for connection in list(_connections):
        connection.close()


class Connection:
    """A socket whose other end a helper serves, one command at a time.

    `pool` keeps it between commands: a helper of this process, or the client of a daemon. (Their
    modules import this one, so this one can't import their types.)
    """

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_owner",
        "_size",
        "device",
        "greeted",
        "inode",
        "lock",
        "pool",
        "reply",
        "sock",
    )

    def __init__(self, sock: socket.socket, pool: Any = None) -> None:
        info = os.fstat(sock.fileno())
        sock.settimeout(None)  # whatever socket.setdefaulttimeout says
        self.sock: socket.socket = sock
        self.pool: Any = pool
        self._owner = os.getpid()
        self.device: int = info.st_dev
        self.inode: int = info.st_ino
        self._buffer = bytearray(_BUFFER_SIZE + _HEADER_SIZE)  # zeros at the end
        self._size = 0  # bytes in the buffer
        self.greeted: bool = False
        self.reply: Reply | None = None  # the last one that was received
        # Held while a signal is sent to the live command, and while that command gives the
        # connection back. It is reentrant, because a signal handler may send a signal to the
        # command of the code that it interrupts.
        self.lock: AbstractContextManager[Any] = threading.RLock()
        _connections.add(self)

    def close(self) -> None:
        """Close the socket, unless its number now belongs to another file."""
        if not self.is_ours():
            self.sock.detach()
            return
        if self._owner == os.getpid():
            # Copies in forked processes must not keep the helper alive.
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def give_back(self) -> None:
        """Return it to its pool, after its command has ended or if that is the caller's child."""
        self.reply = None
        self.pool.take_back(self)

    def discard(self) -> None:
        """Close it, because it broke before the helper read the request."""
        self.pool.discard(self)

    def is_ours(self) -> bool:
        """Return whether the descriptor is still the same socket."""
        try:
            info = os.fstat(self.sock.fileno())
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == (self.device, self.inode)

    def is_foreign(self) -> bool:
        """Return whether this process was forked from the one that made the connection."""
        return self._owner != os.getpid()

    def open(self) -> None:
        """Send the connection's first bytes. Raises BrokenPipeError if the helper has ended."""
        self.sock.sendall(frames.OPENING, _NOSIGNAL)

    def send(self, frame: bytes | memoryview, fds: Sequence[int] = ()) -> None:
        """Send one frame, or the rest of one, with its descriptors.

        Raises NotServedError if the helper has ended, ProtocolError with its reason if it refused
        the connection, and OSError for descriptors that cannot be sent.
        """
        data = memoryview(frame)
        most = lib.EB_MOST_FDS_SENT
        try:
            for start in range(0, len(fds) - most, most):
                self.sock.sendmsg([data[:1]], _rights(fds[start : start + most]), _NOSIGNAL)
                data = data[1:]
            last = fds[(len(fds) - 1) // most * most :] if fds else fds
            sent = self.sock.sendmsg([data], _rights(last), _NOSIGNAL)
            if sent < len(data):
                self.sock.sendall(data[sent:], _NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_unserved()
            raise

    def _raise_unserved(self) -> None:
        # The request was not sent in full, so no command has run.
        try:
            self.receive()
        except HelperDiedError:
            raise NotServedError from None

    def send_some(self, data: memoryview, fds: Sequence[int]) -> int:
        """Send as much as possible without waiting, and all of `fds`; return how many bytes.

        Raises BlockingIOError if none can be sent now, and the exceptions of `send`.
        """
        try:
            return self.sock.sendmsg([data], _rights(fds), _NOSIGNAL | socket.MSG_DONTWAIT)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_unserved()
            raise

    def send_signal(self, pid: int, number: int) -> None:
        """Have the helper send a signal to the live command; a negative `pid` means its group.

        Whoever receives replies, maybe another thread, will notice if the helper has ended.
        """
        frame = frames.frame(lib.EB_SIGNAL, [struct.pack("<ii", pid, number)])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(frame, _NOSIGNAL)

    def has_received(self) -> bool:
        """Return whether part of the next reply is in the buffer, where poll() can't see it."""
        return self._size > 0

    def receive(self, timeout: float | None = None) -> Reply:
        """Return the next reply.

        Raises TimeoutError after `timeout` seconds; NotServedError if the helper ended before it
        read the request, HelperDiedError if it ended later; and ProtocolError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        buffer = self._buffer
        if buffer[self._size + _KIND]:
            self._count_received()
        while True:
            if self._size >= _HEADER_SIZE:
                length, kind = _unpack_header(buffer)
                size = _HEADER_SIZE + length
                if size > _BUFFER_SIZE:
                    raise ProtocolError(errno.EPROTO, f"reply of {length} bytes")
                if self._size >= size:
                    payload = bytes(buffer[_HEADER_SIZE:size])
                    try:
                        reply = frames.reply(kind, payload)
                    except struct.error:
                        reply = None
                    if reply is not None:
                        break
                    self.take_other(kind, payload)
                    self._consume(size)
                    continue
            self._receive_some(deadline)
        self._consume(size, reply)
        return reply

    def answer(self, timeout: float | None = None) -> Spawned | Failed:
        """Return the answer to a request, as `receive` does. Raises ProtocolError for another."""
        reply = self.receive(timeout)
        if isinstance(reply, Exited):
            raise ProtocolError(errno.EPROTO, "EXITED in answer to SPAWN")
        return reply

    def take_other(self, kind: int, payload: bytes) -> None:
        """Handle a frame that is not an answer to a request.

        Raises NotServedError, RefusedError and ProtocolError.
        """
        if kind == lib.EB_HELLO:
            frames.check_version(payload)
            self.greeted = True
        elif kind == lib.EB_UNREAD:
            raise NotServedError
        elif kind == lib.EB_REFUSED:
            raise frames.refusal(payload.decode("utf-8", "replace"), self.greeted)
        else:
            raise ProtocolError(errno.EPROTO, f"reply {kind} of {len(payload)} bytes")

    def _receive_some(self, deadline: float | None) -> None:
        try:
            if deadline is not None:
                self.sock.settimeout(max(0.0, deadline - time.monotonic()))
            if self._size == 0:
                size = self.sock.recv_into(self._buffer, _BUFFER_SIZE)
            else:
                rest = memoryview(self._buffer)[self._size : _BUFFER_SIZE]
                size = self.sock.recv_into(rest)
        except BlockingIOError:
            raise TimeoutError from None
        except ConnectionResetError:
            # ECONNRESET: the other end was closed with unread bytes (unix_release_sock). So the
            # helper never read the whole request.
            raise NotServedError from None
        finally:
            if deadline is not None:
                self.sock.settimeout(None)
        if size == 0:
            if not self.greeted:
                raise NotServedError
            raise HelperDiedError(
                errno.EPIPE,
                "errand-boy's helper ended before it answered: the command may have been started",
            )
        self._size += size

    def _consume(self, size: int, reply: Reply | None = None) -> None:
        whole = self._size
        rest = self._buffer[size:whole] + bytes(size)  # zeros, see _count_received
        # No call comes between these, so no exception from outside either: a reply is in the buffer
        # or in `reply`, where whoever was interrupted looks for it.
        self._buffer[:whole] = rest
        self._size = whole - size
        self.reply = reply

    def _count_received(self) -> None:
        """Count the frames that an interrupted _receive_some has received but not counted."""
        while self._buffer[self._size + _KIND] != 0:
            length, _ = _unpack_header(self._buffer, self._size)
            self._size = min(self._size + _HEADER_SIZE + length, _BUFFER_SIZE)
