"""Bodies of requests: JSON that is read field by field, each of a type and a range."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from grpocem_jax.serving.errors import ApiError, brief

MOST_LEVELS = 32
"""Of lists and objects inside each other in a body."""


def read_json(content: bytes) -> dict[str, Any]:
    """A body as a JSON object.

    Raises:
      ApiError: something else, such as text that is cut off, NaN, or too many levels.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start}); send JSON.") from None
    except RecursionError:
        raise ApiError(400, _too_deep()) from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error}); send a JSON object.") from None
    if isinstance(value, dict | list):
        _check_depth(value)
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {brief(value)}; send a JSON object.")
    return value


def _too_deep() -> str:
    return f"the body has more than {MOST_LEVELS} levels of lists and objects; send fewer."


def _check_depth(value: dict[str, Any] | list[Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ApiError(400, _too_deep())


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """The fields of an object, each read once; what nobody reads is refused by `finish`.

    A field that is null is one that is not there.

    Args:
      values: the object.
      where: what stands before the names in messages, such as ``messages[0].``.
    """

    def __init__(self, values: dict[str, Any], where: str = ""):
        self._values = dict(values)
        self._where = where

    def take(self, name: str) -> Any:
        """The value of a field, None where there is none."""
        return self._values.pop(name, None)

    def refuse(self, name: str, value: Any, must: str, *, code: str | None = None) -> ApiError:
        """The error for a field: ``must`` completes the sentence "must be ..."."""
        return ApiError(
            400,
            f"{self._where}{name}={brief(value)}: must be {must}.",
            param=f"{self._where}{name}",
            code=code,
        )

    def missing(self, name: str, fix: str) -> ApiError:
        """The error for a field that has to be there."""
        return ApiError(
            400, f"{self._where}{name} is missing; {fix}.", param=f"{self._where}{name}"
        )

    def string(self, name: str, *, most: int) -> str | None:
        """A string of 1 to ``most`` characters, without halves of surrogate pairs."""
        value = self.take(name)
        if value is not None and not is_text(value, most):
            raise self.refuse(name, value, f"a string of 1 to {most} characters")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number in a range."""
        value = self.take(name)
        if value is not None and not (is_integer(value) and low <= value <= high):
            raise self.refuse(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, holds: Callable[[float], bool], must: str) -> float | None:
        """A finite number in a range."""
        value = self.take(name)
        if value is None:
            return None
        if is_integer(value) and abs(value) < 2**53:
            value = float(value)
        if not isinstance(value, float) or not math.isfinite(value) or not holds(value):
            raise self.refuse(name, value, must)
        return value

    def boolean(self, name: str) -> bool:
        """True or false, by default false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, values: Sequence[str]) -> str | None:
        """One of some strings."""
        value = self.take(name)
        if value is not None and value not in values:
            raise self.refuse(name, value, f"one of {', '.join(values)}")
        return value

    def neutral(self, name: str, values: Sequence[Any]) -> None:
        """A field of OpenAI's interface that changes nothing here, so has to be neutral."""
        value = self.take(name)
        if value is not None and not any(value == x and type(value) is type(x) for x in values):
            raise ApiError(
                400,
                f"{self._where}{name}={brief(value)}: this server does not have it; leave it out.",
                param=f"{self._where}{name}",
                code="unsupported_parameter",
            )

    def finish(self) -> None:
        """Refuses fields that were not read."""
        for name in self._values:
            shown = brief(name)
            raise ApiError(
                400,
                f"{self._where}{shown}: there is no such field; leave it out.",
                param=f"{self._where}{name}"[:80].encode("ascii", "backslashreplace").decode(),
                code="unknown_parameter",
            )


def is_integer(value: Any) -> bool:
    """Whether a value of JSON is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any, most: int) -> bool:
    """Whether a value is a string of 1 to ``most`` characters that UTF-8 has."""
    if not isinstance(value, str) or not 0 < len(value) <= most:
        return False
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
