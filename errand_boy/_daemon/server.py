"""The daemon's server: accepts connections, decides who serves them, and ends in good order.

It runs in an interpreter that has loaded little else (see serve.py), and imports little, because
its memory is what the daemon costs.
"""

from __future__ import annotations

import errno
import os
import resource
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from errand_boy._daemon import status, strangers, text
from errand_boy._daemon.job_index import Index
from errand_boy._daemon.jobs import REQUEST, Jobs
from errand_boy._daemon.listen import Listener
from errand_boy._daemon.log import Log
from errand_boy._daemon.loop import NEWCOMERS, URGENT, Loop
from errand_boy._daemon.newcomers import FIRST, Newcomer, Newcomers
from errand_boy._daemon.options import Options
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.pool import Pool
from errand_boy._daemon.services import Services
from errand_boy._daemon.upgrade import Successor, check
from errand_boy._native import lib
from errand_boy._timers import Timer
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._daemon.helper import Helper, Keep

ENDED, TERMINATED, KILLED = 0, 3, 4  # exit statuses: how the last commands ended

_SETTLE = 5.0  # seconds in which connected clients may still ask for a command
_TERMINATE = 5.0  # seconds from SIGTERM to SIGKILL, and again until it gives up
_LAST_WAIT = 1.0  # seconds of not accepting, and then of accepting, until a successor may take over
_BUSY, _LONGEST_BUSY = 0.02, 1.0  # seconds until the next attempt to reach a job's busy keeper
_PAUSE = 0.1  # seconds of not accepting, when descriptors are short
_LONG_SHORTAGE = 1.0  # seconds of this, after which waiting clients are refused one by one
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
_ACCEPTS = 8  # in one turn


