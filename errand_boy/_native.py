"""Stands for the extension of that name, in C, on Unix systems other than Linux, and on PyPy.

Python prefers the extension where there is one. With this, the standard library starts all
commands, as it does on a processor for which errand-boy has no clone(2), and what needs the
extension raises one error.
"""

from __future__ import annotations

import errno
import os
import sys

from errand_boy._hints import SEE_DOCTOR, page
from errand_boy.errors import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any

if os.name != "posix":
    raise ImportError(f"errand_boy is for Linux and other Unix systems, and this is {sys.platform}")
if (sys.platform, sys.implementation.name) == ("linux", "cpython") and not os.environ.get(
    "ERRAND_BOY_WITHOUT_C"  # as for the build
):
    _text = "errand_boy is partly in C, and that part is missing. "
    if os.path.isdir(os.path.dirname(__file__)):
        _text += "Install it with pip, or build it with python setup.py build_ext --inplace"
    else:
        _text += "It can't be loaded from an archive such as a zipapp: shiv and pex unpack theirs"
    raise ImportError(_text)

WITHOUT_C = "errand-boy needs Linux and CPython for what subprocess can't do: " + page(
    "portability"
)


class _Lib:
    """The protocol's numbers, of which none is ever sent, and functions, which there are not."""

    def __getattr__(self, name: str) -> Any:
        return 0 if name.startswith("EB_") else _refuse()

    def getauxval(self, kind: int) -> int:
        """Return whether this process has the rights of another user, the only thing asked."""
        return int((os.getuid(), os.getgid()) != (os.geteuid(), os.getegid()))


def __getattr__(name: str) -> Any:
    """Refuse what needs the functions of the extension's ffi, as soon as that is imported."""
    if name == "ffi":
        _refuse()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refuse(*args: Any) -> Any:
    raise HelperError(errno.ENOTSUP, WITHOUT_C + SEE_DOCTOR)


lib: Any = _Lib()
spawn = await_spawn = leave_spawn = memfd_create = pidfd_send_signal = _refuse


def pidfd_open(pid: int) -> int:
    """Raise the error of a kernel that has no such call."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def wait4(pid: int, options: int) -> tuple[int, int, resource.struct_rusage]:
    """Do what os.wait4 does."""
    return os.wait4(pid, options)
