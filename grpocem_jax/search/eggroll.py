"""An evolution strategy with antithetic noise of low rank, in the manner of EGGROLL.

Sarkar et al. 2025, arXiv 2511.16652.  A matrix ``M [m, n]`` of the mean is perturbed by

    M + sigma E,   E = A B^T / sqrt(r),   A [m, r] and B [n, r] standard normal,

and the next candidate is ``M - sigma E``.  The numbers of ``E`` have mean 0 and variance 1 for any
``r``, and cost ``r (m + n)`` draws.  On the offsets of LoRA a candidate is ``x W + (x A_i) B_i``:
the population goes through one forward, whose product with ``W`` is that of a single large batch.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.search.base import Point, check_start
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, check, count, setting


class EggrollState(NamedTuple):
    """What `Eggroll` knows between generations.

    Attributes:
      mean: the middle of the candidates to come.
      std: their standard deviations, in the form of ``mean``; they stay as they are.
    """

    mean: Point
    std: Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eggroll:
    """Pairs of candidates on both sides of the mean, which moves along the differences of fitness.

    With ``z`` the fitness less its mean over the population, divided by its standard deviation, and
    ``E_j`` the noise of pair ``j``,

        mean' = mean + learning_rate mean_j((z(mean + sigma E_j) - z(mean - sigma E_j)) / 2 E_j).

    Attributes:
      population_size: candidates of a generation, an even number.
      noise_std: ``sigma``, above 0.
      rank: ``r``, of the noise of matrices. Where it would take as many draws as a number each,
        and for vectors and scalars, the noise is normal.
      learning_rate: above 0; about how far the mean goes in a generation where the fitness is
        linear in a single direction.

    Raises:
      InputError: a value outside its range.
    """

    population_size: int = setting(allowed=count(2), default=100)
    noise_std: float = setting(allowed=above(0), default=0.3)
    rank: int = setting(allowed=count(1), default=1)
    learning_rate: float = setting(allowed=above(0), default=0.3)

    def __post_init__(self) -> None:
        check(self)
        if self.population_size % 2:
            raise InputError(
                f"population_size={self.population_size}: must be even, as candidates come in "
                f"pairs; take {self.population_size + 1}."
            )

    label = "EGGROLL"

    def init(self, start: Point) -> EggrollState:
        """The state before the first generation.

        Raises:
          InputError: a start without arrays, or with arrays that are not of floats.
        """
        start = check_start(start)
        return EggrollState(start, jax.tree.map(lambda x: jnp.full_like(x, self.noise_std), start))

    def ask(self, key: jax.Array, state: EggrollState) -> Point:
        """The candidates of a generation: first those on one side of the mean, then the others."""
        leaves, structure = jax.tree.flatten(state.mean)
        moved = []
        for leaf, own in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            noise = self.noise_std * self._noise(own, leaf.shape)
            both = jnp.concatenate([noise, -noise]) + leaf.astype(jnp.float32)[None]
            moved.append(both.astype(leaf.dtype))
        return jax.tree.unflatten(structure, moved)

    def _noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Noise of variance 1 for one of each pair, float32 ``[population_size / 2, *shape]``."""
        pairs = self.population_size // 2
        if len(shape) != 2 or self.rank * sum(shape) >= math.prod(shape):
            return jax.random.normal(key, (pairs, *shape))
        drawn = jax.random.normal(key, (pairs, sum(shape), self.rank)) / self.rank**0.25
        left, right = drawn[:, : shape[0]], drawn[:, shape[0] :]
        return jnp.einsum("pmr,pnr->pmn", left, right, precision="highest")

    def tell(self, state: EggrollState, candidates: Point, fitness: jax.Array) -> EggrollState:
        """Moves the mean along the noise of each pair by the difference of its two fitnesses.

        A pair of which one fitness is not finite says nothing, nor do equal fitnesses.

        Args:
          state: the state that was asked.
          candidates: what `ask` returned.
          fitness: float ``[population_size]``.

        Returns:
          the next state, with the same shapes and dtypes.
        """
        pairs = self.population_size // 2
        sides = jnp.asarray(fitness, jnp.float32).reshape(2, pairs)
        known = jnp.all(jnp.isfinite(sides), 0, keepdims=True)
        number = jnp.maximum(jnp.sum(known), 1)
        sides = jnp.where(known, sides, 0.0)
        spread = jnp.where(known, sides - jnp.sum(sides) / (2 * number), 0.0)
        std = jnp.sqrt(jnp.sum(spread**2) / (2 * number))
        share = (spread[0] - spread[1]) / (2 * jnp.where(std > 0, std, 1.0) * number)

        def move(mean: jax.Array, x: jax.Array) -> jax.Array:
            wide = x.astype(jnp.float32)
            noise = (wide[:pairs] - wide[pairs:]) / (2 * self.noise_std)
            step = self.learning_rate * jnp.tensordot(share, noise, axes=1, precision="highest")
            return (mean.astype(jnp.float32) + step).astype(mean.dtype)

        return state._replace(mean=jax.tree.map(move, state.mean, candidates))

    def converged(self, state: EggrollState) -> jax.Array:
        """Never: the noise stays as large as it was."""
        del state
        return jnp.bool_(False)
