"""The helper over real sockets: its answers. An offender may harm only itself."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, find_program, started_script
from wire import (
    COALESCE,
    HELPER,
    OWN_GROUP,
    TRUE,
    Client,
    Exited,
    Failed,
    Helper,
    Spawned,
    decode,
    frame,
    in_queue,
    on_close,
    option,
    request,
    room_for,
    signal_frame,
    slow,
    sound,
    spawn,
    strings,
    u32,
)

import errand_boy
from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.connection import Connection

MODES = {
    "private": ["--private"],
    "own": ["--private", "--own-children"],
    "posix": ["--private", "--posix-spawn"],
    "unrelated": ["--own-children"],
}
every_mode = pytest.mark.parametrize("helper", MODES, indirect=True)
owning_modes = pytest.mark.parametrize("helper", ["own", "posix", "unrelated"], indirect=True)
queueing_modes = pytest.mark.parametrize("helper", ["own", "posix"], indirect=True)
clone_modes = pytest.mark.parametrize("helper", ["private", "own"], indirect=True)


@pytest.fixture
def helper(request: pytest.FixtureRequest) -> Iterator[Helper]:
    with sound(Helper(*MODES[getattr(request, "param", "private")])) as it:
        yield it


@pytest.fixture
def witness(helper: Helper) -> Iterator[Client]:
    """A connection made before the offence, which must still work after it."""
    client = helper.connect()
    assert client.status("/bin/true") == 0
    yield client
    assert client.status("/bin/sh", "-c", "exit 3") == 3 << 8


# Greetings


def test_helper_says_its_version_before_it_is_asked(helper: Helper) -> None:
    assert helper.unopened().frame() == (lib.EB_HELLO, u32(lib.EB_VERSION))


def test_request_may_come_with_the_greeting(helper: Helper) -> None:
    client = helper.unopened()
    client.send(frames.OPENING + spawn("/bin/true"))
    assert client.frame()[0] == lib.EB_HELLO
    started = client.reply()
    assert isinstance(started, Spawned)
    assert os.waitpid(started.pid, 0)[1] == 0


def test_bytes_may_come_one_by_one(helper: Helper) -> None:
    client = helper.unopened()
    for byte in frames.OPENING + spawn("/bin/true"):
        client.send(bytes([byte]))
    assert client.frame()[0] == lib.EB_HELLO
    started = client.reply()
    assert isinstance(started, Spawned)
    assert os.waitpid(started.pid, 0)[1] == 0


@pytest.mark.root
@clone_modes
def test_all_options_at_once(helper: Helper) -> None:
    find_program("ps", "procps")
    client = helper.connect()
    cpus = max(os.sched_getaffinity(0)) // 8 + 1
    mask = sum(1 << cpu for cpu in os.sched_getaffinity(0)).to_bytes(cpus, "little")
    script = "ulimit -n; umask; pwd; echo $A; grep NoNewPrivs /proc/self/status; /usr/bin/id; "
    script += "ps -o tty= $$; nice; ionice; chrt -p $$ | grep -o 'SCHED.*'; "
    script += "cat /proc/self/oom_score_adj /proc/self/timerslack_ns; "
    script += "grep -E 'SigIgn|CapAmb|CapEff' /proc/self/status"
    read, write = os.pipe()
    directory = os.open("/usr", os.O_PATH)
    master, terminal = os.openpty()
    terminal_name = os.ttyname(terminal).removeprefix("/dev/")
    values = {
        "EXECUTABLES": strings(lib.EB_TAG_EXECUTABLES, "/none", "/bin/sh"),
        "ARGV": strings(lib.EB_TAG_ARGV, "sh", "-c", script),
        "ENV": strings(lib.EB_TAG_ENV, "A=b", "LC_ALL=C"),
        "FDS": option(lib.EB_TAG_FDS, u32(1)),
        "CWD_FD": option(lib.EB_TAG_CWD_FD),
        "CWD": frames.string(lib.EB_TAG_CWD, b"usr/lib/.."),
        "UMASK": option(lib.EB_TAG_UMASK, u32(0o27)),
        "SIGMASK": option(lib.EB_TAG_SIGMASK, bytes(8)),
        "SIGIGN": option(lib.EB_TAG_SIGIGN, bytes(8)),
        "SIGDEFAULT": option(lib.EB_TAG_SIGDEFAULT, bytes(8)),
        "SETSID": option(lib.EB_TAG_SETSID),
        "RLIMITS": option(lib.EB_TAG_RLIMITS, struct.pack("<BQQ", resource.RLIMIT_NOFILE, 77, 77)),
        "NICE": option(lib.EB_TAG_NICE, u32(1)),
        "AFFINITY": option(lib.EB_TAG_AFFINITY, mask),
        "GROUPS": option(lib.EB_TAG_GROUPS, u32(12345, 12346)),
        "GID": option(lib.EB_TAG_GID, u32(12344)),
        "UID": option(lib.EB_TAG_UID, u32(12343)),
        "ON_CLOSE": option(lib.EB_TAG_ON_CLOSE, u32(1000)),
        "NO_NEW_PRIVS": option(lib.EB_TAG_NO_NEW_PRIVS),
        "SET_RLIMITS": option(
            lib.EB_TAG_SET_RLIMITS, struct.pack("<BQQ", resource.RLIMIT_NOFILE, 66, 66)
        ),
        "CONTROLLING_TERMINAL": option(lib.EB_TAG_CONTROLLING_TERMINAL),
        "FOREGROUND": option(lib.EB_TAG_FOREGROUND),
        "NAMESPACES": option(lib.EB_TAG_NAMESPACES, u32(0x04000000)),
        "SOCKETS": option(lib.EB_TAG_SOCKETS, bytes(1)),
        "RENICE": option(lib.EB_TAG_RENICE, u32(2)),
        "SCHEDULER": option(lib.EB_TAG_SCHEDULER, u32(3, 0)),
        "IONICE": option(lib.EB_TAG_IONICE, u32(2 << 13 | 7)),
        "TIMER_SLACK": option(lib.EB_TAG_TIMER_SLACK, struct.pack("<Q", 12345)),
        "SIGNALS_DEFAULT": option(lib.EB_TAG_SIGNALS_DEFAULT, bytes(8)),
        "SIGNALS_IGNORED": option(lib.EB_TAG_SIGNALS_IGNORED, b"\4" + bytes(7)),
        "OOM_SCORE_ADJ": option(lib.EB_TAG_OOM_SCORE_ADJ, u32(123)),
        "ROOT": frames.string(lib.EB_TAG_ROOT, b".."),
        "CAPABILITIES": option(lib.EB_TAG_CAPABILITIES, b"\0\x20" + bytes(6)),
        "QUEUE": in_queue(1, 1),
    }
    # A session's leader may not change its group; only a daemon's helper has streams; not every
    # system has cgroups or Landlock.
    absent = {"PGROUP", "STREAMS", "NULL", "COALESCE", "CGROUP", "SANDBOX"}
    absent |= {"SUPERVISE", "LIMITS", "TERMINAL"}
    assert set(values) == set(TAGS) - absent
    with open(read) as stream:
        client.send(frame(lib.EB_SPAWN, *reversed(values.values())), [write, directory, terminal])
        for fd in (write, directory, terminal):
            os.close(fd)
        started = client.reply()
        assert isinstance(started, Spawned)
        if not started.by_helper:
            os.waitpid(started.pid, 0)
        assert [line.strip() for line in stream] == [
            "66",
            "0027",
            "/usr",
            "b",
            "NoNewPrivs:\t1",
            "uid=12343 gid=12344 groups=12344,12345,12346",
            terminal_name,
            "3",
            "best-effort: prio 7",
            "SCHED_BATCH",
            "123",
            "12345",
            "SigIgn:\t0000000000000004",
            "CapEff:\t0000000000002000",
            "CapAmb:\t0000000000002000",
        ]
    os.close(master)


# Queues


def queued(*argv: str, number: int = 7, places: int = 1, brief: bool = False) -> bytes:
    """A request that says which queue the command is in; it ends with its connection."""
    options = [in_queue(number, places), option(lib.EB_TAG_SIGMASK, bytes(8)), OWN_GROUP]
    return request(*argv, options=[*options, on_close(1000), *([COALESCE] if brief else [])])


def has_said_nothing(helper: Helper, clients: list[Client]) -> bool:
    """Whether nothing has come to any of them, when the helper has seen all that was sent."""
    assert helper.connect().status("/bin/true") == 0
    return not select.select([client.sock for client in clients], [], [], 0)[0]


def write_line(path: Path) -> list[str]:
    return ["/bin/sh", "-c", f"echo >> {path}"]


@pytest.fixture
def queue(helper: Helper) -> list[Client]:
    """Connections of a queue with one place; the first one's command has it."""
    clients = [helper.connect() for _ in range(4)]
    clients[0].send(queued("/bin/sleep", "1000"))
    assert isinstance(clients[0].reply(), Spawned)
    return clients


