"""The pool of helpers: starts and replaces them, hands connections over, lets commands start."""

from __future__ import annotations

import fcntl
import os
import resource
import selectors
import signal
import socket
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

from errand_boy import _wire
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from errand_boy._daemon.server import Log, Peer, Server

_PROGRAM = os.path.join(os.path.dirname(os.path.dirname(__file__)), "errand-boy-helper")
_OPEN_FILES, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # before the server raises it
_CONTROL_FD, _FIGURES_FD = 3, 4
_CROWD = 256  # connections: a start copies the helper's table of descriptors, which they fill
_TOO_SOON = 1.0  # seconds
_MOST_TOO_SOON = 10  # helpers that die so young, one after another, are replaced at once

_ID = struct.Struct("<I")
_ADOPT = struct.Struct("<IB")
_HEAD = struct.Struct("<QQI")
_FAILURE = struct.Struct("<BiQ")
_LIVE = struct.Struct("<iIiIQH")
_FIGURES = struct.Struct("<QQQ96Q")
_KIND = struct.Struct("<IiQ")
_FIGURES_SIZE = 4096


class Command:
    """A live command. `since`: its start in seconds since 1970; `argv`: the beginning of it."""

    __slots__ = ("argv", "connection", "pid", "since")

    def __init__(self, pid: int, connection: int, since: float, argv: list[str]) -> None:
        self.pid = pid
        self.connection = connection
        self.since = since
        self.argv = argv


class Report:
    """What a helper has done; the counts of several can be added up.

    `failures` are by stage and errno; `latency[i]` are the starts that took less than 2**(i/4)
    microseconds and not less than the entry before; those of brief commands, for whose exec nobody
    waits, are not among them.
    """

    __slots__ = ("commands", "ended", "failures", "latency", "started")

    def __init__(self) -> None:
        self.started = 0
        self.ended = 0
        self.failures: dict[tuple[int, int], int] = {}
        self.latency: list[int] = []
        self.commands: list[Command] = []

    @classmethod
    def decode(cls, payload: bytes) -> Report:
        """Decode a REPORT. Raises struct.error if it is malformed."""
        report = cls()
        report.started, report.ended, _ = _HEAD.unpack_from(payload)
        at = _HEAD.size

        def count() -> int:
            nonlocal at
            (n,) = _ID.unpack_from(payload, at)
            at += _ID.size
            return int(n)

        for _ in range(count()):
            stage, error, times = _FAILURE.unpack_from(payload, at)
            report.failures[stage, error] = times
            at += _FAILURE.size
        n = count()
        report.latency = list(struct.unpack_from(f"<{n}Q", payload, at))
        at += 8 * n
        for _ in range(count()):
            pid, connection, _, _, milliseconds, size = _LIVE.unpack_from(payload, at)
            at += _LIVE.size
            text = payload[at : at + size]
            at += size
            argv = [os.fsdecode(word) for word in text.removesuffix(b"\0").split(b"\0")]
            report.commands.append(Command(pid, connection, milliseconds / 1000, argv))
        return report

    @classmethod
    def read(cls, fd: int) -> Report:
        """Return what a helper that has ended had kept in its file of figures."""
        report = cls()
        data = os.pread(fd, _FIGURES_SIZE, 0)
        report.started, report.ended, kinds, *latency = _FIGURES.unpack_from(data)
        report.latency = list(latency)
        for i in range(kinds):
            stage, error, times = _KIND.unpack_from(data, _FIGURES.size + i * _KIND.size)
            report.failures[stage, error] = times
        return report

    def add(self, other: Report) -> None:
        """Add the counts of `other`, but not its live commands."""
        self.started += other.started
        self.ended += other.ended
        for key, times in other.failures.items():
            self.failures[key] = self.failures.get(key, 0) + times
        self.latency += [0] * (len(other.latency) - len(self.latency))
        for i, times in enumerate(other.latency):
            self.latency[i] += times


class _Client:
    __slots__ = ("running", "wishes")

    def __init__(self) -> None:
        self.running = 0
        self.wishes: OrderedDict[int, None] = OrderedDict()


