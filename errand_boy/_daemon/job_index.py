"""Which jobs there are, and which of them have a keeper.

All else is in their files, which the next server reads, whatever has become of this one. The end of
a keeper is told by its pidfd, and known by the lock that it had; so it does not matter whose pid
that of a journal is.
"""

from __future__ import annotations

import selectors
import time
from contextlib import suppress
from functools import partial

from errand_boy._daemon.job_files import Files, JobsError, Store, boot_id
from errand_boy._daemon.loop import Pidfd
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from errand_boy._daemon.loop import Loop
    from errand_boy._daemon.options import Options
    from errand_boy._daemon.pool import Pool

LIVE = ("running", "starting")  # states

_LOOK, _LONGEST_LOOK = 0.05, 1.0  # seconds between looks whether a keeper lives
_TRY_AGAIN = 5.0  # seconds


def size_of(ring: int) -> int:
    """Return how many bytes the file of rings may have, whatever the command is given then."""
    return int(lib.EB_RING_HEADER) + int(lib.EB_RINGS) * ring


class Job:
    """One that there is."""

    __slots__ = ("is_held", "is_removed", "name", "number", "over_at", "pidfd", "size")

    def __init__(self, number: int, name: str, size: int) -> None:
        self.number = number
        self.name = name
        self.size = size  # bytes that its rings may have
        self.is_held = True  # its keeper is not known to have ended
        self.over_at = 0.0  # of time.time()
        self.is_removed = False  # as soon as that has
        self.pidfd: Pidfd | None = None


