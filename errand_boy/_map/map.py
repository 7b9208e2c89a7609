"""Runs many commands at once. The helper handles pipes, waits and reaps."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Generator, Iterable, Sized
from functools import partial

from errand_boy._map.batch import Batch
from errand_boy._map.runner import Channels
from errand_boy._map.templates import DaemonSource, LocalSource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO, TypeVar

    from errand_boy._map.batch import Runner
    from errand_boy._map.command import Command, Job
    from errand_boy._map.result import Result

    T = TypeVar("T")


MOST_SENT = 1000  # tasks of Celery at a time, by default


def waiter(batch: Batch) -> Callable[[float | None], Iterable[int]]:
    """Watch the descriptors of `batch`; return a function that waits, and returns ready ones."""
    watched: dict[int, bool] = {}
    if hasattr(select, "poll"):
        poll = select.poll()
        only_in, both = select.POLLIN, select.POLLIN | select.POLLOUT
        batch.watch = lambda fd, writing: poll.register(fd, both if writing else only_in)
        batch.unwatch = poll.unregister
        return lambda rest: [fd for fd, _ in poll.poll(None if rest is None else rest * 1000)]

    def wait(rest: float | None) -> Iterable[int]:
        writing = [fd for fd, wanted in watched.items() if wanted]
        readable, writable, _ = select.select(list(watched), writing, [], rest)
        return {*readable, *writable}

    # eventlet has taken it away.
    batch.watch = watched.__setitem__
    batch.unwatch = watched.pop
    return wait


def drive(batch: Batch, check: bool = False) -> Generator[Result, None, None]:
    """Run a batch, and yield its results."""
    wait = waiter(batch)
    try:
        while True:
            yield from batch.ready(check)
            if not batch.pending():
                return
            for fd in wait(batch.timers.rest()):
                batch.on_ready(fd)
            batch.timers.ring()
    finally:
        batch.close()


def make(
    commands: Iterable[Command | Job | None],
    client: Any = None,
    *,
    on: Any = None,
    max_workers: int | None = None,
    **options: Any,
) -> Batch:
    """Return the batch for `map`'s arguments."""
    runner: Callable[[Batch], Runner]
    if on is None:
        source = LocalSource() if client is None else DaemonSource(client)
        runner = partial(Channels, source)
    else:
        from errand_boy._map import celery_runner  # noqa: PLC0415  it imports Celery

        cluster = on if isinstance(on, celery_runner.Cluster) else celery_runner.Cluster(on)
        runner = partial(celery_runner.Tasks, cluster)
        max_workers = MOST_SENT if max_workers is None else max_workers
    return Batch(runner, commands, max_workers=max_workers, **options)


def map(
    commands: Iterable[Command | None],
    *,
    check: bool = False,
    progress: bool = False,
    client: Any = None,
    **options: Any,
) -> Generator[Result, None, None]:
    """Run commands as errand_boy.map does; `client` is the client of a daemon, or None."""
    results = drive(make(commands, client, **options), check)
    if not progress:
        return results
    return with_bar(results, commands)


class Counter:
    """A progress line on a terminal."""

    def __init__(self, total: int | None, file: TextIO) -> None:
        from errand_boy._map import progress as _progress  # noqa: PLC0415  only those who need it pay

        self._tally = _progress.Tally(total)
        self._bar = _progress.Bar(self._tally, file)
        self.close = self._bar.close
        self._bar.show()

    def count(self, result: Any) -> None:
        """Count a result."""
        self._tally.count(*_outcome(result))
        self._bar.show()


def shown(commands: Any) -> tuple[int | None, TextIO] | None:
    """Return the arguments of a Counter for `commands`, or None if there is no terminal."""
    from errand_boy._map import progress as _progress  # noqa: PLC0415

    file = _progress.terminal()
    if file is None:
        return None
    return len(commands) if isinstance(commands, Sized) else None, file


def with_bar(results: Generator[T, None, None], commands: Any) -> Generator[T, None, None]:
    """Return `results`; on a terminal, also show a progress line."""
    place = shown(commands)
    return results if place is None else _counted(results, *place)


def _counted(
    results: Generator[T, None, None], total: int | None, file: TextIO
) -> Generator[T, None, None]:
    with contextlib.closing(Counter(total, file)) as bar, contextlib.closing(results):
        for result in results:
            bar.count(result)
            yield result


def _outcome(result: Any) -> tuple[bool, float]:
    """Return whether a Result or an Outcome is a failure, and the seconds that it took."""
    if isinstance(result, dict):
        return bool(result["returncode"] != 0 or result["error"]), result["duration"]
    return result.failed, result.duration
