"""S-GRPO (Lee and Tong 2025, arXiv 2504.20834): the gradient of a sample of the tokens."""

import functools

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.reading import reads
from grpocem_jax.grpo.weights import WeightRule, select, token_weights
from grpocem_jax.models.sampling import Rollouts
from grpocem_jax.utils.settings import number, whole, within


def s_grpo(alpha: int = 4, probability: float = 0.5, k: int = 16) -> WeightRule:
    """The first ``alpha`` tokens of a completion, then each with a probability, up to ``k`` in all.

    The tokens that are drawn count as eq. 1's do, the mean over those of a completion; the head of
    the model is computed for ``k`` tokens of each completion and no others.  With ``probability`` 1
    and ``k`` of the largest length it is GRPO.  The paper's ratio is `policy_gradient`.

    Args:
      alpha: at least 0.
      probability: of a later token, from 0 to 1.
      k: at least 1 and at least ``alpha``.

    Raises:
      InputError: a value outside its range.
    """
    alpha = whole("alpha", alpha, 0)
    k = whole("k", k, max(1, alpha))
    probability = number("probability", probability, within(0, 1))

    @functools.partial(jax.jit, static_argnames="count")
    def draw(key: jax.Array, mask: jax.Array, *, count: int) -> jax.Array:
        chance = jax.random.uniform(key, mask.shape)
        first = jnp.broadcast_to(jnp.arange(mask.shape[-1]) < alpha, mask.shape)
        drawn = mask & (first | (chance < probability))
        return token_weights(drawn & (jnp.cumsum(drawn, -1) <= count))

    @reads()
    def rule(key: jax.Array, rollouts: Rollouts) -> tuple[jax.Array, jax.Array | None]:
        count = min(k, rollouts.mask.shape[-1])
        weights = draw(key, rollouts.mask, count=count)
        return weights, select(weights, count)

    return rule
