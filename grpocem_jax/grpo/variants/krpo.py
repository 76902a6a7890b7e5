"""KRPO (Wang et al. 2025, arXiv 2505.07527): a Kalman filter instead of the group's mean."""

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.advantages import Advantages
from grpocem_jax.grpo.variants.outcomes import Groups, of_outcomes
from grpocem_jax.utils.settings import above, at_least, number


def krpo(process_noise: float = 1e-5, measurement_noise: float = 1e-2) -> Advantages:
    """The reward minus a filtered baseline, in units of the baseline's uncertainty.

    A group's rewards are measurements ``r_1, r_2, ...`` of a baseline, which begins at ``x = 0``
    with the variance ``P = 1``:

        P <- P + Q,   K = P / (P + R),   x <- x + K (r_i - x),   P <- (1 - K) P,
        A_i = (r_i - x) / sqrt(P)

    The defaults, and that ``A_i`` takes the filter right after ``r_i``, follow the authors' code.
    Ours: completions without reward are passed over, and equal rewards give no advantage.

    Args:
      process_noise: ``Q``, at least 0.
      measurement_noise: ``R``, above 0.

    Raises:
      InputError: a value outside its range.
    """
    process_noise = number("process_noise", process_noise, at_least(0))
    measurement_noise = number("measurement_noise", measurement_noise, above(0))

    def measure(
        state: tuple[jax.Array, jax.Array], given: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        x, variance = state
        reward, present = given
        predicted = variance + process_noise
        gain = predicted / (predicted + measurement_noise)
        new = (x + gain * (reward - x), (1 - gain) * predicted)
        advantage = (reward - new[0]) / jnp.sqrt(new[1])
        kept = jnp.where(present, new[0], x), jnp.where(present, new[1], variance)
        return kept, advantage

    def rule(groups: Groups) -> jax.Array:
        start = jnp.zeros(len(groups.rewards)), jnp.ones(len(groups.rewards))
        _, found = jax.lax.scan(measure, start, (groups.rewards.T, groups.present.T))
        return jnp.where(groups.flat, 0.0, found.T)

    return of_outcomes(rule)
