"""Makes a request of Popen's arguments: `args`, `shell`, `env`, `cwd` and the others.

Only this module interprets them, for all front ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from operator import index

from errand_boy._hints import SEE_DOCTOR, did_you_mean
from errand_boy._native import lib
from errand_boy._wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from errand_boy._wire.frames import Failed

_PATH_MAX = 4096  # bytes: Linux's limit
_INT_MAX = 0x7FFFFFFF

_is_gil_enabled: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)


class Request:
    """A command to start.

    - `options`: encoded.
    - `standard`: the descriptors for the child's 0 to 2, or -1 to inherit the parent's.
    - `others`: descriptors that keep their numbers, in ascending order.
    - `carried`: descriptors of options, see `settings`.
    - `flags`: EB_WITH_* and EB_RESTORE_SIGNALS.
    """

    __slots__ = ("carried", "flags", "options", "others", "standard")

    def __init__(
        self,
        options: bytes,
        standard: tuple[int, int, int],
        others: Sequence[int],
        carried: Sequence[Any],
        flags: int,
    ) -> None:
        self.options: bytes = options
        self.standard: tuple[int, int, int] = standard
        self.others: Sequence[int] = others
        self.carried: Sequence[Any] = carried
        self.flags: int = flags


# -- the command --


def arguments(args: Any, shell: bool, executable: Any = None) -> list[Any]:
    """Return the argument list that `args` stands for. Raises TypeError."""
    if isinstance(args, (list, tuple)):  # checked first, because the other checks take longer
        args = list(args)
    elif isinstance(args, (str, bytes)):
        args = [args]
    elif isinstance(args, os.PathLike):
        if shell:
            raise TypeError("path-like args is not allowed when shell is true")
        args = [args]
    else:
        args = list(args)
    return [executable or "/bin/sh", "-c", *args] if shell else args


def command(argv: Sequence[Any], executable: Any, env: Mapping[Any, Any] | None) -> bytes:
    """Return the options for a program and its arguments.

    Raises TypeError, and ValueError for an embedded null byte.
    """
    words = [os.fsencode(arg) for arg in argv]
    program = words[0] if argv and executable is argv[0] else os.fsencode(executable)
    return frames.strings(lib.EB_TAG_ARGV, words) + programs(program, lambda: exec_path(env))


def programs(name: bytes, path: Callable[[], Iterable[bytes]]) -> bytes:
    """Return the option with the programs to try in turn for `name`, as in execvp(3)."""
    found = [name]
    if b"/" not in name:
        # A longer name fails in any case, and the request would have it many times.
        found = [os.path.join(directory, name[:_PATH_MAX]) for directory in path()]
    return frames.strings(lib.EB_TAG_EXECUTABLES, found)


def exec_path(env: Mapping[Any, Any] | None) -> list[bytes]:
    """Return the directories in which to look for programs."""
    return [os.fsencode(directory) for directory in os.get_exec_path(env)]


# -- the command's settings --


def settings(
    *,
    env: Mapping[Any, Any] | None = None,
    cwd: Any = None,
    restore_signals: bool = True,
    umask: int = -1,
    start_new_session: bool = False,
    process_group: int = -1,
    default_group: int = -1,
    gids: list[int] | None = None,
    gid: int | None = None,
    uid: int | None = None,
    on_close: int | None = None,
    **more: Any,
) -> tuple[bytes, int, list[Any]]:
    """Return the encoded options for a command, the flags of the request, and its descriptors.

    The parameters have the names of Popen's, or of values that Popen derives from them. Without a
    `process_group`, the group is `default_group`, or the caller's if that is negative. `on_close`
    is the option of that name, and `more` are those of `table`. The descriptors are numbers or
    objects with a `fileno`, which must stay alive until the request has been sent or the start has
    ended. Raises ValueError, TypeError and OverflowError as subprocess.Popen does, and OSError.
    """
    flags = lib.EB_RESTORE_SIGNALS if restore_signals else 0
    options = b""
    if env is None and not _is_gil_enabled():
        env = _own_environment()
    if env is None:
        flags |= lib.EB_WITH_ENVIRONMENT
    else:
        options += frames.strings(lib.EB_TAG_ENV, _environment(env))
    if cwd is not None:
        options += frames.string(lib.EB_TAG_CWD, os.fsencode(cwd))
    if index(umask) >= 0:
        options += frames.number(lib.EB_TAG_UMASK, _as_int(umask))
    if start_new_session:
        options += frames.option(lib.EB_TAG_SETSID)
    elif index(process_group) < 0:
        process_group = default_group
        flags |= lib.EB_WITH_PGROUP if process_group < 0 else 0
    if index(process_group) >= 0:
        options += frames.number(lib.EB_TAG_PGROUP, _as_int(process_group))
    if gids is not None:
        options += frames.numbers(lib.EB_TAG_GROUPS, _group_ids(gids))
    if gid is not None and gid >= 0:
        options += frames.number(lib.EB_TAG_GID, _id(gid, "gid"))
    if uid is not None and uid >= 0:
        options += frames.number(lib.EB_TAG_UID, _id(uid, "uid"))
    if on_close is not None:
        options += frames.number(lib.EB_TAG_ON_CLOSE, on_close)
    if not more:
        return options, flags, []
    from errand_boy._options.table import encode  # noqa: PLC0415  only those who need it pay for it

    encoded, carried = encode(more, bool(start_new_session), process_group >= 0)
    return options + encoded, flags, carried


def unknown(names: Set[str]) -> Set[str]:
    """Return those of `names`, which the standard library lacks, that we don't know either."""
    return names - own_options() if names else names


