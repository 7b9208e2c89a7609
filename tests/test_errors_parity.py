"""Failures: the same exception, number, filename and text, and nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess as stdlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import compare_scripts, run_script

import errand_boy

# Also part of the scripts below.
DESCRIBE = '''
def describe(subprocess, args, options):
    """What a user sees of a start: the error in every detail, or what the command did."""
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.run(args, **{**pipes, **options})
    except Exception as error:
        names = ["errno", "filename", "filename2"]
        details = [repr(getattr(error, name, None)) for name in names]
        return [type(error).__name__, *details, str(error), repr(error.__cause__)]
    return [done.returncode, repr(done.stdout), repr(done.stderr)]
'''
namespace: dict[str, Any] = {}
exec(DESCRIBE, namespace)
describe = namespace["describe"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of files that can't be run, each for another reason."""
    texts = {
        "plain": "#!/bin/sh\n",
        "bad-interpreter": "#!/none/interpreter\n",
        "directory-interpreter": "#!/\n",
        "own-interpreter": f"#!{tmp_path}/own-interpreter\n",
        "empty-interpreter": "#!\n",
        "empty": "",
        "text": "echo text\n",
        "garbage": "\x7fELF garbage",
        "busy": "#!/bin/sh\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("none")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "busy", "a"):
        yield tmp_path


def descriptors(pid: int | None = None) -> int:
    return len(os.listdir(f"/proc/{pid or os.getpid()}/fd"))


@pytest.fixture
def unharmed() -> Iterator[None]:
    """The same helper goes on, with as many descriptors as before, and no child is left."""

    def state() -> tuple[object, ...]:
        helper = errand_boy.helper_pid()
        children = sorted(child.pid for child in psutil.Process().children())
        return helper, descriptors(helper), children

    errand_boy.start()
    errand_boy.run(["true"], check=True)
    gc.collect()  # what an earlier test has left may have descriptors
    before = state()
    yield
    assert errand_boy.run(["echo", "fine"], stdout=stdlib.PIPE).stdout == b"fine\n"
    assert state() == before


Case = tuple[Any, dict[str, Any]]

LONG_NAME = "x" * 256
LONG_PATH = "/x" * 2500
LONGEST_STRING = 32 * resource.getpagesize() - 1

PROGRAMS: dict[str, Callable[[Path], Case]] = {
    "missing": lambda tmp: (["/none/program", "x"], {}),
    "missing with bytes": lambda tmp: ([b"/none/program"], {}),
    "missing with a path": lambda tmp: ([Path("/none/program")], {}),
    "missing and relative": lambda tmp: (["./none"], {}),
    "missing in path": lambda tmp: (["errand-boy-no-such-program"], {}),
    "missing in an empty path": lambda tmp: (["true"], {"env": {"PATH": ""}}),
    "missing executable": lambda tmp: (["true"], {"executable": "/none/program"}),
    "missing executable in path": lambda tmp: (["true"], {"executable": "errand-boy-none"}),
    "empty name": lambda tmp: ([""], {}),
    "empty string": lambda tmp: ("", {}),
    "empty executable": lambda tmp: (["true"], {"executable": ""}),
    "no arguments": lambda tmp: ([], {}),
    "no arguments in a tuple": lambda tmp: ((), {}),
    "no arguments for an executable": lambda tmp: ([], {"executable": "/bin/true"}),
    "missing in the shell": lambda tmp: ("errand-boy-no-such-program 2>/dev/null", {"shell": True}),
    "missing shell": lambda tmp: ("true", {"shell": True, "executable": "/none/shell"}),
    "not executable": lambda tmp: ([tmp / "plain"], {}),
    "not executable in path": lambda tmp: (["plain"], {"env": {"PATH": f"/none:{tmp}:/none"}}),
    "directory": lambda tmp: ([tmp / "dir"], {}),
    "directory in path": lambda tmp: (["dir"], {"env": {"PATH": f"{tmp}:{tmp}/dir"}}),
    "file as directory": lambda tmp: ([tmp / "plain" / "x"], {}),
    "bad interpreter": lambda tmp: ([tmp / "bad-interpreter"], {}),
    "directory as interpreter": lambda tmp: ([tmp / "directory-interpreter"], {}),
    "script as its own interpreter": lambda tmp: ([tmp / "own-interpreter"], {}),
    "empty interpreter": lambda tmp: ([tmp / "empty-interpreter"], {}),
    "ENOEXEC of an empty file": lambda tmp: ([tmp / "empty"], {}),
    "ENOEXEC of a text": lambda tmp: ([tmp / "text"], {}),
    "ENOEXEC of a text in path": lambda tmp: (["text"], {"env": {"PATH": f"{tmp}:/bin"}}),
    "ENOEXEC of a broken ELF file": lambda tmp: ([tmp / "garbage"], {}),
    "ETXTBSY": lambda tmp: ([tmp / "busy"], {}),
    "ELOOP": lambda tmp: ([tmp / "loop"], {}),
    "dangling link": lambda tmp: ([tmp / "dangling"], {}),
    "ENAMETOOLONG of a name": lambda tmp: ([tmp / LONG_NAME], {}),
    "ENAMETOOLONG of a name in path": lambda tmp: ([LONG_NAME], {}),
    "ENAMETOOLONG of a path": lambda tmp: ([LONG_PATH], {}),
    "name that is not UTF-8": lambda tmp: ([b"/none/\xff"], {}),
}

DIRECTORIES: dict[str, Callable[[Path], Case]] = {
    "missing": lambda tmp: (["true"], {"cwd": "/none"}),
    "missing with bytes": lambda tmp: (["true"], {"cwd": b"/none/\xff"}),
    "missing with a path": lambda tmp: (["true"], {"cwd": Path("/none")}),
    "missing with a missing program": lambda tmp: (["/none/program"], {"cwd": "/none"}),
    "missing with a user": lambda tmp: (["true"], {"cwd": "/none", "start_new_session": True}),
    "empty": lambda tmp: (["true"], {"cwd": ""}),
    "file": lambda tmp: (["true"], {"cwd": tmp / "plain"}),
    "loop": lambda tmp: (["true"], {"cwd": tmp / "loop"}),
    "too long": lambda tmp: (["true"], {"cwd": LONG_PATH}),
    "present for a missing program": lambda tmp: (["./none"], {"cwd": tmp / "dir"}),
    "program of the caller's directory": lambda tmp: (["./text"], {"cwd": tmp / "dir"}),
    "NUL": lambda tmp: (["true"], {"cwd": "/\0"}),
    "number": lambda tmp: (["true"], {"cwd": 3}),
}

VALUES: dict[str, Callable[[Path], Case]] = {
    "NUL in an argument": lambda tmp: (["true", "a\0b"], {}),
    "NUL in a program": lambda tmp: (["/bin/true\0"], {}),
    "NUL in bytes": lambda tmp: ([b"true", b"\0"], {}),
    "NUL in an executable": lambda tmp: (["true"], {"executable": "/bin/true\0"}),
    "NUL in a shell command": lambda tmp: ("echo \0", {"shell": True}),
    "NUL in a variable": lambda tmp: (["true"], {"env": {"A": "\0"}}),
    "NUL in a variable's name": lambda tmp: (["true"], {"env": {"A\0": "x"}}),
    "equals sign in a variable's name": lambda tmp: (["true"], {"env": {"A=B": "x"}}),
    "equals sign in bytes": lambda tmp: (["true"], {"env": {b"A=": b"x"}}),
    "variable without a name": lambda tmp: (["/bin/env"], {"env": {"": "x"}}),
    "path twice": lambda tmp: (["true"], {"env": {"PATH": "/bin", b"PATH": b"/bin"}}),
    "number in env": lambda tmp: (["true"], {"env": {"A": 1}}),
    "env that is a list": lambda tmp: (["true"], {"env": ["A=1"]}),
    "surrogate that can't be encoded": lambda tmp: (["true", "\ud800"], {}),
    "number as an argument": lambda tmp: (["true", 1], {}),
    "nothing as an argument": lambda tmp: (["true", None], {}),
    "number as args": lambda tmp: (1, {}),
    "nothing as args": lambda tmp: (None, {}),
    "path for the shell": lambda tmp: (Path("true"), {"shell": True}),
    "bufsize": lambda tmp: (["true"], {"bufsize": "1"}),
    "pipesize": lambda tmp: (["true"], {"pipesize": "1"}),
    "umask": lambda tmp: (["true"], {"umask": "1"}),
    "startupinfo": lambda tmp: (["true"], {"startupinfo": object()}),
    "creationflags": lambda tmp: (["true"], {"creationflags": 1}),
    "unknown parameter": lambda tmp: (["true"], {"no_such": 1}),
    "stdin as an object": lambda tmp: (["true"], {"stdin": object()}),
    "stdin that is closed": lambda tmp: (["true"], {"stdin": 9999}),
    "stdout that is closed": lambda tmp: (["true"], {"stdout": 9999}),
    "stderr that is closed": lambda tmp: (["true"], {"stderr": 9999}),
    "input with stdin": lambda tmp: (["true"], {"input": b"", "stdin": stdlib.PIPE}),
    "input of the wrong kind": lambda tmp: (["cat"], {"input": "text"}),
    "text and not": lambda tmp: (["true"], {"text": True, "universal_newlines": False}),
    "pass_fds that is closed": lambda tmp: (["true"], {"pass_fds": [9999]}),
    "pass_fds beyond everything": lambda tmp: (["true"], {"pass_fds": [1 << 40]}),
    "pass_fds negative": lambda tmp: (["true"], {"pass_fds": [-1]}),
    "pass_fds of the wrong kind": lambda tmp: (["true"], {"pass_fds": ["x"]}),
    "pass_fds not a sequence": lambda tmp: (["true"], {"pass_fds": 3}),
    "preexec_fn that can't be called": lambda tmp: (["true"], {"preexec_fn": 1}),
}

IDS: dict[str, Callable[[Path], Case]] = {
    "unknown user": lambda tmp: (["true"], {"user": "no-such-user"}),
    "negative user": lambda tmp: (["true"], {"user": -1}),
    "user of the wrong kind": lambda tmp: (["true"], {"user": 1.5}),
    "user beyond everything": lambda tmp: (["true"], {"user": 1 << 64}),
    "user just beyond": lambda tmp: (["true"], {"user": 1 << 32}),
    "unknown group": lambda tmp: (["true"], {"group": "no-such-group"}),
    "negative group": lambda tmp: (["true"], {"group": -1}),
    "group of the wrong kind": lambda tmp: (["true"], {"group": 1.5}),
    "group beyond everything": lambda tmp: (["true"], {"group": 1 << 64}),
    "unknown extra group": lambda tmp: (["true"], {"extra_groups": ["no-such-group"]}),
    "extra groups as a string": lambda tmp: (["true"], {"extra_groups": "daemon"}),
    "extra group of the wrong kind": lambda tmp: (["true"], {"extra_groups": [1.5]}),
    "negative extra group": lambda tmp: (["true"], {"extra_groups": [-1]}),
    "too many extra groups": lambda tmp: (["true"], {"extra_groups": [*range(70000)]}),
    "program that the new user can't reach": lambda tmp: ([tmp / "text"], {"user": "nobody"}),
    "missing program of another user": lambda tmp: (["/none"], {"user": "nobody"}),
}
if sys.version_info >= (3, 11):
    VALUES |= {
        "process group of nobody": lambda tmp: (["true"], {"process_group": 1 << 30}),
        "process group of another session": lambda tmp: (["true"], {"process_group": 1}),
        "process group of the wrong kind": lambda tmp: (["true"], {"process_group": "x"}),
        "process group of a session's leader": lambda tmp: (
            ["true"],
            {"process_group": 0, "start_new_session": True},
        ),
    }

SIZES: dict[str, Callable[[Path], Case]] = {
    "program name much too long": lambda tmp: (["x" * 3_000_000], {}),
    "program name too long for a path": lambda tmp: (["x" * 4096], {}),
    "program name too long for a file": lambda tmp: (["x" * 256], {}),
    "program path much too long": lambda tmp: (["/" + "x" * 3_000_000], {}),
    "longest argument": lambda tmp: (["true", "x" * LONGEST_STRING], {}),
    "argument too long": lambda tmp: (["true", "x" * (LONGEST_STRING + 1)], {}),
    "argument much too long": lambda tmp: (["true", "x" * (1 << 24)], {}),
    "longest variable": lambda tmp: (["true"], {"env": {"A": "x" * (LONGEST_STRING - 2)}}),
    "variable too long": lambda tmp: (["true"], {"env": {"A": "x" * (LONGEST_STRING - 1)}}),
    "many arguments": lambda tmp: (["true", *[""] * 100_000], {}),
    "too many arguments": lambda tmp: (["true", *[""] * 1_000_000], {}),
    "arguments too long together": lambda tmp: (["true", *["x" * 100_000] * 30], {}),
    "variables too long together": lambda tmp: (
        ["true"],
        {"env": {str(n): "x" * 100_000 for n in range(30)}},
    ),
}

TABLES = {
    "program": PROGRAMS,
    "cwd": DIRECTORIES,
    "value": VALUES,
    "ids": IDS,
    "size": SIZES,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=f"{table}-{name}", marks=[pytest.mark.root] if table == "ids" else [])
        for table, cases in TABLES.items()
        for name, make in cases.items()
    ],
)
def test_same_error(make: Callable[[Path], Case], files: Path, unharmed: None) -> None:
    args, options = make(files)
    counts = [descriptors()]
    expected = describe(stdlib, args, options)
    counts.append(descriptors())
    assert describe(errand_boy, args, options) == expected
    errand_boy.run(["true"], check=True)  # may have to connect anew
    counts.append(descriptors())
    # Python 3.10 leaks its pipes where it does not know a user.
    assert counts[2] - counts[1] == counts[1] - counts[0]


