"""The gate: what a search found, or the start.

What fits a text need not help with the next one: on text like its training text a model adapted to
a prompt does worse on the continuation (studies/adaptation.md).  So the data are split into halves,
each is searched by itself, and what was found is judged on the other half, as in cross-fitting
(Chernozhukov et al. 2018, arXiv 1608.00060): all of the data judge, and none what was fitted to
them.  The points are judged at 1/4, 1/2 and the whole of their way from the start.  Those pass
whose gain over the scores of both halves is above zero by z standard errors,

    mean(d) - z std(d) / sqrt(n) > 0,   d_i = score of the point - score of the start, i = 1..n.

Where any passes, all of the data are searched, and the result is as far along the way to what is
found as the point of the largest gain among them.  Where none does, it is the start.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.search.base import Point

SCALES = (0.25, 0.5, 1.0)


class Verdict(NamedTuple):
    """What the gate says, each float32 ``[]`` or a number.

    Attributes:
      scale: how far to go from the start to the point; 0 for the start itself.
      bound: lower confidence bound of the gain; 0 for the start.
      gain: the mean gain; 0 for the start.
    """

    scale: jax.Array | float
    bound: jax.Array | float
    gain: jax.Array | float


@jax.jit
def scaled(point: Point) -> Point:
    """The start and the point at each of `SCALES` of the way from it: a leading axis of 4."""
    scales = jnp.array((0.0, *SCALES))
    return jax.tree.map(
        lambda x: jnp.tensordot(scales.astype(x.dtype), x, axes=0, precision="highest"), point
    )


@jax.jit
def judge(values: jax.Array, present: jax.Array, z: jax.Array | float) -> Verdict:
    """How far to go.

    Args:
      values: scores of the points of `scaled`, float ``[4, N]``.
      present: which of them count, bool ``[4, N]``.
      z: standard errors to take off, at least 0.

    Returns:
      the verdict; the start where no point has two scores, as one has no standard error.
    """
    present = present[1:] & present[:1]
    count = jnp.sum(present, -1)
    n = jnp.maximum(count, 1)
    difference = jnp.where(present, values[1:] - values[:1], 0.0)
    gain = jnp.sum(difference, -1) / n
    spread = jnp.where(present, difference - gain[:, None], 0.0)
    variance = jnp.sum(spread**2, -1) / jnp.maximum(n - 1, 1)
    bound = gain - z * jnp.sqrt(variance / n)
    passed = (bound > 0) & (count > 1)
    best = jnp.argmax(jnp.where(passed, gain, -jnp.inf))
    found = Verdict(jnp.array(SCALES)[best], bound[best], gain[best])
    return jax.tree.map(lambda x: jnp.where(passed[best], x, 0.0), found)


def passes(verdict: Verdict) -> bool:
    """Whether the verdict leads away from the start."""
    return float(verdict.bound) > 0


def part(verdict: Verdict, point: Point) -> Point:
    """As much of the way to a point as the verdict says."""
    return jax.tree.map(lambda x: (verdict.scale * x).astype(x.dtype), point)
