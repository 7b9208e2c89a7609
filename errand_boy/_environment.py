"""The environment variables that change what errand-boy does."""

from __future__ import annotations

import os
import sys

from errand_boy._native import lib

_AT_SECURE = 23

# As secure_getenv(3) and Python itself: whoever runs a set-user-ID program, or one that has
# switched its environment off, must not choose the programs and sockets that it uses.
IS_IGNORED = bool(sys.flags.ignore_environment or lib.getauxval(_AT_SECURE))


def variable(name: str) -> str | None:
    """Return the value of an environment variable, None if it is unset, empty, or not to be used.

    It is not to be used with ``-E`` or ``-I``, and in a program with other rights than its user.
    """
    return None if IS_IGNORED else os.environ.get(name) or None
