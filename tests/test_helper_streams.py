"""Streamed and coalesced commands of a daemon's helper, as docs/protocol.md says."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
from conftest import until
from guard import Guard
from wire import (
    COALESCE,
    OWN_GROUP,
    Client,
    Failed,
    Pool,
    converse,
    ended,
    frame,
    gone,
    option,
    request,
    running,
    signal_frame,
    slow,
    started,
    streamed,
)

from errand_boy._native import lib
from errand_boy._wire import frames as _frames

MIB = 1 << 20


@pytest.mark.parametrize("streams", range(1, 8))
def test_each_choice_of_streams(streams: int, pool: Pool) -> None:
    client = pool.connect()
    files = [os.memfd_create(str(number)) for number in range(3)]
    os.write(files[0], b"input")
    os.lseek(files[0], 0, os.SEEK_SET)
    passed = [number for number in range(3) if not streams >> number & 1]
    script = "cat; echo error >&2; cat >&2; exit 3"
    data = streamed("/bin/sh", "-c", script, streams=streams, targets=passed)
    for _ in range(2):
        os.lseek(files[0], 0, os.SEEK_SET)
        started(client, data, [files[number] for number in passed])
        result = converse(client, b"input" if streams & 1 else None, streams)
        texts = [b"", b"", b""]
        for number in passed:
            texts[number] = os.pread(files[number], 100, 0)
            if number:
                os.ftruncate(files[number], 0)
                os.lseek(files[number], 0, os.SEEK_SET)
        assert result.status == 3 << 8
        assert (result.output or texts[1]) == b"input"
        assert (result.error or texts[2]) == b"error\n"
    for fd in files:
        os.close(fd)


def test_streams_of_nothing(pool: Pool) -> None:
    client = pool.connect()
    started(client, streamed("/bin/true", streams=0))
    assert ended(client) == 0


def test_empty_input(pool: Pool) -> None:
    client = pool.connect()
    started(client, streamed("/bin/cat", streams=0b111))
    assert converse(client, b"", 0b111) == (b"", b"", 0)


def test_much_both_ways(pool: Pool) -> None:
    client = pool.connect()
    text = os.urandom(MIB) * 10
    started(client, streamed("/bin/cat", streams=0b11))
    result = converse(client, text)
    assert result.status == 0
    assert result.output == text
    assert client.status("/bin/true") == 0


def test_much_both_ways_many_times_over(pool: Pool) -> None:
    client = pool.connect()
    text = os.urandom(300_000)
    for _ in range(20):
        started(client, streamed("/bin/sh", "-c", "tee /dev/stderr", streams=0b111))
        result = converse(client, text, 0b111)
        assert result == (text, text, 0)


def test_client_that_does_not_read_blocks_its_own_command_only(pool: Pool, witness: Client) -> None:
    client = pool.connect()
    before = pool.private_bytes()
    pid = started(client, streamed("/bin/cat", "/dev/zero", streams=0b10))
    wchan = Path(f"/proc/{pid}/wchan")
    assert until(lambda: "pipe_write" in wchan.read_text())
    for _ in range(20):
        assert witness.status("/bin/true") == 0
    assert until(lambda: "pipe_write" in wchan.read_text())
    assert pool.private_bytes() - before < 512 << 10
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)


def test_command_that_does_not_read_holds_up_its_own_input_only(
    pool: Pool, witness: Client
) -> None:
    client = pool.connect()
    pid = started(client, streamed("/bin/sleep", "100", streams=0b1))
    client.send(frame(lib.EB_STDIN, bytes(lib.EB_WINDOW)))
    kind, payload = client.frame()
    assert kind == lib.EB_CREDIT
    (credit,) = struct.unpack("<I", payload)
    client.send(frame(lib.EB_STDIN, bytes(credit)))
    assert witness.status("/bin/true") == 0
    client.send(frame(lib.EB_STDIN, b"x"))
    assert client.refusal() == "STDIN of 1 bytes, where 0 may be sent"
    assert gone(pid)


def test_window_is_not_overrun(pool: Pool, witness: Client) -> None:
    client = pool.connect()
    pid = started(client, streamed("/bin/sleep", "100", streams=0b1))
    client.send(_frames.HEADER.pack(lib.EB_WINDOW + 1, lib.EB_STDIN))
    assert client.refusal() == f"STDIN with a payload of {lib.EB_WINDOW + 1} bytes"
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)


def test_input_to_a_command_that_has_closed_it(pool: Pool) -> None:
    client = pool.connect()
    text = bytes(MIB)
    started(client, streamed("/bin/sh", "-c", "exec <&-; echo; read x <&1; sleep 0.1", streams=0b1))
    assert converse(client, text, 0b1).status >= 0
    started(client, streamed("/usr/bin/head", "-c", "10", streams=0b11))
    assert converse(client, text) == (bytes(10), b"", 0)
    assert client.status("/bin/true") == 0


def test_late_input_is_dropped(pool: Pool) -> None:
    client = pool.connect()
    client.send(frame(lib.EB_STDIN, b"early"))
    for streams in (0b1, 0b11, 0b110):
        started(client, streamed("/bin/true", streams=streams))
        assert converse(client, None, streams) == (b"", b"", 0)
        for _ in range(3):
            client.send(frame(lib.EB_STDIN, bytes(lib.EB_WINDOW)))
        client.send(frame(lib.EB_STDIN))
    started(client, streamed("/bin/cat", streams=0b11))
    client.send(frame(lib.EB_STDIN, b"text"))
    client.send(frame(lib.EB_STDIN))
    client.send(frame(lib.EB_STDIN, b"after its end"))
    assert converse(client).output == b"text"


def test_output_after_the_end_of_the_command(pool: Pool, tmp_path: Path) -> None:
    client = pool.connect()
    os.mkfifo(tmp_path / "go")
    script = f"(read x <{tmp_path}/go; echo late) & echo early"
    started(client, streamed("/bin/sh", "-c", script, streams=0b10))
    assert {client.frame()[0], client.frame()[0]} == {lib.EB_STDOUT, lib.EB_EXITED}
    (tmp_path / "go").write_text("\n")
    assert client.frame() == (lib.EB_STDOUT, b"late\n")
    assert client.frame() == (lib.EB_STDOUT, b"")
    assert client.status("/bin/true") == 0


def test_request_before_the_streams_end_is_refused(pool: Pool, witness: Client) -> None:
    client = pool.connect()
    read, write = os.pipe()
    data = streamed("/bin/sh", "-c", "cat <&3 & exit", streams=0b10, targets=[3])
    started(client, data, [read])
    os.close(read)
    assert ended(client) == 0
    client.send(request("/bin/true"))
    assert client.refusal() == "SPAWN before the end of the last command's output"
    os.close(write)
    pool.told((lib.EB_CLOSED, client.id))


@pytest.mark.slow
def test_streamed_command_ends_with_its_client(pool: Pool) -> None:
    client = pool.connect()
    script = "trap '' TERM; echo $$; while :; do sleep 0.01; done"
    pid = started(client, streamed("/bin/sh", "-c", script, streams=0b10, options=[OWN_GROUP]))
    assert client.frame()[0] == lib.EB_STDOUT
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)


@pytest.mark.parametrize("targets", [[1], [1, 7], [0, 1, 2]])
def test_a_descriptor_both_streamed_and_passed_is_refused(
    targets: list[int], pool: Pool, witness: Client
) -> None:
    client = pool.connect()
    client.send(streamed("/bin/true", streams=0b10, targets=targets), [0] * len(targets))
    assert (
        client.refusal()
        == "malformed SPAWN: option FDS: names a descriptor that STREAMS or NULL has"
    )
    pool.told((lib.EB_CLOSED, client.id))


def test_streamed_and_passed_descriptors_mixed(pool: Pool) -> None:
    client = pool.connect()
    read, write = os.pipe()
    directory = os.open("/usr", os.O_PATH)
    data = streamed(
        "/bin/sh", "-c", "cat; pwd; cat <&7", streams=0b11,
        options=[option(lib.EB_TAG_CWD_FD)], targets=[2, 7],
    )  # fmt: skip
    null = os.open("/dev/null", os.O_WRONLY)
    started(client, data, [null, read, directory])
    os.write(write, b"passed")
    for fd in (read, write, directory, null):
        os.close(fd)
    assert converse(client, b"sent\n") == (b"sent\n/usr\npassed", b"", 0)


def test_streamed_command_that_does_not_start(pool: Pool) -> None:
    client = pool.connect()
    before = pool.descriptors()
    for _ in range(3):
        client.send(streamed("/none", streams=0b111))
        assert client.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
        assert pool.descriptors() == before
    started(client, streamed("/bin/cat", streams=0b111))
    assert converse(client, b"x", 0b111) == (b"x", b"", 0)


def test_command_may_open_its_streams_anew(pool: Pool) -> None:
    client = pool.connect()
    script = "cat </dev/stdin >/dev/stdout; echo error >/dev/stderr"
    started(client, streamed("/bin/sh", "-c", script, streams=0b111))
    assert converse(client, b"text", 0b111) == (b"text", b"error\n", 0)


@pytest.mark.parametrize("what", ["input", "socket"])
def test_slow_exec_keeps_nobodys_pipes_open(
    what: str, pool: Pool, public_dir: Path, witness: Client
) -> None:
    """A process before its exec has copies of the helper's descriptors."""
    program = public_dir / "program"
    shutil.copy("/bin/true", program)
    client, other = pool.connect(), pool.connect()
    with Guard(program) as guard:
        if what == "input":
            started(client, streamed("/bin/cat", streams=0b11))
        other.send(request(str(program)))
        guard.held()
        if what == "input":
            assert converse(client, b"text") == (b"text", b"", 0)
        else:
            client.send(frame(77))
            assert client.refusal() == "unknown frame kind 77"
        guard.release()
        started(other)
        assert ended(other) == 0


