"""Starts many commands, then prints what they left behind. Exit status 1 if that is anything.

    python -m bench.soak [--helper | --map] [--record FILE] [N]

The commands are a plain one, one with its input and output captured, and one that does not exist.
With --helper a helper starts them, with --map they go through errand_boy.map. --record adds what
was seen to a file such as bench/soak.txt, which docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from pathlib import Path
from typing import Any

import errand_boy
from errand_boy._process.helper import HelperManager, launcher, runner

WARM_UP = 300
REPORTS = 10
REST = 0.5  # seconds, in which a helper gives back the memory of many commands at once
PRIVATE = ("Private_Clean:", "Private_Dirty:")


def plain() -> None:
    assert errand_boy.Popen(["/bin/true"]).wait() == 0


def captured() -> None:
    done = errand_boy.run(["/bin/cat"], input=b"errand", capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"errand")


def missing() -> None:
    try:
        errand_boy.Popen(["/nonexistent"])
    except FileNotFoundError:
        return
    raise AssertionError("/nonexistent was started")


def spawn_by_map(count: int) -> None:
    cases: list[dict[str, Any]] = [
        {"args": ["/bin/true"]},
        {"args": ["/bin/cat"], "input": b"errand"},
        {"args": ["/nonexistent"]},
    ]
    expected = [(0, b""), (0, b"errand"), (127, b"")]
    commands = itertools.islice(itertools.cycle(cases), count)
    for number, result in enumerate(errand_boy.map(commands)):
        assert (result.returncode, result.stdout) == expected[number % 3], result


def spawn(count: int) -> None:
    for case in itertools.islice(itertools.cycle([plain, captured, missing]), count):
        case()


def memory_kib(pid: int, *names: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(names))


def count_of(pid: int, what: str) -> int:
    return len(os.listdir(f"/proc/{pid}/{what}"))


def zombies() -> int:
    """Zombie children of this process: state and parent follow the name's closing parenthesis."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += state == "Z" and int(parent) == os.getpid()
    return found


def inventory(keeper: HelperManager) -> dict[str, int]:
    time.sleep(REST)
    found = {}
    if keeper.current is not None:
        helper = keeper.current.pid
        found = {
            "helper pid": helper,
            "helper private KiB": memory_kib(helper, *PRIVATE),
            # The private part includes pages of the program's file that no other process maps; a
            # second helper would share them. The anonymous part is each process's own.
            "helper anonymous KiB": memory_kib(helper, "Anonymous:"),
            "helper descriptors": count_of(helper, "fd"),
            "helper threads": count_of(helper, "task"),
        }
    caller = os.getpid()
    return found | {
        "caller private KiB": memory_kib(caller, *PRIVATE),
        "caller anonymous KiB": memory_kib(caller, "Anonymous:"),
        "caller descriptors": count_of(caller, "fd"),
        "caller threads": count_of(caller, "task"),
        "zombies": zombies(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("count", type=int, nargs="?", default=100_000, metavar="N")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--helper", action="store_true")
    way.add_argument("--map", action="store_true")
    parser.add_argument("--record", type=Path, metavar="FILE")
    options = parser.parse_args()
    count: int = options.count
    run, keeper = (spawn_by_map, runner) if options.map else (spawn, launcher)

    if options.helper:
        errand_boy.start()
    run(WARM_UP)
    before = inventory(keeper)
    start = time.monotonic()
    for part in range(REPORTS):
        run(count * (part + 1) // REPORTS - count * part // REPORTS)
        print(
            f"{count * (part + 1) // REPORTS} starts, {time.monotonic() - start:.0f} s", flush=True
        )
    seconds = time.monotonic() - start
    after = inventory(keeper)

    through = "errand_boy.map" if options.map else "Popen and run"
    through += " by a helper" * options.helper
    lines = [
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}: {count:,} commands "
        f"through {through} in {seconds:.0f} s",
        f"{'':22}{'before':>10}{'after':>10}",
        *(f"{what:22}{before[what]:10}{after[what]:10}" for what in before),
    ]
    left = [what for what in before if not what.endswith("KiB") and before[what] != after[what]]
    if left:
        lines.append("changed: " + ", ".join(left))
    print("\n".join(lines))
    if options.record is not None:
        with options.record.open("a") as record:
            record.write("\n".join(lines) + "\n\n")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
