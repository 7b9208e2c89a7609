"""Compresses files with gzip, several at a time, and prints how much that saved.

    python examples/compress_files.py [--jobs N] [FILE ...]

Writes FILE.gz beside each FILE; without files it makes some in a temporary directory. A file that
cannot be compressed is reported at the end, and does not stop the others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import errand_boy

SAMPLES = 200


def commands(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield a command for each file. gzip reads the file itself, and writes to its output."""
    for path in paths:
        yield {"args": ["gzip", "--best", "--stdout", path], "timeout": 60}


def compress(paths: Sequence[Path], jobs: int) -> list[str]:
    """Compress files; return what went wrong, a line for each."""
    failures = []
    before = after = 0
    slowest = (0.0, Path())
    results = errand_boy.map(commands(paths), max_workers=jobs, ordered=False, progress=True)
    for result in results:
        path = paths[result.index]
        if result.error is not None:
            failures.append(f"{path}: {result.error}")
        elif result.returncode != 0:
            failures.append(result.stderr.decode(errors="replace").strip())
        else:
            path.with_name(path.name + ".gz").write_bytes(result.stdout)
            before += path.stat().st_size
            after += len(result.stdout)
            slowest = max(slowest, (result.duration, path))
    print(f"{len(paths) - len(failures)} files, {before} bytes, are {after} bytes now")
    print(f"the slowest took {slowest[0] * 1000:.0f} ms: {slowest[1].name}")
    return failures


def sample_files(directory: Path) -> list[Path]:
    paths = []
    for number in range(SAMPLES):
        path = directory / f"sample-{number}.log"
        path.write_text("".join(f"{line} all is well\n" for line in range(number * 10)))
        paths.append(path)
    return [*paths, directory / "missing.log"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        paths = arguments.files or sample_files(Path(directory))
        failures = compress(paths, arguments.jobs)
    for failure in failures:
        print("failed:", failure)
    return 1 if failures and arguments.files else 0


if __name__ == "__main__":
    raise SystemExit(main())
