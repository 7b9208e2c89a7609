"""One framed connection to a helper."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Sequence

from errand_boy import protocol
from errand_boy._native import lib
from errand_boy.errors import HelperDiedError, ProtocolError
from errand_boy.protocol import Exited, Failed, Reply, Spawned

_MAX_REPLY = 4096  # bytes; the longest is a reason or a resource usage


_Ancillary = list[tuple[int, int, bytes]]


def _rights(fds: Sequence[int]) -> _Ancillary:
    if not fds:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]


class NotServedError(Exception):
    """The helper has gone without having read the request: it may be sent to another one."""


class Connection:
    """A socket whose other end a helper serves, one command at a time."""

    __slots__ = ("_buffer", "_greeted", "_opened", "device", "inode", "sock")

    def __init__(self, sock: socket.socket) -> None:
        info = os.fstat(sock.fileno())
        self.sock = sock
        self.device = info.st_dev
        self.inode = info.st_ino
        self._buffer = b""
        self._opened = False
        self._greeted = False

    def close(self) -> None:
        """Close the socket, unless its descriptor has become somebody else's."""
        if self.is_ours():
            self.sock.close()
        else:
            self.sock.detach()

    def is_ours(self) -> bool:
        """Return whether the descriptor still is the socket that it was."""
        try:
            info = os.fstat(self.sock.fileno())
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == (self.device, self.inode)

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send one frame with its descriptors.

        Raises NotServedError if the helper has gone, ProtocolError with its reason if it refused
        the connection, and OSError for descriptors that cannot be sent.
        """
        opening = b"" if self._opened else protocol.OPENING
        self._opened = True
        try:
            if len(fds) <= lib.EB_MAX_FDS_PER_SEND:
                data = opening + frame
                sent = self.sock.sendmsg([data], _rights(fds))
                if sent < len(data):
                    self.sock.sendall(memoryview(data)[sent:])
            else:
                self.sock.sendall(opening)  # its bytes are no place for the frame's descriptors
                self._send_in_batches(frame, fds)
        except (BrokenPipeError, ConnectionResetError):
            # What was sent is not a whole request, so nothing has been run.
            try:
                self._frame(None)
            except HelperDiedError:
                raise NotServedError from None
            raise

    def _send_in_batches(self, frame: bytes, fds: Sequence[int]) -> None:
        data = memoryview(frame)
        most = lib.EB_MAX_FDS_PER_SEND
        for start in range(0, len(fds), most):
            self.sock.sendmsg([data[:1]], _rights(fds[start : start + most]))
            data = data[1:]
        self.sock.sendall(data)

    def receive(self, timeout: float | None = None) -> Reply:
        """Return the next reply.

        Raises TimeoutError after `timeout` seconds, NotServedError or HelperDiedError if the
        helper has gone before or after it read what was sent, and ProtocolError.
        """
        kind, payload = self._frame(timeout)
        try:
            reply = protocol.reply(kind, payload)
        except struct.error:
            reply = None
        if reply is None:
            raise ProtocolError(errno.EPROTO, f"reply {kind} of {len(payload)} bytes")
        return reply

    def start(
        self, frame: bytes, fds: Sequence[int]
    ) -> tuple[Spawned | Failed | None, BaseException | None]:
        """Send a request; return its outcome, and what interrupted the wait for it.

        An exception that comes in from outside (KeyboardInterrupt, a greenlet's Timeout) must not
        cost the command's pid: the outcome is awaited nevertheless, and is None if the request had
        not been sent whole. The connection is of no use then.
        """
        try:
            self.send(frame, fds)
            reply = self.receive()
        except (NotServedError, OSError):
            raise
        except BaseException as interruption:
            # After its end the helper answers what came whole, then closes: this wait is bounded.
            self.sock.shutdown(socket.SHUT_WR)
            try:
                reply = self.receive()
            except (NotServedError, OSError):
                return None, interruption
            return self._outcome(reply), interruption
        return self._outcome(reply), None

    @staticmethod
    def _outcome(reply: Reply) -> Spawned | Failed:
        if isinstance(reply, Exited):
            raise ProtocolError(errno.EPROTO, "EXITED in answer to SPAWN")
        return reply

    def _frame(self, timeout: float | None) -> tuple[int, bytes]:
        deadline = None if timeout is None else time.monotonic() + timeout
        size = protocol.HEADER.size
        while True:
            if len(self._buffer) >= size:
                length, kind = protocol.HEADER.unpack_from(self._buffer)
                if length > _MAX_REPLY:
                    raise ProtocolError(errno.EPROTO, f"reply of {length} bytes")
                end = size + length
                if len(self._buffer) >= end:
                    payload = self._buffer[size:end]
                    self._buffer = self._buffer[end:]
                    if kind == lib.EB_REFUSED:
                        reason = payload.decode("utf-8", "replace")
                        raise ProtocolError(errno.EPROTO, f"the helper refused: {reason}")
                    if kind != lib.EB_HELLO:
                        return kind, payload
                    (version,) = struct.unpack_from("<I", payload)
                    if version != lib.EB_VERSION:
                        raise ProtocolError(
                            errno.EPROTO,
                            f"the helper speaks version {version} of the protocol, this client "
                            f"version {lib.EB_VERSION}: restart the older one",
                        )
                    self._greeted = True
                    continue
            self._buffer += self._recv(deadline)

    def _recv(self, deadline: float | None) -> bytes:
        if deadline is not None:
            self.sock.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            data = self.sock.recv(_MAX_REPLY)
        except BlockingIOError:
            raise TimeoutError from None
        except ConnectionResetError:
            # The kernel says so when the other end was closed with bytes that nobody read
            # (unix_release_sock): then the request was never whole on the other side.
            raise NotServedError from None
        finally:
            if deadline is not None:
                self.sock.settimeout(None)
        if not data:
            if not self._greeted:
                raise NotServedError
            raise HelperDiedError(
                errno.EPIPE,
                "errand-boy's helper ended before it answered: the command may have been started",
            )
        return data
