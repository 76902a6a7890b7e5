"""What rules of outcomes share: groups in which a completion may have no reward."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpocem_jax.grpo.advantages import Advantages, equal_rewards
from grpocem_jax.grpo.reading import reads


class Groups(NamedTuple):
    """The rewards of a step, by group.

    Attributes:
      rewards: float32 ``[P, G]``, zero where not present.
      present: bool ``[P, G]``, False where the reward function abstained.
      number: of those present in the group, at least 1; float32 ``[P, 1]``.
      mean: of those present in the group, float32 ``[P, 1]``.
      flat: bool ``[P, 1]``, whether the rewards of the group are equal.
    """

    rewards: jax.Array
    present: jax.Array
    number: jax.Array
    mean: jax.Array
    flat: jax.Array


def group(rewards: ArrayLike) -> Groups:
    """Groups of rewards ``[P, G]``, NaN where abstained."""
    rewards = jnp.asarray(rewards, jnp.float32)
    present = ~jnp.isnan(rewards)
    count = jnp.maximum(jnp.sum(present, -1, keepdims=True), 1).astype(jnp.float32)
    rewards = jnp.where(present, rewards, 0.0)
    mean = jnp.sum(rewards, -1, keepdims=True) / count
    return Groups(rewards, present, count, mean, equal_rewards(rewards, present)[:, None])


def of_outcomes(rule: Callable[[Groups], jax.Array]) -> Advantages:
    """An advantage function from a rule for groups; each token gets its completion's number.

    Args:
      rule: ``(groups) -> [P, G]``, finite. What it gives to a completion without reward is replaced
        by zero.
    """

    @reads()
    @jax.jit
    def advantages(
        rewards: ArrayLike, step_rewards: ArrayLike, tokens: ArrayLike, mask: ArrayLike
    ) -> jax.Array:
        del step_rewards, tokens
        groups = group(rewards)
        found = jnp.where(groups.present, rule(groups), 0.0)
        return jnp.where(mask, found[..., None], 0.0)

    return advantages
