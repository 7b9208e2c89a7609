"""What `errand-boy map` writes about its commands, and when it writes it."""

from __future__ import annotations

import contextlib
import os
import sys
from subprocess import TimeoutExpired

from errand_boy._cli import command_options
from errand_boy._cli.joblog import written
from errand_boy._cli.parsing import UsageError
from errand_boy._cli.template import Template
from errand_boy._spool import Spool, nameless_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO, Any, TypeAlias

    from errand_boy._cli.commands import Origin
    from errand_boy._map.result import Result

    Sink: TypeAlias = "_Live | _Kept"

KEPT = 1 << 20  # bytes of output in memory for each command; longer output is in a file

_COPIED = 1 << 16  # bytes at a time


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to `parser`."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-k",
        "--keep-order",
        action="store_true",
        help="write the outputs in the order of the commands, not as they end",
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--group",
        dest="grouping",
        action="store_const",
        const="group",
        default="group",
        help="write a command's output when it ends (the default)",
    )
    form.add_argument(
        "--line-buffer",
        "--lb",
        "--linebuffer",
        dest="grouping",
        action="store_const",
        const="lines",
        help="write each line when it is complete",
    )
    form.add_argument(
        "-u",
        "--ungroup",
        dest="grouping",
        action="store_const",
        const="none",
        help="let the commands write directly, which may mix parts of lines",
    )
    form.add_argument(
        "--json",
        dest="grouping",
        action="store_const",
        const="json",
        help="write a line of JSON for each command when it ends: its arguments, its return code, "
        "what it took, and its output",
    )
    group.add_argument(
        "--tag", action="store_true", help="begin each line with the arguments and a tab"
    )
    group.add_argument(
        "--tagstring",
        metavar="STRING",
        help="begin each line with STRING, in which {} and so on are replaced as in COMMAND",
    )
    group.add_argument(
        "--results",
        metavar="DIRECTORY",
        help="write output to the files stdout and stderr in DIRECTORY/1/ARGUMENT/2/ARGUMENT..., "
        "with the names of a header instead of numbers. If DIRECTORY contains {} or the like, it "
        "names the directory if it ends in /, else the file itself, and FILE.err for errors",
    )
    group.add_argument(
        "--files",
        action="store_true",
        help="write each command's output to a file, and the file's name instead",
    )
    group.add_argument("--tmpdir", metavar="DIRECTORY", help="the directory of these files")
    group.add_argument("-v", action="store_true", help="write each command before its output")
    group.add_argument(
        "-t",
        "--verbose",
        action="store_true",
        help="write each command to standard error when it starts",
    )


