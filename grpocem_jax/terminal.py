"""Text from outside on a terminal: its control characters are shown, not obeyed."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def one_line(text: str) -> str:
    """Text with control characters as escapes, so that it takes one line and moves no cursor.

    Escape sequences, C1 controls, changes of the writing direction and halves of surrogate pairs
    are among them.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def visible(text: str) -> str:
    """`one_line` of each line: what a person reads, with names and texts from outside in it."""
    return "\n".join(map(one_line, text.split("\n")))


@contextlib.contextmanager
def unread(file: TextIO) -> Iterator[None]:
    """Lets a run go on unseen where nobody reads any more what the block writes to a file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, a terminal that is gone
            raise
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())


def in_notebook() -> bool:
    """Whether a notebook shows the output, which has what is on standard error in red blocks."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})


def messages() -> TextIO:
    """Where progress goes: standard error, and standard output in a notebook."""
    return sys.stdout if in_notebook() else sys.stderr


def say(text: str, file: TextIO | None = None) -> None:
    """Prints `visible` text at once, on standard output or ``file``; see `unread`."""
    file = file or sys.stdout
    if file is sys.stderr:
        file = messages()
    with unread(file):
        print(visible(text), file=file, flush=True)
