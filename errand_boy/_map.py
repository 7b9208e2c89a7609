"""Many commands at once: their pipes, their waiting and their reaping are the helper's work."""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Generator, Iterable, Sized

from errand_boy._batch import Batch
from errand_boy._templates import DaemonSource, LocalSource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from errand_boy._batch import Command
    from errand_boy._result import Result


def waiter(batch: Batch) -> Callable[[float | None], Iterable[int]]:
    """Watch what `batch` says; return a function that waits, and returns what is ready."""
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


def make(commands: Iterable[Command], client: Any = None, **options: Any) -> Batch:
    """Return the batch for `map`'s arguments."""
    return Batch(LocalSource() if client is None else DaemonSource(client), commands, **options)


def map(
    commands: Iterable[Command],
    *,
    check: bool = False,
    progress: bool = False,
    client: Any = None,
    **options: Any,
) -> Generator[Result, None, None]:
    """Run commands, many at once, and yield a Result for each.

    `commands`: argument lists, or with ``shell=True`` strings, or mappings with `args` and, for
    that command, `input`, `timeout`, `shell`, `cwd`, `env`, `umask`, `start_new_session`,
    `process_group`, `restore_signals`. They are taken as results are: an endless iterator will do.
    What it raises is raised when the results of the commands before that have been taken.

    `max_workers`: how many run at once; by default four for each CPU.
    `ordered`: results come in the order of the commands, else as the commands end.
    `capture_output`, `stdout`, `stderr`, `text`, `encoding`, `errors`, `input`, `timeout`: as
    subprocess.run has them, but that output is captured unless `stdout` or `stderr` is given or
    `capture_output` is false, and that standard input is /dev/null without `input`.
    `shell`, `cwd`, `env`, `umask`, `start_new_session`, `process_group`, `restore_signals`: as
    Popen has them, for the commands whose mappings say nothing else.
    `max_output`: bytes of each output that are kept; with `spool`, all of a longer one is in a
    temporary file.
    `check`: raise at the first Result that is no success. Else a command that can't be started is a
    Result too. `progress`: show a bar on a terminal, if tqdm is installed.

    Each command leads a process group of its own, unless `process_group` or `start_new_session`
    says otherwise; after its `timeout` that group is killed. Closing the iterator ends what runs:
    its process group gets SIGTERM, and SIGKILL a second later; and so does the end of this process.

    The environment, the limits and so on are those of the first command's start, the working
    directory and umask too if it is a daemon that runs them. A change of this process's ids goes
    for the next command, one of its capabilities for those that are started 5 ms later. In a
    process forked from this one, the iterator raises ChildProcessError.

    Raises HelperError if there is no helper; by a daemon, which `client` is of, NoDaemonError and
    RefusedError.
    """
    results = drive(make(commands, client, **options), check)
    if progress and sys.stderr is not None and sys.stderr.isatty():
        total = len(commands) if isinstance(commands, Sized) else None
        with contextlib.suppress(ImportError):
            return _with_bar(results, total)
    return results


def _with_bar(
    results: Generator[Result, None, None], total: int | None
) -> Generator[Result, None, None]:
    from tqdm import tqdm  # noqa: PLC0415

    def counted() -> Generator[Result, None, None]:
        with tqdm(total=total, unit="command") as bar, contextlib.closing(results):
            for result in results:
                bar.update()
                yield result

    return counted()
