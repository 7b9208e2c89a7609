"""Measures everything in docs/benchmarks.md, in one run, and writes the page and its plots.

    python -m bench.report [--quick] [--output DIRECTORY]

Eight minutes at most, one and a half with --quick. Needs the package's extra "bench", Linux and a C
compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import plots, syscalls, throughput
from bench.measure import (
    C_LOOP,
    DAEMON,
    FORK,
    FULL,
    GEVENT,
    HELPER,
    LATE_WAYS,
    MAP,
    OUR_GEVENT,
    OUR_USER,
    OUR_UVLOOP,
    OURS,
    PART_WAYS,
    PARTS,
    PREEXEC,
    QUICK,
    SMALL,
    SUBPROCESS,
    USER,
    UVLOOP,
    WAITS,
    Findings,
    Part,
    Series,
    Way,
    Weight,
    measure,
    progress,
)
from bench.ratios import quartiles

PLOTTED = (FORK, PREEXEC, GEVENT, SUBPROCESS, OURS, HELPER, DAEMON, MAP)

PAIRS = (
    (FORK, OURS),
    (PREEXEC, OURS),
    (USER, OUR_USER),
    (GEVENT, OUR_GEVENT),
    (UVLOOP, OUR_UVLOOP),
)

INTRODUCTION = """\
# Benchmarks

Written by `python -m bench.report`, in one run; don't edit it. Figures are medians, with the first
and the third quartile behind them. What is compared was measured in turns (A B C A B C …), and a
ratio is the median of the turns' ratios, not the ratio of the medians: it is steadier than the
times beside it. Differences of a few per cent are noise, and so is more than that on a machine that
had other work meanwhile: see the load.
"""

COST = """\
## One command: start to reaped

Milliseconds from the start of `/bin/true` until it is reaped. The caller holds so much memory (in
pages of the ordinary size, as the heap of a Python program has them) or so many open descriptors,
or another thread of its is busy in Python. After the dot: the ratio to `subprocess.Popen(…).wait()`
from a caller of the same kind in the same turn. `preexec_fn` is `os.setsid`, `user=` is nobody;
pexpect gives the command a terminal, without its sleep at the end. eventlet itself looks for the
end of a command each 10 ms only. "helper" is `errand_boy` after `errand_boy.start()`, or with
`ERRAND_BOY_SPAWN=helper` in the environment; `user=` uses a helper too.
"""

CONSTRUCTOR = """\
## The constructor

Milliseconds that `Popen(…)` takes, and all until `communicate()` has reaped the command; the median
and the ninth decile of all starts. After the dot: the ratio to `subprocess` in the same turns. The
C loop above has no constructor: `vfork` returns when the program runs.
"""

LATE = """\
## Waiting with a time-out

By how much `sleep 0.2` to `sleep 0.3` took longer than they slept, in milliseconds, from a small
caller. The start, of about a millisecond, is part of it; what is more is a wait that ends late.
"""

MEMORY = """\
## Memory while a command starts

In MiB: by how much the page tables and the committed memory of the whole machine (`PageTables` and
`Committed_AS` in `/proc/meminfo`, read as fast as possible) grew at most, and the peak resident set
with which the command is reported (`ru_maxrss`). What `/bin/true` itself needs is part of it.
Where overcommit is strict, or a limit is near, what cannot be committed is a fork that fails. The
kernel counts the peak of a process that shares or copies its maker's memory as the command's; only
a command of a helper or a daemon has one of its own.
"""

STALLS = """\
## The other threads

How long a thread that does nothing but look at the clock, in Python, was held up, at most, during
each start by another thread, in milliseconds. The first row is what the machine and the interpreter
do to it without a start: where CPUs are short, it waits for one.
"""

THROUGHPUT = """\
## Many commands

`/bin/true` with its output captured, commands per second, and the ratio to as many C loops of
vfork, exec and wait as there are CPUs, which capture nothing. The last column is the ratio to
`subprocess.run` in as many threads. `xargs`, GNU parallel and `errand-boy map` include the start of
their own program.
"""

BULK = """\
## Bulk output

