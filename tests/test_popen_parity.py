"""Every parameter of subprocess.Popen, with the standard library and with errand_boy."""

from __future__ import annotations

import collections
import errno
import fcntl
import grp
import itertools
import json
import os
import pwd
import resource
import signal
import socket
import subprocess as stdlib
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import compare_scripts, run_script, started_script, with_enough_time

import errand_boy

# Prints what each of its descriptors is.
DESCRIPTORS = """
import json, os, sys
links = {}
for name in os.listdir("/proc/self/fd"):
    try:
        links[name] = os.readlink("/proc/self/fd/" + name)
    except FileNotFoundError:
        pass  # the one that listed the directory
text = json.dumps(links)
if sys.argv[1:]:
    with open(sys.argv[1], "w") as out:
        out.write(text)
else:
    print(text)
"""
SHOW_DESCRIPTORS = [sys.executable, "-I", "-S", "-c", DESCRIPTORS]

SHOW_SIGNALS = ["grep", "^SigIgn:", "/proc/self/status"]


def make_program(path: Path, text: str, mode: int = 0o755) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def links_of(result: stdlib.CompletedProcess[Any]) -> dict[int, str]:
    return {int(name): link for name, link in json.loads(result.stdout).items()}


# The module


@pytest.mark.parametrize("name", [*stdlib.__all__, "list2cmdline"])
def test_every_public_name_of_subprocess_is_there(name: str) -> None:
    assert hasattr(errand_boy, name)


@pytest.mark.parametrize("name", ["SubprocessError", "CalledProcessError", "TimeoutExpired"])
def test_exceptions_are_the_standard_librarys_own(name: str) -> None:
    assert getattr(errand_boy, name) is getattr(stdlib, name)


def test_popen_is_a_subclass_of_the_standard_librarys() -> None:
    assert issubclass(errand_boy.Popen, stdlib.Popen)
    assert errand_boy.Popen is not stdlib.Popen
    with errand_boy.Popen(["true"]) as process:
        assert isinstance(process, stdlib.Popen)


# args and executable


@pytest.mark.portable
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["echo", "a b", "c"], b"a b c\n"),
        (("echo", "tuple"), b"tuple\n"),
        ("pwd", None),
        (b"pwd", None),
        (Path("/bin/pwd"), None),
        ([b"echo", b"\xff\x01"], b"\xff\x01\n"),
        (["echo", "\udcff"], b"\xff\n"),
        ([Path("/bin/echo"), "x", b"y", Path("z")], b"x y z\n"),
        (["printf", "[%s]", "", "a", "", ""], b"[][a][][]"),
        (["printf", "%s", "line\nfeed\ttab"], b"line\nfeed\ttab"),
    ],
)
def test_args(subprocess: Any, args: Any, expected: bytes | None) -> None:
    expected = os.fsencode(os.getcwd()) + b"\n" if expected is None else expected
    result = subprocess.run(args, stdout=subprocess.PIPE)
    assert (result.returncode, result.stdout) == (0, expected)
    assert result.args is args


@pytest.mark.portable
def test_args_may_be_an_iterator(subprocess: Any) -> None:
    assert subprocess.check_output(iter(["echo", "x"])) == b"x\n"


@pytest.mark.portable
@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ('echo $((1 + 2)); echo "$0"', {}, b"3\n/bin/sh\n"),
        (b"echo bytes", {}, b"bytes\n"),
        (["echo $0 $1 $2", "zero", "", "two"], {}, b"zero two\n"),
        ("echo $0", {"executable": "/bin/bash"}, b"/bin/bash\n"),
        (["echo $0", "zero"], {"executable": "/bin/bash"}, b"zero\n"),
        ("exit 3", {}, b""),
    ],
)
def test_shell(subprocess: Any, args: Any, options: dict[str, Any], expected: bytes) -> None:
    result = subprocess.run(args, shell=True, stdout=subprocess.PIPE, **options)
    assert result.stdout == expected
    assert result.returncode == (3 if args == "exit 3" else 0)


@pytest.mark.portable
@pytest.mark.parametrize("executable", ["/bin/sh", b"/bin/sh", Path("/bin/sh"), "sh"])
def test_executable_differs_from_the_first_argument(subprocess: Any, executable: Any) -> None:
    command = ["zero", "-c", 'echo "$0"; cat /proc/$$/cmdline']
    result = subprocess.run(command, executable=executable, stdout=subprocess.PIPE)
    assert result.stdout == b"zero\n" + b"\0".join(os.fsencode(word) for word in command) + b"\0"


# The search through PATH


