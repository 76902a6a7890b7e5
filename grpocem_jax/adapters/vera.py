"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): trained scales of a frozen random low rank.

y = x W + (((x A) * d) B) * b, with ``A [in, r]`` and ``B [r, out]`` random and shared by all sites
of one shape, and the vectors ``d [r]`` and ``b [out]`` of each site trained.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Adapter, each_site
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import Range, number, whole


class Random(NamedTuple):
    """A kernel ``[in, out]`` with the frozen ``a [in, r]`` and ``b [r, out]``."""

    kernel: jax.Array
    a: jax.Array
    b: jax.Array


def vera(*, rank: int = 64, d: float = 0.1, seed: int = 0) -> Adapter:
    """The VeRA adapter, ``rank + out`` numbers at every site.

    ``b`` begins at zero, and ``d`` at the same number everywhere; its offsets count from there. The
    random matrices are uniform with variance ``1 / (3 in)`` and ``1 / (3 r)``, as Kaiming's.

    Args:
      rank: of the change, at least 1.
      d: where ``d`` begins, not 0.
      seed: of the random matrices.

    Raises:
      InputError: a value outside its range.
    """
    rank = whole("rank", rank)
    start = number("d", d, Range("other than 0, where nothing has a gradient", lambda x: x != 0))

    def factor(key: jax.Array, kernel: np.ndarray) -> Random:
        del key  # one for all sites of a shape
        rows, columns = kernel.shape
        a, b = jax.random.split(jax.random.fold_in(jax.random.key(seed), rows * columns))
        return Random(jnp.asarray(kernel), _kaiming(a, rows, rank), _kaiming(b, rank, columns))

    def init(key: jax.Array, factors: Random) -> dict[str, jax.Array]:
        del key
        return {"d": jnp.zeros(rank), "b": jnp.zeros(factors.b.shape[1])}

    def apply(factors: Random, own: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        inner = dense(factors.a, x)
        change = dense(factors.b, inner * jnp.broadcast_to(start + own["d"], inner.shape))
        return dense(factors.kernel, x) + change * jnp.broadcast_to(own["b"], change.shape)

    def merge(factors: Random, own: dict[str, jax.Array]) -> jax.Array:
        left = factors.a * (start + own["d"])[None]
        return factors.kernel + jnp.dot(left, factors.b * own["b"][None], precision="highest")

    return Adapter(factor, each_site(init), apply, merge)


def _kaiming(key: jax.Array, rows: int, columns: int) -> jax.Array:
    return jax.random.uniform(key, (rows, columns), minval=-1.0, maxval=1.0) * rows**-0.5
