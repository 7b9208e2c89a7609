"""A Popen of another class, seen as one of errand-boy's."""

from __future__ import annotations

import contextlib
from functools import partial

from errand_boy import _child, _direct, _popen
from errand_boy._connection import Connection
from errand_boy._frame import SpawnFrame
from errand_boy._native import lib
from errand_boy._wire import Failed, Spawned
from errand_boy.errors import NotServedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


def sending(connection: Connection, spawn_frame: SpawnFrame) -> Iterator[None]:
    """Send what has not been sent of a request; yields whenever the socket takes nothing now."""
    fds, most = spawn_frame.fds, lib.EB_MAX_FDS_PER_SEND
    while frame := spawn_frame.rest:
        try:
            sent = connection.send_some(frame[:1] if len(fds) > most else frame, fds[:most])
        except BlockingIOError:
            yield
        else:
            spawn_frame.count_sent(sent)
            fds = fds[most:]


class Adapter(_popen.Popen[bytes]):
    """errand_boy.Popen's methods over the attributes of `process`, which is of another class.

    Nothing is added to that class, whose subclasses may have names of their own. `original` starts
    the command as that class does, for what cannot be sent.
    """

    __slots__ = ("_original", "_process")

    def __init__(self, process: Any, original: Callable[[], None] | None = None) -> None:
        self.__dict__ = process.__dict__
        self._process = process
        self._original = original

    def __del__(self) -> None:
        """Leave everything to the process's own."""

    def _execute_original(self, given: tuple[Any, ...]) -> None:
        assert self._original is not None
        self._original()


class GreenAdapter(Adapter):
    """The same, for a framework of greenlets: others go on while the command is being started."""

    __slots__ = ()

    _patience_us = _direct.LOOP_PATIENCE_US

    def _pause(self, seconds: float) -> None:
        raise NotImplementedError

    def _until_readable(self, connection: Connection) -> None:
        raise NotImplementedError

    def _until_writable(self, connection: Connection) -> None:
        raise NotImplementedError

    def _spawn(self, function: Callable[..., None], *args: Any) -> None:
        raise NotImplementedError

    def _await_start(self, start: object) -> tuple[int, int] | None:
        outcome: tuple[int, int] | None
        pauses = _direct.pauses()
        try:
            while (outcome := _direct.await_spawn(self, start, 0)) is start:
                self._pause(next(pauses))
        finally:
            _direct.leave_spawn(start)
        return outcome

    def _outcome(self, connection: Connection, spawn_frame: SpawnFrame) -> Spawned | Failed:
        for _ in sending(connection, spawn_frame):
            self._until_writable(connection)
        return self._answer(connection)

    def _answer(self, connection: Connection) -> Spawned | Failed:
        while True:
            self._until_readable(connection)
            with contextlib.suppress(TimeoutError):  # only a part of it has come
                return connection.answer(0.0)

    def _abandon(self, spawn_frame: SpawnFrame, error: BaseException) -> None:
        connection = spawn_frame.connection
        if connection is None or isinstance(error, OSError):
            super()._abandon(spawn_frame, error)
        elif spawn_frame.rest:  # not sent whole: nothing has been started
            connection.close()
        elif connection.reply is None:
            # A greenlet's Timeout must not make the others wait. The command may run, and then it
            # must be waited for.
            self._spawn(self._conclude, connection)
        else:
            self._take(connection.reply, connection)

    def _conclude(self, connection: Connection) -> None:
        with contextlib.suppress(NotServedError, OSError):
            self._take(self._answer(connection), connection)
        if self._connection is None:
            connection.close()


# What a class that derives from the standard library's Popen does with its children, once they may
# be the helper's; `original` is the method that it has.


def execute_child(
    view: type[Adapter], original: Callable[..., None], process: Any, *args: Any
) -> None:
    """Start a command for `process`; `args` are those of _execute_child."""
    view(process, partial(original, process, *args))._execute_child(*args)


def internal_poll(
    original: Callable[..., int | None], process: Any, *args: Any, **kwargs: Any
) -> int | None:
    """Return the return code, or None."""
    if vars(process).get("_connection") is None:
        return original(process, *args, **kwargs)
    return Adapter(process)._internal_poll(*args, **kwargs)


def wait(original: Callable[..., int], process: Any, timeout: float | None) -> int:
    """Return the return code; see subprocess.Popen._wait."""
    if vars(process).get("_connection") is not None:
        return Adapter(process)._wait(timeout)
    if _child.STDLIB_POLLS and _child.wait(process, timeout):
        returncode: int = process.returncode
        return returncode
    return original(process, timeout)


def send_signal(original: Callable[..., None], process: Any, sig: int) -> None:
    """Send a signal to the process."""
    if vars(process).get("_connection") is not None:
        Adapter(process).send_signal(sig)
    elif not _child.send_signal(process, sig):
        original(process, sig)
