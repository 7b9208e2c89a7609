"""asyncio's subprocesses, on any loop: the start is awaited, and the end arrives by pidfd.

``create_subprocess_exec``, ``create_subprocess_shell`` and ``run`` start commands as
errand_boy.Popen does, in this process or by a helper. No thread is used, and no SIGCHLD handler.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import errno
import functools
import os
import select
import signal
import socket
import subprocess
import time
import warnings
import weakref
from asyncio import base_subprocess, streams
from asyncio.log import logger
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process, SubprocessStreamProtocol
from collections import deque
from collections.abc import Callable, Coroutine
from typing import IO, Any

from errand_boy import _direct, _helper, _popen, _remote, _wire
from errand_boy._adapter import sending
from errand_boy._connection import Connection
from errand_boy._frame import MOST_ATTEMPTS, SpawnFrame, acquire
from errand_boy._request import Request
from errand_boy._wire import Failed, Spawned
from errand_boy.errors import HelperError, NotServedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from errand_boy import _client
    from errand_boy._batch import Batch, Command
    from errand_boy._result import Result

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Client",
    "Process",
    "connect",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "map",
    "run",
]

_LIMIT: int = streams._DEFAULT_LIMIT  # type: ignore[attr-defined]
_UNKNOWN = 255  # asyncio's own word for a child that somebody else has waited for
_STARTS_IN_A_TURN = 4
_MOMENT = 1.0  # seconds that a cancelled start waits for its command's end
_PAUSE = 0.01  # seconds between attempts to reach a daemon that has many others waiting

_cancelled_starts: set[_CancelledStart] = set()

# Those whose answer is awaited, or that have a live command. When that is found to be garbage,
# with its loop, it can only be ended if the connection has not been finalized before.
_in_use: set[Connection] = set()


class _Turns:
    """Spreads the starts of a loop over its turns: many at once must leave time for others."""

    def __init__(self) -> None:
        self._count = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until a start may begin."""
        if self._count < _STARTS_IN_A_TURN:
            if not self._count:
                loop.call_soon(self._next, loop)
            self._count += 1
        else:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._count = 0
        while self._waiting and self._count < _STARTS_IN_A_TURN:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                self._count += 1
        if self._count:
            loop.call_soon(self._next, loop)


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = weakref.WeakKeyDictionary()


