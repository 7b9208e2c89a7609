"""A daemon's helper over its control socket and adopted connections, as docs/protocol.md says."""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import until
from guard import Guard
from stuck import stuck_file
from wire import (
    COALESCE,
    HELPER,
    OWN_GROUP,
    TRUE,
    Client,
    Failed,
    Pool,
    PoolClient,
    Spawned,
    converse,
    drained,
    ended,
    frame,
    gone,
    in_queue,
    on_close,
    option,
    output,
    request,
    room_for,
    running,
    signal_frame,
    slow,
    spawn,
    started,
    streamed,
    strings,
    u32,
    unread,
    with_arguments,
)

from errand_boy._daemon.audit import Ended
from errand_boy._native import lib
from errand_boy._wire import frames

ASK, TELL_ENDS = lib.EB_ASK, lib.EB_TELL_ENDS
PEER = (12343, 12344, [12345, 12346])
AS_PEER = ("--uid=12343", "--gid=12344", "--groups=12345", "--groups=12346")
MIB = 1 << 20


def after(script: str) -> Sequence[str]:
    """A shell that runs `script`, then becomes the helper."""
    return ["/bin/sh", "-c", f'{script}; exec "$0" "$@"']


# Connections


def test_each_end_of_a_connection_is_told(pool: Pool) -> None:
    clients = [pool.connect() for _ in range(5)]
    assert clients[2].status("/bin/true") == 0
    for client in reversed(clients):
        client.sock.close()
        pool.told((lib.EB_CLOSED, client.id))
    assert pool.silent()


def test_refused_connection_is_told(pool: Pool, witness: Client) -> None:
    client = pool.connect()
    client.send(frame(77))
    assert client.refusal() == "unknown frame kind 77"
    pool.told((lib.EB_CLOSED, client.id))


def test_queues_are_not_for_a_daemon_s_clients(pool: Pool) -> None:
    client = pool.connect()
    client.send(request("/bin/true", options=[in_queue(1, 1)]))
    assert "option QUEUE is not for a daemon's clients" in client.refusal()
    pool.told((lib.EB_CLOSED, client.id))


def test_connection_whose_client_has_gone_already_is_told(pool: Pool) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        pool.adopt(theirs.fileno())
    pool.told((lib.EB_CLOSED, pool.adopted))


def test_connection_with_a_live_command_goes_with_the_command(pool: Pool) -> None:
    client = pool.connect()
    pid = started(client, request("/bin/sleep", "100"))
    client.sock.close()
    assert pool.silent()
    os.kill(pid, signal.SIGKILL)
    pool.told((lib.EB_CLOSED, client.id))


def test_empty_payload_is_number_0_without_flags(pool: Pool) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        pool.tell(lib.EB_ADOPT, fds=[theirs.fileno()])
    client = Client(ours)
    client.send(frames.OPENING)
    assert client.frame()[0] == lib.EB_HELLO
    assert client.status("/bin/true") == 0
    ours.close()
    pool.told((lib.EB_CLOSED, 0))


# Descriptors of others


@pytest.mark.root
@pytest.mark.parametrize("count", [1, 40])
def test_file_whose_close_hangs_holds_up_no_start_of_others(
    tmp_path: Path, pool: Pool, count: int
) -> None:
    with stuck_file(tmp_path / "stuck") as stuck:
        parker = pool.connect()
        parker.send(spawn("/bin/true")[:-1], [stuck])
        assert pool.silent()  # and so it has been received
        client = pool.connect()
        targets = range(3, 3 + count)
        with open(os.devnull) as null:
            status = client.run("/bin/true", fds=[null.fileno()] * count, targets=targets)
        assert isinstance(status, Spawned), status
        assert ended(client) == 0
    parker.sock.close()
    pool.told((lib.EB_CLOSED, parker.id))


# Grants


def test_each_start_waits_for_its_grant(pool: Pool) -> None:
    pool.flags = ASK
    first, second = pool.connect(), pool.connect()
    for client in (first, second):
        client.send(request("/bin/true"))
        pool.told((lib.EB_WANT, client.id))
    assert pool.silent()
    for client in (second, first):
        pool.tell(lib.EB_GRANT, u32(client.id))
        started(client)
        assert ended(client) == 0
        pool.told((lib.EB_DONE, client.id))
    first.send(request("/bin/true"))
    pool.told((lib.EB_WANT, first.id))
    pool.tell(lib.EB_GRANT, u32(first.id))
    started(first)
    assert ended(first) == 0
    pool.told((lib.EB_DONE, first.id))
    assert pool.silent()


def test_failed_start_gives_its_grant_back(pool: Pool) -> None:
    pool.flags = ASK
    client = pool.connect()
    client.send(request("/none"))
    pool.told((lib.EB_WANT, client.id))
    pool.tell(lib.EB_GRANT, u32(client.id))
    assert client.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
    pool.told((lib.EB_DONE, client.id))


def test_wish_is_withdrawn_when_its_client_goes(pool: Pool) -> None:
    pool.flags = ASK
    client = pool.connect()
    client.send(request("/bin/true", targets=[0]), [0])
    pool.told((lib.EB_WANT, client.id))
    client.sock.close()
    pool.told((lib.EB_DONE, client.id), (lib.EB_CLOSED, client.id))
    pool.tell(lib.EB_GRANT, u32(client.id))
    assert pool.silent()


def test_grants_for_nobody_do_nothing(pool: Pool) -> None:
    pool.flags = ASK
    client = pool.connect()
    for number in (0, client.id, 12345, 0xFFFFFFFF):
        pool.tell(lib.EB_GRANT, u32(number))
    client.send(request("/bin/true"))
    pool.told((lib.EB_WANT, client.id))
    assert pool.silent()
    for _ in range(3):
        pool.tell(lib.EB_GRANT, u32(client.id))
    started(client)
    assert ended(client) == 0
    pool.told((lib.EB_DONE, client.id))
    assert pool.silent()


