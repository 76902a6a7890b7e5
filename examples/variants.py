"""Variants of GRPO from the literature, each a function named in a config.

    python train.py --config configs/tiny.py --config.grpo.objective=examples.variants:dapo \\
        --config.grpo.weights=token
    python train.py --config configs/tiny.py --config.grpo.objective=examples.variants:gspo
    python train.py --config configs/tiny.py --config.grpo.advantages=examples.variants:t_spmo
    python train.py --config configs/tiny.py --config.grpo.weights=examples.variants:s_grpo
    python train.py --config configs/tiny.py --config.train.optimizer=optax:lion \\
        --config.train.learning_rate=2e-3
"""

import jax
import jax.numpy as jnp
import numpy as np

import grpocem_jax as gj


def dapo(low=0.2, high=0.28):
    """DAPO's clip-higher (arXiv 2503.14476): good tokens that are improbable have more room."""
    return gj.clipped(low=low, high=high)


def gspo(low=3e-4, high=4e-4):
    """GSPO (arXiv 2507.18071): one ratio for a sequence, the geometric mean of its tokens'."""
    return gj.clipped(low=low, high=high, ratio="sequence")


def t_spmo():
    """T-SPMO (arXiv 2504.20834): what a token adds to the reward expected of the prefix before it.

    The expectation is the mean reward of the group's completions that begin with the prefix.
    """

    def advantages(rewards, step_rewards, tokens, mask):
        judged = ~np.isnan(rewards)
        # Completions are equal up to and including a token; [P, G, G, N].
        equal = (tokens[:, :, None] == tokens[:, None]) & mask[:, :, None] & mask[:, None]
        equal = np.logical_and.accumulate(equal, -1) & judged[:, None, :, None]
        value = np.where(judged, rewards, 0)[:, None, :, None]
        with_token = (equal * value).sum(2) / np.maximum(equal.sum(2), 1)
        mean = (value[:, 0].sum(1) / np.maximum(judged.sum(1), 1)[:, None])[:, None]
        prefix = np.concatenate(
            [np.broadcast_to(mean, (*mask.shape[:2], 1)), with_token[..., :-1]], -1
        )
        trained = mask & judged[..., None]
        return np.where(trained, with_token - prefix, 0).astype(np.float32)

    return advantages


def s_grpo(count=8):
    """Stochastic GRPO (arXiv 2504.20834): at most ``count`` random tokens of each completion.

    The head of the model is not computed for the others.
    """

    def weights(key, rollouts):
        chance = jnp.where(rollouts.mask, jax.random.uniform(key, rollouts.mask.shape), -1.0)
        k = min(count, chance.shape[-1])
        least = jax.lax.top_k(chance, k)[0][..., -1:]
        drawn = gj.token_weights(rollouts.mask & (chance >= least))
        return drawn, gj.grpo.select(drawn, k)

    return weights
