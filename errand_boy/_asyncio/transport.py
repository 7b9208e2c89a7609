"""asyncio's subprocess transport, for a child whose start and end block no loop."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import errno
import functools
import os
import signal
import subprocess
import threading
import time
import warnings
import weakref
from asyncio import base_subprocess
from asyncio.log import logger
from collections.abc import Callable, Coroutine
from typing import Any

from errand_boy import _native
from errand_boy._asyncio.loop import drive, readers_of, take_turn
from errand_boy._descriptors import duplicate
from errand_boy._options import ends as _ends
from errand_boy._process import child as _child, driver, popen as _popen, start, stop as _stop
from errand_boy._process.child import ready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from errand_boy._wire.connection import Connection

_UNKNOWN = 255  # asyncio's own return code for a child that somebody else has waited for
_MOMENT = 1.0  # seconds that a cancelled start waits for its command to end

_cancelled_starts: set[_CancelledStart] = set()

# The connections of live commands, by the id of their HelperChild. A command may become garbage
# together with its loop. It can then be ended only if the garbage collector has not finalized the
# connection before.
_in_use: dict[int, Connection] = {}


def _keep(process: Any, steps: Any) -> None:
    process._conclusion = steps


_DRIVER = driver.Driver(drive, _keep, ends_interrupted=True)


class Deferred(_popen.Popen[bytes]):
    """A Popen whose constructor does not wait. `begin` waits, without blocking the loop."""

    _given: tuple[Any, ...] = ()  # to _execute_child
    _steps: Any = None  # the remaining steps of the start
    _conclusion: Any = None  # the remaining steps of a start that was interrupted

    def _execute_child(self, *given: Any) -> None:
        original = _popen._Stdlib._execute_child
        self._begun = time.monotonic()
        self._given = given
        self._steps = start.begin(self, given, original, self._source, _DRIVER, self._more)

    async def begin(self) -> _Watch:
        """Start the command. Raises the exceptions of the constructor of subprocess.Popen."""
        loop = asyncio.get_running_loop()
        given, steps = self._given, self._steps
        self._given, self._steps = (), None
        if _cancelled_starts:
            _end_cancelled_starts()
        try:
            if steps is not None:
                await drive(steps)
            return _Watch(loop, self)
        except BaseException as error:
            start.close_ends(self, given)
            for pipe in (self.stdin, self.stdout, self.stderr):
                if pipe is not None:
                    pipe.close()
            if self.terminal is not None:
                self.terminal.close()
            if self._conclusion is not None or (self._child_created and self.returncode is None):
                cancelled = _CancelledStart(loop, self)
                # asyncio.run() waits for the tasks that it cancels: leave nothing for later.
                if isinstance(error, asyncio.CancelledError):
                    await cancelled.wait()
            raise

    @property
    def lost(self) -> OSError | None:
        """The reason why the command's exit status is lost, or None."""
        child = self._helper_child
        return None if child is None else child.lost

    def reap(self) -> int | None:
        """Return the return code if the child has ended."""
        if self._helper_child is not None:
            try:
                self.poll()
            except OSError:
                if self.lost is None:
                    raise
        elif self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = _child.wait_for(self, os.WNOHANG)
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


