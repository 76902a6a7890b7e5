"""CISPO (MiniMax 2025, arXiv 2506.13585): clipped importance weights that drop no token."""

import dataclasses

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.batch import Batch
from grpocem_jax.grpo.objectives import Objective
from grpocem_jax.utils.settings import at_least, number, within


@dataclasses.dataclass(frozen=True)
class _CISPO:
    low: float
    high: float

    def __call__(self, logps: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        ratio = jax.lax.stop_gradient(jnp.exp(logps - batch.old_logps))
        weight = jnp.clip(ratio, 1 - self.low, 1 + self.high)
        # Its value is weight A, and its gradient that of weight A log pi.
        values = weight * batch.advantages * (1 + logps - jax.lax.stop_gradient(logps))
        return values, {"clip_ratio/region_mean": jnp.sum(batch.weights * (weight != ratio))}


def cispo(low: float = 1.0, high: float = 4.0) -> Objective:
    """``stop_gradient(clip(rho, 1 - low, 1 + high)) A log pi`` per token (eqs. 4 and 5 there).

    Where `clipped` gives a token beyond the range no gradient, here its weight is bounded. These
    are truncated importance weights, as for several updates on one step's completions.

    Args:
      low: from 0 to 1; 1 leaves small weights as they are, as in the paper.
      high: at least 0; the largest weight is ``1 + high``. The paper tunes it and gives no value.

    Returns:
      an `Objective` with the metric ``clip_ratio/region_mean``, the share of the weights whose
      ratio is clipped.

    Raises:
      InputError: a value outside its range.
    """
    return _CISPO(number("low", low, within(0, 1)), number("high", high, at_least(0)))
