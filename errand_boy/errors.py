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
