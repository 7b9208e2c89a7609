"""Parameters and results of what errand_boy takes over from subprocess, for type checkers only.

As typeshed has it, `text`, `encoding`, `errors` and `universal_newlines` decide between str and
bytes. What is rarely given by position can be given by name only here.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import IO, Any, AnyStr, Literal, Protocol, TypeAlias, overload

from typing_extensions import Unpack

from errand_boy._options import Options

StrOrPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Args: TypeAlias = StrOrPath | Sequence[StrOrPath]
File: TypeAlias = int | IO[Any] | None
Input: TypeAlias = str | bytes | bytearray | memoryview | None


class Parameters(Options, total=False):
    """Those of subprocess.Popen that can't be given by position here, and the options."""

    preexec_fn: Callable[[], object] | None
    close_fds: bool
    shell: bool
    cwd: StrOrPath | None
    env: Mapping[str, StrOrPath] | Mapping[bytes, StrOrPath] | None
    startupinfo: Any
    creationflags: int
    restore_signals: bool
    start_new_session: bool
    pass_fds: Collection[int]
    user: str | int | None
    group: str | int | None
    extra_groups: Iterable[str | int] | None
    umask: int
    pipesize: int
    process_group: int | None


class CallParameters(Parameters, total=False):
    """Those of call and check_call."""

    timeout: float | None
    text: bool | None
    encoding: str | None
    errors: str | None
    universal_newlines: bool | None


class RunParameters(Parameters, total=False):
    """Those of run that go beyond Popen's."""

    capture_output: bool
    check: bool
    timeout: float | None


class OutputParameters(Parameters, total=False):
    """Those of check_output."""

    timeout: float | None


class Completed(subprocess.CompletedProcess[AnyStr]):
    """What run returns: a subprocess.CompletedProcess that says more, as Popen does."""

    cause: str
    duration: float
    rusage: resource.struct_rusage | None
    peak_memory: int | None


class Run(Protocol):
    """subprocess.run with the options."""

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        *,
        text: Literal[True],
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[RunParameters],
    ) -> Completed[str]: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        *,
        encoding: str,
        text: bool | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[RunParameters],
    ) -> Completed[str]: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        *,
        errors: str,
        text: bool | None = None,
        encoding: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[RunParameters],
    ) -> Completed[str]: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        *,
        universal_newlines: Literal[True],
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        input: str | None = None,
        **options: Unpack[RunParameters],
    ) -> Completed[str]: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        *,
        text: Literal[False] | None = None,
        encoding: None = None,
        errors: None = None,
        universal_newlines: Literal[False] | None = None,
        input: bytes | bytearray | memoryview | None = None,
        **options: Unpack[RunParameters],
    ) -> Completed[bytes]: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        *,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: Input = None,
        **options: Unpack[RunParameters],
    ) -> Completed[Any]: ...


class CheckOutput(Protocol):
    """subprocess.check_output with the options."""

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stderr: File = None,
        *,
        text: Literal[True],
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[OutputParameters],
    ) -> str: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stderr: File = None,
        *,
        encoding: str,
        text: bool | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[OutputParameters],
    ) -> str: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stderr: File = None,
        *,
        errors: str,
        text: bool | None = None,
        encoding: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[OutputParameters],
    ) -> str: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stderr: File = None,
        *,
        universal_newlines: Literal[True],
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        input: str | None = None,
        **options: Unpack[OutputParameters],
    ) -> str: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stderr: File = None,
        *,
        text: Literal[False] | None = None,
        encoding: None = None,
        errors: None = None,
        universal_newlines: Literal[False] | None = None,
        input: bytes | bytearray | memoryview | None = None,
        **options: Unpack[OutputParameters],
    ) -> bytes: ...

    @overload
    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stderr: File = None,
        *,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: Input = None,
        **options: Unpack[OutputParameters],
    ) -> Any: ...


class Call(Protocol):
    """subprocess.call and check_call with the options."""

    def __call__(
        self,
        args: Args,
        bufsize: int = -1,
        executable: StrOrPath | None = None,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        **options: Unpack[CallParameters],
    ) -> int: ...