def test_grant_is_given_back_before_the_connection_is_told_closed(pool: Pool) -> None:
    pool.flags = ASK
    client = pool.connect()
    client.send(slow("/none"))
    pool.told((lib.EB_WANT, client.id))
    pool.tell(lib.EB_GRANT, u32(client.id))
    client.sock.close()
    pool.told((lib.EB_DONE, client.id), (lib.EB_CLOSED, client.id))


def test_live_command_of_a_client_that_went_keeps_its_grant(pool: Pool) -> None:
    pool.flags = ASK
    client = pool.connect()
    client.send(request("/bin/sleep", "100"))
    pool.told((lib.EB_WANT, client.id))
    pool.tell(lib.EB_GRANT, u32(client.id))
    pid = started(client)
    client.sock.close()
    assert pool.silent()
    os.kill(pid, signal.SIGKILL)
    pool.told((lib.EB_DONE, client.id), (lib.EB_CLOSED, client.id))


def test_bad_request_wants_nothing(pool: Pool) -> None:
    pool.flags = ASK
    client = pool.connect()
    client.send(frame(lib.EB_SPAWN, option(99)))
    assert client.refusal() == "malformed SPAWN: unknown option 99"
    pool.told((lib.EB_CLOSED, client.id))


def test_who_waits_is_served_when_the_server_ends(pool: Pool) -> None:
    pool.flags = ASK
    clients = [pool.connect() for _ in range(10)]
    idle = pool.connect()
    for number, client in enumerate(clients):
        client.send(request("/bin/sh", "-c", f"exit {number}"))
        pool.told((lib.EB_WANT, client.id))
    pool.control.sock.close()
    for number, client in enumerate(clients):
        started(client)
        assert ended(client) == number << 8
        assert client.closed()
    assert idle.closed()
    assert pool.ended()


# Draining


def reported(pool: Pool, *closed: Client) -> None:
    """Expect these connections closed, in any order, before the answer to QUERY."""
    seen = set()
    while (answer := pool.control.frame())[0] != lib.EB_REPORT:
        assert answer[0] == lib.EB_CLOSED
        seen.add(answer[1])
    assert seen == {u32(client.id) for client in closed if isinstance(client, PoolClient)}


def test_drain_closes_what_is_at_rest(pool: Pool) -> None:
    fresh, used, silent = pool.connect(), pool.connect(), pool.unopened()
    assert used.status("/bin/true") == 0
    drained(pool)
    reported(pool, fresh, used, silent)
    assert silent.frame()[0] == lib.EB_HELLO
    for client in (fresh, used, silent):
        assert client.closed()
    assert not pool.ended(0)  # its server still may ask
    pool.control.sock.close()
    assert pool.ended()


def test_drain_lets_commands_end(pool: Pool) -> None:
    client = pool.connect()
    pid = started(client, request("/bin/sleep", "100"))
    drained(pool)
    reported(pool)
    client.send(signal_frame(pid, signal.SIGTERM))
    assert ended(client) == signal.SIGTERM
    assert client.closed()
    pool.told((lib.EB_CLOSED, client.id))


def test_drain_lets_a_half_sent_request_come_and_its_command_end(pool: Pool) -> None:
    client = pool.connect()
    whole = request("/bin/sh", "-c", "exit 5")
    client.send(whole[:-1])
    assert pool.silent()
    assert until(lambda: unread(client) == 0)
    drained(pool)
    reported(pool)
    client.send(whole[-1:])
    started(client)
    assert ended(client) == 5 << 8
    assert client.closed()
    pool.told((lib.EB_CLOSED, client.id))


def test_drain_lets_waiting_requests_have_their_turn(pool: Pool) -> None:
    pool.flags = ASK
    client = pool.connect()
    client.send(request("/bin/true"))
    pool.told((lib.EB_WANT, client.id))
    drained(pool)
    reported(pool)
    pool.tell(lib.EB_GRANT, u32(client.id))
    started(client)
    assert ended(client) == 0
    assert client.closed()
    pool.told((lib.EB_DONE, client.id), (lib.EB_CLOSED, client.id))


def test_drain_lets_streams_end(pool: Pool) -> None:
    client = pool.connect()
    started(client, streamed("/bin/cat", streams=0b11))
    drained(pool)
    reported(pool)
    result = converse(client, b"some text")
    assert (result.output, result.status) == (b"some text", 0)
    assert client.closed()
    pool.told((lib.EB_CLOSED, client.id))


def test_connection_that_crosses_drain_is_closed_unread(pool: Pool) -> None:
    pool.tell(lib.EB_DRAIN)
    client = pool.unopened()
    with suppress(OSError):
        client.send(frames.OPENING + request("/bin/true"))
    assert client.closed()
    pool.told((lib.EB_CLOSED, client.id))


def test_drained_helper_ends_with_its_last_command(pool: Pool) -> None:
    client = pool.connect()
    pid = started(client, request("/bin/sleep", "100"))
    pool.control.sock.close()
    client.sock.close()
    assert not pool.ended(0)
    os.kill(pid, signal.SIGTERM)
    assert pool.ended()


def test_end_of_the_server_is_a_drain(pool: Pool) -> None:
    idle, client = pool.connect(), pool.connect()
    pid = started(client, request("/bin/sleep", "100"))
    pool.control.sock.close()
    assert idle.closed()
    client.send(signal_frame(pid, signal.SIGTERM))
    assert ended(client) == signal.SIGTERM
    assert client.closed()
    assert pool.ended()


# The end of all commands


