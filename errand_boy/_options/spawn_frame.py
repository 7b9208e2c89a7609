"""The frame of a request, with the state that the child inherits."""

from __future__ import annotations

import os

from errand_boy._native import ffi, lib
from errand_boy._options.request import numbers

TYPE_CHECKING = False  # typing takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from errand_boy._options.request import Request
    from errand_boy._wire.connection import Connection

MOST_ATTEMPTS = 100  # threads with different ids replace each other's helper
_MOST_SPARE = 8

_spare: list[SpawnFrame] = []


class Caller:
    """The state of the calling thread at the time when this was made."""

    __slots__ = ("c",)

    def __init__(self) -> None:
        c = lib.eb_caller_new()
        if c == ffi.NULL:
            raise MemoryError
        self.c: Any = ffi.gc(c, lib.eb_caller_free)
        check(lib.eb_caller_read(c, ffi.NULL, 0, lib.EB_WITH_ROOT, -1, 0, 0))
        lib.eb_caller_close(c)


class SpawnFrame:
    """A reusable buffer for the frame of a request, and the connection for it."""

    __slots__ = ("_c", "connection", "is_sent")

    def __init__(self) -> None:
        c = lib.eb_spawn_frame_new()
        if c == ffi.NULL:
            raise MemoryError
        self._c: Any = ffi.gc(c, lib.eb_spawn_frame_free)
        self.connection: Connection | None = None
        self.is_sent: bool = True  # `prepare` has sent all of it, so `done` has nothing to release

    def read(self, start: Caller, helper: int) -> int:
        """Read the calling thread's state; return the flags of csrc/caller."""
        caller = ffi.addressof(self._c, "caller")
        return check(lib.eb_caller_read(caller, start.c, helper, 0, -1, 0, 0))

    def prepare(
        self,
        request: Request,
        start: Caller | None,
        helper: int,
        flags: int,
        connection: Connection | None,
    ) -> int:
        """Read the calling thread's state, build the frame, and send it if that does not wait.

        Return the flags of csrc/caller: without EB_FITS there is no frame. If the number is
        negative, nothing has been sent; pass it to `check`. (After an exception, which can only
        come from outside, the frame may have been sent.)
        """
        self.is_sent = False
        if connection is None:
            fd, device, inode = -1, 0, 0
        else:
            fd, device, inode = connection.sock.fileno(), connection.device, connection.inode
        others = ffi.new("int[]", request.others) if request.others else ffi.NULL
        carried = ffi.new("int[]", numbers(request.carried)) if request.carried else ffi.NULL
        found: int = lib.eb_send_request(
            self._c,
            ffi.NULL if start is None else start.c,
            helper,
            request.flags | flags,
            fd,
            device,
            inode,
            request.options,
            len(request.options),
            *request.standard,
            others,
            len(request.others),
            carried,
            len(request.carried),
        )
        self.is_sent = found >= 0 and found & lib.EB_SENT != 0
        return found

    @property
    def rest(self) -> memoryview:
        """The unsent part of the frame; valid until the next `prepare` or `done`."""
        c = self._c
        if c.sent == c.size:  # its memory may have been released
            return memoryview(b"")
        return memoryview(ffi.buffer(c.frame, c.size))[c.sent :]

    @property
    def fds(self) -> list[int]:
        """The unsent descriptors, which must be sent with the frame's first byte."""
        c = self._c
        return [] if c.sent else ffi.unpack(c.fds, c.fd_count) if c.fd_count else []

    def sending(self) -> Generator[tuple[int, bool], None, None]:
        """Send the unsent part. Raises what Connection.send raises.

        Yields (descriptor, True) whenever the descriptor must become writable first.
        """
        assert self.connection is not None
        fds, most = self.fds, lib.EB_MOST_FDS_SENT
        while frame := self.rest:
            data = frame[:1] if len(fds) > most else frame
            try:
                self._c.sent += self.connection.send_some(data, fds[:most])
            except BlockingIOError:
                yield self.connection.sock.fileno(), True
            else:
                fds = fds[most:]

    def done(self) -> None:
        """Release the memory of this request, and keep this object for reuse."""
        if not self.is_sent:
            lib.eb_spawn_frame_done(self._c)
        self.connection = None
        if len(_spare) < _MOST_SPARE:
            _spare.append(self)


def acquire() -> SpawnFrame:
    """Return a spare SpawnFrame, or a new one."""
    try:
        return _spare.pop()
    except IndexError:
        return SpawnFrame()


def forget() -> None:
    """Drop the spare SpawnFrames."""
    _spare.clear()


def check(found: int) -> int:
    """Return the flags of csrc/caller. Raises OSError if they are a negative errno."""
    if found < 0:
        raise OSError(-found, os.strerror(-found))
    return found


# A forked process must not read the state of its parent's threads.
os.register_at_fork(after_in_child=forget)
