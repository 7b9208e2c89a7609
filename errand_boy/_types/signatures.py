"""The signatures of errand_boy's functions, for type checkers only.

As in typeshed, `text`, `encoding`, `errors` and `universal_newlines` decide between str and bytes.
Parameters that are rarely given by position are keyword-only here.
"""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Coroutine
from typing import Any, AnyStr, Literal, Protocol, overload

from typing_extensions import Unpack

from errand_boy._types.parameters import (
    Args,
    AsyncRunParameters,
    Bytes,
    CallParameters,
    File,
    Input,
    OutputParameters,
    RunParameters,
    StrOrPath,
)


class Completed(subprocess.CompletedProcess[AnyStr]):
    """The result of run: a subprocess.CompletedProcess that also has the attributes of Verdict."""

    cause: str
    duration: float
    rusage: resource.struct_rusage | None
    peak_memory: int | None
    limits_by: str | None


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
        input: Bytes | None = None,
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
        input: Bytes | None = None,
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


class AsyncRun(Protocol):
    """asyncio's run."""

    @overload
    def __call__(
        self,
        args: Args,
        *,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        text: Literal[True],
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[AsyncRunParameters],
    ) -> Coroutine[Any, Any, Completed[str]]: ...

    @overload
    def __call__(
        self,
        args: Args,
        *,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        encoding: str,
        text: bool | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[AsyncRunParameters],
    ) -> Coroutine[Any, Any, Completed[str]]: ...

    @overload
    def __call__(
        self,
        args: Args,
        *,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        errors: str,
        text: bool | None = None,
        encoding: str | None = None,
        universal_newlines: bool | None = None,
        input: str | None = None,
        **options: Unpack[AsyncRunParameters],
    ) -> Coroutine[Any, Any, Completed[str]]: ...

    @overload
    def __call__(
        self,
        args: Args,
        *,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        universal_newlines: Literal[True],
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        input: str | None = None,
        **options: Unpack[AsyncRunParameters],
    ) -> Coroutine[Any, Any, Completed[str]]: ...

    @overload
    def __call__(
        self,
        args: Args,
        *,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        text: Literal[False] | None = None,
        encoding: None = None,
        errors: None = None,
        universal_newlines: Literal[False] | None = None,
        input: Bytes | None = None,
        **options: Unpack[AsyncRunParameters],
    ) -> Coroutine[Any, Any, Completed[bytes]]: ...

    @overload
    def __call__(
        self,
        args: Args,
        *,
        stdin: File = None,
        stdout: File = None,
        stderr: File = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        input: Input = None,
        **options: Unpack[AsyncRunParameters],
    ) -> Coroutine[Any, Any, Completed[Any]]: ...
