"""Token weights: which tokens are trained, and how their losses add up to one number.

A weight rule is ``(key, rollouts) -> (weights, positions)``, see `WeightRule`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.reading import reads
from grpocem_jax.models.sampling import Rollouts
from grpocem_jax.utils.errors import InputError

WeightRule = Callable[[jax.Array, Rollouts], tuple[jax.Array, jax.Array | None]]
"""A weight rule: ``(key, rollouts) -> (weights, positions)``.

- key: a PRNG key, another one in each step.
- rollouts: a whole step's `sampling.Rollouts`: tokens, mask, log-probabilities and entropies, each
  ``[P, G, N]``.

It returns `Batch.weights` and `Batch.positions`; None for the positions computes every token. The
number of positions must not depend on the rollouts. It is called once a step, not inside `jax.jit`.
"""

AGGREGATIONS = ("sequence", "token", "constant")


@functools.partial(jax.jit, static_argnames="aggregation")
def token_weights(mask: jax.Array, aggregation: str = "sequence") -> jax.Array:
    """Weights ``w`` so that ``sum(w * loss_per_token)`` is the aggregated loss of a whole step.

    Computed over the step before it is cut into micro-batches, so that accumulation is exact.

    Args:
      mask: bool ``[P, G, N]``, the tokens that are trained.
      aggregation: ``sequence``: eq. 1, mean over the tokens of a completion, then over completions.
        ``token``: mean over all tokens (DAPO, arXiv 2503.14476). ``constant``: sum over tokens
        divided by the largest length N, then mean over completions (Dr. GRPO, arXiv 2503.20783).

    Returns:
      float32 ``[P, G, N]``, zero off the mask.

    Raises:
      InputError: another ``aggregation``.
    """
    mask = mask.astype(jnp.float32)
    completions = mask.shape[-3] * mask.shape[-2]
    if aggregation == "sequence":
        return mask / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1.0) / completions
    if aggregation == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    if aggregation == "constant":
        return mask / (mask.shape[-1] * completions)
    raise InputError(f"aggregation={aggregation!r}: must be one of {', '.join(AGGREGATIONS)}.")


def aggregate(aggregation: str = "sequence") -> WeightRule:
    """The rule that trains every token a completion has, weighted by `token_weights`.

    Raises:
      InputError: another ``aggregation`` than those of `token_weights`.
    """
    if aggregation not in AGGREGATIONS:
        raise InputError(f"aggregation={aggregation!r}: must be one of {', '.join(AGGREGATIONS)}.")

    @reads()
    def rule(key: jax.Array, rollouts: Rollouts) -> tuple[jax.Array, jax.Array | None]:
        del key
        return token_weights(rollouts.mask, aggregation), None

    return rule


@functools.partial(jax.jit, static_argnames="count")
def select(weights: jax.Array, count: int) -> jax.Array:
    """The positions of the ``count`` largest weights of each completion, ascending.

    Args:
      weights: float32 ``[P, G, N]``, at most ``count`` of a completion above zero.
      count: from 1 to ``N``.

    Returns:
      int32 ``[P, G, count]``, distinct; a completion with fewer weights above zero gets some of its
      other positions too. It is `Batch.positions` of these weights.

    Raises:
      InputError: ``count`` out of range.
    """
    if not 1 <= count <= weights.shape[-1]:
        raise InputError(f"count={count}: must be from 1 to the length {weights.shape[-1]}.")
    _, positions = jax.lax.top_k(weights, count)
    return jnp.sort(positions.astype(jnp.int32), -1)
