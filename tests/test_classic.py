"""errand-boy's classic interface: its documentation's snippets, and what its users rely on."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
from pathlib import Path

import pytest
from daemon import Daemon

import errand_boy
from errand_boy.transports.unixsocket import UNIXSocketTransport

# As the documentation of 2014 has them, but for print().

RUN_CMD = """
from errand_boy.transports.unixsocket import UNIXSocketTransport

transport = UNIXSocketTransport()

process, stdout, stderr = transport.run_cmd('ls -al')

print(process.returncode)
print(stdout)
print(stderr)
"""

POPEN = """
from errand_boy.transports.unixsocket import UNIXSocketTransport

transport = UNIXSocketTransport()

process = transport.Popen('ls -al')

stdout, stderr = process.communicate(input='foo')

print(process.returncode)
print(stdout)
print(stderr)
"""

SESSION = """
from errand_boy.transports.unixsocket import UNIXSocketTransport

errand_boy_transport = UNIXSocketTransport()

with errand_boy_transport.get_session() as session:
    subprocess = session.subprocess

    process = subprocess.Popen('ls -al', stdout=subprocess.PIPE, stderr=subprocess.PIPE, shell=True, close_fds=True)

    process_stdout, process_stderr = process.communicate()
    returncode = process.returncode

print(returncode)
print(process_stdout.decode())
print(process_stderr.decode())
"""  # noqa: E501


@pytest.fixture
def transport(daemon: Daemon) -> UNIXSocketTransport:
    return UNIXSocketTransport(socket_path=daemon.path)


@pytest.mark.parametrize("snippet", [RUN_CMD, POPEN, SESSION])
def test_documentation(
    snippet: str, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "name with blank").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRAND_BOY_SOCKET", daemon.path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    expected = subprocess.check_output(["ls", "-al"], text=True)
    assert printed.getvalue() == f"0\n{expected}\n\n"


def test_run_cmd(transport: UNIXSocketTransport) -> None:
    process, stdout, stderr = transport.run_cmd("cat; echo out; echo err >&2; exit 3")
    assert (process.returncode, stdout, stderr) == (3, "out\n", "err\n")
    process, stdout, stderr = transport.run_cmd("kill -TERM $$")
    assert (process.returncode, stdout, stderr) == (-signal.SIGTERM, "", "")
    process, stdout, _ = transport.run_cmd(command_string="cat; exit 1", input="foo")
    assert (process.returncode, stdout) == (1, "foo")


def test_run_cmd_ends_what_takes_too_long(transport: UNIXSocketTransport) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        transport.run_cmd("exec sleep 100", timeout=0.1)


def test_options_go_before_the_defaults(transport: UNIXSocketTransport, tmp_path: Path) -> None:
    _, stdout, stderr = transport.run_cmd(
        "pwd; echo err >&2", cwd=tmp_path, stderr=subprocess.STDOUT, text=False
    )
    assert (stdout, stderr) == (f"{tmp_path}\nerr\n".encode(), None)
    assert transport.run_cmd(["echo", "a  b"])[1] == "a  b\n"


def test_output_that_is_no_text(transport: UNIXSocketTransport) -> None:
    _, stdout, _ = transport.run_cmd("printf 'a\\377b'")
    assert os.fsencode(stdout) == b"a\xffb"


def test_popen(transport: UNIXSocketTransport) -> None:
    process = transport.Popen("cat")
    assert process.poll() is None
    assert process.communicate(input="foo") == ("foo", "")
    assert (process.returncode, process.poll()) == (0, 0)


def test_session(transport: UNIXSocketTransport) -> None:
    with transport.get_session() as session:
        face = session.subprocess
        assert face.PIPE == subprocess.PIPE
        assert face.check_output("echo $0", shell=True, text=True) == "/bin/sh\n"
        with pytest.raises(face.CalledProcessError):
            face.run(["false"], check=True)
        process = face.Popen(["cat"], stdin=face.PIPE, stdout=face.PIPE)
        with pytest.raises(AttributeError):
            face.no_such_thing()
    for use in (
        lambda: session.subprocess,
        lambda: face.Popen(["true"]),
        lambda: face.PIPE,
        session.__enter__,
    ):
        with pytest.raises(errand_boy.SessionClosedError):
            use()
    assert process.communicate(b"it goes on") == (b"it goes on", None)


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(errand_boy.NoDaemonError):
        UNIXSocketTransport(tmp_path / "none").run_cmd("true")
