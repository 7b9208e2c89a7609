"""Jobs: commands of a daemon's that outlive their client, for a thread that waits."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence

from errand_boy import _follow, _job_steps, _wire
from errand_boy._child import ready
from errand_boy._follow import CaughtUp, Credit, Follower, LogFailed, Missed, Output, Over
from errand_boy._job_steps import Course, Start, Wait
from errand_boy._limits import CAUSES
from errand_boy._modes import Past
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any, TypeVar

    from errand_boy._ends import Stop
    from errand_boy._job_steps import Client, Entry, Steps

    T = TypeVar("T")

__all__ = ["Attachment", "Job", "JobResult", "LogFailed", "Missed", "Output"]

_MOST_UNSENT = 1 << 16  # bytes of input
_NO_WINDOW = (0, 0, 0, 0)


class JobResult(subprocess.CompletedProcess[None]):
    """How a job has ended: as subprocess.CompletedProcess, without output, and as Popen tells.

    `cause`: "exit", "signal", or the limit for which it was ended. `duration`: in seconds.
    `rusage`: a resource.struct_rusage. `peak_memory`: in bytes. `bytes`: how many it has written to
    its standard output and its standard error.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry["argv"], os.waitstatus_to_exitcode(entry["status"]))
        self._entry = entry

    @property
    def cause(self) -> str:
        """Why it has ended."""
        by_limit = CAUSES.get(self._entry.get("cause", 0))
        return by_limit or ("exit" if self.returncode >= 0 else "signal")

    @property
    def duration(self) -> float:
        """How long it took, in seconds."""
        return max(0.0, float(self._entry["ended"] - self._entry["started"]))

    @property
    def rusage(self) -> resource.struct_rusage:
        """What it has used."""
        tree = self._entry.get("tree", ())
        return _wire.rusage(self._entry["usage"], (0, *tree) if tree else ())

    @property
    def peak_memory(self) -> int:
        """The most memory that it had, in bytes."""
        tree = self._entry.get("tree", ())
        return int(tree[2]) if tree else self.rusage.ru_maxrss * 1024

    @property
    def bytes(self) -> tuple[int, int]:
        """How much it has written."""
        first, second = self._entry.get("bytes", (0, 0))
        return first, second


class Known:
    """What was said of a job last, which `status` renews.

    `id`: its number among those of user `uid`; `name`; `args`: its command, or the beginning of a
    long one; `pid`: the command's, None before it runs; `started`: seconds since 1970;
    `state`: "starting", "running", "ended", or "lost", when its keeper was killed or the machine
    went down; `returncode`: as Popen has it, None while it is not known.
    """

    def __init__(self, client: Client, entry: Entry) -> None:
        self._client = client
        self._entry = entry
        self.id: int = entry["id"]
        self.uid: int = entry["uid"]
        self.name: str = entry["name"]

    def __repr__(self) -> str:
        return f"<errand_boy job {self.id} {self.name} {self.state}>"

    @property
    def args(self) -> list[str]:
        """Its command."""
        return list(self._entry["argv"])

    @property
    def pid(self) -> int | None:
        """The command's."""
        pid: int | None = self._entry.get("pid")
        return pid

    @property
    def started(self) -> float:
        """When."""
        return float(self._entry["started"])

    @property
    def state(self) -> str:
        """What has become of it."""
        return str(self._entry["state"])

    @property
    def returncode(self) -> int | None:
        """How it has ended."""
        status = self._entry.get("status")
        return None if status is None else os.waitstatus_to_exitcode(status)

    @property
    def cause(self) -> str | None:
        """Why it is over, as JobResult has it, or why it is lost: "killed" or "reboot"."""
        if self.state == "lost":
            return str(self._entry.get("why", "killed"))
        return None if self.returncode is None else JobResult(self._entry).cause

    @property
    def ended(self) -> float | None:
        """When it ended."""
        ended: float | None = self._entry.get("ended")
        return ended

    @property
    def has_terminal(self) -> bool:
        """Whether its standard streams are a terminal."""
        return bool(self._entry.get("pty"))

    def _course(self, *, quiet: bool = False, goes_on: bool = True) -> Course:
        follower = Follower(quiet=quiet, goes_on=goes_on)
        return Course(self._client, self.id, self.uid, follower)


