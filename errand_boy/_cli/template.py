"""Makes the commands of `errand-boy map`: replaces {} and quotes for a shell."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Sequence

from errand_boy._cli.parsing import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    Part: TypeAlias = "bytes | Field"

_PLACE = b"{}"
_VARIABLE = b"errand_boy_"

# Without any of these before it, a quoted word is one word. Otherwise it may be in quotes, in a
# comment, a here-document or an arithmetic expression, and end that.
_INTRICATE = re.compile(rb"['\"\\`#$]|<<")
# Characters that have a meaning in any shell word; { and ~ only have one in some places.
_OPERATORS = "|&;<>()$`*"


# -- functions of a value --


_EXTENSIONS = [re.compile(rb"(?:\.[^/.]+){%d}\Z" % count) for count in (1, 2, 3)]


def _no_extension(value: bytes, count: int = 1) -> bytes:
    """Return `value` without its last extensions, or unchanged if there are fewer."""
    return _EXTENSIONS[count - 1].sub(b"", value)


def _extension(value: bytes, count: int = 1) -> bytes:
    match = _EXTENSIONS[count - 1].search(value)
    return match[0][1:] if match else b""


def _base(value: bytes) -> bytes:
    return value.rpartition(b"/")[2]


def _directory(value: bytes) -> bytes:
    head, slash, _ = value.rpartition(b"/")
    return head or (slash or b".")


_CHANGES: dict[bytes, Callable[[bytes], bytes]] = {
    b".": _no_extension,
    b"/": _base,
    b"//": _directory,
    b"/.": lambda value: _no_extension(_base(value)),
    b"..": lambda value: _no_extension(value, 2),
    b"...": lambda value: _no_extension(value, 3),
    b"/..": lambda value: _no_extension(_base(value), 2),
    b"/...": lambda value: _no_extension(_base(value), 3),
    b"+/": lambda value: value.rpartition(b"/")[0],
    b"+.": _extension,
    b"+..": lambda value: _extension(value, 2),
    b"+...": lambda value: _extension(value, 3),
}

# Options that rename a replacement string: the option, its destination, and the string.
_RENAMED = (
    ("-I", "", "replace", b"{}"),
    ("--extensionreplace", "--er", "extension_replace", b"{.}"),
    ("--basenamereplace", "--bnr", "basename_replace", b"{/}"),
    ("--dirnamereplace", "--dnr", "dirname_replace", b"{//}"),
    ("--basenameextensionreplace", "--bner", "basename_extension_replace", b"{/.}"),
    ("--seqreplace", "", "seq_replace", b"{#}"),
    ("--slotreplace", "", "slot_replace", b"{%}"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group(
        "the command",
        "In COMMAND, {} is replaced by the argument, {.} by the argument without its extension, "
        "{/} without its directory, {//} by the directory, {/.} by the basename without "
        "extension, {#} by the command's number, and {%} by its slot. {N} is replaced by the "
        "argument of source, column or position N ({-N}: from the end), and {NAME} by that of a "
        "column that --header names; {N.}, {NAME/} and so on exist too. Without any of "
        "these, the arguments come last.",
    )
    group.add_argument(
        "--shell",
        action="store_true",
        help="COMMAND is a shell command; without COMMAND, each line of input is one. Each value "
        "that replaces {} is one word, so write {} outside quotes. ARGUMENTs are quoted",
    )
    for option, short, name, place in _RENAMED:
        names = [option, short] if short else [option]
        group.add_argument(
            *names,
            dest=name,
            metavar="STRING",
            help=f"in place of {place.decode()}".replace("%", "%%"),
        )
    for option in ("--plus", "-q", "--quote"):  # accepted for GNU parallel; always in effect
        group.add_argument(option, dest="ignored", action="store_true", help=argparse.SUPPRESS)


class Field:
    """A replacement string: which values it stands for, and which part of them."""

    __slots__ = ("change", "index", "special")

    def __init__(
        self,
        index: int | None,
        change: Callable[[bytes], bytes] | None = None,
        special: bytes = b"",
    ) -> None:
        self.index = index  # None: all of them
        self.change = change
        self.special = special  # "#" or "%"

    def values(self, values: Sequence[bytes], seq: int, slot: int) -> list[bytes]:
        """Return the values that replace it."""
        if self.special:
            return [b"%d" % (seq if self.special == b"#" else slot)]
        if self.index is None:
            chosen = list(values)
        else:
            try:
                chosen = [values[self.index]]
            except IndexError:  # a source, a column or a group has fewer values
                chosen = [b""]
        return chosen if self.change is None else [self.change(value) for value in chosen]


class Template:
    """Makes commands from values.

    `words` are the command; without any, the values are a command line. `names` are the names of
    the values, from a header. With `shell`, a shell parses the first word, but neither the others
    nor the values. `contexts`: if several values replace {}, the text around it is repeated for
    each. Raises UsageError for an unknown name.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        shell: bool = False,
        contexts: bool = False,
        names: Sequence[bytes] = (),
        renamed: Sequence[tuple[bytes, bytes]] = (),
        appends: bool = True,
    ) -> None:
        self.shell = shell
        self._contexts = contexts
        self._pattern = _pattern(names, [new for new, _ in renamed])
        self._names = {name: number for number, name in enumerate(names)}
        self._renamed = dict(renamed)
        encoded = [os.fsencode(word) for word in words]
        self._words = [self._parse(word) for word in encoded]
        fields = [part for word in self._words for part in word if isinstance(part, Field)]
        self.has_field = bool(fields)
        self.uses_slot = any(field.special == b"%" for field in fields)
        if words and appends and not fields:
            self._words.append([Field(None)])
            encoded.append(_PLACE)
        # By far the most frequent case: one value replaces some of the words.
        self._simple: list[bytes | None] | None = None
        if not shell and encoded and all(map(_is_simple, self._words)):
            self._simple = [
                (part if isinstance(part := word[0], bytes) else None) if word else b""
                for word in self._words
            ]
        self._is_intricate = bool(encoded and _INTRICATE.search(encoded[0]))

    def _parse(self, word: bytes) -> list[Part]:
        parts: list[Part] = []
        end = 0
        for match in self._pattern.finditer(word):
            if match.start() > end:
                parts.append(word[end : match.start()])
            parts.append(self._field(self._renamed.get(match[0], match[0])))
            end = match.end()
        if end < len(word):
            parts.append(word[end:])
        return parts

    def _field(self, place: bytes) -> Field:
        inner = place[1:-1]
        if inner in (b"#", b"%"):
            return Field(None, special=inner)
        if inner in self._names:
            return Field(self._names[inner])
        match = re.fullmatch(rb"(-?[0-9]+|)(.*)", inner, re.DOTALL)
        assert match is not None
        number, change = match.groups()
        if number:
            index = int(number)
            return Field(index - 1 if index > 0 else index, _CHANGES.get(change))
        for name, position in self._names.items():
            if inner.startswith(name) and inner[len(name) :] in _CHANGES:
                return Field(position, _CHANGES[inner[len(name) :]])
        return Field(None, _CHANGES.get(change))

    def __call__(self, values: Sequence[bytes], seq: int, slot: int) -> list[bytes] | bytes:
        """Return the command for `values`. Raises UsageError if a line needs a shell."""
        simple = self._simple
        if simple is not None and len(values) == 1:
            value = values[0]
            return [value if word is None else word for word in simple]
        if not self._words:
            line = b" ".join(values)
            return line if self.shell else split(line)
        if self.shell:
            return self._shell_command(values, seq, slot)
        words: list[bytes] = []
        for parts in self._words:
            words += self._expand(parts, values, seq, slot)
        return words

    def text(self, values: Sequence[bytes], seq: int, slot: int) -> bytes:
        """Return the words with their replacements, joined by spaces."""
        words = [word for parts in self._words for word in self._expand(parts, values, seq, slot)]
        return b" ".join(words)

    def _expand(
        self, parts: Sequence[Part], values: Sequence[bytes], seq: int, slot: int
    ) -> list[bytes]:
        """Return the words that replace a word.

        Each of several values makes a word. With `contexts` each gets all of the text around it;
        otherwise the first one gets the text before it, and the last one the text after it.
        """
        words = [b""]
        if self._contexts:
            fields = [
                part if isinstance(part, bytes) else part.values(values, seq, slot)
                for part in parts
            ]
            count = max((len(field) for field in fields if isinstance(field, list)), default=1)
            return [
                b"".join(
                    field if isinstance(field, bytes) else field[min(number, len(field) - 1)]
                    for field in fields
                    if field
                )
                for number in range(count)
            ]
        for part in parts:
            if isinstance(part, bytes):
                words[-1] += part
            else:
                first, *others = part.values(values, seq, slot) or [b""]
                words[-1] += first
                words += others
        return words

    def _shell_command(self, values: Sequence[bytes], seq: int, slot: int) -> bytes:
        command, *arguments = self._words
        variables: list[bytes] = []

        def put(value: bytes) -> bytes:
            quoted = quote(value)
            if quoted == value or not self._is_intricate:
                return quoted
            # Pass it in a variable, which the shell does not parse. Pasted into quotes, it could
            # end them.
            name = _VARIABLE + b"%d" % (len(variables) + 1)
            variables.append(b"%b=%b; " % (name, quoted))
            return b'"$%b"' % name

        line = b"".join(
            part if isinstance(part, bytes) else b" ".join(map(put, part.values(values, seq, slot)))
            for part in command
        )
        words = [
            quote(word) for parts in arguments for word in self._expand(parts, values, seq, slot)
        ]
        return b"".join(variables) + b" ".join([line, *words])


