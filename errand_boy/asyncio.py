"""asyncio's subprocesses, on any loop: the start is awaited, and the end arrives by pidfd.

``create_subprocess_exec``, ``create_subprocess_shell`` and ``run`` start commands through
errand-boy's helper. No thread is used, and no SIGCHLD handler.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import subprocess
from asyncio import base_subprocess, streams
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process, SubprocessStreamProtocol
from collections.abc import Callable
from typing import IO, Any

from errand_boy import client as _client
from errand_boy import helper as _helper
from errand_boy import popen, remote
from errand_boy._native import lib
from errand_boy.connection import Connection, NotServedError
from errand_boy.errors import HelperError
from errand_boy.outgoing import Outgoing, Request, take
from errand_boy.protocol import Failed, Reply, Spawned

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Client",
    "Process",
    "connect",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "run",
]

_LIMIT: int = streams._DEFAULT_LIMIT  # type: ignore[attr-defined]
_UNKNOWN = 255  # asyncio's own word for a child that somebody else has waited for

_MOMENT = 0.02  # seconds

_burials: set[_Burial] = set()


class _Popen(popen.Popen[bytes]):
    """A Popen whose constructor sends nothing: `begin` does, without blocking the loop."""

    _request: Request
    _child_fds: tuple[int, ...] = ()

    def _start(self, request: Request) -> Spawned | Failed | None:
        self._request = request
        return None

    def _close_pipe_fds(self, *fds: int) -> None:
        self._child_fds = fds  # still to be sent

    def _close_child_fds(self) -> None:
        fds, self._child_fds = self._child_fds, ()
        if fds:
            super()._close_pipe_fds(*fds)

    async def begin(self) -> None:
        """Start the command. Raises what the constructor of subprocess.Popen does."""
        try:
            reply = await self._ask()
            if isinstance(reply, Failed):
                self._raise_failure(reply)
        except BaseException:
            for pipe in (self.stdin, self.stdout, self.stderr):
                if pipe is not None:
                    pipe.close()
            raise
        finally:
            self._close_child_fds()

    async def _ask(self) -> Reply:
        loop = asyncio.get_running_loop()
        if _burials:
            _end_burials()
        outgoing = take()
        try:
            for _ in range(_helper.PATIENCE):
                try:
                    lender, connection = self._acquire(self._request, outgoing)
                    await _send(loop, connection, outgoing)
                    self._close_child_fds()
                    reply = await _receive(loop, connection)
                    self._take(reply, lender, connection)
                except NotServedError:
                    self._discard(lender, connection)
                    continue
                except asyncio.CancelledError:
                    if not outgoing.frame:  # sent whole: it is being started
                        _Burial(loop, self, lender, connection)
                    else:
                        connection.close()
                    raise
                except BaseException as error:
                    self._abandon(outgoing, error)
                    raise
                if self._lease is None:
                    lender.release(connection)
                return reply
        finally:
            outgoing.done()
        raise HelperError("the helper ends as soon as it is asked to start a command")


class _RemotePopen(_Popen, remote.Popen[bytes]):
    """The same for a daemon's child."""


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
    loop: asyncio.AbstractEventLoop, connection: Connection, outgoing: Outgoing
) -> None:
    """Send what has not been sent of a request."""
    sock = connection.sock
    while outgoing.frame:
        most = len(outgoing.frame)
        # More descriptors than one message takes are rare, and may wait for the helper.
        if len(outgoing.fds) > lib.EB_MAX_FDS_PER_SEND:
            connection.send(outgoing.frame, outgoing.fds)
            outgoing.count_sent(most)
            return
        try:
            sent = connection.send_some(outgoing.frame, outgoing.fds)
        except BlockingIOError:
            await _ready(loop, sock.fileno(), loop.add_writer, loop.remove_writer)
        else:
            outgoing.count_sent(sent)


async def _receive(loop: asyncio.AbstractEventLoop, connection: Connection) -> Reply:
    while True:
        await _ready(loop, connection.sock.fileno(), loop.add_reader, loop.remove_reader)
        with contextlib.suppress(TimeoutError):  # only a part of it has come
            return connection.receive(0.0)


