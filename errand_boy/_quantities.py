"""Durations and sizes as people write them: 90, "1.5s", "500ms", "2m"; 4096, "64K", "1.5G"."""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|[smhd]?)", re.ASCII)
_SECONDS = {"ms": 1e-3, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_BYTES = {unit: 1 << 10 * power for power, unit in enumerate(("", *"KMGTP"))}

A_DURATION = "a duration such as 10, 1.5s, 500ms, 2m, 1h or 1d"
A_SIZE = "a size such as 4096, 64K, 10M or 1.5G"


def seconds(value: Any) -> float:
    """Return the seconds in `value`, a number or a text such as "2m". Raises ValueError."""
    if not isinstance(value, str):
        return float(value)
    found = _DURATION.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"{value!r} is not {A_DURATION}")
    return float(found[1]) * _SECONDS[found[2]]


def size(value: Any) -> int:
    """Return the bytes in `value`, a number or a text such as "1.5G". Raises ValueError."""
    if not isinstance(value, str):
        return int(value)
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"{value!r} is not {A_SIZE}")
    return int(float(found[1]) * _BYTES[found[2].upper()])
