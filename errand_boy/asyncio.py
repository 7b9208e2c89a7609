"""asyncio's subprocesses, on any loop: starts are awaited, and a pidfd reports the end.

``create_subprocess_exec``, ``create_subprocess_shell`` and ``run`` start commands as
errand_boy.Popen does, in this process or by a helper. They use no thread and no SIGCHLD handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from asyncio import streams
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, SubprocessStreamProtocol
from collections.abc import Callable, Coroutine
from typing import Any, Final

from errand_boy import _spool
from errand_boy._asyncio import transport as _transport
from errand_boy._asyncio.transport import Deferred
from errand_boy._environment import variable
from errand_boy._process import child as _child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from typing_extensions import Unpack

    from errand_boy._client import client as _client
    from errand_boy._jobs.aio import Job
    from errand_boy._map import map as _map
    from errand_boy._map.batch import Batch
    from errand_boy._map.command import Command
    from errand_boy._map.result import Result
    from errand_boy._map.signatures import Map
    from errand_boy._options.ends import Stop
    from errand_boy._types.parameters import ExecParameters, File, StrOrPath
    from errand_boy._types.signatures import AsyncRun
    from errand_boy.terminal import Terminal

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


class Process(asyncio.subprocess.Process):
    """asyncio's own Process, with `stop` and, if started with `pty`, a `terminal`."""

    terminal: Terminal | None = None

    async def stop(self, stop: Stop | None = None) -> int:
        """End the command as its `stop` and `tree` say, or by other steps; return its return code.

        This returns after it has waited for the command. If it is cancelled, it sends SIGKILL at
        once.
        """
        await self._transport.stop(stop)  # type: ignore[attr-defined]
        assert self.returncode is not None
        return self.returncode


# -- the functions --


if TYPE_CHECKING:

    def _as_run(function: object) -> AsyncRun: ...

    def _as_map(
        function: object,
    ) -> Map[
        AsyncGenerator[Result[str], None],
        AsyncGenerator[Result[bytes], None],
        AsyncGenerator[Result[Any], None],
    ]: ...

else:

    def _as_run(function: Any) -> Any:
        return function

    _as_map = _as_run