class _Burial:
    """Ends a command whose start was cancelled, once it is known to run."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        process: _Popen,
        lender: popen.Lender,
        connection: Connection,
    ) -> None:
        self._loop = loop
        self._process = process
        self._lender = lender
        self._connection = connection
        self._fd = connection.sock.fileno()
        _burials.add(self)
        if not self._conclude(_MOMENT):
            loop.add_reader(self._fd, self._look)

    def _conclude(self, timeout: float | None) -> bool:
        try:
            reply = self._connection.receive(timeout)
        except TimeoutError:
            return False
        except (NotServedError, OSError):
            self._close()
            return True
        self._process._take(reply, self._lender, self._connection)
        if isinstance(reply, Spawned):
            self._process.kill()
            # It ends within moments, but for one in the midst of slow input or output.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_MOMENT)
        self._close()
        return True

    def _look(self) -> None:
        if self._conclude(0.0):
            self._loop.remove_reader(self._fd)

    def _close(self) -> None:
        self._connection.close()
        _burials.discard(self)

    def end_without_loop(self) -> None:
        """Conclude it now if its loop is over; the answer comes when the program runs."""
        if self._loop.is_closed():
            self._conclude(None)


def _end_burials() -> None:
    for burial in list(_burials):
        burial.end_without_loop()


atexit.register(_end_burials)


# -- the end --


def _wait_status(process: _Popen) -> int | None:
    """Return the return code if the child has ended, and reap it."""
    if process.returncode is not None or process._lease is not None:
        return process.poll()
    try:
        pid, status = os.waitpid(process.pid, os.WNOHANG)
    except ChildProcessError:
        return _UNKNOWN
    return os.waitstatus_to_exitcode(status) if pid else None


def _watch(loop: asyncio.AbstractEventLoop, process: _Popen, ended: Callable[[int], Any]) -> None:
    """Call `ended` with the return code when the child has ended."""
    lease = process._lease
    fd = os.pidfd_open(process.pid) if lease is None else os.dup(lease[1].sock.fileno())

    def look() -> None:
        try:
            returncode = _wait_status(process)
        except OSError:  # the helper has gone, and with it the status
            returncode = process.returncode
        if returncode is not None:
            loop.remove_reader(fd)
            os.close(fd)
            process.returncode = returncode
            ended(returncode)

    loop.add_reader(fd, look)


class _Transport(base_subprocess.BaseSubprocessTransport):
    """asyncio's own transport, for a child that runs already."""

    _loop: asyncio.AbstractEventLoop
    _proc: _Popen | None

    def __init__(self, process: _Popen, *args: Any, **kwargs: Any) -> None:
        self._started = process
        super().__init__(*args, **kwargs)

    def _start(self, *args: Any, **kwargs: Any) -> None:
        self._proc = self._started

    def send_signal(self, signal: int) -> None:
        self._check_proc()
        assert self._proc is not None
        with contextlib.suppress(ProcessLookupError):
            self._proc.send_signal(signal)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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
    _popen: type[_Popen] = _Popen,
    **kwargs: Any,
) -> _Transport:
    """Start a command and return its transport; the arguments are those of asyncio's own loops."""
    process = _popen(
        args, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, bufsize=bufsize, **kwargs
    )
    await process.begin()
    waiter = loop.create_future()
    transport = _Transport(
        process, loop, protocol, args, shell, stdin, stdout, stderr, bufsize, waiter, extra
    )
    _watch(loop, process, transport._process_exited)
    try:
        await waiter
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:
        transport.close()
        await transport._wait()
        raise
    return transport


# -- the functions --


class _Protocol(SubprocessStreamProtocol):
    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=limit, loop=loop)
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set()


async def _create(
    popen_class: type[_Popen],
    args: Any,
    shell: bool,
    stdin: Any,
    stdout: Any,
    stderr: Any,
    limit: int,
    options: dict[str, Any],
) -> Process:
    for name in ("universal_newlines", "text", "encoding", "errors", "bufsize"):
        if options.pop(name, None):
            raise ValueError(f"{name} must not be given: the streams carry bytes")
    loop = asyncio.get_running_loop()
    protocol = _Protocol(limit=limit, loop=loop)
    transport = await make_transport(
        loop, protocol, args, shell, stdin, stdout, stderr, 0, _popen=popen_class, **options
    )
    return Process(transport, protocol, loop)


async def create_subprocess_exec(
    program: str | bytes | os.PathLike[Any],
    *args: str | bytes | os.PathLike[Any],
    stdin: int | IO[Any] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    limit: int = _LIMIT,
    **options: Any,
) -> Process:
    """Start a program; return what asyncio.create_subprocess_exec does.

    `limit` is the size (bytes) of each stream's buffer, the options are those of errand_boy.Popen.
    If the call is cancelled, the program is not started, or is killed at once.
    """
    return await _create(_Popen, (program, *args), False, stdin, stdout, stderr, limit, options)


