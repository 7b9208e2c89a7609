"""The commands of one `map`: when each one starts, and what the results are."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from heapq import heappop, heappush

from errand_boy._map.command import Job, Jobs, check_several
from errand_boy._map.policy import Halt, Timeout
from errand_boy._map.result import Results
from errand_boy._options import request
from errand_boy._timers import Timers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from errand_boy._map.command import Command
    from errand_boy._map.policy import Retries
    from errand_boy._map.result import Result
    from errand_boy._timers import Timer

    class Gate(Protocol):
        """Decides when commands may be started."""

        def closed_for(self, live: int) -> float:
            """Return in how many seconds to ask again, or 0 if a command may start now."""

        def count_start(self) -> None:
            """Count a command that has started."""

    class Runner(Protocol):
        """Runs the commands of a Batch, and reports the end of each by one of these calls.

        `Batch.finish`: the command is over. `Batch.start_again`: it was not started, and the batch
        must give it again. `Batch.put_off`: the same, for lack of descriptors. `Batch.abandoned`:
        it has no result.

        `queues`: whether commands may be given ahead, as `Batch.queue` says.
        """

        queues: bool

        def start(self, job: Job) -> None:
            """Start a command. Raises only errors that concern all commands."""

        def on_ready(self, fd: int) -> None:
            """Handle a watched descriptor that is ready."""

        def running(self) -> list[Job]:
            """Return the commands that are known to run, in the order of their starts."""

        def signal_group(self, job: Job, number: int) -> None:
            """Send a signal to the process group of a command that runs."""

        def stop(self, now: bool) -> None:
            """Abandon the commands that have not begun; if `now`, also those that run."""

        def abandon(self, index: int) -> None:
            """End the command of this index, if it is one of those given."""

        def close(self) -> None:
            """End what still runs."""


NOT_NOW = object()  # from an iterator of commands: none yet; the driver knows when to ask again

_LEAST_AHEAD = 64  # commands
_PER_CPU = 4  # workers
_AHEAD = 4  # quick commands requested before there is a place for them, by
_MOST_PLACES = 16  # workers at most: the more they are, the less is gained
_QUICK = 0.005  # seconds

_queue_numbers = itertools.count()


def _unwatched(*_: Any) -> None:
    pass


class Batch:
    """The commands of one `map`: those that run, and the results that nobody has taken yet.

    `runner` is called with the batch, and returns a Runner. A driver sets `watch` and `unwatch`. It
    waits, for `timers.rest()` seconds at most, until a watched descriptor is readable, or also
    writable where `watch` says so. Then it calls `on_ready` for those that are ready, and
    `timers.ring`. `fill` starts commands and `take` takes a result. If `pending` is false after
    that, no more results will come.
    """

    def __init__(
        self,
        runner: Callable[[Batch], Runner],
        commands: Iterable[Command | Job | None],
        *,
        max_workers: int | None = None,
        capture_output: bool = True,
        stdout: Any = None,
        stderr: Any = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        input: Any = None,
        timeout: float | str | None = None,
        retries: int | Retries | None = None,
        halt: str | Halt = "never",
        ordered: bool = True,
        max_output: int | None = None,
        spool: bool = False,
        shell: bool = False,
        cwd: Any = None,
        env: Mapping[Any, Any] | None = None,
        umask: int = -1,
        start_new_session: bool = False,
        process_group: int | None = None,
        restore_signals: bool = True,
        user: str | int | None = None,
        group: str | int | None = None,
        extra_groups: Iterable[str | int] | None = None,
        gate: Gate | None = None,
        with_pids: bool = False,
        may_queue: bool = True,
        **more: Any,
    ) -> None:
        unknown = request.unknown(more.keys())
        if unknown:
            raise request.unexpected("map()", unknown, Batch.__init__.__kwdefaults__ or ())
        check_several(commands, shell)
        if max_workers is None:
            max_workers = _PER_CPU * len(os.sched_getaffinity(0))
        if not isinstance(max_workers, int):
            raise TypeError(f"max_workers must be a number, not {max_workers!r}")
        if max_workers < 1:
            raise ValueError("max_workers must be at least 1")
        if capture_output:
            stdout = subprocess.PIPE if stdout is None else stdout
            stderr = subprocess.PIPE if stderr is None else stderr
        self.watch: Callable[[int, bool], Any] = _unwatched
        self.unwatch: Callable[[int], Any] = _unwatched
        self.on_result: Callable[[Result], Any] | None = None  # called as soon as a command ends
        self._owner = os.getpid()
        self._commands = iter(commands)
        self._live = 0
        self._limit = max_workers  # of those that are under way
        self.queue: tuple[int, int] | None = None  # its number, and how many places it has
        self.max_workers = max_workers
        self.options: dict[str, Any] = {
            "cwd": cwd,
            "env": env,
            "umask": umask,
            "start_new_session": start_new_session,
            "process_group": process_group,
            "restore_signals": restore_signals,
            **request.ids(user, group, extra_groups),
            **more,
        }
        self.outputs = stdout, stderr
        self.halt = Halt(halt) if not isinstance(halt, Halt) else halt
        if isinstance(commands, Sized):
            self.halt.total = len(commands)
        elif self.halt.needs_total and self.halt.total is None:
            raise ValueError("halt: done=N% needs commands that have a length")
        self.share = Timeout(timeout) if isinstance(timeout, str) else None
        self.with_pids = with_pids
        self.jobs = Jobs(
            self.options,
            captured=(
                stdout == subprocess.PIPE or bool(more.get("pty")),
                stderr == subprocess.PIPE,
            ),
            text=text,
            encoding=encoding,
            errors=errors,
            input=input,
            timeout=None if isinstance(timeout, str) else timeout,
            retries=retries,
            shell=shell,
            max_output=max_output,
            spool=spool,
        )
        self._given = 0  # commands taken from the iterator
        self._failure: Exception | None = None  # of the iterator, raised after the earlier results
        self._exhausted = False
        self._stopped = False
        self._is_dry = False  # there are no commands now, but results may lead to more
        self._gate = gate
        self._gate_timer: Timer | None = None
        self._waiting: deque[Job] = deque()  # to start again
        self._delayed: dict[Job, Timer] = {}  # to start again after a delay
        self._slots: list[int] = []  # used before, and free now
        self._most_slots = 0
        self.timers = Timers()
        self._results = Results(ordered)
        self._runner = runner(self)
        # What a result or a number decides must not be decided ahead of it.
        unlike = gate, retries, timeout, input, more.get("pty"), more.get("drain")
        if (
            may_queue
            and self._runner.queues
            and 1 < max_workers <= _MOST_PLACES
            and self.halt.never
            and not with_pids
            and all(option is None for option in unlike)
        ):
            self.queue = next(_queue_numbers), max_workers
        self.on_ready = self._runner.on_ready
        self.running = self._runner.running
        self.signal_group = self._runner.signal_group
        self.close = self._runner.close

    # -- the driver's side --

    @property
    def max_workers(self) -> int:
        """How many commands may run at once."""
        return self._most

    @max_workers.setter
    def max_workers(self, number: int) -> None:
        self._ahead = max(_LEAST_AHEAD, 4 * number)
        self._set_most(number)

    @property
    def next_slot(self) -> int:
        """The slot of the next command: the smallest number that no other command has."""
        return self._slots[0] if self._slots else self._most_slots + 1

    @property
    def open_output(self) -> Callable[[int, int], Any] | None:
        """The function that takes a command's output, as in Jobs; None: the result keeps it."""
        return self.jobs.open_output

    @open_output.setter
    def open_output(self, function: Callable[[int, int], Any] | None) -> None:
        self.jobs.open_output = function

    def fill(self) -> None:
        """Start as many commands as may start now."""
        if self._owner != os.getpid():
            text = "the commands were started in another process, before a fork"
            raise ChildProcessError(errno.ECHILD, text)
        self._is_dry = False
        while self._live < self._limit and (self._gate is None or self._may_start(self._gate)):
            job = self._waiting.popleft() if self._waiting else self._next()
            if job is None:
                return
            if self.queue is not None:
                if not job.is_plain:
                    self._waiting.appendleft(job)
                    self.leave_queue()
                    continue
            elif not job.slot:
                job.slot = self._slot()
            self._live += 1
            if self._gate is not None:
                self._gate.count_start()
            self._runner.start(job)

    def ready(self, check: bool) -> Iterator[Result]:
        """Start as many commands as may start now, and yield the results that are ready.

        With `check`, raise an exception at the first result that is not a success.
        """
        self.fill()
        while (result := self.take()) is not None:
            if check:
                result.check_returncode()
            yield result
            self.fill()

    def pending(self) -> bool:
        """Return whether there is anything to wait for.

        If the iterator of commands has raised an exception, raise it once the earlier results have
        been taken.
        """
        if self._live or self._waiting or self._delayed:
            return True
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return not (self._exhausted or self._is_dry)

    def take(self) -> Result | None:
        """Return a result if one is ready."""
        # After a stop, some results before this one may never come.
        return self._results.take(self._stopped and not self._live)

    def stop(self, *, now: bool = False) -> None:
        """Start no more commands. Those that run may end; if `now`, end them without results."""
        self._exhausted = self._stopped = True
        for timer in self._delayed.values():
            timer.cancel()
        left = [*self._waiting, *self._delayed]
        self._waiting.clear()
        self._delayed.clear()
        for job in left:
            if job.last is not None:
                self._put(job.last)
        self._runner.stop(now)

    def cancel(self, index: int) -> None:
        """Do not start the command of this index, or end it. Its result, not yet taken, is dropped.

        Only for results that are not `ordered`.
        """
        for job in [*self._waiting, *self._delayed]:
            if job.index == index:
                with suppress(ValueError):
                    self._waiting.remove(job)
                timer = self._delayed.pop(job, None)
                if timer is not None:
                    timer.cancel()
                self._free(job)
        self._runner.abandon(index)
        self._results.drop(index)

    # -- the runner's side --

    def leave_queue(self) -> None:
        """Give no more commands ahead, and none at all before those that were given are over."""
        if self.queue is not None:
            self.queue = None
            self._limit = self._most if not self._live else 0

    def finish(self, job: Job, result: Result) -> None:
        """Accept the result of a command that has ended."""
        self._leave()
        if self.queue is not None:
            self._limit = self._most + _AHEAD if result.duration < _QUICK else self._most
        result.index = job.index
        result.slot = job.slot or result._place
        job.runs += 1
        result.runs = job.runs
        if job.retries is not None and result.failed and not self._stopped:
            delay = job.retries.delay(job.runs, result)
            if delay is not None:
                self._put_back(job, result, delay)  # in the same slot, which it may know
                return
        self._free(job)
        self._put(result)

    def start_again(self, job: Job) -> None:
        """Start a command as soon as possible, because an attempt has failed to start it."""
        self._leave()
        self._waiting.append(job)

    def put_off(self, job: Job, error: int | None) -> bool:
        """If descriptors are short, run fewer commands at once; else return False."""
        if self._live == 1 or error not in (errno.EMFILE, errno.ENFILE):
            return False
        self._set_most(min(self._most, self._live - 1))
        job.attempts = 0  # another command ends before the next attempt
        self.start_again(job)
        return True

    def abandoned(self, job: Job) -> None:
        """Note that a command has no result."""
        self._leave()
        self._free(job)

    def _set_most(self, number: int) -> None:
        self._most = number
        if self.queue is not None:
            self.leave_queue()
        elif self._limit:
            self._limit = number

    def _leave(self) -> None:
        """Take note that one command less is under way."""
        self._live -= 1
        if not self._live:
            self._limit = self._most

    def _next(self) -> Job | None:
        """Return the next command; None if there is none, or if enough results are waiting."""
        while not self._exhausted and self._given - self._results.taken < self._ahead:
            try:
                command: Any = next(self._commands)
                if command is NOT_NOW:
                    return None
                if command is None:
                    self._is_dry = True
                    return None
                job = command if type(command) is Job else self.jobs.make(self._given, command)
            except StopIteration:
                self._exhausted = True
                return None
            except Exception as error:  # the earlier results come first
                self._exhausted = True
                self._failure = error
                return None
            self._given += 1
            return job
        return None

    def _may_start(self, gate: Gate) -> bool:
        """Return whether a command may start now; if not, set a timer to ask again."""
        seconds = gate.closed_for(self._live)
        if not seconds:
            return True
        if self._gate_timer is None:
            self._gate_timer = self.timers.after(seconds, self._ask_again)
        return False

    def _ask_again(self) -> None:
        self._gate_timer = None  # the driver calls `fill`, which asks

    def _slot(self) -> int:
        if self._slots:
            return heappop(self._slots)
        self._most_slots += 1
        return self._most_slots

    def _free(self, job: Job) -> None:
        if job.slot:
            heappush(self._slots, job.slot)
            job.slot = 0

    def _put_back(self, job: Job, result: Result, delay: float) -> None:
        """Have a command run again after `delay` seconds."""
        if job.last is not None:
            job.last.close()
        job.last = result
        job.attempts = 0

        def again() -> None:
            del self._delayed[job]
            self._waiting.append(job)

        self._delayed[job] = self.timers.after(delay, again)

    def _put(self, result: Result) -> None:
        self._results.put(result)
        if self.on_result is not None:
            self.on_result(result)
        if self.halt.never:
            return
        self.halt.count(result)
        if self.halt.due and not self._stopped:
            self.stop(now=self.halt.due == "now")