def test_unknown_encoding() -> None:
    # In a process of its own: the standard library leaks its pipes there.
    source = (
        DESCRIBE
        + """
report(describe(subprocess, ["true"], {"encoding": "no-such"}))
"""
    )
    assert compare_scripts(source)[0] == "LookupError"


@pytest.mark.portable
@pytest.mark.parametrize(
    ("args", "options", "error", "filename"),
    [
        (["/none/program"], {}, FileNotFoundError, "/none/program"),
        (["errand-boy-none"], {}, FileNotFoundError, "errand-boy-none"),
        (["true"], {"cwd": "/none"}, FileNotFoundError, "/none"),
        (["/"], {}, PermissionError, "/"),
        (["true", "x" * (1 << 20)], {}, OSError, "true"),
    ],
)
def test_commonest_errors(
    subprocess: Any, args: Any, options: dict[str, Any], error: Any, filename: str
) -> None:
    with pytest.raises(error) as caught:
        subprocess.run(args, **options)
    assert caught.value.filename == filename


@pytest.mark.slow
@pytest.mark.parametrize("what", ["arguments", "count", "variables"])
@pytest.mark.parametrize("stack", ["as it is", "1 MiB"])
def test_exact_limit_of_arguments_and_environment(what: str, stack: str) -> None:
    """By bisection: the largest command that can be started is the same to the byte."""
    source = """
        what, stack = sys.argv[2:]
        start()
        if stack == "1 MiB":
            hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
            resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, hard))
        env = {"A": "b"}

        def fits(size):
            words, rest = divmod(size, 100_000)
            filler = ["x" * 100_000] * words + ["x" * rest]
            args, options = ["/bin/true"], {"env": env}
            if what == "arguments":
                args += filler
            elif what == "count":
                args += ["x"] * (size // 10)
            else:
                options["env"] = {**env, **{f"V{n:05}": text for n, text in enumerate(filler)}}
            try:
                subprocess.run(args, **options, check=True)
            except OSError as error:
                assert error.errno == 7, error
                return False
            return True

        low, high = 0, 4_000_000
        assert fits(low) and not fits(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        report(low)
    """
    assert compare_scripts(source, [what, stack]) > 10_000


