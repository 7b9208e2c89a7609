"""Fetches the status of a daemon, and shows it as a table or in Prometheus's format."""

from __future__ import annotations

import json
import socket

from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.address import unix_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._wire.address import Address


class NoAnswerError(Exception):
    """No daemon answers at the path; the text says why, in one line."""


def fetch(address: Address, timeout: float = 10.0) -> dict[str, Any]:
    """Ask the daemon at `address`; wait at most `timeout` seconds. Raises NoAnswerError."""
    path = address.path
    request = b"\0" + frames.HEADER.pack(4, lib.EB_STATUS) + lib.EB_VERSION.to_bytes(4, "little")
    with unix_socket() as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
            address.check(sock)
            sock.sendall(request, socket.MSG_NOSIGNAL)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoAnswerError(f"{path}: {address.nobody()}") from None
        except BrokenPipeError:
            pass  # refused, with the reason
        except OSError as error:
            raise NoAnswerError(f"{path}: {error.strerror or error}") from None
        try:
            data = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        except TimeoutError:
            raise NoAnswerError(f"the daemon on {path} does not answer") from None
        except OSError as error:
            raise NoAnswerError(f"{path}: {error.strerror}") from None
    if len(data) < frames.HEADER.size:
        raise NoAnswerError(f"the daemon on {path} ended before it answered")
    length, kind = frames.HEADER.unpack_from(data)
    payload = data[frames.HEADER.size : frames.HEADER.size + length]
    if kind == lib.EB_REFUSED:
        raise NoAnswerError(f"the daemon on {path} refused: {payload.decode('utf-8', 'replace')}")
    if kind != lib.EB_STATUS_REPLY or len(payload) != length:
        raise NoAnswerError(f"{path} is not served by errand-boy, or by another version of it")
    value: dict[str, Any] = json.loads(payload)
    return value


def table(status: dict[str, Any]) -> str:
    """Return a status as text for people."""
    totals = status["totals"]
    latency = status["latency_us"]
    lines = [
        f"errand-boy {status['version']}, pid {status['pid']}, on {status['socket']}",
        f"up {duration(status['uptime'])}, {totals['accepted']} connections accepted, "
        f"{totals['refused']} refused, {status['queue']} commands waiting",
        f"{totals['started']} commands started, {totals['ended']} ended, {totals['failed']} failed"
        + "".join(f", {name} {count}" for name, count in status["failures"].items()),
        f"{totals['helpers_lost']} helpers lost and {totals['commands_lost']} commands with them",
    ]
    jobs = status["jobs"]
    if jobs["jobs_running"] or jobs["jobs_over"]:
        lines.append(
            f"{jobs['jobs_running']} jobs running, {jobs['jobs_over']} over, "
            f"their output in at most {jobs['ring_bytes'] >> 10} KiB"
        )
    if latency["p50"] is not None:
        lines.append(f"starts took {latency['p50']:.0f} µs (p50), {latency['p99']:.0f} µs (p99)")
    lines += ["", f"{'HELPER':>8} {'UID':>6} {'KIB':>6} {'LIVE':>6} {'SERVED':>9} {'CLIENTS':>8}"]
    for helper in status["helpers"]:
        memory = "-" if helper["memory_kib"] is None else helper["memory_kib"]
        lines.append(
            f"{helper['pid']:>8} {helper['uid']:>6} {memory:>6} {helper['live']:>6} "
            f"{helper['served']:>9} {helper['connections']:>8}"
            + (" ending" if helper["draining"] else "")
        )
    limited = [user for user in status["users"] if user["running"] is not None]
    if limited:
        lines += ["", f"{'UID':>8} {'CLIENTS':>8} {'RUNNING':>8} {'WAITING':>8} LIMITS"]
    for user in limited:
        limits = " ".join(f"{name}={value:.10g}" for name, value in user["limits"].items() if value)
        lines.append(
            f"{user['uid']:>8} {user['connections']:>8} {user['running']:>8} "
            f"{user['waiting']:>8} {limits}"
        )
    if status["commands"]:
        lines += ["", f"{'COMMAND':>8} {'AGE':>9} {'CLIENT':>8} {'UID':>6} ARGV"]
    for command in status["commands"]:
        lines.append(
            f"{command['pid']:>8} {duration(command['age']):>9} {command['client_pid']:>8} "
            f"{command['client_uid']:>6} {words(command['argv'])}"
        )
    if status["commands_left_out"]:
        lines.append(f"and {status['commands_left_out']} more")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """Return seconds as text, with a unit."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}"


def words(argv: list[str]) -> str:
    """Return a command as one line that is safe to show on a terminal."""
    # Any user may have chosen the words. No control character may reach the terminal.
    return " ".join(word if word.isprintable() and word else ascii(word) for word in argv)


def metrics(status: dict[str, Any]) -> str:
    """Return a status in Prometheus's text format."""
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
    jobs = status["jobs"]
    metric("jobs_running", "gauge", "Jobs that run.", ("", jobs["jobs_running"]))
    metric("jobs_over", "gauge", "Jobs that are over and kept.", ("", jobs["jobs_over"]))
    metric("job_ring_bytes", "gauge", "Room for the output of jobs.", ("", jobs["ring_bytes"]))
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
    # There is no sum, since the helpers don't keep one.
    metric("start_seconds", "histogram", "From the request to the exec.", *buckets)
    return "\n".join(lines) + "\n"
