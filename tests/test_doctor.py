"""`errand-boy doctor`, where all is well and where something is missing or forbidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, find_program, script_environment
from daemon import Daemon
from test_direct import REFUSING

import errand_boy
from errand_boy import _doctor
from errand_boy._hints import SEE_DOCTOR
from errand_boy._process import direct

MAIN = """
import sys
from errand_boy._cli.args import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""
BLOCKED = f"import ctypes, errno, os\nlibc = ctypes.CDLL(None)\n{REFUSING}\n"
LANDLOCK_CREATE_RULESET = 444
IOCTL = 16 if os.uname().machine == "x86_64" else 29

pytestmark = pytest.mark.skipif(not direct.works(), reason="the system lacks what is needed")


def doctor(
    *arguments: str, before: str = "", under: list[str] | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run errand-boy doctor, after `before` in the same process."""
    code = (BLOCKED + before if before else "") + MAIN
    command = [*(under or []), sys.executable, "-c", code, *arguments]
    environment = {**script_environment(), **env}
    environment.pop("ERRAND_BOY_SPAWN", None) if "ERRAND_BOY_SPAWN" not in env else None
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def found(status: int, *arguments: str, **given: Any) -> dict[str, Any]:
    done = doctor("--json", *arguments, **given)
    assert (done.returncode, done.stderr) == (status, "")
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_all_is_well() -> None:
    value = found(0)
    assert (value["way"], value["error"], value["without_fork"]) == ("direct", None, True)
    assert value["version"] == errand_boy.__version__
    for name in "direct", "helper", "posix", "subprocess":
        assert value["ways"][name]["works"], value["ways"]
        assert value["ways"][name]["seconds"] > 0
    assert value["options"]['tree="all"']["works"]
    assert value["helper"]["executable"]
    assert value["system"]["proc"] and value["system"]["pidfd"]


def test_text_names_all_ways_and_options() -> None:
    done = doctor()
    assert done.returncode == 0
    assert "A command is started:     direct (this system has all" in done.stdout
    for name in (*_doctor._WAYS, *_doctor._OPTIONS):
        assert name in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert SEE_DOCTOR not in done.stdout


def test_no_process_is_left() -> None:
    code = """if True:
        import os
        from errand_boy import _doctor
        _doctor.examine()
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("none")"""
    command = [sys.executable, "-c", code]
    env = script_environment()
    assert subprocess.check_output(command, env=env, text=True) == "none\n"


@pytest.mark.parametrize("way", ["helper", "posix"])
def test_way_that_the_environment_asks_for(way: str) -> None:
    value = found(0, ERRAND_BOY_SPAWN=way)
    assert (value["way"], value["why"]) == ("helper", f"ERRAND_BOY_SPAWN={way} says so")
    assert value["environment"]["ERRAND_BOY_SPAWN"] == way
    assert any("without ERRAND_BOY_SPAWN" in advice for advice in value["advice"])


def test_unknown_way() -> None:
    value = found(1, ERRAND_BOY_SPAWN="fork")
    assert "ERRAND_BOY_SPAWN=fork" in value["error"]
    assert value["way"].startswith("none: ")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["CLOSE_RANGE", "CLONE"])
def test_seccomp_filter_is_noticed(call: str) -> None:
    before = f"refuse({call}, errno.EPERM)\n" + (
        "refuse(CLONE3, errno.ENOSYS)\n" * (call == "CLONE")
    )
    value = found(1, before=before)
    assert value["way"] == "subprocess"
    assert "close_range(2)" in value["why"]
    assert value["system"]["seccomp_filters"] >= 1
    assert not value["ways"]["direct"]["works"]
    assert any("seccomp filter" in advice for advice in value["advice"])
    done = doctor(before=before)
    assert done.returncode == 1
    assert "  no  direct" in done.stdout


def test_a_kernel_without_landlock() -> None:
    before = f"refuse({LANDLOCK_CREATE_RULESET}, errno.ENOSYS)\n"
    value = found(0, before=before)
    assert value["system"]["landlock"] == 0
    assert "no Landlock" in value["options"]["sandbox="]["error"]
    assert any("landlock among" in advice for advice in value["advice"])


def test_a_helper_that_fails() -> None:
    value = found(0, ERRAND_BOY_HELPER="/bin/false")
    assert value["way"] == "direct"
    assert "exit status 1" in value["ways"]["helper"]["error"]
    value = found(0, ERRAND_BOY_HELPER="/none/helper")
    assert value["helper"] == {"path": "/none/helper", "executable": False}
    assert any("/none/helper must be a program" in advice for advice in value["advice"])


@pytest.mark.root
def test_without_proc() -> None:
    find_program("unshare", "util-linux")
    value = found(0, under=["unshare", "-m", "sh", "-c", 'umount -l /proc && exec "$@"', "sh"])
    assert value["way"] == "direct"
    assert not value["system"]["proc"]
    assert any("mount /proc" in advice for advice in value["advice"])


@pytest.mark.slow
def test_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    value = found(0, "--socket", daemon.path)
    assert value["daemon"]["answers"]
    assert value["daemon"]["version"] == errand_boy.__version__
    value = found(0, ERRAND_BOY_SOCKET=f"{tmp_path}/none")
    assert value["daemon"]["socket"] == f"{tmp_path}/none"
    assert "no errand-boy daemon listens here" in value["daemon"]["error"]
    assert value["without_fork"]  # this is about the process itself


# -- messages that name it --


@pytest.mark.parametrize(
    ("before", "call"),
    [
        ("refuse(CLOSE_RANGE, errno.EPERM)", "nice=5"),
        ("refuse(CLOSE_RANGE, errno.EPERM)", "tree='all'"),
        ("refuse(CLOSE_RANGE, errno.EPERM); os.environ['ERRAND_BOY_SPAWN'] = 'direct'", ""),
        (f"refuse({LANDLOCK_CREATE_RULESET}, errno.ENOSYS)", "sandbox={'system': True}"),
        ("os.environ['ERRAND_BOY_CGROUP'] = '/none'", "limits={'cpu': 1}, limits_by='cgroup'"),
        ("os.environ['ERRAND_BOY_SPAWN'] = 'direct'", "tree='all'"),
        (f"refuse({IOCTL}, errno.EPERM)", "pty=True"),
        ("os.environ['ERRAND_BOY_HELPER'] = '/none'", "limits={'cpu': 1}"),
        ("os.environ['ERRAND_BOY_HELPER'] = '/bin/false'", "limits={'cpu': 1}"),
    ],
)
def test_messages_about_missing_features_name_the_doctor(before: str, call: str) -> None:
    code = f"""{BLOCKED}
import errand_boy
{before}
try:
    errand_boy.run(["true"], {call})
except OSError as error:
    print(error.strerror)
"""
    env = {name: value for name, value in os.environ.items() if name != "ERRAND_BOY_SPAWN"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **script_environment()},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.endswith(SEE_DOCTOR + "\n"), done
