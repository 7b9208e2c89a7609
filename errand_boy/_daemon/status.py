"""The server's answer to status queries."""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from errand_boy._daemon.helper import Helper, Keep
from errand_boy._daemon.job_index import Index
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.newcomers import FIRST
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.pool import Pool
from errand_boy._daemon.report import Report
from errand_boy._native import lib
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ANSWER = 2.0  # seconds to wait for the helpers' reports
_OF_JOBS = ("jobs_running", "jobs_over", "ring_bytes")
_MOST_COMMANDS = lib.EB_MAX_FRAME // 2  # bytes of JSON; all the rest of a reply is much shorter

Reports = dict[Helper, Report]


class Reply:
    """A STATUS_REPLY. It waits for the reports of `helpers`, and is sent as its reader reads.

    `owner` is the user who has asked; the request stays unread until it has been answered.
    `describe` makes the answer from the reports that came in time; `on_done` is called at the end.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        owner: int,
        helpers: list[Helper],
        describe: Callable[[Reports], dict[str, Any]],
        patience: float,
        on_done: Callable[[Reply], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._owner = owner
        self._describe = describe
        self._patience = patience
        self._on_done = on_done
        self._rest: memoryview | None = None  # None until the answer has been made
        self._reports: Reports = {}
        self._awaited = set(helpers)
        # A helper may be stopped, for instance by a debugger.
        self._timer = loop.call_later(_ANSWER if helpers else 0, self._begin)
        for helper in helpers:
            self._ask(helper)

    def _ask(self, helper: Helper) -> None:
        helper.ask(lambda report: self._on_report(helper, report))

    def _on_report(self, helper: Helper, report: Report | None) -> None:
        if helper in self._awaited:
            self._awaited.remove(helper)
            if report is not None:
                self._reports[helper] = report
            if not self._awaited:
                self._timer.cancel()
                self._begin()

    def _begin(self) -> None:
        self._awaited.clear()
        with suppress(OSError):
            self._sock.recv(FIRST)
        # ASCII, because invalid UTF-8 in argv becomes lone surrogates, which must be escaped.
        text = json.dumps(self._describe(self._reports)).encode("ascii")
        self._reports.clear()
        self.send(frames.frame(lib.EB_STATUS_REPLY, [text]))

    def send(self, answer: bytes) -> None:
        """Send `answer`, or the rest of one."""
        self._timer.cancel()
        self._timer = self._loop.call_later(self._patience, self._close)
        self._rest = memoryview(answer)
        self._loop.watch(self._sock, selectors.EVENT_WRITE, self._on_writable, self._owner)

    def state(self, keep: Keep) -> tuple[int, str | None]:
        """Return its socket, and the answer or None if the successor must ask for reports again."""
        return keep(self._sock.fileno()), None if self._rest is None else self._rest.hex()

    def _on_writable(self, events: int) -> None:
        assert self._rest is not None
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
        self._loop.watch(self._sock, 0)
        self._rest = memoryview(b"")  # a helper that has not answered keeps this object
        self._loop.closer.close(self._sock)
        self._on_done(self)


def may_see(peer: Peer, helper: Helper) -> bool:
    """Return whether `peer` may see this helper and its commands."""
    return helper.uid == peer.uid or _may_see_all(peer)


def _may_see_all(peer: Peer) -> bool:
    return peer.uid in (0, os.geteuid())


def of_pool(pool: Pool, jobs: Index, reports: Reports, peer: Peer) -> dict[str, Any]:
    """Return the figures of `pool`, from `reports` and older ones, and of `jobs`.

    `peer` sees the helpers and commands of others if it is root or the daemon's own user.
    """
    totals = Report()
    totals.add(pool.retired)
    helpers = []
    commands: list[dict[str, Any]] = []
    size = left_out = 0
    now = time.time()
    sees_all = _may_see_all(peer)
    for helper in pool.helpers:
        report = reports.get(helper, helper.report)
        totals.add(report)
        if not (sees_all or helper.uid == peer.uid):
            continue
        helpers.append(
            {
                "pid": helper.pid,
                "uid": helper.uid,
                "memory_kib": helper.private_kib(),
                "connections": len(helper.connections),
                "live": report.started - report.ended,
                "served": report.started,
                "draining": helper.draining,
                "answered": helper in reports,
            }
        )
        for command in report.commands:
            owner, client = pool.peers.get(command.connection, (None, None))
            if owner is not helper or client is None:
                continue
            entry = {
                "pid": command.pid,
                "argv": command.argv,
                "age": round(max(0.0, now - command.since), 3),
                "client_pid": client.pid,
                "client_uid": client.uid,
            }
            size += len(json.dumps(entry)) + 2
            if size <= _MOST_COMMANDS:
                commands.append(entry)
            else:
                left_out += 1
    failures = _failures(totals)
    users = _users(pool, jobs, peer)
    return {
        "helpers": helpers,
        "users": users,
        "jobs": {name: sum(user[name] for user in users) for name in _OF_JOBS},
        "commands": commands,
        "commands_left_out": left_out,
        "totals": {
            "started": totals.started,
            "ended": totals.ended,
            "failed": sum(failures.values()),
            "helpers_lost": pool.lost,
            "commands_lost": pool.lost_commands,
        },
        "failures": failures,
        "latency_us": {
            "p50": quantile(totals.latency, 0.50),
            "p99": quantile(totals.latency, 0.99),
            "histogram": totals.latency,
        },
        "queue": len(pool.turns) if pool.turns is not None else 0,
    }


def _users(pool: Pool, jobs: Index, peer: Peer) -> list[dict[str, Any]]:
    """Return the users whom `peer` may see, with what they have here and their limits."""
    uids = set(pool.connections) | pool.holdings.users() | set(jobs.users())
    if pool.turns is not None:
        uids |= pool.turns.users()
    if not _may_see_all(peer):
        uids &= {peer.uid}
    return [
        {
            "uid": uid,
            "connections": pool.connections.get(uid, 0),
            "bytes": pool.holdings.of(uid),
            "running": None if pool.turns is None else pool.turns.running(uid),
            "waiting": None if pool.turns is None else pool.turns.waiting(uid),
            **dict(zip(_OF_JOBS, jobs.figures(uid), strict=True)),
            "limits": pool.limits.of(uid)._asdict(),
        }
        for uid in sorted(uids)
    ]


def _failures(report: Report) -> dict[str, int]:
    counts: dict[str, int] = {}
    for (_, number), times in sorted(report.failures.items()):
        name = errno.errorcode.get(number, str(number))
        counts[name] = counts.get(name, 0) + times
    return counts


def quantile(histogram: list[int], share: float) -> float | None:
    """Return a quantile of the start times in microseconds, or None without starts.

    `share` is between 0 and 1, and `histogram` is as in Report.
    """
    rest = share * sum(histogram)
    if not rest:
        return None
    for i, count in enumerate(histogram):
        rest -= count
        if rest <= 0:
            return _bound(i)
    return _bound(len(histogram) - 1)


def _bound(i: int) -> float:
    return float(round(2 ** (i / 4), 1))
