"""The results of `errand-boy map` as lines of JSON."""

from __future__ import annotations

import json
from subprocess import TimeoutExpired

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

    from errand_boy._cli.commands import Origin
    from errand_boy._map.result import Result


def line(result: Result, origin: Origin) -> bytes:
    """Return the line for a command that has ended.

    Bytes that are not UTF-8 become U+FFFD, since no other text would be valid JSON for everybody.
    """
    error = result.error
    args = result.args if isinstance(result.args, list) else [result.args]
    value = {
        "seq": origin.seq,
        "values": [_text(value) for value in origin.values],
        "args": [_text(word) for word in args],
        "returncode": result.returncode,
        "failed": result.failed,
        "cause": result.cause,
        "error": None if error is None else _reason(error),
        "host": result.host,
        "runs": result.runs,
        "started": result.started,
        "duration": result.duration,
        "peak_memory": result.peak_memory,
        "truncated": result.truncated,
        "stdout": _text(_whole(result.stdout, result.stdout_file)),
        "stderr": _text(_whole(result.stderr, result.stderr_file)),
    }
    return json.dumps(value).encode() + b"\n"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutExpired):
        return "timed out"
    return getattr(error, "strerror", None) or str(error)


def _whole(data: bytes | None, file: IO[bytes] | None) -> bytes:
    if file is None:
        return data or b""
    with file:
        return file.read()


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
