"""Names of settings: in messages of the library, and in earlier versions."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from grpocem_jax.utils.errors import InputError

RENAMED = {
    "grpo.advantage": "grpo.advantages",
    "grpo.aggregation": "grpo.weights",
    "cem.learning_rate": "gradient.learning_rate",
    **{
        f"cem.{name}": f"search.{name}"
        for name in (
            "method options fitness task support samples space experts rank per_site generations "
            "returned gate gate_z budget_s population_chunk fit_memory buckets"
        ).split()
    },
}
"""Fields by their former names."""

REMOVED = {
    "cem.warm_start": False,
    "cem.mirrored": False,
    "cem.evaluate_mean": False,
    "cem.anchor": 0.0,
    "cem.common_random_numbers": True,
    "cem.held_back": 0.3,
    "search.held_back": 0.3,
}
"""Settings of earlier versions, with the value that was their default: configs of theirs, such as
those stored in run directories, still load."""


def rename(name: str) -> str:
    """What to say of a field's former name."""
    return f"is called {RENAMED[name]} now, with the same values; rename it."


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote, under the names that this one has.

    Args:
      settings: as config.json has them.
    """
    found = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
    }
    for old, new in RENAMED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        fields = found.get(section)
        if not isinstance(fields, dict) or name not in fields:
            continue
        target = found.setdefault(new_section, {})
        if isinstance(target, dict):
            target.setdefault(new_name, fields.pop(name))
    return found


def check_removed(path: str, value: Any) -> None:
    """Refuses a field of `REMOVED` that has another value than its default.

    Raises:
      InputError: it has.
    """
    if value != REMOVED[path]:
        raise InputError(
            f"config.{path}={value!r}: this setting was removed, as it was measured to bring "
            "nothing (studies/adaptation.md); leave it out, or start from a config without it."
        )


@contextlib.contextmanager
def section(name: str, record: type) -> Iterator[None]:
    """Names the section of the config in errors that name an argument: ``config.search.rank=0``.

    Args:
      name: of the section.
      record: whose fields the arguments are.

    Raises:
      InputError: one of the library, from inside the block.
    """
    try:
        yield
    except InputError as error:
        names = "|".join(field.name for field in dataclasses.fields(record))
        message = re.sub(
            rf"(?<![\w./'\"])((?:{names})(?==)|options(?=\.\w))", rf"config.{name}.\1", str(error)
        )
        raise InputError(message) from error
