"""What a sandbox adds to a start, in turns with starts without one, in one process.

    python -m bench.sandbox [PAIRS]

Prints the medians of the pairs' differences in µs: of the constructor, and from the start until
the command is reaped, which includes the sandbox's cost for what the program opens.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import errand_boy

COMMAND = ["/bin/true"]
Popen = cast(Any, errand_boy.Popen)


def measure(**options: Any) -> tuple[float, float]:
    """Start one command; return the constructor's time and the whole, in µs."""
    begun = time.perf_counter_ns()
    process = Popen(COMMAND, **options)
    made = time.perf_counter_ns()
    process.wait()
    return (made - begun) / 1e3, (time.perf_counter_ns() - begun) / 1e3


def compare(name: str, pairs: int, first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """Measure in turns, and print the medians and the median differences."""
    first(), second()
    taken = [(first(), second()) for _ in range(pairs)]
    line = f"{name:34}"
    for i, what in enumerate(("constructor", "reaped")):
        without = statistics.median(a[i] for a, _ in taken)
        more = statistics.median(b[i] - a[i] for a, b in taken)
        line += f"  {what}: {without:6.0f} {more:+6.1f} µs"
    print(line)


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    places = {
        "files": errand_boy.Sandbox(system=True, network=True, strict=False),
        "files and sockets": errand_boy.Sandbox(system=True, strict=False),
        "files, sockets and a port": errand_boy.Sandbox(
            system=True, network={"connect": [443]}, strict=False
        ),
    }
    compare("noise", pairs, measure, measure)
    compare("no_new_privs", pairs, measure, lambda: measure(no_new_privs=True))
    for name, place in places.items():
        compare(name, pairs, measure, lambda place=place: measure(sandbox=place))  # type: ignore[misc]
    spaces = {"user", "net"}
    compare("namespaces of users and networks", pairs // 10, measure,
            lambda: measure(namespaces=spaces))  # fmt: skip


if __name__ == "__main__":
    main()
