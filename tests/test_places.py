"""The namespaces and the cgroup in which a command starts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import LONGEST_SCRIPT, run_script, started_script

import errand_boy
from errand_boy._process import direct

run = cast(Any, errand_boy.run)
MINE = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
NAMES = {"cgroup": "cgroup", "ipc": "ipc", "mount": "mnt", "net": "net", "user": "user"}
NAMES |= {"pid": "pid", "uts": "uts"}
LIST = ["sh", "-c", "cd /proc/self/ns && for n in *; do echo $n $(readlink $n); done"]


def has_user_namespaces() -> bool:
    return subprocess.run(["unshare", "-Urn", "true"], stderr=subprocess.DEVNULL).returncode == 0


needs_users = pytest.mark.skipif(
    shutil.which("unshare") is None or not has_user_namespaces(),
    reason="the machine forbids user namespaces",
)


@pytest.mark.slow
@needs_users
@pytest.mark.parametrize("names", [["user", "net"], list(NAMES), ["user"]], ids="-".join)
def test_namespaces(names: list[str], spawn: str, client: Any) -> None:
    if spawn == "posix":
        with pytest.raises(OSError, match="namespaces") as caught:
            run(["true"], namespaces=names)
        assert caught.value.errno == errno.ENOTSUP
        return
    results = [
        run(LIST, capture_output=True, text=True, namespaces=names),
        next(errand_boy.map([LIST], text=True, namespaces=names)),
        client.run(LIST, capture_output=True, text=True, namespaces=names),
    ]
    for done in results:
        found = dict(line.split() for line in done.stdout.splitlines())
        new = {name for name, kernels in NAMES.items() if found[kernels] != MINE[kernels]}
        assert new == set(names), done.stderr
    for name, link in MINE.items():
        assert os.readlink(f"/proc/self/ns/{name}") == link


@needs_users
def test_ids_in_a_namespace_of_users_are_the_same(spawn: str) -> None:
    if spawn == "posix":
        pytest.skip("posix_spawn can't do it")
    command = ["sh", "-c", "id -u; id -g; cat /proc/self/uid_map /proc/self/setgroups"]
    done = run(command, capture_output=True, text=True, namespaces={"user"})
    uid, gid = os.geteuid(), os.getegid()
    assert done.stdout.split() == [str(uid), str(gid), str(uid), str(uid), "1", "deny"]


@needs_users
@pytest.mark.root
def test_without_roots_rights(public_dir: Path) -> None:
    """Another user's process gets the same, or an error that says what is missing."""
    source = """
        import errand_boy
        errand_boy.run(["true"], no_new_privs=True)  # nothing is imported after this
        os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as if it had been executed so
        done = errand_boy.run(["id", "-u"], capture_output=True, namespaces={"user", "net"})
        try:
            errand_boy.run(["true"], namespaces={"net"})
        except PermissionError as error:
            report([done.stdout.decode(), str(error)])
    """
    out, error = run_script(source)
    assert out == "65534\n"
    assert 'namespaces: net: Operation not permitted: without root\'s rights, "user" must' in error


@needs_users
def test_command_is_pid_1_in_a_pid_namespace() -> None:
    done = run(["sh", "-c", "echo $$"], capture_output=True, text=True, namespaces={"user", "pid"})
    assert done.stdout == "1\n"


@needs_users
def test_with_pipes_of_high_numbers() -> None:
    """The new process has no right to reopen them by their names."""
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    try:
        done = run(["cat"], input=b"x", capture_output=True, namespaces={"user"})
        assert done.stdout == b"x"
        assert run(["cat"], input=b"x", capture_output=True).stdout == b"x"
    finally:
        for fd in files:
            os.close(fd)


@needs_users
def test_a_namespace_more_than_the_machine_allows() -> None:
    source = """
        import errand_boy
        with open("/proc/self/uid_map") as file:
            file.read()
        try:
            errand_boy.run(["true"], namespaces={"user", "net"})
        except OSError as error:
            report([error.errno, str(error)])
    """
    command = 'echo 0 >/proc/sys/user/max_net_namespaces && exec "$@"'
    under = ["unshare", "-Ur", "sh", "-c", command, "sh"]
    number, text = script_under(source, under)
    assert number == errno.ENOSPC
    assert "namespaces: net, user: No space left on device: see the limits" in text


def script_under(source: str, under: list[str]) -> Any:
    with started_script(source, under=under) as process:
        out, err = process.communicate(timeout=LONGEST_SCRIPT)
    assert process.returncode == 0, err
    return json.loads(out)


def test_bad_namespaces() -> None:
    with pytest.raises(ValueError, match="namespaces: 'time' is not one of cgroup, ipc, mount"):
        run(["true"], namespaces={"time"})
    with pytest.raises(TypeError, match="namespaces: 'net' must be a set"):
        run(["true"], namespaces="net")
    assert run(["true"], namespaces=()).returncode == 0


def test_refused_ones_leave_the_direct_way() -> None:
    """EPERM for namespaces does not mean that a filter refuses clone."""
    source = """
        import errand_boy
        from errand_boy._process import direct as _direct
        errand_boy.run(["true"], no_new_privs=True)  # nothing is imported after this
        os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
        for _ in range(2):
            try:
                errand_boy.run(["true"], namespaces={"net"})
            except PermissionError:
                pass
        report(_direct.works())
    """
    if os.geteuid() != 0:
        pytest.skip("needs the rights of root")
    assert run_script(source) is True
    assert direct.works()


# cgroups


def writable_cgroups() -> list[Path]:
    """A directory of each kind of hierarchy in which this process may make cgroups."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "pids" in path):
            found.setdefault(kind, Path(path))
    return [path for path in found.values() if os.access(path, os.W_OK)]


@pytest.fixture(params=range(2), ids=["first kind", "second kind"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    kinds = writable_cgroups()
    if request.param >= len(kinds):
        pytest.skip("no such cgroups can be made here")
    path = kinds[request.param] / f"errand-boy-test-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()


def test_cgroup(cgroup: Path, spawn: str, client: Any) -> None:
    command = ["cat", "/proc/self/cgroup"]
    if spawn == "posix":
        with pytest.raises(OSError, match="cgroup") as caught:
            run(command, cgroup=cgroup)
        assert caught.value.errno == errno.ENOTSUP
        return
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        results = [
            run(command, capture_output=True, cgroup=cgroup),
            run(command, capture_output=True, cgroup=fd),
            *errand_boy.map([command, command], cgroup=os.fspath(cgroup)),
            client.run(command, capture_output=True, cgroup=fd),
        ]
    finally:
        os.close(fd)
    for done in results:
        assert f"/{cgroup.name}\n".encode() in done.stdout
    assert cgroup.name not in Path("/proc/self/cgroup").read_text()


def test_invalid_cgroups_are_refused(tmp_path: Path) -> None:
    for path, number in (
        (tmp_path, errno.ENOENT),
        (tmp_path / "missing", errno.ENOENT),
        ("/etc/passwd", errno.ENOTDIR),
    ):
        with pytest.raises(OSError) as caught:
            run(["true"], cgroup=path)
        assert caught.value.errno == number
        assert str(path) in str(caught.value)


def test_threads_in_namespaces() -> None:
    if not has_user_namespaces():
        pytest.skip("the machine forbids user namespaces")
    codes: list[int] = []

    def work() -> None:
        for _ in range(10):
            codes.append(run(["true"], namespaces={"user", "uts"}).returncode)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 80
