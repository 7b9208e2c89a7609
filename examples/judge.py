"""Grades submitted programs: each runs on its own, in a sandbox, with limits.

    python examples/judge.py [--jobs N] [PROGRAM ...]

A PROGRAM is a Python file that reads two numbers and prints their sum. Without any, it grades
samples: a correct one, and several that are wrong in ways that judges know. For each it prints the
grade and what the program used.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import errand_boy

run: Any = errand_boy.run  # a type checker knows the parameters of subprocess.run only
TESTS = [("1 2\n", "3\n"), ("-5 5\n", "0\n"), ("123456789 987654321\n", "1111111110\n")]
LIMITS: dict[str, Any] = {
    "wall": 20,
    "cpu": 2,
    "memory": "200M",
    "output": "64K",
    "processes": 8,
    "file_size": "1M",
}
GRADES = {
    "timeout": "too slow",
    "cpu": "too slow",
    "memory": "too big",
    "output": "too loud",
    "processes": "forking",
    "signal": "crashing",
}
SAMPLES = {
    "right": "print(sum(map(int, input().split())))",
    "wrong": "print(3)",
    "slow": "while True: pass",
    "asleep": "import time; time.sleep(1000)",
    "big": "x = bytearray(b'x' * 1000000000); print(3)",
    "loud": "while True: print('three')",
    "forking": "import os, time\nwhile True:\n    if os.fork() == 0: time.sleep(1000)",
    "crashing": "import os; os.abort()",
    "failing": "print(1 / 0)",
    "curious": "print(open('/etc/passwd').read())",
    "dialling": "import socket; socket.create_connection(('127.0.0.1', 80))",
}


def sandbox() -> errand_boy.Sandbox:
    """Return a sandbox in which Python runs, and can read only its own files."""
    python = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    return errand_boy.Sandbox(system=True, execute=sorted(python), strict=False)


def grade(program: Path, place: errand_boy.Sandbox) -> tuple[str, Any]:
    """Return the grade, and the result of the last test."""
    source = program.read_bytes()
    for given, expected in TESTS:
        # The program is an argument, since it can't read anything in this directory.
        done = run(
            [sys.executable, "-I", "-S", "-c", source],
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            limits=LIMITS,
            sandbox=place,
        )
        if done.cause != "exit":
            return GRADES[done.cause], done
        if done.returncode != 0:
            return "crashing", done
        if done.stdout != expected:
            return "wrong", done
    return "right", done


def judge(programs: Sequence[Path], jobs: int) -> None:
    """Grade programs, several at a time, and print a line for each."""
    place = sandbox()
    with ThreadPoolExecutor(jobs) as pool:
        grades = pool.map(lambda program: grade(program, place), programs)
        for program, (word, done) in zip(programs, grades, strict=True):
            cpu = done.rusage.ru_utime + done.rusage.ru_stime
            peak = done.peak_memory / (1 << 20)
            print(f"{program.stem:10} {word:10} {done.duration:6.2f} s  {cpu:6.2f} s of CPU"
                  f"  {peak:5.0f} MiB")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("programs", nargs="*", type=Path, metavar="PROGRAM")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        programs = arguments.programs
        for name, source in SAMPLES.items() if not programs else ():
            path = Path(directory, f"{name}.py")
            path.write_text(source)
            programs.append(path)
        judge(programs, arguments.jobs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
