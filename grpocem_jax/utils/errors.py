"""The one exception that users are meant to read."""

from grpocem_jax.utils.terminal import one_line


class InputError(ValueError):
    """Input from outside is wrong: a config value, a file, a checkpoint, a prompt.

    The message is one sentence that names the field, its value and the fix, on one line: control
    characters of names and values in it are shown as escapes.  Commands print it without a
    traceback and exit with status 2.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))
