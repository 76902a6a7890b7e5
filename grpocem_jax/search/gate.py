"""The gate: which of the points that a search went through is returned, or the start.

What fits a text need not help with the next one: on text like its training text a model adapted to
a prompt does worse on the continuation (studies/adaptation.md).  So the search holds back a part of
its own text and follows its mean on it, at 1/4, 1/2 and 1 of the way from the start.  The result is
the point with the largest lower confidence bound of the held-back gain,

    mean(d) - z std(d) / sqrt(n),   d_i = score of the point - score of the start, i = 1..n,

or the start, whose bound is zero, where none is above it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.search.base import Point

SCALES = (0.25, 0.5, 1.0)


class Chosen(NamedTuple):
    """The point that did best on held-back text so far; at first the start.

    Attributes:
      point: the point.
      bound: lower confidence bound of its held-back gain, float32 ``[]``.
      gain: its mean held-back gain, float32 ``[]``.
    """

    point: Point
    bound: jax.Array
    gain: jax.Array


def scaled(point: Point) -> Point:
    """The point at each of `SCALES` of the way from the origin: a leading axis of 3."""
    scales = jnp.array(SCALES)
    return jax.tree.map(
        lambda x: jnp.tensordot(scales.astype(x.dtype), x, axes=0, precision="highest"), point
    )


def choose(
    chosen: Chosen,
    points: Point,
    scores: tuple[jax.Array, jax.Array],
    start_scores: tuple[jax.Array, jax.Array],
    z: jax.Array,
) -> tuple[Chosen, jax.Array]:
    """The gate's choice between the point it has and new ones.

    Args:
      chosen: so far.
      points: ``S`` points, a leading axis.
      scores: float ``[S, N]`` on held-back data and which count, bool ``[S, N]``.
      start_scores: the same of the start, ``[N]``.
      z: standard errors to take off, float ``[]``.

    Returns:
      the better one, and the largest lower bound among the new.
    """
    values, counts = scores
    present = counts & start_scores[1][None]
    n = jnp.maximum(jnp.sum(present, -1), 1)
    difference = jnp.where(present, values - start_scores[0][None], 0.0)
    gain = jnp.sum(difference, -1) / n
    spread = jnp.where(present, difference - gain[:, None], 0.0)
    variance = jnp.sum(spread**2, -1) / jnp.maximum(n - 1, 1)
    bound = gain - z * jnp.sqrt(variance / n)
    bound = jnp.where(jnp.isnan(bound), -jnp.inf, bound)
    winner = jnp.argmax(bound)
    better = bound[winner] > chosen.bound
    new = Chosen(jax.tree.map(lambda x: x[winner], points), bound[winner], gain[winner])
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, chosen), bound[winner]


def begin(origin: Point) -> Chosen:
    """The start, whose gain over itself is zero."""
    return Chosen(jax.tree.map(jnp.asarray, origin), jnp.float32(0.0), jnp.float32(0.0))
