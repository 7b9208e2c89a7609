"""How a start waits: by blocking this thread, or in an event loop or a hub of greenlets.

A start is a generator. It yields what it waits for: a time in seconds (a float), or a descriptor
and whether it must become writable instead of readable. A driver waits, and then continues the
generator. If the driver closes it, for example after an exception, the start is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from errand_boy._process import direct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from errand_boy._wire.frames import Failed

    Wait: TypeAlias = float | tuple[int, bool]
    Steps: TypeAlias = Generator[Wait, None, None]
    Outcome: TypeAlias = Generator[Wait, None, Failed | None]


class Driver:
    """How a start waits.

    `run(steps)` runs the steps of a start to their end. `conclude(process, steps)` runs those of an
    interrupted start, now or later. With `blocking`, the thread does nothing else meanwhile: the
    steps wait by themselves, and yield nothing. With `ends_interrupted`, the command of an
    interrupted start is ended.
    """

    def __init__(
        self,
        run: Callable[[Steps], Any],
        conclude: Callable[[Any, Steps], Any],
        *,
        blocking: bool = False,
        ends_interrupted: bool = False,
    ) -> None:
        self.run = run
        self.conclude = conclude
        self.blocking = blocking
        self.patience_us = direct.PATIENCE_US if blocking else direct.LOOP_PATIENCE_US
        self.ends_interrupted = ends_interrupted


def run(steps: Steps, pause: Callable[[float], Any], wait: Callable[[int, bool], Any]) -> None:
    """Run `steps` to their end, with `pause` to wait for a time and `wait` for a descriptor."""
    try:
        for wanted in steps:
            if isinstance(wanted, float):
                pause(wanted)
            else:
                wait(*wanted)
    finally:
        steps.close()


def _block(steps: Steps) -> None:
    next(steps, None)  # blocking steps wait by themselves


def _conclude_now(process: Any, steps: Steps) -> None:
    _block(steps)


BLOCKING = Driver(_block, _conclude_now, blocking=True)
