"""Logs a line for each command, to systemd's journal if it listens, else to standard error."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import time

from errand_boy._daemon.log import Log
from errand_boy._daemon.peer import Peer
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

JOURNAL = "/run/systemd/journal/socket"

_FIXED = struct.Struct("<IiiiBQQQQQ")
_SIZE = struct.Struct("<I")
_INFO = 6  # LOG_INFO of syslog(3)
_MOST_NAMES = 10_000
_LATEST = 1 << 42  # milliseconds since 1970
_OUTCOMES = ("error", "signal", "status", "lost")
_SIGNALS = {number.value: number.name for number in signal.Signals}


class Ended:
    """A command that has ended, or did not start, as its helper reports it.

    `error` and `stage` say why it did not start, else they are 0. `argv` may be cut short. Times
    are in seconds, and `since` counts from 1970; `max_rss` is in KiB.
    """

    __slots__ = (
        "argv",
        "connection",
        "cwd",
        "duration",
        "error",
        "max_rss",
        "pid",
        "returncode",
        "since",
        "stage",
        "system_time",
        "user_time",
    )

    def __init__(self, payload: bytes) -> None:
        """Decode an ENDED. Raises struct.error if it is malformed."""
        (
            self.connection,
            self.pid,
            status,
            self.error,
            self.stage,
            since,
            *times,
            self.max_rss,
        ) = _FIXED.unpack_from(payload)
        try:
            self.returncode = os.waitstatus_to_exitcode(status)
        except ValueError as error:
            raise struct.error(*error.args) from None
        if since > _LATEST:
            raise struct.error("ENDED is from the far future")
        self.since = since / 1000
        self.duration, self.user_time, self.system_time = (time / 1e6 for time in times)
        cwd, at = _text(payload, _FIXED.size)
        argv, at = _text(payload, at)
        if at != len(payload):
            raise struct.error("ENDED has bytes at its end")
        self.cwd = os.fsdecode(cwd)
        self.argv = [os.fsdecode(word) for word in argv.removesuffix(b"\0").split(b"\0")]

    def outcome(self) -> dict[str, object]:
        """Return how it ended, as `error` and `stage`, or `signal`, or `status`."""
        if self.error:
            name = errno.errorcode.get(self.error, str(self.error))
            return {"error": name, "stage": frames.stage_name(self.stage)}
        if self.returncode >= 0:
            return {"status": self.returncode}
        return {"signal": _SIGNALS.get(-self.returncode, str(-self.returncode))}


def _text(payload: bytes, at: int) -> tuple[bytes, int]:
    (size,) = _SIZE.unpack_from(payload, at)
    at += _SIZE.size
    if at + size > len(payload):
        raise struct.error("ENDED is cut short")
    return payload[at : at + size], at + size


class Audit:
    """Writes the lines. Lines that can't be written are lost, and counted in the next line.

    `form` is the format of lines on standard error, text or json.
    """

    def __init__(self, form: str, journal: str = JOURNAL) -> None:
        self._log = Log("info", form)
        self._is_text = form == "text"
        self._names: dict[int, str | None] = {}
        self._lost = 0
        self._path = journal
        self._journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._journal.setblocking(False)

    def write(self, peer: Peer, ended: Ended) -> None:
        """Write the line for a command of `peer`."""
        fields: dict[str, object] = {
            "uid": peer.uid,
            "user": self._name(peer.uid),
            "client": peer.pid,
            "pid": ended.pid,
            "argv": ended.argv,
            "cwd": ended.cwd,
            **ended.outcome(),
            "since": _stamp(ended.since) if ended.since else "",
            "duration": ended.duration,
            "user_time": ended.user_time,
            "system_time": ended.system_time,
            "max_rss_kib": ended.max_rss,
        }
        self._write("command", fields)

    def write_job(self, message: str, uid: int, entry: dict[str, Any]) -> None:
        """Write a line about a job of user `uid`, whose journal is `entry`."""
        fields: dict[str, object] = {
            "uid": uid,
            "user": self._name(uid),
            "client": entry.get("client"),
            "job": entry["id"],
            "name": entry["name"],
            "pid": entry.get("pid"),
            "argv": entry["argv"],
            "cwd": entry["cwd"],
            **_outcome_of_job(entry),
            "since": _stamp(entry["started"]),
        }
        if "ended" in entry:
            fields["duration"] = entry.get("duration")
        self._write(message, fields)

    def _write(self, message: str, fields: dict[str, object]) -> None:
        fields = {name: value for name, value in fields.items() if value not in (None, "")}
        if not self._tell_journal(message, fields):
            if self._is_text:
                argv = fields["argv"]
                assert isinstance(argv, list)
                fields["argv"] = _words(argv)
            self._log.info(message, **fields)

    def _tell_journal(self, message: str, fields: dict[str, object]) -> bool:
        """Send a line to the journal; return False if nobody listens there."""
        if self._lost:
            fields = {**fields, "lost": self._lost}
        try:
            self._journal.sendto(b"".join(_entry(message, fields)), self._path)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError, PermissionError):
            return False
        except OSError:  # the journal can't keep up
            self._lost += 1
        else:
            self._lost = 0
        return True

    def _name(self, uid: int) -> str | None:
        """Return a user's name from /etc/passwd only, since other sources may be slow."""
        if uid not in self._names and len(self._names) < _MOST_NAMES:
            try:
                with open("/etc/passwd", "rb") as file:
                    rows = [line.split(b":") for line in file]
            except OSError:
                return None
            names = [row[0] for row in rows if len(row) > 2 and row[2] == b"%d" % uid]
            self._names[uid] = os.fsdecode(names[0]) if names else None
        return self._names.get(uid)


def _outcome_of_job(entry: dict[str, Any]) -> dict[str, object]:
    """Return how a job ended, as Ended.outcome does; an empty dictionary while it runs."""
    if "why" in entry:
        return {"lost": entry["why"]}
    if "failed" in entry:
        error, stage = entry["failed"][:2]
        return {"error": errno.errorcode.get(error, str(error)), "stage": frames.stage_name(stage)}
    if "status" not in entry:
        return {}
    status = entry["status"]
    if os.WIFSIGNALED(status):
        return {"signal": _SIGNALS.get(os.WTERMSIG(status), str(os.WTERMSIG(status)))}
    return {"status": os.WEXITSTATUS(status)}


def _entry(message: str, fields: dict[str, object]) -> Iterator[bytes]:
    """Yield the parts of an entry in the native protocol of systemd's journal."""
    argv = fields["argv"]
    assert isinstance(argv, list)
    words = _words(argv)
    who = fields.get("user", fields["uid"])
    how = [f"{name} {fields[name]}" for name in _OUTCOMES if name in fields]
    if "job" in fields:
        outcome = "".join(how) or "runs"
        yield _field("MESSAGE", f"{who}: {message} {fields['job']}, {words} ({outcome})")
    else:
        yield _field("MESSAGE", f"{who}: {words} ({how[0]})")
    yield _field("PRIORITY", _INFO)
    yield _field("SYSLOG_IDENTIFIER", "errand-boy")
    for name, value in fields.items():
        yield _field(f"ERRAND_BOY_{name.upper()}", words if name == "argv" else value)


def _field(name: str, value: object) -> bytes:
    data = os.fsencode(str(value))
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _words(argv: list[str]) -> str:
    plain = (word.isprintable() and word and " " not in word for word in argv)
    return " ".join(word if ok else repr(word) for word, ok in zip(argv, plain, strict=True))


def _stamp(seconds: float) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{stamp}.{int(seconds % 1 * 1000):03}Z"
