"""The options that subprocess lacks work the same on every front end and in each way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import find_program, run_script, until
from test_places import has_user_namespaces

import errand_boy
from errand_boy._cli import command_options
from errand_boy._options import table
from errand_boy._process import direct as _direct
from errand_boy.asyncio import (
    connect,
    create_subprocess_exec,
    create_subprocess_shell,
    run as run_by_asyncio,
)

STATUS = ["grep", "NoNewPrivs", "/proc/self/status"]
SET, UNSET = b"NoNewPrivs:\t1\n", b"NoNewPrivs:\t0\n"

# A type checker knows the parameters of subprocess.
Popen, run = cast(Any, errand_boy.Popen), cast(Any, errand_boy.run)


# -- the table: for each option a value, a check that the command has it, and the front ends --


@dataclass
class Case:
    """`options` is source, since some fronts are in other processes; `shows` sees the output."""

    options: str
    command: list[str]
    shows: Callable[[str], bool]
    words: list[str] = field(default_factory=list)  # of errand-boy run and map
    by_posix: bool = False  # posix_spawn can do it too
    for_root: bool = False
    by_helper: bool = False  # which ERRAND_BOY_SPAWN=direct forbids
    missing: Callable[[], str] = lambda: ""  # why this system can't show it


def bits(name: str, number: int, expected: int) -> tuple[list[str], Callable[[str], bool]]:
    """Return a command that shows a field of its /proc status, and a check of one bit of it."""
    command = ["grep", name, "/proc/self/status"]
    return command, lambda text: int(text.split()[1], 16) >> number & 1 == expected


def without_landlock() -> str:
    from errand_boy.sandbox import Sandbox  # noqa: PLC0415

    try:
        Sandbox(system=True).fileno()
    except OSError as error:
        return str(error)
    return ""


@functools.lru_cache
def own_cgroup() -> str:
    """Make a cgroup below this process's, and return its directory; or nothing."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        directory = Path("/sys/fs/cgroup", path.lstrip("/"), CGROUP)
        if number == "0" and (directory.parent / "cgroup.procs").exists():
            with contextlib.suppress(OSError):
                directory.mkdir()
                return str(directory)
    return ""


@pytest.fixture(scope="module", autouse=True)
def remove_cgroup() -> Iterator[None]:
    yield
    if own_cgroup():
        # It is empty a moment after the last command has been waited for.
        until(lambda: not Path(own_cgroup(), "cgroup.procs").read_text(), "an empty cgroup")
        Path(own_cgroup()).rmdir()


CGROUP = f"errand-boy-{os.getpid()}"
CPU = max(os.sched_getaffinity(0))
NICE = os.getpriority(os.PRIO_PROCESS, 0) + 3
ON_TERMINAL = "{'start_new_session': True, 'controlling_terminal': terminal()"
USR1, USR2 = signal.SIGUSR1 - 1, signal.SIGUSR2 - 1  # bits; the caller ignores SIGUSR2

