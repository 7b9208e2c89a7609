"""The clients in other languages, run as a reader would run them."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, find_program
from daemon import Daemon

CLIENTS = Path(__file__).parent.parent / "examples" / "clients"
TEXT = {"text.js": ["node"], "text.pl": ["perl"], "text.sh": ["sh"]}
PACKAGES = {"node": "nodejs"}
DIALLERS = ["socat", "nc", "perl"]  # that text.sh has a use for


@pytest.fixture(params=TEXT)
def text(request: pytest.FixtureRequest) -> list[str]:
    name: str = request.param
    for language in TEXT[name]:
        find_program(language, PACKAGES.get(language))
    if name == "text.sh" and not any(map(shutil.which, DIALLERS)):
        pytest.skip(f"needs one of {', '.join(DIALLERS)}: apt-get install socat")
    return [*TEXT[name], str(CLIENTS / name)]


@pytest.fixture
def streams() -> list[str]:
    find_program("node", PACKAGES["node"])
    return ["node", str(CLIENTS / "streams.js")]


def run(client: list[str], *arguments: str, **options: Any) -> tuple[bytes, bytes, int]:
    options.setdefault("input", b"")
    command = [*client, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, **options)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, data, answer",
    [
        ("cat; echo err >&2; exit 3", b"foo", (b"foo", b"err\n", 3)),
        ("true", b"", (b"", b"", 0)),
        ("cat", bytes(range(256)), (bytes(range(256)), b"", 0)),
        ("cat", b"one\r\n1:two\r\n0:three", (b"one\r\n1:two\r\n0:three", b"", 0)),
        ("cat", b"x" * 3_000_000, (b"x" * 3_000_000, b"", 0)),
        ("kill -KILL $$", b"", (b"", b"", 137)),
        ("echo \"a  'b'\" | tr ab xy", b"", (b"x  'y'\n", b"", 0)),
        ("printf 'é\\000' >&2", b"", (b"", "é\0".encode(), 0)),
    ],
)
def test_text(
    daemon: Daemon, text: list[str], line: str, data: bytes, answer: tuple[bytes, bytes, int]
) -> None:
    assert run(text, daemon.path, line, input=data) == answer


def test_text_without_daemon(text: list[str], tmp_path: Path) -> None:
    stdout, stderr, code = run(text, str(tmp_path / "none"), "echo no")
    assert (stdout, code) == (b"", 125)
    assert stderr


@pytest.mark.parametrize("text", ["text.js", "text.pl"], indirect=True)
@pytest.mark.parametrize("data", [b"one\r\n\r\ntwo", b"one\r\n"])
def test_text_says_what_it_cannot_carry(daemon: Daemon, text: list[str], data: bytes) -> None:
    stdout, stderr, code = run(text, daemon.path, "cat", input=data)
    assert (stdout, code) == (b"", 125)
    assert b"CR LF CR LF" in stderr


@pytest.mark.parametrize(
    "argv, data, answer",
    [
        (["sh", "-c", "cat; echo err >&2; exit 3"], b"foo", (b"foo", b"err\n", 3)),
        (["true"], b"", (b"", b"", 0)),
        (["true"], bytes(3_000_000), (b"", b"", 0)),
        (["cat"], b"one\r\n\r\ntwo\r\n", (b"one\r\n\r\ntwo\r\n", b"", 0)),
        (["cat"], b"x" * 3_000_000, (b"x" * 3_000_000, b"", 0)),
        (["sh", "-c", "kill -KILL $$"], b"", (b"", b"", 137)),
        (["printf", "%s-", "", "é", ""], b"", ("-é--".encode(), b"", 0)),
        (["none-such"], b"", (b"", b"streams.js: cannot start none-such: ENOENT\n", 127)),
    ],
)
def test_streams(
    daemon: Daemon, streams: list[str], argv: list[str], data: bytes, answer: Any
) -> None:
    assert run(streams, daemon.path, *argv, input=data) == answer


def test_streams_without_daemon(streams: list[str], tmp_path: Path) -> None:
    stdout, stderr, code = run(streams, str(tmp_path / "none"), "true")
    assert (stdout, code) == (b"", 125)
    assert b"ENOENT" in stderr


def test_streamed_command_has_what_its_client_has(
    daemon: Daemon, streams: list[str], tmp_path: Path
) -> None:
    script = "pwd -P; umask; echo $EB_TEST"
    stdout, _, _ = run(
        streams,
        daemon.path,
        "sh",
        "-c",
        script,
        cwd=tmp_path,
        env={**os.environ, "EB_TEST": "here"},
        umask=0o27,
    )
    assert stdout.decode().split() == [str(tmp_path.resolve()), "0027", "here"]


def test_streams_while_input_is_open(daemon: Daemon, streams: list[str]) -> None:
    pipe = subprocess.PIPE
    command = [*streams, daemon.path, "sh", "-c", "read a; echo $a"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"foo\n")
        process.stdin.flush()
        assert process.stdout.read() == b"foo\n"
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_end_of_streams(daemon: Daemon, streams: list[str], number: int, code: int) -> None:
    command = [*streams, daemon.path, "sh", "-c", "echo $$; exec sleep 1000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
        assert select.select([pidfd], [], [], PATIENCE)[0]
        os.close(pidfd)


def test_one_connection_for_many_commands(daemon: Daemon, streams: list[str]) -> None:
    source = """
        const { Connection } = require(process.argv[1]);
        const { stdout, stderr } = process;
        (async () => {
          const connection = await Connection.open(process.argv[2]);
          const big = Buffer.alloc(300000, "x");
          console.log(await connection.run(["true"], { input: [big], stdout, stderr }));
          await connection.run(["none-such"], { stdout, stderr }).catch((e) => console.log(e.code));
          for (let i = 0; i < 20; i++)
            await connection.run(["cat"], { input: [Buffer.from(`${i} `)], stdout, stderr });
          console.log(await connection.run(["wc", "-c"], { input: [big, big], stdout, stderr }));
          connection.close();
        })();
    """
    said = run(["node", "-e", source, streams[1], daemon.path])
    numbers = " ".join(map(str, range(20)))
    assert said == (f"0\nENOENT\n{numbers} 600000\n0\n".encode(), b"", 0)
