"""The jobs that exist, and which of them have a keeper.

Everything else is in their files, which the next server reads even if this one is killed. A pidfd
reports that a keeper may have ended, and the lock that it held decides. So it does no harm if the
pid in a journal now belongs to another process.
"""

from __future__ import annotations

import selectors
import time
from contextlib import suppress
from functools import partial

from errand_boy._daemon.job_files import Files, JobsError, Store, boot_id
from errand_boy._daemon.loop import Pidfd
from errand_boy._native import lib
from errand_boy._orphan import is_left, namespace, seconds_since

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from errand_boy._daemon.loop import Loop
    from errand_boy._daemon.options import Options
    from errand_boy._daemon.pool import Pool

LIVE = ("running", "starting")  # states

_LOOK, _LONGEST_LOOK = 0.05, 1.0  # seconds between checks whether a keeper is alive
_TRY_AGAIN = 5.0  # seconds


def size_of(ring: int) -> int:
    """Return the largest size in bytes of the file of a job's rings, for any kind of command."""
    return int(lib.EB_RING_HEADER) + int(lib.EB_RINGS) * ring


class Job:
    """A job that exists."""

    __slots__ = ("is_held", "is_removed", "name", "number", "over_at", "pidfd", "size")

    def __init__(self, number: int, name: str, size: int) -> None:
        self.number = number
        self.name = name
        self.size = size  # the most bytes that its rings take
        self.is_held = True  # its keeper is not known to have ended
        self.over_at = 0.0  # of time.time()
        self.is_removed = False  # to be removed as soon as its keeper has ended
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
        """Return the jobs that are over, in the order of their ends."""
        jobs = (job for job in self.jobs.values() if not job.is_held)
        return sorted(jobs, key=lambda job: job.over_at)

    def size(self) -> int:
        return sum(job.size for job in self.jobs.values())

    def find(self, wanted: object) -> Job | None:
        """Return the job of this number, or the newest of this name."""
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
        """Begin to look for the existing jobs."""
        if self._is_over or self._store is not None or self._options.job_state is None:
            return
        try:
            for uid in self.uids():
                self._loop.post(uid, partial(self._load, uid))
        except (JobsError, OSError) as error:
            self._loop.log.debug("existing jobs can't be read", reason=str(error))
            self._loop.call_later(_TRY_AGAIN, self.start)

    def close(self) -> None:
        """Release the jobs for another server."""
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
                "--job-runtime name other directories"
            ) from None
        return self._store

    def uids(self) -> list[int]:
        """Return the users who have had jobs. Raises JobsError and OSError."""
        try:
            return self._opened(create=False).uids()
        except FileNotFoundError:
            return []

    def known(self, uid: int) -> User | None:
        """Return a user's jobs, or None if there never were any. Raises JobsError and OSError."""
        if uid not in self._users and uid not in self.uids():
            return None
        return self.user(uid)

    def user(self, uid: int) -> User:
        """Return a user's jobs; make their directories if needed. Raises JobsError and OSError."""
        return self._users.get(uid) or self._load_now(uid)

    def mended_user(self, uid: int) -> User:
        """Do the same, and make directories again that have been removed since."""
        store = self._opened(create=True)
        for path in store.mend():
            self._loop.log.warning("a directory of jobs has been removed: made again", path=path)
        user = self.user(uid)
        store.mend_files(user.files)
        return user

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
                self._look(user, job, _LOOK)
        self._users[uid] = user
        self._prune(user)
        return user

    def watch(self, user: User, job: Job, keeper: int | None) -> None:
        """Watch a job's keeper, whose pid may by now belong to another process."""
        try:
            if keeper is None or keeper <= 0:
                raise ProcessLookupError
            job.pidfd = Pidfd(keeper)
            uid = user.files.uid
            self._loop.watch(
                job.pidfd, selectors.EVENT_READ, lambda _: self._on_end(user, job), uid
            )
        except OSError:
            if job.pidfd is not None:
                job.pidfd.close()
                job.pidfd = None
            self._look_later(user, job, _LOOK)

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
        """Check whether the keeper has ended. A process that it has just made may hold the lock."""
        try:
            if not user.files.is_held(job.number):
                self._finish(user, job)
                self._prune(user)
                return
        except OSError as error:  # for lack of descriptors, say
            self._loop.log.debug("a job's journal", id=job.number, error=error.strerror)
        self._look_later(user, job, min(2 * seconds, _LONGEST_LOOK))

    def _finish(self, user: User, job: Job) -> None:
        """Record that a job is over. Raises OSError if its journal can't be read now."""
        files, number = user.files, job.number
        job.is_held = False
        try:
            entry = self._entry(user, job)
        except FileNotFoundError:  # somebody has removed it
            self.remove(user, job)
            return
        except OSError:
            job.is_held = True
            raise
        files.leave(number)
        now = round(time.time(), 6)
        job.over_at = entry.get("ended", entry.get("seen", now))
        if "seen" not in entry:
            self._tell(files, entry, now)
        if job.is_removed or "pid" not in entry:  # it did not start, and its client knows
            self.remove(user, job)

    def _tell(self, files: Files, entry: dict[str, Any], now: float) -> None:
        """Note in the journal that the end has been seen, and write it to the log and the audit."""
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
        """Remove the oldest jobs that are over, if there are too many."""
        most = self._limits.of(user.files.uid).kept_jobs
        over = user.over()
        for job in over[: max(0, len(over) - most)] if most else ():
            self.remove(user, job)

    def remove(self, user: User, job: Job) -> None:
        """Remove a job that is over. Raises JobsError."""
        if job.is_held:
            # Its command may have ended, but the keeper still has followers.
            if self.entry(user, job)["state"] in LIVE:
                raise JobsError(f"job {job.number} is running: stop it first")
            job.is_removed = True
            user.files.note(job.number, removed=True)
            return
        if job.number == user.last:
            user.files.note_last(job.number)
        user.files.remove(job.number)
        del user.jobs[job.number]

    def entry(self, user: User, job: Job) -> dict[str, Any]:
        """Return what clients get to know about a job. Raises JobsError."""
        try:
            return self._entry(user, job)
        except OSError as error:
            raise JobsError(f"the journal of job {job.number}: {error.strerror}") from None

    def _entry(self, user: User, job: Job) -> dict[str, Any]:
        entry = user.files.read(job.number)
        if entry.keys() >= {"ended", "status", "usage"}:
            entry["state"] = "ended"
            entry.pop("why", None)
        elif "failed" in entry:
            entry["state"] = "failed"
        elif job.is_held:
            entry["state"] = "running" if "pid" in entry else "starting"
            if entry.get("begun"):
                entry["duration"] = round(seconds_since(entry["begun"]), 3)
        else:
            entry["state"] = "lost"
            entry.setdefault("why", self.why(entry))
            if entry["boot_id"] == self.boot and "pid" in entry and is_left(entry):
                entry["left"] = namespace()
        return entry

    def why(self, entry: dict[str, Any]) -> str:
        return "killed" if entry["boot_id"] == self.boot else "reboot"

    # -- information about jobs --

    def figures(self, uid: int) -> tuple[int, int, int]:
        """Return how many of a user's jobs run, how many are over, and the bytes of their rings."""
        user = self._users.get(uid)
        if user is None:
            return 0, 0, 0
        running = len(user.running())
        return running, len(user.jobs) - running, user.size()

    def users(self) -> Iterator[int]:
        """Yield the users who have jobs, as far as that is known yet."""
        return (uid for uid, user in self._users.items() if user.jobs)