CASES = {
    "capabilities": Case(
        "{'capabilities': ['kill']}",
        ["grep", "-E", "Cap(Eff|Bnd|Amb)", "/proc/self/status"],
        lambda text: {int(line.split()[1], 16) for line in text.splitlines()} == {1 << 5},
        ["--capabilities", "kill"],
        for_root=True,
    ),
    "cgroup": Case(
        "{'cgroup': cgroup}",
        ["grep", "^0:", "/proc/self/cgroup"],
        lambda text: text.strip().endswith(f"/{CGROUP}"),
        ["--cgroup", "CGROUP"],
        missing=lambda: "" if own_cgroup() else "no cgroup of version 2 to write to",
    ),
    "controlling_terminal": Case(
        ON_TERMINAL + "}",
        ["sh", "-c", "ps -o tty= -p $$"],
        lambda text: text.startswith("pts/"),
        missing=lambda: "" if shutil.which("ps") else "needs ps: apt-get install procps",
    ),
    "cpu_affinity": Case(
        f"{{'cpu_affinity': {{{CPU}}}}}",
        ["grep", "Cpus_allowed_list", "/proc/self/status"],
        lambda text: text.split()[1] == str(CPU),
        ["--cpu-affinity", str(CPU)],
    ),
    "foreground": Case(
        ON_TERMINAL + ", 'foreground': True}",
        ["sh", "-c", "cut -d ' ' -f 5,8 /proc/$$/stat"],  # its group, the terminal's
        lambda text: len({*text.split()}) == 1,
    ),
    "ionice": Case(
        "{'ionice': ('best-effort', 7)}",
        ["ionice"],
        lambda text: text == "best-effort: prio 7\n",
        ["--ionice", "best-effort:7"],
    ),
    "limits": Case(
        "{'limits': {'open_files': 55, 'wall': 60}}",
        ["sh", "-c", "ulimit -n"],
        lambda text: text == "55\n",
        ["--limit", "open_files=55", "--limit", "wall=60"],
        by_helper=True,
    ),
    "namespaces": Case(
        "{'namespaces': {'user', 'uts'}}",
        ["readlink", "/proc/self/ns/uts"],
        lambda text: text.startswith("uts:") and text.strip() != os.readlink("/proc/self/ns/uts"),
        ["--namespaces", "user,uts"],
        missing=lambda: "" if has_user_namespaces() else "the machine forbids user namespaces",
    ),
    "nice": Case("{'nice': 3}", ["nice"], lambda text: int(text) == min(NICE, 19), ["--nice", "3"]),
    "no_new_privs": Case(
        "{'no_new_privs': True}", STATUS, lambda text: text.encode() == SET, ["--no-new-privs"]
    ),
    "oom_score_adj": Case(
        "{'oom_score_adj': 765}",
        ["cat", "/proc/self/oom_score_adj"],
        lambda text: text == "765\n",
        ["--oom-score-adj", "765"],
    ),
    "rlimits": Case(
        "{'rlimits': {'nofile': (50, 60), 'core': 0}}",
        ["grep", "-E", "open files|core", "/proc/self/limits"],
        lambda text: (
            [line.split()[-3:-1] for line in text.splitlines()] == [["0", "0"], ["50", "60"]]
        ),
        ["--rlimit", "nofile=50:60", "--rlimit", "core=0"],
    ),
    "root": Case(
        "{'root': root}",
        ["cat", "/inside"],
        lambda text: text == "the root\n",
        ["--root", "ROOT"],
        for_root=True,
    ),
    "sandbox": Case(
        "{'sandbox': {'system': True}}",
        ["sh", "-c", "cat /etc/passwd > /dev/null 2>&1 || echo denied"],
        lambda text: text == "denied\n",
        ["--sandbox", "system=yes"],
        missing=without_landlock,
    ),
    "scheduler": Case(
        "{'scheduler': 'batch'}",
        ["awk", "{print $41}", "/proc/self/stat"],
        lambda text: text == "3\n",
        ["--scheduler", "batch"],
    ),
    "signals_blocked": Case(
        "{'signals_blocked': {signal.SIGUSR1}}",
        *bits("SigBlk", USR1, 1),
        ["--signals-blocked", "USR1"],
        by_posix=True,
    ),
    "signals_default": Case(
        "{'signals_default': {signal.SIGUSR2}}",
        *bits("SigIgn", USR2, 0),
        ["--signals-default", "USR2"],
        by_posix=True,
    ),
    "signals_ignored": Case(
        "{'signals_ignored': {signal.SIGUSR1}}",
        *bits("SigIgn", USR1, 1),
        ["--signals-ignored", "USR1"],
        by_posix=True,
    ),
    "timer_slack": Case(
        "{'timer_slack': 54321}",
        ["cat", "/proc/self/timerslack_ns"],
        lambda text: text == "54321\n",
        ["--timer-slack", "54321"],
    ),
}

ELSEWHERE = {  # not of what a command is given alone, and so not in this table
    "dies_with_caller": "of its end: tests/test_ends.py",
    "drain": "of its end: tests/test_ends.py",
    "limits": "of its end: tests/test_limits.py",
    "limits_by": "of its end: tests/test_limits.py",
    "pty": "of its streams: tests/test_terminal.py",
    "stop": "of its end: tests/test_ends.py",
    "tree": "of its end: tests/test_ends.py",
}

Front = Callable[[list[str], Mapping[str, Any]], bytes]


def of_result(result: Any) -> bytes:
    if result.error is not None:
        raise result.error
    output: bytes = result.stdout
    return output


