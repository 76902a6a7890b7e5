"""Texts of many searches as rows of a few shapes.

Searches that run side by side have texts of other numbers and lengths every time, and a program for
each mix would be compiled again and again.  So a text is a row of its own, whichever search it
belongs to, without what comes after the last token that counts.  Rows of about the same lengths,
and with about as many tokens that count, make a page; there is one program for each shape of a page
(`page_lengths`), however many searches there are, and work for hardly more tokens than there are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grpocem_jax.search.fitness import Texts, predicting

PARTS = 8
"""Lengths of pages between one power of two and the next are by so many parts of it apart, but by 8
at least: more waste less, and are more programs to compile."""


class Row(NamedTuple):
    """A text up to the last token that counts.

    Attributes:
      tokens: int32 ``[n]``, ``n`` at least 2.
      scored: which of them count, bool ``[n]``; not the first.
    """

    tokens: np.ndarray
    scored: np.ndarray


class Page(NamedTuple):
    """Rows in a shape of their own.

    Attributes:
      lane: int32 ``[R]``, the search that each row belongs to; past the last where there is no row.
      texts: see `Texts`, ``K = R``.
    """

    lane: Any
    texts: Texts


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
    end = int(places[-1]) + 1
    return Row(tokens[:end], np.isin(np.arange(end), places))


def padded(length: int, *, parts: int = PARTS) -> int:
    """The length that ``length`` tokens are padded to: 0, 8, ..., 64, 80, ..., 128, 160, ...

    Multiples of 8, and of the ``parts``-th of the next power of two; of 1 part, these themselves.
    """
    step = max(8, (1 << (length - 1).bit_length()) // parts) if length else 8
    return -(-length // step) * step


def page_lengths(row: Row, *, parts: int = PARTS) -> tuple[int, int]:
    """How many states the pages of such a row have, `padded`, and how many of them predict.

    Those are 1, 4, 16, ..., or all.
    """
    states, scored = padded(len(row.tokens) - 1, parts=parts), int(row.scored.sum())
    return states, min(states, 4 ** -(-(scored - 1).bit_length() // 2))


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
        states, most = shapes[left[0]]
        size = max(1, tokens // states)
        fitting = [i for i in left if shapes[i][0] <= states and shapes[i][1] <= most][:size]
        chosen = set(fitting)
        left = [i for i in left if i not in chosen]
        page = _page([rows[i] for i in fitting], size, states, most, empty=lanes)
        found.append((page, fitting))
    return found


def _page(
    rows: Sequence[tuple[int, Row]], size: int, states: int, most: int, *, empty: int
) -> Page:
    """A page of one shape on the host; ``empty`` is the lane of what has no row."""
    lane = np.full(size, empty, np.int32)
    tokens = np.zeros((size, states + 1), np.int32)
    mask, scored = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for place, (own, row) in enumerate(rows):
        length = len(row.tokens)
        lane[place] = own
        tokens[place, :length] = row.tokens
        mask[place, :length] = True
        scored[place, :length] = row.scored
    places = predicting(scored, most) if most < states else None
    return Page(lane, Texts(tokens, mask, scored, places))
