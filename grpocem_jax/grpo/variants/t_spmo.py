"""T-SPMO (Lee and Tong 2025, arXiv 2504.20834): what each token adds to the reward of its prefix.

The completions of a group form a tree.  For each of its edges, a prefix ``p`` and the token ``v``
after it,

    A(v | p) = mean reward of the completions that begin with p v
             - mean reward of those that begin with p.

The loss is the mean over the different edges, whatever the number of completions that go through
one; with several prompts, the mean over these, which is ours.  The paper adds an L2 penalty on what
is trained, for which weight decay stands here, and takes one update a batch: `policy_gradient`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpocem_jax.grpo.advantages import Advantages, equal_rewards
from grpocem_jax.grpo.reading import reads
from grpocem_jax.grpo.weights import WeightRule
from grpocem_jax.models.sampling import Rollouts


def shared_prefixes(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Which completions of a group go through the same edge.

    Args:
      tokens: int32 ``[P, G, N]``.
      mask: bool ``[P, G, N]``.

    Returns:
      bool ``[P, G, G, N]``: at ``[p, i, j, t]`` whether completions ``i`` and ``j`` of the prompt
      are equal up to and including token ``t``.
    """
    equal = (tokens[:, :, None] == tokens[:, None]) & mask[:, :, None] & mask[:, None]
    return jnp.cumprod(equal, -1).astype(bool)


def prefix_advantages() -> Advantages:
    """``A(v | p)`` of each token after its prefix; of outcomes, as in `Advantages`."""

    @reads("tokens")
    @jax.jit
    def advantages(
        rewards: ArrayLike, step_rewards: ArrayLike, tokens: ArrayLike, mask: ArrayLike
    ) -> jax.Array:
        del step_rewards
        rewards, mask = jnp.asarray(rewards, jnp.float32), jnp.asarray(mask)
        judged = ~jnp.isnan(rewards)
        value = jnp.where(judged, rewards, 0.0)[:, None, :, None]
        through = shared_prefixes(jnp.asarray(tokens), mask) & judged[:, None, :, None]
        # The empty prefix is that of all completions.
        whole = jnp.broadcast_to(judged[:, None, :, None], (*through.shape[:3], 1))
        through = jnp.concatenate([whole, through], -1)
        mean = jnp.sum(through * value, 2) / jnp.maximum(jnp.sum(through, 2), 1)
        trained = mask & (judged & ~equal_rewards(rewards, judged)[:, None])[..., None]
        return jnp.where(trained, jnp.diff(mean, axis=-1), 0.0)

    return advantages


def prefix_weights() -> WeightRule:
    """The mean over the edges of a prompt's tree, then over prompts."""

    @jax.jit
    def weights(mask: jax.Array, tokens: jax.Array) -> jax.Array:
        through = jnp.sum(shared_prefixes(tokens, mask), 2)
        share = jnp.where(mask, 1.0 / jnp.maximum(through, 1), 0.0)
        edges = jnp.sum(share, (1, 2), keepdims=True)
        return share / jnp.maximum(edges, 1.0) / len(mask)

    @reads("tokens")
    def rule(key: jax.Array, rollouts: Rollouts) -> tuple[jax.Array, jax.Array | None]:
        del key
        return weights(rollouts.mask, rollouts.tokens), None

    return rule