`cat` of a file in memory, MiB per second: through a pipe of `Popen`, from which the caller reads
itself, and through frames (`errand_boy.map` with `max_output`: all is read, little is
kept); with the ratio to `subprocess`.
"""

CALLS = """\
## System calls per start

What the caller or the helper, and the new process up to its exec, ask of the kernel for each
`/bin/true`, counted by strace: the difference of two runs, so without their own start and end.
"""

SIZES = """\
## The size of it

Memory at rest after these commands, in KiB. In a proportional set size (PSS) a page counts in parts
for the processes that share it.
"""


FEATURES = """\
## Options, ends, the sandbox, terminals

`python -m bench.parts`, a run of its own: what they add to a start of `/bin/true`, and how late a
time-out ends a program that tries to escape.
"""


SOAKS = """\
## Long runs

`python -m bench.soak --record bench/soak.txt`, also with `--helper` and `--map`: a third of the
commands are plain, a third have their input and output captured, and a third do not exist.
"""


# -- figures --


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    first, median, third = quartiles(values)
    return f"{number(median)} ({number(first)}-{number(third)})"


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def ratio(series: Series) -> float:
    return statistics.median(series.ratios)


def over(a: Series, b: Series) -> float:
    """Return the median ratio of two ways that were measured in the same turns."""
    return statistics.median(x / y for x, y in zip(a.times, b.times, strict=True))


def mib(kib: float) -> str:
    return "<1" if abs(kib) < 1024 else number(kib / 1024)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a table whose first columns are words, and the others numbers."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -- the sections --


def facts(findings: Findings) -> str:
    text = table(("what", "which"), list(findings.facts.items()), words=2)
    if findings.quick:
        text = "**A quick run: rough figures.**\n\n" + text
    if findings.notes:
        text += "\nLeft out: " + "; ".join(dict.fromkeys(findings.notes)) + ".\n"
    return text


def verdict(findings: Findings) -> str:
    """Say where errand-boy is faster than subprocess, and where not, by this run's quartiles."""
    callers: dict[str, list[str]] = {"faster": [], "equal": [], "slower": []}
    for weight, found in findings.cost.items():
        if OURS in found:
            first, median, third = quartiles(found[OURS].ratios)
            word = "faster" if third < 1 else "slower" if first > 1 else "equal"
            callers[word].append(f"{weight} ({median:.2f})")
    text = (
        "## Who gains\n\n`errand_boy.Popen(…).wait()` against `subprocess.Popen(…).wait()`, by "
        "the caller; behind each the median of the\nratios. Equal means that 1 lies between the "
        "quartiles.\n\n"
    )
    words = [(word, ", ".join(names)) for word, names in callers.items() if names]
    text += table(("errand_boy is", "callers"), words, words=2)
    text += (
        "\nThe other ways over errand-boy's, and errand-boy over itself from a small caller:\n\n"
    )
    pairs = [pair for pair in PAIRS if all(way in findings.cost[SMALL] for way in pair)]
    rows = []
    for weight, found in findings.cost.items():
        cells = [
            f"{over(found[way], found[ours]):,.1f}" if way in found and ours in found else ""
            for way, ours in pairs
        ]
        small = findings.cost[SMALL].get(OURS)
        if OURS in found and small:
            itself = statistics.median(found[OURS].times) / statistics.median(small.times)
            cells.append(f"{itself:.2f}")
        rows.append((str(weight), *cells))
    return text + table(("caller", *(way.name for way, _ in pairs), "errand_boy"), rows)


def cost_table(findings: Findings, weights: Sequence[Weight]) -> str:
    ways = list(dict.fromkeys(way for weight in weights for way in findings.cost[weight]))

    def cell(way: Way, weight: Weight) -> str:
        series = findings.cost[weight].get(way)
        return f"{spread(series.times)} · {number(ratio(series))}" if series else ""

    rows = [(way.name, *(cell(way, weight) for weight in weights)) for way in ways]
    if findings.c_loop.times and weights[0] == SMALL:
        series = findings.c_loop
        limit = f"{spread(series.times)} · {number(ratio(series))}"
        rows.append((C_LOOP.name, limit, *[""] * (len(weights) - 1)))
    return table(("", *map(str, weights)), rows)


