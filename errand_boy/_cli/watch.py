"""A live screen of a daemon: `errand-boy status --watch`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping

from errand_boy._wire import status as _status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rich.console import RenderableType

    from errand_boy._wire.address import Address

_COUNTED = ("accepted", "started", "ended", "failed")  # the totals whose rates are shown


class Rates:
    """How fast the daemon's totals grow."""

    def __init__(self) -> None:
        self._before: tuple[float, Mapping[str, int]] | None = None

    def take(self, at: float, totals: Mapping[str, int]) -> dict[str, float | None]:
        """Return the rates per second since the last call; None for those that are not known."""
        before, self._before = self._before, (at, dict(totals))
        if before is None or at <= before[0]:
            return dict.fromkeys(_COUNTED)
        # A new daemon counts from 0.
        return {
            name: max(0, totals[name] - before[1][name]) / (at - before[0]) for name in _COUNTED
        }


def run(address: Address, interval: float) -> int:
    """Show the screen until ^C; return the exit status. Keep asking if the daemon is away."""
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415
    except ImportError:
        print("errand-boy: --watch needs rich: pip install 'errand-boy[watch]'", file=sys.stderr)
        return 1
    if not sys.stdout.isatty():
        print("errand-boy: --watch needs a terminal", file=sys.stderr)
        return 1
    rates = Rates()
    console = Console()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_look(address, rates, console.size.height), refresh=True)
                time.sleep(interval)
    except KeyboardInterrupt:
        return 0


def _look(address: Address, rates: Rates, height: int) -> RenderableType:
    from rich.text import Text  # noqa: PLC0415

    try:
        status = _status.fetch(address)
    except _status.NoAnswerError as error:
        return Text(f"errand-boy: {error}", style="red")
    return screen(status, rates.take(time.monotonic(), status["totals"]), height)


def screen(
    status: Mapping[str, Any], rates: Mapping[str, float | None], height: int
) -> RenderableType:
    """Return the screen for a status, at most `height` lines high."""
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    totals, latency = status["totals"], status["latency_us"]
    head = [
        f"errand-boy {status['version']}, pid {status['pid']}, on {status['socket']}, "
        f"up {_status.duration(status['uptime'])}",
        ", ".join(f"{totals[name]} {name}{_rate(rates[name])}" for name in _COUNTED)
        + f", {status['queue']} waiting",
    ]
    if latency["p50"] is not None:
        head.append(f"starts took {latency['p50']:.0f} µs (p50), {latency['p99']:.0f} µs (p99)")
    parts: list[RenderableType] = [Text(line, no_wrap=True, overflow="ellipsis") for line in head]
    room = height - len(head)
    helpers = [
        (
            helper["pid"],
            helper["uid"],
            "-" if helper["memory_kib"] is None else helper["memory_kib"],
            helper["live"],
            helper["served"],
            helper["connections"],
            "ending" if helper["draining"] else "",
        )
        for helper in status["helpers"]
    ]
    users = [
        (user["uid"], user["connections"], user["running"], user["waiting"])
        for user in status["users"]
        if user["running"] is not None
    ]
    commands = [
        (
            command["pid"],
            _status.duration(command["age"]),
            command["client_pid"],
            command["client_uid"],
            _status.words(command["argv"]),
        )
        for command in status["commands"]
    ]
    for columns, rows in (
        (("HELPER", "UID", "KIB", "LIVE", "SERVED", "CLIENTS", ""), helpers),
        (("UID", "CLIENTS", "RUNNING", "WAITING"), users),
        (("COMMAND", "AGE", "CLIENT", "UID", "ARGV"), commands),
    ):
        most = room - 2  # a blank line and the titles
        if rows and most > 0:
            parts += [Text(""), _table(columns, rows[:most])]
            room -= 2 + min(most, len(rows))
    return Group(*parts)


def _rate(rate: float | None) -> str:
    return "" if rate is None else f" ({rate:.1f}/s)"


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> RenderableType:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        is_text = name in ("ARGV", "")
        table.add_column(
            name, justify="left" if is_text else "right", no_wrap=True, overflow="ellipsis"
        )
    for row in rows:
        table.add_row(
            *(Text(str(cell)) for cell in row)
        )  # not parsed as markup, since any user may have chosen it
    return table
