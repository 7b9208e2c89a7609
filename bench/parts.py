"""Runs the benchmarks of options, ends, the sandbox and terminals, and records what they print.

    python -m bench.parts

writes bench/parts.txt, which docs/benchmarks.md shows. That takes some minutes, and the
machine should be idle; the record has its load.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RECORD = Path(__file__).parent / "parts.txt"
PROGRAMS = ("options", "ends", "sandbox", "terminals")


def main() -> int:
    loads = "{:.2f}, {:.2f}, {:.2f}".format(*os.getloadavg())
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M')}, Python {platform.python_version()}, "
        f"Linux {platform.release()}, {os.cpu_count()} CPUs, load average {loads}"
    ]
    for program in PROGRAMS:
        command = [sys.executable, "-m", f"bench.{program}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines += ["", f"$ python -m bench.{program}", done.stdout.rstrip()]
        print("\n".join(lines[-2:]), flush=True)
    RECORD.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