class Job(Known):
    """A command that outlives its client.

    The methods raise NoJobError if it has been removed, NoDaemonError if no daemon listens, and
    RefusedError.
    """

    def status(self) -> dict[str, Any]:
        """Ask what has become of it; return all that is known."""
        self._entry = run(_job_steps.entry(self._client, self.id, self.uid))
        return dict(self._entry)

    def wait(self, timeout: float | None = None) -> JobResult:
        """Wait for its end and that of its output, `timeout` seconds at most.

        Raises subprocess.TimeoutExpired, and JobLostError if nobody knows how it ended.
        """
        steps = _job_steps.until_over(self._client, self.id, self.uid, timeout, self.args)
        self._entry = run(steps)
        return JobResult(self._entry)

    def logs(
        self, follow: bool = False, since: float | None = None, tail: int | None = None
    ) -> Iterator[Output | Missed]:
        """Yield its output, piece by piece, and a Missed for what is not kept any more.

        With `follow`, wait for more, up to its end. `since`: only what was written then or later,
        in seconds since 1970. `tail`: of what is there, only the last lines.
        """
        events = _events(self._course(goes_on=follow))
        return chosen(events, since, tail)

    def send_signal(self, sig: int) -> None:
        """Send a signal to its command; does nothing if it is over."""
        run(_job_steps.send_signal(self._client, self.id, self.uid, sig))

    def stop(self, stop: Stop | None = None, tree: str | None = None) -> JobResult:
        """End it by the steps that it was started with, or by others; return how it has ended.

        By default: SIGTERM, and SIGKILL after ten seconds. Raises JobLostError, and ValueError and
        TypeError for bad steps.
        """
        self._entry = run(_job_steps.stop(self._client, self.id, self.uid, stop, tree))
        return JobResult(self._entry)

    def remove(self) -> None:
        """Remove its output and what is known of it. Raises JobError while it runs."""
        run(_job_steps.remove(self._client, self.id, self.uid))

    def attach(
        self,
        read_only: bool = False,
        window: Sequence[int] | None = None,
        *,
        history: bool | None = None,
    ) -> Attachment:
        """Return what its output is read from, and its input is written to.

        `window`: rows and columns of the screen on which it is shown, if it has a terminal; that
        gets the smallest size of all who are attached, and what is on it is drawn anew. `history`:
        what was written before comes first; by default, for a terminal, only what a screen needs:
        the modes that are on, and the last lines unless the program fills the screen.
        """
        if history is None:
            history = not self.has_terminal
        return Attachment(self, read_only, window, history)


def _events(course: Course) -> Iterator[Any]:
    """Yield what is told, but for Waits, which are waited for."""
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


def chosen(events: Iterator[Any], since: float | None, tail: int | None) -> Iterator[Any]:
    """Yield what `logs` does of what is told."""
    chooser = Chooser(since, tail)
    for event in events:
        yield from chooser.take(event)
    yield from chooser.rest()


class Chooser:
    """Which of the events `logs` yields."""

    def __init__(self, since: float | None, tail: int | None) -> None:
        self._since = since
        self._tail = tail
        self._kept: list[Any] = []  # until all that was there is known

    def take(self, event: Any) -> list[Any]:
        """Return what is to be yielded now."""
        if isinstance(event, (CaughtUp, Over)):
            return self.rest()
        if isinstance(event, Output):
            if self._since is not None and event.time < self._since:
                return []
        elif not isinstance(event, Missed):
            return []
        if self._tail is None:
            return [event]
        self._kept.append(event)
        return []

    def rest(self) -> list[Any]:
        """Return what has been kept back."""
        tail, self._tail = self._tail, None
        kept, self._kept = self._kept, []
        return [] if tail is None else _follow.last_lines(kept, tail)