def by_popen(command: list[str], options: Mapping[str, Any], of: Any = errand_boy) -> bytes:
    with of.Popen(command, stdout=subprocess.PIPE, **options) as process:
        output: bytes = process.communicate()[0]
    return output


def by_run(command: list[str], options: Mapping[str, Any], of: Any = errand_boy) -> bytes:
    output: bytes = of.run(command, stdout=subprocess.PIPE, **options).stdout
    return output


def by_map(command: list[str], options: Mapping[str, Any], of: Any = errand_boy) -> bytes:
    return of_result(next(of.map([command], **options)))


def by_one_of_a_map(command: list[str], options: Mapping[str, Any], of: Any = errand_boy) -> bytes:
    return of_result(next(of.map([{"args": command, **options}])))


def by_executor(command: list[str], options: Mapping[str, Any]) -> bytes:
    with errand_boy.Executor() as executor:
        output: bytes = executor.submit(command, **options).result().stdout
    return output


def by_celery(command: list[str], options: Mapping[str, Any]) -> bytes:
    celery = importlib.import_module("errand_boy.celery")
    own = {name: value for name, value in options.items() if name != "start_new_session"}
    outcome = celery.run_command(command, **own)  # whose commands lead sessions anyway
    if outcome["error"]:
        raise OSError(errno.ENOTSUP, outcome["error"])
    text: str = outcome["stdout"]
    return text.encode()


def by_asyncio(command: list[str], options: Mapping[str, Any], of: Any = None) -> bytes:
    async def main() -> bytes:
        create = create_subprocess_exec if of is None else of.create_subprocess_exec
        process = await create(*command, stdout=subprocess.PIPE, **options)
        output: bytes = (await process.communicate())[0]
        return output

    return asyncio.run(main())


def by_asyncio_shell(command: list[str], options: Mapping[str, Any]) -> bytes:
    async def main() -> bytes:
        line = f"exec {shlex.join(command)}"
        process = await create_subprocess_shell(line, stdout=subprocess.PIPE, **options)
        return (await process.communicate())[0]

    return asyncio.run(main())


def by_asyncio_run(command: list[str], options: Mapping[str, Any]) -> bytes:
    done = asyncio.run(run_by_asyncio(command, stdout=subprocess.PIPE, **options))
    assert isinstance(done.stdout, bytes)
    return done.stdout


# In this process, once for each way of starting.
FRONTS: dict[str, Front] = {
    "Popen": by_popen,
    "run": by_run,
    "check_output": lambda command, options: cast(Any, errand_boy.check_output)(command, **options),
    "asyncio exec": by_asyncio,
    "asyncio shell": by_asyncio_shell,
    "asyncio run": by_asyncio_run,
    "map": by_map,
    "one of a map": by_one_of_a_map,
    "Executor": by_executor,
    "Celery": by_celery,
}
FRAMEWORKS = ["gevent", "eventlet"]  # in processes of their own, once for each way too
# Once, since the way is the daemon's, or the command's own choice.
DAEMON: dict[str, Callable[..., bytes]] = {
    "client.Popen": by_popen,
    "client.run": by_run,
    "client.map": by_map,
    "one of client.map": by_one_of_a_map,
    "asyncio client": by_asyncio,
}
CLI = ["errand-boy run", "errand-boy map"]

cells: dict[tuple[str, str], str] = {}  # what was found, by option and by front with its way


IN_A_FRAMEWORK = """
    import pty
    module, root, cgroup, cases = json.loads(sys.argv[2])
    importlib.import_module(module)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    terminals, found = [], {}

    def terminal():
        terminals.extend(pty.openpty())
        return terminals[-1]

    for name, (options, command) in cases.items():
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, **eval(options)) as process:
                found[name] = process.communicate()[0].decode()
        except OSError as error:
            found[name] = f"!{error.errno} {error}"
    report(found)
"""


