"""The commands of one `map`, and their results."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence

from errand_boy._descriptors import duplicate
from errand_boy._map import policy
from errand_boy._map.result import Result
from errand_boy._options import request
from errand_boy._spool import Spool, coding

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import IO, Any, TypeAlias

    from errand_boy._map.policy import Retries
    from errand_boy._process.tracker import Tracker
    from errand_boy._timers import Timer
    from errand_boy._wire.stream import Ended

    Command: TypeAlias = "Sequence[Any] | str | bytes | os.PathLike[Any] | Mapping[str, Any]"

_PLAIN = (list, tuple)
_IDS = ("user", "group", "extra_groups")
_KEYS = ("args", "input", "retries", "shell", "timeout", *_IDS)  # of a mapping, and the options
_UNDECODABLE = 125  # return code for undecodable output of a successful command


def check_several(commands: Any, shell: bool) -> None:
    """Raise TypeError if one command is given instead of several.

    A list of strings is several commands: ["true", "false"]. But the names of programs don't begin
    with a hyphen, so ["ls", "-l"] must be meant as one command.
    """
    if isinstance(commands, (str, bytes)):
        raise TypeError(
            f"commands must be an iterable of commands, as in [[{commands!r}]], not {commands!r}"
        )
    if shell or not isinstance(commands, (list, tuple)) or not commands:
        return
    if isinstance(commands[0], str):
        for command in commands:
            if isinstance(command, str) and command.startswith("-"):
                raise TypeError(
                    f"each item is a command, and {command!r} can't be one; a command with its "
                    "arguments is a list within the list: [[...]]"
                )


class Job:
    """A command of a `map` and its state."""

    __slots__ = (
        "args",
        "argv",
        "attempts",
        "begun",
        "drains",
        "index",
        "input",
        "last",
        "limited",
        "options",
        "outputs",
        "retries",
        "runs",
        "shell",
        "slot",
        "timed_out",
        "timeout",
        "timer",
    )

    def __init__(self, index: int, args: Any) -> None:
        self.index = index
        self.args = args
        self.argv: Sequence[Any] = ()
        self.options: Mapping[str, Any] | None = None  # its own, if any
        self.input: bytes | None = None
        self.shell = False
        self.timeout: float | None = None
        self.timer: Timer | None = None
        self.attempts = 0  # attempts to start it
        self.retries: Retries | None = None
        self.runs = 0  # finished runs
        self.limited: Tracker | None = None
        self.slot = 0
        self.last: Result | None = None  # of a failed run, while another one is due

    @property
    def is_plain(self) -> bool:
        """Whether it has no option of its own."""
        return (
            self.options is None
            and self.input is None
            and self.timeout is None
            and self.retries is None
        )

    def begin(self) -> None:
        """Reset the state before an attempt to start the command."""
        if self.limited is not None:
            self.limited = type(self.limited)(self.limited.limits)
        self.attempts += 1
        self.outputs: list[Spool | None] = [None, None]
        self.timed_out = False
        self.drains = False
        self.begun = time.monotonic()


class Jobs:
    """Makes a Job of each command. `options` apply where a command has none of its own."""

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        captured: tuple[bool, bool],
        text: bool | None,
        encoding: str | None,
        errors: str | None,
        input: Any,
        timeout: float | None,
        retries: int | Retries | None,
        shell: bool,
        max_output: int | None,
        spool: bool,
    ) -> None:
        if max_output is not None and max_output < 0:
            raise ValueError("max_output must not be negative")
        self.options = options
        self._captured = captured
        self._text = bool(text or encoding or errors)
        self._nothing: Any = "" if self._text else b""
        self._encoding, self._errors = coding(encoding, errors) if self._text else ("", "")
        self._input = input
        self._timeout = timeout
        self._retries = policy.retries(retries)
        self._shell = shell
        # How many bytes of each output are kept, or None for all.
        self.max_output = None if spool else max_output
        self._most_in_memory = max_output
        self._open_file: Callable[[], IO[bytes]] | None = _temporary_file if spool else None
        # Called with a command's index, and 0 or 1; returns an object like Spool for its output.
        self.open_output: Callable[[int, int], Any] | None = None

    def make(self, index: int, command: Command) -> Job:
        """Return the Job for a command. Raises TypeError and ValueError."""
        given: dict[str, Any] | None = None
        args: Any = command
        plain = type(command) in _PLAIN  # else the checks take a microsecond
        if not plain and isinstance(command, Mapping):
            given = dict(command)
            try:
                args = given.pop("args")
            except KeyError:
                raise TypeError("a command's mapping needs args") from None
        job = Job(index, args)
        if given is None:
            job.shell, job.timeout, job.retries = self._shell, self._timeout, self._retries
            input = self._input
        else:
            job.shell = given.pop("shell", self._shell)
            job.timeout = given.pop("timeout", self._timeout)
            job.retries = policy.retries(given.pop("retries", self._retries))
            input = given.pop("input", self._input)
        if input is not None:
            if self._text:
                input = input.encode(self._encoding, self._errors)
            job.input = input if type(input) is bytes else bytes(memoryview(input))
        if given:
            job.options = self._merged(given)
        limits = (job.options or self.options).get("limits")
        if limits is not None:
            from errand_boy._options.limits import Bounds  # noqa: PLC0415
            from errand_boy._process.tracker import Tracker  # noqa: PLC0415

            job.limited = Tracker(Bounds(limits))
        if plain and not job.shell:
            job.argv = args
        else:
            job.argv = request.arguments(args, job.shell)
        return job

    def _merged(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a command, with those of its mapping."""
        ids = request.ids(*(given.pop(name, None) for name in _IDS))
        unknown = request.unknown(given.keys() - self.options.keys() - ids.keys())
        if unknown:
            raise request.unexpected("a command's mapping", unknown, (*_KEYS, *self.options))
        return {**self.options, **given, **ids}

    def write(self, job: Job, number: int, data: bytes) -> None:
        """Keep a command's output. Raises OSError."""
        if job.limited is not None:
            data = job.limited.take(data)
        output = job.outputs[number]
        if output is None:
            if self.open_output is None:
                output = Spool(self._most_in_memory, self._open_file)
            else:
                output = self.open_output(job.index, number)
            job.outputs[number] = output
        output.write(data)

    def ended(self, job: Job, ended: Ended) -> Result:
        """Return the result of a command that has ended."""
        result = Result(job.args, ended.returncode)
        result._end = ended
        result._limited = job.limited
        self.put_output(result, job)
        if job.timed_out:
            result.error = subprocess.TimeoutExpired(
                job.args, job.timeout or 0, result.stdout, result.stderr
            )
        return result

    def failed(self, job: Job, error: Exception) -> Result:
        """Return the result of a command that was not started."""
        if isinstance(error, IndexError):
            error = ValueError("a command needs at least one argument")
        else:
            request.name_program(error, job.argv[0])
        return self.without_end(job, 127 if isinstance(error, FileNotFoundError) else 126, error)

    def without_end(self, job: Job, returncode: int, error: Exception) -> Result:
        """Return the result of a command whose exit status is lost."""
        result = Result(job.args, returncode)
        self.put_output(result, job)
        result.error = error
        return result

    def put_output(self, result: Result, job: Job) -> None:
        """Store the output that `write` has kept in a result."""
        for number, output in enumerate(job.outputs):
            if not self._captured[number]:
                continue
            data = self._nothing
            if output is not None:
                data = output.data
                if output.file is not None:
                    output.file.seek(0)
                    setattr(result, "stderr_file" if number else "stdout_file", output.file)
                result.truncated = result.truncated or output.truncated
                if self._text:
                    data = self._decoded(output, result)
                elif isinstance(data, bytearray):
                    data = bytes(data)
            if number:
                result.stderr = data
            else:
                result.stdout = data

    def _decoded(self, output: Spool, result: Result) -> str:
        try:
            return output.text(self._encoding, self._errors)
        except UnicodeError as error:
            # subprocess would raise the error. Here it must not count as success, or stop others.
            result.error = error
            result.returncode = result.returncode or _UNDECODABLE
            return output.text(self._encoding, "backslashreplace")


def _temporary_file() -> IO[bytes]:
    from tempfile import TemporaryFile  # noqa: PLC0415

    file = TemporaryFile()
    if file.fileno() > 2:
        return file
    with file:
        return open(duplicate(file.fileno()), "w+b")
