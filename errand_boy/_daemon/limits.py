"""The limits of each user, from the administrator's file."""

from __future__ import annotations

import errno
import json
import pwd
from collections.abc import Callable
from typing import NamedTuple

from errand_boy._quantities import size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_SIZES = ("bytes", "ring")


class Limits(NamedTuple):
    """The limits of one user; 0 means no limit."""

    commands: int = 0  # at a time; more have to wait
    connections: int = 0  # open at a time; more are refused
    bytes: int = 128 << 20  # held for requests of the text protocol; beyond it, one is cut off
    starts_per_second: float = 0.0  # on average; more have to wait
    burst: int = 1  # starts at once, after a pause
    jobs: int = 256  # running; more are refused
    kept_jobs: int = 100  # over; beyond it, the oldest ones are removed
    ring: int = 256 << 20  # bytes for the output of all jobs


class Holdings:
    """The bytes that the daemon keeps for users, in memory and in files."""

    def __init__(self, limits: Callable[[int], Limits]) -> None:
        self._limits = limits
        self._held: dict[int, int] = {}

    def users(self) -> set[int]:
        """Return the users for whom bytes are held."""
        return set(self._held)

    def of(self, uid: int) -> int:
        """Return how many bytes are held for user `uid`."""
        return self._held.get(uid, 0)

    def take(self, uid: int, size: int) -> None:
        """Count `size` more bytes. Raises OSError if that exceeds the user's limit."""
        held = self.of(uid) + size
        most = self._limits(uid).bytes
        if held > most > 0:
            raise OSError(errno.EDQUOT, f"the requests of this user may hold at most {most} bytes")
        self._held[uid] = held

    def give_back(self, uid: int, size: int) -> None:
        """Count `size` bytes as released."""
        held = self._held.pop(uid, 0) - size
        if held > 0:
            self._held[uid] = held


class LimitsError(Exception):
    """The file is invalid; the text says why, in one line."""


class Table:
    """The limits of all users, from the file at `path`, if any, with the defaults in `base`."""

    def __init__(self, path: str | None, base: Limits) -> None:
        self._path = path
        self._base = self._default = base
        self._users: dict[int, Limits] = {}

    @property
    def is_used(self) -> bool:
        """Whether starts may have to wait, now or after a change of the file."""
        return self._path is not None or self._base != Limits()

    def of(self, uid: int) -> Limits:
        """Return the limits of user `uid`."""
        return self._users.get(uid, self._default)

    def state(self) -> list[Any]:
        """Return the limits, for `restore`."""
        return [self._default, list(self._users.items())]

    def restore(self, state: list[Any]) -> None:
        """Restore the predecessor's `state`."""
        default, users = state
        self._default = Limits(*default)
        self._users = {uid: Limits(*limits) for uid, limits in users}

    def read(self) -> None:
        """Read the file again. If that raises LimitsError, the limits stay as they were."""
        if self._path is None:
            return
        try:
            with open(self._path, encoding="utf-8") as file:
                text = json.load(file)
            if not isinstance(text, dict):
                raise ValueError("not an object")
            default = _with(self._base, text.pop("default", {}))
            users = {_uid(name): _with(default, value) for name, value in text.items()}
        except OSError as error:
            raise LimitsError(f"{self._path}: {error.strerror}") from None
        except ValueError as error:
            raise LimitsError(f"{self._path}: {error}") from None
        self._default, self._users = default, users


def _uid(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ValueError(f"unknown user {name}") from None


def _with(base: Limits, value: Any) -> Limits:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an object")
    given: dict[str, Any] = {}
    for name, amount in value.items():
        if name not in Limits._fields:
            raise ValueError(f"unknown limit {name!r}")
        is_size = name in _SIZES
        number = size(amount) if is_size and isinstance(amount, str) else amount
        kinds = (int, float) if name == "starts_per_second" else int
        most = 1 << 50 if is_size else 1e9
        if isinstance(number, bool) or not isinstance(number, kinds) or not 0 <= number < most:
            raise ValueError(f"{name} cannot be {amount!r}")
        given[name] = number
    limits = base._replace(**given)
    return limits._replace(burst=max(1, limits.burst))