@functools.lru_cache
def by_framework(module: str, way: str, root: str, cgroup: str) -> dict[str, str]:
    """Return the outputs of all cases by name; or the errors, after a "!"."""
    cases = {
        name: (case.options, case.command)
        for name, case in CASES.items()
        if not case.missing() and (os.geteuid() == 0 or not case.for_root)
    }
    given = json.dumps([module, root, cgroup, cases])
    found: dict[str, str] = run_script(IN_A_FRAMEWORK, f"errand_boy.{module}", [given])
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root directory with `cat`, a shell and their libraries."""
    directory = tmp_path_factory.mktemp("root")
    for name in ("cat", "sh"):
        program = shutil.which(name)
        assert program is not None
        listed = subprocess.run(["ldd", program], stdout=subprocess.PIPE, text=True).stdout
        libraries = {word for word in listed.split() if word.startswith("/")}
        for path in {program, f"/bin/{name}", *libraries}:
            target = directory / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (directory / "inside").write_text("the root\n")
    return str(directory)


@pytest.fixture
def ignores_a_signal() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def scope(root: str) -> Iterator[dict[str, Any]]:
    """Yield the names that the sources of options use."""
    terminals: list[int] = []

    def terminal() -> int:
        terminals.extend(os.openpty())
        return terminals[-1]

    yield {"terminal": terminal, "root": root, "signal": signal, "cgroup": own_cgroup()}
    for fd in terminals:
        os.close(fd)


def skip_what_can_not_be_shown(option: str) -> None:
    case = CASES[option]
    if reason := case.missing():
        cells[option, "all"] = reason
        pytest.skip(reason)
    if case.for_root and os.geteuid() != 0:
        cells[option, "all"] = "needs the rights of root"
        pytest.skip("needs the rights of root")


def expect(option: str, front: str, function: Callable[[], bytes], refused: str = "") -> None:
    try:
        text = function().decode()
    except OSError as error:
        assert refused, (front, error)
        assert error.errno == errno.ENOTSUP, front
        cells[option, front] = f"refused: {refused}"
    else:
        assert not refused, front
        assert CASES[option].shows(text), (front, text)
        cells[option, front] = "yes"


@pytest.mark.slow
@pytest.mark.parametrize("option", CASES)
def test_each_front(
    option: str, spawn: str, scope: dict[str, Any], root: str, ignores_a_signal: None
) -> None:
    """One row of the table, for one way of starting."""
    skip_what_can_not_be_shown(option)
    case = CASES[option]
    refused = "posix_spawn can't" if spawn == "posix" and not case.by_posix else ""
    direct = "it needs a helper" if spawn == "direct" and case.by_helper else ""

    def of_framework(module: str) -> bytes:
        text = by_framework(module, spawn, root, own_cgroup())[option]
        if text.startswith("!"):
            number, _, why = text[1:].partition(" ")
            raise OSError(int(number), why)
        return text.encode()

    for name, by in FRONTS.items():
        if name != "Celery" or importlib.util.find_spec("celery") is not None:
            call = functools.partial(by, case.command, eval(case.options, scope))
            why = refused if name in ("map", "one of a map", "Executor", "Celery") else direct
            expect(option, f"{name}, {spawn}", call, refused or why)
    for module in FRAMEWORKS:
        if importlib.util.find_spec(module) is not None:
            call = functools.partial(of_framework, module)
            expect(option, f"{module}, {spawn}", call, refused or direct)


@pytest.mark.parametrize("option", CASES)
def test_daemon(option: str, scope: dict[str, Any], client: Any, ignores_a_signal: None) -> None:
    """The same row, for the fronts whose commands a daemon runs."""
    skip_what_can_not_be_shown(option)
    case = CASES[option]
    for name, by in DAEMON.items():
        of = connect(client.path) if by is by_asyncio else client
        options = eval(case.options, scope)
        expect(option, name, functools.partial(by, case.command, options, of=of))


@pytest.mark.slow
@pytest.mark.parametrize("option", CASES)
@pytest.mark.parametrize("front", CLI)
def test_command_line(option: str, front: str, root: str, ignores_a_signal: None) -> None:
    """The same row, for the command line."""
    if option in command_options.ABSENT:
        cells[option, front] = command_options.ABSENT[option]
        return
    skip_what_can_not_be_shown(option)
    places = {"ROOT": root, "CGROUP": own_cgroup()}
    words = [places.get(word, word) for word in CASES[option].words]
    if front == "errand-boy map":  # one command, whatever the line of input says
        words.append("-N0")
    command = [sys.executable, "-m", *front.replace("-", "_").split(), *words, "--"]
    command += CASES[option].command
    done = functools.partial(subprocess.run, command, input=b"\n", stdout=subprocess.PIPE)
    expect(option, front, lambda: cast(bytes, done().stdout))


def test_table_has_no_hole() -> None:
    """Print a table of the results of the tests above, which pytest -s shows."""
    assert set(CASES) | set(ELSEWHERE) == table.NAMES
    assert set(command_options._FORMS) | set(command_options.ABSENT) >= set(CASES)
    fronts = list(dict.fromkeys(front for _, front in cells if front != "all"))
    notes: dict[str, int] = {}
    print()
    for number, front in enumerate(fronts, 1):
        print(f"  {number:2} {front}")
    print(f"{'':22}" + "".join(f"{number:3}" for number in range(1, len(fronts) + 1)))
    for option in CASES:
        if not any(row == option for row, _ in cells):
            continue  # not run, or not as root
        row = [cells.get((option, "all"), "") or cells.get((option, front), "") for front in fronts]
        assert all(row), (option, row)
        marks = [
            "  +" if text == "yes" else f"{notes.setdefault(text, len(notes) + 1):>2})"
            for text in row
        ]
        print(f"{option:22}" + "".join(marks))
    for text, number in notes.items():
        print(f"  {number}) {text}")
    for option, where in ELSEWHERE.items():
        print(f"{option:22} {where}")


def own() -> bytes:
    lines = Path("/proc/self/status").read_bytes().splitlines(keepends=True)
    return next(line for line in lines if line.startswith(b"NoNewPrivs"))


@pytest.mark.root
def test_no_new_privs_with_other_ids() -> None:
    done = run(STATUS, stdout=subprocess.PIPE, user=65534, no_new_privs=True)
    assert done.stdout == SET


@pytest.mark.root
def test_set_user_id_bit_has_no_effect(public_dir: Path) -> None:
    program = public_dir / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    command = [program, "-u"]
    for value, uid in (False, 0), (True, 65534):
        done = run(command, stdout=subprocess.PIPE, user=65534, no_new_privs=value)
        assert int(done.stdout) == uid


def test_no_new_privs_by_posix_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "posix")
    errand_boy.stop()
    with pytest.raises(OSError, match="no_new_privs") as caught:
        run(["true"], no_new_privs=True)
    errand_boy.stop()
    assert caught.value.errno == errno.ENOTSUP


def test_no_new_privs_and_a_fork() -> None:
    with pytest.raises(ValueError, match="no_new_privs= can't be given with a preexec_fn"):
        run(["true"], preexec_fn=print, no_new_privs=True)


def test_no_new_privs_where_only_the_standard_library_starts_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_direct, "works", lambda: False)
    with pytest.raises(OSError, match="no_new_privs=") as caught:
        run(["true"], no_new_privs=True)
    assert caught.value.errno == errno.ENOTSUP
    assert run(["true"]).returncode == 0


def test_no_new_privs_under_a_filter_that_refuses_it() -> None:
    """The program does not run without it, and the error names the step."""
    source = """
        import platform, struct
        prctl = {"x86_64": 157, "aarch64": 167}[platform.machine()]
        load, equal, give = 0x20, 0x15, 0x06
        instructions = [
            (load, 0, 0, 0), (equal, 0, 3, prctl), (load, 0, 0, 16), (equal, 0, 1, 38),
            (give, 0, 0, 0x50000 | 1), (give, 0, 0, 0x7FFF0000),
        ]
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
        filter = struct.pack("@HP", len(instructions), ctypes.addressof(code))
        filter = ctypes.create_string_buffer(filter)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, filter, 0, 0) == 0
        try:
            subprocess.run(["true"], no_new_privs=True)
        except OSError as error:
            report([error.errno, str(error)])
    """
    for way in ("errand_boy", "errand_boy-helper"):
        number, text = run_script(source, way)
        assert number == errno.EPERM
        assert "no_new_privs" in text


# -- values that are wrong, and what the kernel refuses --

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rlimits": {"files": 1}}, ValueError, "rlimits: 'files' is not one of cpu, "),
    ({"rlimits": {"nofile": -2}}, ValueError, "rlimits: nofile: -2 is neither a number nor"),
    ({"rlimits": {"nofile": (2, 1)}}, ValueError, "rlimits: nofile: the soft limit of (2, 1)"),
    ({"nice": "5"}, TypeError, "nice: '5' is not an integer"),
    ({"nice": 41}, ValueError, "nice: 41 is not in -40 to 40"),
    ({"cpu_affinity": []}, ValueError, "cpu_affinity: at least one CPU"),
    ({"cpu_affinity": [8192]}, ValueError, "cpu_affinity: 8192 is not in 0 to 8191"),
    ({"scheduler": "round"}, ValueError, "scheduler: 'round' is not one of other, fifo, rr, "),
    ({"scheduler": "fifo"}, ValueError, "scheduler: fifo: priority: 0 is not in 1 to 99"),
    ({"ionice": ("idle", 8)}, ValueError, "ionice: idle: level: 8 is not in 0 to 7"),
    ({"timer_slack": -1}, ValueError, "timer_slack: -1 is not in 0 to "),
    ({"oom_score_adj": 1001}, ValueError, "oom_score_adj: 1001 is not in -1000 to 1000"),
    ({"signals_ignored": [9]}, ValueError, "signals_ignored: the action of SIGKILL"),
    ({"signals_blocked": [65]}, ValueError, "signals_blocked: 65 is not in 1 to 64"),
    ({"signals_default": {2}, "signals_ignored": {2}}, ValueError, "2 can't be in both"),
    ({"capabilities": "kill"}, TypeError, "capabilities: 'kill' is not a collection of names"),
    ({"capabilities": ["fly"]}, ValueError, "capabilities: 'fly' is not one of chown, "),
    ({"root": "a\0b"}, ValueError, "root: embedded null byte"),
    ({"controlling_terminal": -1, "start_new_session": True}, ValueError, "-1 is not a descriptor"),
    ({"controlling_terminal": 0}, ValueError, "controlling_terminal needs start_new_session=True"),
    ({"foreground": True}, ValueError, "foreground needs start_new_session=True or a process_grou"),
    ({"rlimit": {}}, TypeError, "unexpected keyword argument 'rlimit'. Did you mean 'rlimits'?"),
    ({"cdw": "/"}, TypeError, "unexpected keyword argument 'cdw'. Did you mean 'cwd'?"),
    ({"timeot": 5}, TypeError, "unexpected keyword argument 'timeot'. Did you mean 'timeout'?"),
]


@pytest.mark.parametrize("options, error, words", BAD, ids=lambda value: str(value)[:30])
def test_bad_value(
    options: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is started."""
    monkeypatch.setattr(_direct, "spawn", None)
    with pytest.raises(error, match=re.escape(words)):
        run(["true"], **options)


