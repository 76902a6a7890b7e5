"""The smallest adapters of a linear map: a number for each of its outputs."""

import jax
import jax.numpy as jnp

from grpocem_jax.adapters.base import Adapter, each_site, keep_kernel
from grpocem_jax.models.base import dense


def steering() -> Adapter:
    """A steering vector: ``y = x W + o`` with one trained bias ``o [out]`` at every site.

    It merges to a bias, which the map must have to be exported.
    """

    def apply(kernel: jax.Array, own: jax.Array, x: jax.Array) -> jax.Array:
        y = dense(kernel, x)
        return y + jnp.broadcast_to(own, y.shape)

    return Adapter(keep_kernel, each_site(_zeros), apply, lambda kernel, own: (kernel, own))


def ia3() -> Adapter:
    """A scale of each output, ``y = (x W) (1 + o)``, as (IA)^3 (Liu et al. 2022, arXiv 2205.05638).

    The paper scales keys, values and the inner activations of the MLP, which are the outputs of a
    model's maps with their bias; here the scale is of the map without its bias.
    """

    def apply(kernel: jax.Array, own: jax.Array, x: jax.Array) -> jax.Array:
        y = dense(kernel, x)
        return y * jnp.broadcast_to(1.0 + own, y.shape)

    return Adapter(
        keep_kernel, each_site(_zeros), apply, lambda kernel, own: kernel * (1.0 + own)[None]
    )


def _zeros(key: jax.Array, kernel: jax.Array) -> jax.Array:
    del key  # the base model is one point
    return jnp.zeros(kernel.shape[1], jnp.float32)
