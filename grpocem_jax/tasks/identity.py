"""What tells the values of two data sets apart: text that depends on values alone."""

from typing import Any

from grpocem_jax.utils.errors import InputError

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 200


def identity(value: Any) -> str:
    """A text that is equal for equal values, also in another process.

    Of numbers, strings and their lists, tuples and dicts it is what ``repr`` gives.  Arrays count
    by type, shape and contents; other objects, such as dates and images, by what pickling would
    keep of them, and never by where they lie in memory.

    Args:
      value: anything that a column can hold.

    Raises:
      InputError: an object that cannot be pickled, or that contains itself.
    """
    return _identity(value, 0)


def _identity(value: Any, depth: int) -> str:
    if depth > _DEEPEST:
        raise InputError(
            f"a column holds a {type(value).__name__} inside {_DEEPEST} others, so that runs "
            "cannot be told apart by it; leave the column out of the data set."
        )

    def inner(part: Any) -> str:
        return _identity(part, depth + 1)

    kind = type(value)
    if kind in _PLAIN:
        return repr(value)
    if kind is list:
        return f"[{', '.join(map(inner, value))}]"
    if kind is tuple:
        return f"({', '.join(map(inner, value))}{',' if len(value) == 1 else ''})"
    if kind is dict:
        return f"{{{', '.join(f'{inner(key)}: {inner(part)}' for key, part in value.items())}}}"
    if kind in (set, frozenset):
        return f"{kind.__name__}({', '.join(sorted(map(inner, value)))})"
    if isinstance(value, type) or (hasattr(value, "__qualname__") and callable(value)):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    if hasattr(value, "__array__"):
        import numpy as np

        array = np.asarray(value)
        content = array.tolist() if array.dtype.hasobject else array.tobytes()
        return f"{_name(kind)}({array.dtype.str}, {array.shape}, {inner(content)})"
    try:
        reduced = value.__reduce_ex__(2)
    except Exception as error:  # whatever the object's own code may raise
        raise InputError(
            f"a column holds a {_name(kind)}, whose values cannot be read ({error}), so that runs "
            "cannot be told apart by it; leave the column out of the data set."
        ) from None
    if isinstance(reduced, str):
        return f"{_name(kind)}.{reduced}"
    parts = [list(part) if hasattr(part, "__next__") else part for part in reduced]
    return f"{_name(kind)}{inner(tuple(parts))}"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
