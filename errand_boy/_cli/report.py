"""The report that `errand-boy map --html` writes, one file for a browser."""

from __future__ import annotations

import heapq
import html
import json
import os
import time
from array import array

from errand_boy._cli.joblog import written

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from errand_boy._map.result import Result

_MOST_BARS = 20_000  # with more commands, those close together become one bar
_BINS = 40
_SLOWEST = 10
_MOST_FAILURES = 200  # with their output
_TAIL = 2000  # bytes of output
_MOST_WORDS = 300  # characters of a command
_COLUMNS = 2000  # of the chart; commands within one become one bar


class Report:
    """Keeps some bytes for each command, and writes the report at the end. Raises OSError."""

    def __init__(self, path: str) -> None:
        self._path = path
        with open(path, "a"):  # otherwise it would fail after all the work
            pass
        self._starts = array("d")
        self._durations = array("d")
        self._slots = array("I")
        self._seqs = array("Q")
        self._failed = array("b")
        self._slowest: list[tuple[float, int, str, str]] = []
        self._failures: list[tuple[int, str, str, str]] = []
        self._count_failed = 0

    def add(self, seq: int, result: Result) -> None:
        """Record the end of a command."""
        self._starts.append(result.started)
        self._durations.append(result.duration)
        self._slots.append(result.slot)
        self._seqs.append(seq)
        self._failed.append(result.failed)
        if len(self._slowest) < _SLOWEST or result.duration > self._slowest[0][0]:
            entry = (result.duration, seq, _words(result), _end(result))
            (heapq.heappush if len(self._slowest) < _SLOWEST else heapq.heappushpop)(
                self._slowest, entry
            )
        if result.failed:
            self._count_failed += 1
            if len(self._failures) < _MOST_FAILURES:
                self._failures.append((seq, _words(result), _end(result), _tail(result)))

    def write(self) -> None:
        """Write the report, replacing the file. Raises OSError."""
        draft = f"{self._path}.{os.getpid()}"
        try:
            with open(draft, "w", encoding="utf-8", errors="replace") as file:
                file.writelines(self._parts())
            os.replace(draft, self._path)
        except BaseException:
            if os.path.exists(draft):
                os.unlink(draft)
            raise

    def _parts(self) -> Iterator[str]:
        count = len(self._starts)
        first = min(self._starts, default=0.0)
        last = max(map(sum, zip(self._starts, self._durations, strict=True)), default=0.0)
        yield _HEAD
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first)) if count else "never"
        facts = [
            ("Commands", str(count)),
            ("Failed", str(self._count_failed)),
            ("Begun", at),
            ("Took", _time(last - first)),
            ("Commands' own time", _time(sum(self._durations))),
            ("Median", _time(_median(self._durations))),
        ]
        yield "<dl>" + "".join(f"<div><dt>{k}<dd>{v}</div>" for k, v in facts) + "</dl>\n"
        yield '<h2>When each ran, by slot</h2><canvas id="chart"></canvas><p id="what">&nbsp;</p>\n'
        yield "<h2>How long they took</h2>\n" + _histogram(self._durations)
        yield "<h2>The slowest</h2>\n"
        rows = sorted(self._slowest, reverse=True)
        yield _table(
            ("Number", "Took", "Command", "End"),
            ((str(seq), _time(took), words, end) for took, seq, words, end in rows),
        )
        if self._failures:
            left = self._count_failed - len(self._failures)
            more = f" (the first {len(self._failures)})" if left else ""
            yield f"<h2>Failures{more}</h2>\n"
            for seq, words, end, tail in self._failures:
                yield (
                    f"<details><summary>{seq}: <code>{html.escape(words)}</code> "
                    f"<b>{html.escape(end)}</b></summary><pre>{html.escape(tail)}</pre></details>\n"
                )
        bars = json.dumps(list(self._bars(first, last)), separators=(",", ":"))
        yield f"<script>const span={last - first:.6f},bars={bars};\n{_SCRIPT}</script>\n"

    def _bars(self, first: float, last: float) -> Iterator[tuple[float, float, int, int, int, int]]:
        """Yield for each bar the start, duration, slot, failure, number and count of commands."""
        merges = len(self._starts) > _MOST_BARS
        width = (last - first) / _COLUMNS
        open_bars: dict[int, list[Any]] = {}
        order: Iterable[int] = range(len(self._starts))
        if merges:
            order = sorted(order, key=self._starts.__getitem__)
        for at in order:
            start, took = self._starts[at] - first, self._durations[at]
            slot = self._slots[at]
            bar: list[Any] = [start, start + took, slot, self._failed[at], self._seqs[at], 1]
            before = open_bars.get(slot) if merges else None
            if before is not None and bar[1] - before[0] < width:
                before[1] = max(before[1], bar[1])
                before[3] |= bar[3]
                before[5] += 1
                continue
            if merges:
                open_bars[slot] = bar
                if before is None:
                    continue
                bar = before
            yield _rounded(bar)
        yield from map(_rounded, open_bars.values())