def test_larger_arguments_with_an_unlimited_stack() -> None:
    if resource.getrlimit(resource.RLIMIT_STACK)[1] != resource.RLIM_INFINITY:
        pytest.skip("the stack's hard limit is lower")
    source = """
        start()
        resource.setrlimit(resource.RLIMIT_STACK, [resource.RLIM_INFINITY] * 2)
        words = ["x" * 100_000] * 40
        out = subprocess.check_output(["sh", "-c", 'echo $# "${#1}"', "sh", *words])
        report(out.decode().split())
    """
    assert compare_scripts(source) == ["40", "100000"]


DESCRIPTORS = (
    DESCRIBE
    + """
def leave(free):
    '''Lower the limit so that just so many more descriptors can be opened.'''
    opened = []
    while True:
        try:
            opened.append(os.open("/", os.O_RDONLY))
        except OSError:
            break
    for descriptor in opened[len(opened) - free:]:
        os.close(descriptor)

start()
subprocess.run(["true"])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
"""
)


@pytest.mark.parametrize("free", range(4))
def test_emfile_for_pipes(free: int) -> None:
    """There is no room for three pipes, whoever starts the command."""
    source = f"""
leave({free})
pipe = subprocess.PIPE
failure = describe(subprocess, ["true"], dict(input=b"", stdout=pipe, stderr=pipe))
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
report([failure, describe(subprocess, ["echo", "fine"], {{}})])
"""
    expected = compare_scripts(DESCRIPTORS + source)
    assert expected[0][0] == "OSError" and expected[0][1] == "24"


