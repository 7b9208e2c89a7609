"""concurrent.futures for commands: errand_boy.Executor."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import threading
from collections import deque
from types import GenericAlias

from errand_boy._descriptors import above_standard
from errand_boy._map import map as _map
from errand_boy._process import way

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from typing import Any, Generic, Literal, TypeAlias, overload

    from typing_extensions import Unpack

    from errand_boy._client.client import Client
    from errand_boy._map.batch import Batch
    from errand_boy._map.command import Command, Job
    from errand_boy._map.result import OutputT, Result
    from errand_boy._map.signatures import ExecutorParameters, SubmitParameters

    _Future: TypeAlias = concurrent.futures.Future[Result[Any]]

    class _Executor(concurrent.futures.Executor, Generic[OutputT]):
        pass

else:
    OutputT = str  # typing takes milliseconds to import
    _Future = concurrent.futures.Future

    class _Executor(concurrent.futures.Executor):
        __class_getitem__ = classmethod(GenericAlias)


class CommandFuture(_Future):
    """A concurrent.futures.Future of a Result, whose `cancel` ends the command if it runs.

    The process group of the command then gets SIGTERM, and SIGKILL a second later.
    """

    # The base class can't cancel a running future, so to it this one is pending until the end.

    def __init__(self, executor: Executor[Any], job: Job, check: bool) -> None:
        super().__init__()
        self._executor = executor
        self._job = job
        self._check = check
        self._has_begun = False

    def cancel(self) -> bool:
        """Cancel the command, ending it if it runs; return False if it has ended already."""
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        self._executor._cancel(self)
        return True

    def running(self) -> bool:
        """Return whether the command is running."""
        return self._has_begun and not self.done()


class Executor(_Executor[OutputT]):
    """A concurrent.futures.Executor that runs commands, not functions.

    - `max_workers`: how many commands run at once; by default four for each CPU.
    - `client`: the client of a daemon, which then runs the commands.
    - `options`: those of errand_boy.map, for all commands, except `ordered`, `halt`, `check` and
      `progress`.

    A thread drives the commands while there are any. At exit, the interpreter waits for it, as for
    the threads of the standard library's executors.
    """

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: Executor[str],
            max_workers: int | None = None,
            *,
            client: Client | None = None,
            text: Literal[True],
            encoding: str | None = None,
            errors: str | None = None,
            **options: Unpack[ExecutorParameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Executor[str],
            max_workers: int | None = None,
            *,
            client: Client | None = None,
            encoding: str,
            text: bool | None = None,
            errors: str | None = None,
            **options: Unpack[ExecutorParameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Executor[str],
            max_workers: int | None = None,
            *,
            client: Client | None = None,
            errors: str,
            text: bool | None = None,
            encoding: str | None = None,
            **options: Unpack[ExecutorParameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Executor[bytes],
            max_workers: int | None = None,
            *,
            client: Client | None = None,
            text: Literal[False] | None = None,
            encoding: None = None,
            errors: None = None,
            **options: Unpack[ExecutorParameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Executor[Any],
            max_workers: int | None = None,
            *,
            client: Client | None = None,
            text: bool | None = None,
            encoding: str | None = None,
            errors: str | None = None,
            **options: Unpack[ExecutorParameters],
        ) -> None: ...

    def __init__(
        self, max_workers: int | None = None, *, client: Client | None = None, **options: Any
    ) -> None:
        refused = options.keys() & {"ordered", "halt", "check", "progress"}
        if refused:
            raise TypeError(f"unexpected option of an Executor: {', '.join(sorted(refused))}")
        client = way.daemon if client is None else client
        self._client = client
        self._options = {**options, "max_workers": max_workers, "ordered": False}
        self._batch = self._make()
        self._owner = os.getpid()
        self._lock = threading.Lock()  # for all attributes below
        self._queued: deque[CommandFuture] = deque()
        self._cancelled: list[CommandFuture] = []
        self._submitted = 0
        self._thread: threading.Thread | None = None
        self._wake_fd = -1
        self._is_awake = False  # or about to wake up
        self._is_shut = False
        self._futures: dict[int, CommandFuture] = {}  # used by the thread only; by index

    def submit(  # type: ignore[override]
        self, args: Command, /, *, check: bool = False, **options: Unpack[SubmitParameters]
    ) -> concurrent.futures.Future[Result[OutputT]]:
        """Run a command; return a Future of its Result, which is a CompletedProcess.

        `options` are those that errand_boy.map takes in a command's mapping. The Future raises the
        exceptions of subprocess.run (OSError, TimeoutExpired and, with `check`,
        CalledProcessError), HelperDiedError and HelperError. Its `cancel` also ends a running
        command.

        Raises RuntimeError after shutdown, and TypeError and ValueError for bad arguments.
        """
        if callable(args):
            raise TypeError("an errand_boy.Executor runs commands, not functions")
        if self._owner != os.getpid():
            text = "this executor was made in another process, before a fork"
            raise ChildProcessError(errno.ECHILD, text)
        with self._lock:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            job = self._batch.jobs.make(self._submitted, {**options, "args": args})
            self._submitted += 1
            future = CommandFuture(self, job, check)
            self._queued.append(future)
            if self._thread is None:
                flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
                [self._wake_fd] = above_standard(os.eventfd(0, flags))
                self._is_awake = False
                self._thread = threading.Thread(target=self._run, name="errand_boy.Executor")
                self._thread.start()
            else:
                self._wake()
        return future

    def map(  # type: ignore[override]
        self,
        commands: Iterable[Command],
        /,
        *,
        check: bool = False,
        **options: Unpack[SubmitParameters],
    ) -> Generator[Result[OutputT], None, None]:
        """Submit all `commands` at once, with `options` as for submit; yield the Results in order.

        If a command's Future raises an exception, the iterator raises it in that command's place.
        Closing the iterator cancels the other commands.
        """
        futures = deque([self.submit(command, check=check, **options) for command in commands])

        def results() -> Generator[Result[OutputT], None, None]:
            try:
                while futures:
                    yield futures.popleft().result()
            finally:
                for future in futures:
                    future.cancel()

        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more commands. If `wait`, wait for those that were submitted.

        With `cancel_futures`, cancel those that have not started. To end running commands, cancel
        their futures.
        """
        with self._lock:
            self._is_shut = True
            thread = self._thread
            queued = list(self._queued) if cancel_futures else []
        for future in queued:
            future.cancel()
        if wait and thread is not None:
            thread.join()

    def _cancel(self, future: CommandFuture) -> None:
        with self._lock:
            if self._thread is not None:
                self._cancelled.append(future)
                self._wake()

    def _wake(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            os.eventfd_write(self._wake_fd, 1)

    def _make(self) -> Batch:
        return _map.make(self._next(), self._client, **self._options)

    # -- in the thread --

    def _next(self) -> Iterator[Job | None]:
        while True:
            with self._lock:
                future = self._queued.popleft() if self._queued else None
            if future is None:
                yield None
            elif future.cancelled():
                _notify(future)
            else:
                future._has_begun = True
                self._futures[future._job.index] = future
                yield future._job

    def _run(self) -> None:
        try:
            self._drive(self._batch)
        except BaseException as error:
            self._batch.close()
            with self._lock:
                left = [*self._futures.values(), *self._queued]
                self._futures.clear()
                self._queued.clear()
                self._cancelled.clear()
                self._batch = self._make()
                self._end()
            for future in left:
                if _notify(future):
                    future.set_exception(error)

    def _drive(self, batch: Batch) -> None:
        wait = _map.waiter(batch)
        batch.watch(self._wake_fd, False)
        while True:
            batch.fill()
            while (result := batch.take()) is not None:
                future = self._futures.pop(result.index)
                if _notify(future):
                    _settle(future, result)
                batch.fill()
            if not batch.pending():
                with self._lock:
                    if not (self._queued or self._cancelled):
                        batch.unwatch(self._wake_fd)
                        batch.close()
                        self._end()
                        return
            else:
                for fd in wait(batch.timers.rest()):
                    if fd != self._wake_fd:
                        batch.on_ready(fd)
            with self._lock:
                if self._is_awake:
                    self._is_awake = False
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake_fd)
                cancelled, self._cancelled = self._cancelled, []
            for gone in cancelled:
                if self._futures.pop(gone._job.index, None) is not None:
                    batch.cancel(gone._job.index)
                    _notify(gone)
                elif self._unqueue(gone):
                    _notify(gone)
            batch.timers.ring()

    def _unqueue(self, future: CommandFuture) -> bool:
        with self._lock:
            try:
                self._queued.remove(future)
            except ValueError:
                return False
            return True

    def _end(self) -> None:
        os.close(self._wake_fd)
        self._wake_fd = -1
        self._thread = None


def _notify(future: CommandFuture) -> bool:
    """Return whether the future can be set; if it was cancelled, notify those who wait for it."""
    return future.set_running_or_notify_cancel()


def _settle(future: CommandFuture, result: Result) -> None:
    try:
        if result.error is not None:
            raise result.error
        if future._check:
            result.check_returncode()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
