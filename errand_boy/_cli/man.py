"""The manual page, made from the parsers: `errand-boy man`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import errand_boy
from errand_boy._cli.args import SUMMARY
from errand_boy._cli.outline import Option, Outline, outlines
from errand_boy._hints import DOCUMENTATION

_ENVIRONMENT = {
    "ERRAND_BOY_SOCKET": "where the daemon listens; if it is set, nothing else starts commands",
    "ERRAND_BOY_SPAWN": "how this process starts commands: direct, helper or posix",
    "ERRAND_BOY_HELPER": "another program to use as the helper, for tests",
    "ERRAND_BOY_CGROUP": "the directory in which cgroups of commands are made",
    "ERRAND_BOY_DETACH_KEYS": "the keys that detach from errand-boy attach",
}


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return argparse.ArgumentParser(
        prog=prog,
        description="Write the manual page errand-boy(1), for man(1): errand-boy man | man -l -",
    )


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Write the page; return the exit status."""
    parser.parse_args(arguments)
    print("\n".join(_page()))
    return 0


def _page() -> Iterator[str]:
    commands = outlines()
    yield f'.TH ERRAND-BOY 1 "" "errand-boy {errand_boy.__version__}" "User Commands"'
    yield ".SH NAME"
    yield f"errand-boy \\- {_escaped(SUMMARY[0].lower() + SUMMARY[1:].rstrip('.'))}"
    yield ".SH SYNOPSIS"
    yield ".B errand-boy\n.I COMMAND\n[\\fIoption\\fR ...]"
    yield ".SH COMMANDS"
    for command in commands:
        yield f".TP\n.B {_escaped(command.name)}\n{_escaped(command.summary)}"
    for command in commands:
        yield from _section(command)
    yield ".SH ENVIRONMENT"
    for name, text in _ENVIRONMENT.items():
        yield f".TP\n.B {name}\n{_escaped(text)}"
    yield ".SH SEE ALSO\n.BR timeout (1),\n.BR xargs (1),\n.BR parallel (1)"
    yield f".PP\n{_escaped(DOCUMENTATION)}"


def _section(command: Outline) -> Iterator[str]:
    yield f".SH {_escaped(command.name.upper())}"
    yield f".B {_escaped(command.usage)}\n.PP\n{_escaped(command.description)}"
    title = "options"
    for option in command.options:
        if option.group != title:
            title = option.group
            yield f".SS {_escaped(title[0].upper() + title[1:])}"
        yield f".TP\n{_names(option)}\n{_escaped(option.text[:1].upper() + option.text[1:])}."


def _names(option: Option) -> str:
    names = ", ".join(f"\\fB{_escaped(name)}\\fR" for name in option.names)
    if option.metavar is None:
        return names
    value = f"\\fI{_escaped(option.metavar)}\\fR"
    return f"{names} [{value}]" if option.is_optional else f"{names} {value}"


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha")
    return f"\\&{text}" if text.startswith(".") else text