class User:
    """The jobs of one user, in the order of their numbers."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.jobs: dict[int, Job] = {}
        self.last = 0  # number

    def running(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.is_held]

    def over(self) -> list[Job]:
        """Return those that are over, the first to end first."""
        jobs = (job for job in self.jobs.values() if not job.is_held)
        return sorted(jobs, key=lambda job: job.over_at)

    def size(self) -> int:
        return sum(job.size for job in self.jobs.values())

    def find(self, wanted: object) -> Job | None:
        """Return the job of that number, or the newest of that name."""
        if isinstance(wanted, str) and wanted.isdecimal():
            wanted = int(wanted)
        if type(wanted) is int:
            job = self.jobs.get(wanted)
        else:
            named = [job for job in self.jobs.values() if job.name == wanted]
            job = named[-1] if named else None
        return None if job is None or job.is_removed else job


class Index:
    """The jobs of all users, in the directories that the server's options name."""

    def __init__(self, loop: Loop, options: Options, pool: Pool) -> None:
        self._loop = loop
        self._options = options
        self._limits = pool.limits
        self._audit = pool.audit
        self.boot = boot_id()
        self._store: Store | None = None
        self._users: dict[int, User] = {}
        self._is_over = False

    def start(self) -> None:
        """Find those that there are, soon."""
        if self._is_over or self._store is not None or self._options.job_state is None:
            return
        try:
            for uid in self.uids():
                self._loop.post(uid, partial(self._load, uid))
        except (JobsError, OSError) as error:
            self._loop.log.debug("jobs are not looked for", reason=str(error))
            self._loop.call_later(_TRY_AGAIN, self.start)

    def close(self) -> None:
        """Leave them to another server."""
        self._is_over = True
        for user in self._users.values():
            for job in user.jobs.values():
                self._unwatch(job)
            user.files.close()
        self._users.clear()
        if self._store is not None:
            self._store.close()
            self._store = None

    def _opened(self, *, create: bool) -> Store:
        if self._store is not None:
            return self._store
        options = self._options
        if self._is_over:
            raise JobsError("the daemon is about to end")
        if options.job_state is None or options.job_runtime is None:
            raise JobsError("this daemon has no place for jobs: --job-state and --job-runtime")
        try:
            self._store = Store(options.job_state, options.job_runtime, create=create)
        except OSError as error:
            if not create and isinstance(error, FileNotFoundError):
                raise
            raise JobsError(
                f"no place for jobs: {error.filename}: {error.strerror}; --job-state and "
                "--job-runtime name others"
            ) from None
        return self._store

    def uids(self) -> list[int]:
        """Return the users who have had jobs. Raises JobsError and OSError."""
        try:
            return self._opened(create=False).uids()
        except FileNotFoundError:
            return []

    def known(self, uid: int) -> User | None:
        """Return a user's jobs if he has had any. Raises JobsError and OSError."""
        if uid not in self._users and uid not in self.uids():
            return None
        return self.user(uid)

    def user(self, uid: int) -> User:
        """Return a user's jobs, whose place is made if need be. Raises JobsError and OSError."""
        return self._users.get(uid) or self._load_now(uid)

    def _load(self, uid: int) -> None:
        with suppress(JobsError):
            self.user(uid)

    def _load_now(self, uid: int) -> User:
        files = self._opened(create=True).of(uid)
        user = User(files)
        user.last = files.last_removed()
        for number in files.numbers():
            user.last = max(user.last, number)
            try:
                entry, is_held = files.read(number), files.is_held(number)
            except OSError as error:
                self._loop.log.warning("a job's journal", id=number, uid=uid, error=error.strerror)
                continue
            size = size_of(entry["ring"])
            job = user.jobs[number] = Job(number, entry["name"], size)
            job.is_removed = "removed" in entry
            if is_held:
                self.watch(user, job, entry.get("keeper"))
            else:
                self._finish(user, job)
        self._users[uid] = user
        self._prune(user)
        return user

    def watch(self, user: User, job: Job, keeper: int | None) -> None:
        """Be told of the end of a job's keeper, whose pid may be another's."""
        try:
            if keeper is None or keeper <= 0:
                raise ProcessLookupError
            job.pidfd = Pidfd(keeper)
        except OSError:
            self._look_later(user, job, _LOOK)
            return
        self._loop.watch(
            job.pidfd,
            selectors.EVENT_READ,
            lambda events: self._on_end(user, job),
            user.files.uid,
        )

    def _unwatch(self, job: Job) -> None:
        if job.pidfd is not None:
            self._loop.watch(job.pidfd, 0)
            job.pidfd.close()
            job.pidfd = None

    def _on_end(self, user: User, job: Job) -> None:
        self._unwatch(job)
        self._look(user, job, _LOOK)

    def _look_later(self, user: User, job: Job, seconds: float) -> None:
        def look() -> None:
            if not self._is_over:
                self._look(user, job, seconds)

        self._loop.call_later(seconds, look)

    def _look(self, user: User, job: Job, seconds: float) -> None:
        """See whether the keeper has ended; a process that it has just made may have the lock."""
        is_held = False  # as if its journal had been removed
        with suppress(OSError):
            is_held = user.files.is_held(job.number)
        if is_held:
            self._look_later(user, job, min(2 * seconds, _LONGEST_LOOK))
            return
        self._finish(user, job)
        self._prune(user)

    def _finish(self, user: User, job: Job) -> None:
        """Take note that a job is over."""
        files, number = user.files, job.number
        job.is_held = False
        files.leave(number)
        try:
            entry = self.entry(user, job)
        except JobsError:  # somebody has removed its journal
            self.remove(user, job)
            return
        now = round(time.time(), 6)
        job.over_at = entry.get("ended", entry.get("seen", now))
        if "seen" not in entry:
            self._tell(files, entry, now)
        if job.is_removed or "pid" not in entry:  # it did not start, and its client has been told
            self.remove(user, job)

    def _tell(self, files: Files, entry: dict[str, Any], now: float) -> None:
        """Note in the journal that the end has been seen, and tell the log and the audit."""
        if "pid" not in entry:
            pass  # its files are about to be removed
        elif entry["state"] == "lost":
            files.note(entry["id"], why=entry["why"], seen=now)
            why = entry["why"]
            self._loop.log.warning("a job is lost", uid=files.uid, id=entry["id"], reason=why)
        else:
            files.note(entry["id"], seen=now)
        if self._audit is not None:
            what = "job ended" if "pid" in entry else "job not started"
            self._audit.write_job(what, files.uid, entry)

    def _prune(self, user: User) -> None:
        """Remove the oldest of those that are over, if there are too many."""
        most = self._limits.of(user.files.uid).kept_jobs
        over = user.over()
        for job in over[: max(0, len(over) - most)] if most else ():
            self.remove(user, job)

    def remove(self, user: User, job: Job) -> None:
        """Remove a job that is over. Raises JobsError."""
        if job.is_held:
            # Its keeper may have followers, though the command has ended.
            if self.entry(user, job)["state"] in LIVE:
                raise JobsError(f"job {job.number} runs: stop it first")
            job.is_removed = True
            user.files.note(job.number, removed=True)
            return
        if job.number == user.last:
            user.files.note_last(job.number)
        user.files.remove(job.number)
        del user.jobs[job.number]

    def entry(self, user: User, job: Job) -> dict[str, Any]:
        """Return what is told of a job."""
        try:
            entry = user.files.read(job.number)
        except OSError as error:
            raise JobsError(f"the journal of job {job.number}: {error.strerror}") from None
        if entry.keys() >= {"ended", "status", "usage"}:
            entry["state"] = "ended"
            entry.pop("why", None)
        elif "failed" in entry:
            entry["state"] = "failed"
        elif job.is_held:
            entry["state"] = "running" if "pid" in entry else "starting"
        else:
            entry["state"] = "lost"
            entry.setdefault("why", self.why(entry))
        return entry

    def why(self, entry: dict[str, Any]) -> str:
        return "killed" if entry["boot_id"] == self.boot else "reboot"

    # -- what is told of them --

    def figures(self, uid: int) -> tuple[int, int, int]:
        """Return how many of a user's run, how many are over, and the bytes of their rings."""
        user = self._users.get(uid)
        if user is None:
            return 0, 0, 0
        running = len(user.running())
        return running, len(user.jobs) - running, user.size()

    def users(self) -> Iterator[int]:
        """Yield those who have some, as far as that is known yet."""
        return (uid for uid, user in self._users.items() if user.jobs)
