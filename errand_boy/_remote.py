"""The daemon's Popen: the child belongs to the helper at the other end of a connection."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from errand_boy import _popen, _request, _wire
from errand_boy._connection import Connection
from errand_boy._frame import SpawnFrame
from errand_boy._native import lib
from errand_boy._request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any, AnyStr

    from errand_boy._client import Client
else:
    AnyStr = str

_LOOK = 0.5  # seconds


class Popen(_popen.Popen[AnyStr]):
    """subprocess.Popen whose child is started, owned and waited for by a helper of the daemon's.

    Parameters, methods and exceptions are those of subprocess.Popen, but:

    - The child leads a process group of its own, unless `start_new_session` or `process_group` says
      something else.
    - With `kill_on_client_exit`, the child's process group gets SIGTERM when this process ends, and
      SIGKILL `kill_grace` seconds later. Else it lives on. An object that is dropped before its
      child has ended keeps its connection, in the standard library's list of such objects.
    - `preexec_fn` may be None, os.setsid or os.setpgrp.
    - `wait`, `poll` and `communicate` raise HelperDiedError when the helper has gone, and with it
      the exit status; in a process forked from the one that started the command, ChildProcessError.
    """

    _client: Client
    _default_group = 0  # its own

    def __init__(
        self,
        *args: Any,
        kill_on_client_exit: bool = False,
        kill_grace: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if kill_on_client_exit:
            milliseconds = _request.milliseconds(kill_grace, "kill_grace")
            self._more_options = _wire.number(lib.EB_TAG_ON_CLOSE, milliseconds)
        super().__init__(*args, **kwargs)

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What the child and those it waited for have used, when it is known to have ended."""
        return _wire.rusage(self._usage) if self._usage else None

    def send_group_signal(self, sig: int) -> None:
        """Send a signal to the child's process group; does nothing if it is known to have ended."""
        if self.poll() is None:
            self._send_signal_frame(-self.pid, sig)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """As subprocess has it, but a helper that dies is noticed, though the pipes stay open."""
        if not (self.stdin or self.stdout or self.stderr):
            return super().communicate(input, timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            rest = _LOOK if deadline is None else deadline - time.monotonic()
            try:
                return super().communicate(input, min(rest, _LOOK))
            except subprocess.TimeoutExpired as expired:
                if timeout is not None and rest <= _LOOK:
                    expired.timeout = timeout
                    raise
            self.poll()
            input = None

    def _execute_function(self, preexec_fn: Callable[[], Any], given: tuple[Any, ...]) -> None:
        raise ValueError(
            "the daemon accepts no preexec_fn but os.setsid and os.setpgrp: use user=, group=, "
            "extra_groups=, umask=, cwd=, start_new_session= or process_group= instead"
        )

    def _way(self, with_ids: bool) -> str:
        return "helper"

    def _acquire(self, request: Request, spawn_frame: SpawnFrame) -> Connection:
        return self._client.acquire(request, spawn_frame)

    def _abandon(self, spawn_frame: SpawnFrame, error: BaseException) -> None:
        # The outcome, which might be long in coming where commands wait for their turn, is of no
        # use: the child is not ours to wait for. One that waits for its turn is withdrawn by this.
        if spawn_frame.connection is not None and self._connection is None:
            spawn_frame.connection.close()
