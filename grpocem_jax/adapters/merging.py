"""Several trained adapters made one, without training: task vectors, projection, competition.

Offsets are differences from the base model, so they are what the literature calls task vectors.
All functions here take offsets of one structure and return the same structure.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, number, share


def combine(offsets: Sequence[Offsets], weights: Sequence[float] | None = None) -> Offsets:
    """The weighted sum of task vectors (Ilharco et al. 2023, arXiv 2212.04089).

    A skill trained on one task is added to another's by weights of 1, one is taken away by -1.

    Args:
      offsets: at least one.
      weights: one for each; by default equal ones whose sum is 1.

    Raises:
      InputError: none, of another structure, or as many weights as there are not offsets.
    """
    _check(offsets)
    if weights is None:
        weights = [1 / len(offsets)] * len(offsets)
    if len(weights) != len(offsets):
        raise InputError(
            f"weights: there are {len(weights)} for {len(offsets)} adapters; give one for each."
        )
    return jax.tree.map(lambda *x: sum(w * a for w, a in zip(weights, x, strict=True)), *offsets)


def project(offsets: Sequence[Offsets]) -> Offsets:
    """The sum of task vectors without what contradicts another.

    From each, its component along every other is taken away where the two point apart, as in
    gradient surgery (Yu et al. 2020, arXiv 2001.06782), in the order given; taking it for merging
    is ours.

    Args:
      offsets: at least one.

    Raises:
      InputError: as `combine`.
    """
    _check(offsets)
    flat, unflatten = _flatten(offsets)
    parts = []
    for i, own in enumerate(flat):
        part = own
        for other in (x for j, x in enumerate(flat) if j != i):
            size = jnp.maximum(jnp.vdot(other, other), jnp.finfo(other.dtype).tiny)
            part = part - jnp.minimum(jnp.vdot(part, other) / size, 0.0) * other
        parts.append(part)
    return unflatten(sum(parts))


def compete(offsets: Sequence[Offsets], *, keep: float = 0.5, scale: float = 1.0) -> Offsets:
    """PCB-merging: numbers weighted by their own and their common importance (arXiv 2410.02396).

    With ``T`` task vectors ``d_i`` of ``n`` numbers each, ``norm`` a division by the largest
    absolute number, and products elementwise,

        b_i = softmax_n(T norm(d_i d_i)) * softmax_n(sum_j norm(d_i d_j)),

    of which the share ``keep`` of the largest is kept and the others are zero, and the merged
    numbers are ``scale sum_i b_i d_i / sum_i b_i``.  The paper searches a scale for each task, and
    its code weighs by ``tanh(d_i sum_j d_j)`` in place of the second softmax, under which numbers
    that contradict the others' sum are dropped first; that the sum stands within it is ours.

    Args:
      offsets: at least one.
      keep: share of each one's numbers, above 0 and at most 1.
      scale: of the result, above 0.

    Raises:
      InputError: as `combine`; a value outside its range.
    """
    _check(offsets)
    keep, scale = number("keep", keep, share()), number("scale", scale, above(0))
    rows, unflatten = _flatten(offsets)
    d = jnp.stack(rows)

    def norm(x: jax.Array) -> jax.Array:
        most = jnp.max(jnp.abs(x), -1, keepdims=True)
        return x / jnp.where(most > 0, most, 1.0)

    intra = jax.nn.softmax(len(d) * norm(d * d), -1)
    products = norm(d[:, None] * d[None])  # [T, T, n]
    inter = jax.nn.softmax(jnp.sum(products, 1), -1)
    b = intra * inter
    count = max(1, round(keep * d.shape[-1]))
    least = jnp.sort(b, -1)[:, -count, None]
    b = jnp.where(b >= least, b, 0.0)
    total = jnp.sum(b, 0)
    return unflatten(scale * jnp.sum(b * d, 0) / jnp.where(total > 0, total, 1.0))


def _check(offsets: Sequence[Offsets]) -> None:
    if not isinstance(offsets, Sequence):
        raise InputError(
            f"offsets: is {type(offsets).__name__}, not a list of those of several adapters; give "
            "[first, second]."
        )
    if not offsets:
        raise InputError("offsets: there are none to merge; give at least one adapter's.")
    kinds = [jax.tree.map(jnp.shape, own) for own in offsets]
    for place, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise InputError(
                f"offsets: number {place} has other sites or shapes than the first; merge "
                "adapters of one model and one type."
            )


def _flatten(offsets: Sequence[Offsets]) -> tuple[list[jax.Array], Any]:
    """Each as a vector, and what makes offsets of a vector again."""
    pairs = [jax.flatten_util.ravel_pytree(own) for own in offsets]
    return [vector for vector, _ in pairs], pairs[0][1]