def test_a_wrapped_constructor_that_names_no_parameter_takes_them_all() -> None:
    """As a monitoring package makes one, before or after errand_boy is imported."""
    program = """if True:
        import subprocess
        {first}
        original = subprocess.Popen.__init__
        def wrapped(self, *args, **kwargs):
            original(self, *args, **kwargs)
        subprocess.Popen.__init__ = wrapped
        import errand_boy
        done = errand_boy.run(["cat"], stdin=errand_boy.DEVNULL, nice=1, text=True, cwd="/")
        print(done.returncode)
        errand_boy.run(["cat"], stdn=3, nice=1)"""
    for first in "", "import errand_boy":
        command = [sys.executable, "-c", program.format(first=first)]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.stdout == "0\n", found.stderr
        assert "unexpected keyword argument 'stdn'" in found.stderr


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    (
        {"rlimits": {"nofile": 1 << 40}},
        errno.EPERM,
        f"rlimits: nofile: {1 << 40} is above the hard",
    ),
    ({"cpu_affinity": [8191]}, errno.EINVAL, "cpu_affinity: 8191: Invalid argument"),
    ({"root": "/no/such"}, errno.ENOENT, "root: '/no/such': No such file or directory"),
    ({"root": "/dev/null"}, errno.ENOTDIR, "root: '/dev/null': Not a directory"),
    ({"foreground": True, "start_new_session": True}, errno.ENXIO, "foreground: "),
]