def _rounded(bar: list[Any]) -> tuple[float, float, int, int, int, int]:
    start, end, slot, failed, seq, count = bar
    return round(start, 5), round(end - start, 5), slot, failed, seq, count


def _words(result: Result) -> str:
    words = os.fsdecode(written(result.args))
    return words if len(words) <= _MOST_WORDS else words[:_MOST_WORDS] + " …"


def _end(result: Result) -> str:
    if result.error is not None:
        why = result.error
        if type(why).__name__ == "TimeoutExpired":
            return "timed out"
        return getattr(why, "strerror", None) or str(why)
    code = result.returncode
    return f"signal {-code}" if code < 0 else f"exit {code}"


def _tail(result: Result) -> str:
    """Return the end of a command's output."""
    tails = []
    for kept, file in ((result.stdout, result.stdout_file), (result.stderr, result.stderr_file)):
        data = (kept or b"")[-_TAIL:]
        if file is not None:
            size = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), _TAIL, max(0, size - _TAIL))
        if data:
            tails.append(data.decode("utf-8", "replace"))
    return "\n".join(tails)


def _median(values: array[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _histogram(values: array[float]) -> str:
    """Return a histogram of durations, as SVG; the scale is linear, the last bin is open."""
    if not values:
        return "<p>None.</p>\n"
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    width = (high - low) / _BINS or 1e-6
    counts = [0] * _BINS
    for value in ordered:
        counts[min(_BINS - 1, int((value - low) / width))] += 1
    top = max(counts)
    bars = "".join(
        f'<rect x="{n * 20}" y="{200 - 200 * count / top:.1f}" width="19" '
        f'height="{200 * count / top:.1f}"><title>{count}: from {_time(low + n * width)}'
        f"{f' to {_time(low + (n + 1) * width)}' if n + 1 < _BINS else ' on'}</title></rect>"
        for n, count in enumerate(counts)
    )
    return (
        f'<svg viewBox="0 0 {_BINS * 20} 200" preserveAspectRatio="none">{bars}</svg>'
        f'<p class="ends"><span>{_time(low)}</span><span>{_time(high)} and more</span></p>\n'
    )


def _table(title: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in title)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) + "\n" for row in rows
    )
    return f"<table><tr>{head}\n{body}</table>\n"


_HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>errand-boy map</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
dl { display: flex; flex-wrap: wrap; gap: 1em 2.5em } dt { color: #666 } dd { margin: 0 }
dd { font-size: 1.4em } canvas, svg { width: 100%; background: #f4f4f4 } svg { height: 200px }
canvas { display: block } rect { fill: #3572b0 } .ends { display: flex; margin: 0; color: #666;
justify-content: space-between } table { border-collapse: collapse; width: 100% }
th { text-align: left } td, th { padding: .2em .8em .2em 0; vertical-align: top;
overflow-wrap: anywhere } pre { background: #f4f4f4; padding: .6em; overflow: auto }
b { color: #b03535 } #what { min-height: 1.4em; margin: .2em 0; color: #666 }
</style>
<h1>errand-boy map</h1>
"""

_SCRIPT = """
const chart = document.getElementById("chart"), what = document.getElementById("what");
const slots = bars.reduce((most, bar) => Math.max(most, bar[2]), 1);
const row = Math.max(3, Math.min(18, Math.floor(900 / slots)));
function draw() {
  const width = chart.clientWidth, sharp = window.devicePixelRatio || 1;
  chart.style.height = row * slots + "px";
  chart.width = width * sharp; chart.height = row * slots * sharp;
  const context = chart.getContext("2d");
  context.scale(sharp, sharp);
  for (const failed of [0, 1]) {
    context.fillStyle = failed ? "#b03535" : "#3572b0";
    for (const bar of bars)
      if (bar[3] === failed)
        context.fillRect(bar[0] / span * width, (bar[2] - 1) * row,
          Math.max(1, bar[1] / span * width - .5), row - 1);
  }
}
chart.onmousemove = event => {
  const at = event.offsetX / chart.clientWidth * span, slot = Math.floor(event.offsetY / row) + 1;
  const found = bars.find(bar => bar[2] === slot && bar[0] <= at && at <= bar[0] + bar[1]);
  what.textContent = found === undefined ? "\\u00a0" :
    `${found[5] > 1 ? found[5] + " commands from number " : "number "}${found[4]}, slot ${slot}, ` +
    `${found[0].toFixed(3)} s after the start, took ${found[1].toFixed(3)} s` +
    (found[3] ? ", failed" : "");
};
window.onresize = draw;
draw();
document.body.dataset.drawn = bars.length;
document.body.dataset.took = Math.round(performance.now());
"""
