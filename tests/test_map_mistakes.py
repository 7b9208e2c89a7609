"""How errand_boy.map reports mistakes, and how it copes with shortages."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script
from daemon import started_daemon

import errand_boy

Map = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_helper_left() -> Iterator[None]:
    yield
    errand_boy.stop()


def test_error_is_in_the_representation() -> None:
    (done,) = errand_boy.map(["no such program"])
    assert done.returncode == 127
    assert repr(done) == (
        "Result(args='no such program', returncode=127, stdout=b'', stderr=b'', "
        "error=FileNotFoundError(2, 'No such file or directory'))"
    )
    (done,) = errand_boy.map(["true"])
    assert repr(done) == "Result(args='true', returncode=0, stdout=b'', stderr=b'')"


@pytest.mark.parametrize("commands", [["ls", "-l"], ("ls", "/", "-l"), ["git", "log", "-1"]])
def test_one_command_in_the_place_of_several(commands: Any) -> None:
    with pytest.raises(TypeError, match=r"each item is a command.*\[\[\.\.\.\]\]"):
        errand_boy.map(commands)


@pytest.mark.parametrize("commands", ["ls -l", b"ls"])
def test_string_in_the_place_of_several(commands: Any) -> None:
    with pytest.raises(TypeError, match="commands must be an iterable"):
        errand_boy.map(commands)


def test_strings_are_several() -> None:
    assert [done.returncode for done in errand_boy.map(["true", "false"])] == [0, 1]
    assert [done.returncode for done in errand_boy.map(["exit 3", "true"], shell=True)] == [3, 0]
    # An iterator's first items are not looked at ahead.
    assert [done.returncode for done in errand_boy.map(iter(["true", "-l"]))] == [0, 127]


def test_undecodable_output_is_no_success() -> None:
    script = "printf 'a\\377b'; printf 'c\\376' >&2; exit "
    zero, three = errand_boy.map([script + "0", script + "3"], shell=True, encoding="utf-8")
    assert (zero.returncode, three.returncode) == (125, 3)
    for done in zero, three:
        assert (done.stdout, done.stderr) == ("a\\xffb", "c\\xfe")
        assert isinstance(done.error, UnicodeDecodeError)
        assert done.failed
        with pytest.raises(UnicodeDecodeError):
            done.check_returncode()
    (lenient,) = errand_boy.map([["printf", r"\377"]], encoding="utf-8", errors="replace")
    assert (lenient.stdout, lenient.error, lenient.returncode) == ("\ufffd", None, 0)


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="max_workers must be a number, not '2'"):
        errand_boy.map([["true"]], max_workers="2")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"map\(\) .* 'max_worker'. Did you mean 'max_workers'\?"):
        errand_boy.map([["true"]], max_worker=2)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"'no_new_priv'. Did you mean 'no_new_privs'\?"):
        errand_boy.map([["true"]], no_new_priv=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"mapping .* 'cwdd'. Did you mean 'cwd'\?"):
        list(errand_boy.map([{"args": ["true"], "cwdd": "/"}]))


# -- other ids --


ID = "id -u; id -g; id -G"


@pytest.mark.root
def test_user_and_group() -> None:
    nobody = pwd.getpwnam("nobody")
    given: dict[str, Any] = {
        "user": "nobody",
        "group": nobody.pw_gid,
        "extra_groups": [7, "daemon"],
    }
    expected = f"{nobody.pw_uid}\n{nobody.pw_gid}\n{nobody.pw_gid} 1 7\n"
    commands: list[Any] = [ID, {"args": ID, "user": 1, "extra_groups": []}]
    first, second = errand_boy.map(commands, shell=True, text=True, **given)
    assert first.stdout == expected
    assert second.stdout == f"1\n{nobody.pw_gid}\n{nobody.pw_gid}\n"
    # And not for the others.
    (own,) = errand_boy.map(["id -u"], shell=True, text=True)
    assert own.stdout == f"{os.geteuid()}\n"


@pytest.mark.root
def test_user_by_a_daemon_of_root(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        client = errand_boy.connect(daemon.path)
        (done,) = client.map([["id", "-u"]], user="nobody", text=True)
        assert done.stdout == f"{pwd.getpwnam('nobody').pw_uid}\n"
        client.close()


def test_user_that_is_none() -> None:
    with pytest.raises(KeyError):
        errand_boy.map([["true"]], user="no such user")
    with pytest.raises(TypeError, match="user must be a string or an integer"):
        errand_boy.map([["true"]], user=1.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="can't be negative"):
        errand_boy.map([["true"]], group=-1)
    with pytest.raises(TypeError, match="extra_groups must be a list"):
        errand_boy.map([["true"]], extra_groups="daemon")


# -- descriptors --


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "workers"), [(64, 120), (256, 120), (1024, 700)])
def test_helper_without_descriptors_puts_commands_off(limit: int, workers: int) -> None:
    # The commands are slow enough that very many would run at once.
    script = """
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
    import errand_boy
    commands = ["echo $$; exec sleep 0.2"] * int(sys.argv[3])
    results = list(errand_boy.map(commands, shell=True, max_workers=int(sys.argv[3])))
    report([len(results), sorted({(done.returncode, repr(done.error)) for done in results})])
    """
    done = run_script(script, args=[limit, workers])
    assert done == [workers, [[0, "None"]]]
