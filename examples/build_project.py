"""Builds a project from a process with a lot of memory, such as a data job or a CI runner.

    python examples/build_project.py [--hold GIB] [--rounds N]

It runs git, tar, gzip, sha256sum and a C compiler, with pipes between them: once through
errand_boy, once through subprocess, and once through fork. The three must produce the same commit
and the same archive. It prints their times, and how much of them it spent on starting commands.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import importlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import errand_boy

FILES = 240
COMMITS = 6
UNITS = 4
PIPE = subprocess.PIPE

# Only these values determine the commit's hash.
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "LC_ALL": "C",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "Builder",
    "GIT_AUTHOR_EMAIL": "builder@example.org",
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "Builder",
    "GIT_COMMITTER_EMAIL": "builder@example.org",
    "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z",
}

UNIT = """\
long unit_{number}(long x)
{{
    return x * x + {number};
}}
"""

MAIN = """\
#include <stdio.h>
{declarations}
int main(void)
{{
    long x;
    while (scanf("%ld", &x) == 1)
        printf("%ld\\n", {total});
    return 0;
}}
"""


class Starter:
    """Starts commands through one Popen, and counts them and the time for their starts."""

    def __init__(self, popen: Callable[..., Any], directory: Path) -> None:
        self._popen = popen
        self._directory = directory
        self.count = 0
        self.seconds = 0.0

    def start(self, command: Sequence[str], **options: Any) -> Any:
        start = time.perf_counter()
        process = self._popen(command, cwd=self._directory, env=ENVIRONMENT, **options)
        self.seconds += time.perf_counter() - start
        self.count += 1
        return process

    def output(self, *command: str, given: bytes | None = None) -> bytes:
        stdin = subprocess.DEVNULL if given is None else PIPE
        with self.start(command, stdin=stdin, stdout=PIPE) as process:
            output: bytes
            output, _ = process.communicate(given)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, output)
        return output

    def pipeline(self, *commands: Sequence[str]) -> bytes:
        with ExitStack() as stack:
            processes: list[Any] = []
            for command in commands:
                stdin = processes[-1].stdout if processes else subprocess.DEVNULL
                process = stack.enter_context(self.start(command, stdin=stdin, stdout=PIPE))
                if processes:
                    # Only the reader may hold it: the writer must notice if the reader ends early.
                    processes[-1].stdout.close()
                processes.append(process)
            output: bytes = processes[-1].stdout.read()
        for process, command in zip(processes, commands, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
        return output


def build(starter: Starter, directory: Path) -> tuple[str, str]:
    """Build and check everything; return the commit's hash and the archive's."""
    write_history(starter, directory)
    check_history(starter)
    check_files(starter, directory)
    build_program(starter, directory)
    commit = starter.output("git", "rev-parse", "HEAD").decode().strip()
    return commit, archive(starter, directory)


def write_history(starter: Starter, directory: Path) -> None:
    starter.output("git", "-c", "init.defaultBranch=main", "init", "-q")
    for commit in range(COMMITS):
        for number in range(commit, FILES, COMMITS):
            path = directory / f"part{number % 24:02}" / f"file{number:03}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{number} {line}\n" for line in range(200)))
            path.chmod(0o644)
            os.utime(path, (0, 0))
        starter.output("git", "add", "--all")
        starter.output("git", "-c", "gc.auto=0", "commit", "-q", "-m", f"Part {commit}")


def check_history(starter: Starter) -> None:
    assert starter.output("git", "rev-list", "--count", "HEAD") == b"%d\n" % COMMITS
    assert starter.output("git", "status", "--porcelain") == b""
    starter.output("git", "fsck", "--strict")
    counted = starter.pipeline(["git", "ls-files"], ["wc", "-l"])
    assert int(counted) == FILES


def check_files(starter: Starter, directory: Path) -> None:
    for part in sorted(directory.glob("part*")):
        names = sorted(str(path.relative_to(directory)) for path in part.iterdir())
        for line in starter.output("sha256sum", *names).decode().splitlines():
            digest, name = line.split()
            assert digest == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def archive(starter: Starter, directory: Path) -> str:
    """Return the hash of the compressed archive, made in one pipeline and again in single steps."""
    tar = ["tar", "--owner=0", "--group=0", "--numeric-owner", "-cf", "-", "-T", "-"]
    gzip = ["gzip", "-n"]
    digest = starter.pipeline(["git", "ls-files"], tar, gzip, ["sha256sum"]).decode().split()[0]
    names = starter.output("git", "ls-files")
    compressed = starter.output(*gzip, given=starter.output(*tar, given=names))
    assert digest == hashlib.sha256(compressed).hexdigest()
    assert starter.output("tar", "-tzf", "-", given=compressed) == names
    return digest


def build_program(starter: Starter, directory: Path) -> None:
    objects = []
    for number in range(UNITS):
        (directory / f"unit{number}.c").write_text(UNIT.format(number=number))
        starter.output("cc", "-O1", "-c", f"unit{number}.c")
        objects.append(f"unit{number}.o")
    declarations = "".join(f"long unit_{number}(long);\n" for number in range(UNITS))
    total = " + ".join(f"unit_{number}(x)" for number in range(UNITS))
    (directory / "main.c").write_text(MAIN.format(declarations=declarations, total=total))
    starter.output("cc", "-o", "program", "main.c", *objects)
    given = "".join(f"{x}\n" for x in range(100)).encode()
    expected = "".join(f"{UNITS * x * x + sum(range(UNITS))}\n" for x in range(100)).encode()
    assert starter.output("./program", given=given) == expected


def ways() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        "errand_boy": errand_boy.Popen,
        "subprocess": subprocess.Popen,
    }
    try:
        gevent_subprocess = importlib.import_module("gevent.subprocess")
    except ImportError:
        # Any preexec_fn makes subprocess fork.
        found["subprocess, preexec_fn"] = functools.partial(
            subprocess.Popen, preexec_fn=lambda: None
        )
    else:
        found["gevent.subprocess"] = gevent_subprocess.Popen
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds a project from a process of some size.")
    parser.add_argument("--hold", type=float, default=2, metavar="GIB", help="(default: 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    arguments = parser.parse_args()

    popens = ways()
    held = b"\1" * int(arguments.hold * (1 << 30))
    print(f"holding {len(held) / (1 << 30):.2f} GiB")
    wall: dict[str, list[float]] = {name: [] for name in popens}
    starting: dict[str, list[float]] = {name: [] for name in popens}
    refused: dict[str, str] = {}
    results = set()
    count = 0
    # In turns, so that other work of the machine affects all of them.
    for _ in range(arguments.rounds):
        for name, popen in popens.items():
            with tempfile.TemporaryDirectory() as directory:
                starter = Starter(popen, Path(directory))
                begin = time.perf_counter()
                try:
                    results.add(build(starter, Path(directory)))
                except OSError as error:
                    # A fork fails so under strict overcommit or near a limit.
                    if error.errno != errno.ENOMEM:
                        raise
                    refused[name] = os.strerror(error.errno)
                    continue
                wall[name].append(time.perf_counter() - begin)
                starting[name].append(starter.seconds)
                count = starter.count
    [(commit, digest)] = results
    print(f"built {FILES} files in {COMMITS} commits, with {count} commands")
    print(f"commit {commit}")
    print(f"archive {digest}")
    print()
    print(f"{'':24}{'build':>10}{'ratio':>8}{'starting':>12}{'ratio':>8}")
    base = statistics.median(wall["errand_boy"]), statistics.median(starting["errand_boy"])
    for name, times in wall.items():
        if name in refused:
            print(f"{name:24}{refused[name]}")
            continue
        whole, starts = statistics.median(times), statistics.median(starting[name])
        print(
            f"{name:24}{whole:8.2f} s{whole / base[0]:8.2f}"
            f"{starts * 1e3:9.0f} ms{starts / base[1]:8.2f}"
        )


if __name__ == "__main__":
    main()
