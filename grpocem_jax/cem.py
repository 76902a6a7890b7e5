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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpocem_jax.devices import map_chunks
from grpocem_jax.errors import InputError

Point = Any
"""A pytree of float arrays: a point of the space that is searched."""


class CEMState(NamedTuple):
    """What `CEM` knows between generations; every `Point` has the start's structure and dtypes.

    Attributes:
      mean: mean of the candidates to come.
      std: their standard deviations.
      best: the best candidate ever seen, the start before the first generation.
      best_fitness: its fitness less the anchor penalty; float32 ``[]``, -inf before the first.
      start: where the search began, to which the anchor holds.
      generation: generations told; int32 ``[]``.
      change: norm of the mean's last move; float32 ``[]``, inf before the first generation and
        after one without elites.
    """

    mean: Point
    std: Point
    best: Point
    best_fitness: jax.Array
    start: Point
    generation: jax.Array
    change: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class CEM:
    """The method's settings, and its pure functions of a `CEMState`.

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
      population_size: candidates a generation, at least 2.
      elite_ratio: share of them that are elites, in (0, 1]; their number is rounded down.
      noise_std: initial standard deviation, above 0.
      momentum: weight of the old mean, in [0, 1]. At 1 the distribution never moves and ``best``
        is plain random search.
      std_momentum: weight of the old standard deviation; None takes ``momentum``.
      min_std: the standard deviation falls no lower.
      mirrored: candidates come in pairs ``mean + e, mean - e``.
      evaluate_mean: the first candidate of each generation is the mean itself.
      anchor: ``anchor * |x - start|^2`` is taken off the fitness.
      common_random_numbers: a fitness that draws random numbers gets the same key for all
        candidates of a generation.
      threshold: the search has converged when the mean moves by less than this.

    Raises:
      InputError: a value outside its range.
    """

    population_size: int = 100
    elite_ratio: float = 0.3
    noise_std: float = 0.3
    momentum: float = 0.3
    std_momentum: float | None = None
    min_std: float = 0.0
    mirrored: bool = False
    evaluate_mean: bool = False
    anchor: float = 0.0
    common_random_numbers: bool = True
    threshold: float = 5e-3

    def __post_init__(self) -> None:
        std_momentum = self.momentum if self.std_momentum is None else self.std_momentum
        for name, holds, needed in (
            ("population_size", self.population_size >= 2, "at least 2"),
            ("elite_ratio", 0 < self.elite_ratio <= 1, "above 0 and at most 1"),
            ("noise_std", self.noise_std > 0, "above 0"),
            ("momentum", 0 <= self.momentum <= 1, "from 0 to 1"),
            ("std_momentum", 0 <= std_momentum <= 1, "from 0 to 1"),
            ("min_std", self.min_std >= 0, "at least 0"),
            ("anchor", self.anchor >= 0, "at least 0"),
            ("threshold", self.threshold >= 0, "at least 0"),
        ):
            if not holds:
                raise InputError(f"cem.{name}={getattr(self, name)}: must be {needed}.")
        if self.num_elites == 0:
            raise InputError(
                f"cem.elite_ratio={self.elite_ratio} of cem.population_size="
                f"{self.population_size} leaves no elite; raise one of them."
            )

    @property
    def num_elites(self) -> int:
        """How many candidates of a generation are elites."""
        # The small term undoes products such as 0.29 * 100 = 28.999999999999996.
        return math.floor(self.elite_ratio * self.population_size + 1e-9)

    def init(self, start: Point) -> CEMState:
        """The state before the first generation: mean at ``start``, all deviations equal."""
        start = jax.tree.map(jnp.asarray, start)
        return CEMState(
            mean=start,
            std=jax.tree.map(lambda x: jnp.full_like(x, self.noise_std), start),
            best=start,
            best_fitness=jnp.float32(-jnp.inf),
            start=start,
            generation=jnp.int32(0),
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
        size = self.population_size
        drawn = -(-size // 2) if self.mirrored else size
        noise = []
        for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            e = jax.random.normal(leaf_key, (drawn, *leaf.shape), leaf.dtype)
            if self.mirrored:
                e = jnp.concatenate([e, -e])[:size]
            noise.append(e.at[0].set(0.0) if self.evaluate_mean else e)
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
        """
        fitness = jnp.where(jnp.isnan(fitness), -jnp.inf, fitness).astype(jnp.float32)
        if self.anchor:
            moved = jax.tree.map(lambda x, start: x - start[None], candidates, state.start)
            fitness = fitness - self.anchor * jax.vmap(_square)(moved)
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
        winner = jnp.argmax(fitness)
        better = fitness[winner] > state.best_fitness
        best = jax.tree.map(
            lambda old, x: jnp.where(better, x[winner], old), state.best, candidates
        )
        return CEMState(
            mean=mean,
            std=std,
            best=best,
            best_fitness=jnp.maximum(fitness[winner], state.best_fitness),
            start=state.start,
            generation=state.generation + 1,
            change=jnp.where(
                any_elite, jnp.sqrt(_square(jax.tree.map(jnp.subtract, mean, state.mean))), jnp.inf
            ),
        )

    def converged(self, state: CEMState) -> jax.Array:
        """Whether the mean moved by less than ``threshold`` in the last generation; bool ``[]``.

        A mean that cannot move, at momentum 1, never converges.
        """
        return (state.change < self.threshold) & (self.momentum < 1)

    def step(
        self,
        key: jax.Array,
        state: CEMState,
        fitness: Callable[[Point, jax.Array], jax.Array],
        chunk: int = 0,
        mesh: Mesh | None = None,
    ) -> tuple[CEMState, jax.Array]:
        """One generation with a traceable fitness.

        Args:
          key: PRNG key; consumed.
          state: the state.
          fitness: ``(point, key) -> float []``, vmapped over the candidates.
          chunk: candidates scored at a time; 0 scores all at once.
          mesh: devices among which the candidates are divided, see `grpocem_jax.devices`.

        Returns:
          the next state and the fitness of the candidates, float32 ``[population_size]``.
        """
        ask_key, fitness_key = jax.random.split(key)
        candidates = self.ask(ask_key, state)
        size = self.population_size
        if self.common_random_numbers:
            keys = jnp.broadcast_to(fitness_key, (size,))
        else:
            keys = jax.random.split(fitness_key, size)
        scores = map_chunks(fitness, (candidates, keys), size=chunk or size, mesh=mesh)
        return self.tell(state, candidates, scores), scores


class GradientState(NamedTuple):
    """What `GradientAscent` knows between steps; the fields that `CEMState` has mean the same."""

    mean: Point
    best: Point
    best_fitness: jax.Array
    generation: jax.Array
    change: jax.Array
    moments: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent:
    """Adam (Kingma and Ba 2014, arXiv 1412.6980) on a differentiable fitness, steps as generations.

    The alternative to `CEM` where there is a gradient, in the same form: a step is one generation
    of one candidate, the current point.

    Attributes:
      learning_rate: of Adam, above 0.

    Raises:
      InputError: a learning rate that is not above 0.
    """

    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(f"cem.learning_rate={self.learning_rate}: must be above 0.")

    population_size = 1

    def init(self, start: Point) -> GradientState:
        """The state before the first step."""
        start = jax.tree.map(jnp.asarray, start)
        moments = optax.adam(self.learning_rate).init(start)
        low, far = jnp.float32(-jnp.inf), jnp.float32(jnp.inf)
        return GradientState(start, start, low, jnp.int32(0), far, moments)

    def converged(self, state: GradientState) -> jax.Array:
        """Never: a gradient run has a length, not an end."""
        return state.generation < 0

    def step(
        self,
        key: jax.Array,
        state: GradientState,
        fitness: Callable[[Point, jax.Array], jax.Array],
        chunk: int = 0,
        mesh: Mesh | None = None,
    ) -> tuple[GradientState, jax.Array]:
        """One step uphill; arguments and results as in `CEM.step`, fitness of the point left.

        Where the fitness or its gradient is not finite, the point and Adam's moments stay as they
        are, and the change is inf.
        """
        del chunk, mesh  # one candidate
        value, gradient = jax.value_and_grad(fitness)(state.mean, key)
        updates, moments = optax.adam(self.learning_rate).update(
            jax.tree.map(jnp.negative, gradient), state.moments
        )
        leaves = jax.tree.leaves((value, gradient))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
        value = value.astype(jnp.float32)
        better = value > state.best_fitness  # never of NaN
        best = jax.tree.map(lambda x, old: jnp.where(better, x, old), state.mean, state.best)
        moved = (optax.apply_updates(state.mean, updates), moments)
        mean, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), moved, (state.mean, state.moments)
        )
        state = GradientState(
            mean=mean,
            best=best,
            best_fitness=jnp.where(better, value, state.best_fitness),
            generation=state.generation + 1,
            change=jnp.where(finite, jnp.sqrt(_square(updates)), jnp.inf),
            moments=moments,
        )
        return state, value[None]


def _elite_weights(fitness: jax.Array, num_elites: int) -> jax.Array:
    """How much of an elite each candidate is, float32 ``[P]`` in [0, 1], see `CEM.tell`."""
    last = jax.lax.top_k(fitness, num_elites)[0][-1]
    above, tied = fitness > last, fitness == last
    left = num_elites - jnp.sum(above)
    weights = jnp.where(above, 1.0, jnp.where(tied, left / jnp.sum(tied), 0.0))
    return jnp.where(jnp.isneginf(fitness), 0.0, weights)


def _square(point: Point) -> jax.Array:
    return jnp.asarray(
        sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(point)), jnp.float32
    )
