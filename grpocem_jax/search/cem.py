"""The Cross-Entropy Method for any pytree and any fitness, as ``init``, ``ask`` and ``tell``.

The report's eqs. 8 and 9; Rubinstein 1999 and de Boer et al. 2005 (Annals of Operations Research
134).  A generation draws candidates from a diagonal normal distribution, scores them, and moves
mean and standard deviation toward the best of them, the elites:

    x_i ~ N(mean, diag(std^2)),  i = 1..population_size
    mean' = g mean + (1 - g) mean(elites)                                            (eq. 8)
    std'  = g std  + (1 - g) std(elites)                                             (eq. 9)

with ``g`` the momentum, the weight of the old value, and the population standard deviation
(ddof 0).  Fitness is maximised.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.search.base import Point, check_start, norm
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, at_least, check, count, setting, share, within


class CEMState(NamedTuple):
    """What `CEM` knows between generations; every `Point` has the start's structure and dtypes.

    Attributes:
      mean: mean of the candidates to come.
      std: their standard deviations.
      change: norm of the mean's last move; float32 ``[]``, inf before the first generation and
        after one without elites.
    """

    mean: Point
    std: Point
    change: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class CEM:
    """The Cross-Entropy Method: its settings, and its pure functions of a `CEMState`.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([1.0, -2.0, 0.5])
    >>> method = CEM(population_size=50, momentum=0.0, std_momentum=0.7)
    >>> state = method.init(jnp.zeros(3))
    >>> for key in jax.random.split(jax.random.key(0), 40):
    ...     candidates = method.ask(key, state)
    ...     state = method.tell(state, candidates, -jnp.sum((candidates - target[None]) ** 2, -1))
    >>> bool(jnp.allclose(state.mean, target, atol=1e-3))
    True

    The defaults are the report's.  Records compare by value, so one may be a static argument of a
    jitted function.

    Attributes:
      population_size: candidates of a generation; also of `eggroll` and `evosax:NAME`.
      elite_ratio: share of them that are elites, in (0, 1]; their number is rounded down.
      noise_std: standard deviation of the first generation; also of `eggroll` and `evosax:NAME`.
      momentum: weight of the old mean, in [0, 1]. At 1 the mean never moves; with ``std_momentum``
        at 1 too, or None, neither does the deviation, and the best candidate of a search is that of
        random search.
      std_momentum: weight of the old standard deviation; None takes ``momentum``.
      min_std: the standard deviation falls no lower.
      threshold: the search has converged when the mean moves by less than this.

    Raises:
      InputError: a value outside its range.
    """

    population_size: int = setting(allowed=count(2), default=100)
    elite_ratio: float = setting(allowed=share(), default=0.3)
    noise_std: float = setting(allowed=above(0), default=0.3)
    momentum: float = setting(allowed=within(0, 1), default=0.3)
    std_momentum: float | None = setting(allowed=within(0, 1), default=None)
    min_std: float = setting(allowed=at_least(0), default=0.0)
    threshold: float = setting(allowed=at_least(0), default=5e-3)

    def __post_init__(self) -> None:
        check(self)
        if self.num_elites == 0:
            raise InputError(
                f"elite_ratio={self.elite_ratio} of population_size={self.population_size} leaves "
                "no elite; raise one of them."
            )

    label = "CEM"

    @property
    def num_elites(self) -> int:
        """How many candidates of a generation are elites."""
        # The small term undoes products such as 0.29 * 100 = 28.999999999999996.
        return math.floor(self.elite_ratio * self.population_size + 1e-9)

    def init(self, start: Point) -> CEMState:
        """The state before the first generation: mean at ``start``, all deviations equal.

        Raises:
          InputError: a start without arrays, or with arrays that are not of floats.
        """
        start = check_start(start)
        return CEMState(
            mean=start,
            std=jax.tree.map(lambda x: jnp.full_like(x, self.noise_std), start),
            change=jnp.float32(jnp.inf),
        )

    def ask(self, key: jax.Array, state: CEMState) -> Point:
        """Draws the candidates of a generation.

        Args:
          key: PRNG key; consumed.
          state: the state.

        Returns:
          a `Point` whose arrays have a leading axis ``population_size``.
        """
        leaves, structure = jax.tree.flatten(state.mean)
        noise = [
            jax.random.normal(leaf_key, (self.population_size, *leaf.shape), leaf.dtype)
            for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
        ]
        return jax.tree.map(
            lambda mean, std, e: mean[None] + std[None] * e,
            state.mean,
            state.std,
            jax.tree.unflatten(structure, noise),
        )

    def tell(self, state: CEMState, candidates: Point, fitness: jax.Array) -> CEMState:
        """Moves the distribution toward the elites.

        Candidates that tie with the last elite share its places in equal parts, so the result does
        not depend on the order of candidates, and with all fitness equal the distribution stays
        where it is but for chance.  NaN counts as -inf, and a candidate at -inf is never an elite;
        without any elite mean and deviation stay as they are.

        Args:
          state: the state that was asked.
          candidates: what `ask` returned.
          fitness: float ``[population_size]``.

        Returns:
          the next state, with the same shapes and dtypes.

        Raises:
          InputError: fitness of another shape.
        """
        fitness = jnp.asarray(fitness)
        if fitness.shape != (self.population_size,):
            raise InputError(
                f"fitness of shape {fitness.shape}: must have one value for each of "
                f"population_size={self.population_size} candidates, shape "
                f"({self.population_size},)."
            )
        fitness = jnp.where(jnp.isnan(fitness), -jnp.inf, fitness).astype(jnp.float32)
        weights = _elite_weights(fitness, self.num_elites)
        total = jnp.sum(weights)
        any_elite = total > 0
        share = weights / jnp.where(any_elite, total, 1.0)
        std_momentum = self.momentum if self.std_momentum is None else self.std_momentum

        def average(x: jax.Array) -> jax.Array:
            return jnp.tensordot(share.astype(x.dtype), x, axes=1, precision="highest")

        def move_mean(mean, x):
            new = self.momentum * mean + (1 - self.momentum) * average(x)
            return jnp.where(any_elite, new, mean)

        def move_std(std, x):
            spread = jnp.sqrt(average((x - average(x)[None]) ** 2))
            new = jnp.maximum(std_momentum * std + (1 - std_momentum) * spread, self.min_std)
            return jnp.where(any_elite, new, std)

        mean = jax.tree.map(move_mean, state.mean, candidates)
        std = jax.tree.map(move_std, state.std, candidates)
        change = norm(jax.tree.map(jnp.subtract, mean, state.mean))
        return CEMState(mean, std, jnp.where(any_elite, change, jnp.inf))

    def converged(self, state: CEMState) -> jax.Array:
        """Whether the mean moved by less than ``threshold`` in the last generation; bool ``[]``.

        A mean that cannot move, at momentum 1, never converges.
        """
        return (state.change < self.threshold) & (self.momentum < 1)


def _elite_weights(fitness: jax.Array, num_elites: int) -> jax.Array:
    """How much of an elite each candidate is, float32 ``[P]`` in [0, 1], see `CEM.tell`."""
    last = jax.lax.top_k(fitness, num_elites)[0][-1]
    above, tied = fitness > last, fitness == last
    left = num_elites - jnp.sum(above)
    weights = jnp.where(above, 1.0, jnp.where(tied, left / jnp.sum(tied), 0.0))
    return jnp.where(jnp.isneginf(fitness), 0.0, weights)
