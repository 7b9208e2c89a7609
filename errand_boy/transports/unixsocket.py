"""The interface of errand-boy 0.3, of 2014, over the daemon's client."""

from __future__ import annotations

import subprocess
from subprocess import PIPE

from errand_boy._client import capture as _capture, client as _client
from errand_boy._wire import frames as _frames
from errand_boy.errors import SessionClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from resource import struct_rusage
    from typing import Any

    from errand_boy._client.client import Client

_TEXT = ("text", "universal_newlines", "encoding", "errors")


class UNIXSocketTransport:
    """A client of the daemon at `socket_path`, or at the default path."""

    def __init__(self, socket_path: str | os.PathLike[str] | None = None) -> None:
        self._client = _client.connect(socket_path, classic=True)

    def run_cmd(
        self,
        command_string: Any,
        input: Any = None,
        timeout: float | None = None,
        **options: Any,
    ) -> tuple[_client.Popen[Any] | Ended, Any, Any]:
        """Run a shell command line with `input`; return the process, its output and its errors.

        The options are those of Popen. Both outputs are text, unless the options say otherwise.
        After `timeout` seconds the command is killed and subprocess.TimeoutExpired is raised.
        """
        if input is None:
            options.setdefault("stdin", subprocess.DEVNULL)
        self._complete(command_string, options)
        if input is None and _capture.can_capture(options):
            done, pid, usage = _capture.capture(self._client, command_string, options, timeout)
            return Ended(done, pid, usage), done.stdout, done.stderr
        with self._client.Popen(command_string, **options) as process:
            try:
                stdout, stderr = process.communicate(input, timeout)
            except BaseException:
                process.kill()
                raise
        return process, stdout, stderr

    def Popen(self, command_string: Any, **options: Any) -> _client.Popen[Any]:
        """Start a shell command line whose standard streams are pipes of text; return its process.

        The options are those of the client's Popen, and override these settings. A list is run
        without a shell.
        """
        self._complete(command_string, options)
        return self._client.Popen(command_string, **options)

    def _complete(self, command_string: Any, options: dict[str, Any]) -> None:
        options.setdefault("shell", isinstance(command_string, (str, bytes)))
        for stream in ("stdin", "stdout", "stderr"):
            options.setdefault(stream, PIPE)
        if not any(name in options for name in _TEXT):
            options["errors"] = "surrogateescape"  # file names may be anything

    def get_session(self) -> Session:
        """Return a session, for use in a ``with`` statement."""
        return Session(self._client)


class Ended(subprocess.Popen[bytes]):
    """The process of a command that has ended, whose methods do nothing."""

    def __init__(
        self, done: subprocess.CompletedProcess[Any], pid: int, usage: tuple[int, ...]
    ) -> None:
        self.args: Any = done.args
        self.returncode: int = done.returncode
        self.pid: int = pid
        self.stdin: None = None
        self.stdout: None = None
        self.stderr: None = None
        self._communication_started = False
        self._usage = usage

    @property
    def rusage(self) -> struct_rusage:
        """The resources used by the command and the children that it has waited for."""
        return _frames.rusage(self._usage)

    def send_group_signal(self, sig: int) -> None:
        """Do nothing."""


class Session:
    """A use of the daemon's client, until it is closed."""

    def __init__(self, client: Client) -> None:
        self._client: Client | None = client

    def __enter__(self) -> Session:
        self._open_client()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the session. Processes that it has started keep running."""
        self._client = None

    @property
    def subprocess(self) -> Face:
        """An object in place of the module subprocess. Raises SessionClosedError."""
        self._open_client()
        return Face(self)

    def _open_client(self) -> Client:
        if self._client is None:
            raise SessionClosedError("the session is closed")
        return self._client


class Face:
    """The functions, constants and exceptions of subprocess, as long as the session is open."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session._open_client(), name)
