"""LoRA (Hu et al. 2021, arXiv 2106.09685): a trained change of low rank beside a frozen kernel.

y = x W + (alpha / rank) (x A) B
"""

import jax
import jax.numpy as jnp

from grpocem_jax.adapters.base import Adapter, each_site, keep_kernel
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import above, number, whole


def lora(*, rank: int = 8, alpha: float | None = None) -> Adapter:
    """The LoRA adapter, with ``A [in, rank]`` and ``B [rank, out]`` at every site.

    ``A`` begins normal with variance ``1 / in`` and ``B`` zero, so that training begins at the base
    model.

    Args:
      rank: of the change, at least 1.
      alpha: numerator of the factor ``alpha / rank``; by default the rank, a factor of 1.

    Raises:
      InputError: a value outside its range.
    """
    rank = whole("rank", rank)
    scale = 1.0 if alpha is None else number("alpha", alpha, above(0)) / rank

    def init(key: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
        rows, columns = kernel.shape
        a = jax.random.normal(key, (rows, rank), jnp.float32) * rows**-0.5
        return {"a": a, "b": jnp.zeros((rank, columns), jnp.float32)}

    def apply(kernel: jax.Array, own: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return dense(kernel, x) + scale * dense(own["b"], dense(own["a"], x))

    def merge(kernel: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
        return kernel + scale * jnp.dot(own["a"], own["b"], precision="highest")

    return Adapter(keep_kernel, each_site(init), apply, merge)