class _Readers:
    """A loop's add_reader and remove_reader, for less: the loop watches one epoll for all.

    The loop alone holds this object for long. So what waits in a loop that has been closed and
    forgotten is found to be garbage.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], Any]] = {}
        # In no context, since the loop would keep that of the first start.
        contextvars.Context().run(loop.add_reader, self._epoll.fileno(), self._look)

    def add_reader(self, fd: int, call: Callable[[], Any]) -> None:
        self._calls[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def remove_reader(self, fd: int) -> None:
        # To close it would not do: a forked process may have a copy.
        if self._calls.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # it has been closed under us
                self._epoll.unregister(fd)

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0, max(1, len(self._calls))):
            call = self._calls.get(fd)
            if call is not None:  # else one before it has removed it
                call()


_readers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Readers]] = (
    weakref.WeakKeyDictionary()
)


def _readers_of(loop: asyncio.AbstractEventLoop) -> _Readers | asyncio.AbstractEventLoop:
    if not hasattr(select, "epoll"):  # eventlet takes it away
        return loop
    known = _readers.get(loop)
    readers = None if known is None else known()
    if readers is None:
        readers = _Readers(loop)
        _readers[loop] = weakref.ref(readers)
    return readers


class _Popen(_popen.Popen[bytes]):
    """A Popen whose constructor sends nothing: `begin` does, without blocking the loop."""

    _patience_us = _direct.LOOP_PATIENCE_US
    _request: Request | None = None
    _pending: object = None  # a start in this process, see direct.py
    _given: tuple[Any, ...] = ()  # to _execute_child
    _child_fds: tuple[int, ...] = ()
    _watch: _Watch | None = None
    lost: OSError | None = None  # why nobody knows how the command ended

    def _execute_child(self, *given: Any) -> None:
        self._given = given
        super()._execute_child(*given)

    def _start(self, request: Request) -> None:
        self._request = request

    def _await_start(self, start: object) -> None:
        self._pending = start

    def _close_pipe_fds(self, *fds: int) -> None:
        self._child_fds = fds  # still to be sent

    async def begin(self) -> _Watch:
        """Start the command. Raises what the constructor of subprocess.Popen does."""
        loop = asyncio.get_running_loop()
        try:
            reply: Spawned | Failed | None = None
            if self._pending is not None:
                reply = await self._started(loop, self._pending)
                if reply and _wire.is_refused(reply):
                    _direct.give_up()
                    self._way(False)  # raises where it is forced
                    self._execute_original(self._given)
                    reply = None
            elif self._request is not None:
                reply = await self._asked(loop, self._request)
            if isinstance(reply, Failed):
                raise _wire.spawn_error(reply, *self._names)
            try:
                return _Watch(loop, self)
            except BaseException:
                self._end()
                raise
        except BaseException as error:
            for pipe in (self.stdin, self.stdout, self.stderr):
                if pipe is not None:
                    pipe.close()
            if isinstance(error, OSError) and error.errno == errno.E2BIG and not error.filename:
                raise OSError(error.errno, error.strerror, self._names[0]) from None
            raise
        finally:
            self._given = ()
            fds, self._child_fds = self._child_fds, ()
            if fds:
                super()._close_pipe_fds(*fds)

    async def _started(self, loop: asyncio.AbstractEventLoop, start: object) -> Failed | None:
        """Await the outcome of a pending start in this process."""
        outcome: tuple[int, int] | None
        pauses = _direct.pauses()
        try:
            while (outcome := _direct.await_spawn(self, start, 0)) is start:
                await asyncio.sleep(next(pauses))
        except BaseException as error:
            cancelled = _CancelledStart(loop, self)
            if isinstance(error, asyncio.CancelledError):
                await cancelled.wait()
            raise
        finally:
            self._pending = None
            _direct.leave_spawn(start)
        return Failed(0, *outcome) if outcome else None

    async def _asked(self, loop: asyncio.AbstractEventLoop, request: Request) -> Spawned | Failed:
        """Have a helper start the command."""
        if _cancelled_starts:
            _end_cancelled_starts()
        for _ in range(MOST_ATTEMPTS):
            await self._until_reachable(loop)
            spawn_frame, connection = acquire(), None
            try:
                connection = self._acquire(request, spawn_frame)
                if spawn_frame.rest:
                    await _send(loop, connection, spawn_frame)
            except NotServedError:
                assert connection is not None
                connection.discard()
                continue
            except BaseException as error:
                if connection is None:
                    self._abandon(spawn_frame, error)
                    if self._child_created:  # an interrupt came when it had been sent
                        self._end()
                else:  # not sent whole: it will not be started
                    connection.close()
                raise
            finally:
                spawn_frame.done()
            _in_use.add(connection)
            try:
                reply = await _answer(loop, connection)
            except NotServedError:
                connection.discard()
                continue
            except Exception:
                connection.close()
                raise
            except BaseException as error:
                cancelled = _CancelledStart(loop, self, connection)
                # asyncio.run() waits for the tasks that it cancels: leave nothing for later.
                if isinstance(error, asyncio.CancelledError):
                    await cancelled.wait()
                raise
            finally:
                _in_use.discard(connection)
            self._take(reply, connection)
            if self._connection is None:
                connection.give_back()
            return reply
        raise HelperError(errno.EPIPE, "the helper ends as soon as it is asked to start a command")

    async def _until_reachable(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until `_acquire` can make a connection without waiting."""
        helper = _helper.launcher.current
        while helper is not None and not helper.idle and not _is_writable(helper._control.sock):
            with contextlib.closing(helper._control.sock.dup()) as sock:  # one waits for each start
                await _ready(loop, sock.fileno(), loop.add_writer, loop.remove_writer)
            helper = _helper.launcher.current

    # -- the end --

    def _end(self) -> None:
        """Kill a child of whose end nobody will be told."""
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            self.kill()
            self.wait(_MOMENT)

    def reap(self) -> int | None:
        """Return the return code if the child has ended."""
        if self._connection is not None:
            return self.poll()
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            except ChildProcessError:
                logger.warning(
                    "Unknown child process pid %d, will report returncode %d", self.pid, _UNKNOWN
                )
                self.returncode = _UNKNOWN
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _await_exit(self, timeout: float | None) -> None:
        connection = self._connection
        if connection is not None:
            _in_use.discard(connection)  # before it is back in its pool
        try:
            super()._await_exit(timeout)
        except TimeoutError:
            if connection is not None:
                _in_use.add(connection)
            raise
        except OSError as error:
            self.lost = error
        # Whoever read it, nothing more will come for the loop to see.
        if self._watch is not None:
            self._watch.look_soon()