def test_end_reaches_all_groups(pool: Pool) -> None:
    clients = [pool.connect() for _ in range(3)]
    script = "sleep 100 & echo $!; wait"
    members = []
    for number, client in enumerate(clients):
        read, write = os.pipe()
        options = [OWN_GROUP] if number else []
        data = request("/bin/sh", "-c", script, options=options, targets=[1])
        members.append(started(client, data, [write]))
        os.close(write)
        with open(read) as stream:
            members.append(int(stream.readline()))
    os.kill(members[2], signal.SIGSTOP)
    pool.tell(lib.EB_END, bytes([signal.SIGTERM]))
    for client in clients:
        assert ended(client) == signal.SIGTERM
    orphan = members.pop(1)  # the one whose command leads no group
    for pid in members:
        assert gone(pid)
    os.kill(orphan, signal.SIGKILL)
    assert gone(orphan)


def test_end_with_numbers_that_are_no_signals(pool: Pool, witness: Client) -> None:
    client = pool.connect()
    pid = started(client, request("/bin/sleep", "100"))
    for number in (0, 65, 255):
        pool.tell(lib.EB_END, bytes([number]))
    assert pool.silent()
    client.send(signal_frame(pid, signal.SIGINT))
    assert ended(client) == signal.SIGINT


# Figures


def test_report_adds_up(pool: Pool) -> None:
    before = time.time() * 1000
    client, other, idle = pool.connect(), pool.connect(), pool.connect()
    for _ in range(20):
        assert client.status("/bin/true") == 0
    for _ in range(3):
        assert isinstance(client.run("/none"), Failed)
    for _ in range(2):
        assert isinstance(client.run("/bin"), Failed)
    client.send(request("/bin/true", options=[frames.string(lib.EB_TAG_CWD, b"/none")]))
    assert isinstance(client.reply(), Failed)
    arguments = ["/bin/sh", "-c", "read x", "", "x" * 300]
    read, write = os.pipe()
    pid = started(client, request(*arguments, targets=[0]), [read])
    os.close(read)
    report = pool.report()
    assert report.started == 21
    assert report.ended == 20
    assert sum(report.buckets) == report.started
    assert report.connections == 3
    assert report.failures == {
        (lib.EB_STAGE_EXEC, errno.ENOENT): 3,
        (lib.EB_STAGE_EXEC, errno.EACCES): 2,
        (lib.EB_STAGE_CWD, errno.ENOENT): 1,
    }
    assert list(report.live) == [client.id]
    live = report.live[client.id]
    assert live[:2] == (pid, client.id)
    assert before - 1 <= live.since_ms <= time.time() * 1000
    whole = "\0".join(arguments).encode() + b"\0"
    assert live.title == whole[: len(live.title)]
    assert len(live.title) == 200
    os.close(write)
    assert ended(client) == 1 << 8
    report = pool.report()
    assert (report.started, report.ended, report.live) == (21, 21, {})
    for each in (other, idle):
        each.sock.close()


@pytest.mark.slow
def test_report_has_each_live_command(pool: Pool) -> None:
    clients = [pool.connect() for _ in range(300)]
    for number, client in enumerate(clients):
        started(client, request("/bin/sleep", "100", str(number)))
    clients[7].sock.close()
    report = pool.report()
    assert set(report.live) == {client.id for client in clients}
    assert report.connections == len(clients)
    pids = pool.children()
    assert sorted(live.pid for live in report.live.values()) == sorted(pids)
    titles = {live.title for live in report.live.values()}
    assert titles == {b"/bin/sleep\x00100\0%d\0" % number for number in range(300)}
    pool.tell(lib.EB_END, bytes([signal.SIGKILL]))
    for client in clients[:7] + clients[8:]:
        assert ended(client) == signal.SIGKILL


def test_start_times_are_in_their_buckets(pool: Pool, tmp_path: Path) -> None:
    """A slower start is in a higher bucket, which fits the time that it took at least."""
    client = pool.connect()
    for _ in range(10):  # some of them may be held up
        assert client.status("/bin/true") == 0
    before = pool.report().buckets
    client.send(slow("/bin/true"))
    started(client)
    assert ended(client) == 0
    first = next(i for i, n in enumerate(before) if n)
    pairs = zip(before, pool.report().buckets, strict=True)
    (last,) = (i for i, (old, new) in enumerate(pairs) if new != old)
    assert 20 < first < last < 96


@pytest.mark.slow
def test_time_of_a_brief_start_is_not_that_of_its_command(pool: Pool) -> None:
    """Nothing reports when its program began to run."""
    client = pool.connect()
    for count, streams in enumerate((0b10, 0b11), 1):
        client.send(streamed("/bin/sleep", "1.2", streams=streams, options=[COALESCE]))
        assert converse(client, None, streams, brief=True).status == 0
        report = pool.report()
        assert (report.started, sum(report.buckets)) == (count, count)
        assert sum(report.buckets[: 4 * 20]) == count  # 2**20 µs
    client.send(streamed("/none", streams=0b10, options=[COALESCE]))
    assert isinstance(client.reply(), Failed)
    assert sum(pool.report().buckets) == count


def test_more_kinds_of_failure_than_are_told_apart(pool: Pool) -> None:
    client = pool.connect()
    count = 0
    stages = (
        option(lib.EB_TAG_NICE, u32(0)),
        option(lib.EB_TAG_PGROUP, u32(1)),
        frames.string(lib.EB_TAG_CWD, b"/none"),
        frames.string(lib.EB_TAG_CWD, b"/dev/null"),
        frames.string(lib.EB_TAG_CWD, b"/" + b"x" * 300),
        frames.string(lib.EB_TAG_CWD, b"/" + b"x/" * 3000),
    )
    for extra in stages:
        client.send(request("/none", options=[extra]))
        assert isinstance(client.reply(), Failed)
        count += 1
    report = pool.report()
    assert sum(report.failures.values()) == count
    assert report.started == 0


