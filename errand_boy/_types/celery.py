"""Celery's task `run_command`, for type checkers only: Celery has no types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from typing_extensions import Unpack

from errand_boy._options.names import Options

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
    def state(self) -> str:
        """The task's state: "PENDING", "STARTED", "SUCCESS", "FAILURE", "REVOKED" and so on."""

    def get(self, timeout: float | None = None, **options: Any) -> OutcomeT_co:
        """Wait for the Outcome, at most `timeout` seconds. Raises the exception of the task."""

    def ready(self) -> bool:
        """Return whether the task is over."""

    def successful(self) -> bool:
        """Return whether the task is over and has an Outcome, even of a failed command."""

    def failed(self) -> bool:
        """Return whether the task raised an exception."""

    def revoke(self, **options: Any) -> None:
        """Cancel the task; with ``terminate=True``, end its command if it runs."""

    def forget(self) -> None:
        """Remove the Outcome from the result backend."""

    def __getattr__(self, name: str) -> Any: ...


class Task(Protocol[OutcomeT_co]):
    """The task: calling it runs a command here; its methods send it to a worker."""

    name: str

    def __call__(
        self, args: Sequence[str] | str, **options: Unpack[TaskParameters]
    ) -> OutcomeT_co: ...
    def delay(
        self, args: Sequence[str] | str, **options: Unpack[TaskParameters]
    ) -> Pending[OutcomeT_co]:
        """Send the task to a worker."""

    def apply_async(
        self,
        args: tuple[Sequence[str] | str],
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Pending[OutcomeT_co]:
        """Send the task to a worker, with options of Celery such as `queue` or `countdown`."""

    def s(self, args: Sequence[str] | str, **options: Unpack[TaskParameters]) -> Any:
        """Return a signature of the task, for chains and groups."""

    def si(self, args: Sequence[str] | str, **options: Unpack[TaskParameters]) -> Any:
        """Return an immutable signature, which ignores the result of the task before it."""

    def __getattr__(self, name: str) -> Any: ...
