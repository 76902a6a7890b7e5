"""TeRA (Gu et al. 2025, arXiv 2509.03234): trained scales inside a frozen random tensor network.

Inputs and outputs of a kernel are indexed by two numbers each, ``in = i1 i2`` and ``out = j1 j2``,
and its change is a Tucker network of a core and four factors, all random, frozen, and shared by the
sites of one shape, with the trained vectors ``d1 .. d4 [r]`` of each site between them:

    dW[i1 i2, j1 j2] = sum_abcd G[a, b, c, d] u1[i1, a] u2[i2, b] u3[j1, c] u4[j2, d],
    u_n = U_n diag(d_n).

Its rank is up to ``r**2`` with ``4 r`` trained numbers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Adapter, each_site
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import whole


class Network(NamedTuple):
    """A kernel ``[in, out]`` and the frozen network.

    Attributes:
      kernel: the kernel.
      core: ``[r r, r r]``, from the inputs' two indices to the outputs'.
      factors: ``[i1, r]``, ``[i2, r]``, ``[r, j1]`` and ``[r, j2]``.
    """

    kernel: jax.Array
    core: jax.Array
    factors: tuple[jax.Array, ...]


def tera(*, rank: int = 8, seed: int = 0) -> Adapter:
    """The TeRA adapter, ``4 rank`` numbers at every site.

    Three of the vectors begin at one and the last at zero, so that training begins at the base
    model; which, how inputs and outputs are cut in two (as evenly as they divide), and the variance
    of the random numbers, ``1 / `` the number summed over, are ours.

    Args:
      rank: ``r``, at least 1.
      seed: of the random network.

    Raises:
      InputError: a value outside its range.
    """
    rank = whole("rank", rank)

    def factor(key: jax.Array, kernel: np.ndarray) -> Network:
        del key  # one for all sites of a shape
        rows, columns = kernel.shape
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), rows * columns), 5)
        (i1, i2), (j1, j2) = _two_factors(rows), _two_factors(columns)
        shapes = ((i1, rank), (i2, rank), (rank, j1), (rank, j2), (rank**2, rank**2))
        *factors, core = (
            jax.random.normal(k, shape) * shape[0] ** -0.5
            for k, shape in zip(keys, shapes, strict=True)
        )
        return Network(jnp.asarray(kernel), core, tuple(factors))

    def init(key: jax.Array, network: Network) -> jax.Array:
        del key, network
        return jnp.zeros((4, rank), jnp.float32)

    def change(network: Network, own: jax.Array, x: jax.Array) -> jax.Array:
        u1, u2, u3, u4 = network.factors
        d = own + jnp.array([1.0, 1.0, 1.0, 0.0])[:, None]
        lead = x.shape[:-1]
        inner = dense(u2, x.reshape(*lead, len(u1), len(u2)))  # [.., i1, b]
        inner = dense(u1, jnp.swapaxes(inner, -1, -2))  # [.., b, a]
        inner = inner * _outer(d[1], d[0], inner)
        outer = dense(network.core, inner.reshape(*lead, -1)).reshape(*lead, rank, rank)
        outer = outer * _outer(d[2], d[3], outer)  # [.., c, d]
        y = dense(u3, jnp.swapaxes(outer, -1, -2))  # [.., d, j1]
        return dense(u4, jnp.swapaxes(y, -1, -2)).reshape(*lead, -1)

    def apply(network: Network, own: jax.Array, x: jax.Array) -> jax.Array:
        return dense(network.kernel, x) + change(network, own, x)

    def merge(network: Network, own: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return network.kernel + change(network, own, jnp.eye(len(network.kernel)))

    return Adapter(factor, each_site(init), apply, merge)


def _outer(rows: jax.Array, columns: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(rows[:, None] * columns[None], like.shape)


def _two_factors(count: int) -> tuple[int, int]:
    """Two numbers whose product is ``count``, the first the largest up to its square root."""
    first = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return first, count // first
