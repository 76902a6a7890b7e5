"""BNPO (Xiao et al. 2025, arXiv 2506.02864): rewards normalised by a Beta distribution."""

import jax
import jax.numpy as jnp
from jax.scipy.stats import beta

from grpocem_jax.grpo.advantages import Advantages
from grpocem_jax.grpo.variants.outcomes import Groups, of_outcomes

LEAST = 0.1
"""Of the density, so that no advantage is more than ten times what it is without."""
LARGEST = 1e3
"""Of ``a + b``, where the groups' means are nearly equal."""


def bnpo() -> Advantages:
    """The reward minus its group's mean, over the density of a Beta distribution at that mean.

    With rewards mapped to ``[0, 1]`` and ``p`` the mean of a group, Beta(a, b) has the mean and the
    variance of ``p`` over the step's groups, and

        A_i = (r_i - p) / f(p; alpha, beta),   alpha = max(1, 1 + a/3),  beta = max(1, 1 + b/3).

    Where the variance is as large as it can be, ``a = b = 0`` and this is `centred`.  The paper's
    rewards are 0 and 1; that others are mapped by the least and the largest of the step, and the
    bounds `LEAST` and `LARGEST`, are ours: where the means of most groups are close together, the
    density at that of another one is next to nothing, and its advantages would drown all others.
    """

    def rule(groups: Groups) -> jax.Array:
        low = jnp.min(jnp.where(groups.present, groups.rewards, jnp.inf))
        high = jnp.max(jnp.where(groups.present, groups.rewards, -jnp.inf))
        span = jnp.where(high > low, high - low, 1.0)
        unit = jnp.where(groups.present, (groups.rewards - low) / span, 0.0)
        p = jnp.sum(unit, -1, keepdims=True) / groups.number
        judged = jnp.any(groups.present, -1, keepdims=True)
        a, b = match_moments(p, judged)
        density = beta.pdf(p, jnp.maximum(1, 1 + a / 3), jnp.maximum(1, 1 + b / 3))
        return jnp.where(groups.flat, 0.0, (unit - p) / jnp.maximum(density, LEAST))

    return of_outcomes(rule)


def match_moments(p: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ``a`` and ``b`` of the Beta distribution with the mean and variance of some numbers.

    Args:
      p: in ``[0, 1]``.
      present: which of them count, bool of the same shape.

    Returns:
      float32 ``[]`` each, at least 0, with ``a + b`` at most `LARGEST`.
    """
    count = jnp.maximum(jnp.sum(present), 1)
    mean = jnp.sum(jnp.where(present, p, 0.0)) / count
    variance = jnp.sum(jnp.where(present, p - mean, 0.0) ** 2) / count
    both = mean * (1 - mean) / jnp.maximum(variance, 1e-12) - 1
    both = jnp.clip(both, 0.0, LARGEST)
    return mean * both, (1 - mean) * both
