"""The text protocol, as clients in any language speak it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import time
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE
from daemon import Daemon, acting_as, started_daemon

END = b"\r\n\r\n"
MIB = 1 << 20


def connected(daemon: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(daemon.path)
    return sock


def sent(daemon: Daemon, line: bytes, data: bytes = b"") -> socket.socket:
    sock = connected(daemon)
    sock.sendall(line + END + data + END)
    return sock


def rest(sock: socket.socket) -> bytes:
    with sock:
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def read_to(sock: socket.socket, end: bytes) -> bytes:
    """Read the answer up to `end`, after which nothing more may come for now."""
    said = b""
    while not said.endswith(end):
        more = sock.recv(1 << 16)
        assert more, said
        said += more
    return said


def split(answer: bytes) -> tuple[bytes, bytes, int]:
    assert answer.startswith(b"\r\n0:")
    assert answer.endswith(END)
    answer, _, code = answer.removesuffix(END).rpartition(END)
    stdout, _, stderr = answer.removeprefix(b"\r\n0:").rpartition(b"\r\n1:")
    return stdout, stderr, int(code)


def read_answer(sock: socket.socket) -> bytes:
    """Read the answer up to the close, even if the daemon has not read everything."""
    said = bytearray()
    with sock, contextlib.suppress(ConnectionResetError):
        while more := sock.recv(1 << 16):
            said += more
    return bytes(said)


def until_read(sock: socket.socket) -> None:
    """Wait until the other end has read all that was sent."""
    unsent = bytearray(4)
    deadline = time.monotonic() + PATIENCE
    while True:
        fcntl.ioctl(sock, termios.TIOCOUTQ, unsent)
        if not any(unsent):
            return
        assert time.monotonic() < deadline
        os.sched_yield()


def ask(daemon: Daemon, line: bytes, data: bytes = b"") -> tuple[bytes, bytes, int]:
    return split(rest(sent(daemon, line, data)))


def started(daemon: Daemon, command: bytes) -> tuple[socket.socket, int]:
    """The connection of a command that runs, and its pidfd."""
    sock = sent(daemon, b"echo $$; exec " + command)
    assert sock.recv(4, socket.MSG_WAITALL) == b"\r\n0:"
    said = b""
    while not said.endswith(b"\n"):
        said += sock.recv(1)  # not more: its output may follow
    return sock, os.pidfd_open(int(said))


def wait_for_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)


# Answers


def test_answer_to_the_byte(daemon: Daemon) -> None:
    answer = rest(sent(daemon, b"cat; echo err >&2; exit 3", b"foo"))
    assert answer == b"\r\n0:foo\r\n1:err\n\r\n\r\n3\r\n\r\n"


def test_ls(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "name").touch()
    stdout, stderr, code = ask(daemon, b"ls -al " + bytes(tmp_path))
    assert (stdout.split()[-1], stderr, code) == (b"name", b"", 0)


@pytest.mark.parametrize(
    "line, data, answer",
    [
        (b"cat", b"foo", (b"foo", b"", 0)),
        (b"cat", b"one\r\ntwo", (b"one\r\ntwo", b"", 0)),
        (b"cat", b"\r\n\n\r", (b"\r\n\n\r", b"", 0)),
        (b"cat", bytes(range(256)), (bytes(range(256)), b"", 0)),
        (b"true", b"", (b"", b"", 0)),
        (b"", b"", (b"", b"", 0)),
        (b"true", b"nobody reads this", (b"", b"", 0)),
        (b"printf 'no newline'", b"", (b"no newline", b"", 0)),
        (b"printf '\\000\\377' >&2", b"", (b"", b"\0\xff", 0)),
        (b"""echo "a  'b'" '$x' | tr ab xy | cat -""", b"", (b"x  'y' $x\n", b"", 0)),
        (b"read a\nread b; echo $b$a", b"1\n2\n", (b"21\n", b"", 0)),
        (b"exit 255", b"", (b"", b"", 255)),
        (b"kill -TERM $$", b"", (b"", b"", -15)),
        (b"kill -KILL $$", b"", (b"", b"", -9)),
        (b"exec >&- 2>&- <&-; exit 4", b"", (b"", b"", 4)),
    ],
)
def test_answer(daemon: Daemon, line: bytes, data: bytes, answer: tuple[bytes, bytes, int]) -> None:
    assert ask(daemon, line, data) == answer


def test_no_such_command(daemon: Daemon) -> None:
    stdout, stderr, code = ask(daemon, b"none-such-command")
    assert (stdout, code) == (b"", 127)
    assert b"none-such-command" in stderr


def test_byte_by_byte(daemon: Daemon) -> None:
    sock = connected(daemon)
    for byte in b"cat; echo fine" + END + b"\r\n\rfoo" + END:
        sock.sendall(bytes([byte]))
    assert split(rest(sock)) == (b"\r\n\rfoofine\n", b"", 0)


def test_input_ends_at_its_first_end(daemon: Daemon) -> None:
    assert ask(daemon, b"cat", b"one" + END + b"two") == (b"one", b"", 0)


def test_large_input_and_output(daemon: Daemon) -> None:
    data = os.urandom(10 * MIB).replace(b"\r\n\r\n", b"....")
    assert ask(daemon, b"cat", data) == (data, b"", 0)


def test_both_outputs_are_large(daemon: Daemon) -> None:
    line = b"head -c 3000000 /dev/zero | tr '\\0' e | tee /dev/stderr | tr e o"
    assert ask(daemon, line) == (b"o" * 3_000_000, b"e" * 3_000_000, 0)


def test_errors_come_late(daemon: Daemon) -> None:
    assert ask(daemon, b"exec >&-; cat >&2; exit 5", b"x" * MIB) == (b"", b"x" * MIB, 5)


def test_what_outlives_its_output(daemon: Daemon, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    sock = sent(daemon, b"echo first; (cat %s; echo last >&2) & exit 6" % bytes(fifo))
    assert read_to(sock, b"\n") == b"\r\n0:first\n"
    fifo.write_bytes(b"second\n")
    assert split(b"\r\n0:first\n" + rest(sock)) == (b"first\nsecond\n", b"last\n", 6)


def test_output_comes_as_it_is_made(daemon: Daemon) -> None:
    sock, pidfd = started(daemon, b"cat /dev/zero")
    assert sock.recv(10) == bytes(10)
    sock.close()
    wait_for_end(pidfd)


def test_half_closed_client(daemon: Daemon, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    sock = sent(daemon, b"cat - %s" % bytes(fifo), b"foo")
    sock.shutdown(socket.SHUT_WR)
    assert read_to(sock, b"foo") == b"\r\n0:foo"
    fifo.write_bytes(b"bar")
    assert rest(sock) == b"bar\r\n1:\r\n\r\n0\r\n\r\n"


def test_half_closed_client_ends_its_input(daemon: Daemon) -> None:
    sock = connected(daemon)
    sock.sendall(b"cat" + END + b"foo\r\n")
    sock.shutdown(socket.SHUT_WR)
    assert split(rest(sock)) == (b"foo\r\n", b"", 0)


def test_command_has_what_the_daemon_has(tmp_path: Path) -> None:
    with started_daemon(tmp_path, env={"EB_TEST": "here"}, cwd=tmp_path) as daemon:
        line = b"echo $EB_TEST; pwd -P; ulimit -c; grep SigBlk /proc/self/status; cat /proc/$$/stat"
        stdout, _, _ = ask(daemon, line)
    lines = stdout.decode().splitlines()
    assert lines[:2] == ["here", str(tmp_path.resolve())]
    assert int(lines[3].split()[1], 16) == 0
    pid, _, _, _, group, session = lines[4].split()[:6]
    assert pid == group != session


# Many clients


@pytest.mark.slow
def test_300_clients_at_once(tmp_path: Path) -> None:
    # A daemon starts one more helper for so many, and either may stay.
    with started_daemon(tmp_path) as daemon:
        socks = [sent(daemon, b"cat; exit %d" % (i % 256), b"input %d" % i) for i in range(300)]
        for i, sock in enumerate(socks):
            assert split(rest(sock)) == (b"input %d" % i, b"", i % 256)


def test_clients_that_do_not_read(daemon: Daemon) -> None:
    server = psutil.Process(daemon.process.pid)
    assert ask(daemon, b"true")[2] == 0
    before = server.memory_info().rss
    idle = [started(daemon, b"cat /dev/zero") for _ in range(50)]
    deadline = time.monotonic() + PATIENCE
    for sock, _ in idle:
        while unread(sock) < 100_000:
            assert time.monotonic() < deadline
            os.sched_yield()
    for i in range(20):
        assert ask(daemon, b"echo %d; echo e >&2" % i) == (b"%d\n" % i, b"e\n", 0)
    assert server.memory_info().rss - before < 10 * MIB
    for sock, pidfd in idle:
        sock.close()
        wait_for_end(pidfd)


def unread(sock: socket.socket) -> int:
    size: int = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]
    return size


def test_clients_that_do_not_send(daemon: Daemon) -> None:
    silent = [connected(daemon) for _ in range(50)]
    for sock in silent:
        sock.sendall(b"echo fine" + END + b"some input")
    assert ask(daemon, b"true")[2] == 0
    for sock in silent:
        sock.sendall(END)
        assert split(rest(sock)) == (b"fine\n", b"", 0)


# The ends of clients


@pytest.mark.parametrize("command", [b"sleep 1000", b"cat /dev/zero"])
def test_client_closes(daemon: Daemon, command: bytes) -> None:
    sock, pidfd = started(daemon, command)
    sock.close()
    wait_for_end(pidfd)


@pytest.mark.parametrize("command", [b"sleep 1000", b"cat /dev/zero"])
def test_half_closed_client_closes(daemon: Daemon, command: bytes) -> None:
    sock, pidfd = started(daemon, command)
    sock.shutdown(socket.SHUT_WR)
    assert ask(daemon, b"true")[2] == 0  # the server has seen the one by now
    assert not select.select([pidfd], [], [], 0)[0]
    sock.close()
    wait_for_end(pidfd)


@pytest.mark.slow
def test_whole_group_is_ended(daemon: Daemon) -> None:
    sock, pidfd = started(daemon, b"sh -c 'sleep 1000 & trap \"\" TERM; sleep 1000; cat /dev/zero'")
    sock.close()
    wait_for_end(pidfd)


def test_client_closes_before_its_request_is_whole(daemon: Daemon, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for part in (b"touch %s" % bytes(mark), b"touch %s" % bytes(mark) + END + b"foo"):
        with connected(daemon) as sock:
            sock.sendall(part)
    assert ask(daemon, b"true")[2] == 0
    assert not mark.exists()


def test_half_a_command_and_its_end(daemon: Daemon) -> None:
    with connected(daemon) as sock:
        sock.sendall(b"echo no\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""


# Limits


def refusal(answer: tuple[bytes, bytes, int]) -> bytes:
    stdout, stderr, code = answer
    assert (stdout, code) == (b"", 127)
    assert stderr.startswith(b"errand-boy: ")
    return stderr.removeprefix(b"errand-boy: ")


def test_longest_command_line(daemon: Daemon) -> None:
    line = b"echo fine #"
    assert ask(daemon, line.ljust(131071, b".")) == (b"fine\n", b"", 0)
    stderr = refusal(ask(daemon, line.ljust(131072, b"."), b"input"))
    assert stderr == b"a command line has at most 131071 bytes\n"
    stderr = refusal(ask(daemon, line.ljust(10 * MIB, b"."), b"input"))
    assert stderr == b"a command line has at most 131071 bytes\n"


@pytest.mark.slow
def test_longest_input(daemon: Daemon) -> None:
    data = bytes(64 * MIB)
    assert ask(daemon, b"wc -c", data) == (b"67108864\n", b"", 0)
    stderr = refusal(ask(daemon, b"echo no", data + b"x"))
    assert stderr == b"the input has at most 67108864 bytes\n"


@pytest.mark.slow
def test_longest_errors(daemon: Daemon) -> None:
    stdout, stderr, code = ask(daemon, b"head -c 70000000 /dev/zero >&2; echo fine; exit 7")
    assert (stdout, code) == (b"fine\n", 7)
    kept, _, note = stderr.partition(b"errand-boy: ")
    assert 63 * MIB < len(kept) <= 64 * MIB
    assert note == b"standard error is cut off after 67108864 bytes\n"


def test_nul_in_command_line(daemon: Daemon) -> None:
    assert refusal(ask(daemon, b"echo \0")) == b"a command line must not hold a NUL byte\n"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_browser_is_refused(daemon: Daemon, tmp_path: Path, version: bytes) -> None:
    marker = tmp_path / "marker"
    head = b"POST /$(touch %b) HTTP/%b\r\nHost: localhost\r\n" % (bytes(marker), version)
    line = head + b"Content-Type: text/plain; touch %b" % bytes(marker)
    assert refusal(ask(daemon, line, b"body")) == b"this is not an HTTP server\n"
    assert not marker.exists()
    assert ask(daemon, b"echo ' HTTP/1.1'\ntrue") == (b" HTTP/1.1\n", b"", 0)


@pytest.mark.slow
@pytest.mark.parametrize("part", [b"echo n", b"echo no\r\n\r", b"echo no" + END + b"input\r\n"])
def test_unfinished_request(tmp_path: Path, part: bytes) -> None:
    with started_daemon(tmp_path, "--patience=0.5") as daemon:
        sock = connected(daemon)
        sock.sendall(part)
        stderr = refusal(split(rest(sock)))
        assert stderr == b"the request was not complete, and nothing came for 0.5 seconds\n"


@pytest.mark.slow
def test_slow_request_is_no_unfinished_one(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--patience=2") as daemon:
        sock, late = connected(daemon), connected(daemon)
        sock.sendall(b"cat" + END)
        late.sendall(b"late")
        data = b""
        while not select.select([late], [], [], 0.2)[0]:  # until that one's patience has ended
            sock.sendall(b"x")
            data += b"x"
        sock.sendall(END)
        assert split(rest(sock)) == (data, b"", 0)
        refusal(split(rest(late)))


@pytest.mark.slow
def test_slow_request_is_refused(tmp_path: Path) -> None:
    """It does not help the client to send a byte now and then."""
    with started_daemon(tmp_path, "--patience=0.5") as daemon:
        sock = connected(daemon)
        sock.sendall(b"cat" + END)
        while not select.select([sock], [], [], 0.05)[0]:
            sock.sendall(b"x")
        assert (
            refusal(split(read_answer(sock))) == b"the request was not complete after 5 seconds\n"
        )


@pytest.mark.slow
def test_bytes_held_for_a_user_are_bounded(daemon: Daemon) -> None:
    """The number of connections does not matter."""
    half = b"cat" + END + bytes(60 * MIB)
    holding = [connected(daemon) for _ in range(2)]
    for sock in holding:
        sock.sendall(half)
    for sock in holding:
        until_read(sock)
    stderr = refusal(ask(daemon, b"cat", bytes(10 * MIB)))
    most = b"the requests of this user may hold at most 134217728 bytes\n"
    assert stderr == b"cannot keep the input: " + most
    stdout, stderr, code = ask(daemon, b"echo out; head -c 10000000 /dev/zero >&2; exit 3")
    assert (stdout, code) == (b"out\n", 3)
    assert stderr.endswith(b"errand-boy: standard error is cut off: " + most)
    for sock in holding:
        sock.sendall(END)
        assert len(split(read_answer(sock))[0]) == 60 * MIB
    assert ask(daemon, b"wc -c", bytes(10 * MIB)) == (b"10485760\n", b"", 0)


@pytest.mark.slow
def test_full_disk(tmp_path: Path) -> None:
    with started_daemon(tmp_path, env={"TMPDIR": str(tmp_path / "none")}) as daemon:
        stderr = refusal(ask(daemon, b"cat", bytes(MIB)))
        assert stderr == b"cannot keep the input: No such file or directory\n"
        assert ask(daemon, b"cat", bytes(10_000)) == (bytes(10_000), b"", 0)
        stdout, stderr, code = ask(daemon, b"echo out; head -c 100000 /dev/zero >&2; sleep 1000")
        assert (stdout, code) == (b"out\n", 255)
        assert stderr.lstrip(b"\0").startswith(b"errand-boy: cannot keep standard error: ")


# Helpers and the daemon


def test_helper_is_killed(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size=1") as daemon:
        sock, pidfd = started(daemon, b"sleep 1000")
        os.kill(daemon.helpers()[0], signal.SIGKILL)
        said = rest(sock)
        wait_for_end(pidfd)
        assert said.endswith(b"helper has died; it may have been run\n\r\n\r\n255\r\n\r\n")
        assert ask(daemon, b"echo fine") == (b"fine\n", b"", 0)


def test_helpers_are_killed_before_they_read(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--pool-size=2") as daemon:
        for _ in range(5):
            helpers = daemon.helpers()
            for pid in helpers:
                os.kill(pid, signal.SIGSTOP)
            socks = [sent(daemon, b"echo fine") for _ in range(4)]
            for pid in helpers:
                os.kill(pid, signal.SIGKILL)
            assert [split(rest(sock)) for sock in socks] == [(b"fine\n", b"", 0)] * 4


def test_helpers_are_replaced(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-child-tasks=1", "--pool-size=2") as daemon:
        socks = [sent(daemon, b"cat", b"%d" % i) for i in range(60)]
        answers = [split(rest(sock)) for sock in socks]
        assert answers == [(b"%d" % i, b"", 0) for i in range(60)]


def test_turns(tmp_path: Path) -> None:
    with started_daemon(tmp_path, "--max-processes=1") as daemon:
        first, pidfd = started(daemon, b"sleep 1000")
        others = [sent(daemon, b"cat", b"%d" % i) for i in range(10)]
        others.pop().close()
        first.close()
        wait_for_end(pidfd)
        assert [split(rest(sock))[0] for sock in others] == [b"%d" % i for i in range(9)]


def test_daemon_stops_after_the_command(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with started_daemon(tmp_path) as daemon:
        sock = sent(daemon, b"echo first; cat %s" % bytes(fifo))
        assert read_to(sock, b"\n") == b"\r\n0:first\n"
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.notify.recv(100) == b"STOPPING=1"
        fifo.write_bytes(b"last\n")
        assert rest(sock) == b"last\n\r\n1:\r\n\r\n0\r\n\r\n"
        assert daemon.process.wait(PATIENCE) == 0


def test_daemon_is_killed(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        sock, pidfd = started(daemon, b"sleep 1000")
        daemon.process.kill()
        assert rest(sock) == b""
        wait_for_end(pidfd)


def test_nothing_leaks(daemon: Daemon) -> None:
    server = psutil.Process(daemon.process.pid)
    ask(daemon, b"true")
    before = server.num_fds()
    for _ in range(30):
        ask(daemon, b"cat >&2", bytes(100_000))
        sock, pidfd = started(daemon, b"sleep 1000")
        sock.close()
        wait_for_end(pidfd)
        sock = sent(daemon, b"true")
        sock.shutdown(socket.SHUT_WR)
        rest(sock)
    status = daemon.status()  # what has ended before is dealt with by now
    assert status["totals"]["failed"] == 0
    assert server.num_fds() <= before + 1


@pytest.mark.root
def test_environment_is_not_another_users(public_dir: Path) -> None:
    with started_daemon(
        public_dir, "--allow-uid=12345", env={"HOME": "/root", "MARK": "ours"}
    ) as daemon:
        with acting_as(12345, 12346, []):
            sock = sent(daemon, b"echo ${HOME-none} ${MARK-none}")
        assert split(rest(sock)) == (b"none none\n", b"", 0)


@pytest.mark.root
def test_command_runs_as_its_client(public_dir: Path) -> None:
    with started_daemon(public_dir, "--allow-uid=12345") as daemon:
        with acting_as(12345, 12346, [12347, 12348]):
            sock = sent(daemon, b"id -u; id -g; id -G; cat >&2", b"in")
        assert split(rest(sock)) == (b"12345\n12346\n12346 12347 12348\n", b"in", 0)
        assert ask(daemon, b"id -u") == (b"0\n", b"", 0)
