"""The options of the command itself, for `errand-boy run` and `errand-boy map`."""

from __future__ import annotations

import argparse
import resource
import signal
from collections.abc import Callable, Collection

from errand_boy._hints import page
from errand_boy._options import table
from errand_boy._options.names import Limits
from errand_boy._quantities import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNLIMITED = ("unlimited", "infinity")

# Popen's options that these commands don't have, and why.
ABSENT = {
    "controlling_terminal": "errand-boy run --pty gives the command a terminal",
    "foreground": "the shell's job control does it",
    "pty": "errand-boy run --pty; the commands of a map have no terminal",
}


def add_options(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Add the options to `parser`, or only those in `names`."""
    group: argparse._ActionsContainer = parser
    if names is None:
        group = parser.add_argument_group("options of the command", f"See {page('options')}")
    for name in names or _FORMS:
        metavar, parse, text = _FORMS[name]
        spelling = _SPELLINGS.get(name, name.replace("_", "-"))
        kind: dict[str, Any] = {"action": "store_true"}
        if metavar is not None:
            kind = {"metavar": metavar, "type": _checked(name, parse)}
            if name in _REPEATED:
                kind["action"] = "append"
        group.add_argument(f"--{spelling}", dest=_PREFIX + name, help=text, **kind)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the given options, as Popen's keywords."""
    found = {}
    for name in _FORMS:
        value = getattr(options, _PREFIX + name, None)
        if value is not None and value is not False:
            found[name] = _REPEATED[name](value) if name in _REPEATED else value
    return found


def _listed(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _named(text: str, example: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value:
        raise ValueError(f"{text!r} has no value, as {example} has")
    return name, value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an integer") from None


def _rlimit(text: str) -> tuple[str, tuple[int, int]]:
    name, limits = _named(text, "nofile=1024")
    soft, _, hard = limits.partition(":")
    pair = _limit(soft), _limit(hard or soft)
    table.encode({"rlimits": {name: pair}}, False, False)  # raises for an invalid limit
    return name, pair


def _limit(text: str) -> int:
    return resource.RLIM_INFINITY if text in _UNLIMITED else _integer(text)


def _own_limit(text: str) -> tuple[str, str]:
    name, value = _named(text, "wall=60 or memory=1G")
    table.encode({"limits": {name: value}}, False, False)  # raises for an invalid limit
    return name, value


def _cpus(text: str) -> set[int]:
    cpus: set[int] = set()
    for part in _listed(text):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _signals(text: str) -> set[int]:
    return {_number(word) for word in _listed(text)}


def _number(word: str) -> int:
    return int(word) if word.isdigit() else signal.Signals[f"SIG{word.upper().removeprefix('SIG')}"]


def _steps(text: str) -> list[Any]:
    steps: list[Any] = []
    for word in _listed(text):
        name, colon, time = word.partition(":")
        steps.append((_number(name), seconds(time)) if colon else _number(name))
    return steps


def _with_level(text: str) -> str | tuple[str, int]:
    name, colon, level = text.partition(":")
    return (name, _integer(level)) if colon else name


def _checked(name: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `parse` followed by the option's own check, for argparse's `type`."""

    def parse_and_check(text: str) -> Any:
        try:
            value = parse(text)
            if name == "tree" and value == "cgroup":
                return value  # with --cgroup, which is another option
            if name not in _REPEATED and name != "cgroup":
                table.encode({name: value}, False, False)
        except KeyError as error:
            raise argparse.ArgumentTypeError(f"unknown name {error.args[0]}") from None
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return parse_and_check


_PATHS = ("read", "write", "execute")
_SWITCHES = ("network", "system")


def _box(text: str) -> tuple[str, Any]:
    what, _, value = text.partition("=")
    if what in _PATHS and value:
        return what, value
    if what in _SWITCHES and value in ("yes", "no"):
        return what, value == "yes"
    raise ValueError(
        f"{text!r} is not one of read=PATH, write=PATH, execute=PATH, network=yes, system=yes"
    )


def _boxed(parts: list[tuple[str, Any]]) -> dict[str, Any]:
    box: dict[str, Any] = {}
    for what, value in parts:
        if isinstance(value, str):
            box.setdefault(what, []).append(value)
        else:
            box[what] = value
    return box


_PREFIX = "option_"  # of the names in argparse's namespace
_REPEATED: dict[str, Callable[[Any], Any]] = {"limits": dict, "rlimits": dict, "sandbox": _boxed}
_SPELLINGS = {"limits": "limit", "rlimits": "rlimit"}

# For each of these destinations: how its values begin, for completions.
BEGINNINGS = {
    _PREFIX + "limits": [f"{name}=" for name in Limits.__annotations__],
    _PREFIX + "sandbox": [*(f"{name}=" for name in _PATHS), *(f"{name}=yes" for name in _SWITCHES)],
}

# For each option: the metavar (None: it takes no value), the function that parses it, its help.
_FORMS: dict[str, tuple[str | None, Callable[[str], Any], str]] = {
    "capabilities": ("NAME,...", _listed, "the only capabilities that the command keeps"),
    "cgroup": ("DIRECTORY", str, "the cgroup that the command starts in"),
    "cpu_affinity": ("N,N-N", _cpus, "the CPUs that the command may use"),
    "dies_with_caller": (None, str, "kill the command when errand-boy is killed"),
    "drain": (
        "TIME",
        seconds,
        "how long to read output after the command's end; with --tree all, how long its "
        "descendants may go on",
    ),
    "ionice": ("CLASS[:LEVEL]", _with_level, "the I/O priority: realtime, best-effort or idle"),
    "limits": (
        "NAME=LIMIT",
        _own_limit,
        "a limit of the command and all that it starts: wall or cpu (90, 2m), memory, file_size "
        "(4K, 1G), processes, open_files or, with map, output; repeatable",
    ),
    "namespaces": ("NAME,...", _listed, "give the command new namespaces: user, net, pid, ..."),
    "nice": ("N", _integer, "add N to the niceness"),
    "no_new_privs": (None, str, "let the command gain no privileges by executing programs"),
    "oom_score_adj": (
        "N",
        _integer,
        "-1000 to 1000; when memory is short, the highest is killed first",
    ),
    "rlimits": ("NAME=SOFT[:HARD]", _rlimit, "a resource limit; repeatable"),
    "root": ("DIRECTORY", str, "the root directory, by chroot(2)"),
    "sandbox": ("read=PATH|...", _box, "all that the command may use; repeatable"),
    "scheduler": (
        "POLICY[:N]",
        _with_level,
        "the scheduling policy: other, batch, idle, fifo or rr",
    ),
    "signals_blocked": ("NAME,...", _signals, "the only signals that are blocked"),
    "signals_default": ("NAME,...", _signals, "signals that get their default action"),
    "signals_ignored": ("NAME,...", _signals, "signals that the command ignores"),
    "stop": (
        "SIGNAL[:TIME],...",
        _steps,
        "the signals that end the command, as TERM:5s,KILL (default: KILL)",
    ),
    "timer_slack": ("NANOSECONDS", _integer, "how late timers may be"),
    "tree": (
        "process|group|cgroup|all",
        str,
        "which processes get these signals (default: process; with map, group)",
    ),
}
