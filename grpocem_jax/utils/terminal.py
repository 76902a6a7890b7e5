"""Text from outside on a terminal: its control characters are shown, not obeyed."""

import contextlib
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


def encodable(text: str, file: TextIO | None) -> str:
    """Text as it is, or in ASCII with escapes where a file's encoding lacks some of it."""
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except (LookupError, UnicodeError):  # a LookupError of an encoding that Python does not know
        return text.encode("ascii", "backslashreplace").decode()
    return text


@contextlib.contextmanager
def unread(file: TextIO) -> Iterator[None]:
    """Lets a run go on unseen where what the block writes to a file cannot be written any more.

    A pipe may be closed, a terminal gone, the disk of a log full: what a run shows on its way is
    not worth its work.
    """
    try:
        yield
    except (OSError, ValueError):  # a ValueError of a file that was closed
        abandon(file)


def abandon(file: TextIO) -> None:
    """Sends what is still to be written to a file, and what will be, nowhere."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
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
        _print(text, file)


def show(text: str) -> None:
    """Prints a result, `visible`, on standard output.

    Raises:
      OSError: nobody reads it any more, or it cannot be written.
    """
    _print(text, sys.stdout)


def _print(text: str, file: TextIO | None) -> None:
    print(encodable(visible(text), file), file=file, flush=True)
