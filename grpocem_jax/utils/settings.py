"""Settings as fields of dataclasses: range and default stand where the field is declared.

A record of settings may be a section of a config and an object of its own: `check` holds both to
the same ranges.  What a field means is said in its metadata, or in its record's docstring.
"""

import dataclasses
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError

MOST = 1_000_000
"""Of candidates, completions and generations, for which memory is taken all at once."""


class Range(NamedTuple):
    """What a setting may be.

    Attributes:
      text: completes the sentence "must be ...".
      holds: whether a value of the right type is in it.
    """

    text: str
    holds: Callable[[Any], bool]


def above(low: float) -> Range:
    """Numbers above a bound."""
    return Range(f"above {low}", lambda x: x > low)


def at_least(low: float) -> Range:
    """Numbers from a bound on."""
    return Range(f"at least {low}", lambda x: x >= low)


def within(low: float, high: float) -> Range:
    """Numbers between two bounds, which belong to it."""
    return Range(f"from {low} to {high}", lambda x: low <= x <= high)


def count(low: int) -> Range:
    """Numbers of things, from ``low`` to `MOST`."""
    return Range(f"at least {low} and at most {MOST}", lambda x: low <= x <= MOST)


def below(low: float, high: float) -> Range:
    """Numbers from a bound to another, which does not belong to it."""
    return Range(f"from {low} to below {high}", lambda x: low <= x < high)


def share() -> Range:
    """Shares, (0, 1]."""
    return Range("above 0 and at most 1", lambda x: 0 < x <= 1)


def one_of(*values: Any) -> Range:
    """Some values."""
    return Range(f"one of {', '.join(map(repr, values))}", lambda x: x in values)


def one_of_or_function(*values: str) -> Range:
    """Some names, or a function of the user's own."""
    return Range(
        f"one of {', '.join(map(repr, values))}, or package.module:function",
        lambda x: x in values or user_code.is_reference(x),
    )


def ascending(low: int) -> Range:
    """Tuples of numbers from ``low`` on, each larger than the one before."""
    return Range(
        f"at least one number, each at least {low}, ascending",
        lambda x: len(x) > 0 and x[0] >= low and list(x) == sorted(set(x)),
    )


def distinct(*values: str) -> Range:
    """Tuples of some values, each at most once."""
    return Range(
        f"some of {', '.join(map(repr, values))}, each once",
        lambda x: set(x) <= set(values) and len(set(x)) == len(x),
    )


NOT_EMPTY = Range("not empty", lambda x: len(x) > 0)
NAMES = Range("not empty, each name once", lambda x: 0 < len(set(x)) == len(x))


def setting(
    doc: str = "",
    allowed: Range | None = None,
    *,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    alters: str = "training",
    hash: bool | None = None,
) -> Any:
    """A field of a record of settings.

    Args:
      doc: what it means; "" where the record's docstring says it.
      allowed: its range; None for any value of its type.
      default: as of `dataclasses.field`.
      default_factory: as of `dataclasses.field`.
      alters: "training" where another value trains something else, so that a run cannot be
        continued with it; "length" where it says how long a run is; "nothing".
      hash: as of `dataclasses.field`.
    """
    metadata = {"range": allowed, "doc": doc, "alters": alters}
    return dataclasses.field(
        default=default, default_factory=default_factory, hash=hash, metadata=metadata
    )


def options(doc: str) -> Any:
    """A field with keywords for a function, empty by default."""
    return setting(doc, default_factory=dict, hash=False)


def number(name: str, value: Any, allowed: Range) -> float:
    """A number as a float, also where it is one of NumPy's.

    Raises:
      InputError: it is no number, or out of its range; the message names it ``name``.
    """
    return float(_held(name, value, allowed, float))


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number from ``least`` on as an int, also where it is one of NumPy's.

    Raises:
      InputError: as `number`.
    """
    return int(_held(name, value, at_least(least), int))


NUMBERS = {int: ("a whole number", numbers.Integral), float: ("a number", numbers.Real)}
"""What a type of a field is called, and all that is taken for one."""


def _held(name: str, value: Any, allowed: Range, kind: Any) -> Any:
    """A value that is of the kind and in the range; numbers as Python's own."""
    called, taken = NUMBERS.get(kind, ("", object))
    if called and (isinstance(value, bool) or not isinstance(value, taken)):
        raise InputError(f"{name}={value!r}: must be {called}, {allowed.text}.")
    if not allowed.holds(value):
        raise InputError(f"{name}={value!r}: must be {allowed.text}.")
    return kind(value) if called else value


def check(record: Any) -> None:
    """Holds the fields of a frozen record to their types, where these are numbers, and ranges.

    Numbers of NumPy become Python's own.

    Raises:
      InputError: the first that is not of its type or out of its range.
    """
    for field in dataclasses.fields(record):
        allowed, value = field.metadata.get("range"), getattr(record, field.name)
        united = isinstance(field.type, types.UnionType)
        kinds = typing.get_args(field.type) if united else (field.type,)
        if allowed is not None and not (value is None and type(None) in kinds):
            object.__setattr__(record, field.name, _held(field.name, value, allowed, kinds[0]))