# -- attached --


class Attachment:
    """The terminal of a job, or its standard streams, for one who is attached to it.

    A context manager. It has a descriptor for select, which is readable when `read_some` should be
    called, and which may be another one after each call. `is_over`: the job is, and all has been
    read.
    """

    def __init__(
        self, job: Job, read_only: bool, window: Sequence[int] | None, history: bool
    ) -> None:
        self._job = job
        self.read_only = read_only
        self.is_over: bool = False
        self._window = _four(window)
        self._past = None if history else Past()  # until all is told that was written before
        self._course = job._course()
        self._course.greeting = _follow.attach(self._flags(), _NO_WINDOW)
        self._steps: Generator[Any, None, None] = self._course.events()
        self._waits: Wait | None = None
        self._come: deque[Output | Missed] = deque()
        self._unsent = bytearray()  # input
        self._room = int(lib.EB_WINDOW)  # for input on its way
        self._outbox = b""
        self._ends_input = False
        try:
            while self._course.sock is None and not self.is_over:
                self._advance()
                if self._course.sock is None and self._waits is not None:
                    wait(self._waits)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach."""
        self._steps.close()
        self._course.close()
        self.is_over = True

    @property
    def job(self) -> Job:
        """The job."""
        return self._job

    @property
    def closed(self) -> bool:
        """Whether nothing more will come."""
        return self.is_over

    def fileno(self) -> int:
        """Return the descriptor; -1 while there is none."""
        sock = self._course.sock
        return -1 if sock is None else sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether `read_some` should be called when the descriptor is writable, too."""
        return bool(self._outbox)

    @property
    def is_full(self) -> bool:
        """Whether `write` would wait now."""
        return len(self._unsent) >= _MOST_UNSENT

    def _flags(self) -> int:
        return 0 if self.read_only else int(lib.EB_ATTACH_WRITES)

    def _catch_up(self) -> None:
        """Begin to look, with a window: what is drawn anew for that is not part of the past."""
        past, self._past = self._past, None
        if past is not None and self._job.has_terminal:
            shown = past.shown(self._window[0])
            if shown:
                self._come.append(Output(1, time.time(), shown))
        if self._window != _NO_WINDOW:
            flags = self._flags() | (lib.EB_ATTACH_REDRAWS if self._job.has_terminal else 0)
            self._outbox += _follow.attach(flags, self._window)

    def read_some(self, seconds: float | None = 0.0) -> Output | Missed | None:
        """Return what comes next, waiting so long at most (None: without end), or None.

        Moves input, too. Raises HelperDiedError and OSError.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            if self._come:
                return self._come.popleft()
            if self.is_over:
                return None
            self._send()
            self._advance()
            if self._come or self.is_over or self._waits is None:
                continue
            waits = self._waits
            if waits.fd >= 0:
                waits = waits._replace(writing=waits.writing or bool(self._outbox))
            rest = None if deadline is None else deadline - time.monotonic()
            if rest is not None and rest <= 0 and not is_ready(waits):
                return None
            if rest is not None and (waits.seconds is None or rest < waits.seconds):
                waits = waits._replace(seconds=max(0.0, rest))
            wait(waits, both=True)

    def read(self, size: int = -1) -> bytes:
        """Return output, of either stream; wait until there is some. b"" is the end."""
        while (event := self.read_some(None)) is not None:
            if isinstance(event, Output) and event.data:
                if 0 <= size < len(event.data):
                    self._come.appendleft(event._replace(data=event.data[size:]))
                    return event.data[:size]
                return event.data
        return b""

    def write(self, data: bytes) -> int:
        """Type `data`, or write it to the standard input; return its length.

        It is sent as the command reads; waits while there are more than 64 KiB. Raises ValueError
        if it is attached to read only.
        """
        if self.read_only:
            raise ValueError("attached to read only")
        self._unsent += data
        while not self.is_over and self.is_full:
            self._send()
            self._advance()
            if self._waits is not None and not self.is_over:
                waits = self._waits
                wait(waits._replace(writing=waits.writing or bool(self._outbox)), both=True)
        self._send()
        return len(data)

    def end_input(self) -> None:
        """End the standard input, for all who are attached; has no meaning for a terminal."""
        self._ends_input = True
        self._send()

    @property
    def winsize(self) -> tuple[int, ...]:
        """The rows and columns of the screen on which it is shown."""
        return self._window[:2]

    @winsize.setter
    def winsize(self, size: Sequence[int]) -> None:
        self._window = _four(size)
        self._outbox += _follow.winsize(self._window)
        self._send()

    def send_signal(self, sig: int) -> None:
        """Send a signal to the job's command."""
        self._outbox += _follow.signal(0, sig)
        self._send()

    def _advance(self) -> None:
        """Take what has come, without waiting."""
        for event in self._steps:
            if isinstance(event, Wait):
                self._waits = event
                return
            if isinstance(event, CaughtUp):
                self._catch_up()
                self._send()
                self._waits = None
                if self._come:
                    return
            elif isinstance(event, Over):
                self.is_over = True
                self._waits = None
            elif isinstance(event, Credit):
                self._room += event.size
                self._send()
            elif isinstance(event, (Output, Missed)) and self._past is not None:
                if isinstance(event, Output):
                    self._past.feed(event.data)
            elif isinstance(event, (Output, Missed)):
                self._come.append(event)
                self._waits = None
                return

    def _send(self) -> None:
        """Send what there is room for."""
        sock = self._course.sock
        if self._unsent and self._room and not self._outbox:
            data = bytes(self._unsent[: min(self._room, _MOST_UNSENT)])
            del self._unsent[: len(data)]
            self._room -= len(data)
            self._outbox += _wire.frame(lib.EB_STDIN, [data])
        if self._ends_input and not self._unsent:
            self._ends_input = False
            self._outbox += _wire.frame(lib.EB_STDIN, [])
        if sock is None or not self._outbox:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._outbox = self._outbox[sock.send(self._outbox, _job_steps.SEND_FLAGS) :]