@queueing_modes
def test_one_of_a_queue_begins_when_another_ends(helper: Helper, queue: list[Client]) -> None:
    for client in queue[1:]:
        client.send(queued("/bin/sleep", "1000"))
    assert has_said_nothing(helper, queue)
    for client, following in itertools.pairwise(queue):
        client.send(signal_frame(0, signal.SIGKILL))
        assert isinstance(client.reply(), Exited)
        assert isinstance(following.reply(), Spawned)
        assert has_said_nothing(helper, queue)


@queueing_modes
def test_failing_start_gives_its_place_to_the_next(helper: Helper, queue: list[Client]) -> None:
    for client, program in zip(queue[1:], ("/none", "/none", "/bin/true"), strict=True):
        client.send(queued(program))
    assert has_said_nothing(helper, queue)
    queue[0].send(signal_frame(0, signal.SIGKILL))
    assert isinstance(queue[1].reply(), Failed)
    assert isinstance(queue[2].reply(), Failed)
    assert isinstance(queue[3].reply(), Spawned)


@queueing_modes
def test_queues_do_not_wait_for_each_other(helper: Helper, queue: list[Client]) -> None:
    queue[1].send(queued("/bin/true"))
    queue[2].send(queued("/bin/true", number=8))
    assert isinstance(queue[2].reply(), Spawned)
    assert isinstance(queue[2].reply(), Exited)
    assert has_said_nothing(helper, queue)


