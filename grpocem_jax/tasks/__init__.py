"""The tasks, by name."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from grpocem_jax.errors import InputError
from grpocem_jax.tasks import classification, general, qa, sentiment, summarization
from grpocem_jax.tasks.base import Example, Task
from grpocem_jax.tasks.sources import Loaded, SourceConfig, example_of, load_examples

__all__ = [
    "TASKS",
    "Example",
    "Loaded",
    "SourceConfig",
    "Task",
    "example_of",
    "get",
    "load_examples",
]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        module.TASK.name: module.TASK
        for module in (qa, sentiment, summarization, classification, general)
    }
)


def get(name: str) -> Task:
    """Returns the task of this name.

    Raises:
      InputError: there is none; the message gives the nearest name.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"Unknown task {name!r}: the nearest name is {nearest!r}, and the tasks are "
            f"{', '.join(TASKS)}."
        )
    return TASKS[name]
