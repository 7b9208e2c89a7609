"""The daemon's server: accepts connections, decides who serves them, and supervises the helpers.

It runs in an interpreter that has loaded little else (see serve.py): its memory is what the daemon
costs. So it imports little, and the rest where it is first needed.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType

from errand_boy import _wire
from errand_boy._daemon.listen import Listener, ListenError, Supervisor, listen
from errand_boy._daemon.pool import Pool, Query, Turns
from errand_boy._native import lib

LEVELS = ("debug", "info", "warning", "error")

ENDED, TERMINATED, KILLED = 0, 3, 4  # exit statuses: how the last commands ended

_SETTLE = 5.0  # seconds for clients that have connected to ask for a command
_TERMINATE = 5.0  # seconds from SIGTERM to SIGKILL, and from there to giving up
_PAUSE = 0.1  # seconds without accepting, when descriptors are short
_ACCEPTS = 64  # of one turn
_ANSWER = 2.0  # seconds that a status waits for the helpers
_STRANGERS = 64  # who may not use the daemon, and whose first bytes are waited for
_FIRST = 1 + _wire.HEADER.size + 4  # bytes that tell what a connection is
_SO_PEERGROUPS = 59

_CREDENTIALS = struct.Struct("iII")


class Options:
    """How to serve. Times are in seconds; 0 is no limit; uids and gids are numbers."""

    def __init__(
        self,
        *,
        socket: str | None = None,
        pool_size: int = 1,
        max_accepts: int = 0,
        max_child_tasks: int = 0,
        allow_uid: Sequence[int] = (),
        allow_gid: Sequence[int] = (),
        as_peer: bool = False,
        max_processes: int = 0,
        max_processes_per_client: int = 0,
        grace: float = 30.0,
        patience: float = 30.0,
        log_level: str = "info",
        log_format: str = "text",
        pid_file: str | None = None,
        version: str = "",
    ) -> None:
        self.socket = socket
        self.pool_size = pool_size
        self.max_accepts = max_accepts
        self.max_child_tasks = max_child_tasks
        self.allow_uid = frozenset(allow_uid)
        self.allow_gid = frozenset(allow_gid)
        self.as_peer = as_peer
        self.max_processes = max_processes
        self.max_processes_per_client = max_processes_per_client
        self.grace = grace
        self.patience = patience
        self.log_level = log_level
        self.log_format = log_format
        self.pid_file = pid_file
        self.version = version


class Log:
    """Lines on standard error. What cannot be written is lost, and never holds up the service."""

    _longest = 4096  # bytes: so many go into a pipe at once, or none

    def __init__(self, level: str, form: str) -> None:
        self._least = LEVELS.index(level)
        self._json = form == "json"
        self._lost = 0
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)

    def debug(self, message: str, **fields: object) -> None:
        """Write what only the curious want to know."""
        self._log(0, message, fields)

    def info(self, message: str, **fields: object) -> None:
        """Write what marks the daemon's life."""
        self._log(1, message, fields)

    def warning(self, message: str, **fields: object) -> None:
        """Write what somebody may have to look at."""
        self._log(2, message, fields)

    def error(self, message: str, **fields: object) -> None:
        """Write what keeps the daemon from doing its work."""
        self._log(3, message, fields)

    def _log(self, level: int, message: str, fields: dict[str, object]) -> None:
        if level < self._least:
            return
        if self._lost:
            fields["lost"] = self._lost
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
        if self._json:
            import json  # noqa: PLC0415

            entry = {"time": stamp, "level": LEVELS[level], "message": message, **fields}
            line = json.dumps(entry, default=str)
        else:
            pairs = "".join(f" {name}={_quoted(value)}" for name, value in fields.items())
            line = f"{stamp} {LEVELS[level].upper()} {message}{pairs}"
        data = line.encode("utf-8", "backslashreplace")[: self._longest - 1] + b"\n"
        try:
            # A reader that has stopped must not stop us; O_NONBLOCK would be everybody's.
            if self._poll.poll(0) and os.write(2, data) == len(data):
                self._lost = 0
                return
        except OSError:
            pass
        self._lost += 1


def _quoted(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)


class Peer:
    """Who has connected, as the kernel noted it then; the groups only where they matter."""

    __slots__ = ("gid", "groups", "pid", "uid")

    def __init__(self, sock: socket.socket, with_groups: bool) -> None:
        size = _CREDENTIALS.size
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        self.pid, self.uid, self.gid = _CREDENTIALS.unpack(credentials)
        self.groups = _groups(sock) if with_groups else ()