class _RemotePopen(_Popen, _remote.Popen[bytes]):
    """The same for a daemon's child."""

    async def _until_reachable(self, loop: asyncio.AbstractEventLoop) -> None:
        # Nothing tells of room in the backlog of a Unix socket.
        while not self._client._idle and not _connected(self._client):
            await asyncio.sleep(_PAUSE)


def _connected(client: _client.Client) -> bool:
    """Give `client` a connection if that can be made without waiting; return whether it can."""
    from errand_boy._client import _Idle  # noqa: PLC0415

    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(client.path)
        client.address.check(sock)
    except OSError as error:
        sock.close()
        return not isinstance(error, BlockingIOError)  # it will meet others too, and explain them
    connection = _Idle(sock, client)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.open()
    connection.give_back()
    return True


def _is_writable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


async def _ready(
    loop: asyncio.AbstractEventLoop, fd: int, add: Callable[..., Any], remove: Callable[[int], Any]
) -> None:
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, tell)
    try:
        await ready
    finally:
        remove(fd)


async def _send(
    loop: asyncio.AbstractEventLoop, connection: Connection, spawn_frame: SpawnFrame
) -> None:
    """Send what has not been sent of a request."""
    for _ in sending(connection, spawn_frame):
        await _ready(loop, connection.sock.fileno(), loop.add_writer, loop.remove_writer)


async def _answer(loop: asyncio.AbstractEventLoop, connection: Connection) -> Spawned | Failed:
    readers = _readers_of(loop)
    while True:
        await _ready(loop, connection.sock.fileno(), readers.add_reader, readers.remove_reader)
        with contextlib.suppress(TimeoutError):  # only a part of it has come
            return connection.answer(0.0)


class _Watch:
    """Tells the loop when a child has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, process: _Popen) -> None:
        self._fd = -1
        self._loop = loop
        self._process = process
        self._ended: Callable[[int], Any] | None = None
        connection = process._connection
        if connection is not None:
            # A copy: the connection may be in use for another command before this is removed.
            self._fd = os.dup(connection.sock.fileno())
            process._watch = self
            _in_use.add(connection)
        else:
            with contextlib.suppress(ProcessLookupError):  # somebody has waited for it
                self._fd = os.pidfd_open(process.pid)

    def begin(self, ended: Callable[[int], Any]) -> None:
        """From now on: call `ended` with the return code, once."""
        self._ended = ended
        if self._fd >= 0:
            # As the loop's own would: what follows is in the context of the start.
            look = functools.partial(contextvars.copy_context().run, self._look)
            _readers_of(self._loop).add_reader(self._fd, look)
        connection = self._process._connection
        if self._fd < 0 or (connection is not None and connection.has_received()):
            self._loop.call_soon(self._look)

    def look_soon(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        process, ended = self._process, self._ended
        if ended is None:
            return
        watch, process._watch = process._watch, None
        returncode = process.reap()
        if returncode is None:
            process._watch = watch
            return
        self._ended = None
        if self._fd >= 0:
            _readers_of(self._loop).remove_reader(self._fd)
        self._close()
        ended(returncode)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = _close


class _CancelledStart:
    """Ends a command whose start was cancelled when it had been asked for."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        process: _Popen,
        connection: Connection | None = None,
    ) -> None:
        self._over: asyncio.Future[None] = loop.create_future()
        self.loop = loop
        self._process = process
        self._connection = connection
        if connection is None:
            self._kill()
        _cancelled_starts.add(self)
        if loop.is_closed():
            self.end_without_loop(_MOMENT)
        else:  # which may run in another thread
            loop.call_soon_threadsafe(self._await_end if connection is None else self._await_reply)

    async def wait(self) -> None:
        """Wait for its end, but not for long. Does not mind to be cancelled once more."""
        end = time.monotonic() + _MOMENT
        while not self._over.done() and (rest := end - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self._over], timeout=rest)

    def _await_reply(self) -> None:
        assert self._connection is not None
        fd = self._connection.sock.fileno()
        _readers_of(self.loop).add_reader(fd, functools.partial(self._look, fd))

    def _look(self, fd: int) -> None:
        _readers_of(self.loop).remove_reader(fd)
        try:
            self._begin(0.0)
        except TimeoutError:
            self._await_reply()
            return
        if self._process._child_created:
            self._await_end()
        else:
            self._end()

    def _await_end(self) -> None:
        try:
            _Watch(self.loop, self._process).begin(self._end)
        except OSError:  # no descriptor is free; it is subprocess that will wait for it
            self._end()

    def _begin(self, timeout: float) -> None:
        """Take the outcome, and kill the command."""
        connection, process = self._connection, self._process
        assert connection is not None
        try:
            reply = connection.receive(timeout)
        except TimeoutError:
            raise
        except (NotServedError, OSError):
            connection.close()
            return
        process._take(reply, connection)
        if isinstance(reply, Spawned):
            self._kill()
        if process._connection is None:
            connection.give_back()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has other ids
            self._process.kill()

    def _end(self, returncode: int = 0) -> None:
        _cancelled_starts.discard(self)
        if not self._over.done() and not self.loop.is_closed():
            self._over.set_result(None)

    def end_without_loop(self, timeout: float) -> None:
        """Do what can be done within so many seconds."""
        with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
            if not self._process._child_created:
                self._begin(timeout)
            if self._process._child_created:
                self._process.wait(timeout)
            self._end()


