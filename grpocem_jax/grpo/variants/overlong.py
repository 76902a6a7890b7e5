"""DAPO's soft punishment of long completions (Yu et al. 2025, arXiv 2503.14476, eq. 13)."""

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.reading import reads
from grpocem_jax.grpo.shaping import Shaping
from grpocem_jax.utils import settings


def overlong(share: float = 0.2) -> Shaping:
    """Takes up to 1 from the reward of a completion in the last part of the largest length.

    With the largest length ``N`` and ``c = share N``, a completion of ``n`` tokens loses
    ``(n - (N - c)) / c`` where that is above zero; at the largest length, where most were cut off,
    it is 1.

    Args:
      share: of the largest length, above 0 and at most 1; 0.2 in the paper.

    Raises:
      InputError: ``share`` outside its range.
    """
    share = settings.number("share", share, settings.share())

    @reads()
    @jax.jit
    def shaping(rewards: jax.Array, logps: jax.Array, mask: jax.Array) -> jax.Array:
        del logps
        length, last = jnp.sum(mask, -1), share * mask.shape[-1]
        return rewards - jnp.maximum(length - (mask.shape[-1] - last), 0.0) / last

    return shaping