class Output:
    """Writes output as `options` say. Raises UsageError.

    `names` are those of a header's columns, `origins` those of Commands. `open_output`, or None, is
    for the batch.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        names: Sequence[bytes],
        renamed: Sequence[tuple[bytes, bytes]],
        origins: Mapping[int, Origin],
    ) -> None:
        self.captures = options.grouping != "none"
        tagged = options.tag or options.tagstring is not None
        if not self.captures and (tagged or options.results or options.files):
            raise UsageError(
                "--ungroup can't be combined with --tag, --tagstring, --results or --files"
            )
        if not self.captures and "output" in command_options.given(options).get("limits", ()):
            raise UsageError("--ungroup can't be combined with --limit output: nobody counts it")
        self._json = options.grouping == "json"
        if self._json and (tagged or options.results or options.files or options.v):
            raise UsageError(
                "--json can't be combined with --tag, --tagstring, --results, --files or -v"
            )
        self._lines = options.grouping == "lines"
        if self._lines and (options.results or options.files):
            raise UsageError("--line-buffer can't be combined with --results or --files")
        self._in_order = options.keep_order
        self._files_only = options.files
        self._names_command = options.v
        self._traces = options.verbose
        self._tag: Template | None = None
        if tagged:
            text = "{}" if options.tagstring is None else options.tagstring
            self._tag = Template([text], names=names, renamed=renamed, appends=False)
        self._files: _Files | None = None
        if options.results or options.files:
            self._files = _Files(options.results, options.tmpdir, names, renamed)
        self._origins = origins
        self._sinks: dict[int, list[Sink | None]] = {}
        self.before_writing: Callable[[], None] = _nothing
        self._turn = 0  # the index whose lines are written as they come, with --keep-order
        self.open_output = self._open if self._lines or self._files is not None else None

    def started(self, origin: Origin, command: list[bytes] | bytes) -> None:
        """Record a command that is about to start."""
        if self._traces:
            self.before_writing()
            sys.stderr.buffer.write(written(command) + b"\n")
            sys.stderr.buffer.flush()
        if self._files is not None:
            self._files.create(origin)

    @property
    def uses_slot(self) -> bool:
        """Whether it needs the slots of commands."""
        own = None if self._files is None else self._files.own
        return any(template is not None and template.uses_slot for template in (self._tag, own))

    @property
    def notes_starts(self) -> bool:
        """Whether `started` has anything to do."""
        return self._traces or self._files is not None

    def _open(self, index: int, number: int) -> Any:
        sinks = self._sinks.setdefault(index, [None, None])
        sink: Sink
        if self._files is not None:
            path = self._files.path(self._origins[index], number)
            if path is None:
                return Spool(KEPT, nameless_file)
            sink = _Kept(path)
        else:
            held = self._in_order and index != self._turn
            sink = _Live(_stream(number), self.tag(index), held, self.before_writing)
        sinks[number] = sink
        return sink

    def tag(self, index: int) -> bytes:
        """Return the beginning of each line of a command."""
        if self._tag is None:
            return b""
        origin = self._origins[index]
        return self._tag.text(origin.values, origin.seq, origin.slot) + b"\t"

    def size(self, result: Result) -> int:
        """Return how many bytes a command has written to its standard output."""
        sink, _ = self._sinks.get(result.index, (None, None))
        if sink is not None:
            return sink.size
        file = result.stdout_file
        return len(result.stdout or b"") if file is None else os.fstat(file.fileno()).st_size

    def ended(self, index: int) -> None:
        """Record a command's end, before its output is due."""
        for sink in self._sinks.get(index, ()):
            if isinstance(sink, _Kept):
                sink.close()

    def write(self, result: Result) -> None:
        """Write the output of a command, when it is due."""
        index = result.index
        self.before_writing()
        if self._json:
            from errand_boy._cli.json_lines import line  # noqa: PLC0415

            sys.stdout.buffer.write(line(result, self._origins[index]))
            return
        sinks = self._sinks.pop(index, (None, None))
        tag = b"" if self._tag is None else self.tag(index)
        if self._names_command and self._files is None:
            sys.stdout.buffer.write(tag + written(result.args) + b"\n")
        if self._files is not None:
            self._write_files(self._origins[index])
        for sink in sinks:
            if isinstance(sink, _Live):
                sink.release()
                sink.end()
        outputs = ((result.stdout, result.stdout_file), (result.stderr, result.stderr_file))
        for number, (data, file) in enumerate(outputs):
            if file is not None:
                with file:
                    _copy(file, _stream(number), tag)
            elif data:
                _stream(number).write(_tagged(data, tag) if tag else data)
        if result.error is not None:
            why: Any = result.error
            why = "timed out" if isinstance(why, TimeoutExpired) else why
            why = getattr(why, "strerror", None) or why
            tell(result, why)
        sys.stderr.buffer.flush()
        if self._lines and self._in_order:
            self._turn = index + 1
            for sink in self._sinks.get(self._turn, ()):
                if isinstance(sink, _Live):
                    sink.release()

    def _write_files(self, origin: Origin) -> None:
        assert self._files is not None
        if self._files_only:
            path = self._files.path(origin, 0)
            assert path is not None
            sys.stdout.buffer.write(path + b"\n")
        self._files.forget(origin)


def tell(result: Result, what: object) -> None:
    """Write a message about a command to standard error."""
    text = f"errand-boy: {os.fsdecode(written(result.args))}: {what}\n"
    sys.stderr.buffer.write(os.fsencode(text))


def _nothing() -> None:
    pass


def _stream(number: int) -> IO[bytes]:
    return sys.stderr.buffer if number else sys.stdout.buffer


def _tagged(data: bytes, tag: bytes) -> bytes:
    whole, last = data[:-1], data[-1:]
    return tag + whole.replace(b"\n", b"\n" + tag) + last