@pytest.mark.root
@pytest.mark.parametrize("options, number, words", REFUSED, ids=lambda value: str(value)[:30])
def test_refusal_names_the_option(
    options: dict[str, Any], number: int, words: str, spawn: str, client: Any
) -> None:
    if spawn == "posix":
        number, words = errno.ENOTSUP, next(iter(options)).removeprefix("cpu_")
    for by in by_run, by_map, by_asyncio_run:
        with pytest.raises(OSError, match=re.escape(words)) as caught:
            by(["true"], options)
        assert caught.value.errno == number
    if spawn == "direct":
        with pytest.raises(OSError, match=re.escape(words)) as caught:
            by_run(["true"], options, of=client)
        assert caught.value.errno == number


@pytest.mark.root
@pytest.mark.parametrize("way", ["errand_boy", "errand_boy-helper"])
def test_refusal_without_rights(way: str) -> None:
    """Each error is the kernel's own, and names the option."""
    found = run_script(
        """
        importlib.import_module("errand_boy._options.table")  # which others may not be able to read
        asked = [
            {"nice": -5}, {"oom_score_adj": -500}, {"capabilities": ["kill"]}, {"root": "/"},
            {"scheduler": ("fifo", 1)}, {"rlimits": {"core": (0, 0), "nofile": (1, 1 << 20)}},
        ]
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        os.setgroups([]), os.setgid(12345), os.setuid(12345)
        start()
        found = []
        for options in asked:
            try:
                subprocess.run(["true"], **options)
            except OSError as error:
                found.append([error.errno, str(error)])
        report(found)
        """,
        way,
    )
    expected = [
        (errno.EACCES, "nice: -5: "),
        (errno.EACCES, "oom_score_adj: -500: "),
        (errno.EPERM, "capabilities: 'kill': "),
        (errno.EPERM, "root: '/': "),
        (errno.EPERM, "scheduler: ('fifo', 1): "),
        (errno.EPERM, "rlimits: nofile: 1048576 is above the hard limit"),
    ]
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, text), (_, words) in zip(found, expected, strict=True):
        assert words in text


