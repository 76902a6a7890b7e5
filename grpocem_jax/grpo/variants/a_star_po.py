"""A*-PO (Brantley et al. 2025, arXiv 2505.20686): regression on the optimal advantage.

The policy that maximises reward less ``beta`` times the KL divergence from the reference has

    beta log(pi(y) / pi_ref(y)) = r(y) - V*,   V* = beta log E_ref exp(r / beta),

so that with an estimate of ``V*`` a completion by itself says how probable it should be.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grpocem_jax.grpo.advantages import Advantages
from grpocem_jax.grpo.batch import Batch
from grpocem_jax.grpo.objectives import Objective
from grpocem_jax.grpo.variants.outcomes import Groups, group, of_outcomes
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, number


def optimal_values(rewards: ArrayLike, beta: float) -> jax.Array:
    """``V* = beta log mean exp(r / beta)`` of each prompt, from completions of the reference.

    Args:
      rewards: float ``[P, N]``, NaN where the reward function abstained.
      beta: above 0; toward 0 it is the largest reward, toward infinity the mean.

    Returns:
      float32 ``[P]``, 0 where all abstained.

    Raises:
      InputError: ``beta`` is not above 0.
    """
    beta = number("beta", beta, above(0))
    return _values(group(rewards), beta)[:, 0]


def _values(groups: Groups, beta: float) -> jax.Array:
    exponents = jnp.where(groups.present, groups.rewards / beta, -jnp.inf)
    largest = jnp.max(exponents, -1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = jnp.sum(jnp.exp(exponents - largest), -1, keepdims=True)
    return jnp.where(total > 0, beta * (largest + jnp.log(total / groups.number)), 0.0)


def optimal_advantages(beta: float = 0.5, offline: bool = False) -> Advantages:
    """``A_i = r_i - V*``.

    The paper estimates ``V*`` before training, from completions of the reference.  So it is with
    ``offline``, where rewards have it taken off: see `tasks.rewards.optimal_value`.  Else, which is
    ours, it is estimated from the group, whose policy is the reference in the first step and near
    to it later.

    Args:
      beta: of `optimal_values`, above 0; not read with ``offline``.
      offline: whether the value is part of the reward.

    Raises:
      InputError: a value outside its range.
    """
    beta = number("beta", beta, above(0))
    if not isinstance(offline, bool):
        raise InputError(f"offline={offline!r}: must be True or False.")

    def rule(groups: Groups) -> jax.Array:
        if offline:
            return groups.rewards
        # Exactly zero where rewards are equal, whose value is rounded.
        return jnp.where(groups.flat, 0.0, groups.rewards - _values(groups, beta))

    return of_outcomes(rule)


@dataclasses.dataclass(frozen=True)
class _AStarPO:
    beta: float

    needs = ("reference",)

    def __call__(
        self, logps: jax.Array, batch: Batch, *, reference: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        trained = batch.weights != 0
        count = jnp.maximum(jnp.sum(trained, -1), 1)
        log_ratio = jnp.sum(jnp.where(trained, logps - reference, 0.0), -1)
        advantage = jnp.sum(jnp.where(trained, batch.advantages, 0.0), -1) / count
        square = (self.beta * log_ratio - advantage) ** 2
        values = jnp.broadcast_to(-0.5 / self.beta * square[..., None], logps.shape)
        each = jnp.sum(batch.weights, -1)
        return values, {"a_star_po/squared_error": jnp.sum(each * square)}


def a_star_po(beta: float = 0.1) -> Objective:
    """The squared error of ``beta log(pi(y) / pi_ref(y))`` as a prediction of the advantage.

    The value of every token of a completion is ``-(beta log(pi / pi_ref) - A)^2 / (2 beta)``, whose
    gradient is ``A - beta log(pi / pi_ref)`` times that of the completion's log-probability.  The
    reference is the base model, so the KL term of the loss is there already: ``grpo.beta=0``.

    Args:
      beta: above 0. The paper takes a far smaller one here than for the values.

    Returns:
      an `Objective` with the metric ``a_star_po/squared_error``. The completion's tokens are those
      of a weight above zero.

    Raises:
      InputError: ``beta`` is not above 0.
    """
    beta = number("beta", beta, above(0))
    return _AStarPO(beta)