class Turns:
    """Who may start a command next, when not all may: clients take turns.

    At most `most` commands run at a time, and `most_per_client` of each client; 0 is no limit.
    """

    def __init__(self, most: int, most_per_client: int) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._running = 0
        self._granted: dict[int, int] = {}  # connections, and their clients
        self._wishing: dict[int, int] = {}
        self._clients: dict[int, _Client] = {}
        self._ready: OrderedDict[int, _Client] = (
            OrderedDict()
        )  # that have a wish and are allowed it

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._wishing)

    def want(self, connection: int, client: int) -> None:
        """Take note that `connection`, which is one of `client`, waits for its turn."""
        if connection not in self._wishing and connection not in self._granted:
            self._wishing[connection] = client
            self._clients.setdefault(client, _Client()).wishes[connection] = None
            self._update(client)

    def done(self, connection: int) -> None:
        """Take note that it does not run a command, nor waits for its turn, any more."""
        client = self._wishing.pop(connection, None)
        if client is not None:
            del self._clients[client].wishes[connection]
        else:
            client = self._granted.pop(connection, None)
            if client is None:
                return
            self._running -= 1
            self._clients[client].running -= 1
        self._update(client)

    def next(self) -> Iterator[int]:
        """Yield the connections whose turn it is; they count as running from then on."""
        while self._ready and (not self._most or self._running < self._most):
            client, state = self._ready.popitem(last=False)
            connection, _ = state.wishes.popitem(last=False)
            self._granted[connection] = self._wishing.pop(connection)
            self._running += 1
            state.running += 1
            self._update(client)  # behind the others, if it has another wish
            yield connection

    def _update(self, client: int) -> None:
        state = self._clients[client]
        if not state.wishes and not state.running:
            del self._clients[client]
        below = not self._most_per_client or state.running < self._most_per_client
        if not state.wishes or not below:
            self._ready.pop(client, None)
        elif client not in self._ready:
            self._ready[client] = state


class Query:
    """The helpers' reports, once all have come; `callback` is called with it then."""

    def __init__(self, callback: Callable[[Query], None]) -> None:
        self.reports: dict[Worker, Report] = {}
        self._callback = callback
        self._awaited: set[Worker] = set()

    def begin(self, workers: list[Worker]) -> None:
        """Ask all of them. A helper that goes without an answer leaves no report."""
        self._awaited.update(workers)
        for worker in workers:
            worker.queries.append(self)
            worker.send(lib.EB_QUERY)
        if not workers:
            self._callback(self)

    def answer(self, worker: Worker, report: Report | None) -> None:
        """Take the answer of one."""
        if worker in self._awaited:
            self._awaited.remove(worker)
            if report is not None:
                self.reports[worker] = report
            if not self._awaited:
                self._callback(self)

    def expire(self) -> None:
        """Wait no longer: a helper may be stopped, by a debugger say."""
        if self._awaited:
            self._awaited.clear()
            self._callback(self)


