"""The policy gradient without a ratio: REINFORCE (Williams 1992), the ratio of S-GRPO."""

import dataclasses

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.batch import Batch
from grpocem_jax.grpo.objectives import Objective


@dataclasses.dataclass(frozen=True)
class _PolicyGradient:
    def __call__(self, logps: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.exp(logps - jax.lax.stop_gradient(logps)) * batch.advantages, {}


def policy_gradient() -> Objective:
    """``pi / stop_gradient(pi) A`` per token: the value is ``A``, the gradient ``A grad log pi``.

    It is `clipped` on the policy that drew the completions, whatever their log-probabilities were:
    right for one update a batch.
    """
    return _PolicyGradient()
