"""The exceptions that speak to the person at the keyboard: one line, no traceback. See cli.py."""


class InputError(ValueError):
    """Bad configuration, flag or file. The message says what, what was expected, what to do."""


class RunError(RuntimeError):
    """A run that cannot continue, as after a loss that is not finite; it says what is kept."""


class Stopped(RuntimeError):
    """A run that was asked to stop and has saved everything: the same command continues."""
