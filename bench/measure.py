"""Measures everything in docs/benchmarks.md in one run; bench/report.py writes the page.

What is missing (strace, GNU parallel, a framework, memory, root) is left out, and noted.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread

import errand_boy
from bench import callers, syscalls, throughput
from bench.callers import CallerError, ask
from bench.conftest import allow_descriptors, available_gib
from bench.heavy import Caller, package_parent
from bench.ratios import batch_size
from bench.soak import PRIVATE, memory_kib
from bench.stress import Daemon, pss_kib

LIBRARIES = ("gevent", "eventlet", "uvloop", "sh", "pexpect")
SETTLE = 0.1  # seconds, in which the kernel frees the page tables of ended processes


@dataclass(frozen=True)
class Weight:
    """What a caller holds."""

    resident: float = 0  # GiB
    descriptors: int = 0
    busy: bool = False

    def __str__(self) -> str:
        if self.resident:
            return f"{self.resident:g} GiB"
        if self.descriptors:
            return f"{self.descriptors:,} descriptors"
        return "busy thread" if self.busy else "small"


@dataclass(frozen=True)
class Way:
    """A way to start a command: the caller's case and library.

    Those of one group share a process; the loops have signal handlers and threads of their own.
    """

    name: str
    case: str
    library: str
    group: str = ""

    def ask(self, caller: Caller, count: int) -> list[int]:
        return ask(caller, self.case, self.library, count)

    def needs(self) -> str:
        """Return the library that it needs."""
        return self.group if self.group in LIBRARIES else self.library.partition(".")[0]

    @property
    def is_ours(self) -> bool:
        return self.library.startswith("errand_boy")


SMALL = Weight()
SUBPROCESS = Way("subprocess", "popen", "subprocess")
PREEXEC = Way("subprocess, preexec_fn", "preexec_setsid", "subprocess")
OURS = Way("errand_boy", "popen", "errand_boy")
HELPER = Way("errand_boy, helper", "popen", "errand_boy", "helper")
DAEMON = Way("errand_boy, daemon", "daemon", "errand_boy")
FORK = Way("os.fork, exec", "fork_exec", "os")
POSIX_SPAWN = Way("os.posix_spawn", "posix_spawn", "os")
USER = Way("subprocess, user=", "user", "subprocess")
OUR_USER = Way("errand_boy, user=", "user", "errand_boy")
GEVENT = Way("gevent.subprocess", "popen", "gevent.subprocess", "gevent")
OUR_GEVENT = Way("errand_boy.gevent", "popen", "errand_boy.gevent", "gevent")
UVLOOP = Way("uvloop", "loop:uvloop", "asyncio", "uvloop")
OUR_UVLOOP = Way("errand_boy.asyncio on uvloop", "loop:uvloop", "errand_boy.asyncio", "uvloop")
MAP = Way("errand_boy.map, one worker", "map", "errand_boy")
WAYS = (
    FORK,
    POSIX_SPAWN,
    SUBPROCESS,
    PREEXEC,
    USER,
    Way("sh", "sh", "sh"),
    Way("pexpect", "pexpect", "pexpect"),
    OURS,
    OUR_USER,
    HELPER,
    DAEMON,
    MAP,
    Way("asyncio", "loop:asyncio", "asyncio", "asyncio"),
    Way("errand_boy.asyncio", "loop:asyncio", "errand_boy.asyncio", "asyncio"),
    UVLOOP,
    OUR_UVLOOP,
    GEVENT,
    OUR_GEVENT,
    Way("eventlet", "popen", "eventlet.green.subprocess", "eventlet"),
    Way("errand_boy.eventlet", "popen", "errand_boy.eventlet", "eventlet"),
)
C_LOOP = Way("C: vfork, exec, wait", "loop", "c")

MEMORY_WAYS = (OURS, DAEMON, MAP, SUBPROCESS, POSIX_SPAWN, PREEXEC, FORK, GEVENT, HELPER)
PART_WAYS = (SUBPROCESS, OURS, HELPER)
LATE_WAYS = (SUBPROCESS, OURS)
# The text after "Popen", by the caller's case.
PARTS = {"constructor": "(…)", "constructor_piped": "(…, stdout=PIPE, stderr=PIPE)"}
WAITS = {"forever": "wait()", "timeout": f"wait(timeout={callers.TIMEOUT:g})"}
STALL_WAYS = (Way("nothing: sleeps of 1 ms", "nothing", "time"), SUBPROCESS, PREEXEC, OURS)


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    residents: Sequence[float] = (0.25, 1, 4)
    descriptors: Sequence[int] = (1_000, 15_000)
    busy: bool = True
    ways: Sequence[Way] = WAYS
    seconds: float = 2.5  # for a group of ways, from one kind of caller
    rounds_most: int = 40
    rounds_least: int = 8
    part_seconds: float = 4.0  # for one kind of caller
    parts_most: int = 250  # turns
    parts_least: int = 10
    late_sleeps: int = 12
    memory_seconds: float = 0.05  # for each sample
    memory_looks: int = 5  # the median counts, because other processes' memory comes and goes
    stall_seconds: float = 3.0
    stalls_least: int = 30
    commands: int = 3_000
    throughput_rounds: int = 3
    workers: Sequence[tuple[str, Sequence[int]]] = (
        (throughput.THREADS, (2, 4, 8)),
        (throughput.OUR_THREADS, (2, 4, 8)),
        ("asyncio", (2, 4, 8)),
        ("xargs -P", (2, 4, 8)),
        ("GNU parallel", (2, 4)),
        ("errand_boy.map", (2, 4, 8, 16)),
        ("errand-boy map", (2, 4, 8)),
    )
    bulk_mib: int = 1024
    bulk_rounds: int = 3
    traced: int = 50

    def weights(self) -> list[Weight]:
        return [
            SMALL,
            *(Weight(resident=size) for size in self.residents),
            *(Weight(descriptors=count) for count in self.descriptors),
            *([Weight(busy=True)] if self.busy else []),
        ]


FULL = Plan()
QUICK = Plan(
    residents=(0.25, 1),
    seconds=0.3,
    rounds_least=3,
    part_seconds=0.5,
    parts_least=3,
    late_sleeps=4,
    memory_seconds=0.03,
    memory_looks=3,
    stall_seconds=0.5,
    stalls_least=10,
    commands=500,
    throughput_rounds=1,
    bulk_mib=256,
    bulk_rounds=3,
    traced=20,
)


@dataclass
class Series:
    times: list[float] = field(default_factory=list)  # ms, or commands per second
    ratios: list[float] = field(default_factory=list)  # to the reference of the same round


@dataclass
class Part:
    """The times (ms) of all starts, and for each turn the median over the reference's."""

    times: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