def _end_cancelled_starts() -> None:
    for cancelled in list(_cancelled_starts):
        if cancelled.loop.is_closed():
            cancelled.end_without_loop(0.0)


@atexit.register
def _end_all_cancelled_starts() -> None:
    end = time.monotonic() + _MOMENT
    for cancelled in list(_cancelled_starts):
        cancelled.end_without_loop(max(0.0, end - time.monotonic()))


class _Transport(base_subprocess.BaseSubprocessTransport):
    """asyncio's own transport, for a child that runs already."""

    _closed: bool
    _pending_calls: Any
    _pipes: dict[int, Any]
    _returncode: int | None
    _proc: _Popen | None

    def __init__(self, process: _Popen, *args: Any, **kwargs: Any) -> None:
        self._started = process
        self._exited: asyncio.Future[None] | None = None
        super().__init__(*args, **kwargs)

    def _start(self, *args: Any, **kwargs: Any) -> None:
        self._proc = self._started

    def _connect_pipes(self, waiter: asyncio.Future[Any] | None) -> Coroutine[Any, Any, None]:
        # A loop that is closed before this has begun leaves a warning that it was never awaited.
        # Whoever keeps the warning keeps the coroutine, which must not keep the command alive.
        assert waiter is not None
        return _connect(weakref.ref(self), weakref.ref(waiter))

    async def connect(self, waiter: asyncio.Future[Any] | None) -> None:
        """Connect the pipes, and tell `waiter`."""
        try:
            await super()._connect_pipes(waiter)
        except RuntimeError:
            if self._loop.is_closed():  # asyncio's tells `waiter` of GeneratorExit too, in vain
                return
            raise
        if self._closed or self._pending_calls is not None:  # closed meanwhile, or it failed
            process = self._started
            for fd, file in enumerate((process.stdin, process.stdout, process.stderr)):
                connected = self._pipes.get(fd)
                if connected is not None:
                    connected.pipe.close()
                elif file is not None:
                    file.close()

    def _process_exited(self, returncode: int) -> None:
        super()._process_exited(returncode)
        if self._exited is not None and not self._exited.done():
            self._exited.set_result(None)
        if self._started.lost is not None:
            self.close()  # its pipes, which the command may hold for long

    async def exited(self) -> None:
        """Wait for the process alone, and not for the ends of its pipes."""
        if self._returncode is None:
            self._exited = self._loop.create_future()
            await self._exited

    async def _wait(self) -> int:
        returncode: int = await super()._wait()
        if self._started.lost is not None:
            raise self._started.lost
        return returncode

    def send_signal(self, signal: int) -> None:
        self._check_proc()
        assert self._proc is not None
        with contextlib.suppress(ProcessLookupError):
            self._proc.send_signal(signal)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def abandon(self) -> None:
        """End the command though nothing may be awaited any more."""
        self._closed = True
        connection = self._started._connection
        with contextlib.suppress(OSError):
            self._started.kill()
        if connection is not None:
            _in_use.discard(connection)

    def __del__(self, _warn: Callable[..., Any] = warnings.warn) -> None:
        # asyncio's own would have the pipes call a loop that is closed, before it kills.
        loop: asyncio.AbstractEventLoop | None = self._loop
        if not self._closed and loop is not None and loop.is_closed():
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self.abandon()
        super().__del__()


