"""The project's own exceptions; where the standard library has one, that is raised instead."""


class ErrandBoyError(Exception):
    """Base of all of errand-boy's own exceptions."""


class HelperError(ErrandBoyError, OSError):
    """The helper could not be started or did not do what it was asked; no command was started."""


class HelperDiedError(HelperError):
    """The helper ended while it was starting a command, or while it owned a live one.

    The command may or may not have been started; it was not, and will not be, started twice.
    """


class ProtocolError(ErrandBoyError, OSError):
    """The other side sent something that is not the protocol, or refused what was sent."""


class RefusedError(ProtocolError, PermissionError):
    """The daemon does not serve this client, or is somebody else's; the message has the reason."""


class NoDaemonError(ErrandBoyError, ConnectionError):
    """No daemon listens where it was expected; the cause is the OSError of the attempt."""


class JobError(ErrandBoyError, OSError):
    """The daemon does not do what it was asked to do with a job; the message has the reason."""


class NoJobError(JobError, LookupError):
    """There is no job of this name or number, or none of this user's."""


class JobLostError(HelperDiedError):
    """A job's keeper was killed, or the machine went down: nobody knows how the job ended."""


class SessionClosedError(ErrandBoyError):
    """A session of the classic interface was used after its end."""


class NotServedError(Exception):
    """Internal: a helper has gone without having read a request, which another may be sent."""
