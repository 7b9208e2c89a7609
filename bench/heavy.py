"""A caller of known size. As a program, it holds memory and descriptors, and times starts on
request; as a module, its `Caller` drives such a program.

A request is a line `case library count`; the answer is a JSON list of that many numbers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TRUE = ["/bin/true"]
NOBODY = 65534
THREADS = 8


def popen(library: Any) -> None:
    library.Popen(TRUE).wait()


def run(library: Any) -> None:
    library.run(TRUE, capture_output=True)


def run_shell(library: Any) -> None:
    library.run("true", shell=True, capture_output=True)


def run_cmd(library: Any) -> None:
    library.UNIXSocketTransport().run_cmd("true")


def user(library: Any) -> None:
    library.Popen(TRUE, user=NOBODY).wait()


def preexec_setsid(library: Any) -> None:
    library.Popen(TRUE, preexec_fn=os.setsid).wait()


def new_session(library: Any) -> None:
    library.Popen(TRUE, start_new_session=True).wait()


def posix_spawn(_library: Any) -> None:
    os.waitpid(os.posix_spawn(TRUE[0], TRUE, os.environ), 0)


def fork_exec(_library: Any) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(TRUE[0], TRUE)
        finally:
            os._exit(127)
    os.waitpid(pid, 0)


CASES: dict[str, Callable[[Any], None]] = {
    case.__name__: case
    for case in (
        popen,
        run,
        run_shell,
        run_cmd,
        user,
        preexec_setsid,
        new_session,
        posix_spawn,
        fork_exec,
    )
}


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
CONSTRUCTORS: dict[str, dict[str, int]] = {"constructor": {}, "constructor_piped": PIPES}


def parts(library: Any, options: Mapping[str, int], count: int) -> list[tuple[int, int]]:
    """Return for each start how long (ns) the constructor took, and the whole until reaped."""
    taken = []
    for _ in range(count):
        start = time.perf_counter_ns()
        process = library.Popen(TRUE, **options)
        made = time.perf_counter_ns()
        process.communicate()
        taken.append((made - start, time.perf_counter_ns() - start))
    return taken


def popen_in_threads(library: Any, count: int) -> None:
    def some(number: int) -> None:
        for _ in range(count // THREADS + (number < count % THREADS)):
            library.Popen(TRUE).wait()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(some, range(THREADS)))


def nanoseconds(case: Callable[[Any], None], library: Any, count: int) -> list[int]:
    taken = []
    for _ in range(count):
        start = time.perf_counter_ns()
        case(library)
        taken.append(time.perf_counter_ns() - start)
    return taken


def peak_kib(library: Any) -> int:
    process = library.Popen(TRUE)
    _pid, process.returncode, usage = os.wait4(process.pid, 0)
    return usage.ru_maxrss


def hold_memory(size: int) -> mmap.mmap:
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Huge pages would make fork's copy of the page tables, which is measured here, 500 times
    # smaller; the heap of a Python program is made of small pages.
    held.madvise(mmap.MADV_NOHUGEPAGE)
    block = b"\1" * (1 << 20)
    while held.tell() < size:
        held.write(block[: size - held.tell()])
    return held


def answer(case: str, library_name: str, count: int) -> list[int]:
    library = importlib.import_module(library_name)
    if case == "peak_kib":
        return [peak_kib(library) for _ in range(count)]
    if case == "popen_in_threads":
        popen_in_threads(library, count)
        return []
    if case in CONSTRUCTORS:
        return [made for made, _ in parts(library, CONSTRUCTORS[case], count)]
    return nanoseconds(CASES[case], library, count)


def serve(resident: float, descriptors: int, answer: Callable[[str, str, int], Any]) -> None:
    """Hold memory and descriptors as told, and answer the requests on standard input."""
    requests = os.fdopen(os.dup(0))
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    # Held before a library is imported: a helper that is started late must not cost more.
    held = hold_memory(int(resident * (1 << 30))) if resident else None
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(descriptors)]
    gc.disable()
    for request in requests:
        case, library_name, count = request.split()
        replies.write(json.dumps(answer(case, library_name, int(count))) + "\n")
        replies.flush()
        gc.collect()
    for descriptor in opened:
        os.close(descriptor)
    if held is not None:
        held.close()


class Caller:
    """A process that times starts when asked to: this file's program, or the C loop."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": package_parent()} | dict(variables or {}),
        )

    def ask(self, case: str, library: str, count: int) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{case} {library} {count}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            raise RuntimeError(f"{self._command} ended with {status} at {case} {library}")
        numbers: list[int] = json.loads(answer)
        return numbers

    def close(self) -> None:
        self._process.communicate()


def package_parent() -> str:
    """Where new interpreters find the errand_boy that this one would import."""
    found = importlib.util.find_spec("errand_boy")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("errand_boy is neither installed nor in the current directory")
    return str(Path(found.origin).parent.parent)


def heavy_caller(
    resident: float = 0, descriptors: int = 0, variables: Mapping[str, str] | None = None
) -> Caller:
    options = [f"--resident={resident}", f"--descriptors={descriptors}"]
    return Caller([sys.executable, __file__, *options], variables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resident", type=float, default=0, metavar="GIB")
    parser.add_argument("--descriptors", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    serve(arguments.resident, arguments.descriptors, answer)
