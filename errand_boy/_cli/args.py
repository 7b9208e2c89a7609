"""The command ``errand-boy``, and its subcommands."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import errand_boy
from errand_boy._hints import nearest
from errand_boy._process import direct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from typing import Any

# A subcommand is a module of this package with two functions. `parser` gets the name of the program
# and returns an ArgumentParser, from which the completions and the manual page are made, too.
# `main` gets that parser and the arguments, and returns the exit status.
COMMANDS = {
    "run": ("run_options", "run one command on this terminal, and exit with its status"),
    "map": ("map", "run a command for each line of the input or each argument, several at once"),
    "ps": ("detached", "list the commands that run detached"),
    "attach": ("detached", "show a detached command here, and type to it"),
    "logs": ("detached", "write what detached commands have written"),
    "wait": ("detached", "wait for detached commands"),
    "stop": ("detached", "end detached commands"),
    "rm": ("detached", "remove detached commands that are over, and their output"),
    "serve": ("serve", "run the daemon"),
    "status": ("status", "show what the daemon is doing"),
    "completion": ("completion", "write a completion of this command line for a shell"),
    "man": ("man", "write the manual page"),
    "doctor": ("doctor", "show what works on this system, and how commands are started"),
}

SUMMARY = "Start commands without forking the process that asks for them."


def parser_of(command: str) -> ArgumentParser:
    """Return the parser of a subcommand."""
    parser: ArgumentParser = _module_of(command).parser(f"errand-boy {command}")
    return parser


def _module_of(command: str) -> Any:
    return import_module(f"errand_boy._cli.{COMMANDS[command][0]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. For `serve`, the process becomes the daemon."""
    open_standard_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head(1), has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes it at its end
        return 128 + signal.SIGPIPE
    return status


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(errand_boy.__version__)
        return 0
    if arguments[0] not in COMMANDS:
        print(f"usage: {USAGE}\nerrand-boy: error: {_unknown(arguments)}", file=sys.stderr)
        return 2
    command = arguments[0]
    if command != "doctor" and direct.WITHOUT_C is not None:
        print(f"errand-boy {command}: {direct.WITHOUT_C}", file=sys.stderr)
        return 125
    parser = parser_of(command)
    gc.freeze()  # what there is by now stays; to search it all at the end takes 5 ms
    status: int = _module_of(command).main(parser, arguments[1:])
    return status


USAGE = "errand-boy COMMAND [option ...]"


def _help() -> str:
    lines = [f"usage: {USAGE}", "", SUMMARY, ""]
    width = max(map(len, COMMANDS)) + 2
    lines += [f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "errand-boy COMMAND --help has the options of each.", "", "  -V, --version"]
    return "\n".join(lines)


_OTHER_NAMES = {
    "exec": "run",
    "jobs": "ps",
    "kill": "stop",
    "list": "ps",
    "ls": "ps",
    "restart": "stop",
    "start": "run",
    "top": "status --watch",
    "version": "--version",
}


def _unknown(arguments: list[str]) -> str:
    from shutil import which  # noqa: PLC0415

    name = arguments[0]
    if name.startswith("-"):
        likely = nearest(name, ("--help", "--version"))
        if likely:
            return f"unknown option {name}; try {likely}"
        return f"unknown option {name}; the daemon's come after its name: errand-boy serve {name}"
    likely = _OTHER_NAMES.get(name)
    if likely is None and not which(name):
        likely = nearest(name, COMMANDS)
    meant = f"errand-boy {likely}, or " if likely else ""
    return f"there is no command {name}; try {meant}errand-boy run -- {shlex.join(arguments)}"


def open_standard_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    Otherwise the next file or socket would get its number, and the output written to it.
    """
    for fd, name, mode in (0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # this gets the lowest free number
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))
