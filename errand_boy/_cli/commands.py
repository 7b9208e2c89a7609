"""The commands of one `errand-boy map`, made on demand, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

from errand_boy._map.batch import NOT_NOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._cli.inputs import Records, Values
    from errand_boy._cli.template import Template


class Origin:
    """What a command was made from: its number from 1, its slot (0: unused), its values."""

    __slots__ = ("seq", "slot", "values")

    def __init__(self, seq: int, slot: int, values: Sequence[bytes]) -> None:
        self.seq = seq
        self.slot = slot
        self.values = values


class Commands:
    """Iterates over the commands for a Batch, with NOT_NOW while no values have arrived.

    `done` are the numbers of commands to leave out. `next_slot`, if set, returns a command's slot.
    `on_made`, if set, is called with each command, and returns the command to use. `origins` has
    the origins of commands whose results nobody has taken yet, by the batch's own number.
    """

    def __init__(self, records: Records, template: Template, done: Container[int]) -> None:
        self.records = records
        self._template = template
        self._done = done
        self.made = 0  # how many have been taken so far
        self.origins: dict[int, Origin] = {}
        self.next_slot: Callable[[], int] | None = None
        self.on_made: Callable[[Origin, list[bytes] | bytes], Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        seq, slot = 0, 0
        template, done, origins = self._template, self._done, self.origins
        for values in self.records:
            if values is NOT_NOW:
                yield NOT_NOW
                continue
            seq += 1
            if seq in done:
                continue
            if self.next_slot is not None:
                slot = self.next_slot()
            origin = origins[self.made] = Origin(seq, slot, values)
            self.made += 1
            command = template(values, seq, slot)
            yield command if self.on_made is None else self.on_made(origin, command)

    def sample(self, values: Values) -> list[bytes] | bytes:
        """Return approximately the command for these values."""
        return self._template(values, 1, 1)
