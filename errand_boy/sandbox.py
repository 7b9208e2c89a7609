"""A sandbox for untrusted commands: which files and which network they may use.

The kernel enforces it: Landlock for files, TCP ports, signals and abstract sockets, and a small
seccomp filter for all other kinds of sockets and for typing on a terminal. It needs no privileges,
applies to everything that the command starts, and can't be undone. The documentation says what it
does not cover.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import warnings
from collections.abc import Iterable, Mapping

from errand_boy._descriptors import above_standard
from errand_boy._hints import SEE_DOCTOR
from errand_boy._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, TypeAlias

    Path: TypeAlias = str | bytes | os.PathLike[Any]
    Network: TypeAlias = bool | Mapping[Literal["connect", "bind"], Iterable[int]]

# Rights of Landlock, as in <linux/landlock.h>, and the version that introduced them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << n for n in range(6))
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (
    1 << n for n in range(6, 13)
)
_FIRST = (1 << 13) - 1  # all of the above
_REFER, _TRUNCATE, _IOCTL_DEV, _RESOLVE_UNIX = (1 << n for n in range(13, 17))
_LATER = ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV), (9, _RESOLVE_UNIX))
_NETWORK = {"bind": 1, "connect": 2}
_SCOPES = 3  # abstract Unix sockets, signals

_READ = _READ_FILE | _READ_DIR
_WRITE = (
    _WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _REFER | _RESOLVE_UNIX
    | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO | _MAKE_SYM
)  # fmt: skip
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV | _RESOLVE_UNIX

# What must be in force, and the version that introduced it.
_NEEDS = (
    (1, "files (Linux 5.13)"),
    (3, "truncation of files (Linux 6.2)"),
    (5, "ioctl on devices (Linux 6.10)"),
    (6, "signals and abstract sockets (Linux 6.12)"),
)
_PORTS = (4, "TCP ports (Linux 6.7)")

# The files that dynamically linked programs of a distribution read.
_SYSTEM_EXECUTE = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
_SYSTEM_READ = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/dev/null",
                "/dev/zero", "/dev/urandom")  # fmt: skip
_SYSTEM_WRITE = ("/dev/null",)

_warned: set[tuple[str, ...]] = set()


class Sandbox:
    """What a command may use; for `sandbox=` of Popen, run, map and the other functions.

    - `read`, `write`, `execute`: files, and directories with all that is in them. Reading includes
      listing directories. Writing means changing, creating, renaming and removing, but not reading.
      Executable files may also be read. The command can open nothing else, whoever owns it. A
      program needs `execute` for itself, for its interpreter, and for the libraries of both.
    - `system`: the command may execute the programs and libraries of the distribution (/usr, /lib
      and so on), and read some files in /etc and /dev.
    - `network`: with False, the command can make only Unix sockets. With a mapping of `connect`,
      `bind` or both to lists of TCP ports, it can also use TCP sockets for these ports. With True,
      it can make any socket.
    - `strict`: raise OSError (ENOTSUP) if the kernel can't enforce all of this. If false, a
      RuntimeWarning says once what is not in force, and `missing` lists it.

    Signals and abstract Unix sockets reach only processes of the same sandbox; ioctl(2) on a device
    fails unless the device was open before. The command and its descendants gain no privileges,
    can't type on a terminal that they inherit (TIOCSTI), and can use neither io_uring nor keyrings
    unless `network` is True.

    The paths are opened when the object is made, so it applies to the files and directories that
    exist at that time; a path that does not exist raises OSError. Keep the object for further
    commands, which saves most of its cost.
    """

    __slots__ = ("_arguments", "_ruleset", "missing", "sockets")

    missing: tuple[str, ...]  # what is not in force
    sockets: int  # in the format of SOCKETS in a request

    def __init__(
        self,
        *,
        read: Iterable[Path] = (),
        write: Iterable[Path] = (),
        execute: Iterable[Path] = (),
        network: Network = False,
        system: bool = False,
        strict: bool = True,
    ) -> None:
        self._ruleset = -1
        given = {"read": _paths("read", read), "write": _paths("write", write)}
        given["execute"] = _paths("execute", execute)
        ports = _ports(network)
        self._arguments = {**given, "network": network, "system": system, "strict": strict}
        version = max(0, lib.eb_landlock_version())
        self.missing = missing(version, with_ports=ports is not None)
        if self.missing:
            self._complain(version, strict)
        self.sockets = lib.EB_SOCKETS_ANY if network is True else lib.EB_SOCKETS_UNIX
        if ports is not None:
            self.sockets = lib.EB_SOCKETS_TCP
        if version:
            self._make(version, given, system, ports)

    def __repr__(self) -> str:
        return (
            f"Sandbox({', '.join(f'{name}={value!r}' for name, value in self._arguments.items())})"
        )

    def __reduce__(self) -> Any:
        raise TypeError("a Sandbox can't be pickled: give sandbox= a mapping of its arguments")

    def __del__(self) -> None:
        if getattr(self, "_ruleset", -1) >= 0:  # none yet if the arguments were wrong
            with contextlib.suppress(OSError):
                os.close(self._ruleset)

    def fileno(self) -> int:
        """Return the ruleset's descriptor, or -1 if the kernel has no Landlock."""
        return self._ruleset

    def _complain(self, version: int, strict: bool) -> None:
        text = (
            f"this kernel's Landlock (version {version}) does not cover {', '.join(self.missing)}"
        )
        if not version:
            text = f"this kernel has no Landlock, or it is off: nothing covers {self.missing[0]}"
        if strict:
            text += f"; with strict=False the rest is in force{SEE_DOCTOR}"
            raise OSError(_ENOTSUP, f"sandbox: {text}")
        if self.missing not in _warned:
            _warned.add(self.missing)
            warnings.warn(f"sandbox: {text}", RuntimeWarning, stacklevel=3)

    def _make(
        self,
        version: int,
        given: Mapping[str, list[Any]],
        system: bool,
        ports: dict[str, list[int]] | None,
    ) -> None:
        handled = _FIRST | sum(rights for least, rights in _LATER if version >= least)
        network = sum(_NETWORK.values()) if ports is not None and version >= _PORTS[0] else 0
        self._ruleset = _check(
            lib.eb_landlock_create(handled, network, _SCOPES if version >= 6 else 0)
        )
        for name, rights in ("read", _READ), ("write", _WRITE), ("execute", _EXECUTE | _READ):
            for path in given[name]:
                self._allow(path, rights & handled)
        if system:
            for paths, rights in (
                (_SYSTEM_EXECUTE, _EXECUTE | _READ),
                (_SYSTEM_READ, _READ),
                (_SYSTEM_WRITE, _WRITE & handled),
            ):
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):
                        self._allow(path, rights)
        if network and ports is not None:
            for name, numbers in ports.items():
                for port in numbers:
                    _check(lib.eb_landlock_allow_port(self._ruleset, port, _NETWORK[name]))

    def _allow(self, path: Any, rights: int) -> None:
        try:
            [fd] = above_standard(os.open(path, os.O_PATH | os.O_CLOEXEC))
        except OSError as error:
            raise OSError(error.errno, f"sandbox: {error.strerror}", path) from None
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= _OF_FILES
            _check(lib.eb_landlock_allow_path(self._ruleset, fd, rights), path)
        finally:
            os.close(fd)