# Installs a filter under which the helper can't watch descriptors from a number on, then runs it.
WITHOUT_WATCHES = """
import ctypes, os, platform, struct, sys

least, program = int(sys.argv[1]), sys.argv[2:]
epoll_ctl = {"x86_64": 233, "aarch64": 21}[platform.machine()]
epoll_ctl_add, enospc = 1, 28
load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
instructions = [
    (load, 0, 0, 0),  # the call
    (equal, 0, 5, epoll_ctl),
    (load, 0, 0, 24),  # its second argument
    (equal, 0, 3, epoll_ctl_add),
    (load, 0, 0, 32),  # its third
    (at_least, 0, 1, least),
    (give, 0, 0, 0x50000 | enospc),
    (give, 0, 0, 0x7FFF0000),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
filter = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
pr_set_no_new_privs, pr_set_seccomp, seccomp_mode_filter = 38, 22, 2
if libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0) or libc.prctl(
    pr_set_seccomp, seccomp_mode_filter, filter, 0, 0
):
    raise OSError(ctypes.get_errno(), "prctl")
os.execv(program[0], program)
"""


@pytest.mark.root
def test_start_that_cannot_be_watched_holds_up_nobody(pool: Pool, public_dir: Path) -> None:
    """This is like a lack of memory, or as if all of the user's watches were in use."""
    program = public_dir / "program"
    shutil.copy("/bin/true", program)
    one, two = pool.connect(), pool.connect()
    numbers = map(int, os.listdir(f"/proc/{pool.pid}/fd"))
    least = max(numbers) + 1
    one.sock.close()
    two.sock.close()
    under = [sys.executable, "-c", WITHOUT_WATCHES, str(least)]
    with running(under=under) as limited:
        client, witness = limited.connect(), limited.connect()
        with Guard(program) as guard:
            client.send(request(str(program)))
            guard.held()
            assert witness.status("/bin/sh", "-c", "exit 3") == 3 << 8
            assert witness.run("/none") == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
            guard.release()
            started(client)
            assert ended(client) == 0