async def create_subprocess_shell(
    cmd: str | bytes,
    stdin: int | IO[Any] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    limit: int = _LIMIT,
    **options: Any,
) -> Process:
    """Start a shell command; else as create_subprocess_exec."""
    return await _create(_Popen, _line(cmd), True, stdin, stdout, stderr, limit, options)


def _line(cmd: str | bytes) -> str | bytes:
    if not isinstance(cmd, (str, bytes)):
        raise ValueError("cmd must be a string")
    return cmd


async def run(
    args: Any,
    *,
    input: bytes | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    shell: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, as subprocess.run does, in bytes.

    `timeout` is in seconds: after it the command is killed, and TimeoutExpired has what it wrote
    until then. If the call is cancelled, the command is killed too.
    """
    return await _run(
        _Popen,
        args,
        input=input,
        capture_output=capture_output,
        timeout=timeout,
        check=check,
        shell=shell,
        **options,
    )


async def _run(
    popen_class: type[_Popen],
    args: Any,
    *,
    input: bytes | None,
    capture_output: bool,
    timeout: float | None,
    check: bool,
    shell: bool,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    limit: int = _LIMIT,
    **options: Any,
) -> subprocess.CompletedProcess[bytes]:
    if input is not None:
        if stdin is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        stdin = PIPE
    if capture_output:
        if stdout is not None or stderr is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        stdout = stderr = PIPE
    if not shell:
        args_of_it = (args,) if isinstance(args, (str, bytes, os.PathLike)) else tuple(args)
    else:
        args_of_it = args
    process = await _create(
        popen_class, args_of_it, shell, stdin, stdout, stderr, limit, dict(options)
    )
    protocol: _Protocol = process._protocol  # type: ignore[attr-defined]
    got: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    async def collect(name: str, stream: asyncio.StreamReader | None) -> None:
        while stream is not None and (data := await stream.read(1 << 16)):
            got[name].append(data)

    async def feed() -> None:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(input or b"")
                await process.stdin.drain()
            process.stdin.close()

    def output(name: str, wanted: Any) -> bytes | None:
        return b"".join(got[name]) if wanted == PIPE else None

    everything = asyncio.gather(
        collect("stdout", process.stdout),
        collect("stderr", process.stderr),
        feed(),
        process.wait(),
    )
    # What its parts raise when it is cancelled is nobody's concern.
    everything.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait_for(asyncio.shield(everything), timeout)
    except BaseException as error:
        process.kill()
        # The command itself, not its descendants: they may hold its output for ever.
        await protocol.exited.wait()
        everything.cancel()
        process._transport.close()  # type: ignore[attr-defined]
        if not isinstance(error, asyncio.TimeoutError):  # TimeoutError itself from 3.11 on
            raise
        raise subprocess.TimeoutExpired(
            args, timeout or 0, output("stdout", stdout), output("stderr", stderr)
        ) from None
    returncode = process.returncode
    assert returncode is not None
    done = subprocess.CompletedProcess(
        args, returncode, output("stdout", stdout), output("stderr", stderr)
    )
    if check:
        done.check_returncode()
    return done


# -- the daemon's --


class Client:
    """The same functions, for commands that a daemon starts; see errand_boy.connect."""

    def __init__(self, client: _client.Client) -> None:
        self.path = client.path
        self._popen: type[_RemotePopen] = type("Popen", (_RemotePopen,), {"_client": client})

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
        """Start a program through the daemon; else as the function of this name."""
        args = (program, *args)
        return await _create(self._popen, args, False, stdin, stdout, stderr, limit, options)

    async def create_subprocess_shell(
        self,
        cmd: str | bytes,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        limit: int = _LIMIT,
        **options: Any,
    ) -> Process:
        """Start a shell command through the daemon; else as the function of this name."""
        return await _create(self._popen, _line(cmd), True, stdin, stdout, stderr, limit, options)

    async def run(
        self,
        args: Any,
        *,
        input: bytes | None = None,
        capture_output: bool = False,
        timeout: float | None = None,
        check: bool = False,
        shell: bool = False,
        **options: Any,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command through the daemon to its end; else as the function of this name."""
        return await _run(
            self._popen,
            args,
            input=input,
            capture_output=capture_output,
            timeout=timeout,
            check=check,
            shell=shell,
            **options,
        )


def connect(path: str | os.PathLike[str] | None = None) -> Client:
    """Return a client of the daemon at `path`, as errand_boy.connect does, for asyncio."""
    return Client(_client.connect(path))
