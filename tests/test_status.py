"""The status of a daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from conftest import PATIENCE, script_environment
from daemon import ended, request, send_signal, spawn, started_daemon

import errand_boy
from errand_boy._daemon.helper import Helper
from errand_boy._daemon.job_index import Index
from errand_boy._daemon.log import Log
from errand_boy._daemon.loop import Loop
from errand_boy._daemon.options import Options
from errand_boy._daemon.peer import Peer
from errand_boy._daemon.pool import Pool
from errand_boy._daemon.report import Command, Report
from errand_boy._daemon.status import of_pool, quantile
from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.frames import Failed


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "errand_boy", "status", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=script_environment(),
    )


def test_counts_add_up(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size", 2) as daemon:
        connections = [daemon.connect() for _ in range(3)]
        for connection in connections:
            spawn(connection, "/bin/true")
            ended(connection)
        request(connections[0], "/none")
        assert isinstance(connections[0].receive(PATIENCE), Failed)
        pid = spawn(connections[1], "/bin/sleep", "100")
        seen = daemon.status()
        totals = seen["totals"]
        assert (totals["started"], totals["ended"], totals["failed"]) == (4, 3, 1)
        assert seen["failures"] == {"ENOENT": 1}
        assert sum(helper["served"] for helper in seen["helpers"]) == 4
        assert sum(helper["live"] for helper in seen["helpers"]) == 1
        assert all(helper["memory_kib"] > 0 for helper in seen["helpers"])
        (command,) = seen["commands"]
        assert command["pid"] == pid
        assert command["argv"] == ["/bin/sleep", "100"]
        assert (command["client_pid"], command["client_uid"]) == (os.getpid(), os.geteuid())
        assert 0 <= command["age"] <= seen["uptime"]
        assert sum(seen["latency_us"]["histogram"]) == 4
        assert 0 < seen["latency_us"]["p50"] <= seen["latency_us"]["p99"]
        send_signal(connections[1], pid, signal.SIGTERM)
        ended(connections[1])
        for connection in connections:
            connection.close()


@pytest.mark.slow
def test_for_people_and_machines(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        connection = daemon.connect()
        pid = spawn(connection, "/bin/sh", "-c", "sleep 100 # \033[31m")
        table = cli("--socket", daemon.path).stdout
        assert f"on {daemon.path}" in table
        assert str(pid) in table
        assert "\033" not in table
        value = json.loads(cli("--socket", daemon.path, "--json").stdout)
        assert value["pid"] == daemon.process.pid
        metrics = cli("--socket", daemon.path, "--metrics").stdout
        assert "errand_boy_started_total 1\n" in metrics
        assert 'errand_boy_start_seconds_bucket{le="+Inf"} 1\n' in metrics
        send_signal(connection, -pid, signal.SIGKILL)
        ended(connection)
        connection.close()


@pytest.mark.slow
def test_commands_whose_output_is_captured_have_latencies(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        client = errand_boy.connect(daemon.path)
        for _ in range(50):
            client.run(["true"], capture_output=True)
        list(client.map([["true"]] * 50))
        client.close()
        latency = daemon.status()["latency_us"]
        assert sum(latency["histogram"]) == 100
        assert 0 < latency["p50"] <= latency["p99"]
        assert "starts took" in cli("--socket", daemon.path).stdout


def test_nobody_listens(tmp_path: Path) -> None:
    done = cli("--socket", str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr == (
        f"errand-boy: {tmp_path}/none: no errand-boy daemon listens here; to start one: "
        f"errand-boy serve --socket {tmp_path}/none\n"
    )


@pytest.mark.slow
def test_helper_that_does_not_answer(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size", 1) as daemon:
        (helper,) = daemon.helpers()
        os.kill(helper, signal.SIGSTOP)
        try:
            (seen,) = daemon.status()["helpers"]
            assert (seen["pid"], seen["answered"]) == (helper, False)
        finally:
            os.kill(helper, signal.SIGCONT)
        assert daemon.status()["helpers"][0]["answered"]


def test_report_of_a_helper() -> None:
    payload = struct.pack("<QQI", 5, 3, 2)
    payload += struct.pack("<I", 1) + struct.pack("<BiQ", 14, 2, 9)
    payload += struct.pack("<I", 3) + struct.pack("<3Q", 0, 4, 1)
    payload += struct.pack("<I", 1) + struct.pack("<iIQH", 77, 8, 2500, 7) + b"ls\0-al\0"
    report = Report.decode(payload)
    assert (report.started, report.ended, report.latency) == (5, 3, [0, 4, 1])
    assert report.failures == {(14, 2): 9}
    (command,) = report.commands
    assert (command.pid, command.connection, command.since) == (77, 8, 2.5)
    assert command.argv == ["ls", "-al"]
    total = Report()
    for _ in range(2):
        total.add(report)
    assert (total.started, total.latency, total.failures) == (10, [0, 8, 2], {(14, 2): 18})
    with pytest.raises(struct.error):
        Report.decode(payload[:40])


class FakeHelper:
    def __init__(self, report: Report) -> None:
        self.report = report
        self.uid = os.geteuid()
        self.pid = os.getpid()
        self.connections: set[int] = set()
        self.draining = False

    def private_kib(self) -> int:
        return 100


@pytest.mark.slow
def test_answer_is_bounded() -> None:
    """The number and the arguments of commands don't matter."""
    loop = Loop(Log("error", "text"))
    pool = Pool(loop, Options(socket="none"), 1024)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = Peer.of(ours)
        report = Report()
        argv = ["\x01" * 99, "\udcff" * 99]
        report.commands = [Command(n, n, 0.0, argv) for n in range(40_000)]
        helper = cast(Helper, FakeHelper(report))
        pool._users[None].helpers.append(helper)
        pool.peers.update((n, (helper, peer)) for n in range(40_000))
        value = of_pool(pool, Index(loop, Options(socket="none"), pool), {helper: report}, peer)
    frame = frames.frame(lib.EB_STATUS_REPLY, [json.dumps(value).encode()])
    assert len(frame) < 16 << 20
    assert len(value["commands"]) > 5_000
    assert len(value["commands"]) + value["commands_left_out"] == 40_000


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert quantile([0] * 8 + [99] + [0] * 7 + [1], 0.5) == 4
    assert quantile([0] * 8 + [99] + [0] * 7 + [2], 0.99) == 16