@with_arguments("--max-tasks=3")
def test_full_is_told_once(pool: Pool) -> None:
    client = pool.connect()
    for _ in range(2):
        assert client.status("/bin/true") == 0
        assert isinstance(client.run("/none"), Failed)
        assert pool.silent()
    assert client.status("/bin/true") == 0
    assert pool.control.frame() == (lib.EB_FULL, b"")
    for _ in range(4):
        assert client.status("/bin/true") == 0
    assert pool.silent()


# Signals


def test_signal_to_the_group(pool: Pool) -> None:
    client = pool.connect()
    read, write = os.pipe()
    script = "sleep 100 & echo $!; wait"
    data = request("/bin/sh", "-c", script, options=[OWN_GROUP], targets=[1])
    pid = started(client, data, [write])
    os.close(write)
    with open(read) as stream:
        member = int(stream.readline())
    client.send(signal_frame(-pid, signal.SIGTERM))
    assert ended(client) == signal.SIGTERM
    assert gone(member)


def test_signal_to_whichever_command_it_is(pool: Pool) -> None:
    client = pool.connect()
    client.send(signal_frame(0, signal.SIGKILL))
    started(client, request("/bin/sleep", "100"))
    client.send(signal_frame(0, signal.SIGINT))
    assert ended(client) == signal.SIGINT


def test_signals_to_others_are_dropped(pool: Pool) -> None:
    ours, theirs = pool.connect(), pool.connect()
    pids = [
        started(client, request("/bin/sleep", "100", options=[OWN_GROUP]))
        for client in (ours, theirs)
    ]
    for pid in (pids[1], -pids[1], pool.pid, -pool.pid, os.getpid(), -1, 1, -(1 << 31)):
        ours.send(signal_frame(pid, signal.SIGKILL))
    for client, pid in zip((ours, theirs), pids, strict=True):
        client.send(signal_frame(pid, signal.SIGTERM))
        assert ended(client) == signal.SIGTERM
    for pid in (*pids, -pids[0], 0, -1):  # late
        ours.send(signal_frame(pid, signal.SIGKILL))
    assert ours.status("/bin/true") == 0


# The end of a connection with a live command


def ready(client: Client, script: str, *options: bytes) -> tuple[int, list[int]]:
    """Start a script; wait for its line of pids. Returns its own and these."""
    read, write = os.pipe()
    data = request("/bin/sh", "-c", script, options=options, targets=[1])
    pid = started(client, data, [write])
    os.close(write)
    with open(read) as stream:
        return pid, [int(word) for word in stream.readline().split()]


def test_close_ends_the_command(pool: Pool, tmp_path: Path) -> None:
    client = pool.connect()
    witness = tmp_path / "witness"
    script = f"trap 'echo TERM >{witness}; exit' TERM; echo; while :; do sleep 0.01; done"
    pid, _ = ready(client, script, OWN_GROUP, on_close(60_000))
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)
    assert witness.read_text() == "TERM\n"


@pytest.mark.slow
def test_close_kills_a_command_that_ignores_term(pool: Pool) -> None:
    client = pool.connect()
    script = "trap '' TERM; echo; while :; do sleep 0.01; done"
    pid, _ = ready(client, script, OWN_GROUP, on_close(200))
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)


def test_close_ends_a_stopped_command(pool: Pool) -> None:
    client = pool.connect()
    pid = started(client, request("/bin/sleep", "100", options=[OWN_GROUP, on_close(60_000)]))
    os.kill(pid, signal.SIGSTOP)
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)


def test_close_ends_the_group(pool: Pool) -> None:
    client = pool.connect()
    pid, members = ready(
        client, "sleep 100 & a=$!; sleep 100 & echo $a $!; wait", OWN_GROUP, on_close(60_000)
    )
    client.sock.close()
    for each in (pid, *members):
        assert gone(each)
    pool.told((lib.EB_CLOSED, client.id))


@pytest.mark.slow
def test_close_kills_members_that_outlive_their_leader(pool: Pool) -> None:
    client = pool.connect()
    stubborn = "trap '' TERM; echo \\$\\$; while :; do sleep 0.01; done"
    pid, members = ready(client, f'sh -c "{stubborn}" & wait', OWN_GROUP, on_close(200))
    client.sock.close()
    for each in (pid, *members):
        assert gone(each)
    pool.told((lib.EB_CLOSED, client.id))


def test_close_leaves_members_their_time(pool: Pool, tmp_path: Path) -> None:
    client = pool.connect()
    witness = tmp_path / "witness"
    end = f"read x <{tmp_path}/go; echo >{witness}; exit"
    member = f"trap '{end}' TERM; echo \\$\\$; while :; do sleep 0.01; done"
    os.mkfifo(tmp_path / "go")
    pid, members = ready(client, f'sh -c "{member}" & wait', OWN_GROUP, on_close(60_000))
    client.sock.close()
    assert gone(pid)
    (tmp_path / "go").write_text("\n")
    for each in members:
        assert gone(each)
    assert witness.exists()
    pool.told((lib.EB_CLOSED, client.id))


def test_close_of_a_command_without_a_group_ends_it_alone(pool: Pool) -> None:
    client = pool.connect()
    pid, (member,) = ready(client, "sleep 100 & echo $!; wait", on_close(100))
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)
    os.kill(member, signal.SIGKILL)
    assert gone(member)


def test_close_during_the_start(pool: Pool) -> None:
    client = pool.connect()
    names = ["/-"] * 200_000 + ["/bin/sleep"]
    client.send(
        frame(
            lib.EB_SPAWN,
            strings(lib.EB_TAG_EXECUTABLES, *names),
            strings(lib.EB_TAG_ARGV, "sleep", "100"),
            OWN_GROUP,
            on_close(60_000),
        )
    )
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert pool.children() == []


