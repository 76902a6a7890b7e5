"""Language models behind one interface, and the compiled programs over any of them.

The architectures are the only code that imports Flax, and are imported when a model is loaded.
"""

from grpocem_jax.models.base import (
    Context,
    KeyValues,
    Model,
    Params,
    attend,
    cast_params,
    dense,
)
from grpocem_jax.models.likelihood import completion_logps, token_logps
from grpocem_jax.models.sampling import Rollouts, sample

__all__ = [
    "Context",
    "KeyValues",
    "Model",
    "Params",
    "Rollouts",
    "attend",
    "cast_params",
    "completion_logps",
    "dense",
    "sample",
    "token_logps",
]