_ENOTSUP = errno.ENOTSUP


def _check(result: int, path: Any = None) -> int:
    if result < 0:
        raise OSError(-result, f"sandbox: {os.strerror(-result)}", path)
    return result


def _paths(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"sandbox: {name} must be a list of paths, not one path")
    return list(value)


def _ports(network: Any) -> dict[str, list[int]] | None:
    """Return the ports of a mapping, or None for a bool. Raises TypeError and ValueError."""
    if isinstance(network, bool):
        return None
    if not isinstance(network, Mapping) or network.keys() - _NETWORK.keys():
        raise TypeError(
            f"sandbox: network={network!r}: it must be False, True, or a mapping with connect or "
            "bind"
        )
    ports = {name: list(numbers) for name, numbers in network.items()}
    for name, numbers in ports.items():
        for port in numbers:
            if not isinstance(port, int) or not 0 <= port <= 0xFFFF:
                raise ValueError(f"sandbox: network: {name}: {port!r} is not a TCP port")
    return ports


def missing(version: int, *, with_ports: bool = True) -> tuple[str, ...]:
    """Return what Landlock of this version does not cover."""
    needs = (*_NEEDS, _PORTS) if with_ports else _NEEDS
    return tuple(what for least, what in needs if version < least)


def of(value: Any) -> Sandbox:
    """Return `value`, which is a Sandbox, or a Sandbox made of the arguments in a mapping."""
    if isinstance(value, Sandbox):
        return value
    if isinstance(value, Mapping):
        return Sandbox(**value)
    raise TypeError(f"sandbox={value!r}: it must be a Sandbox, or a mapping of its arguments")
