"""The state of a job as the daemon reported it, its result, and the choice of its output."""

from __future__ import annotations

import os
import subprocess

from errand_boy._jobs import follow
from errand_boy._jobs.follow import CaughtUp, Follower, Missed, Output, Over
from errand_boy._jobs.steps import Course
from errand_boy._options.limits import CAUSES
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any

    from errand_boy._jobs.steps import Client, Entry


class JobResult(subprocess.CompletedProcess[None]):
    """The end of a job: a subprocess.CompletedProcess without output, with these attributes.

    - `cause`: "exit", "signal", or the limit that it exceeded.
    - `duration`: in seconds.
    - `rusage`: a resource.struct_rusage.
    - `peak_memory`: in bytes.
    - `bytes`: how many bytes it has written to standard output and to standard error.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry["argv"], os.waitstatus_to_exitcode(entry["status"]))
        self._entry = entry

    @property
    def cause(self) -> str:
        """Why the job ended: "exit", "signal", or a limit."""
        by_limit = CAUSES.get(self._entry.get("cause", 0))
        return by_limit or ("exit" if self.returncode >= 0 else "signal")

    @property
    def duration(self) -> float:
        """How long the job took, in seconds."""
        return float(self._entry.get("duration", 0.0))

    @property
    def rusage(self) -> resource.struct_rusage:
        """The resources that the job used."""
        tree = self._entry.get("tree", ())
        return frames.rusage(self._entry["usage"], (0, *tree) if tree else ())

    @property
    def peak_memory(self) -> int:
        """The peak memory of the job, in bytes."""
        tree = self._entry.get("tree", ())
        return int(tree[2]) if tree else self.rusage.ru_maxrss * 1024

    @property
    def bytes(self) -> tuple[int, int]:
        """How many bytes it wrote to standard output and to standard error."""
        first, second = self._entry.get("bytes", (0, 0))
        return first, second


class Known:
    """The state of a job, as last reported by the daemon. `status` updates it.

    - `id`: its number among the jobs of user `uid`; `name`: its name.
    - `args`: its command, which may be cut short.
    - `pid`: the command's, or None before it runs; `started`: seconds since 1970.
    - `state`: "starting", "running", "ended", or "lost" if its keeper was killed or the machine
      went down.
    - `returncode`: as in Popen, or None while it is not known.
    """

    def __init__(self, client: Client, entry: Entry) -> None:
        self._client = client
        self._entry = entry
        self.id: int = entry["id"]
        self.uid: int = entry["uid"]
        self.name: str = entry["name"]

    def __repr__(self) -> str:
        return f"<errand_boy job {self.id} {self.name} {self.state}>"

    @property
    def args(self) -> list[str]:
        """Its command."""
        return list(self._entry["argv"])

    @property
    def pid(self) -> int | None:
        """The command's."""
        pid: int | None = self._entry.get("pid")
        return pid

    @property
    def started(self) -> float:
        """When."""
        return float(self._entry["started"])

    @property
    def state(self) -> str:
        """The state: "starting", "running", "ended" or "lost"."""
        return str(self._entry["state"])

    @property
    def returncode(self) -> int | None:
        """The return code as in Popen, or None while it is not known."""
        status = self._entry.get("status")
        return None if status is None else os.waitstatus_to_exitcode(status)

    @property
    def cause(self) -> str | None:
        """Why the job ended, as in JobResult, or why it is lost: "killed" or "reboot"."""
        if self.state == "lost":
            return str(self._entry.get("why", "killed"))
        return None if self.returncode is None else JobResult(self._entry).cause

    @property
    def ended(self) -> float | None:
        """When the job ended, in seconds since 1970, or None."""
        ended: float | None = self._entry.get("ended")
        return ended

    @property
    def duration(self) -> float | None:
        """How long it has run, in seconds, or None if that is not known."""
        duration: float | None = self._entry.get("duration")
        return duration

    @property
    def is_left(self) -> bool:
        """Whether its command still runs, although the job is lost."""
        return "left" in self._entry

    @property
    def has_terminal(self) -> bool:
        """Whether its standard streams are a terminal."""
        return bool(self._entry.get("pty"))

    def _course(self, *, quiet: bool = False, goes_on: bool = True) -> Course:
        follower = Follower(quiet=quiet, goes_on=goes_on)
        return Course(self._client, self.id, self.uid, follower)


class Chooser:
    """Chooses the events that `logs` yields."""

    def __init__(self, since: float | None, tail: int | None) -> None:
        self._since = since
        self._tail = tail
        self._kept: list[Any] = []  # until all earlier output is known

    def take(self, event: Any) -> list[Any]:
        """Return the events to yield now."""
        if isinstance(event, (CaughtUp, Over)):
            return self.rest()
        if isinstance(event, Output):
            if self._since is not None and event.time < self._since:
                return []
            self._since = None  # all further output came later, even if the clock was set back
        elif not isinstance(event, Missed):
            return []
        if self._tail is None:
            return [event]
        self._kept.append(event)
        return []

    def rest(self) -> list[Any]:
        """Return the events that were held back."""
        tail, self._tail = self._tail, None
        kept, self._kept = self._kept, []
        return [] if tail is None else follow.last_lines(kept, tail)