def test_failed_start_whose_process_does_not_go_holds_up_nobody(
    pool: Pool, witness: Client
) -> None:
    """The tracer of a process waits for it first, and the helper only after that."""
    ptrace_seize = 0x4206
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    client = pool.connect()
    client.send(slow("/none"))
    assert until(lambda: bool(pool.children()))
    (pid,) = pool.children()
    if libc.ptrace(ptrace_seize, pid, 0, 0):
        pytest.skip(os.strerror(ctypes.get_errno()))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert witness.status("/bin/true") == 0
    assert pool.silent()
    os.waitpid(pid, 0)
    assert client.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
    assert client.status("/bin/true") == 0


def test_nulls(pool: Pool) -> None:
    client = pool.connect()
    nulls = option(lib.EB_TAG_NULL, b"\5")
    script = "readlink /proc/self/fd/0; readlink /proc/self/fd/2"
    for _ in range(2):
        started(client, streamed("/bin/sh", "-c", script, streams=0b10, options=[nulls]))
        assert converse(client, None, 0b10).output == b"/dev/null\n" * 2


def test_output_and_error_joined(pool: Pool) -> None:
    client = pool.connect()
    script = "echo a; echo b >&2; echo c; cat >&2"
    started(client, streamed("/bin/sh", "-c", script, streams=0b1011))
    assert converse(client, b"d\n") == (b"a\nb\nc\nd\n", b"", 0)


