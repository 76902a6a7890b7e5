"""The unlikeliness reward (He et al. 2025, arXiv 2506.02355)."""

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.reading import reads
from grpocem_jax.grpo.shaping import Shaping
from grpocem_jax.utils.settings import number, within


def unlikeliness(strength: float = 0.25) -> Shaping:
    """Takes from the reward of what the policy was likely to say anyway.

    ``r_i (1 - strength rank_i / G)``, where ``rank`` counts the completions of the group that were
    less likely: 0 of the least likely.  A reward below zero stays as it is, which is ours: the
    paper's are 0 and 1.

    Args:
      strength: from 0, which changes nothing, to 1.

    Raises:
      InputError: ``strength`` outside its range.
    """
    strength = number("strength", strength, within(0, 1))

    @reads("logps")
    @jax.jit
    def shaping(rewards: jax.Array, logps: jax.Array, mask: jax.Array) -> jax.Array:
        likelihood = jnp.sum(jnp.where(mask, logps, 0.0), -1)
        likelihood = jnp.where(jnp.isnan(rewards), jnp.inf, likelihood)
        rank = jnp.sum(likelihood[..., None, :] < likelihood[..., :, None], -1)
        count = jnp.maximum(jnp.sum(~jnp.isnan(rewards), -1, keepdims=True), 1)
        return rewards - strength * rank / count * jnp.maximum(rewards, 0.0)

    return shaping