class Server:
    """The daemon, without its helpers."""

    def __init__(
        self,
        options: Options,
        listener: Listener,
        log: Log,
        open_files: int,
        on_stopping: Callable[[], None],
    ) -> None:
        self.options = options
        self.log = log
        self.listener = listener
        self._on_stopping = on_stopping  # called once, when no more connections are accepted
        self.loop = Loop(log)
        self.started = time.monotonic()
        self.accepted = 0
        self._upgrades: dict[str, Any] = {"done": 0, "refused": 0, "reason": None}
        self.refused = 0
        self.texts: set[text.TextConnection] = set()
        self._replies: set[status.Reply] = set()
        self.pool = Pool(self.loop, options, open_files)
        self.jobs = Index(self.loop, options, self.pool)
        self._job_requests = Jobs(self.loop, self.pool, self.jobs)
        self._newcomers = Newcomers(self.loop, self._serve, self._on_late)
        self._held: dict[int, int] = {}  # by user: connections whose sockets are open here
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_held = max(files // 4, 8) if options.allow_uid or options.allow_gid else 0
        self._admitted = 0
        self._short_since = 0.0  # since when nothing can be accepted, by time.monotonic(), or 0.0
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._closing = False  # no more connections are accepted
        self.successor: Successor | None = None  # it waits until it can take over
        self._is_checking = False
        self._busy: set[Newcomer] = set()  # newcomers for whom a job's keeper was too busy
        self._put_off: list[tuple[Newcomer, bytes]] = []  # for the successor; their first bytes
        self._successor_timer: Timer | None = None
        self._is_leaving = False  # the successor takes over when the last sockets are closed
        self._leave_timer: Timer | None = None  # for the end of this state, and of a rest after it
        self._given_up = False
        self._status = ENDED
        self._next_step: Callable[[], None] = self._drain
        self._step_timer: Timer | None = None

    def start(self) -> None:
        """Start the helpers, and listen. Raises LimitsError and OSError."""
        self.pool.start()
        self.jobs.start()
        self._listen()

    def run(self) -> int | None:
        """Serve until told to stop; return the exit status, or None if a successor takes over."""
        self.loop.run(lambda: self._is_finished() or self.may_be_replaced())
        self.loop.complaints.conclude()
        return self._status if self._closing else None

    def catch_signals(self) -> None:
        """From now on, have signals wake the loop. Call this first."""
        self._signals, self._wakeup = socket.socketpair()
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        self.loop.watch(
            self._signals, selectors.EVENT_READ, lambda events: self.take_signals(), URGENT
        )
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (*SIGNALS, strangers.INTERRUPT):
            signal.signal(number, lambda number, frame: None)

    def take_signals(self) -> None:
        """Handle the signals that have arrived."""
        with suppress(BlockingIOError):
            for number in self._signals.recv(100):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self.log.info("stopping", signal=signal.Signals(number).name)
                    self.stop()
                elif number == signal.SIGHUP:
                    self.pool.read_limits()
                elif number == signal.SIGUSR2:
                    self._upgrade()
        self.pool.reap()  # always, since there may have been no room for SIGCHLD's byte

    # -- connections --

    def _listen(self) -> None:
        if not (self._closing or self._is_leaving):
            self.loop.watch(self.listener.sock, selectors.EVENT_READ, self._on_listener, NEWCOMERS)

    def _pause_listening(self) -> None:
        self.loop.watch(self.listener.sock, 0)

    def _on_listener(self, events: int) -> None:
        for _ in range(_ACCEPTS):
            if self._closing:
                return
            if self.loop.closer.is_behind:
                self._pause("too many connections wait to be closed")
                return
            try:
                if self._spare < 0:
                    self._spare = os.open(os.devnull, os.O_RDONLY)
                sock, _ = self.listener.sock.accept()
            except BlockingIOError:
                self._short_since = 0.0
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._pause(error.strerror or str(error))
                    return
                continue  # it had gone already
            self.accepted += 1
            self.loop.call(self._admit, sock)
            if self._admitted == self.options.max_accepts > 0:
                self.log.info("stopping", accepted=self.accepted)
                self._stop_accepting()
                self._schedule(_SETTLE, self._settle)

    def _pause(self, reason: str) -> None:
        """Accept nothing for a while, so that clients wait and the loop does not spin."""
        now = time.monotonic()
        if not self._short_since:
            self.log.warning("cannot accept", error=reason)
            self._short_since = now
        elif now - self._short_since > _LONG_SHORTAGE and self._spare >= 0:
            self._turn_one_away(reason)
        self._pause_listening()
        self.loop.call_later(_PAUSE, self._listen)

    def _turn_one_away(self, reason: str) -> None:
        """Refuse the client that has waited longest, by means of the spare descriptor."""
        with suppress(OSError):
            os.close(self._spare)
            self._spare = -1
            sock, _ = self.listener.sock.accept()
            self.accepted += 1
            sock.setblocking(False)
            peer = Peer.of(sock)
            self._hold(peer)
            newcomer = Newcomer(sock, peer, "", time.monotonic())
            self._refuse(newcomer, newcomer.first() or b"", f"the daemon is full: {reason}")

    def _admit(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            peer = Peer.of(sock)
        except OSError:
            self.loop.closer.close(sock)
            return
        refusal = self._refusal(peer)
        if not refusal:
            self._admitted += 1  # strangers do not count for --max-accepts
            refusal = self._excess(peer)
        self._await_first(sock, peer, refusal, time.monotonic() + self.options.patience)

    def _await_first(self, sock: socket.socket, peer: Peer, refusal: str, deadline: float) -> None:
        self._hold(peer)
        self._newcomers.add(Newcomer(sock, peer, refusal, deadline))

    def _excess(self, peer: Peer) -> str:
        """Return the reason why `peer` may have no more connections, or ""."""
        held = self._held.get(peer.uid, 0)
        served = self.pool.connections.get(peer.uid, 0)
        if held + served >= self._most_held > 0:  # maybe few of them are open here
            held_in_all = held + self.pool.unsent(peer.uid)
            if held_in_all >= self._most_held:
                return f"user {peer.uid} has {held_in_all} connections that no helper serves yet"
        most = self.pool.limits.of(peer.uid).connections
        if most and held + served >= most:
            return f"user {peer.uid} has {most} connections, and may have no more"
        return ""

    def _hold(self, peer: Peer) -> None:
        """Count one more client whose socket is open here."""
        self._held[peer.uid] = self._held.get(peer.uid, 0) + 1

    def _let_go(self, peer: Peer) -> None:
        """Stop counting a client whose socket was open here."""
        held = self._held.pop(peer.uid, 0) - 1
        if held > 0:
            self._held[peer.uid] = held

    def _on_late(self, newcomer: Newcomer) -> None:
        self._refuse(newcomer, b"", newcomer.refusal or "no request came in time")

    def _refusal(self, peer: Peer) -> str:
        options = self.options
        if peer.uid == os.geteuid() or peer.uid in options.allow_uid:
            return ""
        _, gid, groups = peer.credentials
        if options.allow_gid and not options.allow_gid.isdisjoint([gid, *groups]):
            return ""
        return (
            f"user {peer.uid} may not use this daemon of user {os.geteuid()}: "
            "its --allow-uid and --allow-gid say who else may"
        )

    def _serve(self, newcomer: Newcomer, first: bytes) -> None:
        """Decide by its first bytes who serves a connection. The bytes stay unread."""
        sock, peer = newcomer.sock, newcomer.peer
        if not first:
            self.log.debug("gone", pid=peer.pid, uid=peer.uid)
            self._let_go(peer)
            self.loop.closer.close(sock)
        elif newcomer.refusal:
            self._refuse(newcomer, first, newcomer.refusal)
        elif newcomer.has_descriptors and _kind(first) != lib.EB_HELLO:
            self._refuse(newcomer, first, "only requests in frames may carry descriptors")
        elif first[0] != 0 and self._awaits_texts():
            self._put_off.append((newcomer, first))
        elif first[0] != 0:
            self.log.debug("accepted", kind="text", pid=peer.pid, uid=peer.uid)
            self._serve_text(sock, peer)
        else:
            length, kind = frames.HEADER.unpack_from(first, 1)
            version = int.from_bytes(first[1 + frames.HEADER.size : FIRST], "little")
            if not _may_be_first(kind, length):
                self._refuse(newcomer, first, "the first frame must be HELLO, STATUS or JOB")
            elif version != lib.EB_VERSION:
                self._refuse(
                    newcomer,
                    first,
                    f"this daemon speaks version {lib.EB_VERSION} of the protocol, not {version}: "
                    "one of the two sides is of an older release; restart it",
                )
            elif kind == lib.EB_STATUS:
                self.log.debug("accepted", kind="status", pid=peer.pid, uid=peer.uid)
                self._report(sock, peer, self.pool.helpers)
            elif kind == lib.EB_JOB:
                self.log.debug("accepted", kind="job", pid=peer.pid, uid=peer.uid)
                self._serve_job(newcomer, first)
            else:
                self.log.debug("accepted", kind="framed", pid=peer.pid, uid=peer.uid)
                try:
                    self.pool.hand_over(sock, peer, is_client=True)
                    self._let_go(peer)
                except OSError as error:
                    self._refuse(newcomer, first, str(error))

    def _refuse(self, newcomer: Newcomer, first: bytes, reason: str) -> None:
        """Send the reason in the peer's protocol, if that does not wait, and close."""
        self.refused += 1
        sock, peer = newcomer.sock, newcomer.peer
        self._let_go(peer)
        self.loop.complaints.warning("refused", reason=reason, pid=peer.pid, uid=peer.uid)
        if first[:1] in (b"", b"\0"):
            answer = frames.frame(lib.EB_REFUSED, [reason.encode()[: lib.EB_MAX_REASON]])
        else:
            # An answer of the text protocol, as in text.py.
            answer = f"\r\n0:\r\n1:errand-boy: {reason}\r\n\r\n127\r\n\r\n".encode()
        with suppress(OSError):
            sock.send(answer, socket.MSG_NOSIGNAL)
        self.loop.closer.close(
            sock, read=True
        )  # closing with unread bytes would give the peer ECONNRESET

    # -- jobs --

    def _serve_job(self, newcomer: Newcomer, first: bytes, seconds: float = _BUSY) -> None:
        """Handle a request about jobs, now or when the job's keeper has time."""
        request = first[1 + frames.HEADER.size :]
        try:
            is_done = not first or self._job_requests.serve(newcomer.sock, newcomer.peer, request)
        except OSError as error:
            self._refuse(newcomer, first, f"{error.filename or 'a job'}: {error.strerror}")
        else:
            if is_done:
                self._let_go(newcomer.peer)
                self.loop.closer.close(newcomer.sock)
            elif time.monotonic() > newcomer.deadline:
                self._refuse(newcomer, first, "the keeper of this job does not answer")
            else:
                self._busy.add(newcomer)
                # At the user's turn, since one user may have many waiting.
                retry = partial(self._retry, newcomer, first, min(2 * seconds, _LONGEST_BUSY))
                self.loop.call_later(seconds, lambda: self.loop.post(newcomer.peer.uid, retry))

    def _retry(self, newcomer: Newcomer, first: bytes, seconds: float) -> None:
        if newcomer in self._busy:
            self._busy.remove(newcomer)
            self._serve_job(newcomer, b"" if newcomer.has_gone() else first, seconds)

    # -- text --

    def _serve_text(self, sock: socket.socket, peer: Peer) -> text.TextConnection:
        def forget(connection: object) -> None:
            self.texts.discard(connection)
            self._let_go(peer)

        services = Services(self.loop, self.pool, peer, self.options, forget)
        connection = text.TextConnection(sock, peer, services)
        self.texts.add(connection)
        return connection

    # -- status --

    def _report(self, sock: socket.socket, peer: Peer, helpers: list[Helper]) -> status.Reply:
        def on_done(reply: status.Reply) -> None:
            self._replies.discard(reply)
            self._let_go(peer)

        reply = status.Reply(
            self.loop,
            sock,
            peer.uid,
            [helper for helper in helpers if status.may_see(peer, helper)],
            lambda reports: self._describe(reports, peer),
            self.options.patience,
            on_done,
        )
        self._replies.add(reply)
        return reply

    def _describe(self, reports: status.Reports, peer: Peer) -> dict[str, object]:
        value = status.of_pool(self.pool, self.jobs, reports, peer)
        totals = {"accepted": self.accepted, "refused": self.refused, **value["totals"]}
        return {
            "version": self.options.version,
            "protocol": lib.EB_VERSION,
            "pid": os.getpid(),
            "socket": self.listener.path,
            "uptime": round(time.monotonic() - self.started, 3),
            "upgrades": self._upgrades,
            **value,
            "totals": totals,
        }

    # -- handing over to the successor --

    def _upgrade(self) -> None:
        """Have the installed version replace this process's program, if it can."""
        if self._closing or self._is_checking or self.successor is not None:
            self.refuse_upgrade("the daemon is about to end or to be upgraded")
            return
        self._is_checking = True
        check(self.loop, self.pool.processes, self._on_checked)

    def _on_checked(self, found: Successor | str) -> None:
        self._is_checking = False
        if isinstance(found, str):
            self.refuse_upgrade(found)
        elif not self._closing:
            self.successor = found
            if self._awaits_texts():
                self.log.info("an upgrade waits for text requests", requests=len(self.texts))
            wait = self.options.grace + _SETTLE
            self._successor_timer = self.loop.call_later(wait, self._on_long_wait)

    def _awaits_texts(self) -> bool:
        """Return whether a successor must wait for text requests.

        This process speaks with their helpers, in a protocol that the successor does not know.
        """
        successor = self.successor
        return bool(successor and successor.protocol != lib.EB_VERSION and self.texts)

    def _on_long_wait(self) -> None:
        reason = "a close takes too long"
        if self._awaits_texts():
            reason = f"{len(self.texts)} text requests go on"
        self.refuse_upgrade(reason)
        self.keep_place()

    def refuse_upgrade(self, reason: str) -> None:
        """Log, and tell who asks for the status, that there is no upgrade."""
        self._upgrades["refused"] += 1
        self._upgrades["reason"] = reason
        self.log.error("no upgrade", reason=reason)

    def may_be_replaced(self) -> bool:
        """Return whether there is a successor that could continue all that goes on."""
        if self._closing or self.successor is None or self._awaits_texts():
            return False
        if self.loop.closer.is_idle:
            return True
        if self._leave_timer is None:
            # With new connections, there would always be more sockets to close.
            self._is_leaving = True
            self._pause_listening()
            self._leave_timer = self.loop.call_later(_LAST_WAIT, self._rest_from_leaving)
        return False

    def _rest_from_leaving(self) -> None:
        """Serve waiting clients for a while."""
        self._stay()
        self._leave_timer = self.loop.call_later(_LAST_WAIT, self._stay)

    def _stay(self) -> None:
        if self._leave_timer is not None:
            self._leave_timer.cancel()
        self._leave_timer = None
        self._is_leaving = False
        self._listen()

    def keep_place(self) -> None:
        """Go on without a successor."""
        if self._successor_timer is not None:
            self._successor_timer.cancel()
        self.successor = None
        put_off, self._put_off = self._put_off, []
        for newcomer, first in put_off:
            self.loop.call(self._serve, newcomer, first)
        self._stay()

    def state(self, keep: Keep) -> dict[str, Any]:
        """Return what the successor needs to know, for `restore`."""
        assert self.successor is not None
        put_off = (newcomer for newcomer, _ in self._put_off)
        newcomers = [*self._newcomers, *put_off, *self._busy]
        known = [(keep(one.sock.fileno()), one.refusal, one.deadline) for one in newcomers]
        replies = [reply.state(keep) for reply in self._replies]
        late = time.monotonic() + self.options.patience
        known += [(fd, "", late) for fd, rest in replies if rest is None]
        if self.successor.protocol == lib.EB_VERSION:
            pool = self.pool.state(keep)
        else:
            pool = self.pool.state_without_helpers()
            known += [(keep(sock.fileno()), "", late) for sock in self.pool.unserved()]
        return {
            "started": self.started,
            "accepted": self.accepted,
            "refused": self.refused,
            "upgrades": self._upgrades,
            "admitted": self._admitted,
            "newcomers": known,
            "texts": [connection.state(keep) for connection in self.texts],
            "replies": [reply for reply in replies if reply[1] is not None],
            "pool": pool,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the predecessor's `state`, instead of `start`."""
        self.started = state["started"]
        self.accepted = state["accepted"]
        self.refused = state["refused"]
        self._upgrades.update(state.get("upgrades", ()))
        self._upgrades["done"] += 1
        self._admitted = state["admitted"]
        self.pool.restore(state["pool"])
        self.jobs.start()
        for fd, refusal, deadline in state["newcomers"]:
            self.loop.call(self._await_first, *self._restored(fd), refusal, deadline)
        for known in state["texts"]:
            self.loop.call(self._restore_text, known)
        for fd, rest in state["replies"]:
            self.loop.call(self._restore_reply, fd, bytes.fromhex(rest))
        self._listen()

    def _restore_text(self, state: dict[str, Any]) -> None:
        sock, peer = self._restored(state["sock"])
        self._hold(peer)
        self._serve_text(sock, peer).restore(state)

    def _restore_reply(self, fd: int, rest: bytes) -> None:
        sock, peer = self._restored(fd)
        self._hold(peer)
        self._report(sock, peer, []).send(rest)

    def _restored(self, fd: int) -> tuple[socket.socket, Peer]:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        return sock, Peer.of(sock)

    # -- the end --

    def _stop_accepting(self) -> None:
        self.keep_place()
        self._closing = True
        self._pause_listening()
        self.listener.close(self.loop.closer.close)
        self._on_stopping()

    def stop(self) -> None:
        """Stop accepting, and let the commands finish; when called again, end them."""
        if not self._closing:
            self._stop_accepting()
        elif self._next_step == self._settle:
            self._next_step = self._drain
        self._advance()

    def _advance(self) -> None:
        if self._step_timer is not None:
            self._step_timer.cancel()
        self._next_step()

    def _schedule(self, seconds: float, step: Callable[[], None]) -> None:
        self._next_step = step
        self._step_timer = self.loop.call_later(seconds, self._advance)

    def _settle(self) -> None:
        """End some time after the last connection that --max-accepts allows."""
        if self._newcomers or self.texts:  # these have their own deadlines
            self._schedule(_SETTLE, self._settle)
        else:
            self.pool.drain()
            self._next_step = self._drain  # which runs only when told to stop

    def _drain(self) -> None:
        newcomers = [*self._newcomers.clear(), *self._busy]
        self._busy.clear()
        for newcomer in newcomers:
            self._let_go(newcomer.peer)
            self.loop.closer.close(newcomer.sock)
        self.jobs.close()
        self.pool.drain()
        self._schedule(self.options.grace, self._terminate)

    def _terminate(self) -> None:
        if self.pool.is_over:
            self._given_up = True  # only clients that don't read or don't send remain
            return
        self.log.warning("terminating the commands that still run")
        self._status = TERMINATED
        self.pool.end(signal.SIGTERM)
        self._schedule(_TERMINATE, self._kill)

    def _kill(self) -> None:
        self.log.warning("killing the commands that still run")
        self._status = KILLED
        self.pool.end(signal.SIGKILL)
        self._schedule(_TERMINATE, self._give_up)

    def _give_up(self) -> None:
        self.log.error("some commands cannot be killed")
        self._given_up = True

    def _is_finished(self) -> bool:
        if not self._closing:
            return False
        if self._given_up:
            return True
        if self._next_step == self._settle and not (
            self._newcomers or self.texts or self.pool.peers
        ):
            self._advance()  # no client could ask for a command any more
        return self.pool.is_over and not (self.texts or self._replies)


def _may_be_first(kind: int, length: int) -> bool:
    if kind == lib.EB_JOB:
        return REQUEST.size <= length <= int(lib.EB_MAX_JOB)
    return kind in (lib.EB_HELLO, lib.EB_STATUS) and length == 4


def _kind(first: bytes) -> int | None:
    """Return the kind of the first frame, or None if these bytes are not a first frame."""
    return int(frames.HEADER.unpack_from(first, 1)[1]) if first[0] == 0 else None
