"""gevent.subprocess with children that errand-boy starts, without blocking the hub.

``Popen``, ``run``, ``call``, ``check_call``, ``check_output``, ``getoutput`` and
``getstatusoutput`` are those of gevent.subprocess, except for the step that starts the child.
"""

from __future__ import annotations

import contextlib
import os
import posix
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent.os
from gevent import select, subprocess
from gevent.os import fork_and_watch, nb_read
from gevent.socket import wait_read, wait_write
from gevent.subprocess import (
    DEVNULL,
    PIPE,
    STDOUT,
    CalledProcessError,
    CompletedProcess,
    SubprocessError,
    TimeoutExpired,
    list2cmdline,
)

from errand_boy import _native
from errand_boy._descriptors import duplicate
from errand_boy._process import child as _child, driver as _driver, start as _start, stop as _stop
from errand_boy._process.child import HelperChild, helper_child
from errand_boy._process.functions import parameters, rebind
from errand_boy._process.popen import WithEnds, WithTerminal, WithVerdict

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "CalledProcessError",
    "CompletedProcess",
    "Popen",
    "SubprocessError",
    "TimeoutExpired",
    "call",
    "check_call",
    "check_output",
    "getoutput",
    "getstatusoutput",
    "list2cmdline",
    "run",
]

_known_children: dict[int, Any] = getattr(gevent.os, "_watched_children", {})
_UNKNOWN = 255 << 8  # as in asyncio, for a child that somebody else has waited for
_PATIENCE = 1.0  # seconds in which the loop reports a child that it has reaped
_KEPT = 60.0  # seconds; gevent itself keeps statuses as long


_Base: Any = subprocess.Popen
_STANDARD = parameters(_Base.__init__)


class _Popen(WithEnds, WithTerminal, WithVerdict, _Base):  # type: ignore[misc]  # gevent has no types
    """gevent.subprocess.Popen whose child is started without a fork, as in errand_boy.Popen.

    All parameters, methods and exceptions are gevent's, and other greenlets run while a program is
    slow to execute. On Linux the child is a child of this process, and gevent's own watchers wait
    for it. Unlike gevent's, this class may be used in threads whose hub is not the main one.
    `preexec_fn` is as in errand_boy.Popen.
    """

    _more = _start.NOTHING
    _select = select

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        construct = super().__init__
        if _STANDARD.issuperset(kwargs) or not _start.take_options(
            self, construct, _STANDARD, args, kwargs
        ):
            construct(*args, **kwargs)

    def _execute_child(self, *args: Any) -> None:
        self._begun = time.monotonic()
        execute_child(_Base._execute_child, self, *args)

    def _exchange_output(self, input: Any, timeout: float | None) -> tuple[Any, Any]:
        # gevent's own returns no output before the end. With a time-out, we need the output so far.
        if self._ends is None or self.terminal is not None:
            return super()._exchange_output(input, timeout)
        return _exchange(self, input, timeout)

    def _on_child(self, watcher: Any) -> None:
        _child.note_end(self)  # before the waiters wake
        super()._on_child(watcher)

    def _internal_poll(self) -> int | None:
        return internal_poll(_Base._internal_poll, self)

    def wait(self, *args: Any, **kwargs: Any) -> int | None:
        """Wait for the process to end; see gevent.subprocess.Popen.wait."""
        return wait(_Base.wait, self, *args, **kwargs)

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process; do nothing if it is known to have ended."""
        if self.returncode is None:
            self._sent = sig
        send_signal(_Base.send_signal, self, sig)


if TYPE_CHECKING:  # the functions are called in the same way
    from errand_boy._process.popen import Popen
    from errand_boy._types.signatures import Call, CheckOutput, Run

    call: Call
    check_call: Call
    check_output: CheckOutput
    getoutput: Callable[..., str]
    getstatusoutput: Callable[..., tuple[int, str]]
    run: Run
else:
    Popen = _Popen
    Popen.__name__ = Popen.__qualname__ = "Popen"
    globals().update(rebind(Popen, subprocess))


# -- for a gevent.subprocess.Popen of any class; `original` is the method of that class --


def execute_child(original: Callable[..., None], process: Any, *args: Any) -> None:
    """Start a command; `args` are those of gevent's _execute_child."""
    before, after, process_group = args[:7], args[8:-1], args[-1]  # without universal_newlines
    given = (*before, *after, -1 if process_group is None else process_group)
    is_ours = True

    def execute_original(process: Any, *given: Any) -> None:
        nonlocal is_ours
        is_ours = False
        original(process, *args)

    _unblock(given)
    with _collecting(process._loop):
        try:
            more = getattr(process, "_more", _start.NOTHING)
            _start.execute(process, given, execute_original, driver=_HUB, more=more)
        finally:
            if is_ours:
                _watch(process)


