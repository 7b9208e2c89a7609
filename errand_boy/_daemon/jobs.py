"""The requests of clients about jobs, commands that outlive them. Each job has its own keeper.

A keeper gets its client's connection when it is started, and those of later clients through its
socket. So no byte of a job passes through this process.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
import time
from contextlib import suppress
from functools import partial

from errand_boy._daemon.helper import spawn
from errand_boy._daemon.job_files import MOST_RING, NAME, WHOMS, JobsError, New, are_steps
from errand_boy._daemon.job_index import LIVE, Index, Job, User, size_of
from errand_boy._daemon.strangers import receive
from errand_boy._native import lib
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from errand_boy._daemon.loop import Loop
    from errand_boy._daemon.peer import Peer
    from errand_boy._daemon.pool import Pool

REQUEST = struct.Struct("<IB")  # the payload of a JOB: version and operation, then JSON

_NOT_OF_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_LEAST_RING, _USUAL_RING = 4 << 10, 256 << 10  # bytes, of each stream
_PAGE, _MOST_PAGE = 24, 48 << 10  # jobs and bytes of one part of a list
_EVERYBODY = -1


class Jobs:
    """Serves the requests, for the jobs of `index`."""

    def __init__(self, loop: Loop, pool: Pool, index: Index) -> None:
        self._loop = loop
        self._pool = pool
        self._audit = pool.audit
        self._index = index

    # -- requests --

    def serve(self, sock: socket.socket, peer: Peer, request: bytes) -> bool:
        """Serve a connection whose first frame, with the payload `request`, is still unread.

        Return True if that is done and the caller can close `sock`, and False if a keeper is busy
        and the caller should try again. Raises OSError.
        """
        take = partial(self._take, sock, 1 + frames.HEADER.size + len(request))
        try:
            return self._serve(sock, peer, request, take)
        except JobsError as error:
            with suppress(JobsError, OSError):
                take()  # if it stayed unread, the peer would get ECONNRESET
            self._loop.log.debug("a job is refused", uid=peer.uid, reason=str(error))
            self._reply(sock, {"error": str(error), "missing": error.is_missing})
        return True

    def _serve(
        self, sock: socket.socket, peer: Peer, request: bytes, take: Callable[[], None]
    ) -> bool:
        _, operation = REQUEST.unpack_from(request)
        try:
            wanted = json.loads(request[REQUEST.size :].decode("utf-8"))
        except (ValueError, RecursionError):
            wanted = None
        if not isinstance(wanted, dict):
            raise JobsError("the request is not a JSON object")
        if operation == lib.EB_JOB_START:
            self._start(sock, peer, wanted, take)
        elif operation == lib.EB_JOB_LIST:
            reply = self._list(peer, wanted)
            take()
            self._reply(sock, reply)
        elif operation == lib.EB_JOB_OPEN:
            return self._open_job(sock, peer, wanted, take)
        elif operation == lib.EB_JOB_REMOVE:
            user, job = self._find(peer, wanted)
            entry: dict[str, Any] = {}
            with suppress(JobsError):  # its journal can't be read
                entry = self._index.entry(user, job)
            if "left" in entry:
                raise JobsError(
                    f"job {job.number} is lost, but its command still runs as process "
                    f"{entry['pid']}: stop it first"
                )
            self._index.remove(user, job)
            take()
            self._reply(sock, {})
        else:
            raise JobsError(f"there is no operation {operation}")
        return True

    def _take(self, sock: socket.socket, size: int) -> None:
        """Read the request, and nothing after it."""
        if len(receive(sock, size)) != size:
            raise JobsError("the request is cut short")

    def _reply(self, sock: socket.socket, value: object, fd: int | None = None) -> None:
        text = json.dumps(value).encode("ascii")
        frame = frames.frame(lib.EB_JOB_REPLY, [text])
        if sock.sendmsg([frame], _rights(fd), socket.MSG_NOSIGNAL) != len(frame):
            raise OSError(errno.EMSGSIZE, "the answer does not fit the socket")

    def _whose(self, peer: Peer, wanted: dict[str, Any]) -> int:
        uid = wanted.get("uid")
        if uid is None or uid == peer.uid:
            return peer.uid
        if type(uid) is not int or not _EVERYBODY <= uid < 1 << 32:
            raise JobsError("uid must be a number")
        if peer.uid not in (0, os.geteuid()):
            raise JobsError(f"user {peer.uid} may not see the jobs of others")
        return uid

    def _find(self, peer: Peer, wanted: dict[str, Any]) -> tuple[User, Job]:
        """Return the requested job and its user. Raises JobsError."""
        uid = self._whose(peer, wanted)
        user = self._index.known(uid)
        job = None if user is None else user.find(wanted.get("job"))
        if user is None or job is None:
            error = JobsError(f"there is no job {str(wanted.get('job'))[:64]}")
            error.is_missing = True
            raise error
        return user, job

    def _list(self, peer: Peer, wanted: dict[str, Any]) -> dict[str, Any]:
        """Return one part of the requested list, and where the next part begins."""
        if wanted.get("job") is not None:
            return {"jobs": [self._index.entry(*self._find(peer, wanted))], "next": None}
        asked = self._whose(peer, wanted)
        uids = self._index.uids() if asked == _EVERYBODY else [asked]
        after = wanted.get("after") or [0, 0]
        if type(after) is not list or [type(n) for n in after] != [int, int]:
            raise JobsError("after must be two numbers")
        found: list[dict[str, Any]] = []
        size = read = 0
        for uid in uids:
            if uid < after[0] or not (user := self._index.known(uid)):
                continue
            for number, job in list(user.jobs.items()):
                if (uid, number) <= (after[0], after[1]) or job.is_removed:
                    continue
                if not (job.is_held or wanted.get("all")):
                    continue
                if read == _PAGE:
                    return {"jobs": found, "next": after}
                read += 1
                entry = self._index.entry(user, job)
                if entry["state"] in LIVE or wanted.get("all"):
                    size += len(json.dumps(entry))
                    if found and size > _MOST_PAGE:
                        return {"jobs": found, "next": after}
                    found.append(entry)
                after = [uid, number]
        return {"jobs": found, "next": None}

    def _open_job(
        self, sock: socket.socket, peer: Peer, wanted: dict[str, Any], take: Callable[[], None]
    ) -> bool:
        user, job = self._find(peer, wanted)
        entry = self._index.entry(user, job)
        keeper = None
        if entry["state"] in LIVE:
            try:
                keeper = user.files.connect(job.number)
            except BlockingIOError:
                return False
            except OSError as error:  # it has just ended
                if user.files.is_held(job.number):
                    if isinstance(error, FileNotFoundError):
                        raise JobsError(_unreachable(entry)) from None
                    return False
                entry = self._index.entry(user, job)
                if entry["state"] in LIVE:
                    entry.update(state="lost", why=self._index.why(entry))
        if keeper is None:
            take()
            self._reply_over(sock, user, job, entry)
            return True
        with keeper:
            take()
            self._reply(sock, entry)
            with suppress(OSError):  # it has just ended: the client will ask again
                _hand_over(keeper, sock)
        return True

    def _reply_over(self, sock: socket.socket, user: User, job: Job, entry: dict[str, Any]) -> None:
        try:
            ring = user.files.open_ring(job.number)
        except OSError:  # of an earlier boot
            self._reply(sock, entry)
            return
        try:
            self._reply(sock, entry, ring)
        finally:
            os.close(ring)

    # -- a new job --

    def _start(
        self, sock: socket.socket, peer: Peer, wanted: dict[str, Any], take: Callable[[], None]
    ) -> None:
        user = self._index.mended_user(peer.uid)
        ring = _checked(wanted, "ring", int, _USUAL_RING)
        if not _LEAST_RING <= ring <= MOST_RING:
            raise JobsError(f"ring: {ring} is not from {_LEAST_RING} to {MOST_RING} bytes")
        argv = _checked(wanted, "argv", list, [])
        if not all(isinstance(word, str) for word in argv):
            raise JobsError("argv must be strings")
        stop = _checked(wanted, "stop", list, [])
        if not are_steps(stop):
            raise JobsError("stop must be signals, each with the seconds until the next")
        whom = _checked(wanted, "whom", str, "")
        if whom not in WHOMS:
            raise JobsError(f"whom must be one of {', '.join(WHOMS[1:])}")
        cwd = _checked(wanted, "cwd", str, "")
        log = _log_options(wanted)
        try:
            os.fsencode("".join([*argv, cwd]))
        except UnicodeEncodeError:
            raise JobsError("argv and cwd must be what a system call takes") from None
        entry = {
            "id": user.last + 1,
            "name": "",
            "uid": peer.uid,
            "argv": argv,
            "cwd": cwd,
            "started": round(time.time(), 6),
            "boot_id": self._index.boot,
            "pty": _checked(wanted, "pty", bool, False),
            "ring": ring,
            "log": _checked(wanted, "log", str, ""),
            "stop": stop,
            "whom": whom,
            "client": peer.pid,
        }
        size = size_of(ring)
        self._make_room(user, size)
        number = entry["id"]
        name = entry["name"] = self._new_name(user, wanted.get("name"), argv, number)
        take()
        try:
            files = user.files.create(number, entry)
        except FileExistsError:
            user.last = number
            raise
        user.last = number
        job = Job(number, name, size)
        try:
            pid = self._spawn(peer, entry, log, sock, files)
        except BaseException:
            user.files.remove(number)
            raise
        finally:
            files.close()
        user.jobs[number] = job
        self._index.watch(user, job, pid)
        self._loop.log.debug("job started", uid=peer.uid, id=number, name=name, keeper=pid)
        if self._audit is not None:
            self._audit.write_job("job started", peer.uid, entry)

    def _spawn(
        self, peer: Peer, entry: dict[str, Any], log: list[str], sock: socket.socket, files: New
    ) -> int:
        """Start a keeper, answer its client, and hand the connection over; return the pid."""
        credentials, options = self._pool.identity(peer)
        arguments = ["--job", f"--ring={entry['ring']}", *log, *options]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fds = theirs.fileno(), files.listener.fileno(), files.ring, files.journal
            pid = spawn("errand-boy: keeper of a job", arguments, credentials, fds)
            self._reply(sock, {name: entry[name] for name in ("id", "name", "uid")})
            _hand_over(ours, sock)
        return pid

    def _make_room(self, user: User, size: int) -> None:
        """Remove old jobs to make room for a new job's rings. Raises JobsError."""
        limits = self._pool.limits.of(user.files.uid)
        running = len(user.running())
        if limits.jobs and running >= limits.jobs:
            raise JobsError(f"user {user.files.uid} has {running} jobs, and may have no more")
        if not limits.ring:
            return
        held = sum(job.size for job in user.running())
        if held + size > limits.ring:
            raise JobsError(
                f"the output of user {user.files.uid}'s jobs may take {limits.ring} bytes, "
                f"{held} of which are taken: a smaller ring= or a larger limit would do"
            )
        for job in user.over():
            if user.size() + size <= limits.ring:
                break
            self._index.remove(user, job)

    def _new_name(self, user: User, wanted: object, argv: list[str], number: int) -> str:
        if wanted is not None:
            if type(wanted) is not str or not NAME.fullmatch(wanted) or wanted.isdecimal():
                raise JobsError(
                    "a name has 1 to 64 letters, digits and ._-, does not begin with - and is no "
                    f"number: {str(wanted)[:64]!r}"
                )
            for job in user.running():
                if job.name == wanted and self._index.entry(user, job)["state"] in LIVE:
                    raise JobsError(f"job {job.number} runs under the name {wanted}")
            return wanted
        program = os.path.basename(argv[0]) if argv else ""
        name = _NOT_OF_NAMES.sub("-", program)[:32].strip("-") or "job"
        name = f"{name}-{number}"
        taken = {job.name for job in user.running()}
        while name in taken:
            name += "-"
        return name