@dataclass
class Parts:
    """A start's constructor, and the whole of it, until it is reaped."""

    constructor: Part = field(default_factory=Part)
    whole: Part = field(default_factory=Part)


@dataclass
class Memory:
    """What starting costs, in KiB.

    The most by which the machine's page tables and commitments grew, and the peak resident set
    that the command is reported with.
    """

    page_tables: int
    committed: int
    peak: int


@dataclass
class Findings:
    plan: Plan
    quick: bool
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    status: dict[Weight, list[int]] = field(default_factory=dict)
    cost: dict[Weight, dict[Way, Series]] = field(default_factory=dict)
    c_loop: Series = field(default_factory=Series)
    parts: dict[Weight, dict[tuple[str, Way], Parts]] = field(default_factory=dict)
    late: dict[tuple[Way, str], list[float]] = field(default_factory=dict)  # ms
    memory: dict[Weight, dict[Way, Memory]] = field(default_factory=dict)
    stalls: dict[Weight, dict[Way, list[float]]] = field(default_factory=dict)
    throughput: dict[tuple[str, int], Series] = field(default_factory=dict)
    c_loops: Series = field(default_factory=Series)
    bulk: dict[str, Series] = field(default_factory=dict)
    bulk_memory: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    calls: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # KiB


@contextmanager
def caller_of(weight: Weight, group: str = "") -> Iterator[Caller]:
    variables = {"ERRAND_BOY_SPAWN": "helper"} if group == HELPER.group else {}
    caller = callers.start(weight.resident, weight.descriptors, weight.busy, variables)
    try:
        yield caller
    finally:
        caller.close()