def start(
    original: Callable[..., None], process: Any, given: tuple[Any, ...], more: dict[str, Any]
) -> None:
    """Start a program without a Popen, for gevent's os.waitpid; see _forkpty.start."""
    process._loop = gevent.get_hub().loop
    with _collecting(process._loop):
        try:
            _start.execute(process, given, original, driver=_HUB, more=more)
        finally:
            _watch(process, ref=False)


def internal_poll(original: Callable[..., int | None], process: Any) -> int | None:
    """Return the return code, or None; if a helper owns the child, check first."""
    if helper_child(process) is not None and process.returncode is None:
        gevent.sleep(0)
    return _forget(process, original(process))


def _exchange(process: Any, input: Any, timeout: float | None) -> tuple[Any, Any]:
    """Do what `communicate` does. As in subprocess, `_fileobj2output` has the output so far."""
    chunks: dict[Any, list[bytes]] | None = vars(process).get("_fileobj2output")
    if chunks is None:
        chunks = {stream: [] for stream in (process.stdout, process.stderr) if stream is not None}
        process._fileobj2output = chunks
        process._moving = [gevent.spawn(_read, process, stream) for stream in chunks]
        if process.stdin is not None:
            process._moving.append(gevent.spawn(_write, process.stdin, input))
    end = None if timeout is None else time.monotonic() + timeout
    try:
        gevent.joinall(process._moving, timeout=timeout)
        if not all(moving.ready() for moving in process._moving):
            raise TimeoutExpired(process.args, timeout)
        process.wait(timeout=None if end is None else max(0.0, end - time.monotonic()))
    except TimeoutExpired:
        output = (b"".join(chunks.get(stream, ())) for stream in (process.stdout, process.stderr))
        raise TimeoutExpired(process.args, timeout, *output) from None
    return _stop.close(process)


def _read(process: Any, stream: Any) -> None:
    fd, chunks = stream.fileno(), process._fileobj2output
    with contextlib.suppress(OSError, ValueError):  # somebody has closed it
        while data := nb_read(fd, 1 << 16):
            chunks[stream].append(data)
            if process._limited is not None:
                outputs = chunks.get(process.stdout), chunks.get(process.stderr)
                process._limited.count(process, *outputs)


