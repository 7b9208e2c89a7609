#!/usr/bin/env python3
"""What options add to a direct start, compared in turns with one without options.

    bench/options.py [PAIRS]

Prints the median time from the call to the reaped child of each, and their ratio.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from typing import Any, cast

import errand_boy

FIVE: dict[str, Any] = {
    "rlimits": {"core": 0},
    "nice": 0,
    "no_new_privs": True,
    "signals_default": {signal.SIGPIPE},
    "timer_slack": 50_000,
}


def seconds(options: dict[str, Any]) -> float:
    """Return how long a start takes, up to the child's end."""
    begun = time.perf_counter()
    cast(Any, errand_boy.Popen)(["/bin/true"], **options).wait()
    return time.perf_counter() - begun


def main() -> int:
    os.environ["ERRAND_BOY_SPAWN"] = "direct"
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    for name, options in ("five options", FIVE), ("oom_score_adj", {"oom_score_adj": 500}):
        plain, more = [], []
        for _ in range(pairs):
            plain.append(seconds({}))
            more.append(seconds(options))
        before, after = statistics.median(plain), statistics.median(more)
        print(f"{name:14} {after * 1e6:6.1f} µs, without {before * 1e6:6.1f}: {after / before:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
