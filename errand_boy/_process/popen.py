"""The standard library's Popen, with another way to start the child."""

from __future__ import annotations

import select
import subprocess
import sys
import time

from errand_boy._process import child, driver, start
from errand_boy._process.child import HelperChild, Verdict
from errand_boy._process.functions import original_popen, parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, AnyStr, Literal, overload

    from typing_extensions import Unpack

    from errand_boy._options.ends import Ends, Stop
    from errand_boy._types.parameters import Args, File, Parameters, StrOrPath
    from errand_boy.terminal import Terminal

    _Base = subprocess.Popen
else:
    AnyStr = str  # typing takes milliseconds to import
    _Base = original_popen()

# A class of our own, because pytest-subprocess replaces every name for Popen in any module.
_Stdlib: Any = type("Popen", (_Base,), {})
_STANDARD = parameters(_Base.__init__)


class WithTerminal:
    """The part of every Popen class that handles `pty`."""

    terminal: Terminal | None = None
    _select: Any = select  # the module, or a framework's replacement

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Write `input`, read all output, and wait for the end; see subprocess.Popen."""
        if self.terminal is None:
            return super().communicate(input, timeout)  # type: ignore[misc,no-any-return]
        from errand_boy._process import pty  # noqa: PLC0415

        return pty.communicate(self, input, timeout)

    def __exit__(self, *args: Any) -> None:
        if self.terminal is None:
            super().__exit__(*args)  # type: ignore[misc]
            return
        if not self.terminal.at_end:  # otherwise SIGHUP might reach a command that is about to end
            self.terminal.close()
        super().__exit__(*args)  # type: ignore[misc]
        self.terminal.close()


class WithEnds:
    """The part of every Popen class that handles `stop`, `tree` and `drain`."""

    _ends: Ends | None = None  # None if none of the three was given
    # The exceptions that its waits may raise. The methods here raise the first one.
    _expired: Any = (subprocess.TimeoutExpired,)
    _is_one_shot = False  # made by run or call, which kill it after any exception

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Do what subprocess.Popen.communicate does; with `stop`, end the command at a time-out."""
        if self._ends is None:
            return self._exchange_output(input, timeout)
        return start.stopping().communicate(self, input, timeout)  # type: ignore[no-any-return]

    def _exchange_output(self, input: Any, timeout: float | None) -> tuple[Any, Any]:
        return super().communicate(input, timeout)  # type: ignore[misc,no-any-return]

    def stop(self, stop: Stop | None = None) -> int:
        """End the command as its `stop` and `tree` say, or by other steps; return its return code.

        Without these, only the process itself gets SIGKILL. This waits for the end, and for ever if
        SIGKILL is not among the steps and nothing else ends the command. Raises ValueError and
        TypeError for bad steps, and the exceptions of `wait`.
        """
        return start.stopping().stop(self, stop)  # type: ignore[no-any-return]

    def kill(self) -> None:
        """Send SIGKILL to the process; with ``tree="all"``, end all its descendants too."""
        if self._is_one_shot:
            self.stop()
        else:
            super().kill()  # type: ignore[misc]

    def __exit__(self, kind: Any, *args: Any) -> None:
        if self._ends is not None and kind is not None:
            start.stopping().leave(self)
        super().__exit__(kind, *args)  # type: ignore[misc]


class WithVerdict(Verdict):
    """The part of every Popen class that says how the command ended.

    The class keeps the time of the start in `_begun`, and the last signal that it sent in `_sent`.
    """

    _try_wait = child.try_wait

    def _handle_exitstatus(self, *args: Any, **kwargs: Any) -> None:
        super()._handle_exitstatus(*args, **kwargs)  # type: ignore[misc]
        child.note_end(self)

    def _check_timeout(self, endtime: Any, timeout: Any, *outputs: Any, **kwargs: Any) -> None:
        if self._limited is not None:
            self._limited.count(self, *outputs[:2])
        super()._check_timeout(endtime, timeout, *outputs, **kwargs)  # type: ignore[misc]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[misc]
        child.tell_verdict(self, raised[1])


class Popen(WithEnds, WithTerminal, WithVerdict, _Base[AnyStr]):
    """subprocess.Popen whose child is started without a fork, at the same cost from any process.

    All parameters, methods and exceptions are those of the running Python's subprocess.Popen, and
    on Linux the child is a child of this process. This process itself starts it. A helper starts it
    if `user`, `group` or `extra_groups` is given, after errand_boy.start(), or if the environment
    variable ``ERRAND_BOY_SPAWN`` says so. If the system lacks what both need, the standard library
    starts it. A wait with a time-out returns as soon as the child ends.

    Popen replaces a `preexec_fn` that it knows by options that do the same: the documentation lists
    these functions, and `errand_boy.chain` joins several. Any other function runs in a fork of this
    process, as in subprocess, with a warning.

    With `pty`, the command leads its own session on a new terminal, which replaces those standard
    streams that are not redirected. `pty` is True, (rows, columns), or a terminal.Pty. `terminal`
    is then this process's side of the terminal: see errand_boy.terminal. `communicate` types the
    input, and returns what the command shows on the terminal.

    The other options are those of `errand_boy.Options`. Together with a `preexec_fn` that forks,
    they raise ValueError. Where the system lacks what is needed, or with
    ``ERRAND_BOY_SPAWN=posix``, they raise OSError (ENOTSUP).

    If a helper is needed, the constructor raises HelperError if none can be started, and
    HelperDiedError if it ends during the start. With ``ERRAND_BOY_SPAWN=direct`` it raises OSError
    (ENOTSUP, ENOSYS) if this process can't start the command, and ValueError for an unknown value
    of that variable.
    """

    _source: Any = start.LOCAL
    _helper_child: HelperChild | None = None
    _more = start.NOTHING  # settings that the standard library does not have

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

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    else:

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            construct = super().__init__
            if _STANDARD.issuperset(kwargs) or not start.take_options(
                self, construct, _STANDARD, args, kwargs
            ):
                construct(*args, **kwargs)

        if sys.flags.warn_default_encoding:
            # EncodingWarning names the first caller outside subprocess's own file.
            __init__.__code__ = __init__.__code__.replace(
                co_filename=_Stdlib.__init__.__code__.co_filename
            )

    def _execute_child(self, *given: Any) -> None:
        self._begun = time.monotonic()
        start.execute(
            self, given, _Stdlib._execute_child, self._source, driver.BLOCKING, self._more
        )

    # Most commands don't need what the base classes add, and must not pay for it.

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Write `input`, read all output, and wait for the end; see subprocess.Popen."""
        if self._ends is self.terminal is self._helper_child is None:
            return _Stdlib.communicate(self, input, timeout)  # type: ignore[no-any-return]
        return super().communicate(input, timeout)

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is self.terminal is None:
            _Stdlib.__exit__(self, *raised)
        else:
            super().__exit__(*raised)

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        return child.internal_poll(_Stdlib._internal_poll, self, *args, **kwargs)

    def _wait(self, timeout: float | None) -> int:
        return child.wait(_Stdlib._wait, self, timeout)

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process; do nothing if it is known to have ended."""
        if self.returncode is None:
            self._sent = sig
        child.send_signal(_Stdlib.send_signal, self, sig)

    if TYPE_CHECKING:
        _waitpid_lock: Any
        _child_created: bool