def _is_simple(parts: Sequence[Part]) -> bool:
    if not parts:
        return True
    part = parts[0]
    return len(parts) == 1 and (
        isinstance(part, bytes)
        or (not part.special and part.change is None and part.index in (None, 0, -1))
    )


def _pattern(names: Sequence[bytes], renamed: Sequence[bytes]) -> re.Pattern[bytes]:
    changes = b"|".join(re.escape(change) for change in sorted(_CHANGES, key=len, reverse=True))
    whose = b"|".join([rb"-?[1-9][0-9]*", *(re.escape(name) for name in names if name)])
    places = rb"\{(?:[#%%]|(?:%b)?(?:%b)?)\}" % (whose, changes)
    own = [re.escape(new) for new in sorted(renamed, key=len, reverse=True)]
    return re.compile(b"|".join([*own, places]))


def renamed(options: argparse.Namespace) -> list[tuple[bytes, bytes]]:
    """Return the user's names of replacement strings, each with the original string."""
    found = [(getattr(options, name), place) for *_, name, place in _RENAMED]
    if "" in [new for new, _ in found]:
        raise UsageError("a replacement string must not be empty")
    return [(os.fsencode(new), place) for new, place in found if new]


def split(line: bytes) -> list[bytes]:
    """Return the words of a command line. Raises UsageError if only a shell can parse it."""
    text = os.fsdecode(line)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text}: {error}") from None
    meaning = _needs_shell(text)
    if meaning:
        raise UsageError(f"{text}: the {meaning} needs a shell, and none is used without --shell")
    return [os.fsencode(word) for word in words]


def _needs_shell(text: str) -> str:
    """Return the first character outside quotes that only a shell can interpret, or ""."""
    unquoted = re.sub(r"\\.|'[^']*'|\"(?:\\.|[^\"$`\\])*\"", "", text, flags=re.DOTALL)
    return next((character for character in unquoted if character in _OPERATORS), "")


def quote(word: bytes) -> bytes:
    """Return `word` quoted as one word for a shell."""
    return os.fsencode(shlex.quote(os.fsdecode(word)))
