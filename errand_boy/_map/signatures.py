"""The parameters of map and of Executor, and map's signature, for type checkers only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol, TypeVar, overload

from typing_extensions import Unpack

from errand_boy._map.command import Command
from errand_boy._map.policy import Retries
from errand_boy._types.parameters import CommandParameters, File, Input

TextT_co = TypeVar("TextT_co", covariant=True)
BytesT_co = TypeVar("BytesT_co", covariant=True)
EitherT_co = TypeVar("EitherT_co", covariant=True)


class JobParameters(CommandParameters, total=False):
    """Parameters of one command of a map."""

    input: Input
    retries: int | Retries | None
    shell: bool


class SubmitParameters(JobParameters, total=False):
    """Parameters of Executor.submit, without `check`."""

    timeout: float | None


class ExecutorParameters(JobParameters, total=False):
    """Parameters of an Executor that do not decide between str and bytes."""

    capture_output: bool
    stdout: File
    stderr: File
    max_output: int | None
    spool: bool
    timeout: float | str | None
    on: Any  # a Celery app or a Cluster


class MapParameters(ExecutorParameters, total=False):
    """Parameters of map that do not decide between str and bytes."""

    check: bool
    halt: str
    max_workers: int | None
    ordered: bool
    progress: bool


class Map(Protocol[TextT_co, BytesT_co, EitherT_co]):
    """map, which returns iterators of Result[str], Result[bytes] or either."""

    @overload
    def __call__(
        self,
        commands: Iterable[Command | None],
        *,
        text: Literal[True],
        encoding: str | None = None,
        errors: str | None = None,
        **options: Unpack[MapParameters],
    ) -> TextT_co: ...

    @overload
    def __call__(
        self,
        commands: Iterable[Command | None],
        *,
        encoding: str,
        text: bool | None = None,
        errors: str | None = None,
        **options: Unpack[MapParameters],
    ) -> TextT_co: ...

    @overload
    def __call__(
        self,
        commands: Iterable[Command | None],
        *,
        errors: str,
        text: bool | None = None,
        encoding: str | None = None,
        **options: Unpack[MapParameters],
    ) -> TextT_co: ...

    @overload
    def __call__(
        self,
        commands: Iterable[Command | None],
        *,
        text: Literal[False] | None = None,
        encoding: None = None,
        errors: None = None,
        **options: Unpack[MapParameters],
    ) -> BytesT_co: ...

    @overload
    def __call__(
        self,
        commands: Iterable[Command | None],
        *,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        **options: Unpack[MapParameters],
    ) -> EitherT_co: ...