# Brief answers


def test_brief_commands_one_after_another(pool: Pool) -> None:
    client = pool.connect()
    nulls = option(lib.EB_TAG_NULL, b"\5")
    for number in range(50):
        script = f"echo {number}; exit {number}"
        options = [COALESCE, nulls]
        client.send(streamed("/bin/sh", "-c", script, streams=0b10, options=options))
        assert converse(client, None, 0b10, brief=True) == (b"%d\n" % number, b"", number << 8)
    assert client.status("/bin/true") == 0


def test_brief_command_that_does_not_start(pool: Pool) -> None:
    client = pool.connect()
    for _ in range(2):
        client.send(streamed("/none", streams=0b10, options=[COALESCE]))
        assert client.reply() == Failed(0, errno.ENOENT, lib.EB_STAGE_EXEC)
        client.send(streamed("/bin/true", streams=0b10, options=[COALESCE]))
        assert converse(client, None, 0b10, brief=True) == (b"", b"", 0)


def test_much_output_of_brief_commands(pool: Pool) -> None:
    client = pool.connect()
    for _ in range(10):
        client.send(
            streamed("/usr/bin/head", "-c", "300000", "/dev/zero", streams=0b10, options=[COALESCE])
        )
        assert converse(client, None, 0b10, brief=True) == (bytes(300_000), b"", 0)


def test_output_of_a_brief_command_that_others_hold(pool: Pool) -> None:
    """The output ends when they have closed it, though the command ended long before."""
    client = pool.connect()
    script = "echo first; { read x; echo last; } <&3 & exec 3<&-"
    read, write = os.pipe()
    for _ in range(2):
        data = streamed("/bin/sh", "-c", script, streams=0b10, options=[COALESCE], targets=[3])
        client.send(data, [read])
        frames = dict([client.frame(), client.frame()])
        assert frames[lib.EB_STDOUT] == b"first\n"
        assert frames[lib.EB_EXITED][:4] == bytes(4)
        os.write(write, b"\n")
        assert client.frame() == (lib.EB_STDOUT, b"last\n")
        assert client.frame() == (lib.EB_STDOUT, b"")
    os.close(read)
    os.close(write)


