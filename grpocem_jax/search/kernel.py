"""The kernel of a search: generations of a method as pure functions.

`advance` runs generations of a search: asking, scoring, telling and the convergence test, all on
the device and without returning to Python.  It is a pure function, so searches of many problems are
advanced by one call under `jax.vmap`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.search.base import Point, SearchMethod, State, needs, norm, rank_fitness
from grpocem_jax.search.spaces import Space, decode
from grpocem_jax.utils.devices import map_chunks
from grpocem_jax.utils.errors import InputError

FOLLOWED = ("mean", "best")

Fitness = Callable[[Offsets, Any, jax.Array], jax.Array]
"""``(adapter, batch, key) -> float32 []``, traceable. It may be a pytree, as `fitness.Likelihood`;
of a plain function, arrays that it closes over become constants of the program. A method
``scores`` with the same arguments that returns scores ``[N]`` and which of them count, bool
``[N]``, gives the gate more than the mean to judge by."""


class History(NamedTuple):
    """What happened in each generation, float32 ``[generations]``; NaN after the last one run.

    Attributes:
      best: largest fitness that is a number.
      mean: mean of the finite ones.
      std: root mean square of the search distribution's standard deviation; 0 for a method whose
        state has none.
      change: norm of the mean's move.
    """

    best: Any
    mean: Any
    std: Any
    change: Any


class Problem(NamedTuple):
    """What is searched for, and where: the argument of `advance` that may be vmapped.

    Attributes:
      fitness: a pytree that is called as `Fitness`.
      space: where; the search starts at its origin.
      batch: data for the fitness.
      key: PRNG key; generation ``g`` uses ``fold_in(key, g)``.
    """

    fitness: Any
    space: Space
    batch: Any
    key: jax.Array

    @classmethod
    def of(cls, fitness: Fitness, space: Space, batch: Any, key: jax.Array) -> "Problem":
        """A problem whose fitness may be any function, also one that is not a pytree."""
        if jax.tree_util.all_leaves([fitness]):
            fitness = jax.tree_util.Partial(fitness)
        return cls(fitness, space, batch, key)


def value(problem: Problem, point: Point, key: jax.Array) -> jax.Array:
    """The fitness of a point. Traceable.

    Raises:
      InputError: it is no single number.
    """
    found: jax.Array = problem.fitness(decode(problem.space, point), problem.batch, key)
    if getattr(found, "shape", None) != () and not isinstance(found, int | float):
        kind = f"shape {found.shape}" if hasattr(found, "shape") else type(found).__name__
        raise InputError(
            f"fitness: returned {kind} for a candidate; it must return one number, shape (), such "
            "as a mean."
        )
    return found


class SearchState(NamedTuple):
    """Where a search stands between generations; of `begin` and `advance`.

    Attributes:
      state: the method's own.
      generation: generations run; int32 ``[]``.
      best: the candidate of largest fitness so far, the origin before the first generation.
      best_fitness: its fitness; float32 ``[]``, -inf before the first.
      history: see `History`.
    """

    state: State
    generation: jax.Array
    best: Point
    best_fitness: jax.Array
    history: History


def begin(method: SearchMethod, problem: Problem, *, generations: int) -> SearchState:
    """The state of a search before its first generation. Traceable.

    Args:
      method: the method; static.
      problem: the problem.
      generations: how many there will be at most, which is the length of the history; static.
    """
    origin = problem.space.origin
    empty = jnp.full(generations, jnp.nan, jnp.float32)
    return SearchState(
        state=method.init(origin),
        generation=jnp.int32(0),
        best=jax.tree.map(jnp.asarray, origin),
        best_fitness=jnp.float32(-jnp.inf),
        history=History(*(empty,) * len(History._fields)),
    )


def advance(
    method: SearchMethod,
    problem: Problem,
    search: SearchState,
    limit: jax.Array | int,
    *,
    population_chunk: int = 0,
    mesh: Mesh | None = None,
) -> SearchState:
    """Runs generations until the method has converged or the search has had ``limit`` of them.

    Pure and traceable, so the searches of many problems may be advanced at once:

        def found(batch, key):
            problem = Problem.of(fitness, space, batch, key)
            search = begin(method, problem, generations=50)
            return advance(method, problem, search, 50).state.mean

        means = jax.jit(jax.vmap(found))(batches, keys)

    Each ends as it would by itself; the call takes as long as the one with the most generations.

    Args:
      method: the method; static.
      problem: the problem.
      search: of `begin` or `advance`, with the same method and problem.
      limit: generations in all, at most those that `begin` was given; int32 ``[]``.
      population_chunk: candidates scored at a time; 0 for all of them; static.
      mesh: devices among which the candidates are divided, see `grpocem_jax.utils.devices`; static.

    Returns:
      the state of the search after these generations.
    """
    size = method.population_size

    def unfinished(search: SearchState) -> jax.Array:
        return (search.generation < limit) & ~method.converged(search.state)

    def generation(search: SearchState) -> SearchState:
        ask_key, fitness_key = generation_keys(problem.key, search.generation)
        candidates = method.ask(ask_key, search.state)

        def score(point: Point) -> jax.Array:
            return value(problem, point, fitness_key)

        gradient = None
        if "gradient" in needs(method):
            # One at a time: a backward pass holds the activations of the forward pass.
            values, gradient = jax.lax.map(jax.value_and_grad(score), candidates)
        else:
            values = map_chunks(score, (candidates,), size=population_chunk or size, mesh=mesh)
        return told(method, search, ask_key, candidates, values, gradient)

    return jax.lax.while_loop(unfinished, generation, search)


def generation_keys(key: jax.Array, generation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of a generation: to ask with, and of the fitness of all its candidates."""
    ask, fitness = jax.random.split(jax.random.fold_in(key, generation))
    return ask, fitness


def told(
    method: SearchMethod,
    search: SearchState,
    ask_key: jax.Array,
    candidates: Point,
    fitness: jax.Array,
    gradient: Point | None = None,
) -> SearchState:
    """The search after a generation."""
    ranked = rank_fitness(fitness)
    told = {"gradient": gradient, "key": ask_key}
    told = {name: told[name] for name in needs(method)}
    state = method.tell(search.state, candidates, ranked, **told)
    winner = jnp.argmax(ranked)
    better = ranked[winner] > search.best_fitness
    moved = norm(jax.tree.map(jnp.subtract, state.mean, search.state.mean))
    record = _record(state, fitness, moved)
    return search._replace(
        state=state,
        generation=search.generation + 1,
        best=jax.tree.map(
            lambda x, old: jnp.where(better, x[winner], old), candidates, search.best
        ),
        best_fitness=jnp.maximum(ranked[winner], search.best_fitness),
        history=jax.tree.map(lambda h, x: h.at[search.generation].set(x), search.history, record),
    )


def _record(state: State, fitness: jax.Array, change: jax.Array) -> History:
    fitness = fitness.astype(jnp.float32)
    finite = jnp.isfinite(fitness)
    leaves = jax.tree.leaves(getattr(state, "std", None)) or [jnp.float32(0.0)]
    square = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves) / sum(x.size for x in leaves)
    return History(
        best=jnp.max(jnp.where(jnp.isnan(fitness), -jnp.inf, fitness)),
        mean=jnp.sum(jnp.where(finite, fitness, 0.0)) / jnp.sum(finite),
        std=jnp.sqrt(square),
        change=change,
    )


def followed(search: SearchState, returned: str) -> Point:
    """Where a search is, by one of `FOLLOWED`."""
    point: Point = search.best if returned == "best" else search.state.mean
    return point
