"""The daemon's options."""

from __future__ import annotations

from collections.abc import Sequence


class Options:
    """The daemon's options. Times are in seconds; 0 means no limit; uids and gids are numbers."""

    def __init__(
        self,
        *,
        socket: str,
        pool_size: int = 1,
        max_accepts: int = 0,
        max_child_tasks: int = 0,
        allow_uid: Sequence[int] = (),
        allow_gid: Sequence[int] = (),
        max_users: int = 256,
        idle: float = 60.0,
        chdir: str | None = None,
        max_processes: int = 0,
        max_processes_per_user: int = 0,
        limits: str | None = None,
        grace: float = 30.0,
        patience: float = 30.0,
        helper_patience: float = 30.0,
        log_level: str = "info",
        log_format: str = "text",
        log_commands: str | None = None,
        no_new_privs: bool = False,
        pid_file: str | None = None,
        job_state: str | None = None,
        job_runtime: str | None = None,
        version: str = "",
    ) -> None:
        self.socket = socket
        self.pool_size = pool_size
        self.max_accepts = max_accepts
        self.max_child_tasks = max_child_tasks
        self.allow_uid = frozenset(allow_uid)
        self.allow_gid = frozenset(allow_gid)
        self.max_users = max_users
        self.idle = idle
        self.chdir = chdir
        self.max_processes = max_processes
        self.max_processes_per_user = max_processes_per_user
        self.limits = limits
        self.grace = grace
        self.patience = patience
        self.helper_patience = helper_patience
        self.log_level = log_level
        self.log_format = log_format
        self.log_commands = log_commands
        self.no_new_privs = no_new_privs
        self.pid_file = pid_file
        self.job_state = job_state
        self.job_runtime = job_runtime
        self.version = version