def progress(what: str) -> None:
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


# -- start to reaped --


def present(ways: Sequence[Way], findings: Findings) -> list[Way]:
    there = []
    for way in ways:
        library = way.needs()
        if importlib.util.find_spec(library) is None:
            findings.notes.append(f"{way.name}: {library} is not installed")
        elif way.case == "user" and os.geteuid() != 0:
            findings.notes.append(f"{way.name}: needs root")
        else:
            there.append(way)
    return there


def is_possible(weight: Weight, findings: Findings) -> bool:
    # Two such callers exist at once: the loop's, and the one that it is compared with.
    if 2 * weight.resident + 1 > available_gib():
        findings.notes.append(f"{weight}: so much memory is not available")
        return False
    if weight.descriptors and not allow_descriptors(weight.descriptors + 200):
        findings.notes.append(f"{weight}: not allowed")
        return False
    return True


def in_turns(
    members: Sequence[tuple[Caller, Way]], reference: tuple[Caller, Way], findings: Findings
) -> dict[Way, Series]:
    """Measure all, A B C A B C ..., each beside the reference."""
    plan = findings.plan
    sizes: dict[Way, int] = {}
    total = 0.0
    usable = []
    for caller, way in {reference[1]: reference, **{way: (c, way) for c, way in members}}.values():
        try:
            way.ask(caller, 1)  # it may start a helper
            typical = statistics.median(way.ask(caller, 3))
        except CallerError as error:
            findings.notes.append(f"{way.name}: {error}")
            continue
        sizes[way] = batch_size(typical)
        total += sizes[way] * typical / 1e9
        usable.append((caller, way))
    rounds = min(plan.rounds_most, max(plan.rounds_least, int(plan.seconds / total)))
    series: dict[Way, Series] = defaultdict(Series)
    for _ in range(rounds):
        taken = {
            way: statistics.median(way.ask(caller, sizes[way])) / 1e6 for caller, way in usable
        }
        for way, milliseconds in taken.items():
            series[way].times.append(milliseconds)
            series[way].ratios.append(milliseconds / taken[reference[1]])
    return series


def measure_cost(weight: Weight, findings: Findings, c_loop: Caller) -> None:
    ways = present(findings.plan.ways, findings) if weight == SMALL else list(findings.cost[SMALL])
    groups = dict.fromkeys(way.group for way in ways)
    found: dict[Way, Series] = {}
    with caller_of(weight) as plain:
        reference = (plain, SUBPROCESS)
        for group in groups:
            members = [way for way in ways if way.group == group]
            if group == "":
                everyone = [(plain, way) for way in members]
                everyone += [(c_loop, C_LOOP)] * (weight == SMALL)
                series = in_turns(everyone, reference, findings)
                findings.c_loop = series.pop(C_LOOP, findings.c_loop)
                found.update(series)
            else:
                with caller_of(weight, group) as own:
                    series = in_turns([(own, way) for way in members], reference, findings)
                found.update((way, series[way]) for way in members if way in series)
        findings.status[weight] = ask(plain, "status", "os", 1)
    findings.cost[weight] = {way: found[way] for way in ways if way in found}


# -- the constructor --


def measure_parts(weight: Weight, findings: Findings) -> None:
    """Measure plain starts and those with pipes, in turns, each beside the reference."""
    plan = findings.plan
    there = {(case, way): Parts() for case in PARTS for way in PART_WAYS}
    with caller_of(weight) as plain, caller_of(weight, HELPER.group) as helped:

        def turn(count: int) -> dict[tuple[str, Way], list[int]]:
            return {
                (case, way): ask(
                    helped if way == HELPER else plain, f"parts:{case}", way.library, count
                )
                for case, way in there
            }

        turn(1)  # it starts the helper
        each = {key: statistics.median(figures[1::2]) for key, figures in turn(3).items()}
        sizes = batch_size(max(each.values()))
        total = sizes * sum(each.values()) / 1e9
        turns = min(plan.parts_most, max(plan.parts_least, int(plan.part_seconds / total)))
        for _ in range(turns):
            figures = turn(sizes)
            for (case, way), parts in there.items():
                own, reference = figures[case, way], figures[case, SUBPROCESS]
                for index, part in enumerate((parts.constructor, parts.whole)):
                    taken = own[index::2]
                    part.times += [nanoseconds / 1e6 for nanoseconds in taken]
                    part.ratios.append(
                        statistics.median(taken) / statistics.median(reference[index::2])
                    )
    findings.parts[weight] = there


