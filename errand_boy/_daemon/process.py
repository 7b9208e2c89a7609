"""The daemon's process: what is set up before the server runs, and undone after."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from types import ModuleType

from errand_boy._daemon.limits import LimitsError
from errand_boy._daemon.listen import ListenError, Supervisor, listen
from errand_boy._daemon.log import Log
from errand_boy._daemon.options import Options
from errand_boy._daemon.server import Server
from errand_boy._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PR_SET_CHILD_SUBREAPER = 36


def serve(values: dict[str, Any]) -> int:
    """Serve with `values` as options until told to stop; return the exit status.

    See docs/deployment.md for what it means.
    """
    options = Options(**values)
    supervisor = Supervisor()
    log = Log(options.log_level, options.log_format)
    try:
        mode = 0o666 if options.allow_uid or options.allow_gid else 0o600
        listener = listen(options.socket, mode)
    except (ListenError, OSError) as error:
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    try:
        _close_on_exec()
        _raise_file_limit()
        # Of what a killed helper leaves, this process becomes the parent.
        lib.prctl(_PR_SET_CHILD_SUBREAPER, ffi.cast("unsigned long", 1))
        server = Server(options, listener, log, lambda: supervisor.notify("STOPPING=1"))
        _set_title(f"errand-boy: server on {listener.path}")
        server.start()
        if options.pid_file is not None:
            with open(options.pid_file, "w") as file:
                file.write(f"{os.getpid()}\n")
    except (LimitsError, OSError) as error:
        listener.close()
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    log.info("listening", path=listener.path, pid=os.getpid(), helpers=options.pool_size)
    supervisor.notify("READY=1")
    status = server.run()
    if options.pid_file is not None:
        with contextlib.suppress(OSError):
            os.unlink(options.pid_file)
    log.info("stopped", status=status)
    return status


def _close_on_exec() -> None:
    # What we were started with is not for the helpers, who may live longer.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the listing's own
                os.set_inheritable(int(name), False)


def _raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _set_title(title: str) -> None:
    # Only its extension: the package around it imports logging and more, which costs 1 MB.
    package = ModuleType("setproctitle")
    package.__path__ = [os.path.join(path, "setproctitle") for path in sys.path]
    sys.modules["setproctitle"] = package
    try:
        from setproctitle._setproctitle import setproctitle  # noqa: PLC0415
    except ImportError:  # it is optional
        return
    setproctitle(title)
