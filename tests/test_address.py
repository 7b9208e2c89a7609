"""Where the daemon is by default, and who may listen there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PATIENCE, run_script, script_environment, started_script
from daemon import started_daemon

import errand_boy
from errand_boy._wire import address
from errand_boy.errors import RefusedError


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ERRAND_BOY_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_default_path(unnamed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, own = "/run/errand-boy.sock", str(tmp_path / "errand-boy.sock")
    assert address.default_path() == machine
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert address.default_path() == address.default_path(classic=True) == own
    found = address.find()
    assert (found.path, found.is_default) == (machine if os.path.exists(machine) else own, True)
    (tmp_path / "errand-boy.sock").touch()
    assert address.find().path == own
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/none")
    assert address.default_path() == machine
    monkeypatch.setenv("ERRAND_BOY_SOCKET", "/a/path")
    assert address.default_path() == "/a/path"
    found = address.find()
    assert (found.path, found.is_default) == ("/a/path", False)
    assert address.find("/other").path == "/other"


@pytest.mark.root
def test_default_path_of_another_user(unnamed: None, public_dir: Path) -> None:
    """Another user's $XDG_RUNTIME_DIR is skipped; only the classic module uses /tmp."""
    source = """
        from errand_boy._wire import address as _address
        os.environ.update(XDG_RUNTIME_DIR=sys.argv[2], TMPDIR=sys.argv[2])
        os.setuid(65534)
        report([_address.default_path(), _address.default_path(classic=True)])
    """
    classic = str(public_dir / "errand-boy-65534" / "errand-boy.sock")
    assert run_script(source, args=[public_dir]) == ["/run/errand-boy.sock", classic]


# Who listens there
IMPOSTOR = """
sock = socket.socket(socket.AF_UNIX)
os.umask(0)
os.setuid(2001)
sock.bind(sys.argv[2])
sock.listen()
report(None)
seen = b""
while True:
    peer, _ = sock.accept()
    while data := peer.recv(1000):
        if data.startswith(b"end"):
            report(len(seen))
            sys.exit()
        seen += data
    peer.close()
"""


@contextmanager
def impostor(path: Path) -> Iterator[Callable[[], int]]:
    """Make user 2001 listen at `path`; yield a function that counts the bytes received."""
    with started_script(IMPOSTOR, args=[path]) as process:
        assert process.stdout is not None
        process.stdout.readline()

        def received() -> int:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.sendall(b"end")
            return int(process.communicate(timeout=PATIENCE)[0])

        yield received


ASK = """
import asyncio
import errand_boy
import errand_boy.asyncio, errand_boy._map.map, errand_boy._wire.status, errand_boy._cli.args
import errand_boy._cli.run, errand_boy.transports.unixsocket
os.environ.update(json.loads(sys.argv[3]))
os.environ.pop("ERRAND_BOY_SOCKET", None)
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
connect = errand_boy.connect

async def ask():
    await errand_boy.asyncio.connect().run(["true"])

def classic():
    errand_boy.transports.unixsocket.UNIXSocketTransport().run_cmd("true")

seen = []
ways = {
    "Popen": lambda: connect().Popen(["true"]),
    "captured": lambda: connect().run(["true"], capture_output=True),
    "map": lambda: list(connect().map([["true"]])),
    "asyncio": lambda: asyncio.run(ask()),
    "status": lambda: connect().status(),
    "classic": classic,
}
for name in sys.argv[4].split():
    try:
        ways[name]()
        seen.append([name, "served"])
    except OSError as error:
        seen.append([type(error).__name__, str(error)])
report(seen)
"""


@pytest.mark.root
@pytest.mark.parametrize("uid", [0, 65534])
def test_nothing_is_sent_to_another_user_at_a_default_path(public_dir: Path, uid: int) -> None:
    os.chmod(public_dir, 0o777)
    os.chown(public_dir, uid, -1)
    with impostor(public_dir / "errand-boy.sock") as received:
        environment = json.dumps({"XDG_RUNTIME_DIR": str(public_dir)})
        ways = "Popen captured map asyncio status classic"
        seen = run_script(ASK, args=[uid, environment, ways])
        names = [name for name, _ in seen]
        assert names == [*["RefusedError"] * 4, "NoDaemonError", "RefusedError"]
        assert all("user 2001 listens here" in text for _, text in seen)
        assert received() == 0


@pytest.mark.root
def test_nothing_is_sent_to_another_user_at_the_classic_path(public_dir: Path) -> None:
    """Anybody can make a directory in /tmp."""
    directory = public_dir / "errand-boy-65534"
    directory.mkdir()
    directory.chmod(0o777)
    with impostor(directory / "errand-boy.sock") as received:
        environment = json.dumps({"XDG_RUNTIME_DIR": "/none", "TMPDIR": str(public_dir)})
        ((name, text),) = run_script(ASK, args=[65534, environment, "classic"])
        assert name == "RefusedError"
        assert "user 2001 listens here, not user 65534 or 0" in text
        assert received() == 0


@pytest.mark.root
@pytest.mark.parametrize("command", [["run", "true"], ["status"]])
def test_commands_ask_nothing_of_another_user(public_dir: Path, command: list[str]) -> None:
    os.chmod(public_dir, 0o777)
    environment = {**script_environment(), "XDG_RUNTIME_DIR": str(public_dir)}
    environment.pop("ERRAND_BOY_SOCKET", None)
    with impostor(public_dir / "errand-boy.sock") as received:
        argv = [sys.executable, "-m", "errand_boy", *command]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert done.returncode
        assert "user 2001 listens here, not user 0" in done.stderr
        assert received() == 0


@pytest.mark.root
def test_user_and_root_may_listen_at_a_default_path(public_dir: Path) -> None:
    with started_daemon(public_dir, "--allow-uid=65534") as daemon:
        os.rename(daemon.path, public_dir / "errand-boy.sock")
        os.chown(public_dir, 65534, -1)
        environment = json.dumps({"XDG_RUNTIME_DIR": str(public_dir)})
        assert run_script(ASK, args=[65534, environment, "Popen"]) == [["Popen", "served"]]
        os.chown(public_dir, 0, -1)
        assert run_script(ASK, args=[0, environment, "Popen"]) == [["Popen", "served"]]


@pytest.mark.root
def test_who_must_listen_can_be_named(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        assert errand_boy.connect(daemon.path, peer_uid=0).call(["true"]) == 0
        with pytest.raises(RefusedError, match="user 0 listens here, not user 2001"):
            errand_boy.connect(daemon.path, peer_uid=2001).call(["true"])
        assert errand_boy.connect(daemon.path).call(["true"]) == 0
