"""TinyLoRA (Morris et al. 2026, arXiv 2602.04118): LoRA-XS with its matrix in a random subspace.

y = x W + (x U_r S_r) (sum_i v_i P_i) V_r^T with frozen random ``P_i [r, r]`` of each site; only
``v`` is trained, and several sites may share one, down to a single vector for a whole model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Adapter, Offsets
from grpocem_jax.adapters.lora_xs import Frozen, leading
from grpocem_jax.adapters.svf import SVD, svd
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import whole


class Projected(NamedTuple):
    """``p [size, r, r]``, the frozen directions, beside the singular vectors."""

    frozen: Frozen
    p: jax.Array


def tinylora(
    *, rank: int = 2, size: int = 64, sites_per_vector: int = 1, svd: SVD = svd
) -> Adapter:
    """The TinyLoRA adapter, ``size`` numbers for every ``sites_per_vector`` sites.

    The name of a vector in the offsets lists its sites, ``h.0.attn.c_proj+h.1.attn.c_proj``.  The
    directions are normal with variance ``1 / r``, which is ours.

    Args:
      rank: of the change, at least 1.
      size: of a vector, at least 1.
      sites_per_vector: how many sites that follow one another share a vector, at least 1; 0 for
        all of them.
      svd: the decomposition, e.g. `cached_svd()`.

    Raises:
      InputError: a value outside its range.
    """
    rank, size = whole("rank", rank), whole("size", size)
    sites_per_vector = whole("sites_per_vector", sites_per_vector, 0)

    def factor(key: jax.Array, kernel: np.ndarray) -> Projected:
        frozen = leading(kernel, rank, svd)
        r = frozen.b.shape[0]
        return Projected(frozen, jax.random.normal(key, (size, r, r)) * r**-0.5)

    def init(key: jax.Array, factors: Mapping[str, Any]) -> Offsets:
        del key  # the base model is one point
        names, count = list(factors), sites_per_vector or len(factors)
        groups = [names[i : i + count] for i in range(0, len(names), count)]
        return {"+".join(group): jnp.zeros(size, jnp.float32) for group in groups}

    def view(offsets: Offsets) -> dict[str, jax.Array]:
        return {name: own for names, own in offsets.items() for name in names.split("+")}

    def inner(factors: Projected, own: jax.Array) -> jax.Array:
        return jnp.tensordot(own, factors.p.astype(jnp.float32), axes=1, precision="highest")

    def apply(factors: Projected, own: jax.Array, x: jax.Array) -> jax.Array:
        kernel, a, b = factors.frozen
        return dense(kernel, x) + dense(b, dense(inner(factors, own), dense(a, x)))

    def merge(factors: Projected, own: jax.Array) -> jax.Array:
        kernel, a, b = factors.frozen
        left = jnp.dot(a, inner(factors, own), precision="highest")
        return kernel + jnp.dot(left, b, precision="highest")

    return Adapter(factor, init, apply, merge, view)
