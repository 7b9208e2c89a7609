"""The daemon's process: sets it up before the server runs, and cleans up after it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from types import ModuleType

from errand_boy._daemon.limits import LimitsError
from errand_boy._daemon.listen import Listener, ListenError, Supervisor, listen
from errand_boy._daemon.log import Log
from errand_boy._daemon.options import Options
from errand_boy._daemon.server import SIGNALS, Server
from errand_boy._daemon.upgrade import Handover, introduce, read
from errand_boy._descriptors import open_descriptors
from errand_boy._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_NICENESS = -10


def check(values: dict[str, Any]) -> int:
    """Describe this program to a server that is about to upgrade to it; return the exit status."""
    Options(**values)
    print(introduce())
    return 0


def serve(values: dict[str, Any], state: int | None) -> int:
    """Serve with `values` as options until told to stop; return the exit status.

    `state` is the descriptor with the state of a predecessor. See docs/deployment.md for the
    meaning of the status.
    """
    options = Options(**values)
    if state is not None:
        return _go_on(options, read(state))
    supervisor = Supervisor(os.environ.pop("NOTIFY_SOCKET", ""))  # commands do not inherit it
    log = Log(options.log_level, options.log_format)
    try:
        mode = 0o666 if options.allow_uid or options.allow_gid else 0o600
        listener = listen(options.socket, mode)
    except (ListenError, OSError) as error:
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    try:
        _close_on_exec()
        files = _raise_file_limit()
        if options.no_new_privs:
            _prctl(_PR_SET_NO_NEW_PRIVS)
        if options.allow_uid or options.allow_gid:
            _raise_priority()
        # This process becomes the parent of the processes that a killed helper leaves.
        _prctl(_PR_SET_CHILD_SUBREAPER)
        server = Server(options, listener, log, files, lambda: supervisor.notify("STOPPING=1"))
        _set_title(f"errand-boy: server on {listener.path}")
        server.catch_signals()
        server.start()
        if options.pid_file is not None:
            with open(options.pid_file, "w") as file:
                file.write(f"{os.getpid()}\n")
    except (LimitsError, OSError) as error:
        listener.close()
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    log.info("listening", path=listener.path, pid=os.getpid(), helpers=options.pool_size)
    if not os.path.exists("/proc/self"):
        log.warning("no /proc: commands that a killed helper leaves are not ended")
    supervisor.notify("READY=1")
    return _run(server, supervisor, files)


def _go_on(options: Options, state: dict[str, Any]) -> int:
    """Serve in place of the predecessor that has left `state`."""
    supervisor = Supervisor(state["supervisor"])
    log = Log(options.log_level, options.log_format)
    _close_on_exec()
    listener = Listener.of_state(state["listener"])
    files = state["open_files"]
    server = Server(options, listener, log, files, lambda: supervisor.notify("STOPPING=1"))
    _set_title(f"errand-boy: server on {listener.path}")
    server.catch_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, state["signal_mask"])
    server.restore(state["server"])
    log.info("upgraded", version=options.version, pid=os.getpid())
    supervisor.notify("READY=1")
    return _run(server, supervisor, files)


def _run(server: Server, supervisor: Supervisor, open_files: int) -> int:
    options, log = server.options, server.log
    while (status := server.run()) is None:
        _replace(server, supervisor, open_files)
    if options.pid_file is not None:
        with contextlib.suppress(OSError):
            os.unlink(options.pid_file)
    log.info("stopped", status=status)
    return status


def _replace(server: Server, supervisor: Supervisor, open_files: int) -> None:
    """Execute the server's successor in its place; return if that fails."""
    # From here on, signals wait until the successor has installed its handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handover = Handover()
    try:
        server.take_signals()
        if not server.may_be_replaced():
            return
        assert server.successor is not None
        state = {
            "server": server.state(handover.keep),
            "listener": server.listener.state(handover.keep),
            "supervisor": supervisor.address,
            "open_files": open_files,
            "signal_mask": list(mask),
        }
        now = time.monotonic_ns() // 1000
        supervisor.notify(f"RELOADING=1\nMONOTONIC_USEC={now}")
        handover.execute(server.successor.version, state)
    except Exception as error:
        handover.undo()
        server.refuse_upgrade(repr(error))
        server.keep_place()
        supervisor.notify("READY=1")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _close_on_exec() -> None:
    # The descriptors that we inherited are not for the helpers, which may live longer.
    for fd in open_descriptors():
        if fd > 2:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.set_inheritable(fd, False)


def _prctl(option: int) -> None:
    """Set an option to 1. This can't fail on supported kernels."""
    one, zero = ffi.cast("unsigned long", 1), ffi.cast("unsigned long", 0)
    lib.prctl(option, one, zero, zero, zero)


def _raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return the old one."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return files


def _raise_priority() -> None:
    """Give this process priority over its clients, if it may and its niceness is 0.

    It must serve clients while others keep the CPUs busy. Helpers and commands get niceness 0.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) != 0 or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    if os.getsid(0) == os.getpid():
        # The kernel may share the CPUs between sessions (autogroups of sched(7)).
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
            file.write(str(_NICENESS))


def _set_title(title: str) -> None:
    # Only its extension module: the package around it imports logging and more, which costs 1 MB.
    package = ModuleType("setproctitle")
    package.__path__ = [os.path.join(path, "setproctitle") for path in sys.path]
    sys.modules["setproctitle"] = package
    try:
        from setproctitle._setproctitle import setproctitle  # noqa: PLC0415
    except ImportError:  # it is optional
        return
    setproctitle(title)