def _copy(file: IO[bytes], to: IO[bytes], tag: bytes) -> None:
    if tag:
        for line in file:
            to.write(tag + line)
    else:
        while data := file.read(_COPIED):
            to.write(data)


class _Live:
    """Output that is written in whole lines as it comes, or kept until it is released."""

    data = b""
    file = None
    truncated = False

    def __init__(
        self, to: IO[bytes], tag: bytes, held: bool, before_writing: Callable[[], None]
    ) -> None:
        self._to = to
        self._before_writing = before_writing
        self._tag = tag
        self._rest = b""  # an incomplete line
        self._held: Spool | None = Spool(KEPT, nameless_file) if held else None
        self.size = 0

    def write(self, data: bytes) -> None:
        """Write the lines that `data` completes."""
        self.size += len(data)
        if self._held is not None:
            self._held.write(data)
            return
        lines, newline, rest = data.rpartition(b"\n")
        if newline:
            self._before_writing()
            lines = self._rest + lines + newline
            self._to.write(_tagged(lines, self._tag) if self._tag else lines)
            self._to.flush()
            self._rest = bytes(rest)
        else:
            self._rest += rest

    def release(self) -> None:
        """Write what was kept, and write later output at once."""
        held, self._held = self._held, None
        if held is not None:
            while data := held.read(_COPIED):
                self.write(data)
            held.close()

    def end(self) -> None:
        """Write the last line even if it has no newline."""
        if self._rest:
            self._to.write(self._tag + self._rest)
            self._rest = b""


class _Kept:
    """Output that goes to a named file."""

    data = b""
    file = None
    truncated = False

    def __init__(self, path: bytes) -> None:
        self._file = open(path, "wb", buffering=0)
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append `data`. Raises OSError."""
        self.size += len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Files:
    """The files of --results and --files."""

    def __init__(
        self,
        results: str | None,
        temporary: str | None,
        names: Sequence[bytes],
        renamed: Sequence[tuple[bytes, bytes]],
    ) -> None:
        self._results = None if results is None else os.fsencode(results)
        self._temporary = temporary
        self._names = names
        self.own: Template | None = None
        self._paths: dict[int, tuple[bytes, bytes | None]] = {}  # by seq
        if results is not None:
            template = Template([results], names=names, renamed=renamed, appends=False)
            self.own = template if template.has_field else None

    def create(self, origin: Origin) -> None:
        """Create empty files for a command. Raises OSError."""
        if self._results is None:
            from tempfile import mkstemp  # noqa: PLC0415

            fd, path = mkstemp(".par", "par", self._temporary)
            os.close(fd)
            self._paths[origin.seq] = os.fsencode(path), None
            return
        if self.own is not None:
            values = [_file_name(value) for value in origin.values]
            name = self.own.text(values, origin.seq, origin.slot)
        else:
            parts = [self._results]
            for number, value in enumerate(origin.values):
                named = number < len(self._names)
                parts.append(_file_name(self._names[number]) if named else b"%d" % (number + 1))
                parts.append(_file_name(value))
            name = os.path.join(*parts, b"")
        if name.endswith(b"/"):
            out, err, seq = name + b"stdout", name + b"stderr", name + b"seq"
        else:
            out, err, seq = name, name + b".err", name + b".seq"
        os.makedirs(os.path.dirname(out) or b".", exist_ok=True)
        for made, text in (out, b""), (err, b""), (seq, b"%d" % origin.seq):
            with open(made, "wb") as file:
                file.write(text)
        self._paths[origin.seq] = out, err

    def path(self, origin: Origin, number: int) -> bytes | None:
        """Return the path of a command's output, or None if it is not in a file."""
        return self._paths[origin.seq][number]

    def forget(self, origin: Origin) -> None:
        """Forget the files of a command."""
        with contextlib.suppress(KeyError):
            del self._paths[origin.seq]


def _file_name(value: bytes) -> bytes:
    """Return a value as a file name, almost as GNU parallel does."""
    escaped = value.replace(b"\\", b"\\\\").replace(b"\t", b"\\t").replace(b"\0", b"\\0")
    escaped = escaped.replace(b"/", b"\\_")
    # The last three can't be names of files there.
    return b"\\" + escaped if escaped in (b"", b".", b"..") else escaped