class _Watch:
    """Tells the loop when a child has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, process: Deferred) -> None:
        self._fd = -1
        self._loop = loop
        self._process = process
        self._ended: Callable[[int], Any] | None = None
        self._looking = 0  # the thread that does
        child = process._helper_child
        self._connection = None if child is None else child.connection
        if child is not None and self._connection is not None:
            # A copy: the connection may be in use for another command before this is removed.
            self._fd = duplicate(self._connection.sock.fileno())
            _in_use[id(child)] = self._connection
            child.on_end = self._on_end
        else:
            try:
                self._fd = _native.pidfd_open(process.pid)
            except ProcessLookupError:  # somebody has waited for it
                pass
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                threading.Thread(target=self._wait, daemon=True).start()

    def begin(self, ended: Callable[[int], Any]) -> None:
        """Watch from now on, and call `ended` once with the return code."""
        self._ended = ended
        if self._fd >= 0:
            # As with the loop's own watcher, the callbacks run in the context of the start.
            look = functools.partial(contextvars.copy_context().run, self._look)
            readers_of(self._loop).add_reader(self._fd, look)
        connection, self._connection = self._connection, None
        if self._fd < 0 or (connection is not None and connection.has_received()):
            self._loop.call_soon(self._look)

    def _on_end(self) -> None:
        _in_use.pop(id(self._process._helper_child), None)
        # A thread that waits has received the command's end, so the loop will not see it.
        if self._looking != threading.get_ident():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._look)

    def _wait(self) -> None:
        """Wait for the end in a thread of its own, where there are no pidfds."""
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        ended = self._ended
        if ended is None:
            return
        self._looking = threading.get_ident()
        try:
            returncode = self._process.reap()
        finally:
            self._looking = 0
        if returncode is None:
            return
        self._ended = None
        if self._fd >= 0:
            readers_of(self._loop).remove_reader(self._fd)
        self._close()
        ended(returncode)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = _close


class _CancelledStart:
    """Ends a command whose start was interrupted after its request had been sent."""

    def __init__(self, loop: asyncio.AbstractEventLoop, process: Deferred) -> None:
        self._over: asyncio.Future[None] = loop.create_future()
        self.loop = loop
        self._process = process
        self._steps, process._conclusion = process._conclusion, None
        if self._steps is None:
            self._kill()
        _cancelled_starts.add(self)
        if loop.is_closed():
            self.end_without_loop(_MOMENT)
        else:  # which may run in another thread
            loop.call_soon_threadsafe(self._go_on)

    async def wait(self) -> None:
        """Wait a short time for the command to end, even if cancelled again."""
        end = time.monotonic() + _MOMENT
        while not self._over.done() and (rest := end - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self._over], timeout=rest)

    def _go_on(self, fd: int = -1) -> None:
        """Conclude the start, as far as possible without waiting; then await the command's end."""
        readers = readers_of(self.loop)
        if fd >= 0:
            readers.remove_reader(fd)
        fd = self._next()
        if fd >= 0:
            readers.add_reader(fd, functools.partial(self._go_on, fd))
            return
        try:
            if self._process._child_created:
                _Watch(self.loop, self._process).begin(self._end)
            else:
                self._end()
        except OSError:  # no descriptor is free; subprocess will wait for the child later
            self._end()

    def _next(self) -> int:
        """Return a descriptor that must become readable first, or -1 if the start is concluded."""
        if self._steps is not None:
            for fd, _ in self._steps:
                return int(fd)
            self._steps = None
            if self._process._child_created:
                self._kill()
        return -1

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has other ids
            self._process.kill()

    def _end(self, returncode: int = 0) -> None:
        _cancelled_starts.discard(self)
        if not self._over.done() and not self.loop.is_closed():
            self._over.set_result(None)

    def end_without_loop(self, timeout: float) -> None:
        """Do as much as is possible within `timeout` seconds."""
        end = time.monotonic() + timeout
        while (fd := self._next()) >= 0:
            if not ready(fd, max(0.0, end - time.monotonic())):
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process._child_created:
                with contextlib.suppress(OSError):  # its exit status is lost
                    self._process.wait(max(0.0, end - time.monotonic()))
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
    """asyncio's own transport, for a child that is already running."""

    keyboard: asyncio.WriteTransport | None = None  # which types at the terminal

    _closed: bool
    _pending_calls: Any
    _pipes: dict[int, Any]
    _returncode: int | None
    _proc: Deferred | None

    def __init__(self, process: Deferred, *args: Any, **kwargs: Any) -> None:
        self._started = process
        self._exited: asyncio.Future[None] | None = None
        super().__init__(*args, **kwargs)

    @property
    def terminal(self) -> Any:
        """The Terminal of the process, or None."""
        return self._started.terminal

    def _start(self, *args: Any, **kwargs: Any) -> None:
        self._proc = self._started

    def _connect_pipes(self, waiter: asyncio.Future[Any] | None) -> Coroutine[Any, Any, None]:
        # If the loop is closed before this has begun, Python warns that it was never awaited.
        # Whoever keeps the warning keeps the coroutine, which must not keep the command alive.
        assert waiter is not None
        return _connect(weakref.ref(self), weakref.ref(waiter))

    async def connect(self, waiter: asyncio.Future[Any] | None) -> None:
        """Connect the pipes, and tell `waiter`."""
        try:
            await super()._connect_pipes(waiter)
        except RuntimeError:
            if self._loop.is_closed():  # asyncio's would pass GeneratorExit to `waiter`
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

    def _pipe_connection_lost(self, fd: int, exc: BaseException | None) -> None:
        # A terminal reports its end by EIO.
        if self._started.terminal is not None and getattr(exc, "errno", 0) == errno.EIO:
            exc = None
        super()._pipe_connection_lost(fd, exc)

    def _process_exited(self, returncode: int) -> None:
        super()._process_exited(returncode)
        if self._exited is not None and not self._exited.done():
            self._exited.set_result(None)
        if self._started.lost is not None:
            self.close()  # closes the pipes, which descendants may hold open for a long time

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        super()._call_connection_lost(exc)
        self._close_terminal()

    def close(self) -> None:
        super().close()
        if self._returncode is None:  # else the streams may still have some of its output
            self._close_terminal()

    def _close_terminal(self) -> None:
        if self._started.terminal is not None:
            if self.keyboard is not None:
                self.keyboard.abort()
            self._started.terminal.close()

    async def exited(self, seconds: float | None = None) -> bool:
        """Wait for the process only, not for the ends of its pipes.

        Wait at most `seconds`, if given. Return whether the process has ended.
        """
        if self._returncode is None:
            if self._exited is None:
                self._exited = self._loop.create_future()
            await asyncio.wait([self._exited], timeout=seconds)
        return self._returncode is not None

    async def stop(self, given: Any = None) -> None:
        """End the command, as Popen.stop does. If this is cancelled, the command gets SIGKILL.

        In any case, this returns only after it has waited for the command.
        """
        process = self._started
        ends: _ends.Ends = process._ends or _ends.Ends()
        if given is not None:
            ends = _ends.Ends(given, ends.tree, ends.drain)
        if self._returncode is not None and ends.tree != "cgroup":
            return
        target = _stop.Target(process, ends)
        course = ends.course(target.send)
        cancelled: BaseException | None = None
        try:
            seconds = next(course)
            while True:
                try:
                    has_ended = await self.exited(seconds)
                except asyncio.CancelledError as error:
                    cancelled, seconds = error, None
                    with contextlib.suppress(OSError):
                        target.send(signal.SIGKILL)
                else:
                    seconds = course.send(has_ended)
        except StopIteration:
            pass
        finally:
            target.close()
        if cancelled is not None:
            raise cancelled

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
        """End the command where nothing can be awaited any more."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._started.kill()
        _in_use.pop(id(self._started._helper_child), None)

    def __del__(self, _warn: Callable[..., Any] = warnings.warn) -> None:
        # asyncio's own first closes the pipes, which call a loop that is closed, and kills later.
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
    popen: type[Deferred] = Deferred,
    **kwargs: Any,
) -> _Transport:
    """Start a command and return its transport; the arguments are those of asyncio's own loops."""
    await take_turn(loop)
    process = popen(
        args, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, bufsize=bufsize, **kwargs
    )
    watch = await process.begin()
    if process.terminal is not None:
        from errand_boy._asyncio import terminal as _terminal  # noqa: PLC0415  only those who need it pay

        stdin, stdout, stderr = _terminal.connect(process, stdin, stdout, stderr)
    waiter = loop.create_future()
    transport = _Transport(
        process, loop, protocol, args, shell, stdin, stdout, stderr, bufsize, waiter, extra
    )
    if process.terminal is not None and stdin is None:
        transport.keyboard = _terminal.Keyboard(loop, process.terminal, transport)
        transport._pipes[0] = transport.keyboard
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
