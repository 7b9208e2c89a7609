"""How a start waits: by blocking this thread, or as an event loop or a hub of greenlets does.

A start is a generator. It yields what it waits for: a time in seconds (a float), or a descriptor
and whether it is to be writable, else readable. A driver waits, and goes on. When the generator is
closed, as for any exception in the driver, the start is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from errand_boy import _direct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from errand_boy._wire import Failed

    Wait: TypeAlias = float | tuple[int, bool]
    Steps: TypeAlias = Generator[Wait, None, None]
    Outcome: TypeAlias = Generator[Wait, None, Failed | None]


class Driver:
    """How a start waits.

    `run(steps)` runs steps to their end; `conclude(process, steps)` runs those of a start that was
    interrupted, now or later. With `blocking`, nothing else goes on in this thread meanwhile: steps
    wait themselves, and yield nothing. With `ends_interrupted`, the command is ended after that.
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
        self.patience_us = _direct.PATIENCE_US if blocking else _direct.LOOP_PATIENCE_US
        self.ends_interrupted = ends_interrupted


def run(steps: Steps, pause: Callable[[float], Any], wait: Callable[[int, bool], Any]) -> None:
    """Run `steps` to their end; wait by `pause` for a time, by `wait` for a descriptor."""
    try:
        for wanted in steps:
            if isinstance(wanted, float):
                pause(wanted)
            else:
                wait(*wanted)
    finally:
        steps.close()


def _block(steps: Steps) -> None:
    next(steps, None)  # they wait themselves


def _conclude_now(process: Any, steps: Steps) -> None:
    _block(steps)


BLOCKING = Driver(_block, _conclude_now, blocking=True)
