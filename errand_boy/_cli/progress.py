"""The progress that `errand-boy map` shows while it runs, and its report afterwards."""

from __future__ import annotations

from errand_boy._map.progress import Bar, Tally, terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from errand_boy._cli.inputs import Source
    from errand_boy._cli.report import Report
    from errand_boy._map.result import Result
    from errand_boy._timers import Timers

_TICK = 1.0  # seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("progress and reports")
    group.add_argument(
        "--progress",
        "--bar",
        action="store_true",
        help="on a terminal (standard error), show how many commands are done and have failed, "
        "the rate, and the time left if their number is known; with a bar if tqdm is installed",
    )
    group.add_argument(
        "--eta",
        action="store_true",
        help="the same, and read all of the input first to know that number",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="only write the commands, one on each line",
    )
    group.add_argument(
        "--html",
        metavar="FILE",
        help="write a report for a browser at the end: when each command ran, how long they took, "
        "the slowest ones, and what failed",
    )


class Progress:
    """The bar and the report that `options` ask for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._reads_ahead = options.eta
        self._tally = Tally()
        self._file = terminal() if options.progress or options.eta else None
        self._bar: Bar | None = None
        self._report: Report | None = None
        if options.html is not None and not options.dry_run:
            from errand_boy._cli.report import Report  # noqa: PLC0415

            self._report = Report(options.html)

    @property
    def total(self) -> int | None:
        """How many commands there are, or None."""
        return self._tally.total

    @total.setter
    def total(self, number: int) -> None:
        self._tally.total = number

    def read_ahead(self, source: Source) -> None:
        """Read all of the input if the options ask for that."""
        if self._reads_ahead:
            source.read_all()

    def begin(self, timers: Timers) -> None:
        """Show the bar from now on."""
        if self._file is None:
            return
        self._bar = Bar(self._tally, self._file)

        def tick() -> None:
            if self._bar is not None:
                self._bar.show(at_once=True)
                timers.after(_TICK, tick)

        tick()

    def count(self, seq: int, result: Result) -> None:
        """Count a command that has ended."""
        if self._report is not None:
            self._report.add(seq, result)
        if self._bar is not None:
            self._tally.count(result.failed, result.duration)
            self._bar.show()

    def clear(self) -> None:
        """Remove the bar from the screen, to make room for output."""
        if self._bar is not None:
            self._bar.clear()

    def end(self) -> None:
        """Stop updating the bar, and write the report. Raises OSError."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()
        if self._report is not None:
            self._report.write()
