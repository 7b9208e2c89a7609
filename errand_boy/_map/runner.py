"""The commands of one `map` that a helper runs, each over a connection."""

from __future__ import annotations

import errno
import signal
import socket
import time
from io import BytesIO

from errand_boy._map.channel import Channel
from errand_boy._map.ending import Ending
from errand_boy._map.expiry import Expiry
from errand_boy._map.templates import Templates
from errand_boy._native import lib
from errand_boy._options import request as _request
from errand_boy._options.spawn_frame import MOST_ATTEMPTS
from errand_boy._process import helper
from errand_boy._wire.frames import Failed
from errand_boy._wire.stream import Ended, Lost, Output, Started
from errand_boy.errors import ErrandBoyError, HelperDiedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from errand_boy._map.batch import Batch
    from errand_boy._map.command import Job
    from errand_boy._map.result import Result
    from errand_boy._map.templates import Source

_CHUNK = 2 * lib.EB_MAX_OUTPUT  # bytes
_DONTWAIT = socket.MSG_DONTWAIT


class Channels:
    """Runs the commands of `batch`, each over a connection of `source`."""

    def __init__(self, source: Source, batch: Batch) -> None:
        self._source = source
        self.queues = source.queues
        self._batch = batch
        self._options = batch.options
        self._jobs = batch.jobs
        self._templates = Templates(source, batch.options, *batch.outputs)
        self._has_shares = batch.share is not None
        self._without_pids = batch.share is None and not batch.with_pids
        self._drains = batch.options.get("drain") is not None
        self._channels: dict[int, Channel] = {}
        self._idle: list[Channel] = []
        self._generation = 0  # of channels
        self._ending = Ending(batch.timers, batch.options, self._send, self._on_killed)
        self._expiry = Expiry(batch.timers, self._expire, batch.share)
        # recv() would allocate as much each time, which can take up to three system calls.
        self._buffer = memoryview(bytearray(_CHUNK))

    def start(self, job: Job) -> None:
        """Start a command. Raises only errors that concern all commands."""
        while job.attempts < MOST_ATTEMPTS:
            if self._source.changed():
                self._renew()
                if self._batch.queue is not None and self._channels:
                    self._batch.leave_queue()  # the former helper's
                    self._batch.start_again(job)
                    return
            job.begin()
            # A command may wait for its turn in a daemon: its time begins when it runs.
            brief = job.timeout is None and self._without_pids
            if job.options is not None or self._drains:
                brief = brief and not self._ending.drains(job)
            template = None
            try:
                template = self._templates.get(
                    job.options, job.input is not None, brief, self._batch.queue
                )
                request = template.frame(job.argv)
                channel = self._idle.pop() if self._idle else self._connect()
            except (OSError, ValueError, IndexError) as error:
                if isinstance(error, ErrandBoyError):
                    raise
                if template is None and job.options is None and isinstance(error, ValueError):
                    raise  # it concerns all commands
                if not self._batch.put_off(job, getattr(error, "errno", None)):
                    self._finish(job, self._jobs.failed(job, error))
                return
            if channel is None:
                continue
            channel.job = job
            input = BytesIO(job.input or b"") if template.streams & 1 else None
            channel.stream.begin(template.streams, brief, request, input)
            self._send(channel, template.fds)
            return
        raise helper.ends_at_once(helper.runner)

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
        job = channel.job
        if job is not None and (ended := stream.receive_end(data)) is not None:
            channel.job = None
            self._release(channel)
            self._finish(job, self._jobs.ended(job, ended))
            return
        for event in stream.receive(data):
            if type(event) is Lost:
                self._on_lost(channel, event)
                return
            job = channel.job
            assert job is not None
            if type(event) is Ended:
                self._over(channel, self._jobs.ended(job, event))
                if not stream.is_free:  # descendants still hold its output open
                    return
            elif type(event) is Output:
                self._jobs.write(job, event.number, event.data)
                if job.limited is not None and job.limited.is_too_loud:
                    stream.signal(lib.EB_WHOLE_TREE, signal.SIGKILL)
            elif type(event) is Started:
                job.begun = time.monotonic()
                self._expiry.begin(channel, job)
            elif type(event) is Failed:
                if event.stage <= lib.EB_STAGE_FDS and self._batch.put_off(job, event.errno):
                    channel.job = None
                    self._drop(channel)  # it takes up a descriptor in the helper
                    return
                options = self._options if job.options is None else job.options
                why = _request.spawn_error(event, job.argv[0], options["cwd"], options)
                self._over(channel, self._jobs.failed(job, why))
        if stream.unsent and channel.job is not None:
            self._send(channel)
        if stream.ended is not None and channel.job is not None:
            self._ending.drain(channel, channel.job)

    def running(self) -> list[Job]:
        """Return the running commands, in the order of their starts; needs `with_pids`."""
        jobs = [c.job for c in self._channels.values() if c.job is not None and c.stream.pid]
        return sorted(jobs, key=lambda job: job.begun)

    def signal_group(self, job: Job, number: int) -> None:
        """Send a signal to the process group of a command; needs `with_pids`."""
        for channel in self._channels.values():
            if channel.job is job and channel.stream.pid:
                channel.stream.signal(-channel.stream.pid, number)
                self._send(channel)

    def stop(self, now: bool) -> None:
        """If `now`, abandon the commands that run."""
        if now:
            for channel in list(self._channels.values()):
                self._abandon(channel)

    def abandon(self, index: int) -> None:
        """End a command, if it runs."""
        for channel in list(self._channels.values()):
            if channel.job is not None and channel.job.index == index:
                self._abandon(channel)

    def close(self) -> None:
        """End the commands that still run: their groups get SIGTERM, and SIGKILL a second later."""
        # The newest first: else those that wait for a place might get one now.
        for channel in sorted(self._channels.values(), key=_age):
            self._batch.unwatch(channel.fd)
            connection = channel.connection
            if channel.stream.is_free and channel.generation == self._generation:
                connection.greeted = channel.stream.greeted
                connection.give_back()
            else:
                connection.close()
        self._channels.clear()
        self._idle.clear()
        self._templates.forget()

    # -- channels --

    def _connect(self) -> Channel | None:
        connection = self._source.connect()
        if connection is None:
            return None
        channel = Channel(connection, self._generation)
        self._batch.watch(channel.fd, False)
        self._channels[channel.fd] = channel  # last: what is in there is watched, for `close`
        return channel

    def _renew(self) -> None:
        """Drop the connections to a former helper, or from before a change of ids or a fork."""
        self._generation += 1
        while self._idle:
            self._drop(self._idle.pop())
        self._templates.forget()

    def _release(self, channel: Channel) -> None:
        """Keep a channel for another command, if it can carry one."""
        if channel.stream.is_free and channel.generation == self._generation:
            self._idle.append(channel)
        else:
            self._drop(channel)

    def _send(self, channel: Channel, fds: Sequence[int] = ()) -> None:
        if channel.send(fds):
            self._batch.watch(channel.fd, channel.awaits_room)

    def _drop(self, channel: Channel) -> None:
        if self._channels.pop(channel.fd, None) is not None:
            self._batch.unwatch(channel.fd)
        channel.connection.close()

    # -- the course of a command --

    def _expire(self, channel: Channel, job: Job) -> None:
        job.timed_out = True
        self._ending.end(channel, job)

    def _on_killed(self, channel: Channel, job: Job, ended: Ended) -> None:
        self._over(channel, self._jobs.ended(job, ended))

    def _over(self, channel: Channel, result: Result) -> None:
        job = channel.job
        assert job is not None
        channel.job = None
        self._release(channel)
        self._finish(job, result)

    def _finish(self, job: Job, result: Result) -> None:
        now = time.monotonic()
        brief = None if result._end is None else result._end.brief
        if brief is None:
            result.duration = now - job.begun
        else:
            result.duration, result._place = brief[0] / 1e6, brief[2]
        result._begun = now - result.duration
        if job.timer is not None or self._has_shares:
            self._expiry.end(job, result)
        self._batch.finish(job, result)

    def _abandon(self, channel: Channel) -> None:
        """End the command of a channel, if it has one, without a result."""
        job, channel.job = channel.job, None
        if job is not None:
            self._expiry.end(job)
            self._drop(channel)
            self._batch.abandoned(job)

    def _on_lost(self, channel: Channel, lost: Lost) -> None:
        job, channel.job = channel.job, None
        if job is None and channel in self._idle:
            self._idle.remove(channel)
        self._drop(channel)
        if job is not None:
            self._expiry.end(job)
            if lost.may_resend:
                # A helper that is short of descriptors closes the connections that it can't take.
                is_short = not channel.stream.greeted and self._source.is_there()
                if not (is_short and self._batch.put_off(job, errno.EMFILE)):
                    self._batch.start_again(job)
                return
        if not isinstance(lost.error, HelperDiedError):
            raise lost.error
        if job is not None:
            self._finish(job, self._jobs.without_end(job, -signal.SIGKILL, lost.error))


def _age(channel: Channel) -> float:
    return 0 if channel.job is None else -channel.job.begun
