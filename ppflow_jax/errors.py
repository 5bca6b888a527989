"""The exceptions that speak to the person at the keyboard: one line, no traceback, exit code 1."""


class InputError(ValueError):
    """Bad configuration, flag or file. The message says what, what was expected, what to do."""


class RunError(RuntimeError):
    """A run that cannot go on, such as a loss that is not finite. The message says what is kept."""
