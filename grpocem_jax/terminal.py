"""Text from outside on a terminal: its control characters are shown, not obeyed."""


def one_line(text: str) -> str:
    """Text with control characters as escapes, so that it takes one line and moves no cursor.

    Escape sequences, C1 controls, changes of the writing direction and halves of surrogate pairs
    are among them.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def visible(text: str) -> str:
    """`one_line` of each line: what a person reads, with names and texts from outside in it."""
    return "\n".join(map(one_line, text.split("\n")))
