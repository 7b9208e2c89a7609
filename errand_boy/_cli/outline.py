"""The options of the subcommands, taken from their parsers, for completions and the manual page."""

from __future__ import annotations

import argparse

from errand_boy._cli import command_options
from errand_boy._cli.args import COMMANDS, parser_of

_FILES = {"FILE", "PATH", "DIRECTORY"}


class Option:
    """An option of a subcommand.

    `names`, `metavar` (None: it takes no value), `is_optional` (the value may be left out), `text`
    (its help), `group` (the title of the group it is in), `choices` (they
    may end in =, where a value follows), and `kind`, which is "file",
    "directory", "user", "group", "choice", "value" or "none".
    """

    def __init__(
        self, parser: argparse.ArgumentParser, action: argparse.Action, group: str
    ) -> None:
        self.names = list(action.option_strings)
        self.group = group
        formatter = parser._get_formatter()
        self.text = formatter._expand_help(action) if action.help else ""
        self.is_optional = action.nargs == "?"
        self.metavar: str | None = None
        if action.nargs != 0:
            shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
            self.metavar = "|".join(map(str, action.choices)) if action.choices else shown
        is_choice = self.metavar is not None and "|" in self.metavar and "=" not in self.metavar
        self.choices = self.metavar.split("|") if self.metavar and is_choice else []
        self.choices += command_options.BEGINNINGS.get(action.dest, ())
        self.kind = self._kind()

    def _kind(self) -> str:
        if self.metavar is None:
            return "none"
        if self.choices:
            return "choice"
        if self.metavar in _FILES:
            return "directory" if self.metavar == "DIRECTORY" else "file"
        return self.metavar.lower() if self.metavar in ("USER", "GROUP") else "value"


class Outline:
    """A subcommand: `name`, `summary`, `usage`, `description`, `options` and `operands`.

    `operands` is what follows the options: "command" (a program and its arguments), "jobs" (names
    of jobs) or "none". If there are `words`, one of them follows.
    """

    def __init__(self, name: str) -> None:
        parser = parser_of(name)
        self.name = name
        self.summary = COMMANDS[name][1]
        self.usage = " ".join(parser.format_usage().split()).removeprefix("usage: ")
        self.description = parser.description or ""
        self.options: list[Option] = []
        self.words: list[str] = []
        positionals = []
        for group in parser._action_groups:
            for action in group._group_actions:
                if not action.option_strings:
                    positionals.append(action.metavar)
                    self.words += map(str, action.choices or ())
                elif action.help != argparse.SUPPRESS:
                    self.options.append(Option(parser, action, group.title or ""))
        self.operands = "none"
        if "JOB" in positionals:
            self.operands = "jobs"
        elif "COMMAND" in (parser.usage or ""):
            self.operands = "command"


def outlines() -> list[Outline]:
    """Return the outline of each subcommand."""
    return [Outline(name) for name in COMMANDS]
