"""Jobs, commands of a daemon that outlive their client, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from errand_boy._jobs import signals, steps as _steps
from errand_boy._jobs.attach import Attached
from errand_boy._jobs.follow import Missed, Output
from errand_boy._jobs.state import Chooser, JobResult, Known
from errand_boy._jobs.steps import Start, Wait

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from errand_boy._jobs.steps import Client, Steps
    from errand_boy._options.ends import Stop

    T = TypeVar("T")


class Job(Known):
    """errand_boy's Job, whose methods are coroutines."""

    async def status(self) -> dict[str, Any]:
        """Return all that the daemon knows of the job."""
        self._entry = await run(_steps.entry(self._client, self.id, self.uid))
        return dict(self._entry)

    async def wait(self, timeout: float | None = None) -> JobResult:
        """Wait for the ends of the job and of its output, `timeout` seconds at most.

        Raises subprocess.TimeoutExpired, and JobLostError if nobody knows how it ended.
        """
        steps = _steps.until_over(self._client, self.id, self.uid, timeout, self.args)
        self._entry = await run(steps)
        return JobResult(self._entry)

    async def logs(
        self, follow: bool = False, since: float | None = None, tail: int | None = None
    ) -> AsyncGenerator[Output | Missed, None]:
        """Yield the job's output, as errand_boy's Job.logs does.

        An iterator that is left early should be closed (``contextlib.aclosing``).
        """
        chooser = Chooser(since, tail)
        course = self._course(goes_on=follow)
        steps = course.events()
        try:
            for event in steps:
                if isinstance(event, Wait):
                    await wait(event)
                else:
                    for chosen in chooser.take(event):
                        yield chosen
        finally:
            steps.close()
            course.close()

    async def send_signal(self, sig: int) -> None:
        """Send a signal to the job's command; do nothing if it is over."""
        await run(signals.send_signal(self._client, self.id, self.uid, sig))

    async def stop(self, stop: Stop | None = None, tree: str | None = None) -> JobResult:
        """End the job by the steps that it was started with, or by others; return how it ended.

        If this is cancelled, no more steps are taken. Raises JobLostError, ValueError, TypeError.
        """
        self._entry = await run(signals.stop(self._client, self.id, self.uid, stop, tree))
        return JobResult(self._entry)

    async def remove(self) -> None:
        """Remove the job's output and all that is known of it. Raises JobError while it runs."""
        await run(_steps.remove(self._client, self.id, self.uid))

    async def attach(
        self,
        read_only: bool = False,
        window: Sequence[int] | None = None,
        *,
        history: bool | None = None,
    ) -> Attachment:
        """Return an Attachment, to read the job's output and write its input."""
        attachment = Attachment(
            self._course(), read_only, window, has_terminal=self.has_terminal, history=history
        )
        await attachment.begin()
        return attachment


class Attachment(Attached):
    """The terminal of a job, or its standard streams, for one who is attached to it.

    An asynchronous context manager. One task at a time may read or write.
    """

    async def __aenter__(self) -> Attachment:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    async def begin(self) -> None:
        """Wait until it is attached."""
        try:
            while not self.is_begun:
                waits = self._next_wait()
                if waits is not None and not self.is_begun:
                    await wait(waits)
        except BaseException:
            self.close()
            raise

    async def read(self, size: int = -1) -> bytes:
        """Return output of either stream, and b"" at the end; wait until there is some."""
        while True:
            while not self._come and not self.is_over:
                waits = self._next_wait()
                if waits is not None:
                    await wait(waits, both=True)
            event = self._take(size)
            if event is None:
                return b""
            if isinstance(event, Output) and event.data:
                return event.data

    async def write(self, data: bytes) -> int:
        """Type `data` at the terminal, or write it to standard input; return its length.

        Waits while more than 64 KiB are unsent, because the command does not read. Raises
        ValueError if it is attached to read only, and BlockingIOError if much output is unread.
        """
        self._feed(data)
        while self.is_full and not self.is_over:
            waits = self._next_wait()
            if waits is not None and self.is_full:
                await wait(waits, both=True)
        return len(data)


# -- how they wait --


async def wait(wanted: Wait, *, both: bool = False) -> None:
    """Wait as the steps have asked; with `both`, return also when something can be read."""
    if wanted.fd < 0:
        await asyncio.sleep(wanted.seconds or 0.0)
        return
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    reading = both or not wanted.writing
    timer = None if wanted.seconds is None else loop.call_later(wanted.seconds, tell)
    if reading:
        loop.add_reader(wanted.fd, tell)
    if wanted.writing:
        loop.add_writer(wanted.fd, tell)
    try:
        await ready
    finally:
        if timer is not None:
            timer.cancel()
        with contextlib.suppress(ValueError, OSError):  # somebody else has closed it
            loop.remove_reader(wanted.fd)
            loop.remove_writer(wanted.fd)


async def run(steps: Steps[T]) -> T:
    """Run steps to their end, and return their result."""
    try:
        while True:
            await wait(next(steps))
    except StopIteration as stopped:
        return stopped.value  # type: ignore[no-any-return]
    finally:
        steps.close()


# -- the client's --


async def start(client: Client, args: Any, name: str | None, **options: Any) -> Job:
    """Start a job; see asyncio.Client.start."""
    return Job(client, await run(_steps.start(client, Start(args, name, **options))))


async def find(client: Client, job: str | int, uid: int | None) -> Job:
    """Return a job; see asyncio.Client.job."""
    return Job(client, await run(_steps.entry(client, job, uid)))


async def find_all(client: Client, every: bool, uid: int | str | None) -> list[Job]:
    """Return jobs; see asyncio.Client.jobs."""
    steps = _steps.entries(client, all=every, uid=_steps.user(uid))
    return [Job(client, entry) for entry in await run(steps)]