# -- how late a wait is --


def measure_late(findings: Findings) -> None:
    with caller_of(SMALL) as caller:
        for way in LATE_WAYS:
            way.ask(caller, 1)
            for case in WAITS:
                taken = ask(caller, f"late:{case}", way.library, findings.plan.late_sleeps)
                findings.late[way, case] = [nanoseconds / 1e6 for nanoseconds in taken]


# -- memory --


def machine_kib(file: int) -> tuple[int, int]:
    text = os.pread(file, 8192, 0)
    figures = [int(text.partition(name)[2].split()[0]) for name in (b"PageTables:", b"ted_AS:")]
    return figures[0], figures[1]


def most_during(act: Callable[[], object]) -> tuple[int, int]:
    """Return by how many KiB page tables and commitments were above what they were before."""
    file = os.open("/proc/meminfo", os.O_RDONLY)
    time.sleep(SETTLE)
    before = machine_kib(file)
    most = list(before)
    over = Event()

    def look() -> None:
        while not over.is_set():
            for index, value in enumerate(machine_kib(file)):
                most[index] = max(most[index], value)

    thread = Thread(target=look)
    thread.start()
    try:
        act()
    finally:
        over.set()
        thread.join()
        os.close(file)
    return most[0] - before[0], most[1] - before[1]


def measure_memory(weight: Weight, findings: Findings) -> None:
    findings.memory[weight] = {}
    for group in dict.fromkeys(way.group for way in MEMORY_WAYS):
        measure_memory_of(group, weight, findings)


def measure_memory_of(group: str, weight: Weight, findings: Findings) -> None:
    there = findings.memory[weight]
    with caller_of(weight, group) as caller:
        for way in MEMORY_WAYS:
            if way.group != group or way not in findings.cost[weight]:
                continue
            typical = statistics.median(findings.cost[weight][way].times) / 1e3
            # A slow start is one that copies page tables: two in a row would add up.
            count = max(1, min(20, int(findings.plan.memory_seconds / typical)))
            case = {"preexec_setsid": "popen"}.get(way.case, way.case)
            try:
                [peak] = ask(caller, f"peak:{case}", way.library, 1)
                way.ask(caller, 2)
                each = [
                    most_during(partial(way.ask, caller, count))
                    for _ in range(findings.plan.memory_looks)
                ]
            except CallerError as error:
                findings.notes.append(f"memory, {way.name}: {error}")
                continue
            tables, committed = (int(statistics.median(kib)) for kib in zip(*each, strict=True))
            there[way] = Memory(tables, committed, peak)


# -- the other threads --


def measure_stalls(weight: Weight, findings: Findings) -> None:
    there = {}
    with caller_of(weight) as caller:
        for way in STALL_WAYS:
            typical = statistics.median(way.ask(caller, 2)) / 1e9
            # A start takes longer beside a thread that is busy, by about the switch interval.
            count = int(findings.plan.stall_seconds / (typical + sys.getswitchinterval()))
            count = max(findings.plan.stalls_least, count)
            there[way] = [
                taken / 1e6 for taken in ask(caller, f"stall:{way.case}", way.library, count)
            ]
    findings.stalls[weight] = there


# -- many at once --


