"""Shows what a command used, after its end: `errand-boy run --stats`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMS = ("text", "json")

# Fields of a struct_rusage, in the order and with the names of time(1).
_USAGE = {
    "ru_utime": "User time (seconds)",
    "ru_stime": "System time (seconds)",
    "ru_majflt": "Major (requiring I/O) page faults",
    "ru_minflt": "Minor (reclaiming a frame) page faults",
    "ru_nvcsw": "Voluntary context switches",
    "ru_nivcsw": "Involuntary context switches",
    "ru_inblock": "File system inputs",
    "ru_oublock": "File system outputs",
}


def show(process: Any, argv: Sequence[str], form: str, cause: str | None) -> None:
    """Write to standard error what the ended command of a process object has used."""
    text = _json(process, argv, cause) if form == "json" else _text(process, argv, cause)
    print(text, file=sys.stderr, flush=True)


def _json(process: Any, argv: Sequence[str], cause: str | None) -> str:
    rusage = process.rusage
    return json.dumps(
        {
            "args": list(argv),
            "returncode": process.returncode,
            "cause": cause,
            "duration": process.duration,
            "peak_memory": process.peak_memory,
            "limits_by": process.limits_by,
            "rusage": rusage and {name: getattr(rusage, name) for name in _USAGE},
        }
    )


def _text(process: Any, argv: Sequence[str], cause: str | None) -> str:
    code = process.returncode
    lines = [
        ("Command", shlex.join(argv)),
        ("Cause of its end", cause),
        ("Exit status", code) if code >= 0 else ("Ended by signal", -code),
        ("Elapsed (wall clock) time (seconds)", f"{process.duration:.3f}"),
    ]
    rusage = process.rusage
    if rusage is not None:
        lines += [(label, _number(getattr(rusage, name))) for name, label in _USAGE.items()]
    if process.peak_memory is not None:
        lines.append(("Peak memory (kbytes)", process.peak_memory >> 10))
    if process.limits_by is not None:
        lines.append(("Limits by", process.limits_by))
    return "\n".join(f"\t{label}: {value}" for label, value in lines)


def _number(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