def cost(findings: Findings) -> str:
    sizes = [weight for weight in findings.cost if weight.resident or weight == SMALL]
    others = [weight for weight in findings.cost if not weight.resident]
    text = COST
    if len(sizes) > 1:
        text += "\n![Cost against resident size](cost-resident.svg)\n"
    text += "\n" + cost_table(findings, sizes)
    if any(weight.descriptors for weight in others):
        text += "\n![Cost against open descriptors](cost-descriptors.svg)\n"
    if len(others) > 1:
        text += "\n" + cost_table(findings, others)
    return text


def part_cell(part: Part) -> str:
    median, ninth = statistics.median(part.times), quantile(part.times, 0.9)
    return f"{number(median)}, {number(ninth)} · {number(statistics.median(part.ratios))}"


def constructor(findings: Findings) -> str:
    rows: list[tuple[str, ...]] = []
    for weight, there in findings.parts.items():
        caller = str(weight)
        for case, written in PARTS.items():
            found = [there[case, way] for way in PART_WAYS]
            cells = [part_cell(parts.constructor) for parts in found]
            rows.append((caller, f"`Popen{written}`", *cells))
            rows.append(("", "until reaped", *(part_cell(parts.whole) for parts in found)))
            caller = ""
    head = ("caller", "", *(way.name for way in PART_WAYS))
    return f"{CONSTRUCTOR}\n{table(head, rows, words=2)}"


def late(findings: Findings) -> str:
    rows = []
    for case, written in WAITS.items():
        for way in LATE_WAYS:
            taken = findings.late[way, case]
            figures = (number(statistics.median(taken)), number(max(taken)))
            rows.append((f"{way.name}, `{written}`", *figures, str(len(taken))))
    return f"{LATE}\n{table(('', 'median', 'longest', 'commands'), rows)}"


def memory(findings: Findings) -> str:
    rows = []
    for weight, there in findings.memory.items():
        resident, tables, _ = findings.status[weight]
        caller = f"{weight}: {number(resident / 1024)} resident, {mib(tables)} of page tables"
        for way, kib in there.items():
            rows.append((caller, way.name, mib(kib.page_tables), mib(kib.committed), mib(kib.peak)))
            caller = ""
    head = ("caller", "way", "page tables", "committed", "ru_maxrss")
    return MEMORY + "\n" + table(head, rows, words=2)


def stalls(findings: Findings) -> str:
    rows = []
    for weight, there in findings.stalls.items():
        for way, taken in there.items():
            most = quantile(taken, 0.99)
            figures = (spread(taken), number(most), number(max(taken)), str(len(taken)))
            rows.append((f"{way.name}, {weight}", *figures))
    return STALLS + "\n" + table(("", "median", "p99", "longest", "starts"), rows)


def many(findings: Findings) -> str:
    rows = []
    for (way, workers), series in findings.throughput.items():
        standard = findings.throughput.get((throughput.THREADS, workers))
        over_standard = number(over(series, standard)) if standard else ""
        rows.append((way, str(workers), spread(series.times), number(ratio(series)), over_standard))
    rows.append(("C loops", "one a CPU", spread(findings.c_loops.times), "1", ""))
    text = f"{THROUGHPUT}\n![Throughput](throughput.svg)\n\n"
    head = ("way", "workers", "commands a second", "of the limit", "of threads")
    return text + table(head, rows)