@pytest.mark.portable
@pytest.mark.parametrize("key", ["PATH", b"PATH"])
def test_program_is_searched_in_the_path_of_env(subprocess: Any, key: Any, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        make_program(tmp_path / name / "found", f"echo {name}")
    path: Any = f"{tmp_path}/none:{tmp_path}/first:{tmp_path}/second"
    env = {key: os.fsencode(path) if isinstance(key, bytes) else path}
    assert subprocess.check_output(["found"], env=env) == b"first\n"


@pytest.mark.portable
def test_program_is_searched_in_the_path_of_the_caller(
    subprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(tmp_path / "found", "echo caller")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert subprocess.check_output(["found"]) == b"caller\n"


@pytest.mark.portable
@pytest.mark.parametrize("earlier", ["not executable", "directory", "file as directory"])
def test_what_cannot_be_run_earlier_in_path_is_passed_over(
    subprocess: Any, earlier: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    make_program(second / "found", "echo second")
    if earlier == "file as directory":
        first.touch()
    else:
        first.mkdir()
    if earlier == "not executable":
        make_program(first / "found", "echo first", 0o644)
    if earlier == "directory":
        (first / "found").mkdir()
    assert subprocess.check_output(["found"], env={"PATH": f"{first}:{second}"}) == b"second\n"


@pytest.mark.portable
@pytest.mark.parametrize("path", ["", ":/none", "/none:", "/none::/none", "."])
def test_empty_element_of_path_is_the_childs_directory(
    subprocess: Any, path: str, tmp_path: Path
) -> None:
    make_program(tmp_path / "found", "echo here")
    assert subprocess.check_output(["found"], env={"PATH": path}, cwd=tmp_path) == b"here\n"


@pytest.mark.portable
def test_path_falls_back_to_the_default_when_env_has_none(subprocess: Any) -> None:
    assert subprocess.check_output(["echo", "x"], env={}) == b"x\n"


@pytest.mark.portable
def test_name_with_a_slash_is_not_searched(subprocess: Any, tmp_path: Path) -> None:
    make_program(tmp_path / "prog", "echo here")
    env = {"PATH": str(tmp_path)}
    with pytest.raises(FileNotFoundError):
        subprocess.run(["./prog"], env=env, cwd="/")


# stdin, stdout and stderr


@pytest.mark.portable
@pytest.mark.parametrize("kind", ["PIPE", "DEVNULL", "int", "file", "socket"])
def test_stdin(subprocess: Any, kind: str) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"from file")
        file.seek(0)
        ours, theirs = socket.socketpair()
        ours.sendall(b"from socket")
        ours.close()
        stdin = {
            "PIPE": subprocess.PIPE,
            "DEVNULL": subprocess.DEVNULL,
            "int": file.fileno(),
            "file": file,
            "socket": theirs,
        }[kind]
        process = subprocess.Popen(["cat"], stdin=stdin, stdout=subprocess.PIPE)
        out, err = process.communicate(b"from pipe" if kind == "PIPE" else None)
        theirs.close()
    expected = {"PIPE": b"from pipe", "DEVNULL": b"", "socket": b"from socket"}
    assert (out, err) == (expected.get(kind, b"from file"), None)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["PIPE", "DEVNULL", "int", "file"])
def test_output(subprocess: Any, name: str, kind: str) -> None:
    command = "echo to stdout; echo to stderr >&2"
    other = "stderr" if name == "stdout" else "stdout"
    with tempfile.TemporaryFile() as file:
        target = {
            "PIPE": subprocess.PIPE,
            "DEVNULL": subprocess.DEVNULL,
            "int": file.fileno(),
            "file": file,
        }[kind]
        options = {name: target, other: subprocess.DEVNULL}
        result = subprocess.run(command, shell=True, **options)
        file.seek(0)
        written = result.stdout if name == "stdout" else result.stderr
        if kind in ("int", "file"):
            assert written is None
            written = file.read()
    expected = None if kind == "DEVNULL" else f"to {name}\n".encode()
    assert written == expected


@pytest.mark.portable
def test_stderr_joins_stdout_in_order(subprocess: Any) -> None:
    command = "echo 1; echo 2 >&2; echo 3; echo 4 >&2"
    out = subprocess.check_output(command, shell=True, stderr=subprocess.STDOUT)
    assert out == b"1\n2\n3\n4\n"


@pytest.mark.portable
def test_stderr_joins_an_inherited_stdout(
    subprocess: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run("echo x >&2", shell=True, stderr=subprocess.STDOUT)
    assert capfd.readouterr() == ("x\n", "")


@pytest.mark.portable
def test_one_socket_as_all_three(subprocess: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = 'read line; echo "out $line"; echo "err $line" >&2'
        process = subprocess.Popen(command, shell=True, stdin=theirs, stdout=theirs, stderr=theirs)
        theirs.close()
        ours.sendall(b"hello\n")
        with ours.makefile("rb") as stream:
            assert stream.read() == b"out hello\nerr hello\n"
        assert process.wait() == 0


@pytest.mark.portable
def test_nonblocking_flag_of_a_passed_descriptor_stays(subprocess: Any) -> None:
    r, w = os.pipe()
    for blocking in (False, True):
        os.set_blocking(r, blocking)
        subprocess.run(["true"], stdin=r)
        assert os.get_blocking(r) is blocking
    os.close(r)
    os.close(w)


SWAPS = """
    import itertools
    work = sys.argv[2]
    source = sys.argv[3]
    start()
    for number in range(3):
        descriptor = os.open(f"{work}/{number}", os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    for stdin, stdout, stderr in itertools.product(range(3), repeat=3):
        out = f"{work}/{stdin}{stdout}{stderr}"
        command = [sys.executable, "-I", "-S", "-c", source, out]
        subprocess.run(command, stdin=stdin, stdout=stdout, stderr=stderr, check=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["subprocess", "errand_boy"])
def test_spawn_stdout_and_stderr_to_file_swap(implementation: str, tmp_path: Path) -> None:
    with started_script(SWAPS, implementation, [tmp_path, DESCRIPTORS]) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err + (tmp_path / "2").read_text()
    for chosen in itertools.product(range(3), repeat=3):
        links = json.loads((tmp_path / "{}{}{}".format(*chosen)).read_text())
        assert [links[str(n)] for n in range(3)] == [f"{tmp_path}/{n}" for n in chosen]


CLOSED = """
    closed, piped, out, source = sys.argv[2:6]
    start()
    for number in closed:
        os.close(int(number))
    names = {"0": "stdin", "1": "stdout", "2": "stderr"}
    options = {names[number]: subprocess.PIPE for number in piped}
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", source, out], **options)
    process.communicate()
    os._exit(process.returncode)
"""

SUBSETS = ["", "0", "1", "2", "01", "02", "12", "012"]


@pytest.mark.slow
@pytest.mark.parametrize("piped", SUBSETS)
@pytest.mark.parametrize("closed", SUBSETS[1:])
def test_closed_standard_descriptors_of_the_caller(closed: str, piped: str, tmp_path: Path) -> None:
    seen = []
    for implementation in ("subprocess", "errand_boy"):
        out = tmp_path / implementation
        with started_script(
            CLOSED, implementation, [closed, piped, out, DESCRIPTORS], stdin=stdlib.DEVNULL
        ) as process:
            _, err = process.communicate()
        assert process.returncode == 0, err
        # Which pipe it is differs from run to run.
        links = json.loads(out.read_text())
        seen.append({number: link.partition("[")[0] for number, link in links.items()})
    expected, observed = seen
    assert observed == expected


@pytest.mark.slow
@pytest.mark.parametrize("piped", SUBSETS)
def test_pipe_that_takes_the_number_of_a_closed_standard_descriptor(
    piped: str, tmp_path: Path
) -> None:
    source = """
        closed, piped = "012", sys.argv[2]
        start()
        report_to = os.dup(1)
        for number in closed:
            os.close(int(number))
        names = {"0": "stdin", "1": "stdout", "2": "stderr"}
        options = {names[number]: subprocess.PIPE for number in piped}
        command = "read line; echo out $line; echo err $line >&2"
        process = subprocess.Popen(command, shell=True, **options)
        answer = process.communicate(b"hello\\n" if "0" in piped else None)
        text = [part.decode() if part else part for part in answer]
        os.write(report_to, json.dumps(text[:1] if "2" not in piped else text).encode())
        os._exit(0)
    """
    compare_scripts(source, [piped])


# pass_fds and close_fds


@pytest.mark.portable
def test_pass_fds_one(subprocess: Any) -> None:
    r, w = os.pipe()
    command = f"echo through {w} >&{w}"
    subprocess.run(["/bin/bash", "-c", command], pass_fds=[w], check=True)
    os.close(w)
    with open(r, "rb") as stream:
        assert stream.read() == f"through {w}\n".encode()


@pytest.mark.portable
@pytest.mark.parametrize("count", [250, 1000])
def test_pass_fds_many_each_at_its_own_number(subprocess: Any, count: int, tmp_path: Path) -> None:
    passed = {}
    try:
        for number in range(count):
            path = tmp_path / str(number)
            passed[os.open(path, os.O_RDWR | os.O_CREAT)] = str(path)
        result = subprocess.run(SHOW_DESCRIPTORS, pass_fds=list(passed), stdout=subprocess.PIPE)
        links = links_of(result)
        assert {fd: link for fd, link in links.items() if fd > 2} == passed
        assert not any(os.get_inheritable(fd) for fd in passed)
    finally:
        for fd in passed:
            os.close(fd)


@pytest.mark.parametrize("implementation", ["subprocess", "errand_boy", "errand_boy-posix"])
def test_pass_fds_at_the_helpers_own_numbers(implementation: str, tmp_path: Path) -> None:
    source = """
        work, source = sys.argv[2:]
        # Opened before the helper starts, so that the numbers it uses itself are among them.
        passed = {}
        for number in range(3, 100):
            path = f"{work}/{number}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
            passed[descriptor] = path
        start()
        command = [sys.executable, "-I", "-S", "-c", source]
        links = json.loads(subprocess.check_output(command, pass_fds=list(passed)))
        links = {int(number): link for number, link in links.items() if int(number) > 2}
        report([len(links), links == passed])
    """
    name, _, spawn = implementation.partition("-")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ERRAND_BOY_SPAWN", spawn) if spawn else None
        assert run_script(source, name, [tmp_path, DESCRIPTORS]) == [97, True]


@pytest.mark.portable
def test_pass_fds_highest_number_under_the_limit(subprocess: Any) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    r, w = os.pipe()
    highest = [fcntl.fcntl(w, fcntl.F_DUPFD_CLOEXEC, limit - back) for back in (3, 2, 1)]
    try:
        assert highest == [limit - 3, limit - 2, limit - 1]
        links = links_of(subprocess.run(SHOW_DESCRIPTORS, pass_fds=highest, stdout=subprocess.PIPE))
        pipe = os.readlink(f"/proc/self/fd/{w}")
        assert {fd: link for fd, link in links.items() if fd > 2} == dict.fromkeys(highest, pipe)
    finally:
        for fd in (r, w, *highest):
            os.close(fd)


@pytest.mark.portable
def test_pass_fds_duplicates_count_once(subprocess: Any) -> None:
    r, w = os.pipe()
    links = links_of(
        subprocess.run(SHOW_DESCRIPTORS, pass_fds=[w, r, w, w], stdout=subprocess.PIPE)
    )
    assert {fd for fd in links if fd > 2} == {r, w}
    os.close(r)
    os.close(w)


@pytest.mark.portable
def test_pass_fds_that_is_stdin_too(subprocess: Any) -> None:
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        links = links_of(
            subprocess.run(SHOW_DESCRIPTORS, stdin=fd, pass_fds=[fd], stdout=subprocess.PIPE)
        )
    assert links[0] == links[fd]


@pytest.mark.portable
def test_pass_fds_names_a_standard_descriptor_that_is_redirected(subprocess: Any) -> None:
    result = subprocess.run(
        "echo x; echo y >&2", shell=True, pass_fds=[0, 1, 2], capture_output=True
    )
    assert (result.stdout, result.stderr) == (b"x\n", b"y\n")


@pytest.mark.portable
def test_pass_fds_overrides_close_fds(subprocess: Any) -> None:
    r, w = os.pipe()
    unwanted = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(unwanted, True)
    with pytest.warns(RuntimeWarning, match="pass_fds overriding close_fds") as caught:
        result = subprocess.run(
            SHOW_DESCRIPTORS, close_fds=False, pass_fds=[w], stdout=subprocess.PIPE
        )
    assert len(caught) == 1
    assert {fd for fd in links_of(result) if fd > 2} == {w}
    for fd in (r, w, unwanted):
        os.close(fd)


@pytest.mark.portable
def test_close_fds_closes_inheritable_descriptors(subprocess: Any) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(fd, True)
    links = links_of(subprocess.run(SHOW_DESCRIPTORS, stdout=subprocess.PIPE))
    os.close(fd)
    assert set(links) == {0, 1, 2}


@pytest.mark.portable
@pytest.mark.parametrize("count", [1, 300])
def test_close_fds_false_passes_inheritable_descriptors_at_their_numbers(
    subprocess: Any, count: int
) -> None:
    files = [tempfile.TemporaryFile() for _ in range(count)]
    private = os.open("/dev/null", os.O_RDONLY)
    try:
        for file in files:
            os.set_inheritable(file.fileno(), True)
        result = subprocess.run(SHOW_DESCRIPTORS, close_fds=False, stdout=subprocess.PIPE)
        expected = {f.fileno(): os.readlink(f"/proc/self/fd/{f.fileno()}") for f in files}
        links = links_of(result)
        # Whatever else the test runner left inheritable is passed as well.
        assert {fd: links.get(fd) for fd in expected} == expected
        assert private not in links
    finally:
        os.close(private)
        for file in files:
            file.close()


# cwd


@pytest.mark.portable
@pytest.mark.parametrize("kind", [str, os.fsencode, Path], ids=["str", "bytes", "path"])
def test_cwd(subprocess: Any, kind: Any, tmp_path: Path) -> None:
    out = subprocess.check_output(["pwd", "-P"], cwd=kind(str(tmp_path)))
    assert out == os.fsencode(tmp_path) + b"\n"


@pytest.mark.portable
def test_relative_cwd(subprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    out = subprocess.check_output(["pwd", "-P"], cwd="sub")
    assert out == os.fsencode(tmp_path / "sub") + b"\n"


@pytest.mark.portable
@pytest.mark.parametrize("cwd", [None, "sub"])
def test_relative_program_is_looked_up_from_cwd(
    subprocess: Any, cwd: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(tmp_path / "prog", "echo outer")
    (tmp_path / "sub").mkdir()
    make_program(tmp_path / "sub" / "prog", "echo inner")
    monkeypatch.chdir(tmp_path)
    out = subprocess.check_output(["./prog"], cwd=cwd)
    assert out == (b"inner\n" if cwd else b"outer\n")


# env


@pytest.mark.portable
def test_env_none_is_the_callers(subprocess: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_TEST", "a=b c")
    assert subprocess.check_output(["printenv", "ERRAND_BOY_TEST"]) == b"a=b c\n"


@pytest.mark.portable
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, b""),
        ({"A": "1", "B": ""}, b"A=1\0B=\0"),
        ({"B": "1", "A": "2"}, b"B=1\0A=2\0"),
        ({b"A": b"\xff", "B": "\udcfe"}, b"A=\xff\0B=\xfe\0"),
        ({"A": "x=y=z"}, b"A=x=y=z\0"),
        ({"A": Path("/p")}, b"A=/p\0"),
        ({"a b\n": "c\n"}, b"a b\n=c\n\0"),
        (collections.ChainMap({"A": "1"}, {"B": "2"}), None),
        ({f"V{n}": "x" * 100 for n in range(1000)}, None),
    ],
    ids=["empty", "two", "order", "bytes", "equals", "path", "odd", "map", "many"],
)
def test_env(subprocess: Any, env: Any, expected: bytes | None) -> None:
    if expected is None:
        expected = "".join(f"{name}={value}\0" for name, value in env.items()).encode()
    assert subprocess.check_output(["/bin/cat", "/proc/self/environ"], env=env) == expected


# umask, ids, groups and sessions


@pytest.mark.parametrize("umask", [0, 0o27, 0o777, -1])
def test_umask(subprocess: Any, umask: int) -> None:
    before = os.umask(0o22)
    try:
        out = subprocess.check_output("umask", shell=True, umask=umask, text=True)
        assert int(out, 8) == (0o22 if umask == -1 else umask)
    finally:
        assert os.umask(before) == 0o22


NOBODY = pwd.getpwnam("nobody")
DAEMON = grp.getgrnam("daemon")


@pytest.mark.root
@pytest.mark.parametrize("user", ["nobody", NOBODY.pw_uid], ids=["name", "number"])
def test_user_leaves_the_group(subprocess: Any, user: Any) -> None:
    status = subprocess.check_output(["grep", "-E", "^[UG]id", "/proc/self/status"], user=user)
    uid, gid = str(NOBODY.pw_uid).encode(), str(os.getgid()).encode()
    assert status.split() == [b"Uid:", *[uid] * 4, b"Gid:", *[gid] * 4]


@pytest.mark.root
@pytest.mark.parametrize("group", ["daemon", DAEMON.gr_gid], ids=["name", "number"])
def test_group_leaves_the_user(subprocess: Any, group: Any) -> None:
    status = subprocess.check_output(["grep", "-E", "^[UG]id", "/proc/self/status"], group=group)
    uid, gid = str(os.getuid()).encode(), str(DAEMON.gr_gid).encode()
    assert status.split() == [b"Uid:", *[uid] * 4, b"Gid:", *[gid] * 4]


@pytest.mark.root
@pytest.mark.parametrize(
    ("groups", "expected"),
    [([], []), ([12345, "daemon"], sorted([12345, DAEMON.gr_gid])), (range(1, 101), range(1, 101))],
    ids=["none", "name and number", "many"],
)
def test_extra_groups(subprocess: Any, groups: Any, expected: Any) -> None:
    out = subprocess.check_output(
        ["grep", "^Groups", "/proc/self/status"], extra_groups=list(groups), text=True
    )
    assert [int(gid) for gid in out.split()[1:]] == list(expected)


@pytest.mark.root
def test_user_group_and_extra_groups_together(subprocess: Any) -> None:
    out = subprocess.check_output(
        ["grep", "-E", "^(Uid|Gid|Groups|CapEff)", "/proc/self/status"],
        user="nobody",
        group="daemon",
        extra_groups=[7],
        umask=0o77,
        text=True,
    )
    uid, gid = str(NOBODY.pw_uid), str(DAEMON.gr_gid)
    expected = ["Uid:", *[uid] * 4, "Gid:", *[gid] * 4, "Groups:", "7", "CapEff:", "0" * 16]
    assert out.split() == expected


@pytest.mark.root
def test_cwd_is_entered_before_the_user_changes(subprocess: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    # The program is found and run as the new user, who must be able to reach it.
    result = subprocess.run(
        ["/bin/readlink", "/proc/self/cwd"], cwd=tmp_path, user="nobody", stdout=subprocess.PIPE
    )
    assert result.returncode == 0
    assert result.stdout == os.fsencode(tmp_path) + b"\n"


@pytest.mark.portable
@pytest.mark.parametrize("new", [False, True])
def test_start_new_session(subprocess: Any, new: bool) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=new)
    try:
        expected = (process.pid, process.pid) if new else (os.getpgrp(), os.getsid(0))
        assert (os.getpgid(process.pid), os.getsid(process.pid)) == expected
    finally:
        process.communicate()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="process_group= came with Python 3.11")
@pytest.mark.portable
@pytest.mark.parametrize("kind", ["own", "another's"])
def test_process_group(subprocess: Any, kind: str) -> None:
    pipe = subprocess.PIPE
    leader = subprocess.Popen(["cat"], stdin=pipe, process_group=0)
    group = 0 if kind == "own" else leader.pid
    process = subprocess.Popen(["cat"], stdin=pipe, process_group=group)
    try:
        assert os.getpgid(leader.pid) == leader.pid
        assert os.getpgid(process.pid) == (group or process.pid)
        assert os.getsid(process.pid) == os.getsid(0)
    finally:
        process.communicate()
        leader.communicate()


@pytest.mark.portable
@pytest.mark.parametrize("restore", [True, False])
def test_restore_signals(subprocess: Any, restore: bool) -> None:
    out = subprocess.check_output(SHOW_SIGNALS, restore_signals=restore, text=True)
    ignored = int(out.split()[1], 16)
    expected = {
        number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN
    }
    if restore:
        expected -= {signal.SIGPIPE, signal.SIGXFSZ}
    else:
        assert {signal.SIGPIPE, signal.SIGXFSZ} <= expected
    assert {n for n in signal.valid_signals() if ignored & 1 << n - 1} == expected


@pytest.mark.portable
@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_pipesize(subprocess: Any, name: str) -> None:
    size = 16384
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert fcntl.fcntl(process.stdin, fcntl.F_GETPIPE_SZ) != size
    pipes = {"stdin": subprocess.PIPE, name: subprocess.PIPE}
    with subprocess.Popen(["cat"], pipesize=size, **pipes) as process:
        assert fcntl.fcntl(getattr(process, name), fcntl.F_GETPIPE_SZ) == size


# Text, buffers, communicate and run


@pytest.mark.portable
@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({"text": True}, "a\nb\r\nc\n", "a\nb\nc\n"),
        ({"universal_newlines": True}, "a\r", "a\n"),
        ({"encoding": "utf-16"}, "é\n", "é\n"),
        ({"encoding": "ascii", "errors": "backslashreplace"}, "é", "\\xe9"),
        ({"errors": "surrogateescape"}, "\udcff", "\udcff"),
        ({}, b"\r\n\xff", b"\r\n\xff"),
    ],
)
@pytest.mark.parametrize("bufsize", [-1, 0, 1, 4096])
def test_text_and_buffers(
    subprocess: Any, options: dict[str, Any], given: Any, expected: Any, bufsize: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a line-buffered binary pipe
        result = subprocess.run(
            ["cat"], input=given, stdout=subprocess.PIPE, bufsize=bufsize, **options
        )
    assert result.stdout == expected


def test_line_buffered_binary_pipe_warns(subprocess: Any) -> None:
    with pytest.warns(RuntimeWarning, match="line buffering") as caught:
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, bufsize=1)
    process.communicate()
    # Others, about what is no longer used, may come at any moment.
    assert [each.category for each in caught].count(RuntimeWarning) == 1


@pytest.mark.portable
def test_line_buffered_conversation(subprocess: Any) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        for line in ("one\n", "two\n"):
            process.stdin.write(line)
            assert process.stdout.readline() == line


@pytest.mark.portable
def test_communicate_much_more_than_a_pipe_holds(subprocess: Any) -> None:
    data = os.urandom(1 << 20)
    process = subprocess.Popen(
        "tee /dev/stderr", shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.communicate(data) == (data, data)


@pytest.mark.portable
def test_communicate_goes_on_after_a_timeout(subprocess: Any) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen("echo early; cat", shell=True, stdin=pipe, stdout=pipe)
    r, w = os.pipe()
    sleeper = subprocess.Popen(["cat"], stdin=r, stdout=pipe)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        sleeper.communicate(timeout=0.05)
    assert caught.value.cmd == ["cat"]
    os.write(w, b"late")
    os.close(w)
    os.close(r)
    assert sleeper.communicate() == (b"late", None)
    assert process.communicate(b"more") == (b"early\nmore", None)


@pytest.mark.slow
@pytest.mark.portable
def test_run_timeout_kills_and_keeps_the_output(subprocess: Any) -> None:
    command = ["sh", "-c", "echo $$; exec tail -f /dev/null"]

    def output(timeout: float) -> Any:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            subprocess.run(command, stdout=subprocess.PIPE, timeout=timeout)
        assert 0 < caught.value.timeout <= timeout
        return caught.value.output

    with pytest.raises(ProcessLookupError):
        os.kill(int(with_enough_time(output)), 0)


@pytest.mark.portable
def test_wait_timeout(subprocess: Any) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.05)
    process.stdin.close()
    assert process.wait(timeout=30) == 0


@pytest.mark.portable
def test_check_raises_with_everything(subprocess: Any) -> None:
    command = ["sh", "-c", "echo out; echo err >&2; exit 7"]
    with pytest.raises(stdlib.CalledProcessError) as caught:
        subprocess.run(command, check=True, capture_output=True)
    error = caught.value
    assert (error.returncode, error.cmd) == (7, command)
    assert (error.stdout, error.stderr) == (b"out\n", b"err\n")
    for function in (subprocess.check_call, subprocess.check_output):
        with pytest.raises(stdlib.CalledProcessError):
            function(["false"])


@pytest.mark.portable
def test_call_check_output_and_the_shell_shortcuts(subprocess: Any) -> None:
    assert subprocess.call(["sh", "-c", "exit 4"]) == 4
    assert subprocess.check_call(["true"]) == 0
    assert subprocess.check_output(["cat"], input=b"given") == b"given"
    assert subprocess.check_output(["cat"], input=None) == b""
    assert subprocess.getoutput("echo out; echo err >&2") == "out\nerr"
    assert subprocess.getstatusoutput("echo out; exit 5") == (5, "out")
    assert subprocess.getstatusoutput("kill -9 $$") == (-9, "")


@pytest.mark.parametrize("name", ["run", "call", "check_call", "check_output", "Popen"])
def test_module_functions_start_through_errand_boy(name: str) -> None:
    source = f"""
        def refuse(*args, **options):
            raise AssertionError("started the standard library's way")

        stdlib.Popen._execute_child = refuse
        result = subprocess.{name}(["true"])
        report(result.wait() if "{name}" == "Popen" else None)
    """
    run_script(source)


# The object


@pytest.mark.portable
def test_attributes_and_repr(subprocess: Any) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert process.args == ["cat"]
        assert (process.stdout, process.stderr) == (None, None)
        assert process.returncode is None and process.poll() is None
        assert repr(process) == "<Popen: returncode: None args: ['cat']>"
        os.kill(process.pid, 0)
    assert process.stdin.closed
    assert process.returncode == process.poll() == process.wait() == 0
    assert repr(process) == "<Popen: returncode: 0 args: ['cat']>"


@pytest.mark.portable
@pytest.mark.parametrize(
    ("method", "args", "number"),
    [("terminate", (), 15), ("kill", (), 9), ("send_signal", (signal.SIGUSR1,), 10)],
)
def test_signals_and_negative_returncodes(
    subprocess: Any, method: str, args: Any, number: int
) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    getattr(process, method)(*args)
    assert process.wait() == -number
    getattr(process, method)(*args)  # no effect, no error, once it is reaped
    process.stdin.close()


@pytest.mark.portable
@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_returncode(subprocess: Any, code: int) -> None:
    assert subprocess.call(f"exit {code}", shell=True) == code


@pytest.mark.portable
def test_waiting_from_many_threads(subprocess: Any) -> None:
    process = subprocess.Popen("read x; exit 3", shell=True, stdin=subprocess.PIPE)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(process.wait())) for _ in range(8)]
    for thread in threads:
        thread.start()
    process.stdin.close()
    for thread in threads:
        thread.join()
    assert codes == [3] * 8


def test_subclass_and_generic_alias(subprocess: Any) -> None:
    class Mine(subprocess.Popen):  # type: ignore[misc]
        def greet(self) -> str:
            return f"pid {self.pid}"

    with Mine(["true"]) as process:
        assert process.greet() == f"pid {process.pid}"
    assert subprocess.Popen[bytes].__origin__ is subprocess.Popen


def test_dropping_a_running_process_warns(subprocess: Any) -> None:
    r, w = os.pipe()
    process = subprocess.Popen(["cat"], stdin=r)
    pid = process.pid
    with pytest.warns(ResourceWarning, match=f"subprocess {pid} is still running"):
        del process
    os.close(r)
    os.close(w)
    # It is not reaped until the module looks for what was dropped.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    subprocess.run(["true"])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_audit_event() -> None:
    source = """
        start()
        seen = []
        sys.addaudithook(
            lambda event, args: seen.append(repr(args)) if event == "subprocess.Popen" else None
        )
        subprocess.run(["true", "x"], cwd="/", env={"A": "b"})
        subprocess.run("true", shell=True)
        report(seen)
    """
    assert len(compare_scripts(source)) == 2


# preexec_fn


@pytest.mark.portable
@pytest.mark.parametrize("function", [None, os.setsid, os.setpgrp])
def test_known_preexec_fn(subprocess: Any, function: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=function)
    try:
        group = os.getpgrp() if function is None else process.pid
        session = process.pid if function is os.setsid else os.getsid(0)
        assert (os.getpgid(process.pid), os.getsid(process.pid)) == (group, session)
    finally:
        process.communicate()


@pytest.mark.parametrize("function", ["None", "os.setsid", "os.setpgrp"])
def test_known_preexec_fn_forks_nothing(function: str) -> None:
    source = f"""
        start()
        forks = []
        os.register_at_fork(before=lambda: forks.append(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subprocess.run(["true"], preexec_fn={function}, check=True)
        report([forks, [str(warning.message) for warning in caught]])
    """
    assert run_script(source) == [[], []]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_preexec_fn_runs_in_the_child(subprocess: Any) -> None:
    r, w = os.pipe()

    def prepare() -> None:
        os.umask(0o123)
        os.write(w, b"%d" % os.getpid())

    process = subprocess.Popen(
        "umask", shell=True, preexec_fn=prepare, stdout=subprocess.PIPE, pass_fds=[w]
    )
    out, _ = process.communicate()
    assert out == b"0123\n"
    assert int(os.read(r, 100)) == process.pid
    os.close(r)
    os.close(w)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_preexec_fn_that_raises(subprocess: Any) -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(subprocess.SubprocessError, match="Exception occurred in preexec_fn"):
        subprocess.run(["true"], preexec_fn=fail)


def nothing() -> None:
    pass


def test_other_preexec_fn_warns_once_per_place() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            errand_boy.run(["true"], preexec_fn=nothing, check=True)
        for _ in range(3):
            errand_boy.run(["true"], preexec_fn=nothing, check=True)
    ours = [warning for warning in caught if warning.category is RuntimeWarning]
    assert len(ours) == 2
    assert len({warning.lineno for warning in ours}) == 2


@pytest.mark.parametrize("name", ["Popen", "run", "call", "check_call", "check_output"])
def test_preexec_fn_warning_names_the_place_of_the_call(name: str) -> None:
    # In a process of its own, where no place has been warned of.
    source = f"""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = subprocess.{name}(["true"], preexec_fn=lambda: None)
        if "{name}" == "Popen":
            result.wait()
        ours = [warning for warning in caught if warning.category is RuntimeWarning]
        report([warning.filename for warning in ours])
    """
    assert run_script(source) == ["<string>"]


# The portable way of spawning


@pytest.mark.root
@pytest.mark.parametrize(
    "options",
    [{"user": "nobody"}, {"group": "daemon"}, {"extra_groups": [7]}],
    ids=["user", "group", "extra_groups"],
)
def test_portable_spawn_refuses_what_it_cannot_express(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    errand_boy.stop()
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "posix")
    try:
        with pytest.raises(OSError) as caught:
            errand_boy.run(["true"], **options)
        assert caught.value.errno == errno.ENOTSUP
        assert errand_boy.run(["true"]).returncode == 0
    finally:
        errand_boy.stop()


def test_portable_spawn_makes_the_helpers_children(monkeypatch: pytest.MonkeyPatch) -> None:
    errand_boy.stop()
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "posix")
    try:
        out = errand_boy.check_output(["sh", "-c", "echo $PPID"])
        assert int(out) == errand_boy.helper_pid()
    finally:
        errand_boy.stop()
