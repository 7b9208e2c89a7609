"""Signals to a job: one, or the steps that end it; generators as in `steps`."""

from __future__ import annotations

import contextlib
import signal
import time

from errand_boy import _orphan
from errand_boy._jobs import follow
from errand_boy._jobs.follow import Follower
from errand_boy._jobs.steps import (
    LIVE,
    Course,
    Wait,
    entry,
    known,
    last_entry,
    send,
    wait_until,
)
from errand_boy._native import lib
from errand_boy._options.ends import Ends

TYPE_CHECKING = False
if TYPE_CHECKING:
    from errand_boy._jobs.steps import Client, Entry, Steps
    from errand_boy._options.ends import Stop

USUAL_STOP = ((signal.SIGTERM, 10.0), signal.SIGKILL)
# An interactive shell ignores SIGTERM, but ends when its terminal hangs up.
_TERMINAL_STOP = ((signal.SIGTERM, 1.0), (signal.SIGHUP, 9.0), signal.SIGKILL)


def target(found: Entry) -> tuple[int, int]:
    """Return the pid for signals to a job by its `tree`, and the flags to add to a signal."""
    whom = found.get("whom", "")
    if whom == "all":
        return lib.EB_WHOLE_TREE, 0
    if whom == "group":
        return -int(found["pid"]), lib.EB_ENDS_GROUP
    return 0, 0


def send_signal(client: Client, job: int, uid: int, number: int) -> Steps[None]:
    """Send a signal to a job's command; do nothing if it is over. Raises ValueError."""
    if not 0 <= number < signal.NSIG:
        raise ValueError(f"{number!r} is not a signal")
    # The keeper answers FOLLOW when it has read the signal.
    follower = Follower(quiet=True, goes_on=False, before=follow.signal(0, number))
    for event in Course(client, job, uid, follower).events():
        if isinstance(event, Wait):
            yield event


def stop(client: Client, job: int, uid: int, given: Stop | None, tree: str | None) -> Steps[Entry]:
    """End a job by its own `stop` and `tree`, or by those given; return its last entry.

    Raises ValueError, TypeError and JobLostError.
    """
    found = yield from entry(client, job, uid)
    if tree is not None:
        found["whom"] = tree
    if given is None:
        given = [number if s is None else (number, s) for number, s in found.get("stop", ())]
    usual = _TERMINAL_STOP if found.get("pty") else USUAL_STOP
    ends = Ends(given or usual, found.get("whom") or "process")
    if found["state"] in LIVE:
        yield from _stop(Course(client, job, uid, Follower(quiet=True)), found, ends)
        found = yield from last_entry(client, found)
    elif "left" in found:
        yield from _stop_left(found, ends)
        found = yield from entry(client, job, uid)
    return known(found)


def _stop_left(found: Entry, ends: Ends) -> Steps[None]:
    """End a command that has lost its keeper, and its process group. Raises PermissionError."""
    if found["left"] != _orphan.namespace():
        return  # there, the number is another process's
    tree = "process" if ends.tree == "process" else "group"
    try:
        command = _orphan.Left(found, group=tree == "group")
    except ProcessLookupError:
        return
    try:
        course = Ends(ends.steps, tree).course(command.send)
        with contextlib.suppress(StopIteration):
            seconds = next(course)
            while True:
                yield Wait(command.pidfd, seconds=seconds)
                seconds = course.send(command.has_ended())
    finally:
        command.close()


def _stop(course: Course, found: Entry, ends: Ends) -> Steps[None]:
    pid, flags = target(found)
    unsent: list[bytes] = []
    steps = ends.course(lambda number: unsent.append(follow.signal(pid, number | flags)))
    deadline: float | None = None
    begun = False
    try:
        for event in course.events():
            if not isinstance(event, Wait):
                continue
            if course.sock is not None and course.follower.is_served and not event.writing:
                late = begun and deadline is not None and time.monotonic() >= deadline
                if not begun or late:
                    seconds = steps.send(False) if begun else next(steps)
                    begun = True
                    deadline = None if seconds is None else time.monotonic() + seconds
                    data, unsent[:] = b"".join(unsent), []
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        yield from send(course.sock, data)
            yield from wait_until(event, deadline)
    finally:
        course.close()
