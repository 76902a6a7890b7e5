"""IncreLoRA's map (Zhang et al. 2023, arXiv 2308.12043): a low rank, each component with a scale.

y = x W + (((x A) * c) B): a component whose scale ``c`` is zero is not there.  All of ``A`` and
``B`` begin random and ``c`` zero; which of the scales are trained is up to the optimizer of the
same name, `grpo.variants.increlora`, which adds components where they matter, within a budget.
"""

import jax
import jax.numpy as jnp

from grpocem_jax.adapters.base import Adapter, each_site, keep_kernel
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import whole


def increlora(*, max_rank: int = 8) -> Adapter:
    """The adapter, with ``a [in, max_rank]``, ``scale [max_rank]`` and ``b [max_rank, out]``.

    With any other optimizer all components are trained at once.

    Args:
      max_rank: the largest rank of a site, at least 1.

    Raises:
      InputError: a value outside its range.
    """
    max_rank = whole("max_rank", max_rank)

    def init(key: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
        (rows, columns), (left, right) = kernel.shape, jax.random.split(key)
        return {
            "a": jax.random.normal(left, (rows, max_rank), jnp.float32) * rows**-0.5,
            "b": jax.random.normal(right, (max_rank, columns), jnp.float32),
            "scale": jnp.zeros(max_rank, jnp.float32),
        }

    def apply(kernel: jax.Array, own: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        inner = dense(own["a"], x)
        inner = inner * jnp.broadcast_to(own["scale"], inner.shape)
        return dense(kernel, x) + dense(own["b"], inner)

    def merge(kernel: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
        return kernel + jnp.dot(own["a"] * own["scale"][None], own["b"], precision="highest")

    return Adapter(keep_kernel, each_site(init), apply, merge)