@queueing_modes
def test_who_leaves_while_it_waits_is_not_begun(
    helper: Helper, queue: list[Client], tmp_path: Path
) -> None:
    queue[1].send(queued(*write_line(tmp_path / "second")))
    queue[2].send(queued(*write_line(tmp_path / "third")))
    assert has_said_nothing(helper, queue)
    before = helper.descriptors()
    queue[1].sock.close()
    assert helper.comes_to(before - 1)
    queue[0].send(signal_frame(0, signal.SIGKILL))
    assert isinstance(queue[2].reply(), Spawned)
    assert isinstance(queue[2].reply(), Exited)
    assert os.listdir(tmp_path) == ["third"]


@queueing_modes
def test_place_of_a_closed_connection(helper: Helper, queue: list[Client]) -> None:
    queue[1].send(queued("/bin/true"))
    assert has_said_nothing(helper, queue)
    queue[0].sock.close()
    assert isinstance(queue[1].reply(), Spawned)


@queueing_modes
def test_end_tells_of_the_place(helper: Helper) -> None:
    clients = [helper.connect() for _ in range(4)]
    for client in clients[:3]:
        client.send(queued("/bin/sleep", "1000", places=3, brief=True))
        assert has_said_nothing(helper, clients)  # and has a place before the next one asks
    clients[3].send(queued("/bin/true", places=3, brief=True))
    assert has_said_nothing(helper, clients)
    for client, place in ((clients[1], 2), (clients[3], 2), (clients[2], 3), (clients[0], 1)):
        if client is not clients[3]:
            client.send(signal_frame(0, signal.SIGKILL))
        kind, payload = client.frame()
        assert (kind, payload[-1]) == (lib.EB_EXITED, place)


# Offenders

BAD_OPENINGS = {
    "text": (b"ls -al\r\n\r\n", "starts with a NUL byte"),
    "no HELLO": (b"\0" + spawn("/bin/true"), "first frame must be HELLO"),
    "HELLO without a version": (b"\0" + frame(lib.EB_HELLO), "first frame must be HELLO"),
    "long HELLO": (b"\0" + frame(lib.EB_HELLO, bytes(5)), "first frame must be HELLO"),
    "HELLO of another version": (
        b"\0" + frame(lib.EB_HELLO, u32(lib.EB_VERSION + 1)),
        f"speaks version {lib.EB_VERSION} of the protocol, not {lib.EB_VERSION + 1}",
    ),
    "longest frame and a byte": (
        b"\0" + frames.HEADER.pack(lib.EB_MAX_FRAME + 1, lib.EB_HELLO),
        "frame of more than",
    ),
}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_bad_opening_is_refused(case: str, helper: Helper, witness: Client) -> None:
    data, reason = BAD_OPENINGS[case]
    client = helper.unopened()
    client.send(data)
    assert client.frame()[0] == lib.EB_HELLO
    assert reason in client.refusal()


