"""Other baselines and scales of rewards than the group's mean and standard deviation."""

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.advantages import Advantages, group_normalize
from grpocem_jax.grpo.variants.outcomes import Groups, of_outcomes
from grpocem_jax.utils.errors import InputError


def centred() -> Advantages:
    """``A_i = r_i - mean(r)``, without the standard deviation (Dr. GRPO, arXiv 2503.20783, eq. 7).

    Dr. GRPO also replaces the mean over a completion's tokens: ``token_weights`` of "constant".
    """
    return of_outcomes(_centre)


def rloo() -> Advantages:
    """``A_i = r_i - mean of the others' rewards`` (REINFORCE leave-one-out, arXiv 2402.14740).

    Of the ``n`` completions of a group that have a reward this is ``n / (n - 1)`` times `centred`.
    """

    def rule(groups: Groups) -> jax.Array:
        others = jnp.maximum(groups.number - 1, 1)
        return groups.number / others * _centre(groups)

    return of_outcomes(rule)


def reinforce_pp(baseline: bool = True) -> Advantages:
    """Rewards normalised over the whole step instead of the group (REINFORCE++, arXiv 2501.03262).

    ``A = (x - mean(x)) / std(x)`` over all completions of the step, where ``x`` is the reward minus
    the mean of its group (REINFORCE++-baseline), whose mean is zero, or the reward itself.

    Args:
      baseline: whether the mean of the group is taken off. Without it, completions are compared
        with those of other prompts, and a group of equal rewards has advantages too.

    Raises:
      InputError: ``baseline`` is not True or False.
    """
    if not isinstance(baseline, bool):
        raise InputError(f"baseline={baseline!r}: must be True or False.")

    def rule(groups: Groups) -> jax.Array:
        if not baseline:
            values, present = groups.rewards.ravel(), groups.present.ravel()
            return group_normalize(values, present).reshape(groups.rewards.shape)
        values = jnp.where(groups.present, _centre(groups), 0.0)
        std = jnp.sqrt(jnp.sum(values**2) / jnp.maximum(jnp.sum(groups.present), 1))
        return jnp.where(std > 0, values / jnp.where(std > 0, std, 1.0), 0.0)

    return of_outcomes(rule)


def _centre(groups: Groups) -> jax.Array:
    # Exactly zero where rewards are equal, whose mean is rounded.
    return jnp.where(groups.flat, 0.0, groups.rewards - groups.mean)