def test_client_of_brief_commands_goes(pool: Pool) -> None:
    client = pool.connect()
    data = streamed("/bin/sleep", "100", streams=0b10, options=[COALESCE, OWN_GROUP])
    client.send(data)
    assert until(lambda: bool(pool.children()))
    (pid,) = pool.children()
    client.send(data)  # too early: it ends the connection, if that is not closed before
    client.sock.close()
    pool.told((lib.EB_CLOSED, client.id))
    assert gone(pid)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nothing", "signal", "close", "drain", "end", "server's end"])
def test_slow_start_of_a_brief_command(what: str, pool: Pool) -> None:
    """Nothing reports its exec. Earlier events count all the same."""
    client = pool.connect()
    read, write = os.pipe()
    bits = option(lib.EB_TAG_STREAMS, b"\2")
    fds = _frames.numbers(lib.EB_TAG_FDS, [0])
    client.send(slow("/bin/cat", options=[bits, COALESCE, OWN_GROUP, fds]), [read])
    os.close(read)
    assert until(lambda: bool(pool.children()))
    (live,) = pool.report().live.values()
    assert live.title == b""  # it is not noticed yet
    status = 0
    if what == "signal":
        client.send(signal_frame(0, signal.SIGTERM))
        status = signal.SIGTERM
    elif what == "close":
        client.sock.close()
        pool.told((lib.EB_CLOSED, client.id))
        assert gone(live.pid)
    elif what == "end":
        pool.tell(lib.EB_END, bytes([signal.SIGTERM]))
        status = signal.SIGTERM
    else:
        if what == "drain":
            pool.tell(lib.EB_DRAIN)
        elif what == "server's end":
            pool.control.sock.close()
        os.write(write, b"text")
        os.close(write)
    if what != "close":
        text = b"" if status else b"text"
        assert converse(client, None, 0b10, brief=True) == (text, b"", status)
    if what in ("drain", "server's end"):
        assert client.closed()
    if what in ("signal", "close", "end"):
        os.close(write)


def test_silence_before_the_end_of_a_brief_command(pool: Pool) -> None:
    """Its output comes while it still runs."""
    client = pool.connect()
    script = "echo early; read x; echo late"
    client.send(streamed("/bin/sh", "-c", script, streams=0b11, options=[COALESCE]))
    assert client.frame() == (lib.EB_STDOUT, b"early\n")
    assert converse(client, b"\n", brief=True) == (b"late\n", b"", 0)


# -- a terminal --

SETSID = option(lib.EB_TAG_SETSID)
SHOWS_SIZES = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
signal.signal(signal.SIGINT, signal.SIG_DFL)
while True:
    print(*os.get_terminal_size(0), flush=True)
    if signal.sigtimedwait([signal.SIGWINCH], 60) is None:
        break