BAD_FRAMES = {
    "second HELLO": (frames.HELLO, "unknown frame kind 1"),
    "ADOPT on a connection": (frame(lib.EB_ADOPT), "ADOPT is not allowed on this connection"),
    "SIGNAL without a number": (frame(lib.EB_SIGNAL), "SIGNAL with a payload of 0 bytes"),
    "long SIGNAL": (frame(lib.EB_SIGNAL, bytes(9)), "SIGNAL with a payload of 9 bytes"),
    "header of the longest frame and a byte": (
        frames.HEADER.pack(lib.EB_MAX_FRAME + 1, lib.EB_SPAWN),
        "frame of more than",
    ),
    "header of the longest length there is": (
        frames.HEADER.pack(0xFFFFFFFF, lib.EB_SPAWN),
        "frame of more than",
    ),
    "header alone of a frame that is not for us": (
        frames.HEADER.pack(lib.EB_MAX_FRAME, lib.EB_ADOPT),
        "ADOPT is not allowed on this connection",
    ),
    **{
        f"kind {kind}": (frame(kind), f"unknown frame kind {kind}")
        for kind in (0, 5, lib.EB_SPAWNED, lib.EB_REFUSED, 255)
    },
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_bad_frame_is_refused(case: str, helper: Helper, witness: Client) -> None:
    data, reason = BAD_FRAMES[case]
    client = helper.connect()
    client.send(data)
    assert reason in client.refusal()


EXACT = {
    "UMASK": 4,
    "SIGMASK": 8,
    "SIGIGN": 8,
    "SIGDEFAULT": 8,
    "PGROUP": 4,
    "NICE": 4,
    "GID": 4,
    "UID": 4,
}
EMPTY = ("CWD_FD", "SETSID")
LISTS = {"EXECUTABLES": lib.EB_TAG_EXECUTABLES, "ARGV": lib.EB_TAG_ARGV, "ENV": lib.EB_TAG_ENV}
TAGS = {
    name.removeprefix("EB_TAG_"): getattr(lib, name)
    for name in dir(lib)
    if name.startswith("EB_TAG_") and name != "EB_TAG_END"
}


def with_list(name: str, value: bytes) -> bytes:
    """A payload in which one string list has this value and all others are good."""
    rest = TRUE if name == "ENV" else b""
    if name == "EXECUTABLES":
        rest = strings(lib.EB_TAG_ARGV, "true")
    elif name == "ARGV":
        rest = strings(lib.EB_TAG_EXECUTABLES, "/bin/true")
    return rest + option(LISTS[name], value)


BAD_REQUESTS = {
    "nothing": (b"", "EXECUTABLES and ARGV are required"),
    "no ARGV": (strings(lib.EB_TAG_EXECUTABLES, "/bin/true"), "ARGV are required"),
    "no EXECUTABLES": (strings(lib.EB_TAG_ARGV, "true"), "EXECUTABLES and ARGV are required"),
    "half an option header": (TRUE + b"\3\0", "longer than its frame"),
    "option longer than its frame": (
        TRUE + struct.pack("<BI", lib.EB_TAG_UMASK, 5) + bytes(4),
        "longer than its frame",
    ),
    "option of the longest length there is": (
        TRUE + struct.pack("<BI", lib.EB_TAG_ENV, 0xFFFFFFFF),
        "longer than its frame",
    ),
    **{
        f"unknown tag {tag}": (TRUE + option(tag), f"unknown option {tag}")
        for tag in (0, lib.EB_TAG_END, 255)
    },
    **{f"{name} twice": (2 * option(tag), f"{name}: given twice") for name, tag in TAGS.items()},
    **{
        f"{name} of {size} bytes": (TRUE + option(TAGS[name], bytes(size)), f"{name}: bad length")
        for name, exact in EXACT.items()
        for size in (0, exact - 1, exact + 1)
    },
    **{
        f"{name} with a value": (TRUE + option(TAGS[name], b"\0"), f"{name}: bad length")
        for name in EMPTY
    },
    **{
        f"{name}, {case}": (with_list(name, value), f"{name}: not a string list")
        for name in LISTS
        for case, value in {
            "no count": b"\0\0\0",
            "count that nothing follows": u32(1),
            "count above its strings": u32(2) + b"a\0",
            "count below its strings": u32(1) + b"a\0b\0",
            "greatest count there is": u32(0xFFFFFFFF) + b"a\0",
            "string without its NUL": u32(1) + b"a",
            "bytes after the last string": u32(1) + b"a\0b",
            "bytes after no string": u32(0) + b"\0",
        }.items()
    },
    # Nobody would know of its end.
    **{
        f"{name} of the caller's own": (
            TRUE + option(TAGS[name], value),
            f"option {name} needs a helper that owns its children",
        )
        for name, value in (("STREAMS", b"\2"), ("COALESCE", b""))
    },
    "CWD empty": (TRUE + option(lib.EB_TAG_CWD), "CWD: not one string"),
    "CWD without its NUL": (TRUE + option(lib.EB_TAG_CWD, b"/"), "CWD: not one string"),
    "CWD of two strings": (TRUE + option(lib.EB_TAG_CWD, b"/\0/\0"), "CWD: not one string"),
    "FDS of 3 bytes": (TRUE + option(lib.EB_TAG_FDS, bytes(3)), "FDS: bad length"),
    "FDS, one too many": (
        TRUE + option(lib.EB_TAG_FDS, u32(*range(lib.EB_MAX_FDS + 1))),
        "FDS: bad length",
    ),
    "FDS equal": (TRUE + option(lib.EB_TAG_FDS, u32(1, 1)), "not ascending"),
    "FDS descending": (TRUE + option(lib.EB_TAG_FDS, u32(2, 1)), "not ascending"),
    "FDS negative": (TRUE + option(lib.EB_TAG_FDS, u32(0xFFFFFFFF)), "not ascending"),
    "RLIMITS of 16 bytes": (TRUE + option(lib.EB_TAG_RLIMITS, bytes(16)), "RLIMITS: bad length"),
    "RLIMITS, one too many": (
        TRUE + option(lib.EB_TAG_RLIMITS, bytes(17 * (lib.EB_MAX_RLIMITS + 1))),
        "RLIMITS: bad length",
    ),
    "RLIMITS of no resource": (
        TRUE + option(lib.EB_TAG_RLIMITS, struct.pack("<BQQ", lib.EB_MAX_RLIMITS, 0, 0)),
        "RLIMITS: no such resource",
    ),
    **{
        f"QUEUE of {places} places": (
            TRUE + in_queue(1, places),
            "QUEUE: no such number of places",
        )
        for places in (0, lib.EB_MAX_PLACES + 1)
    },
    "AFFINITY empty": (TRUE + option(lib.EB_TAG_AFFINITY), "AFFINITY: bad length"),
    "AFFINITY too long": (
        TRUE + option(lib.EB_TAG_AFFINITY, bytes(lib.EB_MAX_AFFINITY + 1)),
        "AFFINITY: bad length",
    ),
    "GROUPS of 5 bytes": (TRUE + option(lib.EB_TAG_GROUPS, bytes(5)), "GROUPS: bad length"),
    "GROUPS, one too many": (
        TRUE + option(lib.EB_TAG_GROUPS, bytes(4 * (lib.EB_MAX_GROUPS + 1))),
        "GROUPS: bad length",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_refused(case: str, helper: Helper, witness: Client) -> None:
    payload, reason = BAD_REQUESTS[case]
    client = helper.connect()
    client.send(frame(lib.EB_SPAWN, payload))
    refusal = client.refusal()
    assert refusal.startswith("malformed SPAWN: ")
    assert reason in refusal


@pytest.mark.parametrize(
    "named, sent, reason",
    [
        (1, 0, "1 descriptors named, 0 sent"),
        (3, 2, "3 descriptors named, 2 sent"),
        (0, 1, "1 descriptors that no frame names"),
        (2, 5, "3 descriptors that no frame names"),
    ],
)
@clone_modes
def test_wrong_number_of_descriptors(
    named: int, sent: int, reason: str, helper: Helper, witness: Client
) -> None:
    client = helper.connect()
    client.send(spawn("/bin/true", targets=range(10, 10 + named)), [0] * sent)
    kind, payload = client.frame()
    while kind != lib.EB_REFUSED:  # those that are too many show when the frame has been served
        started = decode(kind, payload)
        if isinstance(started, Spawned) and not started.by_helper:
            os.waitpid(started.pid, 0)
        kind, payload = client.frame()
    assert reason in payload.decode()
    assert client.closed()


@pytest.mark.parametrize("count", [1, 253])
def test_descriptors_with_a_frame_that_takes_none(
    count: int, helper: Helper, witness: Client
) -> None:
    client = helper.connect()
    client.send(signal_frame(1, 0), [0] * count)
    assert f"{count} descriptors that no frame names" in client.refusal()


@pytest.mark.parametrize("data", [b"\0", b"\5", frames.HEADER.pack(9, lib.EB_SPAWN), None])
@pytest.mark.parametrize("fds", [0, 253])
def test_truncated_frame_then_silence_then_close(
    data: bytes | None, fds: int, helper: Helper, witness: Client
) -> None:
    before = helper.descriptors()
    client = helper.connect()
    client.send(spawn("/bin/true")[:-1] if data is None else data, [0] * fds)
    assert witness.status("/bin/true") == 0
    assert helper.descriptors() == before + 1 + fds
    client.sock.close()
    assert helper.comes_to(before)


@pytest.mark.parametrize(
    "data, reason",
    [
        (spawn("/bin/true"), "SPAWN is not allowed on this connection"),
        (frame(lib.EB_SIGNAL, bytes(8)), "SIGNAL is not allowed on this connection"),
        (frame(lib.EB_ADOPT), "ADOPT came without a descriptor"),
        (frame(lib.EB_ADOPT, b"\0"), "ADOPT with a payload of 1 bytes"),
        (frame(99), "unknown frame kind 99"),
    ],
)
def test_offence_on_the_control_socket_ends_no_connection(
    data: bytes, reason: str, helper: Helper
) -> None:
    client = helper.connect()
    helper.control.send(data)
    assert reason in helper.control.refusal()
    assert client.status("/bin/true") == 0
    assert not helper.ended(0)
    helper.close()


@pytest.mark.parametrize("kind", ["file", "pipe", "unconnected socket", "socket of a dead peer"])
def test_adopted_descriptor_that_is_no_connection(
    kind: str, helper: Helper, witness: Client
) -> None:
    before = helper.descriptors()
    if kind == "file":
        with tempfile.TemporaryFile() as file:
            helper.adopt(file.fileno())
    elif kind == "pipe":
        for fd in os.pipe():
            helper.adopt(fd)
            os.close(fd)
    elif kind == "unconnected socket":
        with socket.socket(socket.AF_UNIX) as sock:
            helper.adopt(sock.fileno())
    else:
        ours, theirs = socket.socketpair()
        ours.close()
        with theirs:
            helper.adopt(theirs.fileno())
    assert witness.status("/bin/true") == 0
    assert helper.comes_to(before)


@pytest.mark.parametrize("arguments, status", [(["--nonsense"], 2), ([], 1)])
def test_helper_started_by_hand_says_so(arguments: list[str], status: int) -> None:
    done = subprocess.run([HELPER, *arguments], stderr=subprocess.PIPE, text=True)
    assert done.returncode == status
    assert done.stderr.startswith("errand-boy-helper: ")


@pytest.mark.parametrize("helper", ["private", "own", "posix"], indirect=True)
def test_sigterm_closes_what_is_at_rest_and_says_that_nothing_was_read(helper: Helper) -> None:
    client = helper.connect()
    assert client.status("/bin/true") == 0
    os.kill(helper.pid, signal.SIGTERM)
    assert client.frame() == (lib.EB_UNREAD, b"")
    assert client.closed()
    assert helper.control.closed()
    assert helper.ended()
    helper.close()


@owning_modes
def test_command_that_runs_gets_its_signal_after_sigterm(helper: Helper) -> None:
    client = helper.connect()
    started = client.run("/bin/sleep", "60")
    assert isinstance(started, Spawned)
    os.kill(helper.pid, signal.SIGTERM)
    if helper.private:
        with pytest.raises(BrokenPipeError):
            while True:  # until it has noticed
                helper.unopened()
    client.send(signal_frame(started.pid, signal.SIGKILL))
    ended = client.reply()
    assert isinstance(ended, Exited)
    assert ended.status == signal.SIGKILL
    if helper.private:
        assert client.frame() == (lib.EB_UNREAD, b"")
        assert helper.ended()
    else:  # it is for its server to say when it is to end
        assert client.status("/bin/true") == 0
    helper.close()


@pytest.mark.parametrize("helper", MODES, indirect=True)
def test_request_of_another_process_is_refused_by_a_private_helper(helper: Helper) -> None:
    client = helper.connect()
    pid = os.fork()
    if pid == 0:
        try:
            client.send(spawn("/bin/true"))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    if helper.private:
        assert "SPAWN from another sender than process" in client.refusal()
        assert helper.ended()
    else:
        assert isinstance(client.reply(), Spawned)
        assert isinstance(client.reply(), Exited)
    helper.close()


# Descriptors


def test_descriptors_arrive_in_order_over_several_sends(helper: Helper, witness: Client) -> None:
    """The kernel takes 253 with each send."""
    count = 2 * lib.EB_MAX_FDS_PER_SEND + 94
    most = lib.EB_MAX_FDS_PER_SEND
    names = [f"errand-boy-{number}" for number in range(count)]
    fds = [os.memfd_create(name) for name in names]
    read, write = os.pipe()
    try:
        client = helper.connect()
        data = spawn("/bin/ls", "-l", "/proc/self/fd", targets=[1, *range(1000, 1000 + count)])
        sent = [write, *fds]
        for start in range(0, len(sent), most):
            last = start + most >= len(sent)
            client.send(data if last else data[:1], sent[start : start + most])
            data = data[1:]
        started = client.reply()
        os.close(write)
        assert isinstance(started, Spawned)
        with open(read) as stream:
            lines = [line.rpartition(" -> ") for line in stream if " -> " in line]
        assert os.waitpid(started.pid, 0)[1] == 0
    finally:
        for fd in fds:
            os.close(fd)
    seen = {before.split()[-1]: target.strip() for before, _, target in lines}
    assert sum(int(fd) >= 1000 for fd in seen) == count
    for number, name in enumerate(names):
        assert seen[str(1000 + number)] == f"/memfd:{name} (deleted)"


def test_client_sends_no_descriptor_before_the_frame_that_names_it() -> None:
    """The helper reads at any time, and descriptors with the greeting would belong to no frame."""
    count = 2 * lib.EB_MAX_FDS_PER_SEND + 94
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    with theirs:
        connection.open()
        connection.send(spawn("/bin/true", targets=range(count)), [0] * count)
        connection.close()
        received = 0
        greeting = len(frames.OPENING)
        while greeting:
            data, fds, *_ = socket.recv_fds(theirs, greeting, lib.EB_MAX_FDS_PER_SEND)
            assert not fds, f"{len(fds)} with {data!r}"
            greeting -= len(data)
        while True:
            data, fds, *_ = socket.recv_fds(theirs, 4096, lib.EB_MAX_FDS_PER_SEND)
            for fd in fds:
                os.close(fd)
            received += len(fds)
            if not data:
                break
        assert received == count


def test_first_command_of_a_connection_may_pass_many_descriptors() -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(600)]
    try:
        for _ in range(20):
            errand_boy.stop()
            errand_boy.run(["true"], pass_fds=fds, check=True)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("room", range(5))
@every_mode
def test_no_room_for_what_is_sent(room: int, helper: Helper, witness: Client) -> None:
    client = helper.connect()
    before = helper.descriptors()
    with room_for(room, helper):
        failed = client.run("/bin/true", fds=[0] * 5, targets=range(20, 25))
    assert failed == Failed(0, errno.EMFILE, lib.EB_STAGE_FDS)
    assert helper.descriptors() == before
    assert client.status("/bin/true") == 0


@pytest.mark.parametrize("room", range(2))
@clone_modes
def test_no_room_for_the_start_itself(room: int, helper: Helper, witness: Client) -> None:
    client = helper.connect()
    before = helper.descriptors()
    with room_for(room, helper):
        failed = client.run("/bin/true")
    assert failed == Failed(0, errno.EMFILE, lib.EB_STAGE_START)
    assert helper.descriptors() == before
    assert client.status("/bin/true") == 0


def test_no_room_for_a_connection(helper: Helper, witness: Client) -> None:
    with room_for(0, helper):
        assert helper.unopened().closed()
    assert helper.connect().status("/bin/true") == 0


# One command at a time


@clone_modes
def test_signal_without_a_child_is_late_not_wrong(helper: Helper, witness: Client) -> None:
    client = helper.connect()
    for pid in (helper.pid, os.getpid(), 0, -1, 1):
        client.send(signal_frame(pid, signal.SIGKILL))
        assert client.status("/bin/true") == 0


@owning_modes
def test_signal_reaches_no_other_connections_child(helper: Helper, witness: Client) -> None:
    ours, theirs = helper.connect(), helper.connect()
    pids = []
    for client in (ours, theirs):
        started = client.run("/bin/sleep", "100")
        assert isinstance(started, Spawned)
        pids.append(started.pid)
    for pid in (pids[1], helper.pid, os.getpid(), -1, -pids[0]):
        ours.send(signal_frame(pid, signal.SIGKILL))
    for client, pid in zip((ours, theirs), pids, strict=True):
        client.send(signal_frame(pid, signal.SIGTERM))
        ended = client.reply()
        assert isinstance(ended, Exited)
        assert ended.status == signal.SIGTERM


def test_requests_in_a_row_are_answered_in_order(helper: Helper, witness: Client) -> None:
    client = helper.connect()
    read, write = os.pipe()
    names = [f"command {number}\n" for number in range(20)]
    for name in names:
        client.send(spawn("/bin/echo", name.strip(), targets=[1]), [write])
    os.close(write)
    pids = []
    for _ in names:
        started = client.reply()
        assert isinstance(started, Spawned)
        pids.append(started.pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(names)
    with open(read) as stream:
        assert sorted(stream) == sorted(names)


def test_requests_in_one_write_are_answered_in_order(helper: Helper, witness: Client) -> None:
    client = helper.connect()
    client.send(spawn("/none") + spawn("/bin/true") + spawn("/bin"))
    seen = [client.reply() for _ in range(3)]
    for answer in seen:
        assert not isinstance(answer, Exited)
        os.waitpid(answer.pid, 0)
    kinds = [answer.errno if isinstance(answer, Failed) else 0 for answer in seen]
    assert kinds == [errno.ENOENT, 0, errno.EACCES]


def test_request_after_one_that_is_too_long_keeps_its_descriptors(helper: Helper) -> None:
    """Bytes of one frame and descriptors of the next may be read together."""
    client = helper.connect()
    too_many = ["a"] * lib.EB_MAX_STRINGS
    first = spawn("/bin/true", *too_many)
    client.send(first[:-1])
    assert helper.connect().status("/bin/true") == 0
    os.kill(helper.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, helper.pid, os.WSTOPPED)
    client.send(first[-1:])
    client.send(spawn("/bin/true", targets=[0]), [0])
    os.kill(helper.pid, signal.SIGCONT)
    assert client.reply() == Failed(0, errno.E2BIG, lib.EB_STAGE_EXEC)
    started = client.reply()
    assert isinstance(started, Spawned)
    assert os.waitpid(started.pid, 0)[1] == 0


@every_mode
def test_connection_closed_for_writing_still_gets_its_answer(
    helper: Helper, witness: Client
) -> None:
    for argv in (["/bin/true"], ["/none"]):
        client = helper.connect()
        client.send(spawn(*argv))
        client.sock.shutdown(socket.SHUT_WR)
        answer = client.reply()
        if isinstance(answer, Spawned | Failed) and answer.pid and not is_owner(helper):
            os.waitpid(answer.pid, 0)


@pytest.mark.slow
@clone_modes
def test_connection_closed_during_the_start(helper: Helper, witness: Client) -> None:
    """The new process is still reading the request at that time."""
    before = helper.descriptors()
    client = helper.connect()
    client.send(slow("/bin/true"))
    client.sock.close()
    assert witness.status("/bin/true") == 0
    assert helper.comes_to(before)
    if not is_owner(helper):
        os.waitpid(-1, 0)


def is_owner(helper: Helper) -> bool:
    """Whether new processes are the helper's own children."""
    client = helper.connect()
    started = client.run("/bin/true")
    assert isinstance(started, Spawned)
    if started.by_helper:
        client.reply()
    else:
        os.waitpid(started.pid, 0)
    client.sock.close()
    return started.by_helper


# The helper's own children


@owning_modes
def test_second_request_while_the_command_runs_is_refused(helper: Helper, witness: Client) -> None:
    client = helper.connect()
    started = client.run("/bin/sleep", "100")
    assert isinstance(started, Spawned)
    client.send(spawn("/bin/true"))
    assert client.refusal() == f"SPAWN while this connection's command {started.pid} is running"
    assert started.pid in helper.children()
    os.kill(started.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("helper", ["own", "unrelated"], indirect=True)
def test_end_and_next_request_at_once(helper: Helper) -> None:
    """An older event of epoll must not be taken for the outcome of the next start."""
    other, client, witness = helper.connect(), helper.connect(), helper.connect()
    first = other.run("/bin/sleep", "100")
    assert isinstance(first, Spawned)
    second = slow("/bin/true")
    client.send(second[:-1])
    assert witness.status("/bin/true") == 0
    client.send(second[-1:] + slow("/none", 2000))  # read together
    assert witness.run("/none") == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
    os.kill(helper.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, helper.pid, os.WSTOPPED)
    os.kill(first.pid, signal.SIGKILL)
    for pid in [first.pid, *helper.children()]:
        pidfd = os.pidfd_open(pid)
        assert select.select([pidfd], [], [], PATIENCE)[0]
        os.close(pidfd)
    os.kill(helper.pid, signal.SIGCONT)
    assert isinstance(other.reply(), Exited)
    assert isinstance(client.reply(), Spawned)
    kind, payload = client.frame()
    if kind == lib.EB_REFUSED:  # it need not have been seen that the first one has ended
        assert payload.startswith(b"SPAWN while")
    else:
        assert kind == lib.EB_EXITED
        assert client.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)


@pytest.mark.parametrize(
    "script, status",
    [
        ("exit 0", 0),
        ("exit 3", 3 << 8),
        ("exit 255", 255 << 8),
        ("kill -TERM $$", signal.SIGTERM),
        ("kill -KILL $$", signal.SIGKILL),
        ("kill -USR2 $$", signal.SIGUSR2),
    ],
)
@owning_modes
def test_wait_status(script: str, status: int, helper: Helper) -> None:
    assert helper.connect().status("/bin/sh", "-c", script) == status


@pytest.mark.slow
@owning_modes
def test_resource_usage_is_the_commands(helper: Helper) -> None:
    client = helper.connect()
    burn = "import os\nwhile sum(os.times()[:2]) < 0.3: pass\nx = bytearray(60 << 20)"
    used = []
    for argv in ((sys.executable, "-S", "-c", burn), ("/bin/true",)):
        assert isinstance(client.run(*argv), Spawned)
        ended = client.reply()
        assert isinstance(ended, Exited)
        used.append(ended.usage)
    user, system, resident, minor, *_ = used[0]
    assert 290_000 < user + system < 5_000_000
    assert 60 << 10 < resident < 200 << 10
    assert minor > 15_000
    assert used[1][0] + used[1][1] < 290_000
    assert used[1][2] < 60 << 10


@owning_modes
def test_signals_reach_the_child(helper: Helper) -> None:
    client = helper.connect()
    read, write = os.pipe()
    script = "trap 'echo got' USR1; echo ready; while :; do sleep 0.01; done"
    started = client.run("/bin/sh", "-c", script, fds=[write], targets=[1])
    os.close(write)
    assert isinstance(started, Spawned)
    with open(read) as stream:
        assert stream.readline() == "ready\n"
        client.send(signal_frame(started.pid, signal.SIGUSR1))
        assert stream.readline() == "got\n"
    for number in (0, 65, -1, signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL):
        client.send(signal_frame(started.pid, number))
    ended = client.reply()
    assert isinstance(ended, Exited)
    assert ended.status == signal.SIGKILL


@owning_modes
def test_connection_is_used_again(helper: Helper) -> None:
    client = helper.connect()
    for number in range(50):
        assert client.status("/bin/sh", "-c", f"exit {number}") == number << 8
        failed = client.run("/none")
        assert failed == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)


@owning_modes
def test_child_outlives_its_connection(helper: Helper, witness: Client) -> None:
    client = helper.connect()
    started = client.run("/bin/sleep", "100")
    assert isinstance(started, Spawned)
    client.sock.close()
    assert witness.status("/bin/true") == 0
    assert started.pid in helper.children()
    os.kill(started.pid, signal.SIGKILL)


# Clients that do not read


@pytest.fixture
def deaf(request: pytest.FixtureRequest, helper: Helper) -> tuple[Client, int]:
    """A client that has sent as much as possible and read nothing, and its requests."""
    client = helper.connect()
    one = spawn("/none")
    many = one * 50
    sent = 0
    while select.select([], [client.sock], [], 0.5)[1]:
        sent += client.sock.send(many[sent % len(one) :], socket.MSG_DONTWAIT)
    return client, sent // len(one)


own_mode = pytest.mark.parametrize("helper", ["own"], indirect=True)


@pytest.mark.slow
@own_mode
def test_client_that_does_not_read_holds_up_nobody(
    helper: Helper, witness: Client, deaf: tuple[Client, int]
) -> None:
    client, count = deaf
    for _ in range(50):
        assert witness.status("/bin/true") == 0
    for _ in range(count):
        assert client.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)


@pytest.mark.slow
@pytest.mark.parametrize("shut", [None, socket.SHUT_WR, socket.SHUT_RDWR])
@own_mode
def test_client_that_does_not_read_costs_no_processor_time(
    shut: int | None, helper: Helper, witness: Client, deaf: tuple[Client, int]
) -> None:
    if shut is not None:
        deaf[0].sock.shutdown(shut)
    assert witness.status("/bin/true") == 0
    before = helper.cpu_seconds()
    assert witness.status("/bin/sleep", "0.5") == 0
    assert helper.cpu_seconds() - before < 0.2


@pytest.mark.slow
@own_mode
def test_client_that_does_not_read_goes_away(
    helper: Helper, witness: Client, deaf: tuple[Client, int]
) -> None:
    before = helper.descriptors()
    deaf[0].sock.close()
    assert helper.comes_to(before - 1)


# The end


@every_mode
def test_helper_ends_with_its_control_socket(helper: Helper) -> None:
    assert helper.connect().status("/bin/true") == 0
    helper.close()
    assert helper.ended()


@pytest.mark.parametrize("helper", ["private", "own", "posix"], indirect=True)
def test_helper_takes_no_request_after_the_control_socket(helper: Helper) -> None:
    client = helper.connect()
    helper.control.sock.close()
    assert client.frame() == (lib.EB_UNREAD, b"")
    assert client.closed()
    assert helper.ended()


@pytest.mark.parametrize("helper", ["own", "posix"], indirect=True)
def test_helper_stays_with_its_command_after_the_control_socket(helper: Helper) -> None:
    client, idle = helper.connect(), helper.connect()
    started = client.run("/bin/sleep", "60")
    assert isinstance(started, Spawned)
    helper.control.sock.shutdown(socket.SHUT_WR)
    assert helper.control.frame() == (lib.EB_STAYS, b"")
    assert helper.control.closed()
    assert idle.frame() == (lib.EB_UNREAD, b"")
    client.send(signal_frame(started.pid, signal.SIGTERM))
    ended = client.reply()
    assert isinstance(ended, Exited)
    assert ended.status == signal.SIGTERM
    assert helper.ended()
    helper.close()


@pytest.mark.parametrize("mode", ["clone", "posix"])
def test_helper_ends_with_its_caller_whoever_holds_its_sockets(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", mode)
    script = """
        start()
        holder = os.fork()
        if holder == 0:
            signal.pause()
        report([helper_pid(), holder])
        sys.stdin.read()
    """
    with started_script(script) as process:
        assert process.stdout is not None
        pid, holder = json.loads(process.stdout.readline())
        pidfd = os.pidfd_open(pid)
        process.kill()
        process.wait()
        assert select.select([pidfd], [], [], PATIENCE)[0]
        os.close(pidfd)
        os.kill(holder, signal.SIGKILL)
