"""The commands of one `map`: which run, over which connection, and what became of them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from heapq import heappop, heappush
from io import BytesIO

from errand_boy import _helper, _request
from errand_boy._channel import Channel
from errand_boy._ending import Ending
from errand_boy._expiry import Expiry
from errand_boy._frame import MOST_ATTEMPTS
from errand_boy._job import Job, Jobs, check_several, unknown_options
from errand_boy._native import lib
from errand_boy._policy import Halt, Timeout
from errand_boy._result import Results
from errand_boy._stream import Ended, Lost, Output, Started
from errand_boy._templates import Templates
from errand_boy._timers import Timers
from errand_boy._wire import Failed
from errand_boy.errors import ErrandBoyError, HelperDiedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from errand_boy._job import Command
    from errand_boy._policy import Retries
    from errand_boy._result import Result
    from errand_boy._templates import Source
    from errand_boy._timers import Timer

    class Gate(Protocol):
        """What says when commands may be started."""

        def closed_for(self, live: int) -> float:
            """Return in how many seconds to ask again; 0: one may be started now."""

        def count_start(self) -> None:
            """Take note that one has been started."""


NOT_NOW = object()  # from an iterator of commands: none yet, but the driver knows when to ask

_CHUNK = 2 * lib.EB_MAX_OUTPUT  # bytes
_LEAST_AHEAD = 64  # commands
_PER_CPU = 4  # workers

_DONTWAIT = socket.MSG_DONTWAIT


def _unwatched(*_: Any) -> None:
    pass


class Batch:
    """The commands of one `map`: those that run, and the results that nobody has taken yet.

    A driver sets `watch` and `unwatch`, and waits for what they name to be readable, or writable
    too where `watch` says so, for `timers.rest()` seconds at most; it then calls `on_ready` for
    what is ready, and `timers.ring`. `fill` starts commands, `take` takes a result, and there is
    none to come any more when `pending` says so after that.
    """

    def __init__(
        self,
        source: Source,
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
        **more: Any,
    ) -> None:
        unknown = _request.unknown(more.keys())
        if unknown:
            raise unknown_options(unknown, Batch.__init__.__kwdefaults__ or ())
        check_several(commands, shell)
        if max_workers is None:
            max_workers = _PER_CPU * len(os.sched_getaffinity(0))
        if not isinstance(max_workers, int):
            raise TypeError(f"max_workers must be a number, not {max_workers!r}")
        if max_workers < 1:
            raise ValueError("max_workers must be at least 1")
        if stdout is not None or stderr is not None:
            capture_output = False
        elif capture_output:
            stdout = stderr = subprocess.PIPE
        self.watch: Callable[[int, bool], Any] = _unwatched
        self.unwatch: Callable[[int], Any] = _unwatched
        self.on_result: Callable[[Result], Any] | None = None  # called before its turn
        self._owner = os.getpid()
        self._source = source
        self._commands = iter(commands)
        self.max_workers = max_workers
        self._options: dict[str, Any] = {
            "cwd": cwd,
            "env": env,
            "umask": umask,
            "start_new_session": start_new_session,
            "process_group": process_group,
            "restore_signals": restore_signals,
            **_request.ids(user, group, extra_groups),
            **more,
        }
        self.halt = Halt(halt) if not isinstance(halt, Halt) else halt
        if isinstance(commands, Sized):
            self.halt.total = len(commands)
        elif self.halt.needs_total and self.halt.total is None:
            raise ValueError("halt: done=N% needs commands that have a length")
        share = Timeout(timeout) if isinstance(timeout, str) else None
        self.jobs = Jobs(
            self._options,
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
        self._templates = Templates(source, self._options, stdout, stderr)
        self._given = 0  # commands taken from the iterator
        self._failure: Exception | None = None  # of the iterator's, for when its turn comes
        self._exhausted = False
        self._stopped = False
        self._is_dry = False  # there are no commands, unless results lead to some
        self._gate = gate
        self._gate_timer: Timer | None = None
        self._has_shares = share is not None
        self._without_pids = share is None and not with_pids
        self._channels: dict[int, Channel] = {}
        self._idle: list[Channel] = []
        self._generation = 0  # of channels
        self._live = 0
        self._waiting: deque[Job] = deque()  # to be started again
        self._delayed: dict[Job, Timer] = {}  # the same, but not yet
        self._slots: list[int] = []  # that are free, of those that have been used
        self._most_slots = 0
        self.timers = Timers()
        self._ending = Ending(self.timers, self._options, self._send, self._on_killed)
        self._expiry = Expiry(self.timers, self._expire, share)
        self._results = Results(ordered)
        # recv() would allocate as much each time, which may be a system call or three.
        self._buffer = memoryview(bytearray(_CHUNK))

    # -- the driver's side --

    @property
    def max_workers(self) -> int:
        """How many run at once, at most."""
        return self._most

    @max_workers.setter
    def max_workers(self, number: int) -> None:
        self._most = number
        self._ahead = max(_LEAST_AHEAD, 4 * number)

    @property
    def next_slot(self) -> int:
        """The slot of the command that is taken next: the smallest that no other has."""
        return self._slots[0] if self._slots else self._most_slots + 1

    @property
    def open_output(self) -> Callable[[int, int], Any] | None:
        """What takes a command's output, as Jobs has it; None: it is kept for the result."""
        return self.jobs.open_output

    @open_output.setter
    def open_output(self, function: Callable[[int, int], Any] | None) -> None:
        self.jobs.open_output = function

    def fill(self) -> None:
        """Start what may be started."""
        if self._owner != os.getpid():
            text = "the commands were started in another process, before a fork"
            raise ChildProcessError(errno.ECHILD, text)
        self._is_dry = False
        while self._live < self._most and (self._gate is None or self._may_start(self._gate)):
            job = self._waiting.popleft() if self._waiting else self._next()
            if job is None:
                return
            if not job.slot:
                job.slot = self._slot()
            self._start(job)

    def ready(self, check: bool) -> Iterator[Result]:
        """Start what may be started, and take the results that are ready.

        With `check`, raise at the first that is no success.
        """
        self.fill()
        while (result := self.take()) is not None:
            if check:
                result.check_returncode()
            yield result
            self.fill()

    def pending(self) -> bool:
        """Return whether there is anything to wait for.

        Raises what the iterator of commands raised, once the results of those before it are taken.
        """
        if self._live or self._waiting or self._delayed:
            return True
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return not (self._exhausted or self._is_dry)

    def take(self) -> Result | None:
        """Return a result if one is ready."""
        # When it was stopped there may be some before it that never come.
        return self._results.take(self._stopped and not self._live)

    def on_ready(self, fd: int) -> None:
        """Move data over a channel."""
        channel = self._channels.get(fd)
        if channel is None:
            return
        stream = channel.stream
        if stream.unsent:
            self._send(channel)
        try:
            size = channel.sock.recv_into(self._buffer, 0, _DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self._on_lost(channel, stream.end(isinstance(error, ConnectionResetError)))
            return
        if not size:
            self._on_lost(channel, stream.end())
            return
        data = self._buffer[:size]
        if channel.job is not None and (ended := stream.receive_end(data)) is not None:
            self._over(channel, self.jobs.ended(channel.job, ended))
            return
        for event in stream.receive(data):
            if type(event) is Lost:
                self._on_lost(channel, event)
                return
            job = channel.job
            assert job is not None
            if type(event) is Ended:
                self._over(channel, self.jobs.ended(job, event))
                if not stream.is_free:  # the rest is of those who hold its output
                    return
            elif type(event) is Output:
                self.jobs.write(job, event.number, event.data)
                if job.limited is not None and job.limited.is_too_loud:
                    stream.signal(lib.EB_WHOLE_TREE, signal.SIGKILL)
            elif type(event) is Started:
                self._on_started(channel, job)
            elif type(event) is Failed:
                if event.stage <= lib.EB_STAGE_FDS and self._postpone(channel, event.errno):
                    return
                options = self._options if job.options is None else job.options
                why = _request.spawn_error(event, job.argv[0], options["cwd"], options)
                self._over(channel, self.jobs.failed(job, why))
        if stream.unsent and channel.job is not None:
            self._send(channel)
        if stream.ended is not None and channel.job is not None:
            self._ending.drain(channel, channel.job)

    def stop(self, *, now: bool = False) -> None:
        """Start no more commands; what runs may end, or `now` is ended, and has no result."""
        self._exhausted = self._stopped = True
        for timer in self._delayed.values():
            timer.cancel()
        left = [*self._waiting, *self._delayed]
        self._waiting.clear()
        self._delayed.clear()
        for job in left:
            if job.last is not None:
                self._put(job.last)
        if now:
            for channel in list(self._channels.values()):
                self._abandon(channel)

    def cancel(self, index: int) -> None:
        """Have a command not be started, or end it; it has no result."""
        for job in [*self._waiting, *self._delayed]:
            if job.index == index:
                with suppress(ValueError):
                    self._waiting.remove(job)
                timer = self._delayed.pop(job, None)
                if timer is not None:
                    timer.cancel()
        for channel in list(self._channels.values()):
            if channel.job is not None and channel.job.index == index:
                self._abandon(channel)

    def running(self) -> list[tuple[Job, Channel]]:
        """Return the jobs that run, by the time of their start, and their channels."""
        live = [(c.job, c) for c in self._channels.values() if c.job is not None and c.stream.pid]
        return sorted(live, key=lambda pair: pair[0].begun)

    def signal_group(self, channel: Channel, number: int) -> None:
        """Send a signal to the process group of the command of a channel; needs `with_pids`."""
        channel.stream.signal(-channel.stream.pid, number)
        self._send(channel)

    def close(self) -> None:
        """End what still runs: its process group gets SIGTERM, and SIGKILL a second later."""
        for channel in list(self._channels.values()):
            self.unwatch(channel.fd)
            connection = channel.connection
            if channel.stream.is_free and channel.generation == self._generation:
                connection.greeted = channel.stream.greeted
                connection.give_back()
            else:
                connection.close()
        self._channels.clear()
        self._idle.clear()
        self._templates.forget()

    # -- starting --

    def _next(self) -> Job | None:
        """Return the next command, unless there is none, or enough of them are ahead."""
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
            except Exception as error:  # those before it have their results first
                self._exhausted = True
                self._failure = error
                return None
            self._given += 1
            return job
        return None

    def _may_start(self, gate: Gate) -> bool:
        """Return whether a command may be started now; else come back when to ask again."""
        seconds = gate.closed_for(self._live)
        if not seconds:
            return True
        if self._gate_timer is None:
            self._gate_timer = self.timers.after(seconds, self._ask_again)
        return False

    def _ask_again(self) -> None:
        self._gate_timer = None  # the driver does

    def _slot(self) -> int:
        if self._slots:
            return heappop(self._slots)
        self._most_slots += 1
        return self._most_slots

    def _free(self, job: Job) -> None:
        heappush(self._slots, job.slot)
        job.slot = 0

    def _start(self, job: Job) -> None:
        while job.attempts < MOST_ATTEMPTS:
            if self._source.changed():
                self._renew()
            job.begin()
            # The time of one that waits for its turn in a daemon begins with the news of its start.
            brief = job.timeout is None and self._without_pids and not self._ending.drains(job)
            template = None
            try:
                template = self._templates.get(job.options, job.input is not None, brief)
                request = template.frame(job.argv)
                channel = self._idle.pop() if self._idle else self._connect()
            except (OSError, ValueError, IndexError) as error:
                if isinstance(error, ErrandBoyError):
                    raise
                if template is None and job.options is None and isinstance(error, ValueError):
                    raise  # it is wrong for all of them
                if not self._put_off(job, getattr(error, "errno", None)):
                    self._finish(job, self.jobs.failed(job, error))
                return
            if channel is None:
                continue
            channel.job = job
            self._live += 1
            if self._gate is not None:
                self._gate.count_start()
            input = BytesIO(job.input or b"") if template.streams & 1 else None
            channel.stream.begin(template.streams, brief, request, input)
            self._send(channel, template.fds)
            return
        raise _helper.ends_at_once(_helper.runner)

    def _connect(self) -> Channel | None:
        connection = self._source.connect()
        if connection is None:
            return None
        channel = Channel(connection, self._generation)
        self._channels[channel.fd] = channel
        self.watch(channel.fd, False)
        return channel

    def _put_off(self, job: Job, error: int | None) -> bool:
        """Go on with fewer at once, if it is descriptors that are short."""
        if not self._live or error not in (errno.EMFILE, errno.ENFILE):
            return False
        self._most = self._live
        job.attempts = 0  # another ends before the next
        self._waiting.append(job)
        return True

    def _postpone(self, channel: Channel, error: int) -> bool:
        """Put off the command of a channel if the helper is short of descriptors."""
        job = channel.job
        assert job is not None
        self._live -= 1
        if not self._put_off(job, error):
            self._live += 1
            return False
        channel.job = None
        self._drop(channel)  # it takes one
        return True

    def _renew(self) -> None:
        """Let go of what belongs to a former helper, or to who this process was."""
        self._generation += 1
        while self._idle:
            self._drop(self._idle.pop())
        self._templates.forget()

    def _send(self, channel: Channel, fds: Sequence[int] = ()) -> None:
        if channel.send(fds):
            self.watch(channel.fd, channel.awaits_room)

    # -- the course of one --

    def _on_started(self, channel: Channel, job: Job) -> None:
        job.begun = time.monotonic()
        self._expiry.begin(channel, job)

    def _expire(self, channel: Channel, job: Job) -> None:
        job.timed_out = True
        self._ending.end(channel, job)

    def _on_killed(self, channel: Channel, job: Job, ended: Ended) -> None:
        self._over(channel, self.jobs.ended(job, ended))

    def _over(self, channel: Channel, result: Result) -> None:
        job = channel.job
        assert job is not None
        channel.job = None
        self._live -= 1
        if channel.stream.is_free and channel.generation == self._generation:
            self._idle.append(channel)
        else:
            self._drop(channel)
        self._finish(job, result)

    def _finish(self, job: Job, result: Result) -> None:
        now = time.monotonic()
        brief = None if result._end is None else result._end.brief
        result.duration = now - job.begun if brief is None else brief[0] / 1e6
        result._begun = now - result.duration
        result.index = job.index
        result.slot = job.slot
        job.runs += 1
        result.runs = job.runs
        if job.timer is not None or self._has_shares:
            self._expiry.end(job, result)
        if job.retries is not None and result.failed and not self._stopped:
            delay = job.retries.delay(job.runs, result)
            if delay is not None:
                self._put_back(job, result, delay)  # in its slot, which it may have been told
                return
        self._free(job)
        self._put(result)

    def _put_back(self, job: Job, result: Result, delay: float) -> None:
        """Have a command run again, after so many seconds."""
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

    def _abandon(self, channel: Channel) -> None:
        """End the command of a channel, if it has one, without a result."""
        job, channel.job = channel.job, None
        if job is not None:
            self._live -= 1
            self._expiry.end(job)
            self._free(job)
            self._drop(channel)

    def _drop(self, channel: Channel) -> None:
        if self._channels.pop(channel.fd, None) is not None:
            self.unwatch(channel.fd)
        channel.connection.close()

    def _on_lost(self, channel: Channel, lost: Lost) -> None:
        job, channel.job = channel.job, None
        if job is None and channel in self._idle:
            self._idle.remove(channel)
        self._drop(channel)
        if job is not None:
            self._live -= 1
            self._expiry.end(job)
            if lost.may_resend:
                # A helper that is short of descriptors closes what it can't take.
                is_short = not channel.stream.greeted and self._source.is_there()
                if not (is_short and self._put_off(job, errno.EMFILE)):
                    self._waiting.append(job)
                return
        if not isinstance(lost.error, HelperDiedError):
            raise lost.error
        if job is not None:
            self._finish(job, self.jobs.without_end(job, -signal.SIGKILL, lost.error))
