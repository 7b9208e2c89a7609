"""errand_boy.Shell: a shell that stays, and runs one command after another."""

from __future__ import annotations

import codecs
import fcntl
import os
import select
import shlex
import shutil
import signal
import struct
import subprocess
import termios
import threading
import time
from contextlib import suppress

from errand_boy import _native
from errand_boy._memory import open_memory
from errand_boy._options import ends as _ends
from errand_boy._process.popen import Popen
from errand_boy._shell import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from errand_boy._options.ends import Stop
    from errand_boy._types.parameters import StrOrPath

    _Completed = subprocess.CompletedProcess[Any]
else:
    _Completed = subprocess.CompletedProcess

# bash reads its script from a pipe, its standard input. It is interactive, since only then SIGINT
# ends a loop of its own and leaves the shell. A command is in a file in memory, so that it needs no
# quotes and the lines here are short. Not `read`, whose buffer outlives SIGINT, but `.` reads it.
# Its end is told on a pipe of its own.
_OPTIONS = ("--norc", "--noprofile", "--noediting", "-i")
_SETUP = """PS1= PS2= PS0=; unset PROMPT_COMMAND MAILCHECK; set +m +o history; {history}
__eb_in() {{ builtin return "$__eb_status"; }}
__eb_out() {{ __eb_status=${{2-$?}}
builtin printf '\\0\\0%s\\0%s\\0%s\\0' "$1" "$__eb_status" "$PWD"
builtin export -p; builtin printf '\\0'; }} >&{report} 2>/dev/null
builtin readonly -f __eb_in __eb_out
"""
# The condition is for `set -e`, and gives the command the status of the last one. SIGINT may cut
# off the head of this line; the rest is a syntax error then, so nothing runs. An unbalanced quote
# leaves the parser in the middle of a line, which the empty one ends.
_RUN = """if __eb_in;then builtin . {command} <{input};else builtin . {command} <{input};fi
"""
_REPORT = """
__eb_out {number} {status}
"""
_HIGH = 200  # the first number for descriptors of ours, beyond those that scripts use
_LOOK = 0.02  # seconds between signals to what is being ended
_INTERVAL = 0.2  # seconds between those to the shell, which may hit its report
_INTERRUPTED = 1.0  # seconds for a command to end by SIGINT, before `stop`
_ASK = 0.5  # seconds between questions whether the shell waits for a line
_SILENT = 10  # questions that a shell answers without a report, until it is given up
_STOP: Stop = ((signal.SIGTERM, 2), signal.SIGKILL)
_PIECE = 1 << 20


class ShellResult(_Completed):
    """How a command of a Shell ended; a subprocess.CompletedProcess with

    - `cwd`: the working directory after it;
    - `duration`: how long it took, in seconds;
    - `ended_shell`: the shell itself has ended, by this command or otherwise, and with it the jobs
      in its background. `returncode` is then that of the shell. The next command gets a new shell,
      with the last known directory and environment.
    """

    cwd: str
    duration: float
    ended_shell: bool


