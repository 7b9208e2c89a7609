"""Jobs, commands of a daemon that outlive their client, for callers that block."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence

from errand_boy._jobs import signals, steps as _steps
from errand_boy._jobs.attach import Attached
from errand_boy._jobs.follow import Missed, Output
from errand_boy._jobs.state import Chooser, JobResult, Known
from errand_boy._jobs.steps import Course, Start, Wait
from errand_boy._process.child import ready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from errand_boy._jobs.steps import Client, Steps
    from errand_boy._options.ends import Stop

    T = TypeVar("T")

__all__ = ["Attachment", "Job", "JobResult", "Missed", "Output"]


class Job(Known):
    """A command that outlives its client.

    The methods raise NoJobError if it has been removed, NoDaemonError if no daemon listens, and
    RefusedError.
    """

    def status(self) -> dict[str, Any]:
        """Return all that the daemon knows of the job."""
        self._entry = run(_steps.entry(self._client, self.id, self.uid))
        return dict(self._entry)

    def wait(self, timeout: float | None = None) -> JobResult:
        """Wait for the ends of the job and of its output, `timeout` seconds at most.

        Raises subprocess.TimeoutExpired, and JobLostError if nobody knows how it ended.
        """
        steps = _steps.until_over(self._client, self.id, self.uid, timeout, self.args)
        self._entry = run(steps)
        return JobResult(self._entry)

    def logs(
        self, follow: bool = False, since: float | None = None, tail: int | None = None
    ) -> Generator[Output | Missed, None, None]:
        """Yield its output in pieces, and a Missed for output that is no longer kept.

        With `follow`, go on with new output until the end. `since` (seconds since 1970): only
        output from then on. `tail`: of the existing output, only the last lines of this number.
        """
        chooser = Chooser(since, tail)
        for event in _events(self._course(goes_on=follow)):
            yield from chooser.take(event)

    def send_signal(self, sig: int) -> None:
        """Send a signal to the job's command; do nothing if it is over."""
        run(signals.send_signal(self._client, self.id, self.uid, sig))

    def stop(self, stop: Stop | None = None, tree: str | None = None) -> JobResult:
        """End the job by the steps that it was started with, or by others; return how it ended.

        By default: SIGTERM, and SIGKILL after ten seconds; with a terminal also SIGHUP after one.
        Raises JobLostError, and ValueError and TypeError for bad steps.
        """
        self._entry = run(signals.stop(self._client, self.id, self.uid, stop, tree))
        return JobResult(self._entry)

    def remove(self) -> None:
        """Remove the job's output and all that is known of it. Raises JobError while it runs."""
        run(_steps.remove(self._client, self.id, self.uid))

    def attach(
        self,
        read_only: bool = False,
        window: Sequence[int] | None = None,
        *,
        history: bool | None = None,
    ) -> Attachment:
        """Return an Attachment, to read the job's output and write its input.

        `window`: rows and columns of the screen that shows the job's terminal. The terminal gets
        the smallest size of all attachments, and is redrawn. `history`: begin with all earlier
        output. Without it, a terminal begins with the modes that are on and the last lines, unless
        the program fills the screen.
        """
        attachment = Attachment(
            self._course(), read_only, window, has_terminal=self.has_terminal, history=history
        )
        attachment.begin()
        return attachment


class Attachment(Attached):
    """The terminal or the standard streams of a job, to read and to write.

    It is a context manager, and has a `fileno` for select: call `read_some` when the descriptor is
    readable, or writable if `wants_write`. Each call may change the descriptor.
    """

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self) -> None:
        """Wait until it is attached. Raises NoJobError and the exceptions of `Job`."""
        try:
            while not self.is_begun:
                waits = self._next_wait()
                if waits is not None and not self.is_begun:
                    wait(waits)
        except BaseException:
            self.close()
            raise

    def read_some(self, seconds: float | None = 0.0) -> Output | Missed | None:
        """Return the next output, or None if none comes within `seconds` (None: no limit).

        This also sends input. Raises HelperDiedError and OSError.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        is_late = False
        while not self._come:
            waits = self._next_wait()
            if waits is None:
                if self.is_over:
                    break
                continue
            if is_late:
                return None
            if deadline is not None:
                rest = max(0.0, deadline - time.monotonic())
                is_late = rest == 0.0
                if waits.seconds is None or rest < waits.seconds:
                    waits = waits._replace(seconds=rest)
            wait(waits, both=True)
        return self._take()

    def read(self, size: int = -1) -> bytes:
        """Return output of either stream, and b"" at the end; wait until there is some."""
        while True:
            while not self._come and not self.is_over:
                waits = self._next_wait()
                if waits is not None:
                    wait(waits, both=True)
            event = self._take(size)
            if event is None:
                return b""
            if isinstance(event, Output) and event.data:
                return event.data

    def write(self, data: bytes) -> int:
        """Type `data` at the terminal, or write it to standard input; return its length.

        Waits while more than 64 KiB are unsent, because the command does not read. Raises
        ValueError if it is attached to read only, and BlockingIOError if much output is unread.
        """
        self._feed(data)
        while self.is_full and not self.is_over:
            waits = self._next_wait()
            if waits is not None and self.is_full:
                wait(waits, both=True)
        return len(data)


def _events(course: Course) -> Iterator[Any]:
    """Yield the events of `course`, and wait for its Waits."""
    steps = course.events()
    try:
        for event in steps:
            if isinstance(event, Wait):
                wait(event)
            else:
                yield event
    finally:
        steps.close()
        course.close()


# -- how they wait --


def wait(wanted: Wait, *, both: bool = False) -> None:
    """Wait as the steps have asked; with `both`, return also when something can be read."""
    if wanted.fd < 0:
        time.sleep(wanted.seconds or 0.0)
    else:
        reading = both or not wanted.writing
        ready(wanted.fd, wanted.seconds, reading=reading, writing=wanted.writing)


def run(steps: Steps[T]) -> T:
    """Run steps to their end, and return their result."""
    try:
        while True:
            wait(next(steps))
    except StopIteration as stopped:
        return stopped.value  # type: ignore[no-any-return]
    finally:
        steps.close()


# -- the client's --


def start(client: Client, args: Any, name: str | None, **options: Any) -> Job:
    """Start a job; see Client.start."""
    return Job(client, run(_steps.start(client, Start(args, name, **options))))


def find(client: Client, job: str | int, uid: int | None) -> Job:
    """Return a job; see Client.job."""
    return Job(client, run(_steps.entry(client, job, uid)))


def find_all(client: Client, every: bool, uid: int | str | None) -> list[Job]:
    """Return jobs; see Client.jobs."""
    steps = _steps.entries(client, all=every, uid=_steps.user(uid))
    return [Job(client, entry) for entry in run(steps)]
