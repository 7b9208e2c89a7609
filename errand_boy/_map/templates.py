"""Makes the requests of many similar commands, and connections for them."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from errand_boy._descriptors import duplicate
from errand_boy._native import lib
from errand_boy._options import request as _request
from errand_boy._options.spawn_frame import Caller, acquire, check
from errand_boy._process import helper as _helper
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from errand_boy._process.helper import Helper
    from errand_boy._wire.connection import Connection

    Source: TypeAlias = "LocalSource | DaemonSource"

_RECHECK = 0.005  # seconds for which the caller's state, except its ids, counts as unchanged
_GRACE = 1000  # milliseconds from SIGTERM to SIGKILL
_MOST_PROGRAMS = 1000  # for which a template keeps the common part of requests

# Looking up attributes of lib takes several times as long.
_SPAWN, _ARGV, _MOST = lib.EB_SPAWN, lib.EB_TAG_ARGV, lib.EB_MAX_FRAME
_WITH_FS = lib.EB_WITH_CWD | lib.EB_WITH_UMASK
_BEGINNING = struct.Struct("<IBBII")  # of a SPAWN frame, up to its arguments
_QUEUE = struct.Struct("<IB")
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


class LocalSource:
    """Sends commands to a helper of this process."""

    queues = True
    _helper: Helper | None = None
    _ids: tuple[Any, ...] = ()
    _checked = 0.0

    def changed(self) -> bool:
        """Make sure that there is a helper that fits this process; return whether it is new."""
        # Ids are compared at each start. Comparing the rest (capabilities, limits, session and so
        # on) takes 15 µs.
        ids = (os.getresuid(), os.getresgid(), os.getgroups())
        helper, now = _helper.runner.current, time.monotonic()
        if (
            self._helper is helper is not None
            and ids == self._ids
            and now - self._checked < _RECHECK
        ):
            return False
        while helper is None or not helper.fits(None):
            _helper.runner.start()
            before, helper = helper, _helper.runner.current
            if helper is not before:  # it was just found to fit
                break
        if helper is not None:
            helper.owns_children = True
        before, self._helper = self._helper, helper
        self._ids, self._checked = ids, now
        return before is not helper

    def state(self) -> tuple[Caller | None, int, int]:
        """Return the arguments of `prepare` for a request: caller, helper's pid and flags."""
        helper = self._helper
        assert helper is not None
        return (helper.caller, helper.pid, 0) if helper.shares_fs else (helper.caller, 0, _WITH_FS)

    def is_there(self) -> bool:
        """Return whether the helper is alive."""
        return self._helper is not None and self._helper.is_there()

    def connect(self) -> Connection | None:
        """Return a connection, or None if the helper has ended."""
        helper = self._helper
        if helper is None:
            return None
        try:
            connection: Connection | None = helper.idle.pop()
        except IndexError:
            connection = helper.connect()
        if connection is None:
            _helper.runner.dismiss(helper)
            return None
        if connection.is_ours():
            return connection
        connection.close()
        return None


class DaemonSource:
    """Sends commands to a daemon."""

    queues = False
    _ids: tuple[int, int] | None = None

    def __init__(self, client: Any) -> None:
        self._client = client

    def changed(self) -> bool:
        """Return whether the ids have changed, so that the daemon may see another user."""
        before, self._ids = self._ids, (os.geteuid(), os.getegid())
        return before != self._ids

    def state(self) -> tuple[Caller | None, int, int]:
        """Return the arguments of `prepare` for a request: caller, helper's pid and flags."""
        return None, 0, _WITH_FS

    def is_there(self) -> bool:
        """Return False: a daemon that is short of descriptors lets clients wait."""
        return False

    def connect(self) -> Connection | None:
        """Return a connection. Raises NoDaemonError and RefusedError."""
        connection: Connection = self._client.connection()
        return connection


class Template:
    """The common part of the requests of commands with the same options."""

    __slots__ = ("_carried", "_options", "_path", "_programs", "fds", "streams")

    def __init__(
        self,
        streams: int,
        options: bytes,
        fds: list[int],
        carried: Sequence[Any],
        path: list[bytes],
    ) -> None:
        self.streams = streams  # in the format of STREAMS
        self.fds = fds
        self._carried = carried  # keeps the objects alive that would close them
        self._options = options
        self._path = path
        self._programs: dict[Any, bytes] = {}

    def frame(self, argv: Sequence[Any]) -> bytes:
        """Return a SPAWN frame. Raises ValueError, TypeError and OSError (E2BIG)."""
        program = argv[0]
        common = self._programs.get(program)
        if common is None:
            common = self._common(os.fsencode(program))
            if len(self._programs) < _MOST_PROGRAMS:
                self._programs[program] = common
        try:
            if type(program) is bytes:
                text = b"\0".join(argv) + b"\0"
            else:
                text = "\0".join(argv).encode(_ENCODING, _ERRORS) + b"\0"
        except TypeError:
            text = b"\0".join([os.fsencode(arg) for arg in argv]) + b"\0"
        if text.count(0) != len(argv):
            raise ValueError("embedded null byte")
        # ARGV's own header, then the arguments after the program.
        size = 9 + len(text) + len(common)
        if size > _MOST:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        return _BEGINNING.pack(size, _SPAWN, _ARGV, len(text) + 4, len(argv)) + text + common

    def _common(self, name: bytes) -> bytes:
        return _request.programs(name, lambda: self._path) + self._options


class Templates:
    """The templates of one `map`. `options` apply where a command has none of its own."""

    def __init__(
        self, source: Source, options: Mapping[str, Any], stdout: Any, stderr: Any
    ) -> None:
        self._source = source
        self._options = options
        self._outputs = stdout, stderr
        self._known: dict[tuple[Any, ...], Template] = {}
        self._cwd_fd = -1

    def get(
        self,
        options: Mapping[str, Any] | None,
        with_input: bool,
        brief: bool,
        queue: tuple[int, int] | None,
    ) -> Template:
        """Return the template for a command; `options` are its own. Raises as `settings` does."""
        if options is not None:
            return self._make(options, with_input, brief, queue)
        key = with_input, brief, queue
        template = self._known.get(key)
        if template is None:
            template = self._known[key] = self._make(self._options, *key)
        return template

    def forget(self) -> None:
        """Drop all templates."""
        self._known.clear()
        if self._cwd_fd >= 0:
            os.close(self._cwd_fd)
            self._cwd_fd = -1

    def _make(
        self,
        options: Mapping[str, Any],
        with_input: bool,
        brief: bool,
        queue: tuple[int, int] | None,
    ) -> Template:
        stdin = subprocess.PIPE if with_input else subprocess.DEVNULL
        common = b"" if queue is None else frames.option(lib.EB_TAG_QUEUE, _QUEUE.pack(*queue))
        streams, request = _request.streamed(
            common, stdin, *self._outputs, on_close=_GRACE, brief=brief, **options
        )
        start, helper, with_fs = self._source.state()
        request.flags |= with_fs
        spawn_frame = acquire()
        try:
            check(spawn_frame.prepare(request, start, helper, 0, None))
            tail, fds = bytes(spawn_frame.rest[frames.HEADER.size :]), spawn_frame.fds
            if request.flags & lib.EB_WITH_CWD:
                at = len(fds) - len(request.carried) - 1
                if self._cwd_fd < 0:
                    self._cwd_fd = duplicate(fds[at])
                fds[at] = self._cwd_fd
        finally:
            spawn_frame.done()
        return Template(streams, tail, fds, request.carried, _request.exec_path(options["env"]))