def unexpected(function: str, unknown: Set[str], known: Iterable[str]) -> TypeError:
    """Return Python's own error for the first of the `unknown` keywords, with what it may mean.

    `known` are those that `function` knows besides the options.
    """
    name = min(unknown)
    return TypeError(
        f"{function} got an unexpected keyword argument {name!r}"
        + did_you_mean(name, (*known, *own_options()))
    )


def own_options() -> Set[str]:
    """Return the names of the options that the standard library lacks."""
    from errand_boy._options.table import NAMES  # noqa: PLC0415  only those who need it pay for it

    return NAMES


def ids(user: Any, group: Any, extra_groups: Any) -> dict[str, Any]:
    """Return uid, gid and gids for `settings`, made of these parameters of Popen.

    Raises TypeError, ValueError, and KeyError for an unknown name.
    """
    found: dict[str, Any] = {}
    if user is not None:
        found["uid"] = _id_of(user, "user")
    if group is not None:
        found["gid"] = _id_of(group, "group")
    if extra_groups is not None:
        if isinstance(extra_groups, (str, bytes)):
            raise TypeError("extra_groups must be a list of names and numbers")
        found["gids"] = [_id_of(group, "group") for group in extra_groups]
    return found


def _id_of(given: Any, kind: str) -> int:
    if isinstance(given, str):
        if kind == "user":
            import pwd  # noqa: PLC0415

            return pwd.getpwnam(given).pw_uid
        import grp  # noqa: PLC0415

        return grp.getgrnam(given).gr_gid
    if not isinstance(given, int):
        raise TypeError(f"{kind} must be a string or an integer, not {given!r}")
    if given < 0:
        raise ValueError(f"a {kind}'s id can't be negative, got {given}")
    return given


def _own_environment() -> dict[bytes, bytes]:
    """Return this process's environment as os.environ has it.

    For a Python without a GIL, where os.putenv may move and free the C library's meanwhile.
    """
    while True:
        with contextlib.suppress(KeyError):  # another thread has removed a variable
            return dict(os.environb)


def _environment(env: Mapping[Any, Any]) -> list[bytes]:
    """Return the variables in execve's format. Raises ValueError for a name with "="."""
    result = []
    for key, value in env.items():
        name = os.fsencode(key)
        if b"=" in name:
            raise ValueError("illegal environment variable name")
        result.append(name + b"=" + os.fsencode(value))
    return result


def _as_int(value: int) -> int:
    if index(value) > _INT_MAX:
        raise OverflowError("signed integer is greater than maximum")  # CPython's words
    return value


def _id(value: int, name: str) -> int:
    if value >= 0xFFFFFFFF:  # to the kernel, that number means "unchanged"
        # The words are CPython's (_Py_Uid_Converter).
        raise OverflowError(
            f"{name} is greater than maximum"
            if value > sys.maxsize
            else f"{name} is less than minimum"
        )
    return value


def _group_ids(values: list[int]) -> list[int]:
    if len(values) > lib.EB_MAX_GROUPS:
        extra = "extra_" if sys.version_info >= (3, 12) else ""
        raise ValueError(f"too many {extra}groups")
    try:
        return [_id(value, "gid") for value in values]
    except OverflowError:
        raise ValueError("invalid group id") from None


# -- the command's descriptors --


def standard(p2cread: int, c2pwrite: int, errwrite: int) -> tuple[int, int, int]:
    """Return the descriptors for the child's 0 to 2. Raises OSError and OverflowError."""
    fds = (p2cread, c2pwrite, errwrite)
    if min(fds) < -1:  # STDOUT, where it makes no sense
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _as_int(max(fds))
    return fds


def others(pass_fds: Iterable[int]) -> list[int]:
    """Return `pass_fds` in ascending order. Raises ValueError for invalid numbers."""
    kept = set(map(int, pass_fds))
    if kept and not 0 <= min(kept) <= max(kept) <= _INT_MAX:
        raise ValueError("bad value(s) in fds_to_keep")
    return sorted(kept)


def numbers(carried: Iterable[Any]) -> list[int]:
    """Return the numbers of `carried`, the descriptors that `settings` returned."""
    return [fd if type(fd) is int else fd.fileno() for fd in carried]