async def _connect(
    transport: weakref.ref[_Transport], waiter: weakref.ref[asyncio.Future[Any]]
) -> None:
    strong = transport()
    if strong is not None:
        await strong.connect(waiter())


async def make_transport(
    loop: asyncio.AbstractEventLoop,
    protocol: asyncio.SubprocessProtocol,
    args: Any,
    shell: bool,
    stdin: Any,
    stdout: Any,
    stderr: Any,
    bufsize: int,
    extra: Any = None,
    *,
    _popen: type[_Popen] | None = None,
    **kwargs: Any,
) -> _Transport:
    """Start a command and return its transport; the arguments are those of asyncio's own loops."""
    turns = _turns.get(loop)
    if turns is None:
        # Whose waiting starts would keep them for ever. From a copy of the dictionary's keys, since
        # other threads add their loops meanwhile.
        for reference in _turns.keyrefs():
            other = reference()
            if other is not None and other.is_closed():
                _turns.pop(other, None)
        turns = _turns.setdefault(loop, _Turns())
    await turns.take(loop)
    process = (_popen or _functions.popen)(
        args, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, bufsize=bufsize, **kwargs
    )
    watch = await process.begin()
    waiter = loop.create_future()
    transport = _Transport(
        process, loop, protocol, args, shell, stdin, stdout, stderr, bufsize, waiter, extra
    )
    watch.begin(transport._process_exited)
    try:
        await waiter
    except (Exception, asyncio.CancelledError):
        transport.close()
        await transport.exited()
        raise
    except BaseException:
        transport.abandon()
        raise
    return transport


# -- the functions --


