"""The log of commands: `errand-boy serve --log-commands`."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import PATIENCE, run_script
from daemon import Daemon, started_daemon

import errand_boy
from errand_boy._daemon.audit import Audit, Ended
from errand_boy._daemon.peer import Peer
from errand_boy._native import lib
from errand_boy._wire import frames


def lines(daemon: Daemon, count: int) -> list[dict[str, Any]]:
    """Wait for the first `count` lines about commands, and return them."""
    while True:
        found = [json.loads(line) for line in daemon.log().splitlines()]
        commands = [line for line in found if line["message"] == "command"]
        if len(commands) >= count:
            return commands
        daemon.status()  # a round trip through its loop


def test_each_command_has_a_line(tmp_path: Path) -> None:
    options = ("--log-commands=json", "--log-format=json", "--pool-size=1")
    with started_daemon(tmp_path, *options) as daemon:
        client = errand_boy.connect(daemon.path)
        client.run(["sh", "-c", "exit 3"], cwd=tmp_path, env={"SECRET": "hunter2"})
        with client.Popen(["sleep", "100"]) as process:
            process.kill()
        with pytest.raises(FileNotFoundError):
            client.run(["/none", "a"])
        client.run(["echo", "a b"], capture_output=True)
        list(client.map([["true"]]))
        client.close()
        with daemon.socket() as sock:
            sock.sendall(b"echo text\r\n\r\n\r\n\r\n")
            while sock.recv(1000):
                pass
        found = lines(daemon, 6)
        assert "hunter2" not in daemon.log()
    assert [line["argv"] for line in found] == [
        ["sh", "-c", "exit 3"],
        ["sleep", "100"],
        ["/none", "a"],
        ["echo", "a b"],
        ["true"],
        ["/bin/sh", "-c", "echo text"],
    ]
    assert [line["cwd"] for line in found[:3]] == [str(tmp_path), os.getcwd(), os.getcwd()]
    assert [line.get("status") for line in found] == [3, None, None, 0, 0, 0]
    assert found[1]["signal"] == "SIGKILL"
    assert (found[2]["error"], found[2]["stage"]) == ("ENOENT", "exec")
    for line in found:
        assert (line["uid"], line["client"]) == (os.geteuid(), os.getpid())
        assert line["duration"] > 0
    assert found[0]["pid"] > 0
    assert found[0]["max_rss_kib"] > 100


def test_text_is_one_line(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--log-commands", "--pool-size=1") as daemon:
        client = errand_boy.connect(daemon.path)
        client.run(["echo", "a\nb", "\033[31m"], capture_output=True)
        client.close()
        while " INFO command " not in daemon.log():
            daemon.status()
        (line,) = (line for line in daemon.log().splitlines() if " INFO command " in line)
    assert f" uid={os.geteuid()} " in line
    assert " status=0 " in line
    assert "\033" not in line
    assert r"a\\nb" in line


def test_nothing_is_logged_unless_asked(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--log-level=debug") as daemon:
        assert errand_boy.connect(daemon.path).call(["true"]) == 0
        assert daemon.stop() == 0
        assert "command" not in daemon.log()


@pytest.mark.root
def test_line_names_who_asked(public_dir: Path) -> None:
    options = ("--log-commands=json", "--log-format=json", "--allow-uid=65534")
    source = """
        import errand_boy._client.client  # the other user may not be able to read the library
        os.setgid(65534)
        os.setuid(65534)
        report([os.getpid(), subprocess.connect(sys.argv[2]).call(["true"])])
    """
    with started_daemon(public_dir, *options) as daemon:
        pid, status = run_script(source, args=[daemon.path])
        assert status == 0
        (line,) = lines(daemon, 1)
        assert (line["uid"], line["user"], line["client"]) == (65534, "nobody", pid)


class Client:
    uid, pid = 0, 4720


PEER = cast(Peer, Client())


def ended(*argv: str, status: int = 0, error: int = 0, since: int = 1_000) -> Ended:
    words = b"".join(os.fsencode(word) + b"\0" for word in argv)
    head = struct.pack(
        "<IiiiBQQQQQ", 1, 77, status, error, lib.EB_STAGE_EXEC, since, 2_000_000, 1, 2, 3
    )
    return Ended(head + b"".join(struct.pack("<I", len(t)) + t for t in (b"/tmp", words)))


def entry(data: bytes) -> dict[str, bytes]:
    """Decode an entry as journald does."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + size], data[8 + size :]
            assert data[:1] == b"\n"
            data = data[1:]
        fields[name.decode()] = value
    return fields


def test_journal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "journal")
    audit = Audit("text", path)
    audit.write(PEER, ended("ls"))
    assert " command " in capfd.readouterr().err  # nobody listens yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        journal.settimeout(PATIENCE)
        audit.write(PEER, ended("ls", "a\nb\udcff", status=signal.SIGSEGV))
        assert capfd.readouterr().err == ""
        found = entry(journal.recv(10_000))
    assert found["MESSAGE"] == rb"root: ls 'a\nb\udcff' (signal SIGSEGV)"
    assert found["PRIORITY"] == b"6"
    assert found["SYSLOG_IDENTIFIER"] == b"errand-boy"
    assert found["ERRAND_BOY_UID"] == b"0"
    assert found["ERRAND_BOY_CLIENT"] == b"4720"
    assert found["ERRAND_BOY_SIGNAL"] == b"SIGSEGV"
    assert found["ERRAND_BOY_CWD"] == b"/tmp"
    assert found["ERRAND_BOY_DURATION"] == b"2.0"
    audit.write(PEER, ended("ls"))
    assert " command " in capfd.readouterr().err  # it has gone


def test_journal_that_does_not_keep_up(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        audit = Audit("text", path)
        for _ in range(5_000):
            audit.write(PEER, ended("true"))
        journal.setblocking(False)
        kept = 0
        with pytest.raises(BlockingIOError):
            while journal.recv(10_000):
                kept += 1
        audit.write(PEER, ended("true"))
        assert int(entry(journal.recv(10_000))["ERRAND_BOY_LOST"]) == 5_000 - kept > 0


@pytest.mark.parametrize("bad", [{"status": 0x137F}, {"since": 1 << 60}])
def test_nonsense_of_a_helper(bad: dict[str, int]) -> None:
    with pytest.raises(struct.error):
        ended("true", **bad)
    with pytest.raises(struct.error):
        Ended(bytes(60))
    assert frames.stage_name(lib.EB_STAGE_EXEC) == "exec"