class Worker:
    """A helper process, from the server's side."""

    def __init__(self, pool: Pool, sock: socket.socket, figures: int, pid: int) -> None:
        self.pid = pid
        self.connections: set[int] = set()
        self.draining = False
        self.gone = False  # seen before its pidfd told of it
        self.started = time.monotonic()
        self.report = Report()  # its last one
        self.queries: deque[Query] = deque()  # that it has not answered
        self._pool = pool
        self._inbox = bytearray()
        self._outbox: deque[tuple[bytes, socket.socket | None]] = deque()
        self._sock = sock
        self._figures = figures  # a file in which it keeps them, in case that it is killed
        self._pidfd = os.pidfd_open(pid)
        self._selector = pool.server.selector
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._on_exit)
        self._selector.register(sock, selectors.EVENT_READ, self._on_control)

    def send(self, kind: int, payload: bytes = b"", passed: socket.socket | None = None) -> None:
        """Send a frame, and with it `passed`, which is taken; never waits."""
        self._outbox.append((_wire.HEADER.pack(len(payload), kind) + payload, passed))
        if len(self._outbox) == 1:
            self._flush()

    def hang_up(self) -> None:
        """Let it end, now that its last connection has gone."""
        with suppress(OSError):  # it has ended already
            self._sock.shutdown(socket.SHUT_WR)

    def _flush(self) -> None:
        while self._outbox:
            frame, passed = self._outbox[0]
            rights = []
            if passed is not None:
                fd = struct.pack("i", passed.fileno())
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)]
            try:
                # A frame this small goes whole or not at all (unix_stream_sendmsg).
                self._sock.sendmsg([frame], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._watch(selectors.EVENT_READ | selectors.EVENT_WRITE)
                return
            except (BrokenPipeError, ConnectionResetError):
                self.gone = True  # its pidfd will tell; what was not sent goes to another one
                return
            except OSError as error:
                # Too many descriptors on their way, say. A client is told by the close.
                self._pool.log.warning("cannot reach a helper", pid=self.pid, error=error.strerror)
            self._outbox.popleft()
            if passed is not None:
                passed.close()
        self._watch(selectors.EVENT_READ)

    def _watch(self, events: int) -> None:
        key = self._selector.get_map().get(self._sock)
        if key is not None and key.events != events:
            self._selector.modify(self._sock, events, self._on_control)

    def _on_control(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ and not self._read():
            self._selector.unregister(self._sock)

    def _read(self) -> bool:
        """Act on what has come; return False at the end."""
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._inbox += data
        header = _wire.HEADER.size
        at = 0
        while len(self._inbox) - at >= header:
            length, kind = _wire.HEADER.unpack_from(self._inbox, at)
            if len(self._inbox) - at < header + length:
                break
            payload = bytes(self._inbox[at + header : at + header + length])
            at += header + length
            try:
                self._pool.on_frame(self, kind, payload)
            except struct.error:
                self._pool.log.error("a helper sent nonsense", pid=self.pid, kind=kind)
        del self._inbox[:at]
        return bool(data)

    def _on_exit(self, events: int) -> None:
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        # Its last words: with the process gone, this comes to an end.
        if self._sock in self._selector.get_map():
            self._selector.unregister(self._sock)
            while self._read():
                pass
        self._sock.close()
        self.report = Report.read(self._figures)
        os.close(self._figures)
        _, status = os.waitpid(self.pid, 0)
        unserved = [
            (_ADOPT.unpack_from(frame, _wire.HEADER.size)[0], passed)
            for frame, passed in self._outbox
            if passed is not None
        ]
        self._pool.on_exit(self, os.waitstatus_to_exitcode(status), unserved)


class Pool:
    """The helpers of a server.

    `size` of them serve; those that are replaced stay until their last command has ended.
    """

    def __init__(
        self, server: Server, size: int, max_tasks: int, turns: Turns | None, as_peer: bool
    ) -> None:
        self.server = server
        self.log: Log = server.log
        self.workers: list[Worker] = []  # that serve, and those that are draining
        self.retired = Report()  # the counts of those that have ended
        self.lost = 0  # helpers that ended without being told to
        self.lost_commands = 0  # that they had live: their ends are not known
        self.turns = turns
        self.peers: dict[int, tuple[Worker, Peer]] = {}  # by connection id
        self._size = size
        self._max_tasks = max_tasks
        self._as_peer = as_peer
        self._flags = (lib.EB_AS_PEER if as_peer else 0) | (lib.EB_ASK if turns is not None else 0)
        self._last_id = 0
        self._too_soon = 0
        self._closing = False

    def start(self) -> None:
        """Start the helpers. Raises OSError."""
        while self._serving() < self._size:
            self._start_one()

    def _serving(self) -> int:
        return sum(not worker.draining for worker in self.workers)

    def _start_one(self) -> Worker:
        arguments = [
            f"errand-boy: helper of {os.getpid()}",
            f"--open-files={_OPEN_FILES}",
            "--figures",
        ]
        if self._max_tasks:
            arguments.append(f"--max-tasks={self._max_tasks}")
        with ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            figures = os.memfd_create("errand-boy-figures")
            undo.callback(os.close, figures)
            os.ftruncate(figures, _FIGURES_SIZE)
            with theirs, ExitStack() as moved:
                actions = []
                for fd, number in (theirs.fileno(), _CONTROL_FD), (figures, _FIGURES_FD):
                    # Out of the way of the numbers that they are to get.
                    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIGURES_FD + 1)
                    moved.callback(os.close, copy)
                    actions.append((os.POSIX_SPAWN_DUP2, copy, number))
                # A session of its own: what the terminal sends is not for the commands.
                pid = os.posix_spawn(
                    _PROGRAM,
                    arguments,
                    os.environ,
                    file_actions=actions,
                    setsid=True,
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP],
                )
            undo.callback(os.waitpid, pid, 0)  # the end of `ours`, closed after it, ends it
            undo.callback(ours.shutdown, socket.SHUT_RDWR)
            ours.setblocking(False)
            worker = Worker(self, ours, figures, pid)
            undo.pop_all()
        with suppress(OSError):  # it has ended already
            ours.send(_wire.OPENING, socket.MSG_NOSIGNAL)
        self.workers.append(worker)
        self.log.debug("helper started", pid=pid)
        return worker

    def _refill(self) -> None:
        """Start what is missing, now or, where that fails, a little later."""
        if self._closing:
            return
        try:
            self.start()
        except OSError as error:
            self.log.error("cannot start a helper", error=error.strerror)
            self.server.call_later(_TOO_SOON, self._refill)

    def hand_over(self, sock: socket.socket, peer: Peer) -> None:
        """Have `sock`, which is taken, served by the least busy helper.

        Raises OSError if there is none and none can be started; then `sock` stays the caller's.
        """
        workers = [worker for worker in self.workers if not (worker.draining or worker.gone)]
        if not workers:
            if self._closing:
                raise OSError("the daemon is about to end")
            workers = [self._start_one()]
        worker = min(workers, key=lambda worker: len(worker.connections))
        if len(worker.connections) >= _CROWD and not self._closing:
            with suppress(OSError):  # crowded is better than not at all
                worker = self._start_one()
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        while self._last_id in self.peers:
            self._last_id = self._last_id % 0xFFFFFFFF + 1
        worker.connections.add(self._last_id)
        self.peers[self._last_id] = (worker, peer)
        worker.send(lib.EB_ADOPT, _ADOPT.pack(self._last_id, self._flags), sock)

    def connect(self, peer: Peer) -> socket.socket:
        """Return a new connection to the least busy helper, on behalf of `peer`. Raises OSError."""
        ours, theirs = self._pair_as(peer) if self._as_peer else socket.socketpair()
        try:
            self.hand_over(theirs, peer)
        except OSError:
            ours.close()
            theirs.close()
            raise
        return ours

    def _pair_as(self, peer: Peer) -> tuple[socket.socket, socket.socket]:
        # The helper takes the ids from the kernel, which notes the effective ones of who made it.
        groups, gid, uid = os.getgroups(), os.getegid(), os.geteuid()
        os.setgroups(peer.groups)
        os.setegid(peer.gid)
        os.seteuid(peer.uid)
        try:
            return socket.socketpair()
        finally:
            os.seteuid(uid)
            os.setegid(gid)
            os.setgroups(groups)

    def drain(self) -> None:
        """Let all helpers end when their commands have."""
        self._closing = True
        for worker in self.workers:
            self._drain_one(worker)

    def _drain_one(self, worker: Worker) -> None:
        if not worker.draining:
            worker.draining = True
            worker.send(lib.EB_DRAIN)
            self._release(worker)

    def _release(self, worker: Worker) -> None:
        """Let a draining helper end whose last connection has gone."""
        if worker.draining and not worker.connections:
            worker.hang_up()

    def end(self, number: int) -> None:
        """Send signal `number` to the process groups of all live commands."""
        for worker in self.workers:
            worker.send(lib.EB_END, bytes([number]))

    def on_frame(self, worker: Worker, kind: int, payload: bytes) -> None:
        """Act on a frame from a helper."""
        if kind == lib.EB_REPORT:
            worker.report = Report.decode(payload)
            if worker.queries:
                worker.queries.popleft().answer(worker, worker.report)
        elif kind == lib.EB_FULL:
            self._replace(worker)
        elif kind == lib.EB_REFUSED:
            reason = payload.decode("utf-8", "replace")
            self.log.error("a helper refused", pid=worker.pid, reason=reason)
        elif kind in (lib.EB_WANT, lib.EB_DONE, lib.EB_CLOSED):
            (connection,) = _ID.unpack(payload)
            self._on_connection(worker, kind, connection)

    def _on_connection(self, worker: Worker, kind: int, connection: int) -> None:
        if connection not in worker.connections:
            return
        if self.turns is not None:
            if kind == lib.EB_WANT:
                self.turns.want(connection, self.peers[connection][1].pid)
            else:
                self.turns.done(connection)
            self._grant()
        if kind == lib.EB_CLOSED:
            worker.connections.remove(connection)
            del self.peers[connection]
            self._release(worker)
            if not worker.connections and not worker.draining and self._serving() > self._size:
                self._drain_one(worker)  # it was for a crowd

    def _grant(self) -> None:
        if self.turns is not None:
            for connection in self.turns.next():
                self.peers[connection][0].send(lib.EB_GRANT, _ID.pack(connection))

    def _replace(self, worker: Worker) -> None:
        """Put a new helper in the place of one that has started its share of commands."""
        if self._closing or worker.draining or worker not in self.workers:
            return
        try:
            self._start_one()
        except OSError as error:
            self.log.error("cannot start a helper", error=error.strerror)
            self.server.call_later(_TOO_SOON, lambda: self._replace(worker))
            return
        self.log.debug("helper replaced", pid=worker.pid)
        self._drain_one(worker)

    def on_exit(
        self, worker: Worker, status: int, unserved: list[tuple[int, socket.socket]]
    ) -> None:
        """Take note of a helper's end; `unserved` are connections that it was to be handed."""
        self.workers.remove(worker)
        waiting = [(sock, self.peers[connection][1]) for connection, sock in unserved]
        for connection in worker.connections:
            del self.peers[connection]
            if self.turns is not None:
                self.turns.done(connection)
        if not worker.draining or status != 0:
            self.lost += 1
            self.lost_commands += worker.report.started - worker.report.ended
            self.log.warning(
                "a helper has died", pid=worker.pid, status=status, clients=len(worker.connections)
            )
            young = time.monotonic() - worker.started < _TOO_SOON
            self._too_soon = self._too_soon + 1 if young else 0
            if self._too_soon > _MOST_TOO_SOON:
                self.server.call_later(_TOO_SOON, self._refill)
            else:
                self._refill()
        self.retired.add(worker.report)
        for query in worker.queries:
            query.answer(worker, None)
        for sock, peer in waiting:
            try:
                self.hand_over(sock, peer)
            except OSError:
                sock.close()
        self._grant()
