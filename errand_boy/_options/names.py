"""The names and types of the options of commands that subprocess lacks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, TypedDict

    from errand_boy._options.ends import Stop
    from errand_boy.sandbox import Sandbox
    from errand_boy.terminal import Pty

    class HasFileno(Protocol):
        """An object with a descriptor, such as a file or a socket."""

        def fileno(self) -> int:
            """Return the descriptor."""

    Rlimit = int | tuple[int, int]
else:

    class TypedDict(dict):  # typing takes milliseconds to import
        def __init_subclass__(cls, total: bool = True) -> None: ...


class Limits(TypedDict, total=False):
    """The limits of a command and all that it starts; the documentation explains each of them.

    `wall` and `cpu` are in seconds, or a text such as "500ms" or "2m"; `memory`, `output` and
    `file_size` in bytes, or a text such as "1.5G".
    """

    wall: float | str
    cpu: float | str
    memory: float | str
    output: float | str
    processes: int
    file_size: float | str
    open_files: int


class Options(TypedDict, total=False):
    """The options of commands that subprocess lacks. The documentation explains each of them."""

    capabilities: Collection[str] | None
    cgroup: str | os.PathLike[str] | int | HasFileno | None
    controlling_terminal: int | HasFileno | None
    cpu_affinity: Collection[int] | None
    dies_with_caller: bool
    drain: float | None
    foreground: bool
    ionice: str | tuple[str, int] | None
    limits: Limits | None
    limits_by: str | None
    namespaces: Collection[str] | None
    nice: int | None
    no_new_privs: bool
    oom_score_adj: int | None
    pty: bool | tuple[int, int] | Pty | None
    rlimits: Mapping[str, Rlimit] | None
    root: str | bytes | os.PathLike[Any] | None
    sandbox: Sandbox | Mapping[str, Any] | None
    scheduler: str | tuple[str, int] | None
    signals_blocked: Collection[int] | None
    signals_default: Collection[int] | None
    signals_ignored: Collection[int] | None
    stop: Stop | None
    timer_slack: int | None
    tree: str | None
