"""Starts by a helper: sends the request over a connection, and receives the outcome."""

from __future__ import annotations

import contextlib
import errno
import posix
import socket
from collections.abc import Generator

from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import lib
from errand_boy._options.request import Request
from errand_boy._options.spawn_frame import MOST_ATTEMPTS, acquire
from errand_boy._process.child import HelperChild, helper_child
from errand_boy._process.driver import Driver
from errand_boy._wire.connection import Connection
from errand_boy._wire.frames import Failed, Reply, Spawned
from errand_boy.errors import ErrandBoyError, HelperError, NotServedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._process.driver import Outcome, Steps, Wait


def by_helper(process: Any, request: Request, source: Any, driver: Driver) -> Outcome:
    """Have a helper start a command, and return the outcome."""
    for _ in range(MOST_ATTEMPTS):
        if not driver.blocking:
            yield from source.until_reachable()
        spawn_frame = acquire()
        connection: Any = None
        is_sent = False
        try:
            try:
                connection = source.acquire(request, spawn_frame)
                if not driver.blocking:
                    yield from spawn_frame.sending()
                elif not spawn_frame.is_sent:
                    connection.send(spawn_frame.rest, spawn_frame.fds)
            finally:
                connection = spawn_frame.connection
                is_sent = spawn_frame.is_sent or not spawn_frame.rest
                spawn_frame.done()
            reply = yield from _answer(connection, driver)
            _take(process, connection, reply)
        except NotServedError:
            connection.discard()
        except ErrandBoyError:
            if connection is not None:
                connection.close()
            raise
        except BaseException:
            if connection is not None and not vars(process).get("_child_created"):
                _interrupt(process, connection, is_sent, source, driver)
            raise
        else:
            if helper_child(process) is None:
                connection.give_back()
            return reply if isinstance(reply, Failed) else None
    text = "the helper ends as soon as it is asked to start a command"
    how = getattr(source, "how_it_ended", None)  # a daemon's source has no such method
    raise HelperError(errno.EPIPE, text if how is None else f"{text}, {how()}{SEE_DOCTOR}")


def _answer(connection: Connection, driver: Driver) -> Generator[Wait, None, Spawned | Failed]:
    if driver.blocking:
        lib.eb_await_readable(connection.sock.fileno())
        return connection.answer()
    while True:
        yield connection.sock.fileno(), False
        with contextlib.suppress(TimeoutError):  # only a part of the answer has arrived
            return connection.answer(0.0)


def _take(process: Any, connection: Connection, reply: Reply) -> None:
    """Store the outcome in the process object. Calling it again has no effect."""
    if isinstance(reply, Spawned):
        if reply.by_helper and helper_child(process) is None:
            process._helper_child = HelperChild(connection)
        process.pid = reply.pid
        process._child_created = True
    elif isinstance(reply, Failed) and reply.pid > 0:
        with contextlib.suppress(ChildProcessError):  # somebody waited for any child
            posix.waitpid(reply.pid, 0)


def _interrupt(
    process: Any, connection: Connection, is_sent: bool, source: Any, driver: Driver
) -> None:
    """Handle a start that was interrupted, if its command may be running."""
    if not is_sent and not driver.blocking:  # exactly known: the exception came while it waited
        connection.close()
    elif source.is_daemon and not driver.ends_interrupted:
        # The child is not ours to wait for, so the outcome is not needed. It could take long, if
        # the command waits for its turn; closing withdraws it.
        connection.close()
    else:
        driver.conclude(process, _conclude(process, connection, driver))


def _conclude(process: Any, connection: Connection, driver: Driver) -> Steps:
    """Receive the outcome after all, because this process must wait for its child."""
    try:
        reply = connection.reply
        if reply is None:
            if driver.blocking:
                # The helper answers complete requests and then closes, so this wait is bounded.
                connection.sock.shutdown(socket.SHUT_WR)
            reply = yield from _answer(connection, driver)
        _take(process, connection, reply)
    except (NotServedError, OSError):
        pass
    finally:
        if helper_child(process) is None:
            connection.close()
