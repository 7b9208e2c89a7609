"""The client of the daemon: subprocess's interface, with the daemon starting the commands."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import socket
import subprocess
import time
from functools import partial

from errand_boy._client import capture
from errand_boy._native import lib
from errand_boy._options import request as _request
from errand_boy._options.request import Request
from errand_boy._options.spawn_frame import SpawnFrame, check
from errand_boy._process import popen as _popen, start as _start
from errand_boy._process.functions import rebind
from errand_boy._wire import address as _address
from errand_boy._wire.address import unix_socket
from errand_boy._wire.connection import Connection
from errand_boy.errors import NoDaemonError, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping
    from typing import Any, AnyStr, Literal, overload

    from typing_extensions import Unpack

    from errand_boy._jobs.blocking import Job
    from errand_boy._map.result import Result
    from errand_boy._map.signatures import Map
    from errand_boy._types.parameters import Args, File, Parameters, StartParameters, StrOrPath
    from errand_boy._types.signatures import Call, CheckOutput, Run
    from errand_boy._wire.address import Address
else:
    AnyStr = str

_MOST_IDLE = 32  # connections kept for later
_PAUSE = 0.01  # seconds between attempts to connect to a daemon with a full backlog
_LOOK = 0.5  # seconds between checks that the helper lives, in communicate()
_WITH_FS = lib.EB_WITH_CWD | lib.EB_WITH_UMASK

_clients: dict[tuple[str, int | None, bool], Client] = {}


def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    peer_uid: int | None = None,
    classic: bool = False,
) -> Client:
    """Return the client of the daemon at `path`, as errand_boy.connect does.

    The same path and `peer_uid` give the same client. `classic`: without ``$XDG_RUNTIME_DIR``, the
    default path is in a directory of the user under ``$TMPDIR`` or ``/tmp``, except for root.
    """
    address = _address.find(path, peer_uid, classic=classic)
    key = (address.path, peer_uid, address.is_default)
    client = _clients.get(key)
    if client is None:
        client = _clients.setdefault(key, Client(address))
    return client


class _Idle(Connection):
    """A connection to a daemon, and the ids that this process had when it connected."""

    __slots__ = ("ids",)

    def __init__(self, sock: socket.socket, client: Client) -> None:
        super().__init__(sock, client)
        self.ids = _ids()


class Popen(_popen.Popen[AnyStr]):
    """subprocess.Popen whose child is started, owned and waited for by a helper of the daemon.

    Parameters, methods and exceptions are those of subprocess.Popen, except that

    - the child leads its own process group, unless `start_new_session` or `process_group` says
      otherwise;
    - with `kill_on_client_exit`, the child's process group gets SIGTERM when this process ends, and
      SIGKILL `kill_grace` seconds later; without it, the child lives on. (If you drop a Popen
      before its child has ended, the standard library keeps it, and so its connection.);
    - a `preexec_fn` must be one of those that the documentation lists;
    - `wait`, `poll` and `communicate` raise HelperDiedError if the helper has ended and the exit
      status is lost, and ChildProcessError in a process forked from the one that started the
      command.
    """

    _source: Client

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: Popen[str],
            args: Args,
            bufsize: int = -1,
            executable: StrOrPath | None = None,
            stdin: File = None,
            stdout: File = None,
            stderr: File = None,
            *,
            text: Literal[True],
            encoding: str | None = None,
            errors: str | None = None,
            universal_newlines: bool | None = None,
            **options: Unpack[Parameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Popen[str],
            args: Args,
            bufsize: int = -1,
            executable: StrOrPath | None = None,
            stdin: File = None,
            stdout: File = None,
            stderr: File = None,
            *,
            encoding: str,
            text: bool | None = None,
            errors: str | None = None,
            universal_newlines: bool | None = None,
            **options: Unpack[Parameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Popen[str],
            args: Args,
            bufsize: int = -1,
            executable: StrOrPath | None = None,
            stdin: File = None,
            stdout: File = None,
            stderr: File = None,
            *,
            errors: str,
            text: bool | None = None,
            encoding: str | None = None,
            universal_newlines: bool | None = None,
            **options: Unpack[Parameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Popen[str],
            args: Args,
            bufsize: int = -1,
            executable: StrOrPath | None = None,
            stdin: File = None,
            stdout: File = None,
            stderr: File = None,
            *,
            universal_newlines: Literal[True],
            text: bool | None = None,
            encoding: str | None = None,
            errors: str | None = None,
            **options: Unpack[Parameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Popen[bytes],
            args: Args,
            bufsize: int = -1,
            executable: StrOrPath | None = None,
            stdin: File = None,
            stdout: File = None,
            stderr: File = None,
            *,
            text: Literal[False] | None = None,
            encoding: None = None,
            errors: None = None,
            universal_newlines: Literal[False] | None = None,
            **options: Unpack[Parameters],
        ) -> None: ...

        @overload
        def __init__(
            self: Popen[Any],
            args: Args,
            bufsize: int = -1,
            executable: StrOrPath | None = None,
            stdin: File = None,
            stdout: File = None,
            stderr: File = None,
            *,
            text: bool | None = None,
            encoding: str | None = None,
            errors: str | None = None,
            universal_newlines: bool | None = None,
            **options: Unpack[Parameters],
        ) -> None: ...

    def __init__(
        self,
        *args: Any,
        kill_on_client_exit: bool = False,
        kill_grace: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if kill_on_client_exit:
            self._more = {"on_close": _request.milliseconds(kill_grace, "kill_grace")}
        super().__init__(*args, **kwargs)

    def send_group_signal(self, sig: int) -> None:
        """Send a signal to the child's process group; do nothing if it is known to have ended."""
        child = self._helper_child
        if child is not None and self.poll() is None:
            child.send_signal(-self.pid, sig)

    def _exchange_output(self, input: Any, timeout: float | None) -> tuple[Any, Any]:
        """Do what subprocess does, but notice if the helper dies while the pipes stay open."""
        if not (self.stdin or self.stdout or self.stderr):
            return super()._exchange_output(input, timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            rest = _LOOK if deadline is None else deadline - time.monotonic()
            try:
                return super()._exchange_output(input, min(rest, _LOOK))
            except subprocess.TimeoutExpired as expired:
                if timeout is not None and rest <= _LOOK:
                    expired.timeout = timeout
                    raise
            self.poll()
            input = None


class Client:
    """The functions, constants and exceptions of subprocess, for commands of one daemon.

    `path` is the path of the daemon's socket.
    """

    PIPE = subprocess.PIPE
    STDOUT = subprocess.STDOUT
    DEVNULL = subprocess.DEVNULL
    CalledProcessError = subprocess.CalledProcessError
    CompletedProcess = subprocess.CompletedProcess
    SubprocessError = subprocess.SubprocessError
    TimeoutExpired = subprocess.TimeoutExpired
    list2cmdline: Callable[[Iterable[StrOrPath]], str] = staticmethod(subprocess.list2cmdline)

    if TYPE_CHECKING:
        call: Call
        check_call: Call
        check_output: CheckOutput
        getoutput: Callable[..., str]
        getstatusoutput: Callable[..., tuple[int, str]]
        map: Map[
            Generator[Result[str], None, None],
            Generator[Result[bytes], None, None],
            Generator[Result[Any], None, None],
        ]
        run: Run
        # At run time it is a derived class, which starts commands through this client.
        Popen = Popen
    else:

        def map(self, commands: Any, **options: Any) -> Any:
            """Have the daemon run many commands at once; see errand_boy.map."""
            from errand_boy._map import map as _map  # noqa: PLC0415

            return _map.map(commands, client=self, **options)

    def __init__(self, address: Address) -> None:
        self.address = address
        self.path: str = address.path
        self.owns_children = True
        self._idle: list[Connection] = []
        popen = type("Popen", (Popen,), {"_source": self})
        functions = rebind(popen, wrap_run=partial(capture.runner, self))
        vars(self).update(functions, Popen=popen)

    def __repr__(self) -> str:
        return f"<errand_boy client of {self.path}>"

    def close(self) -> None:
        """Close the connections that no command uses. The next command opens a new one."""
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:  # another thread took it
                return

    def status(self) -> dict[str, Any]:
        """Return the daemon's own figures, as `errand-boy status --json` prints them.

        Raises NoDaemonError, with the reason, if there is no answer.
        """
        from errand_boy._wire import status as _status  # noqa: PLC0415  it brings json

        try:
            return _status.fetch(self.address)
        except _status.NoAnswerError as error:
            text = str(error).removeprefix(f"{self.path}: ")
            raise NoDaemonError(errno.ENOTCONN, text, self.path) from None

    def start(self, args: Args, name: str | None = None, **options: Unpack[StartParameters]) -> Job:
        """Start a command that outlives this process, and return it as a Job when it runs.

        - `name`: letters, digits and ``._-``; by default the program's name and the job's number.
        - `ring`: how many bytes of each output are kept, by default 256 KiB.
        - `log`: a file that gets all output. At `log_size` bytes it is renamed to ``log.1`` and so
          on; `log_count` renamed files are kept.
        - `notify`: a command to run when the job ends, with ERRAND_BOY_JOB, _NAME, _STATUS and
          _CAUSE in its environment; a shell runs a string.
        - `stdin`: None for empty input, PIPE for what attached clients write, or a file.

        The other options are those of Popen without `stdout`; `tree` is "all" by default. Raises
        what Popen raises, NoDaemonError, and JobError with the daemon's reason.
        """
        from errand_boy._jobs import blocking as _blocking  # noqa: PLC0415

        return _blocking.start(self, args, name, **options)

    def job(self, job: str | int, *, uid: int | None = None) -> Job:
        """Return the job of this number, or the newest of this name. `uid`: of another user.

        Raises NoJobError, NoDaemonError and JobError.
        """
        from errand_boy._jobs import blocking as _blocking  # noqa: PLC0415

        return _blocking.find(self, job, uid)

    def jobs(self, all: bool = False, *, uid: int | str | None = None) -> list[Job]:
        """Return the running jobs; if `all`, also those that are over and kept.

        `uid`: another user, or "all" for the jobs of all users, which only root and the daemon's
        own user may see. Raises NoDaemonError and JobError.
        """
        from errand_boy._jobs import blocking as _blocking  # noqa: PLC0415

        return _blocking.find_all(self, all, uid)

    # -- for Popen: the interface of Local --

    default_group = 0  # the command's own
    is_daemon = True

    def way(self, with_ids: bool) -> str:
        """Return "helper"."""
        return "helper"

    def check_function(self, preexec_fn: Callable[[], Any], more: Mapping[str, Any]) -> None:
        """Raise ValueError."""
        raise ValueError(
            "the daemon accepts no preexec_fn that is not known: use "
            + _start.instead_of(preexec_fn)
        )

    def until_reachable(self) -> Generator[float, None, None]:
        """Yield seconds to wait while `acquire` would have to wait for a connection."""
        # Nothing reports room in the backlog of a Unix socket.
        while not self._idle:
            try:
                connection = self._connect(blocking=False)
            except BlockingIOError:
                yield _PAUSE
            except OSError:  # `acquire` will raise it
                return
            else:
                self.take_back(connection)

    def acquire(self, request: Request, spawn_frame: SpawnFrame) -> Connection:
        """Prepare `request`, and send as much as possible without waiting; return the connection.

        Raises NoDaemonError, RefusedError, and OSError for a lack of descriptors or a request that
        is too long (E2BIG).
        """
        while True:
            connection = spawn_frame.connection = self._pop() or self._connect()
            found = spawn_frame.prepare(request, None, 0, _WITH_FS, connection)
            if found < 0:  # nothing has been sent
                spawn_frame.connection = None
                connection.give_back()
                check(found)
            if found & lib.EB_CONNECTION:
                return connection
            # Somebody else has closed its descriptor, or it is from before a fork.
            spawn_frame.connection = None
            connection.close()

    def connection(self) -> Connection:
        """Return a connection that is not in use. Raises NoDaemonError and RefusedError."""
        while True:
            connection = self._pop() or self._connect()
            if connection.is_ours():
                return connection
            connection.close()

    def take_back(self, connection: Connection) -> None:
        """Keep a connection for the next command, or close it. For Connection.give_back."""
        if len(self._idle) < _MOST_IDLE and not connection.is_foreign():
            self._idle.append(connection)
        else:
            connection.close()

    def discard(self, connection: Connection) -> None:
        """Close a broken connection. The others may be intact."""
        connection.close()

    def _pop(self) -> Connection | None:
        ids = _ids()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took it
                break
            # The daemon may run a connection's commands with the rights of whoever made it.
            if isinstance(connection, _Idle) and connection.ids == ids:
                return connection
            connection.close()
        return None

    def _connect(self, *, blocking: bool = True) -> Connection:
        sock = self.new_socket(blocking)
        try:
            connection = _Idle(sock, self)
            # If the daemon has closed it, the reason is read where a reply is awaited.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.open()
        except BaseException:
            sock.close()
            raise
        return connection

    def new_socket(self, blocking: bool) -> socket.socket:
        """Return a new connection over which nothing has been sent yet; jobs use it too.

        Raises NoDaemonError, RefusedError, BlockingIOError and other OSError.
        """
        sock = unix_socket()
        try:
            sock.setblocking(blocking)  # whatever socket.setdefaulttimeout says
            sock.connect(self.path)
            self.address.check(sock)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
            sock.close()
            raise NoDaemonError(error.errno, self.address.nobody(), self.path) from None
        except RefusedError:
            sock.close()
            raise
        except PermissionError as error:
            sock.close()
            text = "this user may not connect to the daemon's socket"
            raise RefusedError(error.errno, text, self.path) from error
        except OSError as error:
            sock.close()
            if error.errno is None:  # "AF_UNIX path too long"
                text = f"{error}: at most 107 bytes"
                raise NoDaemonError(errno.ENAMETOOLONG, text, self.path) from None
            raise
        except BaseException:
            sock.close()
            raise
        return sock


def _ids() -> tuple[int, int]:
    return os.geteuid(), os.getegid()


def _close_idle() -> None:
    for client in list(_clients.values()):
        client.close()


atexit.register(_close_idle)
