"""The frame of a request: what was asked for, and what the child inherits."""

from __future__ import annotations

import os

from errand_boy._native import ffi, lib
from errand_boy._request import numbers

TYPE_CHECKING = False  # typing takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from errand_boy._connection import Connection
    from errand_boy._request import Request

MOST_ATTEMPTS = 100  # attempts at one command, of a process whose threads differ in what they are
_MOST_SPARE = 8

_spare: list[SpawnFrame] = []


class Caller:
    """The state of the thread that made this, as the kernel had it then."""

    __slots__ = ("c",)

    def __init__(self) -> None:
        c = lib.eb_caller_new()
        if c == ffi.NULL:
            raise MemoryError
        self.c: Any = ffi.gc(c, lib.eb_caller_free)
        check(lib.eb_caller_read(c, ffi.NULL, 0, lib.EB_WITH_ROOT, -1, 0, 0))
        lib.eb_caller_close(c)


class SpawnFrame:
    """The frame of a request, for reuse; and the connection that it goes over."""

    __slots__ = ("_c", "connection", "is_sent")

    def __init__(self) -> None:
        c = lib.eb_spawn_frame_new()
        if c == ffi.NULL:
            raise MemoryError
        self._c: Any = ffi.gc(c, lib.eb_spawn_frame_free)
        self.connection: Connection | None = None
        self.is_sent: bool = True  # whole, by `prepare`, and so `done` has nothing to release

    def read(self, start: Caller, helper: int) -> int:
        """Read the calling thread's state; return what was found, as csrc/caller has it."""
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
        """Read the calling thread's state, and build the frame; send it where that does not wait.

        Returns what was found, as csrc/caller has it: without EB_FITS there is no frame. A negative
        number is for `check`: then nothing has been sent. (An exception comes from outside, and
        tells nothing of that.)
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
        """What has not been sent of the frame; valid until the next `prepare` or `done`."""
        c = self._c
        if c.sent == c.size:  # its memory may have been released
            return memoryview(b"")
        return memoryview(ffi.buffer(c.frame, c.size))[c.sent :]

    @property
    def fds(self) -> list[int]:
        """The descriptors that have not been sent; they belong to the frame's first byte."""
        c = self._c
        return [] if c.sent else ffi.unpack(c.fds, c.fd_count) if c.fd_count else []

    def sending(self) -> Generator[tuple[int, bool], None, None]:
        """Send what has not been sent; raises what Connection.send does.

        Yields (descriptor, True) whenever that has to be writable first.
        """
        assert self.connection is not None
        fds, most = self.fds, lib.EB_MAX_FDS_PER_SEND
        while frame := self.rest:
            data = frame[:1] if len(fds) > most else frame
            try:
                self._c.sent += self.connection.send_some(data, fds[:most])
            except BlockingIOError:
                yield self.connection.sock.fileno(), True
            else:
                fds = fds[most:]

    def done(self) -> None:
        """Release what only this request needed, and be spare."""
        if not self.is_sent:
            lib.eb_spawn_frame_done(self._c)
        self.connection = None
        if len(_spare) < _MOST_SPARE:
            _spare.append(self)


def acquire() -> SpawnFrame:
    """Return a spare one, or a new one."""
    try:
        return _spare.pop()
    except IndexError:
        return SpawnFrame()


def forget() -> None:
    """Let go of the spare ones."""
    _spare.clear()


def check(found: int) -> int:
    """Return what was found; raise OSError for a negative number, as csrc/caller has it."""
    if found < 0:
        raise OSError(-found, os.strerror(-found))
    return found


# Another process must not read the state of its parent's threads.
os.register_at_fork(after_in_child=forget)
