"""The workers of a Celery app, for `errand-boy map`."""

from __future__ import annotations

import os
import signal
import sys

from errand_boy._cli.parsing import UsageError
from errand_boy._hints import page

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any

    from errand_boy._map.result import Result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("on other machines", f"See {page('celery')}")
    group.add_argument(
        "--celery",
        metavar="APP",
        help="have the workers of this Celery app run the commands (module or module:app, as for "
        "celery -A); -j is then how many tasks are in progress at once (default: 1000)",
    )
    group.add_argument("--celery-queue", metavar="NAME", help="the queue that the tasks go to")


def of(options: argparse.Namespace) -> Any:
    """Return the Cluster that the options ask for, or None. Raises UsageError."""
    if options.celery is None:
        if options.celery_queue is not None:
            raise UsageError("--celery-queue needs --celery")
        return None
    if options.socket:
        raise UsageError("the commands are run by a daemon or by Celery's workers, not both")
    if options.memsuspend:
        raise UsageError("--memsuspend can't be combined with --celery")
    if options.grouping == "none":
        raise UsageError("--ungroup can't be combined with --celery: output comes with the end")
    try:
        from celery.app.utils import find_app  # noqa: PLC0415

        from errand_boy._map.celery_runner import Cluster  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"--celery needs Celery ({error}): pip install celery") from None
    sys.path.insert(0, os.getcwd())
    try:
        app = find_app(options.celery)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--celery {options.celery}: {error}") from None
    queue = options.celery_queue
    try:
        return Cluster(app, send=None if queue is None else {"queue": queue})
    except TypeError:
        raise UsageError(f"--celery {options.celery} is not a Celery app") from None


class Interrupted(BaseException):
    """Signal `number` asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def notes(result: Result) -> Iterator[str]:
    """Yield messages about a command that a worker has run."""
    if result.truncated:
        yield "its output beyond 16 MiB is lost"
    if getattr(result, "is_again", False):
        yield "Celery has run it again, because a worker disappeared"


def take_signals() -> None:
    """Have signals that end this process raise Interrupted, so that its tasks are revoked."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def end_by(interrupted: Interrupted) -> None:
    """End this process by the signal."""
    signal.signal(interrupted.number, signal.SIG_DFL)
    signal.raise_signal(interrupted.number)
