"""The C parser of requests against errand_boy._wire.frames, which encodes them."""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.frames import Exited, Failed, Spawned

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = [HERE / "c" / "parse_request.c", CSRC / "spawn/request.c", CSRC / "common/wire.c"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1"}

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs cc: apt-get install gcc")


def compile_c(target: Path, *arguments: str | Path) -> None:
    flags = ["-std=c11", "-g", "-O1", "-D_GNU_SOURCE", f"-I{CSRC}"]
    command = ["cc", *flags, *arguments, "-o", target]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def works(program: Path) -> bool:
    return not subprocess.run([program, "bounds"], input=b"", capture_output=True).returncode


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with sanitizers, where compiler and kernel have them."""
    target = tmp_path_factory.mktemp("wire") / "parse_request"
    try:
        compile_c(target, *SANITIZE, *SOURCES)
    except AssertionError:
        compile_c(target, *SOURCES)
    else:
        if not works(target):
            compile_c(target, *SOURCES)
    return target


def run(program: Path, payload: bytes, mode: str = "show") -> str:
    done = subprocess.run([program, mode], input=payload, capture_output=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


def understood(program: Path, *options: bytes) -> dict[str, str]:
    lines = run(program, b"".join(options)).splitlines()
    return {name: value for name, _, value in (line.partition(" ") for line in lines)}


def listed(*values: bytes) -> str:
    return " ".join("." + value.hex() for value in values)


def names(prefix: str) -> set[str]:
    return {name for name in dir(lib) if name.startswith(prefix)}


EXECUTABLES = frames.strings(lib.EB_TAG_EXECUTABLES, [b"/bin/a"])
ARGV = frames.strings(lib.EB_TAG_ARGV, [b"a"])

OPTIONS = {
    "EXECUTABLES": (
        frames.strings(lib.EB_TAG_EXECUTABLES, [b"/bin/a", b"b", b""]),
        listed(b"/bin/a", b"b", b""),
    ),
    "ARGV": (
        frames.strings(lib.EB_TAG_ARGV, [b"", b"a b", b"", b"\xff\n", b""]),
        listed(b"", b"a b", b"", b"\xff\n", b""),
    ),
    "ENV": (frames.strings(lib.EB_TAG_ENV, [b"A=", b"B=b"]), listed(b"A=", b"B=b")),
    "FDS": (frames.numbers(lib.EB_TAG_FDS, [0, 2, 3, 2**31 - 1]), "0 2 3 2147483647"),
    "CWD_FD": (frames.option(lib.EB_TAG_CWD_FD), ""),
    "CWD": (frames.string(lib.EB_TAG_CWD, b"/a\xff"), b"/a\xff".hex()),
    "UMASK": (frames.number(lib.EB_TAG_UMASK, 0o7777), str(0o777)),
    "SIGMASK": (frames.option(lib.EB_TAG_SIGMASK, b"\1" + bytes(6) + b"\x80"), str(1 + 2**63)),
    "SIGDEFAULT": (frames.option(lib.EB_TAG_SIGDEFAULT, b"\4" + bytes(7)), "4"),
    "SIGIGN": (frames.option(lib.EB_TAG_SIGIGN, b"\2" + bytes(7)), "2"),
    "SETSID": (frames.option(lib.EB_TAG_SETSID), ""),
    "PGROUP": (frames.number(lib.EB_TAG_PGROUP, -5), "-5"),
    "RLIMITS": (
        frames.option(lib.EB_TAG_RLIMITS, struct.pack("<BQQBQQ", 0, 1, 2, 15, 3, 2**64 - 1)),
        f"0:1:2 15:3:{2**64 - 1}",
    ),
    "NICE": (frames.number(lib.EB_TAG_NICE, -20), "-20"),
    "AFFINITY": (frames.option(lib.EB_TAG_AFFINITY, b"\1\2\3"), "010203"),
    "GROUPS": (frames.numbers(lib.EB_TAG_GROUPS, [0, 2**32 - 2]), f"0 {2**32 - 2}"),
    "GID": (frames.number(lib.EB_TAG_GID, 2**32 - 2), str(2**32 - 2)),
    "UID": (frames.number(lib.EB_TAG_UID, 12), "12"),
    "STREAMS": (frames.option(lib.EB_TAG_STREAMS, b"\2"), "2"),
    "NULL": (frames.option(lib.EB_TAG_NULL, b"\0"), "0"),
    "COALESCE": (frames.option(lib.EB_TAG_COALESCE), ""),
    "NO_NEW_PRIVS": (frames.option(lib.EB_TAG_NO_NEW_PRIVS), ""),
    "SET_RLIMITS": (
        frames.option(lib.EB_TAG_SET_RLIMITS, struct.pack("<BQQ", 4, 5, 6)),
        "4:5:6",
    ),
    "CONTROLLING_TERMINAL": (frames.option(lib.EB_TAG_CONTROLLING_TERMINAL), ""),
    "FOREGROUND": (frames.option(lib.EB_TAG_FOREGROUND), ""),
    "CGROUP": (frames.option(lib.EB_TAG_CGROUP), ""),
    "NAMESPACES": (frames.number(lib.EB_TAG_NAMESPACES, 0x50000000), str(0x50000000)),
    "SANDBOX": (frames.option(lib.EB_TAG_SANDBOX), ""),
    "LIMITS": (frames.option(lib.EB_TAG_LIMITS, struct.pack("<QQQI", 1, 2, 3, 4)), "1 2 3 4"),
    "QUEUE": (frames.option(lib.EB_TAG_QUEUE, struct.pack("<IB", 7, 64)), "7 64"),
    "SOCKETS": (frames.option(lib.EB_TAG_SOCKETS, b"\1"), "1"),
    "RENICE": (frames.number(lib.EB_TAG_RENICE, -3), "-3"),
    "SCHEDULER": (frames.option(lib.EB_TAG_SCHEDULER, struct.pack("<II", 3, 1)), "3 1"),
    "IONICE": (frames.number(lib.EB_TAG_IONICE, 3 << 13), str(3 << 13)),
    "SUPERVISE": (frames.option(lib.EB_TAG_SUPERVISE, struct.pack("<BI", 1, 250)), "1 250"),
    "TIMER_SLACK": (
        frames.option(lib.EB_TAG_TIMER_SLACK, struct.pack("<Q", 1 << 40)),
        str(1 << 40),
    ),
    # The same signals as in the two of which these are a part.
    "SIGNALS_DEFAULT": (frames.option(lib.EB_TAG_SIGNALS_DEFAULT, b"\4" + bytes(7)), "4"),
    "SIGNALS_IGNORED": (frames.option(lib.EB_TAG_SIGNALS_IGNORED, b"\2" + bytes(7)), "2"),
    "OOM_SCORE_ADJ": (frames.number(lib.EB_TAG_OOM_SCORE_ADJ, -1000), "-1000"),
    "ROOT": (frames.string(lib.EB_TAG_ROOT, b"/r"), b"/r".hex()),
    "CAPABILITIES": (frames.option(lib.EB_TAG_CAPABILITIES, b"\1" + bytes(7)), "1"),
    "TERMINAL": (
        frames.option(lib.EB_TAG_TERMINAL, struct.pack("<4IB", 1, 2, 3, 4, 3)),
        "1 2 3 4 3",
    ),
    "ON_CLOSE": (frames.number(lib.EB_TAG_ON_CLOSE, 1500), "1500"),
}
WHOLE = b"".join(option for option, _ in OPTIONS.values())


# The numbers


def test_every_constant_is_what_the_header_says(tmp_path: Path) -> None:
    text = re.sub(r"/\*.*?\*/", "", (CSRC / "common" / "wire.h").read_text(), flags=re.DOTALL)
    constants = set(re.findall(r"\bEB_[A-Z_]+\b", text)) - {"EB_WIRE_H"}
    assert {"EB_VERSION", "EB_MAX_FRAME", "EB_SPAWN", "EB_TAG_UID", "EB_STAGE_EXEC"} <= constants
    lines = [f'printf("%s %lld\\n", "{name}", (long long)({name}));' for name in constants]
    source = tmp_path / "constants.c"
    source.write_text(
        '#include <stdio.h>\n#include "common/wire.h"\nint main(void)\n{\n'
        + "\n".join(lines)
        + "\n}\n"
    )
    compile_c(tmp_path / "constants", source)
    done = subprocess.run([tmp_path / "constants"], stdout=subprocess.PIPE, text=True, check=True)
    in_c = dict(line.split() for line in done.stdout.splitlines())
    assert {name: int(value) for name, value in in_c.items()} == {
        name: getattr(lib, name) for name in constants
    }


def test_tags_are_consecutive_and_all_tested() -> None:
    tags = names("EB_TAG_") - {"EB_TAG_END"}
    assert sorted(getattr(lib, tag) for tag in tags) == list(range(1, lib.EB_TAG_END))
    assert {tag.removeprefix("EB_TAG_") for tag in tags} == set(OPTIONS)


def test_python_has_the_size_of_the_header() -> None:
    assert frames.HEADER.size == lib.EB_HEADER_SIZE
    assert frames.OPENING[0] == 0


@pytest.mark.slow
def test_environment_that_changes_while_a_request_is_built(tmp_path: Path) -> None:
    names = "caller/caller common/state common/wire spawn/request"
    sources = [CSRC / f"{name}.c" for name in names.split()]
    program = tmp_path / "changing"
    compile_c(program, "-fno-builtin-strlen", HERE / "c" / "changing_environment.c", *sources)
    done = subprocess.run([program], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "good\n")


# Requests


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, program: Path) -> None:
    encoded, expected = OPTIONS[name]
    others = [option for option in (EXECUTABLES, ARGV) if option[0] != encoded[0]]
    seen = understood(program, *others, encoded)
    assert seen[name] == expected
    assert seen.keys() == {"EXECUTABLES", "ARGV", "descriptors", name}
    carried = 1 if name in ("CWD_FD", "CONTROLLING_TERMINAL", "CGROUP", "SANDBOX") else 0
    assert int(seen["descriptors"]) == (4 if name == "FDS" else carried)


@pytest.mark.parametrize("order", [1, -1])
def test_all_options(order: int, program: Path) -> None:
    seen = understood(program, *[option for option, _ in OPTIONS.values()][::order])
    assert seen.pop("descriptors") == "8"
    expected = {name: expected for name, (_, expected) in OPTIONS.items()}
    assert seen == expected


@pytest.mark.parametrize("values", [[], [b""], [b"", b""], [b"a" * 131_071], [b"x"] * 100_000])
@pytest.mark.parametrize("name", ["EXECUTABLES", "ARGV", "ENV"])
def test_string_lists(name: str, values: list[bytes], program: Path) -> None:
    encoded = frames.strings(getattr(lib, f"EB_TAG_{name}"), values)
    others = [option for option in (EXECUTABLES, ARGV) if option[0] != encoded[0]]
    assert understood(program, *others, encoded)[name] == listed(*values)


def test_environment_of_a_mebibyte(program: Path) -> None:
    values = [b"N%d=%s" % (number, b"v" * 1000) for number in range(1060)]
    encoded = frames.strings(lib.EB_TAG_ENV, values)
    assert len(encoded) > 1 << 20
    assert understood(program, EXECUTABLES, ARGV, encoded)["ENV"] == listed(*values)


def test_most_strings(program: Path) -> None:
    """Each of the two lists ends in NULL; one more string is too many."""
    most = lib.EB_MAX_STRINGS - 3
    values = [b""] * most
    seen = understood(program, EXECUTABLES, frames.strings(lib.EB_TAG_ARGV, values))
    assert seen["ARGV"].count(".") == most
    one_more = frames.strings(lib.EB_TAG_ARGV, [*values, b""])
    assert run(program, EXECUTABLES + one_more) == f"error {errno.E2BIG}\n"


@pytest.mark.parametrize(
    "name, most, size", [("FDS", lib.EB_MAX_FDS, 4), ("GROUPS", lib.EB_MAX_GROUPS, 4)]
)
def test_most_numbers(name: str, most: int, size: int, program: Path) -> None:
    tag = getattr(lib, f"EB_TAG_{name}")
    seen = understood(program, EXECUTABLES, ARGV, frames.numbers(tag, range(most)))
    assert len(seen[name].split()) == most
    too_many = frames.numbers(tag, range(most + 1))
    assert run(program, EXECUTABLES + ARGV + too_many).startswith(f"refused: option {name}: ")


def test_longest_frame() -> None:
    most = lib.EB_MAX_FRAME
    assert len(frames.frame(lib.EB_SPAWN, [bytes(most)])) == lib.EB_HEADER_SIZE + most
    with pytest.raises(OSError) as caught:
        frames.frame(lib.EB_SPAWN, [bytes(most), b"\0"])
    assert caught.value.errno == errno.E2BIG


@pytest.mark.parametrize("values", [[b"\0"], [b"a", b"b\0"], [b"", b"\0a", b""]])
def test_nul_byte_in_a_string_is_an_error_here(values: list[bytes]) -> None:
    with pytest.raises(ValueError, match="embedded null byte"):
        frames.strings(lib.EB_TAG_ARGV, values)
    with pytest.raises(ValueError, match="embedded null byte"):
        frames.string(lib.EB_TAG_CWD, values[-2:][0] + b"\0")


# Replies


def test_replies() -> None:
    spawned = frames.reply(lib.EB_SPAWNED, struct.pack("<iB", 77, lib.EB_OWNER_HELPER))
    assert isinstance(spawned, Spawned)
    assert (spawned.pid, spawned.by_helper) == (77, True)
    spawned = frames.reply(lib.EB_SPAWNED, struct.pack("<iB", 77, lib.EB_OWNER_CALLER))
    assert isinstance(spawned, Spawned)
    assert not spawned.by_helper
    failed = frames.reply(lib.EB_FAILED, struct.pack("<iiBB", 78, 2, lib.EB_STAGE_EXEC, 7))
    assert isinstance(failed, Failed)
    assert (failed.pid, failed.errno, failed.stage) == (78, 2, lib.EB_STAGE_EXEC)
    assert failed.member == 7
    exited = frames.reply(lib.EB_EXITED, struct.pack("<i9Q", 9, *range(9)))
    assert isinstance(exited, Exited)
    assert (exited.status, tuple(exited.usage)) == (9, tuple(range(9)))
    assert frames.reply(200, b"") is None


@pytest.mark.parametrize("kind, size", [("SPAWNED", 5), ("FAILED", 10), ("EXITED", 76)])
def test_reply_of_another_size(kind: str, size: int) -> None:
    for wrong in (0, size - 1, size + 1):
        with pytest.raises(struct.error):
            frames.reply(getattr(lib, f"EB_{kind}"), bytes(wrong))


# What is not a request


def test_reader_and_writer_keep_their_bounds(program: Path) -> None:
    assert run(program, b"", "bounds") == "good\n"


def test_every_truncation_is_answered(program: Path) -> None:
    """Complete options may be missing at the end, but not the two required ones."""
    good, errors, refused = map(int, run(program, WHOLE, "truncate").split())
    assert good == len(OPTIONS) - 2
    assert errors == 0
    assert good + refused == len(WHOLE)


@pytest.mark.slow
def test_every_byte_may_be_wrong(program: Path) -> None:
    good, errors, refused = map(int, run(program, WHOLE, "corrupt").split())
    assert good + errors + refused == 255 * len(WHOLE)
    assert errors == 0
    assert good > 0
    assert refused > 0