def with_inheritable(fds: Iterable[int]) -> list[int]:
    """Return `fds` and all inheritable descriptors of this process from 3 on, ascending."""
    found = set(fds)
    from errand_boy._descriptors import open_descriptors  # noqa: PLC0415  few need it

    for fd in open_descriptors():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            if fd > 2 and os.get_inheritable(fd):
                found.add(fd)
    return sorted(found)


# -- commands whose output comes over the connection --


def streamed(
    command: bytes,
    stdin: Any,
    stdout: Any,
    stderr: Any,
    *,
    brief: bool,
    process_group: int | None = None,
    **given: Any,
) -> tuple[int, Request]:
    """Return which streams are streamed, in the format of STREAMS, and the request.

    `command` are the options for the program. `stdin`, `stdout` and `stderr` are as for Popen, but
    the helper makes the pipes. `brief` adds COALESCE. The rest goes to `settings`. By default, the
    command leads its own group. With a `pty`, all three streams are the terminal, and the caller
    must send the end of the input.
    """
    if given.get("pty"):
        # All three are the terminal, and its echo must be read.
        stdin, stdout, stderr = subprocess.PIPE, subprocess.PIPE, subprocess.STDOUT
        given["start_new_session"] = True
    streams, made, fds = _made_by_helper(stdin, stdout, stderr)
    if given.get("limits") is not None:
        from errand_boy._options.limits import check_read  # noqa: PLC0415  only those who need it pay

        check_read(given["limits"], fds[1:])
    group = -1 if process_group is None else process_group
    what, flags, carried = settings(process_group=group, default_group=0, **given)
    options = command + what + made
    if brief:
        options += frames.option(lib.EB_TAG_COALESCE)
    return streams, Request(options, fds, (), carried, flags | lib.EB_WITHOUT_STANDARD)


def milliseconds(grace: float, name: str) -> int:
    """Return `grace` in milliseconds for ON_CLOSE. Raises ValueError, with the option's `name`."""
    value = round(grace * 1000)
    if not 0 <= value < lib.EB_LIVES_ON:
        raise ValueError(f"{name} is out of range")
    return value


def spawn_error(
    failed: Failed, executable: Any, cwd: Any, more: Mapping[str, Any] | None = None
) -> OSError:
    """Return the exception that subprocess.Popen raises; `more` are options that it lacks."""
    text = os.strerror(failed.errno)
    if failed.errno == errno.ENOTSUP and failed.stage != lib.EB_STAGE_TREE:
        step = frames.stage_name(failed.stage)
        text += f": posix_spawn cannot change a child's {step}{SEE_DOCTOR}"
        return OSError(failed.errno, text)
    if failed.stage == lib.EB_STAGE_CWD:
        return OSError(failed.errno, text, cwd)
    if failed.stage == lib.EB_STAGE_EXEC:
        return OSError(failed.errno, text, executable)
    if failed.stage == lib.EB_STAGE_FDS and failed.errno == errno.ENOENT:
        return OSError(failed.errno, text, os.devnull)  # the only file that a helper opens itself
    if failed.stage == lib.EB_STAGE_START and failed.errno in (errno.EPERM, errno.ENOSYS):
        text += ": the system forbids clone(2) as the helper calls it; ERRAND_BOY_SPAWN=posix, in "
        text += "the environment of this process or of the daemon, has it call posix_spawn"
        text += SEE_DOCTOR
        return OSError(failed.errno, text)
    if more:
        from errand_boy._options import table  # noqa: PLC0415  only those who need it pay for it

        text = table.refusal(failed, more)
    return OSError(failed.errno, text)


def name_program(error: BaseException, program: Any) -> None:
    """Add the program's name to `error` if the request was too long (E2BIG)."""
    if isinstance(error, OSError) and error.errno == errno.E2BIG and error.filename is None:
        error.filename = program


def _made_by_helper(
    stdin: Any, stdout: Any, stderr: Any
) -> tuple[int, bytes, tuple[int, int, int]]:
    """Return which streams are streamed, the options for that, and the descriptors."""
    streams = nulls = 0
    fds = [-1, -1, -1]
    for number, wanted in enumerate((stdin, stdout, stderr)):
        if wanted == subprocess.PIPE:
            streams |= 1 << number
        elif wanted == subprocess.DEVNULL:
            nulls |= 1 << number
        elif wanted == subprocess.STDOUT:
            if number < 2:
                raise ValueError("STDOUT can only be used for stderr")  # CPython 3.13's words
            if streams & 2:
                streams |= lib.EB_JOINED
            elif nulls & 2:
                nulls |= 4
            else:
                fds[2] = fds[1]
        elif wanted is None:
            with contextlib.suppress(OSError):  # if it is closed, it is closed in the command too
                fds[number] = number if os.get_inheritable(number) else -1
        else:
            fds[number] = wanted if isinstance(wanted, int) else wanted.fileno()
    options = b""
    if streams:
        options += frames.option(lib.EB_TAG_STREAMS, bytes([streams]))
    if nulls:
        options += frames.option(lib.EB_TAG_NULL, bytes([nulls]))
    return streams, options, (fds[0], fds[1], fds[2])