class _Functions:
    """The functions of this module, for one kind of Popen."""

    def __init__(self, popen_class: type[Deferred], daemon: _client.Client | None = None) -> None:
        self.popen: type[Deferred] = popen_class
        self.daemon: _client.Client | None = daemon

    async def create_subprocess_exec(
        self,
        program: StrOrPath,
        *args: StrOrPath,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        limit: int = _LIMIT,
        **options: Unpack[ExecParameters],
    ) -> Process:
        """Start a program; return a Process, as asyncio.create_subprocess_exec does.

        `limit` is the size of each stream's buffer in bytes; the options are those of
        errand_boy.Popen. If the call is cancelled, the program is not started, or is killed.

        With `pty`, the process has a `terminal`. Its `stdin` and `stdout`, unless they are
        redirected, are streams to and from the terminal; closing `stdin` types the end of the
        input.
        """
        given: dict[str, Any] = {**options}
        _check(given, False)
        return await self._create((program, *args), False, stdin, stdout, stderr, limit, given)

    async def create_subprocess_shell(
        self,
        cmd: str | bytes,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        limit: int = _LIMIT,
        **options: Unpack[ExecParameters],
    ) -> Process:
        """Start a shell command; otherwise like create_subprocess_exec."""
        if not isinstance(cmd, (str, bytes)):
            raise ValueError("cmd must be a string")
        given: dict[str, Any] = {**options}
        _check(given, True)
        return await self._create(cmd, True, stdin, stdout, stderr, limit, given)

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
        transport = await _transport.make_transport(
            loop, protocol, args, shell, stdin, stdout, stderr, 0, popen=self.popen, **options
        )
        process = Process(transport, protocol, loop)
        process.terminal = transport.terminal
        return process

    @_as_run
    async def run(
        self,
        args: Any,
        *more_args: object,
        input: Any = None,
        capture_output: bool = False,
        timeout: float | None = None,
        check: bool = False,
        shell: bool = False,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        limit: int = _LIMIT,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command to its end, as subprocess.run does.

        Input and output are bytes, or text with `text`, `encoding`, `errors` or
        `universal_newlines`. An `input` of the wrong type raises TypeError, before anything is
        started.

        After `timeout` seconds the command is ended as `stop` and `tree` say. Then this raises
        TimeoutExpired with the output so far, in bytes. If the call is cancelled, it also ends the
        command before it returns.
        """
        if more_args:
            whole = [args, *more_args]
            raise TypeError(f"run() takes a command and its arguments as one list: {whole!r}")
        if input is not None:
            if stdin is not None:
                raise ValueError("stdin and input arguments may not both be used.")
            if not options.get("pty"):
                stdin = PIPE
        if capture_output:
            if stdout is not None or stderr is not None:
                raise ValueError("stdout and stderr arguments may not be used with capture_output.")
            if not options.get("pty"):
                stdout = stderr = PIPE
        codec: tuple[str, str] | None = None
        if text or encoding or errors or universal_newlines:
            codec = _spool.coding(encoding, errors)
        data = _encoded(input, codec)
        _check(options, shell)
        command = args if shell or not isinstance(args, (str, bytes, os.PathLike)) else (args,)
        process = await self._create(command, shell, stdin, stdout, stderr, limit, options)
        started = process._transport._started  # type: ignore[attr-defined]
        got: list[list[bytes]] = [[], []]

        async def collect(stream: asyncio.StreamReader | None, into: list[bytes]) -> None:
            while stream is not None and (data := await stream.read(1 << 16)):
                into.append(data)
                if started._limited is not None:
                    started._limited.count(started, *got)

        transport = process._transport  # type: ignore[attr-defined]
        ends = transport._started._ends

        def reading() -> list[Coroutine[Any, Any, None]]:
            return [collect(process.stdout, got[0]), collect(process.stderr, got[1])]

        async def everything() -> None:
            parts = reading()
            if process.stdin is not None and not process.stdin.is_closing():
                parts.append(process._feed_stdin(data))  # type: ignore[attr-defined]
            moving = asyncio.gather(*parts)
            try:
                if ends is not None and ends.drain is not None:
                    await transport.exited()
                    await asyncio.wait([moving], timeout=ends.drain)
                    if not moving.done():  # descendants hold its output open
                        transport.close()
                        return
                await moving
                await process.wait()
            finally:
                moving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await moving

        def output(codec: tuple[str, str] | None = None) -> list[Any]:
            parts: list[Any] = []
            for stream, pieces in zip((process.stdout, process.stderr), got, strict=True):
                whole = b"".join(pieces)
                text: Any = whole if codec is None else _spool.to_text(whole, *codec)
                parts.append(None if stream is None else text)
            return parts

        try:
            await asyncio.wait_for(everything(), timeout)
        except BaseException as error:
            try:
                await transport.stop()
                if ends is not None:
                    rest = asyncio.gather(*reading())
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(rest, ends.patience)
            finally:
                transport.close()  # others may hold its output open for ever
            if isinstance(error, asyncio.TimeoutError):  # TimeoutError itself from 3.11 on
                expired = subprocess.TimeoutExpired(args, timeout or 0, *output())
                _child.tell_verdict(transport._started, expired)
                raise expired from None
            raise
        assert process.returncode is not None
        if check and process.returncode:
            failed = subprocess.CalledProcessError(process.returncode, args, *output(codec))
            _child.tell_verdict(started, failed)
            raise failed
        done = subprocess.CompletedProcess(args, process.returncode, *output(codec))
        vars(done).update(_child.verdict(started))
        return done

    @_as_map
    def map(
        self,
        commands: Iterable[Command | None],
        *,
        check: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> AsyncGenerator[Result, None]:
        """Run many commands at once, and yield a Result for each, as errand_boy.map does.

        Commands are started only while the iterator is awaited. If you leave it early, close it
        (``contextlib.aclosing``), which ends the running commands.
        """
        from errand_boy._map import map as _map  # noqa: PLC0415  only those who need it pay for it

        results = _drive(_map.make(commands, self.daemon, **options), check)
        place = _map.shown(commands) if progress else None
        return results if place is None else _counted(results, lambda: _map.Counter(*place))


def _encoded(input: Any, codec: tuple[str, str] | None) -> bytes | memoryview:
    """Return a command's input in bytes. Raises TypeError."""
    if input is None:
        return b""
    if isinstance(input, str) and codec is not None:
        return input.encode(*codec)
    if isinstance(input, str):
        raise TypeError("input must be bytes, not str; or give text=True, encoding= or errors=")
    if codec is not None:
        raise TypeError(f"input must be str with text=True, not {type(input).__name__}")
    return memoryview(input).cast("B")


def _check(options: dict[str, Any], shell: bool) -> None:
    """Raise ValueError for options that asyncio refuses: its streams are bytes, without buffers."""
    # The words are asyncio's (BaseEventLoop.subprocess_exec).
    wanted = {"universal_newlines": False, "shell": shell, "bufsize": 0, "text": False}
    for name, value in {**wanted, "encoding": None, "errors": None}.items():
        if options.pop(name, value) not in (value, None):
            raise ValueError(f"{name} must be {value}")


class Client(_Functions):
    """The same functions, for commands that a daemon starts; see errand_boy.connect.

    The options are those of the client's Popen. `wait` and `communicate` raise HelperDiedError if
    the helper that owns the command has ended.
    """

    def __init__(self, client: _client.Client) -> None:
        super().__init__(type("Popen", (Deferred, client.Popen), {}), client)
        self._client: _client.Client = client
        self.path: str = client.path

    async def start(self, args: Any, name: str | None = None, **options: Any) -> Job:
        """Start a command that outlives this process, and return it as a Job when it runs.

        The options are those of errand_boy's Client.start. If the call is cancelled, the command is
        not started, or is killed.
        """
        from errand_boy._jobs import aio as _aio  # noqa: PLC0415  only those who need it pay for it

        return await _aio.start(self._client, args, name, **options)

    async def job(self, job: str | int, *, uid: int | None = None) -> Job:
        """Return the job of this number, or the newest of this name. `uid`: of another user.

        Raises NoJobError, NoDaemonError and JobError.
        """
        from errand_boy._jobs import aio as _aio  # noqa: PLC0415  only those who need it pay for it

        return await _aio.find(self._client, job, uid)

    async def jobs(self, all: bool = False, *, uid: int | str | None = None) -> list[Job]:
        """Return the running jobs; if `all`, also those that are over and kept.

        `uid`: another user, or "all" for the jobs of all users, which only root and the daemon's
        own user may see. Raises NoDaemonError and JobError.
        """
        from errand_boy._jobs import aio as _aio  # noqa: PLC0415  only those who need it pay for it

        return await _aio.find_all(self._client, all, uid)

    def __repr__(self) -> str:
        return f"<errand_boy asyncio client of {self.path}>"


def connect(path: str | os.PathLike[str] | None = None, *, peer_uid: int | None = None) -> Client:
    """Return an asyncio client of the daemon at `path`; see errand_boy.connect."""
    from errand_boy._client import client as _client  # noqa: PLC0415  only those who need it pay

    return Client(_client.connect(path, peer_uid=peer_uid))


async def _counted(
    results: AsyncGenerator[Result, None], make_bar: Callable[[], _map.Counter]
) -> AsyncGenerator[Result, None]:
    with contextlib.closing(make_bar()) as bar:
        async with contextlib.aclosing(results):
            async for result in results:
                bar.count(result)
                yield result


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


_functions: _Functions = connect() if variable("ERRAND_BOY_SOCKET") else _Functions(Deferred)
create_subprocess_exec: Final = _functions.create_subprocess_exec
create_subprocess_shell: Final = _functions.create_subprocess_shell
run: Final = _functions.run
map: Final = _functions.map