def _unreachable(entry: dict[str, Any]) -> str:
    return (
        f"job {entry['id']} runs, but its socket has been removed from --job-runtime, so it can't "
        f"be reached until it ends; its command is process {entry.get('pid', 'unknown')}"
    )


def _rights(fd: int | None) -> list[tuple[int, int, bytes]]:
    if fd is None:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]


def _hand_over(keeper: socket.socket, sock: socket.socket) -> None:
    """Have a keeper serve `sock`. Raises OSError."""
    keeper.send(frames.OPENING, socket.MSG_NOSIGNAL)
    frame = frames.frame(lib.EB_ADOPT, [])
    keeper.sendmsg([frame], _rights(sock.fileno()), socket.MSG_NOSIGNAL)


def _checked(wanted: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = wanted.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        raise JobsError(f"{name} must be of type {kind.__name__}")
    return value


def _log_options(wanted: dict[str, Any]) -> list[str]:
    """Return the keeper's options for the file that gets all output."""
    path = _checked(wanted, "log", str, "")
    if not path:
        return []
    try:
        is_path = path[0] == "/" and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise JobsError("log must be an absolute path")
    options = [f"--log={path}"]
    for name in "log_size", "log_count":
        number = _checked(wanted, name, int, 0)
        if not 0 <= number < 1 << 62:
            raise JobsError(f"{name}: {number} is out of range")
        if number:
            options.append(f"--{name.replace('_', '-')}={number}")
    return options
