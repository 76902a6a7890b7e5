"""The one exception that users are meant to read."""


class InputError(ValueError):
    """Input from outside is wrong: a config value, a file, a checkpoint, a prompt.

    The message is one sentence that names the field, its value and the fix.  Commands print it
    without a traceback and exit with status 2.
    """