class ShellCommand:
    """A command that runs in a Shell, as Shell.start returns it."""

    def __init__(self, shell: Shell, command: str) -> None:
        self.args = command
        self._shell = shell
        self._begun = 0.0
        self._pieces: tuple[list[bytes], list[bytes]] = ([], [])
        self._shown = [0, 0]  # how many of the pieces `read` has returned
        self._decoders = shell._decoders()
        self._result: ShellResult | None = None

    @property
    def returncode(self) -> int | None:
        """The exit status, or None as long as the end has not been noticed."""
        return None if self._result is None else self._result.returncode

    def poll(self) -> int | None:
        """Return the exit status, or None if the command runs."""
        if self._result is None:
            self._shell._advance(self, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> ShellResult:
        """Wait for the end and return the result.

        Raises subprocess.TimeoutExpired with the output so far after `timeout` seconds; the command
        then runs on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self._result is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left < 0:
                raise self._expired(timeout)
            self._shell._advance(self, left)
        return self._result

    def read(self) -> tuple[Any, Any]:
        """Return the standard output and error since the last call, without waiting."""
        self.poll()
        new = []
        for index, pieces in enumerate(self._pieces):
            data = b"".join(pieces[self._shown[index] :])
            self._shown[index] = len(pieces)
            decoder = self._decoders[index]
            new.append(decoder.decode(data, self._result is not None) if decoder else data)
        return new[0], new[1]

    def interrupt(self) -> None:
        """Send SIGINT to the shell and to the processes of the command, as ^C does."""
        self._shell._interrupt_command(self)

    def stop(self) -> ShellResult:
        """End the command and all its processes, and return the result. The shell lives on.

        They get SIGINT, and a second later the signals of the shell's `stop`, those that have left
        their session too. If the shell still does not come back, it is killed.
        """
        self._shell._end(self)
        assert self._result is not None
        return self._result

    def _output(self) -> tuple[Any, Any]:
        output = [b"".join(pieces) for pieces in self._pieces]
        decoders = self._shell._decoders()
        first, second = (
            decoder.decode(data, True) if decoder else data
            for decoder, data in zip(decoders, output, strict=True)
        )
        return first, None if self._shell._stderr == subprocess.STDOUT else second

    def _expired(self, timeout: float | None) -> subprocess.TimeoutExpired:
        return subprocess.TimeoutExpired(self.args, timeout or 0, *self._output())

    def _finish(self, returncode: int, cwd: str, ended_shell: bool) -> None:
        result = ShellResult(self.args, returncode, *self._output())
        result.cwd = cwd
        result.duration = time.monotonic() - self._begun
        result.ended_shell = ended_shell
        self._result = result


class Shell:
    """A bash that stays, and runs one command after another; a context manager.

    Working directory, variables, functions, options, aliases, umask, traps and jobs in the
    background stay from one command to the next, as at a prompt. The commands' output, and the end
    and status of each, come through descriptors of their own, so nothing that a command prints can
    be mistaken for its end.

    `stop` are the signals that end a command at its time-out: see `errand_boy.Options`.
    ``stderr=subprocess.STDOUT`` joins both outputs. `text`, `encoding` and `errors` are as in
    subprocess.run, except that `text` is true by default and what can't be decoded is replaced.
    `cwd`, `env`, `sandbox`, `limits`, `user` and the other `options` of Popen apply to the shell,
    and so to all commands together. All processes end with the shell, and the shell with its
    caller, unless ``tree="process"`` or ``dies_with_caller=False`` is given.

    The shell starts with the first command. One command runs at a time: a second thread waits.
    The constructor raises FileNotFoundError if there is no bash.
    """

    def __init__(
        self,
        shell: str = "bash",
        *,
        cwd: StrOrPath | None = None,
        env: Mapping[str, str] | None = None,
        stderr: int = subprocess.PIPE,
        text: bool = True,
        encoding: str | None = None,
        errors: str | None = None,
        stop: Stop = _STOP,
        **options: Any,
    ) -> None:
        found = shutil.which(shell)
        if found is None:
            raise FileNotFoundError(f"no program {shell!r}, which errand_boy.Shell needs")
        self._program = found
        self._cwd = cwd
        self._env = dict(os.environ if env is None else env)
        self._stderr = stderr
        self._encoding = (encoding or "utf-8") if text or encoding or errors else None
        self._errors = errors or "replace"
        self._ends = _ends.Ends(stop)
        self._options = {"tree": "all", "dies_with_caller": True, **options}
        self._lock = threading.Lock()
        self._process: Any = None
        self._running: ShellCommand | None = None
        self._known: tuple[str, bytes] | None = None  # the last directory and environment
        self._number = 0
        self._interrupted = False  # since the last command began
        self._left: list[int] = []  # what earlier commands have left running

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The pid of the shell, or None if none runs."""
        return None if self._process is None else self._process.pid

    @property
    def background(self) -> list[int]:
        """The pids of the processes that earlier commands have left running."""
        if self._process is None:
            return []
        with self._lock:
            return sorted(self._left if self._running else self._descendants())

    def run(
        self,
        command: str,
        *,
        input: Any = None,
        timeout: float | None = None,
        check: bool = False,
    ) -> ShellResult:
        """Run a command and return a ShellResult.

        `input` is the command's standard input; without it, that is /dev/null. After `timeout`
        seconds the command and all its processes are ended, as ShellCommand.stop says, and
        subprocess.TimeoutExpired is raised with the output so far; the shell lives on. `check`
        raises CalledProcessError if the status is not 0. After any other exception, such as
        KeyboardInterrupt, the command is ended too.
        """
        running = ShellCommand(self, command)
        try:
            self._begin(running, input)
            result = running.wait(timeout)
        except subprocess.TimeoutExpired:
            self._end(running)
            raise running._expired(timeout) from None
        except BaseException:
            self._end(running)
            raise
        if check:
            result.check_returncode()
        return result

    def start(self, command: str, *, input: Any = None) -> ShellCommand:
        """Start a command, and return it as a ShellCommand.

        The next `run` or `start` waits for its end. Raises ValueError for a null character, and
        OSError if there must be a new shell, which can't be started.
        """
        running = ShellCommand(self, command)
        self._begin(running, input)
        return running

    def _begin(self, running: ShellCommand, input: Any) -> None:
        data = os.fsencode(running.args)
        if b"\0" in data:
            raise ValueError("a command can't contain a null character")
        if input is not None and self._encoding is not None:
            input = input.encode(self._encoding)
        with self._lock:
            self._finish_last()
            if self._interrupted and self._process is not None:
                self._settle()
            if self._process is None:
                self._start_shell()
            self._left = self._descendants()
            self._running = running
            running._begun = time.monotonic()
            self._send(data, input)

    def close(self) -> None:
        """End the shell with everything that it has started. The next command starts a new one."""
        with self._lock:
            if self._running is not None:
                self._running._finish(-signal.SIGKILL, self._directory(), True)
                self._running = None
            if self._process is not None:
                self._process.kill()
                self._close_shell()
            self._known = None

    # -- the shell --

    def _start_shell(self) -> None:
        try:
            self._launch()
            self._restore()
        except BaseException:
            self._running = None
            self._known = self._before
            if self._process is not None:
                self._process.kill()
                self._close_shell()
            raise

    def _launch(self) -> None:
        self._before = self._known
        env = self._env if self._before is None else {}
        history = env.get("HISTFILE")
        kept = "unset HISTFILE" if history is None else f"HISTFILE={shlex.quote(history)}"
        own: list[int] = []
        ours: list[int] = []
        try:
            ours = [open_memory("command"), open_memory("input")]
            control, self._control = os.pipe()
            own.append(control)
            ours.append(self._control)
            self._report, report = os.pipe()
            own.append(report)
            ours.append(self._report)
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in (*ours[:2], report)]
            own += high
            self._process = Popen(
                [self._program, *_OPTIONS],
                stdin=control,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                cwd=self._cwd,
                env={**env, "HISTFILE": ""},
                pass_fds=high,
                start_new_session=True,
                **self._options,
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in own:
                os.close(fd)
        self._ours = ours
        self._pidfd = _native.pidfd_open(self._process.pid)
        ours.append(self._pidfd)
        self._files = [f"/dev/fd/{fd}" for fd in high[:2]]
        pipes = (self._process.stdout, self._process.stderr)
        self._outputs = {
            pipe.fileno(): index for index, pipe in enumerate(pipes) if pipe is not None
        }
        self._interrupted = False
        self._roots = [self._process.pid]
        above = processes.parent(self._process.pid)
        if self._options["tree"] == "all" and above is not None and above != os.getpid():
            self._roots.insert(0, above)  # the supervisor, to which orphans go
        setup = ShellCommand(self, _SETUP.format(report=high[2], history=kept))
        self._running = setup
        self._write(setup.args.encode() + self._next_report())
        result = self._finish_last()
        if result is not None and result.ended_shell:
            raise OSError(f"{self._program} ended at once: {result.stderr or ''}".strip())

    def _restore(self) -> None:
        if self._before is not None:
            directory, environment = self._before
            self._running = ShellCommand(self, "")
            self._send(environment + b"\ncd -- " + os.fsencode(shlex.quote(directory)), None)
            self._finish_last()

    def _close_shell(self) -> None:
        process, self._process = self._process, None
        for fd in self._ours:
            os.close(fd)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait()

    def _directory(self) -> str:
        return os.getcwd() if self._known is None else self._known[0]

    def _descendants(self) -> list[int]:
        return processes.descendants(self._roots)

    # -- what goes to it --

    def _send(self, command: bytes, input: bytes | None) -> None:
        for fd, data in zip(self._ours, (command, input or b""), strict=False):
            os.ftruncate(fd, 0)
            view = memoryview(data)
            while view:
                view = view[os.pwrite(fd, view, len(data) - len(view)) :]
        source = "/dev/null" if input is None else self._files[1]
        line = _RUN.format(command=self._files[0], input=source)
        self._write(line.encode() + self._next_report())

    def _settle(self) -> None:
        """Wait until a SIGINT that came with the end of a command has had its effect."""
        self._interrupted = False
        self._running = ShellCommand(self, "")
        self._write(self._next_report("$__eb_status"))
        self._finish_last()

    def _next_report(self, status: str = "") -> bytes:
        self._number += 1
        self._reported = b""
        self._asked = time.monotonic()
        self._answers = 0
        self._line = _REPORT.format(number=self._number, status=status).encode()
        return self._line

    def _write(self, lines: bytes) -> None:
        with suppress(BrokenPipeError):  # its end is noticed by its pidfd
            os.write(self._control, lines)

    # -- what comes from it --

    def _advance(self, running: ShellCommand, timeout: float | None) -> None:
        """Wait for something to happen to the command, for half a second at most, and note it."""
        with self._lock:
            poll = self._poll() if running is self._running else None
        if poll is not None:
            poll.poll(max(0, _ASK if timeout is None else min(timeout, _ASK)) * 1000)
        with self._lock:
            if running is self._running:
                self._look(running, 0)

    def _poll(self) -> select.poll:
        poll = select.poll()
        for fd in (*self._outputs, self._report, self._pidfd):
            poll.register(fd, select.POLLIN)
        return poll

    def _look(self, running: ShellCommand, timeout: float, patience: float = _ASK) -> None:
        ready = {fd for fd, _ in self._poll().poll(timeout * 1000)}
        for fd, index in list(self._outputs.items()):
            if fd in ready:
                piece = os.read(fd, _PIECE)
                running._pieces[index].append(piece)
                if not piece:  # nobody can write to it any more
                    del self._outputs[fd]
        if self._report in ready:
            self._reported += os.read(self._report, _PIECE)
            self._look_at_report(running)
        if running._result is None and self._pidfd in ready:
            self._take_rest(running)
            self._over(running, self._process.wait())
        if running._result is None and time.monotonic() >= self._asked + patience:
            self._ask(running)

    def _look_at_report(self, running: ShellCommand) -> None:
        _, found, rest = self._reported.partition(b"\0\0%d\0" % self._number)
        fields = rest.split(b"\0")
        if found and len(fields) == 4:  # the last is empty
            self._known = os.fsdecode(fields[1]), fields[2]
            self._take_rest(running)
            running._finish(int(fields[0]), self._known[0], False)
            self._running = None

    def _take_rest(self, running: ShellCommand) -> None:
        """Read what the command has written by now; jobs in the background may write more."""
        for fd, index in list(self._outputs.items()):
            left = _unread(fd)
            while left > 0:
                piece = os.read(fd, left)
                running._pieces[index].append(piece)
                left = left - len(piece) if piece else 0

    def _ask(self, running: ShellCommand) -> None:
        """Send an empty line. A shell that reads it has no report to make, or SIGINT has hit that.

        It is asked for another one then. Given up is one that has none, as after `exec bash`.
        """
        self._asked = time.monotonic()
        if _unread(self._control) > 0:  # the command runs
            self._answers = 0
        elif self._answers > _SILENT:
            self._kill(running)
        else:
            self._write(self._line if self._answers else b"\n")
            self._answers += 1

    def _over(self, running: ShellCommand, returncode: int) -> None:
        running._finish(returncode, self._directory(), True)
        self._running = None
        self._close_shell()

    def _kill(self, running: ShellCommand) -> None:
        self._process.kill()
        self._take_rest(running)
        self._over(running, self._process.wait())

    def _finish_last(self) -> ShellResult | None:
        running = self._running
        while running is not None and running._result is None:
            self._look(running, _ASK)
        return None if running is None else running._result

    # -- the end of a command --

    def _interrupt(self) -> None:
        """Send SIGINT to the shell, which may be in a loop that starts ever new processes."""
        self._interrupted = True
        with suppress(OSError):
            _native.pidfd_send_signal(self._pidfd, signal.SIGINT, 0)

    def _interrupt_command(self, running: ShellCommand) -> None:
        with self._lock:
            if running is self._running:
                self._interrupt()
                self._signal(signal.SIGINT)

    def _signal(self, number: int) -> None:
        # The youngest first, such as the last of a pipeline. If that ended otherwise, because the
        # others have ended, bash would go on with the rest of the command.
        for pid in processes.descendants(self._roots, self._left):
            processes.send(pid, number, self._roots)
            if number != signal.SIGKILL:
                processes.send(pid, signal.SIGCONT, self._roots)

    def _end(self, running: ShellCommand) -> None:
        with self._lock:
            if running is not self._running:
                return
            try:
                self._end_by_steps(running)
            except BaseException:
                if self._running is running:
                    self._kill(running)
                raise

    def _end_by_steps(self, running: ShellCommand) -> None:
        shell = self._process
        for number, seconds in ((signal.SIGINT, _INTERRUPTED), *self._ends.steps):
            begun = now = time.monotonic()
            interrupt = begun
            while now < begun + (_INTERRUPTED if seconds is None else seconds):
                if running._result is None and now >= interrupt:
                    self._interrupt()  # first: bash minds how a process ends that it waits for
                    interrupt = now + _INTERVAL + (now - begun)
                self._signal(number)
                if running._result is None:
                    self._look(running, _LOOK, _LOOK)
                else:
                    time.sleep(_LOOK)
                if shell is not self._process:
                    return  # it has ended
                if running._result is not None and not processes.descendants(
                    self._roots, self._left
                ):
                    return
                now = time.monotonic()
        if running._result is None:
            self._kill(running)

    def _decoders(self) -> list[Any]:
        if self._encoding is None:
            return [None, None]
        make = codecs.getincrementaldecoder(self._encoding)
        return [make(self._errors), make(self._errors)]


def _unread(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])