def _four(size: Sequence[int] | None) -> tuple[int, int, int, int]:
    rows, columns, *pixels = size or (0, 0)
    xpixel, ypixel = pixels or (0, 0)
    return rows, columns, xpixel, ypixel


# -- how they wait --


def wait(wanted: Wait, *, both: bool = False) -> None:
    """Wait for what steps have asked for; with `both`, for what can be read in any case."""
    if wanted.fd < 0:
        time.sleep(wanted.seconds or 0.0)
    else:
        reading = both or not wanted.writing
        ready(wanted.fd, wanted.seconds, reading=reading, writing=wanted.writing)


def is_ready(wanted: Wait) -> bool:
    """Return whether it need not be waited for."""
    if wanted.fd < 0:
        return False
    return ready(wanted.fd, 0.0, reading=True, writing=wanted.writing)


def run(steps: Steps[T]) -> T:
    """Run steps to their end, and return what they do."""
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
    return Job(client, run(_job_steps.start(client, Start(args, name, **options))))


def find(client: Client, job: str | int, uid: int | None) -> Job:
    """Return a job; see Client.job."""
    return Job(client, run(_job_steps.entry(client, job, uid)))


def find_all(client: Client, every: bool, uid: int | str | None) -> list[Job]:
    """Return jobs; see Client.jobs."""
    steps = _job_steps.entries(client, all=every, uid=_job_steps.user(uid))
    return [Job(client, entry) for entry in run(steps)]
