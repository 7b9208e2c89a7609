"""Two ways of doing a thing, measured in turns (A B A B ...), and the table of their ratios.

Each turn is a pair of short batches; its ratio is that of the batches' medians. What the machine
does meanwhile slows both halves of a pair, so the ratios are steadier than the times.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Measure = Callable[[int], list[int]]

BATCH = 100  # commands of one measure of many
MANY = 1000  # where the rate counts, because CPUs are idle at a batch's beginning and end
CPUS = len(os.sched_getaffinity(0))

BATCH_NANOSECONDS = 10_000_000
BATCH_MOST = 4
ROW_NANOSECONDS = 8_000_000_000
PAIRS_LEAST = 10


def timed(act: Callable[[int], None], batch: int = BATCH) -> Measure:
    """A measure of `act`, which runs this many commands at a time."""

    def measure(count: int) -> list[int]:
        times = []
        for _ in range(count):
            start = time.perf_counter_ns()
            act(batch)
            times.append(time.perf_counter_ns() - start)
        return times

    return measure


@dataclass
class Comparison:
    name: str
    at_most: float | None = None
    more_milliseconds: float | None = None
    a: list[float] = field(default_factory=list)
    b: list[float] = field(default_factory=list)

    def ratios(self) -> tuple[float, float, float]:
        """The median of the pairs' ratios and its quartiles: (first, median, third)."""
        each = [a / b for a, b in zip(self.a, self.b, strict=True)]
        return quartiles(each)

    def difference_milliseconds(self) -> float:
        pairs = zip(self.a, self.b, strict=True)
        return statistics.median(a - b for a, b in pairs) / 1e6

    def target(self) -> str:
        if self.more_milliseconds is not None:
            more = self.difference_milliseconds()
            met = more <= self.more_milliseconds
            return f"{more:+.1f} ms (at most {self.more_milliseconds:g}): {verdict(met)}"
        if self.at_most is not None:
            return f"at most {self.at_most:g}: {verdict(self.ratios()[1] <= self.at_most)}"
        return ""

    def record(self) -> dict[str, float | str]:
        first, median, third = self.ratios()
        return {
            "name": self.name,
            "a_median_us": statistics.median(self.a) / 1e3,
            "b_median_us": statistics.median(self.b) / 1e3,
            "ratio": median,
            "ratio_first_quartile": first,
            "ratio_third_quartile": third,
            "target": self.target(),
        }


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    if len(numbers) == 1:
        return numbers[0], numbers[0], numbers[0]
    first, median, third = statistics.quantiles(numbers, n=4, method="inclusive")
    return first, median, third


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def typical_nanoseconds(measure: Measure) -> float:
    """Also the warm-up, because the first command may start the helper."""
    measure(1)
    return statistics.median(measure(3))


def batch_size(typical: float) -> int:
    return max(1, min(BATCH_MOST, int(BATCH_NANOSECONDS / typical)))


def pairs_in_time(pair: float, wanted: int) -> int:
    return min(wanted, max(PAIRS_LEAST, int(ROW_NANOSECONDS / pair)))


def table(comparisons: Iterable[Comparison]) -> list[str]:
    rows = [("A over B", "A µs", "B µs", "ratio", "quartiles", "target")]
    for comparison in comparisons:
        first, median, third = comparison.ratios()
        a, b = statistics.median(comparison.a) / 1e3, statistics.median(comparison.b) / 1e3
        spread = f"{first:.3g} - {third:.3g}"
        ratio = f"{median:.3g}"
        rows.append((comparison.name, f"{a:.0f}", f"{b:.0f}", ratio, spread, comparison.target()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers, target in rows:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned, target]).rstrip())
    return lines
