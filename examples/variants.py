"""Variants of GRPO, each a function named in a config; docs/methods.md has those of the package.

    python train.py --config configs/tiny.py --config.grpo.objective=examples.variants:dapo \\
        --config.grpo.weights=token
    python train.py --config configs/tiny.py --config.grpo.objective=examples.variants:gspo
    python train.py --config configs/tiny.py --config.grpo.advantages=examples.variants:discounted
    python train.py --config configs/tiny.py --config.grpo.weights=examples.variants:high_entropy
    python train.py --config configs/tiny.py --config.train.optimizer=optax:lion \\
        --config.train.learning_rate=2e-3
"""

import jax.numpy as jnp

import grpocem_jax as gj


def dapo(low=0.2, high=0.28):
    """DAPO's clip-higher (arXiv 2503.14476): good tokens that are improbable have more room."""
    return gj.clipped(low=low, high=high)


def gspo(low=3e-4, high=4e-4):
    """GSPO (arXiv 2507.18071): one ratio for a sequence, the geometric mean of its tokens'."""
    return gj.clipped(low=low, high=high, ratio="sequence")


def discounted(gamma=0.95):
    """The last token has all of the reward, one before it ``gamma`` for each token between."""

    def advantages(rewards, step_rewards, tokens, mask):
        whole = gj.grpo.group_advantages(rewards, step_rewards, tokens, mask)
        to_come = jnp.sum(mask, -1, keepdims=True) - jnp.cumsum(mask, -1)
        return jnp.where(mask, whole * gamma**to_come, 0.0)

    return advantages


def high_entropy(share=0.2):
    """Only the tokens at which the policy is least certain (arXiv 2506.01939, which takes 20%).

    The head of the model is not computed for the others.
    """

    def weights(key, rollouts):
        count = max(1, round(share * rollouts.mask.shape[-1]))
        doubt = jnp.where(rollouts.mask, rollouts.entropies, -1.0)
        least = jnp.sort(doubt, -1)[..., -count, None]
        chosen = gj.token_weights(rollouts.mask & (doubt >= least))
        # Where some are equal there may be more than the number computed.
        positions = gj.grpo.select(chosen, count)
        kept = jnp.put_along_axis(jnp.zeros_like(rollouts.mask), positions, True, -1, inplace=False)
        return gj.token_weights(rollouts.mask & (doubt >= least) & kept), positions

    return weights