@pytest.mark.root
@pytest.mark.parametrize("uid", [None, 12345])
def test_capabilities_of_another_user(uid: int | None) -> None:
    """The command has them as any user; without the option, another user has none."""
    names = ["net_bind_service", "CAP_KILL"]
    command = ["grep", "-E", "Cap(Eff|Bnd|Amb)", "/proc/self/status"]
    done = run(command, stdout=subprocess.PIPE, user=uid, capabilities=names, text=True)
    kept = 1 << 10 | 1 << 5
    assert {int(line.split()[1], 16) for line in done.stdout.splitlines()} == {kept}


def test_options_may_change_between_starts() -> None:
    limits = {"nofile": 50}
    for number in 60, 70:
        limits["nofile"] = number
        done = run(["sh", "-c", "ulimit -n"], stdout=subprocess.PIPE, rlimits=limits)
        assert int(done.stdout) == number


@pytest.mark.parametrize("inheritable", [True, False])
def test_carried_descriptor_is_not_the_commands(inheritable: bool, spawn: str) -> None:
    """This holds for any number, even one that the command uses for something else."""
    if spawn == "posix":
        pytest.skip("posix_spawn can't do it")
    find_program("ps", "procps")
    listing = ["sh", "-c", "ps -o tty= -p $$; ls -l /proc/$$/fd"]
    master, terminal = os.openpty()
    os.set_inheritable(terminal, inheritable)
    high = fcntl.fcntl(terminal, fcntl.F_DUPFD_CLOEXEC, 300)
    given = {"start_new_session": True, "stderr": subprocess.STDOUT, "text": True}
    for fd in terminal, high:
        done = run(listing, stdout=subprocess.PIPE, controlling_terminal=fd, **given)
        assert done.stdout.startswith("pts/")
        assert "/dev/pts" not in done.stdout
    # Among those of the command it stays, at the command's number.
    done = run(listing, stdout=subprocess.PIPE, stdin=terminal, controlling_terminal=high, **given)
    assert done.stdout.count("/dev/pts") == 1
    done = run(listing, stdout=subprocess.PIPE, pass_fds=[high], controlling_terminal=high, **given)
    assert done.stdout.count("/dev/pts") == 1
    os.close(high)
    os.close(terminal)
    os.close(master)
