"""The parameters of errand_boy's functions, as types for type checkers only."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import IO, Any, TypeAlias

from errand_boy._options.names import Options

StrOrPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Args: TypeAlias = StrOrPath | Sequence[StrOrPath]
File: TypeAlias = int | IO[Any] | None
Bytes: TypeAlias = bytes | bytearray | memoryview
Input: TypeAlias = str | Bytes | None


class CommandParameters(Options, total=False):
    """Parameters of every command."""

    cwd: StrOrPath | None
    env: Mapping[str, StrOrPath] | Mapping[bytes, StrOrPath] | None
    restore_signals: bool
    start_new_session: bool
    user: str | int | None
    group: str | int | None
    extra_groups: Iterable[str | int] | None
    umask: int
    process_group: int | None


class ProcessParameters(CommandParameters, total=False):
    """Parameters of every command with a process object."""

    preexec_fn: Callable[[], object] | None
    close_fds: bool
    startupinfo: Any
    creationflags: int
    pass_fds: Collection[int]
    pipesize: int
    # For a daemon's commands. With ERRAND_BOY_SOCKET, the module's own functions use a daemon.
    kill_on_client_exit: bool
    kill_grace: float


class ExecParameters(ProcessParameters, total=False):
    """Parameters of asyncio's functions that start a process."""

    executable: StrOrPath | None


class Parameters(ProcessParameters, total=False):
    """The keyword-only parameters of Popen, and the options."""

    shell: bool


class CallParameters(Parameters, total=False):
    """Parameters of call and check_call."""

    timeout: float | None
    text: bool | None
    encoding: str | None
    errors: str | None
    universal_newlines: bool | None


class RunParameters(Parameters, total=False):
    """Parameters of run."""

    capture_output: bool
    check: bool
    timeout: float | None


class OutputParameters(Parameters, total=False):
    """Parameters of check_output."""

    timeout: float | None


class AsyncRunParameters(ExecParameters, total=False):
    """Parameters of asyncio's run."""

    shell: bool
    capture_output: bool
    check: bool
    timeout: float | None
    limit: int


class StartParameters(CommandParameters, total=False):
    """Parameters of Client.start."""

    executable: StrOrPath | None
    log: StrOrPath | None
    log_count: int | None
    log_size: int | None
    notify: str | Sequence[StrOrPath] | None
    ring: int | None
    shell: bool
    stderr: int | None
    stdin: File
