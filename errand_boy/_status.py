"""What a daemon is doing: asked for, and told as JSON, as a table, and to Prometheus."""

from __future__ import annotations

import errno
import json
import os
import socket
import time

from errand_boy import _wire
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._daemon.pool import Query, Report
    from errand_boy._daemon.server import Peer, Server

_MOST_COMMANDS = 20_000  # of one reply: a frame has its bound


# -- the daemon's side --


def reply(server: Server, query: Query, peer: Peer) -> bytes:
    """Return the STATUS_REPLY for `peer`, who sees the commands of others if it is root or us."""
    pool = server.pool
    totals = type(pool.retired)()
    totals.add(pool.retired)
    helpers = []
    commands: list[dict[str, Any]] = []
    now = time.time()
    for worker in pool.workers:
        report = query.reports.get(worker, worker.report)
        totals.add(report)
        helpers.append(
            {
                "pid": worker.pid,
                "memory_kib": _private_kib(worker.pid),
                "connections": len(worker.connections),
                "live": report.started - report.ended,
                "served": report.started,
                "draining": worker.draining,
                "answered": worker in query.reports,
            }
        )
        for command in report.commands:
            known = pool.peers.get(command.connection)
            if known is None:
                continue
            client = known[1]
            if peer.uid in (0, os.geteuid(), client.uid) and len(commands) < _MOST_COMMANDS:
                commands.append(
                    {
                        "pid": command.pid,
                        "argv": command.argv,
                        "age": round(max(0.0, now - command.since), 3),
                        "client_pid": client.pid,
                        "client_uid": client.uid,
                    }
                )
    failures = _failures(totals)
    value = {
        "version": server.options.version,
        "protocol": lib.EB_VERSION,
        "pid": os.getpid(),
        "socket": server.listener.path,
        "uptime": round(time.monotonic() - server.started, 3),
        "helpers": helpers,
        "commands": commands,
        "totals": {
            "accepted": server.accepted,
            "refused": server.refused,
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
    # ASCII: what is no UTF-8 in argv came as lone surrogates, which JSON can only escape.
    return _wire.frame(lib.EB_STATUS_REPLY, [json.dumps(value).encode("ascii")])


def _failures(report: Report) -> dict[str, int]:
    counts: dict[str, int] = {}
    for (_, number), times in sorted(report.failures.items()):
        name = errno.errorcode.get(number, str(number))
        counts[name] = counts.get(name, 0) + times
    return counts


def _private_kib(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            lines = file.read().splitlines()
    except OSError:  # it has just ended
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def quantile(histogram: list[int], share: float) -> float | None:
    """Return the microseconds that `share` of the starts took at most, to a fifth; None: no starts.

    `histogram` is as in pool.Report.
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


# -- the client's side --


class NoAnswerError(Exception):
    """No daemon answers at the path; the text says why, in one line."""


def fetch(path: str, timeout: float = 10.0) -> dict[str, Any]:
    """Ask the daemon at `path`; wait at most `timeout` seconds. Raises NoAnswerError."""
    request = b"\0" + _wire.HEADER.pack(4, lib.EB_STATUS) + lib.EB_VERSION.to_bytes(4, "little")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
            sock.sendall(request, socket.MSG_NOSIGNAL)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoAnswerError(f"no daemon listens on {path}") from None
        except BrokenPipeError:
            pass  # refused: it has said why
        except OSError as error:
            raise NoAnswerError(f"{path}: {error.strerror or error}") from None
        try:
            data = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        except TimeoutError:
            raise NoAnswerError(f"the daemon on {path} does not answer") from None
        except OSError as error:
            raise NoAnswerError(f"{path}: {error.strerror}") from None
    if len(data) < _wire.HEADER.size:
        raise NoAnswerError(f"the daemon on {path} ended before it answered")
    length, kind = _wire.HEADER.unpack_from(data)
    payload = data[_wire.HEADER.size : _wire.HEADER.size + length]
    if kind == lib.EB_REFUSED:
        raise NoAnswerError(f"the daemon on {path} refused: {payload.decode('utf-8', 'replace')}")
    if kind != lib.EB_STATUS_REPLY or len(payload) != length:
        raise NoAnswerError(f"what answers on {path} is no errand-boy of this version")
    value: dict[str, Any] = json.loads(payload)
    return value


def table(status: dict[str, Any]) -> str:
    """Return it for people to read."""
    totals = status["totals"]
    latency = status["latency_us"]
    lines = [
        f"errand-boy {status['version']}, pid {status['pid']}, on {status['socket']}",
        f"up {_duration(status['uptime'])}, {totals['accepted']} connections accepted, "
        f"{totals['refused']} refused, {status['queue']} commands waiting",
        f"{totals['started']} commands started, {totals['ended']} ended, {totals['failed']} failed"
        + "".join(f", {name} {count}" for name, count in status["failures"].items()),
        f"{totals['helpers_lost']} helpers lost and {totals['commands_lost']} commands with them",
    ]
    if latency["p50"] is not None:
        lines.append(f"starts took {latency['p50']:.0f} µs (p50), {latency['p99']:.0f} µs (p99)")
    lines += ["", f"{'HELPER':>8} {'KIB':>6} {'LIVE':>6} {'SERVED':>9} {'CLIENTS':>8}"]
    for helper in status["helpers"]:
        memory = "-" if helper["memory_kib"] is None else helper["memory_kib"]
        lines.append(
            f"{helper['pid']:>8} {memory:>6} {helper['live']:>6} {helper['served']:>9} "
            f"{helper['connections']:>8}" + (" ending" if helper["draining"] else "")
        )
    if status["commands"]:
        lines += ["", f"{'COMMAND':>8} {'AGE':>9} {'CLIENT':>8} {'UID':>6} ARGV"]
    for command in status["commands"]:
        lines.append(
            f"{command['pid']:>8} {_duration(command['age']):>9} {command['client_pid']:>8} "
            f"{command['client_uid']:>6} {_words(command['argv'])}"
        )
    return "\n".join(lines) + "\n"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}"


def _words(argv: list[str]) -> str:
    # A command's words are anybody's: none of them may reach the terminal as control characters.
    return " ".join(word if word.isprintable() and word else ascii(word) for word in argv)


def metrics(status: dict[str, Any]) -> str:
    """Return it in Prometheus's text form."""
    totals = status["totals"]
    lines: list[str] = []

    def metric(name: str, kind: str, text: str, *samples: tuple[str, float]) -> None:
        lines.append(f"# HELP errand_boy_{name} {text}")
        lines.append(f"# TYPE errand_boy_{name} {kind}")
        lines.extend(f"errand_boy_{name}{label} {value}" for label, value in samples)

    def of_helpers(key: str, factor: int = 1) -> list[tuple[str, float]]:
        return [
            (f'{{pid="{helper["pid"]}"}}', helper[key] * factor)
            for helper in status["helpers"]
            if helper[key] is not None
        ]

    metric("uptime_seconds", "gauge", "Time since the start.", ("", status["uptime"]))
    metric("queue_length", "gauge", "Commands that wait for a limit.", ("", status["queue"]))
    for name, text in (
        ("accepted", "Connections accepted."),
        ("refused", "Connections refused."),
        ("started", "Commands started."),
        ("ended", "Commands ended."),
        ("helpers_lost", "Helpers that died."),
        ("commands_lost", "Commands that ran when their helper died."),
    ):
        metric(f"{name}_total", "counter", text, ("", totals[name]))
    failures = [(f'{{error="{name}"}}', n) for name, n in status["failures"].items()]
    metric("failed_total", "counter", "Commands that could not be started.", *failures)
    metric("helper_live", "gauge", "Live commands of a helper.", *of_helpers("live"))
    metric("helper_memory_bytes", "gauge", "Private memory.", *of_helpers("memory_kib", 1024))
    histogram = status["latency_us"]["histogram"]
    below, buckets = 0, []
    for i, count in enumerate(histogram):
        below += count
        if i % 4 == 0:
            buckets.append((f'_bucket{{le="{2 ** (i // 4) / 1e6}"}}', below))
    buckets += [('_bucket{le="+Inf"}', below), ("_count", below)]
    # Without a sum, which no helper keeps.
    metric("start_seconds", "histogram", "From the request to the exec.", *buckets)
    return "\n".join(lines) + "\n"