def measure_throughput(findings: Findings, program: str) -> None:
    plan = findings.plan
    there = []
    for way, workers in plan.workers:
        if throughput.is_there(way):
            there += [(way, count) for count in workers]
        else:
            findings.notes.append(f"{way}: not installed")
    loops = [Caller([program]) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        throughput.c_seconds(loops, throughput.WARM_UP)
        for _ in range(plan.throughput_rounds):
            limit = plan.commands / throughput.c_seconds(loops, plan.commands)
            findings.c_loops.times.append(limit)
            findings.c_loops.ratios.append(1.0)
            for way, count in there:
                rate = plan.commands / throughput.seconds(way, count, plan.commands)
                series = findings.throughput.setdefault((way, count), Series())
                series.times.append(rate)
                series.ratios.append(rate / limit)
    finally:
        for loop in loops:
            loop.close()


def measure_bulk(findings: Findings) -> None:
    plan = findings.plan
    command = [sys.executable, "-m", "bench.bulk", str(plan.bulk_mib), str(plan.bulk_rounds)]
    environment = os.environ | {"PYTHONPATH": package_parent()}
    answer = json.loads(subprocess.check_output(command, env=environment))
    standard = answer["rates"]["subprocess"]
    for name, rates in answer["rates"].items():
        ratios = [rate / other for rate, other in zip(rates, standard, strict=True)]
        findings.bulk[name] = Series(rates, ratios)
    findings.bulk_memory = tuple(answer["before"]), tuple(answer["after"])


def measure_calls(findings: Findings) -> None:
    if shutil.which("strace") is None:
        findings.notes.append("system calls: strace is not installed")
        return
    for way in syscalls.WAYS:
        try:
            findings.calls[way] = syscalls.per_start(way, findings.plan.traced)
        except subprocess.CalledProcessError as error:
            findings.notes.append(f"system calls: strace ended with {error.returncode}")


def measure_sizes(findings: Findings, daemon: Daemon) -> None:
    errand_boy.start()
    errand_boy.run(["/bin/true"], capture_output=True)
    helper = errand_boy.helper_pid()
    assert helper is not None
    pids = [entry["pid"] for entry in daemon.status()["helpers"]]
    findings.sizes = {
        "a private helper, its own memory": memory_kib(helper, *PRIVATE),
        "a private helper, PSS": pss_kib(helper),
        "the daemon's server, PSS": pss_kib(daemon.process.pid),
        f"its {len(pids)} helpers together, PSS": sum(map(pss_kib, pids)),
    }
    errand_boy.stop()


# -- all of it --


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def load() -> str:
    return ", ".join(f"{number:.2f}" for number in os.getloadavg())


def facts() -> dict[str, str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    there = [
        f"{name} {importlib.metadata.version(name)}"
        for name in LIBRARIES
        if importlib.util.find_spec(name)
    ]
    return {
        "Date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{len(os.sched_getaffinity(0))} CPUs, {processor()}, {memory:.0f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "errand-boy": errand_boy.__version__,
        "Others": ", ".join(there) or "none",
        "Load average at the start": load(),
    }


def measure(plan: Plan, quick: bool = False) -> Findings:
    """Measure everything that the plan asks for."""
    findings = Findings(plan, quick, facts())
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        program = throughput.compile_c_loop(directory)
        daemon = Daemon(directory, "--pool-size", "2", "--log-level", "error")
        c_loop = Caller([program])
        os.environ[callers.SOCKET] = daemon.path
        try:
            weights = [weight for weight in plan.weights() if is_possible(weight, findings)]
            for weight in weights:
                progress(f"start to reaped: {weight}")
                measure_cost(weight, findings, c_loop)
            by_size = [w for w in weights if not w.descriptors and not w.busy]
            others = [weight for weight in weights if weight not in by_size]
            for weight in dict.fromkeys((by_size[0], by_size[-1], *others)):
                progress(f"constructor: {weight}")
                measure_parts(weight, findings)
            progress("waits with a time-out")
            measure_late(findings)
            for weight in by_size:
                progress(f"memory: {weight}")
                measure_memory(weight, findings)
            for weight in dict.fromkeys((by_size[0], by_size[-1])):
                progress(f"other threads: {weight}")
                measure_stalls(weight, findings)
            progress("many at once")
            measure_throughput(findings, program)
            progress("bulk output")
            measure_bulk(findings)
            progress("system calls")
            measure_calls(findings)
            measure_sizes(findings, daemon)
        finally:
            del os.environ[callers.SOCKET]
            c_loop.close()
            daemon.process.terminate()
            daemon.process.wait()
    findings.facts["Load average at the end"] = load()
    findings.facts["Duration"] = f"{time.monotonic() - start:.0f} s"
    return findings
