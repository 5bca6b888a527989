"""The one exception that means: the input is wrong and the person can mend it."""


class InputError(ValueError):
    """Bad configuration, flag or file. The message is one line: what, expected, what to do.

    The commands print it without a traceback and exit with code 1 (`ppflow_jax.cli`).
    """
