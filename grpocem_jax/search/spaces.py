"""Spaces in which an adapter is searched: all offsets, a few directions, or a mix of experts.

In each of them the origin is the adapter to start from, and points are offsets from it:

    offsets(z) = start + z                      full: the report's search, every offset by itself
    offsets(z) = start + sum_r z_r basis_r      a subspace, or a mixture of experts
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.utils.errors import InputError


class Space(NamedTuple):
    """A space and how its points become offsets, see `decode`.

    Attributes:
      origin: the point zero: offsets as ``start``; float32 ``[R]``; or a dict from site to ``[R]``.
      start: the offsets at the origin.
      basis: directions, ``[R, ...]`` a site, or None for all offsets.
    """

    origin: Any
    start: Offsets
    basis: Offsets | None


def decode(space: Space, point: Any) -> Offsets:
    """The offsets at a point, ``start`` plus what is linear in the point. Traceable.

    Args:
      space: the space.
      point: arrays in the form of ``space.origin``.

    Returns:
      offsets in the form of ``space.start``.
    """
    if space.basis is None:
        return jax.tree.map(jnp.add, space.start, point)
    offsets = {}
    for site, start in space.start.items():
        z = point[site] if isinstance(point, dict) else point
        offsets[site] = jax.tree.map(
            lambda x, directions, z=z: (
                x + jnp.tensordot(z, directions, axes=1, precision="highest")
            ),
            start,
            space.basis[site],
        )
    return offsets


def full_space(start: Offsets) -> Space:
    """Every offset by itself.

    Args:
      start: the offsets at the origin.

    Returns:
      a space whose points are offsets in the form of ``start``, added to it.
    """
    return Space(jax.tree.map(jnp.zeros_like, start), start, None)


def expert_space(start: Offsets, experts: list[Offsets], *, per_site: bool = False) -> Space:
    """Mixtures of expert vectors: a point holds their weights, one for each or one for each site.

    Args:
      start: the offsets to which the mixture is added.
      experts: trained adapters; weight 1 adds one whole.
      per_site: experts get a weight at every site (in every layer), not one for all.

    Raises:
      InputError: no experts, or one with other sites or shapes than ``start``.
    """
    if not experts:
        raise InputError("experts=[]: there are none to mix; give at least one.")
    shapes = jax.tree.map(jnp.shape, start)
    for number, expert in enumerate(experts):
        if jax.tree.map(jnp.shape, expert) != shapes:
            raise InputError(
                f"experts: number {number} has other sites or shapes than the start; mix adapters "
                "of one model and one type."
            )
    basis = jax.tree.map(lambda *x: jnp.stack(x), *experts)
    origin = jnp.zeros(len(experts), jnp.float32)
    return Space(dict.fromkeys(start, origin) if per_site else origin, start, basis)


def principal_space(start: Offsets, vectors: Offsets, rank: int) -> Space:
    """The ``rank`` principal directions of some vectors, orthonormal.

    Args:
      start: the offsets at the origin.
      vectors: ``N`` adapters, ``[N, ...]`` a site: experts and points of their training.
      rank: number of directions.

    Raises:
      InputError: a rank below 1, vectors that span fewer directions, or with other sites or shapes
        than ``start``.
    """
    if rank < 1:
        raise InputError(f"rank={rank}: must be at least 1.")
    if jax.tree.map(lambda x: jnp.shape(x)[1:], vectors) != jax.tree.map(jnp.shape, start):
        raise InputError(
            "vectors: other sites or shapes than the start; give adapters of one model and one "
            "type, stacked along a leading axis."
        )
    rows = jax.vmap(lambda x: ravel_pytree(x)[0])(vectors)
    _, values, directions = jnp.linalg.svd(rows, full_matrices=False)
    spanned = int(jnp.sum(values > 1e-5 * jnp.max(values, initial=0.0)))
    if spanned < rank:
        raise InputError(
            f"rank={rank}: the {len(rows)} vectors span {spanned} directions; lower it, or give "
            "more vectors."
        )
    basis = jax.vmap(ravel_pytree(start)[1])(directions[:rank])
    return Space(jnp.zeros(rank, jnp.float32), start, basis)
