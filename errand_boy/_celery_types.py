"""Celery's task `run_command`, for type checkers only: Celery has no types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from typing_extensions import Unpack

from errand_boy._options import Options

OutcomeT_co = TypeVar("OutcomeT_co", covariant=True)


class TaskParameters(Options, total=False):
    """The parameters of run_command that are given by name."""

    shell: bool
    input: str | None
    cwd: str | None
    env: Mapping[str, str] | None
    timeout: float | None
    grace: float
    max_output: int
    output_dir: str | None
    encoding: str
    errors: str
    check: bool
    retries: int
    retry_delay: float


class Pending(Protocol[OutcomeT_co]):
    """The celery.result.AsyncResult of an Outcome."""

    id: str

    @property
    def state(self) -> str: ...
    def get(self, timeout: float | None = None, **options: Any) -> OutcomeT_co: ...
    def ready(self) -> bool: ...
    def successful(self) -> bool: ...
    def failed(self) -> bool: ...
    def revoke(self, **options: Any) -> None: ...
    def forget(self) -> None: ...
    def __getattr__(self, name: str) -> Any: ...


class Task(Protocol[OutcomeT_co]):
    """The task: a function here, and a message to a worker."""

    name: str

    def __call__(
        self, args: Sequence[str] | str, **options: Unpack[TaskParameters]
    ) -> OutcomeT_co: ...
    def delay(
        self, args: Sequence[str] | str, **options: Unpack[TaskParameters]
    ) -> Pending[OutcomeT_co]: ...
    def apply_async(
        self,
        args: tuple[Sequence[str] | str],
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Pending[OutcomeT_co]: ...
    def s(self, args: Sequence[str] | str, **options: Unpack[TaskParameters]) -> Any: ...
    def si(self, args: Sequence[str] | str, **options: Unpack[TaskParameters]) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...