def bulk(findings: Findings) -> str:
    names = {
        "subprocess": "`subprocess`, a pipe",
        "errand_boy": "`errand_boy`, a pipe",
        "streams": "`errand_boy.map`, frames",
    }
    rows = [
        (names[name], spread(series.times), number(ratio(series)))
        for name, series in findings.bulk.items()
    ]
    (before, peak_before), (after, peak_after) = findings.bulk_memory
    size = f"{findings.plan.bulk_mib:,} MiB"
    return (
        f"{BULK}\n{table((size, 'MiB a second', 'ratio'), rows)}\n"
        f"The helpers had {before} KiB of their own before, and {after} KiB after. Their peak "
        f"resident size, with what\nthey share with other processes, was {peak_before:,} KiB "
        f"before and {peak_after:,} KiB after.\n"
    )


def calls(findings: Findings) -> str:
    text = CALLS
    for way, counted in findings.calls.items():
        rows = []
        for who in syscalls.CALLER, syscalls.HELPER, syscalls.CHILD:
            own = {name: count for (by, name), count in counted.items() if by == who}
            if not own:
                continue
            rows.append((f"**{who}**", "", f"**{sum(own.values()):.3g}**"))
            for name in sorted(own, key=own.__getitem__, reverse=True):
                why = syscalls.REASONS.get((who, name), syscalls.UNEXPLAINED)
                rows.append((f"`{name}`", why, f"{own[name]:.3g}"))
        text += f"\n{syscalls.WAYS[way]}:\n\n{table(('call', 'why', 'each start'), rows, words=2)}"
    return text


def sizes(findings: Findings) -> str:
    rows = [(name, f"{kib:,}") for name, kib in findings.sizes.items()]
    return SIZES + "\n" + table(("", "KiB"), rows)


SECTIONS = (facts, verdict, cost, constructor, late, memory, stalls, many, bulk, calls, sizes)


# -- the files --


def draw(findings: Findings, directory: Path) -> None:
    limit = statistics.median(findings.c_loop.times) if findings.c_loop.times else None
    for name, xlabel, index, weights in (
        (
            "resident",
            "resident size of the caller, MiB",
            0,
            [w for w in findings.cost if w.resident],
        ),
        ("descriptors", "open descriptors", 2, [w for w in findings.cost if w.descriptors]),
    ):
        lines: dict[str, tuple[str, plots.Points]] = {}
        for way in PLOTTED:
            points = []
            for weight in [SMALL, *weights]:
                if way in findings.cost[weight]:
                    x = findings.status[weight][index]
                    times = quartiles(findings.cost[weight][way].times)
                    points.append((x / 1024 if index == 0 else x, *times))
            colour = plots.OURS if way.is_ours else plots.FORKS
            if points:
                lines[way.name] = (plots.STANDARD if way == SUBPROCESS else colour, points)
        if weights:
            plots.cost(directory / f"cost-{name}.svg", xlabel, lines, limit)
    bars = [
        (
            f"{way}, {workers}",
            plots.OURS if "errand" in way else plots.STANDARD,
            *quartiles(series.times),
        )
        for (way, workers), series in findings.throughput.items()
    ]
    if bars:
        most = statistics.median(findings.c_loops.times)
        plots.throughput(directory / "throughput.svg", bars, most)


def recorded(words: str, name: str) -> str:
    """The records of runs that are too long to be part of this one."""
    record = Path(__file__).parent / name
    return f"{words}\n```text\n{record.read_text().rstrip()}\n```\n" if record.exists() else ""


def write(findings: Findings, directory: Path) -> None:
    """Write benchmarks.md and its plots."""
    directory.mkdir(parents=True, exist_ok=True)
    draw(findings, directory)
    records = recorded(FEATURES, "parts.txt"), recorded(SOAKS, "soak.txt")
    text = "\n".join([INTRODUCTION, *(section(findings) for section in SECTIONS), *records])
    (directory / "benchmarks.md").write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute or two; rough figures")
    docs = Path(__file__).parent.parent / "docs"
    parser.add_argument("--output", type=Path, default=docs, metavar="DIRECTORY")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is not installed")
    findings = measure(QUICK if options.quick else FULL, options.quick)
    write(findings, options.output)
    progress(f"written: {options.output / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
