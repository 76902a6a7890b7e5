"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): a small matrix between frozen singular vectors.

y = x W + (x U_r S_r) R V_r^T with the ``r`` leading singular values of ``W``; ``R [r, r]`` is
trained, and begins at zero (the paper: small and random).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Adapter, each_site
from grpocem_jax.adapters.svf import SVD, svd
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import whole


class Frozen(NamedTuple):
    """A kernel ``[in, out]`` with its leading singular vectors.

    Attributes:
      kernel: the kernel.
      a: ``U_r S_r``, ``[in, r]``.
      b: ``V_r^T``, ``[r, out]``.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array


def leading(kernel: np.ndarray, rank: int, svd: SVD) -> Frozen:
    """The kernel with its ``rank`` leading singular vectors, or as many as it has."""
    u, s, vt = svd(kernel)
    return Frozen(jnp.asarray(kernel), jnp.asarray(u[:, :rank] * s[:rank]), jnp.asarray(vt[:rank]))


def lora_xs(*, rank: int = 8, svd: SVD = svd) -> Adapter:
    """The LoRA-XS adapter, ``rank**2`` numbers at every site.

    Args:
      rank: at least 1; that of a smaller kernel is its smaller side.
      svd: the decomposition, e.g. `cached_svd()`.

    Raises:
      InputError: a value outside its range.
    """
    rank = whole("rank", rank)

    def factor(key: jax.Array, kernel: np.ndarray) -> Frozen:
        del key  # nothing frozen is random
        return leading(kernel, rank, svd)

    def init(key: jax.Array, frozen: Frozen) -> jax.Array:
        del key
        size = frozen.b.shape[0]
        return jnp.zeros((size, size), jnp.float32)

    def apply(frozen: Frozen, own: jax.Array, x: jax.Array) -> jax.Array:
        return dense(frozen.kernel, x) + dense(frozen.b, dense(own, dense(frozen.a, x)))

    def merge(frozen: Frozen, own: jax.Array) -> jax.Array:
        inner = jnp.dot(frozen.a, own, precision="highest")
        return frozen.kernel + jnp.dot(inner, frozen.b, precision="highest")

    return Adapter(factor, each_site(init), apply, merge)
