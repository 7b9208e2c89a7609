"""Common parts of the options of several subcommands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

from errand_boy import _quantities
from errand_boy._hints import nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, TypeVar

    T = TypeVar("T")

_WHERE = (
    "where the daemon listens (default: $ERRAND_BOY_SOCKET, else errand-boy.sock in "
    "$XDG_RUNTIME_DIR, else in /run)"
)


class UsageError(ValueError):
    """The command line is wrong; the text says why."""


class Parser(argparse.ArgumentParser):
    """Says of an unknown option which one may be meant, and else where all are listed."""

    def __init__(self, **settings: Any) -> None:
        # argparse makes a formatter also for each option that is added. To find out the terminal's
        # width, it would import shutil, which takes 2 ms.
        super().__init__(formatter_class=partial(argparse.HelpFormatter, width=80), **settings)

    def format_help(self) -> str:
        """Return the help, as wide as the terminal."""
        self.formatter_class = argparse.HelpFormatter
        return super().format_help()

    def format_usage(self) -> str:
        """Return the usage, as wide as the terminal."""
        self.formatter_class = argparse.HelpFormatter
        return super().format_usage()

    def error(self, message: str) -> NoReturn:
        """Write the usage and the message to standard error, and exit."""
        _, unknown, names = message.partition("unrecognized arguments: -")
        if unknown:
            name = f"-{names}".split()[0].partition("=")[0]
            likely = nearest(name, self._option_string_actions)
            message += f"; try {likely}" if likely else f"; {self.prog} --help lists the options"
        super().error(message)


def add_socket(
    parser: argparse.ArgumentParser, text: str = _WHERE, *, or_local: bool = False
) -> None:
    """Add --socket to `parser`, with this help, and --local."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--socket", metavar="PATH", help=text)
    if or_local:
        group.add_argument("--local", action="store_true", help="start commands without a daemon")


def message(error: BaseException) -> str:
    """Return the text of an exception, for a line on standard error."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error)


def number(of: type[int] | type[float], least: float) -> Callable[[str], float]:
    """Return a function for argparse's `type` that accepts numbers of `least` or more."""

    def parse(text: str) -> float:
        value = of(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
        return value

    parse.__name__ = "number"  # for argparse's own message
    return parse


def duration(text: str) -> float:
    """Return the seconds of a duration such as 2m, for argparse's `type`."""
    return _parsed(_quantities.seconds, text)


def size(text: str) -> int:
    """Return the bytes of a size such as 64K, for argparse's `type`."""
    return _parsed(_quantities.size, text)


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user(text: str) -> int:
    """Return the id of a user, given by name or number, for argparse's `type`."""
    import pwd  # noqa: PLC0415

    if text.isdecimal():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"unknown user {text}") from None


def group(text: str) -> int:
    """Return the id of a group, given by name or number, for argparse's `type`."""
    import grp  # noqa: PLC0415

    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"unknown group {text}") from None
