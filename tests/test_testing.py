"""errand_boy.testing: registered commands, for each function that starts commands."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import ANY

import pytest
from conftest import script_environment
from daemon import Daemon

import errand_boy
import errand_boy.asyncio
from errand_boy import PIPE
from errand_boy.testing import FakeCommands, UnexpectedCommandError

pytest_plugins = ["errand_boy.testing"]

LS = ["no-such-program", "-l"]


@pytest.fixture(autouse=True)
def no_helper_is_left() -> Iterator[None]:
    yield
    errand_boy.stop()


def by_run(args: Any, **options: Any) -> tuple[int, str, str]:
    done = errand_boy.run(args, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def by_popen(args: Any, **options: Any) -> tuple[int, str, str]:
    process = errand_boy.Popen(args, stdout=PIPE, stderr=PIPE, encoding="utf-8", **options)
    assert process.args == args
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def by_map(args: Any, **options: Any) -> tuple[int, str, str]:
    (done,) = errand_boy.map([args], text=True, **options)
    assert done.args == args
    return done.returncode, done.stdout, done.stderr


def by_executor(args: Any, **options: Any) -> tuple[int, str, str]:
    with errand_boy.Executor(text=True) as executor:
        done = executor.submit(args, **options).result()
    return done.returncode, done.stdout, done.stderr


def by_asyncio(args: Any, **options: Any) -> tuple[int, str, str]:
    given = {"capture_output": True, "text": True, **options}
    done = asyncio.run(errand_boy.asyncio.run(args, **given))
    return done.returncode, done.stdout, done.stderr


def by_gevent(args: Any, **options: Any) -> tuple[int, str, str]:
    gevent = pytest.importorskip("errand_boy.gevent", reason="gevent is not installed")
    done = gevent.run(args, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def by_patch(args: Any, **options: Any) -> tuple[int, str, str]:
    errand_boy.patch()
    try:
        done = subprocess.run(args, capture_output=True, text=True, **options)
    finally:
        errand_boy.unpatch()
    return done.returncode, done.stdout, done.stderr


BY = [by_run, by_popen, by_map, by_executor, by_asyncio, by_gevent, by_patch]
By = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("by", BY)
def test_registered_commands_are_replaced(by: By, fake_commands: FakeCommands) -> None:
    fake_commands.register(LS, stdout="é\n", stderr=b"no\n", returncode=3)
    assert by(LS) == (3, "é\n", "no\n")
    fake_commands.register("echo $HOME | wc", stdout="shell")
    assert by("echo $HOME | wc", shell=True) == (0, "shell", "")
    assert fake_commands.calls == [LS, "echo $HOME | wc"]


@pytest.mark.parametrize("by", BY)
def test_unregistered_commands_are_not_started(by: By, fake_commands: FakeCommands) -> None:
    fake_commands.register(["git", "status"])
    with pytest.raises(UnexpectedCommandError) as error:
        by(["true", "1"])
    text = str(error.value)
    assert "tried to start ['true', '1']" in text
    assert "fake_commands.register(['true', '1']" in text
    assert "['git', 'status']" in text


@pytest.mark.parametrize("by", BY)
def test_allowed_commands_run(by: By, fake_commands: FakeCommands) -> None:
    fake_commands.allow(["echo", ...])
    fake_commands.allow("echo shell")
    assert by(["echo", "a", "b"]) == (0, "a b\n", "")
    assert by("echo shell", shell=True) == (0, "shell\n", "")


def test_through_a_daemon(fake_commands: FakeCommands, daemon: Daemon) -> None:
    fake_commands.register(LS, stdout="x")
    client = errand_boy.connect(daemon.path)
    assert client.run(LS, capture_output=True).stdout == b"x"
    assert client.check_output(LS, stdin=PIPE) == b"x"
    assert [done.stdout for done in client.map([LS])] == [b"x"]
    with pytest.raises(UnexpectedCommandError):
        client.run(["true"], capture_output=True)


def test_patterns(fake_commands: FakeCommands) -> None:
    fake_commands.register(["git", ANY, "-q"], stdout="one")
    fake_commands.register(["git", "commit", ...], stdout="rest")
    fake_commands.register("make", stdout="program")
    check_output = errand_boy.check_output
    assert check_output(["git", "add", "-q"]) == b"one"
    assert check_output(["git", "commit"]) == b"rest"
    assert check_output(["git", "commit", "-m", "x"]) == b"rest"
    assert check_output(("git", b"commit", Path("-q"))) == b"rest"  # the later one
    assert check_output("make") == check_output(["make"]) == b"program"
    for other in ["git", "add"], ["git", "add", "-q", "-v"], ["make", "all"]:
        with pytest.raises(UnexpectedCommandError):
            check_output(other)


def test_results_in_turn(fake_commands: FakeCommands) -> None:
    for number in range(3):
        fake_commands.register(LS, returncode=number)
    assert [errand_boy.call(LS) for _ in range(4)] == [0, 1, 2, 2]


def test_ends_and_errors_are_as_always(fake_commands: FakeCommands) -> None:
    fake_commands.register(LS, returncode=-signal.SIGTERM)
    done = errand_boy.run(LS)
    assert (done.returncode, done.cause) == (-signal.SIGTERM, "signal")
    with pytest.raises(errand_boy.CalledProcessError):
        errand_boy.run(LS, check=True)
    (result,) = errand_boy.map([LS])
    assert result.returncode == -signal.SIGTERM


def test_much_output_and_input(fake_commands: FakeCommands) -> None:
    data = os.urandom(1 << 20)
    fake_commands.register(LS, stdout=data)
    assert errand_boy.run(LS, input=data, stdout=PIPE).stdout == data
    assert errand_boy.run(LS, env={}, stdout=PIPE).stdout == data


def test_an_executable_of_its_own(fake_commands: FakeCommands) -> None:
    fake_commands.register(LS, stdout="x")
    assert errand_boy.check_output(LS, executable="/bin/true") == b"x"
    fake_commands.allow(["name"])
    assert errand_boy.call(["name"], executable="/bin/true") == 0


def test_without_the_fixture_commands_run() -> None:
    assert errand_boy.check_output(["echo", "real"]) == b"real\n"


# -- other mocks, as in docs/testing.md --


def test_mocks_of_subprocess_do_not_reach_us() -> None:
    for name in "run", "Popen", "check_output":
        with mock.patch(f"subprocess.{name}", side_effect=AssertionError):
            assert errand_boy.check_output(["echo", "real"]) == b"real\n"
            assert errand_boy.run(["true"]).returncode == 0


def test_mocks_of_our_functions_do() -> None:
    with mock.patch("errand_boy.run", return_value=7):
        assert errand_boy.run(["true"]) == 7  # type: ignore[comparison-overlap]


def test_pytest_subprocess_does_not_reach_us_but_what_is_patched() -> None:
    fake_process = pytest.importorskip("pytest_subprocess", reason="pip install pytest-subprocess")
    with fake_process.FakeProcess() as fake:
        fake.register(["echo", "fake"], stdout="faked")
        assert errand_boy.check_output(["echo", "fake"]) == b"fake\n"
        errand_boy.patch()
        try:
            assert subprocess.check_output(["echo", "fake"]) == b"faked"
        finally:
            errand_boy.unpatch()


@pytest.mark.slow
def test_the_library_does_not_import_pytest() -> None:
    code = """if True:
        import importlib, pkgutil, sys, errand_boy
        sys.modules.update(pytest=None)
        for each in pkgutil.walk_packages(errand_boy.__path__, "errand_boy."):
            if each.name.rpartition(".")[2] not in ("testing", "__main__"):
                try:
                    importlib.import_module(each.name)
                except ImportError as error:  # a framework, or what is for type checkers
                    assert error.name != "pytest", each.name"""
    subprocess.run([sys.executable, "-c", code], env=script_environment(), check=True)
