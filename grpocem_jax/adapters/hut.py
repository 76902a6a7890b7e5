"""HUT (Zhang et al. 2024, arXiv 2409.13501): a Hadamard product of the kernel with a low rank.

y = x (W * (1 + A B)) = x W + sum_r ((x A_r) W) B_r, elementwise products with columns ``A_r [in]``
and rows ``B_r [out]``.  The paper transforms the pretrained weights by the Hadamard product with
two matrices of low rank; the 1, so that training begins at the base model, is our reading of it.
"""

import jax
import jax.numpy as jnp

from grpocem_jax.adapters.base import Adapter, each_site, keep_kernel
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import whole


def hut(*, rank: int = 1) -> Adapter:
    """The HUT adapter, with ``A [in, rank]`` and ``B [rank, out]`` at every site.

    ``A`` begins normal with variance 1 and ``B`` zero.  It costs ``rank`` more products of the
    kernel's size.

    Args:
      rank: at least 1.

    Raises:
      InputError: a value outside its range.
    """
    rank = whole("rank", rank)

    def init(key: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
        rows, columns = kernel.shape
        a = jax.random.normal(key, (rows, rank), jnp.float32)
        return {"a": a, "b": jnp.zeros((rank, columns), jnp.float32)}

    def apply(kernel: jax.Array, own: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = dense(kernel, x)
        for column, row in zip(own["a"].T, own["b"], strict=True):
            part = dense(kernel, x * jnp.broadcast_to(column, x.shape))
            y = y + part * jnp.broadcast_to(row, y.shape)
        return y

    def merge(kernel: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
        return kernel * (1.0 + jnp.dot(own["a"], own["b"], precision="highest"))

    return Adapter(keep_kernel, each_site(init), apply, merge)