@pytest.mark.parametrize("free", [2, 3, 8])
def test_as_few_descriptors_as_subprocess_needs_suffice(free: int) -> None:
    source = f"""
leave({free})
report(describe(subprocess, ["true"], dict(stdout=None, stderr=None)))
"""
    expected = compare_scripts(DESCRIPTORS + source)
    assert expected == [0, "None", "None"]


def test_low_hard_limit_of_descriptors() -> None:
    source = """
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
        start()
        code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
        report(subprocess.check_output([sys.executable, "-I", "-S", "-c", code]).decode())
    """
    assert compare_scripts(source) == "(16, 16)\n"


def test_descriptor_above_a_limit_that_was_lowered_later() -> None:
    source = """
        descriptor = os.open("/dev/null", os.O_RDONLY)
        os.dup2(descriptor, 500)
        start()
        subprocess.run(["true"])
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        code = "import os, resource; print(os.path.exists('/proc/self/fd/500'), "
        code += "resource.getrlimit(resource.RLIMIT_NOFILE))"
        command = [sys.executable, "-I", "-S", "-c", code]
        report(subprocess.check_output(command, pass_fds=[500]).decode())
    """
    assert compare_scripts(source) == "True (32, 32)\n"


LIMITED = (
    DESCRIBE
    + """
number = resource.RLIMIT_NPROC
hard = resource.getrlimit(number)[1]
subprocess.run(["true"])  # imports everything while it can still be read
importlib.import_module("errand_boy._process.helper")
getattr(subprocess, "stop", lambda: None)()
os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
if sys.argv[2] == "after":
    start()
    subprocess.run(["true"])
resource.setrlimit(number, (1, hard))
failure = describe(subprocess, ["/bin/true"], dict(stdout=None, stderr=None))
resource.setrlimit(number, (hard, hard))
report([failure, describe(subprocess, ["echo", "fine"], {})])
"""
)


