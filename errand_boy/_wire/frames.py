"""The bytes of the protocol, which csrc/common/wire.h defines. No I/O."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Sequence

from errand_boy._native import lib
from errand_boy.errors import ProtocolError, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource

HEADER = struct.Struct("<IB")
HELLO = HEADER.pack(4, lib.EB_HELLO) + struct.pack("<I", lib.EB_VERSION)
OPENING = b"\0" + HELLO

_OPTION = struct.Struct("<BI")
_LIST = struct.Struct("<BII")
_SPAWNED = struct.Struct("<iB")
_FAILED = struct.Struct("<iiBB")
EXITED = struct.Struct("<i9Q")
TREE = struct.Struct("<BQQQI")  # at the end of a supervised command's EXITED


class Spawned:
    """A command is running. ``by_helper``: it is the helper's child, and Exited will follow."""

    __slots__ = ("by_helper", "pid")

    def __init__(self, pid: int, by_helper: bool) -> None:
        self.pid: int = pid
        self.by_helper: bool = by_helper


class Failed:
    """A command was not started. ``pid``: a process that the caller must wait for, or 0."""

    __slots__ = ("errno", "member", "pid", "stage")

    def __init__(self, pid: int, error: int, stage: int, member: int = 0) -> None:
        self.pid: int = pid
        self.errno: int = error
        self.stage: int = stage
        self.member: int = member  # which part of the stage was refused, such as a resource


class Exited:
    """The end of a command: its wait status, and its usage in the order of wire.h.

    `tree`: a supervisor's figures about the whole tree, in that order too, or an empty tuple.
    """

    __slots__ = ("status", "tree", "usage")

    def __init__(self, status: int, *usage: int) -> None:
        self.status: int = status
        self.usage: tuple[int, ...] = usage
        self.tree: tuple[int, ...] = ()


Reply = Spawned | Failed | Exited


def rusage(usage: Sequence[int], tree: Sequence[int] = ()) -> resource.struct_rusage:
    """Return the usage of an Exited as a resource.struct_rusage, with the times of its `tree`."""
    from resource import struct_rusage  # noqa: PLC0415

    if tree:
        usage = (max(usage[0], tree[1]), max(usage[1], tree[2]), *usage[2:])
    user, system, peak, minor, major, blocks_in, blocks_out, voluntary, involuntary = usage
    return struct_rusage(
        (
            *(user / 1e6, system / 1e6, peak, 0, 0, 0, minor, major, 0),
            *(blocks_in, blocks_out, 0, 0, 0, voluntary, involuntary),
        )
    )


_RUSAGE = struct.Struct("18l")


def kernels_rusage(usage: bytes) -> resource.struct_rusage:
    """Return the struct rusage from wait4(2) as a resource.struct_rusage."""
    from resource import struct_rusage  # noqa: PLC0415

    user, user_us, system, system_us, *rest = _RUSAGE.unpack_from(usage)
    return struct_rusage((user + user_us / 1e6, system + system_us / 1e6, *rest))


def stage_name(stage: int) -> str:
    """Return the name of a stage of a start."""
    for name in dir(lib):
        if name.startswith("EB_STAGE_") and getattr(lib, name) == stage:
            return name.removeprefix("EB_STAGE_").lower()
    return str(stage)


def is_refused(failed: Failed) -> bool:
    """Return whether the kernel or a filter refuses what the direct way needs."""
    return failed.errno == errno.ENOSYS and failed.stage == lib.EB_STAGE_START


def option(tag: int, value: bytes = b"") -> bytes:
    """Return an option of a SPAWN request."""
    return _OPTION.pack(tag, len(value)) + value


def strings(tag: int, values: Sequence[bytes]) -> bytes:
    """Return a string list option. Raises ValueError if a string holds a NUL byte."""
    text = b"\0".join(values) + b"\0" if values else b""
    if text.count(0) != len(values):
        raise ValueError("embedded null byte")
    return _LIST.pack(tag, len(text) + 4, len(values)) + text


def string(tag: int, value: bytes) -> bytes:
    """Return an option that is one string. Raises ValueError if it holds a NUL byte."""
    if 0 in value:
        raise ValueError("embedded null byte")
    return option(tag, value + b"\0")


def numbers(tag: int, values: Sequence[int]) -> bytes:
    """Return an option that is a list of u32."""
    return option(tag, struct.pack(f"<{len(values)}I", *values))


def number(tag: int, value: int) -> bytes:
    """Return an option that is one number, taken modulo 2**32."""
    return option(tag, struct.pack("<I", value & 0xFFFFFFFF))


def frame(kind: int, parts: Iterable[bytes]) -> bytes:
    """Return a complete frame. Raises OSError (E2BIG) if it is too long."""
    payload = b"".join(parts)
    if len(payload) > lib.EB_MAX_FRAME:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return HEADER.pack(len(payload), kind) + payload


def reply(kind: int, payload: bytes) -> Reply | None:
    """Decode a reply; return None for other kinds. Raises struct.error if it is malformed."""
    if kind == lib.EB_SPAWNED:
        pid, owner = _SPAWNED.unpack(payload)
        return Spawned(pid, owner == lib.EB_OWNER_HELPER)
    if kind == lib.EB_FAILED:
        return Failed(*_FAILED.unpack(payload))
    if kind == lib.EB_EXITED:
        exited = Exited(*EXITED.unpack(payload[: EXITED.size]))
        if len(payload) > EXITED.size:
            exited.tree = TREE.unpack(payload[EXITED.size :])
        return exited
    return None


def check_version(payload: bytes) -> None:
    """Check the other side's HELLO. Raises ProtocolError if it speaks another version."""
    version = int.from_bytes(payload[:4], "little")
    if version != lib.EB_VERSION:
        raise ProtocolError(
            errno.EPROTO,
            f"the helper speaks version {version} of the protocol, this client version "
            f"{lib.EB_VERSION}: restart the older one",
        )


def refusal(reason: str, greeted: bool) -> ProtocolError:
    """Return the error for a REFUSED, before or after the other side's HELLO.

    The reason may be a stranger's: it is no sequence for a terminal.
    """
    reason = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in reason)
    if greeted:
        return ProtocolError(errno.EPROTO, f"the helper refused: {reason}")
    return RefusedError(errno.EACCES, f"the daemon refused: {reason}")  # no helper has it yet
