"""Shows what works on this system: `errand-boy doctor`."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence

from errand_boy import _doctor
from errand_boy._cli.parsing import Parser, add_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_WIDTH = 100
_HEAD = 26  # columns
_SAID = {True: "yes", False: "no"}


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog,
        description="Try what errand-boy can do on this system, and show what works, how commands "
        "are started and why, and what would make that faster. The exit status is 0 if commands "
        "are started without a fork, and 1 if only the standard library can start them or nothing "
        "can. Missing options and daemons do not count.",
    )
    add_socket(parser)
    parser.add_argument("--json", action="store_true", help="write JSON, for programs")
    return parser


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Examine the system and show the result; return the exit status."""
    options = parser.parse_args(arguments)
    found = _doctor.examine(options.socket)
    print(json.dumps(found, indent=2) if options.json else "\n".join(_lines(found)))
    return 0 if found["without_fork"] else 1


def _lines(found: dict[str, Any]) -> Iterator[str]:
    system = found["system"]
    yield f"errand-boy {found['version']}, Python {found['python']}, {system['kernel']}"
    yield f"on {system['machine']}"
    yield ""
    yield from _wrapped("A command is started:", f"{found['way']} ({found['why']})")
    if found["helper"]["path"] is not None:
        yield from _wrapped(
            "", "by a helper for user=, group=, tree=, limits=, and in map and a daemon"
        )
    if found["error"] is not None:
        yield from _wrapped("But it fails:", found["error"])
    yield ""
    yield "Ways to start one, and what /bin/true takes"
    for name, tried in found["ways"].items():
        time = f"{tried['seconds'] * 1e3:.2f} ms" if tried["works"] else tried["error"]
        yield from _wrapped(f"  {_SAID[tried['works']]:4}{name}", time)
    yield ""
    yield "Options"
    for name, tried in found["options"].items():
        yield from _wrapped(f"  {_SAID[tried['works']]:4}{name}", tried["error"] or "")
    yield ""
    yield "System"
    for name, value in system.items():
        if name not in ("kernel", "machine"):
            shown = ", ".join(value) if isinstance(value, list) else value
            shown = _SAID[value] if isinstance(value, bool) else shown
            yield from _wrapped(
                f"  {name.replace('_', ' ')}", str("none" if shown in (None, "") else shown)
            )
    for name, value in found["environment"].items():
        yield from _wrapped(f"  {name}", value)
    yield from _wrapped("  helper", found["helper"]["path"] or "none")
    daemon = found["daemon"]
    where = f"{daemon['version']} at {daemon['socket']}" if daemon["answers"] else daemon["error"]
    yield from _wrapped("  daemon", where)
    if found["advice"]:
        yield ""
        yield "What would help"
        for advice in found["advice"]:
            yield textwrap.fill(
                advice, _WIDTH, initial_indent="  - ", subsequent_indent="    ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip


def _wrapped(head: str, text: str) -> Iterator[str]:
    wrapped = textwrap.wrap(text, _WIDTH - _HEAD, break_long_words=False, break_on_hyphens=False)
    for line in wrapped or [""]:
        yield f"{head:{_HEAD}}{line}".rstrip()
        head = ""