class _Functions:
    """asyncio's functions of this kind, for one kind of Popen."""

    daemon: _client.Client | None = None

    def __init__(self, popen_class: type[_Popen]) -> None:
        self.popen = popen_class

    async def create_subprocess_exec(
        self,
        program: str | bytes | os.PathLike[Any],
        *args: str | bytes | os.PathLike[Any],
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        limit: int = _LIMIT,
        **options: Any,
    ) -> Process:
        """Start a program; return what asyncio.create_subprocess_exec does.

        `limit` is the size (bytes) of each stream's buffer, the options are those of
        errand_boy.Popen. If the call is cancelled, the program is not started, or is killed.
        """
        _check(options, False)
        return await self._create((program, *args), False, stdin, stdout, stderr, limit, options)

    async def create_subprocess_shell(
        self,
        cmd: str | bytes,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        limit: int = _LIMIT,
        **options: Any,
    ) -> Process:
        """Start a shell command; else as create_subprocess_exec."""
        if not isinstance(cmd, (str, bytes)):
            raise ValueError("cmd must be a string")
        _check(options, True)
        return await self._create(cmd, True, stdin, stdout, stderr, limit, options)

    async def _create(
        self,
        args: Any,
        shell: bool,
        stdin: Any,
        stdout: Any,
        stderr: Any,
        limit: int,
        options: dict[str, Any],
    ) -> Process:
        loop = asyncio.get_running_loop()
        protocol = SubprocessStreamProtocol(limit=limit, loop=loop)
        transport = await make_transport(
            loop, protocol, args, shell, stdin, stdout, stderr, 0, _popen=self.popen, **options
        )
        return Process(transport, protocol, loop)

    async def run(
        self,
        args: Any,
        *,
        input: bytes | None = None,
        capture_output: bool = False,
        timeout: float | None = None,
        check: bool = False,
        shell: bool = False,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        limit: int = _LIMIT,
        **options: Any,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, as subprocess.run does, in bytes.

        `timeout` is in seconds: after it the command is killed, and TimeoutExpired has what it
        wrote until then. If the call is cancelled, the command is killed too.
        """
        if input is not None:
            if stdin is not None:
                raise ValueError("stdin and input arguments may not both be used.")
            stdin = PIPE
        if capture_output:
            if stdout is not None or stderr is not None:
                raise ValueError("stdout and stderr arguments may not be used with capture_output.")
            stdout = stderr = PIPE
        _check(options, shell)
        command = args if shell or not isinstance(args, (str, bytes, os.PathLike)) else (args,)
        process = await self._create(command, shell, stdin, stdout, stderr, limit, options)
        got: list[list[bytes]] = [[], []]

        async def collect(stream: asyncio.StreamReader | None, into: list[bytes]) -> None:
            while stream is not None and (data := await stream.read(1 << 16)):
                into.append(data)

        async def everything() -> None:
            parts = [collect(process.stdout, got[0]), collect(process.stderr, got[1])]
            if process.stdin is not None and not process.stdin.is_closing():
                parts.append(process._feed_stdin(input or b""))  # type: ignore[attr-defined]
            await asyncio.gather(*parts)
            await process.wait()

        def output() -> list[bytes | None]:
            streams = zip((process.stdout, process.stderr), got, strict=True)
            return [None if stream is None else b"".join(data) for stream, data in streams]

        try:
            await asyncio.wait_for(everything(), timeout)
        except BaseException as error:
            transport = process._transport  # type: ignore[attr-defined]
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            transport.close()  # its descendants may hold its output for ever
            await transport.exited()
            if isinstance(error, asyncio.TimeoutError):  # TimeoutError itself from 3.11 on
                raise subprocess.TimeoutExpired(args, timeout or 0, *output()) from None
            raise
        assert process.returncode is not None
        done = subprocess.CompletedProcess(args, process.returncode, *output())
        if check:
            done.check_returncode()
        return done

    def map(
        self, commands: Iterable[Command], *, check: bool = False, **options: Any
    ) -> AsyncGenerator[Result, None]:
        """Run commands, many at once, and yield a Result for each, as errand_boy.map.

        Commands are started while the iterator is awaited only. One that is left early should be
        closed (``contextlib.aclosing``), which ends what runs.
        """
        from errand_boy import _map  # noqa: PLC0415  only those who need it pay for it

        return _drive(_map.make(commands, self.daemon, **options), check)


def _check(options: dict[str, Any], shell: bool) -> None:
    """Refuse what asyncio does: the streams carry bytes, without buffers of a file's."""
    # The words are asyncio's (BaseEventLoop.subprocess_exec).
    wanted = {"universal_newlines": False, "shell": shell, "bufsize": 0, "text": False}
    for name, value in {**wanted, "encoding": None, "errors": None}.items():
        if options.pop(name, value) not in (value, None):
            raise ValueError(f"{name} must be {value}")


class Client(_Functions):
    """The same functions, for commands that a daemon starts; see errand_boy.connect.

    Their options are those of errand_boy.remote.Popen. When the helper that owns a command has
    gone, its `wait` and `communicate` raise HelperDiedError.
    """

    def __init__(self, client: _client.Client) -> None:
        super().__init__(type("Popen", (_RemotePopen,), {"_client": client}))
        self.daemon = client
        self.path = client.path

    def __repr__(self) -> str:
        return f"<errand_boy asyncio client of {self.path}>"


def connect(path: str | os.PathLike[str] | None = None, *, peer_uid: int | None = None) -> Client:
    """Return a client of the daemon at `path`, as errand_boy.connect does, for asyncio."""
    from errand_boy import _client  # noqa: PLC0415  only those who need it pay for it

    return Client(_client.connect(path, peer_uid=peer_uid))


async def _drive(batch: Batch, check: bool) -> AsyncGenerator[Result, None]:
    """Run a batch, and yield its results."""
    loop = asyncio.get_running_loop()
    news: asyncio.Future[None] = loop.create_future()
    timer: asyncio.TimerHandle | None = None

    def tell(act: Callable[..., None], *args: Any) -> None:
        try:
            act(*args)
        except Exception as error:
            if not news.done():
                news.set_exception(error)
        else:
            if not news.done():
                news.set_result(None)

    def watch(fd: int, writing: bool) -> None:
        loop.add_reader(fd, tell, batch.on_ready, fd)
        if writing:
            loop.add_writer(fd, tell, batch.on_ready, fd)
        else:
            loop.remove_writer(fd)

    def unwatch(fd: int) -> None:
        loop.remove_reader(fd)
        loop.remove_writer(fd)

    batch.watch, batch.unwatch = watch, unwatch
    try:
        while True:
            for result in batch.ready(check):
                yield result
            if not batch.pending():
                return
            if timer is not None:
                timer.cancel()
            rest = batch.timers.rest()
            timer = None if rest is None else loop.call_later(rest, tell, batch.timers.ring)
            await news
            news = loop.create_future()
    finally:
        if timer is not None:
            timer.cancel()
        batch.close()


_functions = connect() if os.environ.get("ERRAND_BOY_SOCKET") else _Functions(_Popen)
create_subprocess_exec = _functions.create_subprocess_exec
create_subprocess_shell = _functions.create_subprocess_shell
run = _functions.run
map = _functions.map