"""


def terminal(rows: int, columns: int, flags: int = 0) -> bytes:
    return option(lib.EB_TAG_TERMINAL, struct.pack("<4IB", rows, columns, 0, 0, flags))


def winsize(*numbers: int) -> bytes:
    return frame(lib.EB_WINSIZE, struct.pack("<4I", *numbers))


def screen(client: Client, end: bytes) -> bytes:
    """Return what is on the screen, up to `end`."""
    shown = b""
    while not shown.endswith(end):
        kind, payload = client.frame()
        assert kind == lib.EB_STDOUT and payload, (kind, payload, shown)
        shown += payload
    return shown


SUPERVISE = option(lib.EB_TAG_SUPERVISE, struct.pack("<BI", 1, 0))


@pytest.mark.parametrize("more", [(), (SUPERVISE,)], ids=["", "supervised"])
def test_size_of_a_terminal(more: tuple[bytes, ...], pool: Pool) -> None:
    client = pool.connect()
    data = streamed(
        sys.executable, "-c", SHOWS_SIZES, streams=0b1011, options=[SETSID, terminal(7, 9), *more]
    )
    pid = started(client, data)
    assert screen(client, b"\r\n") == b"9 7\r\n"
    client.send(winsize(30, 100, 5, 6) + winsize(31, 101, 0, 0))
    seen = screen(client, b"101 31\r\n")
    client.send(frame(lib.EB_STDIN, b"\x03"))  # what is typed comes to the command
    status, is_open = b"", True
    while is_open or not status:
        kind, payload = client.frame()
        if kind == lib.EB_EXITED:
            status = payload[:4]
        else:
            seen += payload
            is_open = bool(payload)
    assert status == struct.pack("<i", signal.SIGINT)
    assert b"^C" in seen
    # It may see the first size before there is the second one, and the second one twice.
    assert set(seen.replace(b"^C", b"").split(b"\r\n")) - {b"100 30"} == {b"101 31", b""}
    assert gone(pid)


def test_size_that_comes_late_is_dropped(pool: Pool) -> None:
    """The same applies to a size for a command without a terminal, or without a command."""
    client = pool.connect()
    client.send(winsize(1, 2, 3, 4))
    data = streamed("/bin/sh", "-c", "stty size", streams=3, options=[SETSID, terminal(7, 9)])
    started(client, data)
    assert converse(client) == (b"7 9\r\n", b"", 0)
    client.send(winsize(1, 2, 3, 4))
    started(client, streamed("/bin/cat", streams=3))
    client.send(winsize(1, 2, 3, 4))
    assert converse(client, b"text") == (b"text", b"", 0)


def test_size_of_another_length_is_refused(pool: Pool) -> None:
    client = pool.connect()
    client.send(frame(lib.EB_WINSIZE, bytes(8)))
    assert client.refusal() == "WINSIZE with a payload of 8 bytes"


@pytest.mark.parametrize(
    ("streams", "options"), [(3, []), (1, [SETSID]), (2, [SETSID]), (0b1010, [SETSID])]
)
def test_terminal_that_cannot_be(streams: int, options: list[bytes], pool: Pool) -> None:
    client = pool.connect()
    client.send(streamed("/bin/true", streams=streams, options=[*options, terminal(7, 9)]))
    assert "TERMINAL needs SETSID" in client.refusal()


@pytest.mark.parametrize("more", [(), (SUPERVISE,)], ids=["", "supervised"])
def test_end_of_the_connection_hangs_up(more: tuple[bytes, ...], pool: Pool) -> None:
    client = pool.connect()
    script = "trap 'exit 9' HUP; trap '' TERM; echo ready; while :; do sleep 0.01; done"
    options = [SETSID, terminal(7, 9), option(lib.EB_TAG_ON_CLOSE, struct.pack("<I", 60000)), *more]
    pid = started(client, streamed("/bin/sh", "-c", script, streams=3, options=options))
    screen(client, b"ready\r\n")
    client.sock.close()
    assert gone(pid)


def test_input_for_a_terminal_that_nobody_has_open_is_dropped(pool: Pool) -> None:
    """Linux reports its hang-up for ever, though it takes no input."""
    client = pool.connect()
    script = "stty raw -echo; echo ready; exec <&- >&- 2>&-; exec sleep 100"
    options = [SETSID, terminal(7, 9)]
    data = streamed("/bin/sh", "-c", script, streams=0b1011, options=options)
    pid = started(client, data)
    screen(client, b"ready\n")
    client.send(frame(lib.EB_STDIN, bytes(lib.EB_WINDOW)))
    credit = 0
    while credit < lib.EB_WINDOW:
        kind, payload = client.frame()
        if kind == lib.EB_CREDIT:
            credit += struct.unpack("<I", payload)[0]
    client.send(signal_frame(pid, signal.SIGKILL))
    assert gone(pid)