@pytest.mark.root
def test_eagain_at_the_limit_of_processes() -> None:
    failure, fine = compare_scripts(LIMITED, ["after"])
    assert failure[:2] == ["BlockingIOError", "11"]
    assert fine[0] == 0


@pytest.mark.root
def test_eagain_for_the_helper_itself() -> None:
    """It is the project's own exception, since it is about the helper, with the kernel's number."""
    failure, fine = run_script(LIMITED, args=["before"])
    assert failure[1] == "11"
    assert fine[0] == 0


AS_NOBODY = (
    DESCRIBE
    + """
subprocess.run(["true"])  # imports everything while it can still be read
importlib.import_module("errand_boy._process.helper")
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""
)


@pytest.mark.root
@pytest.mark.parametrize(
    "options",
    [
        "dict(cwd=private)",
        "dict(user=0)",
        "dict(group=0)",
        "dict(extra_groups=[])",
        "dict(user=65534, group=65534)",
    ],
)
def test_eperm_and_eacces_of_an_ordinary_user(options: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    source = f"""
private = sys.argv[2]
report(describe(subprocess, ["/bin/true"], {options}))
"""
    expected = compare_scripts(AS_NOBODY + source, [tmp_path])
    assert expected[0] == (0 if "65534" in options else "PermissionError")


@pytest.mark.usefixtures("by_helper")
def test_helper_that_is_missing() -> None:
    source = """
        os.environ["ERRAND_BOY_HELPER"] = "/none/helper"
        try:
            subprocess.run(["true"])
        except OSError as error:
            own = isinstance(error, subprocess.ErrandBoyError)
            report([own, error.errno, error.filename])
    """
    assert run_script(source) == [True, errno.ENOENT, "/none/helper"]


@pytest.mark.usefixtures("by_helper")
def test_helper_that_is_something_else() -> None:
    source = """
        os.environ["ERRAND_BOY_HELPER"] = "/bin/true"
        try:
            subprocess.run(["true"])
        except subprocess.ErrandBoyError as error:
            report([isinstance(error, OSError), bool(str(error))])
    """
    assert run_script(source) == [True, True]