def _groups(sock: socket.socket) -> tuple[int, ...]:
    for count in (64, 1 << 16):  # NGROUPS_MAX
        try:
            found = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * count)
        except OSError as error:
            if error.errno != errno.ERANGE:
                break
        else:
            return tuple(gid for (gid,) in struct.iter_unpack("I", found))
    return ()


class Timer:
    """Something to be done at a time, unless cancelled."""

    __slots__ = ("callback", "time")

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.time = at
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: Timer) -> bool:
        return self.time < other.time

    def cancel(self) -> None:
        """Forget it."""
        self.callback = None


class _Newcomer:
    """A connection whose first bytes are awaited. `refusal`: why it will not be served, or ""."""

    __slots__ = ("deadline", "fd", "peer", "refusal", "sock")

    def __init__(self, sock: socket.socket, peer: Peer, refusal: str, patience: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.refusal = refusal
        self.deadline = time.monotonic() + patience

    def first(self) -> bytes | None:
        """Return the bytes that tell what it is, unread; b"" if it has gone, None if they lack."""
        try:
            first = self.sock.recv(_FIRST, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        return None if first[:1] == b"\0" and len(first) < _FIRST else first


class _Reply:
    """A STATUS_REPLY on its way, at the pace of who reads it."""

    def __init__(self, server: Server, sock: socket.socket, frame: bytes) -> None:
        self._server = server
        self._sock = sock
        self._rest = memoryview(frame)
        self._timer = server.call_later(server.options.patience, self._close)
        server.selector.register(sock, selectors.EVENT_WRITE, self._on_writable)

    def _on_writable(self, events: int) -> None:
        try:
            self._rest = self._rest[self._sock.send(self._rest, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            return
        except OSError:
            self._rest = self._rest[:0]
        if not self._rest:
            self._close()

    def _close(self) -> None:
        self._timer.cancel()
        self._server.selector.unregister(self._sock)
        self._sock.close()
        self._server.on_replied()


class _ClientPool:
    """The pool as one client of the text protocol may use it."""

    def __init__(self, pool: Pool, peer: Peer) -> None:
        self._pool = pool
        self._peer = peer

    def connect(self) -> socket.socket:
        """Return a new connection to the least busy helper. Raises OSError."""
        return self._pool.connect(self._peer)


class Services:
    """What the server offers to a text connection.

    `selector` calls the data of a registered object with its events, `limits` are the server's
    options, `call_later` is the server's.
    """

    def __init__(self, server: Server, peer: Peer) -> None:
        self.selector = server.selector
        self.pool = _ClientPool(server.pool, peer)
        self.limits = server.options
        self.log = server.log
        self.call_later = server.call_later
        self._server = server

    def forget(self, connection: object) -> None:
        """Take note that a text connection has been closed."""
        self._server.texts.discard(connection)


class Server:
    """The daemon, but for its helpers."""

    def __init__(
        self, options: Options, listener: Listener, log: Log, on_stopping: Callable[[], None]
    ) -> None:
        self.options = options
        self.log = log
        self.listener = listener
        self._on_stopping = on_stopping  # called once, when no more connections are accepted
        self.selector = selectors.DefaultSelector()
        self.started = time.monotonic()
        self.accepted = 0
        self.refused = 0
        self.texts: set[object] = set()
        turns = None
        if options.max_processes or options.max_processes_per_client:
            turns = Turns(options.max_processes, options.max_processes_per_client)
        self.pool = Pool(self, options.pool_size, options.max_child_tasks, turns, options.as_peer)
        # Its edges tell of each further byte, where a level would tell of the same half a frame
        # again and again. In the order of their deadlines.
        self._newcomers: OrderedDict[int, _Newcomer] = OrderedDict()
        self._strangers = 0
        self._edges = select.epoll()
        self._timers: list[Timer] = []
        self._replies = 0
        self._paused = False
        self._closing = False  # no more connections are accepted
        self._given_up = False
        self._status = ENDED
        self._next_step: Callable[[], None] = self._drain
        self._step_timer: Timer | None = None

    # -- the loop --

    def start(self) -> None:
        """Start the helpers. Raises OSError."""
        self._catch_signals()
        self.pool.start()
        self.selector.register(self._edges, selectors.EVENT_READ, self._on_edges)
        self.selector.register(self.listener.sock, selectors.EVENT_READ, self._on_listener)

    def run(self) -> int:
        """Serve until told to stop; return the exit status."""
        while not self._finished():
            for key, events in self.selector.select(self._timeout()):
                current = self.selector.get_map().get(key.fd)
                if current is not None and current.fileobj is key.fileobj:
                    self._call(key.data, events)
            self._expire()
        return self._status

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception as error:  # of one connection; the others go on
            import traceback  # noqa: PLC0415

            self.log.error(
                "internal error", error=repr(error), trace=traceback.format_exc()[-2000:]
            )

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` after so many seconds, unless the timer that is returned is cancelled."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        times = [timer.time for timer in self._timers[:1]]
        if self._newcomers:
            times.append(next(iter(self._newcomers.values())).deadline)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _expire(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0].time <= now:
            callback = heapq.heappop(self._timers).callback
            if callback is not None:
                self._call(callback)
        while self._newcomers:
            newcomer = next(iter(self._newcomers.values()))
            if newcomer.deadline > now:
                break
            self._forget_newcomer(newcomer)
            self._refuse(newcomer, b"", newcomer.refusal or "no request came in time")

    def _catch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._wakeup = theirs  # kept open
        self.selector.register(ours, selectors.EVENT_READ, lambda events: self._on_signals(ours))
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _on_signals(self, sock: socket.socket) -> None:
        for number in sock.recv(100):
            if number in (signal.SIGTERM, signal.SIGINT):
                self.log.info("stopping", signal=signal.Signals(number).name)
                self.stop()

    # -- connections --

    def _on_listener(self, events: int) -> None:
        for _ in range(_ACCEPTS):
            if self._closing:
                return
            try:
                sock, _ = self.listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._pause(error)
                    return
                continue  # it has gone before we came
            self.accepted += 1
            sock.setblocking(False)
            self._call(self._admit, sock)
            if self.accepted == self.options.max_accepts:
                self.log.info("stopping", accepted=self.accepted)
                self._stop_accepting()
                self._schedule(_SETTLE, self._settle)

    def _pause(self, error: OSError) -> None:
        """Accept nothing for a while: what is out there waits, and the loop does not spin."""
        if not self._paused:
            self.log.warning("cannot accept", error=error.strerror)
        self._paused = True
        self.selector.unregister(self.listener.sock)
        self.call_later(_PAUSE, self._resume)

    def _resume(self) -> None:
        if not self._closing:
            self.selector.register(self.listener.sock, selectors.EVENT_READ, self._on_listener)
            self._paused = False

    def _admit(self, sock: socket.socket) -> None:
        peer = Peer(sock, self.options.as_peer or bool(self.options.allow_gid))
        newcomer = _Newcomer(sock, peer, self._refusal(peer), self.options.patience)
        first = newcomer.first()
        if first is not None:
            self._serve(newcomer, first)
        elif newcomer.refusal and self._strangers >= _STRANGERS:
            self._refuse(newcomer, b"", newcomer.refusal)
        else:
            self._edges.register(sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            self._newcomers[newcomer.fd] = newcomer
            self._strangers += bool(newcomer.refusal)

    def _refusal(self, peer: Peer) -> str:
        options = self.options
        if peer.uid == os.geteuid() or peer.uid in options.allow_uid:
            return ""
        if options.allow_gid and not options.allow_gid.isdisjoint([peer.gid, *peer.groups]):
            return ""
        return (
            f"user {peer.uid} may not use this daemon of user {os.geteuid()}: "
            "its --allow-uid and --allow-gid say who else may"
        )

    def _on_edges(self, events: int) -> None:
        for fd, flags in self._edges.poll(0):
            newcomer = self._newcomers.get(fd)
            if newcomer is None:
                continue
            first = newcomer.first()
            if first is None and flags & select.EPOLLRDHUP:
                first = b""
            if first is not None:
                self._forget_newcomer(newcomer)
                self._call(self._serve, newcomer, first)

    def _forget_newcomer(self, newcomer: _Newcomer) -> None:
        # Closing would not do: the helper's copy of it would go on to report to us.
        self._edges.unregister(newcomer.fd)
        del self._newcomers[newcomer.fd]
        self._strangers -= bool(newcomer.refusal)

    def _serve(self, newcomer: _Newcomer, first: bytes) -> None:
        """Decide by its first bytes who serves a connection; they stay unread."""
        sock, peer = newcomer.sock, newcomer.peer
        if not first:
            self.log.debug("gone", pid=peer.pid, uid=peer.uid)
            sock.close()
        elif newcomer.refusal:
            self._refuse(newcomer, first, newcomer.refusal)
        elif first[0] != 0:
            self.log.debug("accepted", kind="text", pid=peer.pid, uid=peer.uid)
            from errand_boy._daemon import text  # noqa: PLC0415

            self.texts.add(text.TextConnection(sock, peer, Services(self, peer)))
        else:
            length, kind = _wire.HEADER.unpack_from(first, 1)
            version = int.from_bytes(first[1 + _wire.HEADER.size :], "little")
            if kind not in (lib.EB_HELLO, lib.EB_STATUS) or length != 4:
                self._refuse(newcomer, first, "the first frame must be HELLO or STATUS")
            elif version != lib.EB_VERSION:
                self._refuse(
                    newcomer,
                    first,
                    f"this daemon speaks version {lib.EB_VERSION} of the protocol, not {version}: "
                    "one of the two sides is of an older release; restart it",
                )
            elif kind == lib.EB_STATUS:
                self.log.debug("accepted", kind="status", pid=peer.pid, uid=peer.uid)
                self._report(sock, peer)
            else:
                self.log.debug("accepted", kind="framed", pid=peer.pid, uid=peer.uid)
                try:
                    self.pool.hand_over(sock, peer)
                except OSError as error:
                    self._refuse(newcomer, first, str(error))

    def _refuse(self, newcomer: _Newcomer, first: bytes, reason: str) -> None:
        """Tell why in the peer's own protocol, if the socket takes it at once, and close."""
        self.refused += 1
        sock, peer = newcomer.sock, newcomer.peer
        self.log.warning("refused", reason=reason, pid=peer.pid, uid=peer.uid)
        if first[:1] in (b"", b"\0"):
            answer = _wire.frame(lib.EB_REFUSED, [reason.encode()[: lib.EB_MAX_REASON]])
        else:
            # The text protocol's answer, as text.py gives it.
            answer = f"\r\n0:\r\n1:errand-boy: {reason}\r\n\r\n127\r\n\r\n".encode()
        with sock:
            try:
                sock.send(answer, socket.MSG_NOSIGNAL)
                sock.recv(1 << 16)  # what is closed unread is ECONNRESET to the peer
            except OSError:
                pass

    # -- status --

    def _report(self, sock: socket.socket, peer: Peer) -> None:
        sock.recv(_FIRST)
        self._replies += 1

        def send(query: Query) -> None:
            from errand_boy import _status  # noqa: PLC0415

            timer.cancel()
            _Reply(self, sock, _status.reply(self, query, peer))

        query = Query(send)
        timer = self.call_later(_ANSWER, query.expire)
        query.begin(list(self.pool.workers))

    def on_replied(self) -> None:
        """Take note that a status reply has been sent, or given up."""
        self._replies -= 1

    # -- the end --

    def _stop_accepting(self) -> None:
        self._closing = True
        if not self._paused:
            self.selector.unregister(self.listener.sock)
        self.listener.close()
        self._on_stopping()

    def stop(self) -> None:
        """Stop accepting and let the commands finish; once more: do not wait for them."""
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
        self._step_timer = self.call_later(seconds, self._advance)

    def _settle(self) -> None:
        """The last connection was accepted a while ago, and nobody has told us to stop."""
        if self._newcomers or self.texts:  # they have their own deadlines
            self._schedule(_SETTLE, self._settle)
        else:
            self.pool.drain()
            self._next_step = self._drain  # only if told to

    def _drain(self) -> None:
        for newcomer in list(self._newcomers.values()):
            self._forget_newcomer(newcomer)
            newcomer.sock.close()
        self.pool.drain()
        self._schedule(self.options.grace, self._terminate)

    def _terminate(self) -> None:
        if not self.pool.workers:
            self._given_up = True  # only clients are left who do not read, or not send
            return
        self.log.warning("terminating what still runs")
        self._status = TERMINATED
        self.pool.end(signal.SIGTERM)
        self._schedule(_TERMINATE, self._kill)

    def _kill(self) -> None:
        self.log.warning("killing what still runs")
        self._status = KILLED
        self.pool.end(signal.SIGKILL)
        self._schedule(_TERMINATE, self._give_up)

    def _give_up(self) -> None:
        self.log.error("some commands cannot be killed")
        self._given_up = True

    def _finished(self) -> bool:
        if not self._closing:
            return False
        if self._given_up:
            return True
        if self._next_step == self._settle and not (
            self._newcomers or self.texts or self.pool.peers
        ):
            self._advance()  # nobody is left who could ask for a command
        return not (self.pool.workers or self.texts or self._replies)


def serve(options: Options) -> int:
    """Serve until told to stop; return the exit status: see docs/deployment.md."""
    supervisor = Supervisor()
    log = Log(options.log_level, options.log_format)
    try:
        mode = 0o666 if options.allow_uid or options.allow_gid else 0o600
        listener = listen(options.socket, mode)
        _close_on_exec()
        _raise_file_limit()
        server = Server(options, listener, log, lambda: supervisor.notify("STOPPING=1"))
        _set_title(f"errand-boy: server on {listener.path}")
    except (ListenError, OSError) as error:
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    try:
        server.start()
        if options.pid_file is not None:
            with open(options.pid_file, "w") as file:
                file.write(f"{os.getpid()}\n")
    except OSError as error:
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
