"""errand-boy's own exceptions, where the standard library has none."""


class ErrandBoyError(Exception):
    """The base class of errand-boy's own exceptions."""


class HelperError(ErrandBoyError, OSError):
    """The helper could not be started, or failed; no command was started."""


class HelperDiedError(HelperError):
    """The helper ended while it was starting a command, or while it owned a live one.

    The command may have been started. It is never started twice.
    """


class ProtocolError(ErrandBoyError, OSError):
    """The other side violated the protocol, or refused a frame."""


class RefusedError(ProtocolError, PermissionError):
    """The daemon does not serve this client, or belongs to another user; the message says why."""


class NoDaemonError(ErrandBoyError, ConnectionError):
    """No daemon listens at `filename`; `errno` is that of the attempt to reach it."""

    def __str__(self) -> str:
        if self.filename is None:
            return super().__str__()
        return f"{self.filename}: {self.strerror}"


class JobError(ErrandBoyError, OSError):
    """The daemon refused a request about a job; the message says why."""


class NoJobError(JobError, LookupError):
    """This user has no job with that name or number."""


class JobLostError(HelperDiedError):
    """A job's keeper was killed or the machine went down, so its exit status is lost."""


class SessionClosedError(ErrandBoyError):
    """A session of the classic interface was used after it was closed."""


class NotServedError(Exception):
    """Internal: a helper ended before it read a request, so another helper may get it."""