def test_without_it_the_command_lives_on_and_is_reaped(pool: Pool) -> None:
    client = pool.connect()
    pid = started(client, request("/bin/sleep", "100"))
    client.sock.close()
    assert pool.silent()
    assert pool.children() == [pid]
    os.kill(pid, signal.SIGTERM)
    pool.told((lib.EB_CLOSED, client.id))
    assert pool.children() == []


def test_next_command_of_a_connection_has_a_choice_of_its_own(pool: Pool) -> None:
    client = pool.connect()
    started(client, request("/bin/true", options=[OWN_GROUP, on_close(0)]))
    assert ended(client) == 0
    pid = started(client, request("/bin/sleep", "100"))
    client.sock.close()
    assert pool.silent()
    assert pool.children() == [pid]
    os.kill(pid, signal.SIGKILL)
    pool.told((lib.EB_CLOSED, client.id))


# Commands of other users


@pytest.fixture
def peer() -> Iterator[PoolClient]:
    with running(*AS_PEER) as pool:
        yield pool.connect()


def fails(client: Client, data: bytes, fds: Sequence[int] = ()) -> tuple[int, int]:
    client.send(data, fds)
    answer = client.reply()
    assert isinstance(answer, Failed), answer
    return answer.errno, answer.stage


@pytest.mark.root
def test_ids_are_the_peers(peer: PoolClient) -> None:
    text = output(peer, "/usr/bin/env", "LC_ALL=C", "/usr/bin/id")
    assert text == "uid=12343 gid=12344 groups=12344,12345,12346\n"
    status = output(peer, "/bin/cat", "/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[name], 16) == 0
    assert fields["Uid"].split() == ["12343"] * 4
    assert fields["Gid"].split() == ["12344"] * 4


@pytest.mark.root
def test_ids_of_peers_without_groups() -> None:
    with running("--uid=12343", "--gid=12344") as pool:
        assert output(pool.connect(), "/usr/bin/id", "-G") == "12344\n"


@pytest.mark.root
@pytest.mark.parametrize(
    "argument", ["--uid=", "--uid=-1", "--uid=4294967295", "--uid=1x", "--gid=1,2", "--groups=1,,2"]
)
def test_ids_that_are_none(argument: str) -> None:
    arguments = ["--uid=1", "--gid=1", argument]
    done = subprocess.run([HELPER, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("errand-boy-helper: cannot become user")


@pytest.mark.root
def test_directories_and_programs_are_opened_with_the_peers_rights(
    peer: PoolClient, public_dir: Path
) -> None:
    secret = public_dir / "secret"
    secret.mkdir(mode=0o700)
    shutil.copy("/bin/true", secret / "true")
    cwd = frames.string(lib.EB_TAG_CWD, os.fsencode(secret))
    denied = errno.EACCES
    assert fails(peer, request("/bin/true", options=[cwd])) == (denied, lib.EB_STAGE_CWD)
    assert fails(peer, request(f"{secret}/true")) == (denied, lib.EB_STAGE_EXEC)
    directory = os.open(secret, os.O_PATH)
    as_descriptor = request("/bin/true", options=[option(lib.EB_TAG_CWD_FD)])
    assert fails(peer, as_descriptor, [directory]) == (denied, lib.EB_STAGE_CWD)
    os.close(directory)
    (public_dir / "file").write_text("x")
    os.chmod(public_dir / "file", 0o640)
    os.chown(public_dir / "file", 0, 12346)
    assert output(peer, "/bin/cat", str(public_dir / "file")) == "x"


@pytest.mark.root
@pytest.mark.parametrize(
    "tag, value, stage",
    [
        (lib.EB_TAG_UID, 0, lib.EB_STAGE_UID),
        (lib.EB_TAG_UID, 12399, lib.EB_STAGE_UID),
        (lib.EB_TAG_GID, 0, lib.EB_STAGE_GID),
        (lib.EB_TAG_GID, 12345, lib.EB_STAGE_GID),
        (lib.EB_TAG_GROUPS, 0, lib.EB_STAGE_GROUPS),
        (lib.EB_TAG_GROUPS, 12345, lib.EB_STAGE_GROUPS),
    ],
)
def test_peer_may_not_become_somebody_else(
    tag: int, value: int, stage: int, peer: PoolClient
) -> None:
    data = request("/bin/true", options=[option(tag, u32(value))])
    assert fails(peer, data) == (errno.EPERM, stage)
    assert peer.status("/bin/true") == 0


def limit(name: int, soft: int, hard: int) -> bytes:
    return struct.pack("<BQQ", name, soft, hard)


NICE = os.getpriority(os.PRIO_PROCESS, 0) + 3
LIMITS = 'ulimit -c 1; ulimit -Sn 50; ulimit -Hn 100; exec nice -n 3 "$0" "$@"'
MOST = (1 << 64) - 1
RAISED = [
    option(
        lib.EB_TAG_RLIMITS,
        limit(resource.RLIMIT_NOFILE, 5000, MOST) + limit(resource.RLIMIT_CORE, MOST, MOST),
    ),
    option(lib.EB_TAG_NICE, struct.pack("<i", -5)),
]
TELL_LIMITS = ("/bin/sh", "-c", "echo $(ulimit -n; ulimit -Hn; ulimit -Hc; nice)")


@pytest.mark.root
def test_peer_raises_neither_limits_nor_priority() -> None:
    with running(*AS_PEER, under=after(LIMITS)) as pool:
        peer = pool.connect()
        assert output(peer, *TELL_LIMITS, options=RAISED) == f"100 100 1 {NICE}\n"
        assert output(peer, *TELL_LIMITS) == f"50 100 1 {NICE}\n"
    with running(under=after(LIMITS)) as pool:
        root = pool.connect()
        assert output(root, *TELL_LIMITS, options=RAISED).split()[3] == "-5"


@pytest.mark.root
def test_limits_above_the_helpers_own_are_fitted() -> None:
    """This also holds where root lacks some rights, as in a container."""
    drop = "setpriv --bounding-set=-sys_resource,-sys_nice --"
    for user in ("setpriv --reuid=12343 --clear-groups --", drop):
        with running(under=after(LIMITS.replace("exec", f"exec {user}"))) as pool:
            client = pool.connect()
            assert output(client, *TELL_LIMITS, options=RAISED) == f"100 100 1 {NICE}\n"
            lower = option(lib.EB_TAG_RLIMITS, limit(resource.RLIMIT_NOFILE, 20, 30))
            assert output(client, *TELL_LIMITS, options=[lower]) == f"20 30 1 {NICE}\n"


@pytest.mark.root
def test_peer_opens_its_streams_anew(peer: PoolClient) -> None:
    script = "cat </dev/stdin >/dev/stdout; echo error >/dev/stderr"
    started(peer, streamed("/bin/sh", "-c", script, streams=0b111))
    assert converse(peer, b"text", 0b111) == (b"text", b"error\n", 0)


# What a request leaves open


def test_nothing_is_blocked_or_ignored() -> None:
    with running(under=after("trap '' INT USR1")) as pool:
        client = pool.connect()
        status = output(client, "/bin/cat", "/proc/self/status")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        for name in ("SigBlk", "SigIgn", "SigPnd", "ShdPnd"):
            assert int(fields[name], 16) == 0, name


def test_limit_of_files_is_as_before_the_helper_raised_it() -> None:
    with running(under=after("ulimit -Sn 100; ulimit -Hn 300")) as pool:
        assert output(pool.connect(), "/bin/sh", "-c", "ulimit -n; ulimit -Hn") == "100\n300\n"
        assert resource.prlimit(pool.pid, resource.RLIMIT_NOFILE) == (300, 300)


def test_limit_of_processes_is_no_other_clients(pool: Pool) -> None:
    client, other = pool.connect(), pool.connect()
    tell = ("/bin/sh", "-c", "grep processes /proc/self/limits")
    before = output(other, *tell)
    lowered = option(lib.EB_TAG_RLIMITS, limit(resource.RLIMIT_NPROC, 4321, 54321))
    assert output(client, *tell, options=[lowered]).split()[2:4] == ["4321", "54321"]
    assert output(other, *tell) == before


# Ends


def told_end(pool: Pool) -> Ended:
    kind, payload = pool.control.frame()
    assert kind == lib.EB_ENDED
    return Ended(payload)


def test_end_of_each_command_is_told(pool: Pool, tmp_path: Path) -> None:
    pool.flags = TELL_ENDS
    client = pool.connect()
    directory = os.open(tmp_path, os.O_RDONLY)
    before = time.time()
    within = [option(lib.EB_TAG_CWD_FD)]
    pid = started(client, request("/bin/sh", "-c", "exit 3", options=within), [directory])
    assert ended(client) == 3 << 8
    end = told_end(pool)
    assert (end.connection, end.pid, end.argv) == (client.id, pid, ["/bin/sh", "-c", "exit 3"])
    assert (end.cwd, end.outcome()) == (str(tmp_path), {"status": 3})
    assert before - 1 < end.since < time.time()
    assert 0 < end.duration < 60
    assert end.max_rss > 100
    for cwd, where in ("/", "/"), ("..", f"{tmp_path}/.."):
        within[1:] = [option(lib.EB_TAG_CWD, cwd.encode() + b"\0")]
        pid = started(client, request("/bin/sleep", "100", options=within), [directory])
        os.kill(pid, signal.SIGTERM)
        ended(client)
        end = told_end(pool)
        assert (end.pid, end.cwd, end.outcome()) == (pid, where, {"signal": "SIGTERM"})
    client.send(request("/none"))
    assert isinstance(client.reply(), Failed)
    end = told_end(pool)
    assert end.outcome() == {"error": "ENOENT", "stage": "exec"}
    assert (end.argv, end.cwd) == (["/none"], os.getcwd())
    os.close(directory)
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))


def test_end_is_told_of_a_command_whose_client_has_gone(pool: Pool) -> None:
    pool.flags = TELL_ENDS | ASK
    client = pool.connect()
    client.send(streamed("/bin/sleep", "100", streams=0b11, options=[COALESCE]))
    pool.told((lib.EB_WANT, client.id))
    pool.tell(lib.EB_GRANT, u32(client.id))
    assert until(lambda: bool(pool.children()))
    client.sock.close()
    assert told_end(pool).outcome() == {"signal": "SIGTERM"}
    pool.told((lib.EB_DONE, client.id), (lib.EB_CLOSED, client.id))


def test_end_is_not_told_of_a_request_that_is_dropped(pool: Pool) -> None:
    pool.flags = TELL_ENDS | ASK
    client = pool.connect()
    client.send(request("/bin/true"))
    pool.told((lib.EB_WANT, client.id))
    client.sock.close()
    pool.told((lib.EB_DONE, client.id), (lib.EB_CLOSED, client.id))


def test_what_is_told_of_a_command_is_bounded(pool: Pool) -> None:
    pool.flags = TELL_ENDS
    client = pool.connect()
    within = [option(lib.EB_TAG_CWD, b"/" * 3000 + b"\0")]
    started(client, request("/bin/true", *["x" * 1000] * 100, options=within))
    assert ended(client) == 0
    end = told_end(pool)
    assert (end.cwd, len("\0".join(end.argv))) == ("/" * 1024, 2048)
    assert end.argv[:2] == ["/bin/true", "x" * 1000]


# Silence and garbage


def test_half_a_request_while_a_command_runs_is_not_kept(pool: Pool, witness: Client) -> None:
    """No request is allowed then, so the helper does not wait for its rest."""
    client = pool.connect()
    pid = started(client, request("/bin/sleep", "100"))
    client.send(frames.HEADER.pack(lib.EB_MAX_FRAME, lib.EB_SPAWN))
    assert client.refusal() == f"SPAWN while this connection's command {pid} is running"
    os.kill(pid, signal.SIGKILL)


def test_descriptors_while_a_command_runs_are_not_kept(pool: Pool, witness: Client) -> None:
    """They come with half a frame, whose rest the helper does not await."""
    client = pool.connect()
    before = pool.descriptors()
    started(client, streamed("/bin/cat", streams=0b11))
    client.send(frame(lib.EB_STDIN, b"x")[:-1], [0] * 253)
    assert client.refusal() == "253 descriptors that no frame names"
    assert pool.comes_to(before - 1)


def test_descriptors_of_a_request_are_bounded(pool: Pool, witness: Client) -> None:
    client, other = pool.connect(), pool.connect()
    before = pool.descriptors()
    half = frames.HEADER.pack(lib.EB_MAX_FRAME, lib.EB_SPAWN) + b"\1"
    for at in range(6):
        client.send(half[at : at + 1], [0] * 200)
    assert client.refusal() == "more than 1024 descriptors"
    assert pool.comes_to(before - 1)
    data = frame(lib.EB_SPAWN, TRUE + option(lib.EB_TAG_FDS, u32(*range(10, 1010))))
    for at in range(4):
        other.send(data[at : at + 1], [0] * 200)
    started(other, data[4:], [0] * 200)
    assert ended(other) == 0


HALVES = {
    "header": (b"", frame(lib.EB_SPAWN, TRUE)[:3]),
    "request": (b"", frame(lib.EB_SPAWN, TRUE)[:-1]),
    "after a frame": (b"", signal_frame(0, 0) + signal_frame(0, 0)[:-1]),
    "after a command": (frame(lib.EB_SPAWN, TRUE), frame(lib.EB_SPAWN, TRUE)[:-1]),
}


@pytest.mark.parametrize("case", HALVES)
@with_arguments("--frame-timeout=100")
def test_half_a_frame_and_silence(case: str, pool: Pool, witness: Client) -> None:
    first, half = HALVES[case]
    client = pool.connect()
    if first:
        started(client, first)
        assert ended(client) == 0
    client.send(half)
    assert client.refusal() == "the rest of a frame has not come in 100 ms"
    pool.told((lib.EB_CLOSED, client.id))


@pytest.mark.slow
@with_arguments("--frame-timeout=100")
def test_half_a_greeting_and_silence(pool: Pool, witness: Client) -> None:
    for size in range(1, len(frames.OPENING)):
        client = pool.unopened()
        client.send(frames.OPENING[:size])
        assert client.frame()[0] == lib.EB_HELLO
        if size == 1:  # the NUL byte is none of a frame's
            continue
        assert client.refusal() == "the rest of a frame has not come in 100 ms"


@pytest.mark.slow
@with_arguments("--frame-timeout=2000")
def test_each_frame_has_its_own_time(pool: Pool, witness: Client) -> None:
    client = pool.connect()
    one = signal_frame(0, 0)
    client.send(one[:5])
    for _ in range(8):
        assert not select.select([client.sock], [], [], 0.3)[0]
        client.send(one[5:] + one[:5])
    client.send(one[5:])
    assert client.status("/bin/true") == 0


@with_arguments("--frame-timeout=1000")
def test_slow_start_is_no_silence(pool: Pool, public_dir: Path, witness: Client) -> None:
    program = public_dir / "program"
    shutil.copy("/bin/true", program)
    client = pool.connect()
    whole = request(str(program))
    with Guard(program) as guard:
        client.send(whole[:-1])
        assert until(lambda: unread(client) == 0)
        client.send(whole[-1:])
        guard.held()
        assert not select.select([client.sock], [], [], 1.5)[0]
        guard.release()
        started(client)
        assert ended(client) == 0


@pytest.mark.slow
@with_arguments("--frame-timeout=100")
def test_silence_between_frames_is_none(pool: Pool) -> None:
    client = pool.connect()
    assert not select.select([client.sock], [], [], 0.4)[0]
    started(client, streamed("/bin/cat", streams=0b11))
    assert not select.select([client.sock], [], [], 0.4)[0]
    assert converse(client, b"x").output == b"x"
    pool.flags = ASK
    waiting = pool.connect()
    waiting.send(request("/bin/true"))
    pool.told((lib.EB_WANT, waiting.id))
    assert not select.select([waiting.sock], [], [], 0.4)[0]
    pool.tell(lib.EB_GRANT, u32(waiting.id))
    started(waiting)


GARBAGE = {
    "unknown kind": frame(200),
    "longest length": b"\xff" * 9,
    "the server's": frame(lib.EB_END, b"\x09"),
    "GRANT": frame(lib.EB_GRANT, bytes(4)),
    "the helper's own": frame(lib.EB_SPAWNED, bytes(5)),
    "text": b"ls -al\r\n\r\n" * 10,
    "STREAMS twice": frame(lib.EB_SPAWN, TRUE + 2 * option(lib.EB_TAG_STREAMS, b"\1")),
    "no such stream": frame(lib.EB_SPAWN, TRUE + option(lib.EB_TAG_STREAMS, b"\x10")),
    "half an ON_CLOSE": frame(lib.EB_SPAWN, TRUE + option(lib.EB_TAG_ON_CLOSE, b"\1")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_every_state(case: str, pool: Pool, witness: Client) -> None:
    data = GARBAGE[case]
    fresh, used = pool.connect(), pool.connect()
    assert used.status("/bin/true") == 0
    live, streaming, full = pool.connect(), pool.connect(), pool.connect()
    stops = on_close(0)
    pids = [
        started(live, request("/bin/sleep", "100", options=[stops])),
        started(streaming, streamed("/bin/cat", streams=0b111, options=[stops])),
        started(full, streamed("/bin/sleep", "100", streams=0b1, options=[stops])),
    ]
    for _ in range(2):
        full.send(frame(lib.EB_STDIN, bytes(30_000)))
    starting = pool.connect()
    starting.send(slow("/none"))
    for client in (fresh, used, live, streaming, full, starting):
        client.send(data)
    assert starting.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
    for client in (fresh, used, live, streaming, starting):
        assert client.refusal()
    while full.frame()[0] != lib.EB_REFUSED:
        pass
    for pid in pids:
        assert gone(pid)
    pool.flags = ASK
    while pool.control.sock in select.select([pool.control.sock], [], [], 0)[0]:
        assert pool.control.frame()[0] == lib.EB_CLOSED
    waiting = pool.connect()
    waiting.send(request("/bin/true") + data)
    while (told := pool.control.frame()) != (lib.EB_WANT, u32(waiting.id)):
        assert told[0] == lib.EB_CLOSED
    pool.tell(lib.EB_GRANT, u32(waiting.id))
    kinds: list[int] = []
    while not kinds or kinds[-1] != lib.EB_REFUSED:
        kinds.append(waiting.frame()[0])
    assert kinds[0] == lib.EB_SPAWNED


def test_random_bytes(pool: Pool, witness: Client) -> None:
    numbers = random.Random(1)
    whole = streamed("/bin/cat", streams=0b111, options=[OWN_GROUP, on_close(10)])
    for _ in range(300):
        data = bytearray(whole + frame(lib.EB_STDIN, b"text") + frame(lib.EB_STDIN) + whole)
        for _ in range(numbers.randrange(1, 6)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        client = pool.connect()
        client.send(bytes(data))
        client.sock.close()
        pool.told((lib.EB_CLOSED, client.id))
    assert pool.children() == []


def test_many_small_frames_hold_up_nobody(pool: Pool, witness: Client) -> None:
    """The bytes after a frame are not moved for each frame."""
    client = pool.connect()
    many = frame(lib.EB_STDIN, bytes(8000)) + signal_frame(0, 0) * 15_000
    before = pool.cpu_seconds()
    for _ in range(20):
        client.send(many)
    assert client.status("/bin/true") == 0
    assert pool.cpu_seconds() - before < 0.1


# Scarcity


@pytest.mark.parametrize("room", range(8))
def test_no_room_for_the_streams(room: int, pool: Pool, witness: Client) -> None:
    client = pool.connect()
    before = pool.descriptors()
    with room_for(room, pool):
        client.send(streamed("/bin/cat", streams=0b111))
        failed = client.reply()
    stage = lib.EB_STAGE_FDS if room < 6 else lib.EB_STAGE_START
    assert failed == Failed(0, errno.EMFILE, stage)
    assert pool.descriptors() == before
    started(client, streamed("/bin/cat", streams=0b111))
    assert converse(client, b"x", 0b111).output == b"x"


def test_no_room_for_connections() -> None:
    """Connections that don't fit are reported, and their clients see an end before any HELLO."""
    with running(under=after("ulimit -n 20")) as pool:
        clients = [pool.unopened() for _ in range(40)]
        pool.tell(lib.EB_QUERY)
        lost = set()
        while (told := pool.control.frame())[0] == lib.EB_CLOSED:
            lost.add(told[1])
        assert 20 < len(lost) < 40
        for client in clients:
            if u32(client.id) in lost:
                assert client.closed()
            else:
                assert client.frame()[0] == lib.EB_HELLO
                client.sock.close()
                pool.told((lib.EB_CLOSED, client.id))
        assert pool.connect().status("/bin/true") == 0


# With a sanitizer, memory is another matter.
lean = pytest.mark.skipif("ERRAND_BOY_HELPER" in os.environ, reason="not the ordinary helper")


@pytest.mark.slow
@lean
def test_many_idle_connections(pool: Pool) -> None:
    count = 3000
    before = pool.private_bytes()
    clients = [pool.connect() for _ in range(count)]
    assert (pool.private_bytes() - before) / count < 1500
    assert pool.report().connections == count
    for client in clients[::300]:
        assert client.status("/bin/true") == 0
    for client in clients:
        client.sock.close()
        pool.told((lib.EB_CLOSED, client.id))


@pytest.mark.slow
@lean
def test_rest_beside_a_command_that_does_not_end(pool: Pool) -> None:
    """A burst's memory is given back, though that command is checked again and again."""
    client = pool.connect()
    script = "trap '' TERM; echo ready; exec sleep 1000"
    options = [OWN_GROUP, on_close(3_600_000)]
    pid = started(client, streamed("/bin/sh", "-c", script, streams=0b10, options=options))
    assert client.frame() == (lib.EB_STDOUT, b"ready\n")
    client.sock.close()
    before = pool.private_bytes()
    clients = [pool.connect() for _ in range(200)]
    for other in clients:
        other.send(streamed("/bin/true", streams=0b10, options=[COALESCE]))
    for other in clients:
        assert converse(other, None, 0b10, brief=True).status == 0
    burst = pool.private_bytes() - before
    for other in clients:
        other.sock.close()
    assert until(lambda: pool.private_bytes() - before < burst / 4)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@lean
def test_memory_of_live_commands(pool: Pool) -> None:
    count = 5000
    before = pool.private_bytes()
    clients = [pool.connect() for _ in range(count)]
    environment = strings(lib.EB_TAG_ENV, *["A=" + "b" * 99] * 30)
    data = request("/bin/sleep", "1000", options=[environment])
    for client in clients:
        client.send(data)
    for client in clients:
        started(client)
    # What the burst took goes back when it is over.
    assert until(lambda: (pool.private_bytes() - before) / count < 1500)
    report = pool.report()
    assert len(report.live) == report.started == count
    pool.tell(lib.EB_END, bytes([signal.SIGKILL]))
    for client in clients:
        assert ended(client) == signal.SIGKILL
    report = pool.report()
    assert (report.ended, report.live) == (count, {})