def _write(stream: Any, input: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        if input:
            stream.write(input)
        stream.close()


def wait(
    original: Callable[..., int | None], process: Any, *args: Any, **kwargs: Any
) -> int | None:
    """Do what the class's own wait does."""
    return _forget(process, original(process, *args, **kwargs))


def _forget(process: Any, returncode: int | None) -> int | None:
    # gevent keeps each status for a minute, for its os.waitpid, and goes through all of them at
    # each child's end. The kernel would not keep a status either after somebody has waited.
    if returncode is not None and isinstance(_known_children.get(process.pid), tuple):
        del _known_children[process.pid]
    return returncode


def send_signal(original: Callable[..., None], process: Any, sig: int) -> None:
    """Send a signal, through the helper if it owns the child."""
    child = helper_child(process)
    if child is None:
        original(process, sig)
    elif process.returncode is None:
        child.send_signal(process.pid, sig)


def _wait(fd: int, writing: bool) -> None:
    # Wait for a copy. A forked process closes its connections, but it also has copies of the
    # greenlets that wait for them, and libuv aborts if it has to watch a closed descriptor.
    copy = duplicate(fd)
    try:
        (wait_write if writing else wait_read)(copy)
    finally:
        posix.close(copy)


def _conclude(process: Any, steps: Any) -> None:
    # A Timeout in one greenlet must not make the others wait.
    gevent.spawn(_conclude_now, process, steps)


def _conclude_now(process: Any, steps: Any) -> None:
    with _collecting(process._loop):
        _run(steps)
        _watch(process)


def _run(steps: Any) -> None:
    _driver.run(steps, gevent.sleep, _wait)


_HUB = _driver.Driver(_run, _conclude)


def _watch(process: Any, *, ref: bool = True) -> None:
    """Have gevent notice the end of a child, if there is one."""
    if not vars(process).get("_child_created"):
        return
    child = helper_child(process)
    if child is not None:
        gevent.spawn(_attend, process, child)
        return
    loop, pid = process._loop, process.pid
    if not loop.default:
        loop = _Elsewhere(loop)
    elif _is_reaped(pid):
        loop = _Reaped(loop)
    # Nothing has forked, but this is how gevent learns of a child.
    fork_and_watch(process._on_child, loop, ref, lambda: pid)


def _attend(process: Any, child: HelperChild) -> None:
    """Wait for a child that the helper owns."""
    while (connection := child.connection) is not None:
        try:
            child.wait(0.0)
        except TimeoutError:
            _wait(connection.sock.fileno(), False)
        except OSError:  # the helper has ended: its child counts as killed
            break
    process._handle_exitstatus(child.status)
    process.result.set(process.returncode)


def _unblock(given: tuple[Any, ...]) -> None:
    # gevent's own children get blocking descriptors, too. They share the flag with this process.
    for number, fd in enumerate((given[10], given[13], given[15])):
        with contextlib.suppress(OSError):
            os.set_blocking(number if fd == -1 else fd, True)


# -- children that are reaped before their pids are known --

# The default loop reaps every child of the process. A command may end before its starter has read
# its pid. Then its status is kept here.

_statuses: dict[int, tuple[int, float]] = {}  # by pid, with the time
_expected: dict[int, Callable[[int], None]] = {}
_interested: set[object] = set()  # starts in progress, children that other threads await
_collector: _Collector | None = None  # for the default loop


@contextmanager
def _collecting(loop: Any) -> Iterator[None]:
    global _collector
    if loop.default and (_collector is None or _collector.loop is not loop):
        _collector = _Collector(loop)
    start = object()
    _interested.add(start)
    try:
        yield
    finally:
        _lose_interest(start)


def _lose_interest(who: object) -> None:
    _interested.discard(who)
    if not _interested:
        _statuses.clear()


def _collect(pid: int, status: int) -> None:
    expected = _expected.pop(pid, None)
    if expected is not None:
        expected(status)
    elif _interested:
        now = time.monotonic()
        _statuses.pop(pid, None)  # so that the dictionary stays in order of time
        _statuses[pid] = status, now
        # Another thread may clear the dictionary meanwhile, when it loses interest.
        with contextlib.suppress(StopIteration, KeyError, RuntimeError):
            while (oldest := next(iter(_statuses))) != pid and now - _statuses[oldest][1] > _KEPT:
                del _statuses[oldest]


class _Collector:
    """Collects the status of every child that a default loop reaps."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self._watcher = loop.child(0, ref=False)  # installs the loop's SIGCHLD handler
        by_pid = getattr(loop, "_child_watchers", None)
        if by_pid is None:
            self._watcher.start(self._look)
        else:  # libuv calls watchers of any child only once
            loop._child_watchers = _Watchers(list, by_pid)

    def _look(self) -> None:
        _collect(self._watcher.rpid, self._watcher.rstatus)


class _Watchers(defaultdict[int, list[Any]]):
    """The watchers of a libuv loop by pid. For each child the loop looks up those of pid 0, too."""

    def get(self, pid: int, default: Any = None) -> Any:
        found = super().get(pid, default)
        return [_ForAny, *found] if pid == 0 else found


class _ForAny:
    _set_waitpid_status = staticmethod(_collect)


def _is_reaped(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


class _Watcher:
    """Replaces a loop when gevent asks it for a child watcher, and is that watcher."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def child(self, pid: int, ref: bool) -> _Watcher:
        self.pid = self.rpid = pid
        return self

    def start(self, callback: Callable[..., None], *args: Any) -> None:
        self._callback = partial(callback, *args)

    def _end(self, status: int) -> None:
        self.rstatus = status
        self._callback()

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Reaped(_Watcher):
    """The watcher of a child that has been reaped, by the loop or by somebody else."""

    def start(self, callback: Callable[..., None], *args: Any) -> None:
        super().start(callback, *args)
        found = _statuses.pop(self.pid, None)
        if found is not None:
            self._end(found[0])
            return
        # libuv's loop has the status, and will report it in a moment.
        self._timer = self._loop.timer(_PATIENCE)
        _expected[self.pid] = self._end
        self._timer.start(_collect, self.pid, _UNKNOWN)

    def _end(self, status: int) -> None:
        super()._end(status)
        timer = vars(self).pop("_timer", None)
        if timer is not None:
            timer.close()


class _Elsewhere(_Watcher):
    """The watcher of a child of another thread, whose loop has no child watchers."""

    def start(self, callback: Callable[..., None], *args: Any) -> None:
        super().start(callback, *args)
        _interested.add(self)
        gevent.spawn(self._attend)

    def _attend(self) -> None:
        status = None
        try:
            with contextlib.suppress(ProcessLookupError):  # the default loop has reaped it
                fd = _native.pidfd_open(self.pid)
                try:
                    wait_read(fd)
                finally:
                    os.close(fd)
            status = self._status()
        finally:
            _lose_interest(self)
        self._end(status)

    def _status(self) -> int:
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(ChildProcessError):
                return posix.waitpid(self.pid, os.WNOHANG)[1]
            found = _statuses.pop(self.pid, None)
            if found is not None:
                return found[0]
            if time.monotonic() > deadline:
                return _UNKNOWN
            gevent.sleep(0.001)


def _after_fork() -> None:
    _statuses.clear()
    _expected.clear()
    _interested.clear()


os.register_at_fork(after_in_child=_after_fork)
