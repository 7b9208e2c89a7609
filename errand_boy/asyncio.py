"""asyncio's subprocesses, on any loop: the start is awaited, and the end arrives by pidfd.

``create_subprocess_exec``, ``create_subprocess_shell`` and ``run`` start commands as
errand_boy.Popen does, in this process or by a helper. No thread is used, and no SIGCHLD handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from asyncio import streams
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, SubprocessStreamProtocol
from collections.abc import Callable, Coroutine
from typing import IO, Any

from errand_boy import _asyncio_transport, _child
from errand_boy._asyncio_transport import Deferred

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from errand_boy import _client
    from errand_boy._batch import Batch
    from errand_boy._ends import Stop
    from errand_boy._job import Command
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


class Process(asyncio.subprocess.Process):
    """asyncio's own, and `stop`."""

    async def stop(self, stop: Stop | None = None) -> int:
        """End the command as its `stop` and `tree` say, or by other steps; return its return code.

        If this is cancelled, SIGKILL is sent at once. It does not return before the command has
        been waited for.
        """
        await self._transport.stop(stop)  # type: ignore[attr-defined]
        assert self.returncode is not None
        return self.returncode


# -- the functions --


class _Functions:
    """asyncio's functions of this kind, for one kind of Popen."""

    daemon: _client.Client | None = None

    def __init__(self, popen_class: type[Deferred]) -> None:
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

        With `pty`, the process also has a `terminal`. Its `stdin` and `stdout`, where they are not
        redirected, are streams to and from that; to close the first types the end of the input.
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
        transport = await _asyncio_transport.make_transport(
            loop, protocol, args, shell, stdin, stdout, stderr, 0, popen=self.popen, **options
        )
        process = Process(transport, protocol, loop)
        process.terminal = transport.terminal  # type: ignore[attr-defined]
        return process

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

        `timeout` is in seconds: after it the command is ended as `stop` and `tree` say, and
        TimeoutExpired has what it wrote until then. If the call is cancelled, that is done too, and
        waited for.
        """
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
                parts.append(process._feed_stdin(input or b""))  # type: ignore[attr-defined]
            moving = asyncio.gather(*parts)
            try:
                if ends is not None and ends.drain is not None:
                    await transport.exited()
                    await asyncio.wait([moving], timeout=ends.drain)
                    if not moving.done():  # somebody else holds its output
                        transport.close()
                        return
                await moving
                await process.wait()
            finally:
                moving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await moving

        def output() -> list[bytes | None]:
            streams = zip((process.stdout, process.stderr), got, strict=True)
            return [None if stream is None else b"".join(data) for stream, data in streams]

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
                transport.close()  # others may hold its output for ever
            if isinstance(error, asyncio.TimeoutError):  # TimeoutError itself from 3.11 on
                expired = subprocess.TimeoutExpired(args, timeout or 0, *output())
                _child.tell_verdict(transport._started, expired)
                raise expired from None
            raise
        assert process.returncode is not None
        if check and process.returncode:
            failed = subprocess.CalledProcessError(process.returncode, args, *output())
            _child.tell_verdict(started, failed)
            raise failed
        done = subprocess.CompletedProcess(args, process.returncode, *output())
        vars(done).update(_child.verdict(started))
        return done

    def map(
        self, commands: Iterable[Command | None], *, check: bool = False, **options: Any
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

    Their options are those of that client's Popen. When the helper that owns a command has gone,
    its `wait` and `communicate` raise HelperDiedError.
    """

    def __init__(self, client: _client.Client) -> None:
        super().__init__(type("Popen", (Deferred, client.Popen), {}))
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


_functions = connect() if os.environ.get("ERRAND_BOY_SOCKET") else _Functions(Deferred)
create_subprocess_exec = _functions.create_subprocess_exec
create_subprocess_shell = _functions.create_subprocess_shell
run = _functions.run
map = _functions.map
