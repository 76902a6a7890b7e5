"""Texts of many searches as rows of a few shapes.

Searches that run side by side have texts of other numbers and lengths every time, and a program for
each mix would be compiled again and again.  So a text is a row of its own, whichever search it
belongs to, cut before the first token that counts: what comes before it is needed for its keys and
values alone, and what comes after the last that counts not at all.  Rows of about the same lengths
make a page; there is one program for each shape of a page (`page_lengths`), however many searches
there are, and work for hardly more tokens than there are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grpocem_jax.search.fitness import Rows

PARTS = 8
"""Lengths of pages between one power of two and the next are by so many parts of it apart, but by 8
at least: more waste less, and are more programs to compile."""


class Row(NamedTuple):
    """A text, cut before the first token that counts.

    Attributes:
      context: what comes before but its last token, int32 ``[c]``.
      tokens: its last token, and the others up to the last that counts, int32 ``[s + 1]``.
      scored: which of them but the first count, bool ``[s]``.
    """

    context: np.ndarray
    tokens: np.ndarray
    scored: np.ndarray


class Page(NamedTuple):
    """Rows in a shape of their own.

    Attributes:
      lane: int32 ``[R]``, the search that each row belongs to; past the last where there is no row.
      rows: see `Rows`, ``K = R``.
    """

    lane: Any
    rows: Rows


def cut(tokens: np.ndarray, counts: np.ndarray) -> Row | None:
    """A text as a row.

    Args:
      tokens: int32 ``[n]``.
      counts: which of them count, bool ``[n]``; the first never does.

    Returns:
      the row; None where no token counts.
    """
    places = np.flatnonzero(counts[1:]) + 1
    if not len(places):
        return None
    first, end = int(places[0]), int(places[-1]) + 1
    start = first - 1
    # A context that is shorter than what follows is not worth a program of its own.
    if 2 * _tail(end - first) > padded(start):
        start = 0
    return Row(tokens[:start], tokens[start:end], counts[start + 1 : end])


def padded(length: int, *, parts: int = PARTS) -> int:
    """The length that ``length`` tokens are padded to: 0, 8, ..., 64, 80, ..., 128, 160, ...

    Multiples of 8, and of the ``parts``-th of the next power of two; of 1 part, these themselves.
    """
    step = max(8, (1 << (length - 1).bit_length()) // parts) if length else 8
    return -(-length // step) * step


def _tail(length: int) -> int:
    """The length that what follows a context is padded to: 1, 4, 16, ..."""
    return 4 ** -(-(length - 1).bit_length() // 2)


def page_lengths(row: Row, *, parts: int = PARTS) -> tuple[int, int]:
    """``C`` and ``S`` of the pages of such a row, see `padded`."""
    context, tail = len(row.context), len(row.scored)
    return padded(context, parts=parts), _tail(tail) if context else padded(tail, parts=parts)


def lay_out(
    rows: Sequence[tuple[int, Row]], *, lanes: int, tokens: int, parts: int = PARTS
) -> list[tuple[Page, list[int]]]:
    """Lays rows out in pages.

    The longest come first, and a page is filled up with the next that fit into it, so that only the
    last has room left.

    Args:
      rows: the lane and the row of each.
      lanes: how many lanes there are.
      tokens: about so many in a page.
      parts: as in `padded`.

    Returns:
      pages of arrays on the host, and which of ``rows`` each holds.
    """
    shapes = [page_lengths(row, parts=parts) for _, row in rows]
    left = sorted(range(len(rows)), key=lambda i: shapes[i][::-1], reverse=True)
    found = []
    while left:
        context, tail = shapes[left[0]]
        size = max(1, tokens // (context + tail))
        fitting = [i for i in left if shapes[i][0] <= context and shapes[i][1] <= tail][:size]
        chosen = set(fitting)
        left = [i for i in left if i not in chosen]
        page = empty_page(context, tail, lanes=lanes, tokens=tokens)
        for place, i in enumerate(fitting):
            _write(page, place, *rows[i])
        found.append((page, fitting))
    return found


def empty_page(context: int, tail: int, *, lanes: int, tokens: int) -> Page:
    """A page of one shape without a row in it."""
    size = max(1, tokens // (context + tail))
    return Page(
        np.full(size, lanes, np.int32),
        Rows(
            np.zeros((size, context), np.int32),
            np.zeros((size, context), bool),
            np.zeros((size, tail + 1), np.int32),
            np.zeros((size, tail), bool),
            np.zeros((size, tail), bool),
        ),
    )


def _write(page: Page, place: int, lane: int, row: Row) -> None:
    """Writes a row into a page on the host."""
    before, after = len(row.context), len(row.scored)
    start = page.rows.context.shape[1] - before
    page.lane[place] = lane
    page.rows.context[place, start:] = row.context
    page.rows.before[place, start:] = True
    page.rows.tokens[place, : after + 1] = row.tokens
    page.rows.mask[place, :after] = True
    page.rows.scored[place, :after] = row.scored
