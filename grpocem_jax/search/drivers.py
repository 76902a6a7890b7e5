"""Drivers of a search: how the generations of one problem are run.

A traceable fitness is scored on the device, many generations in a program (`OnDevice`), or with the
candidates divided among processes (`Divided`).  One in Python (`HostFitness`), such as the reward
of completions, is asked for a generation at a time (`OnHost`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.search import gate, kernel
from grpocem_jax.search.base import Point, SearchMethod, State
from grpocem_jax.search.kernel import Problem, SearchState, generation_keys
from grpocem_jax.search.spaces import Space, decode
from grpocem_jax.utils import memory
from grpocem_jax.utils.devices import map_chunks
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import Processes
from grpocem_jax.utils.statistics import mean_of_present


@dataclasses.dataclass(frozen=True, eq=False)
class HostFitness:
    """A fitness in Python, such as the reward of decoded completions.

    Attributes:
      function: ``(adapters, batch, key) -> float [C, N]`` for adapters with a leading axis ``C``:
        ``N`` scores of each, whose mean is its fitness, NaN where there is none. All candidates of
        a generation get the same key.
      scores: the same for the gate, which may look more closely; None takes ``function``.
    """

    function: Callable[[Offsets, Any, jax.Array], np.ndarray]
    scores: Callable[[Offsets, Any, jax.Array], np.ndarray] | None = None


class OnDevice:
    """Generations of a traceable fitness, as many in a program as the limit says."""

    stride = 0

    def __init__(
        self, method: SearchMethod, problem: Problem, chunk: memory.Chunk, mesh: Mesh | None
    ):
        self.method, self.problem, self.chunk, self.mesh = method, problem, chunk, mesh

    def prepare(self, generations: int) -> None:
        """Compiles the program by running none of the generations."""
        self.first = self.advance(_begin(self.method, self.problem, generations=generations), 0)

    def begin(self, generations: int) -> SearchState:
        """The state that `prepare` ended with."""
        del generations
        return self.first

    def advance(self, state: SearchState, limit: int) -> SearchState:
        """The state after ``limit`` generations in all, or fewer where the method has converged."""

        def attempt(size: int) -> SearchState:
            done = _advance(
                self.method,
                self.problem,
                state,
                jnp.int32(limit),
                population_chunk=size,
                mesh=self.mesh,
            )
            return jax.block_until_ready(done)

        return self.chunk.run(attempt)

    def scores(self, points: Point, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores of some points on other data, and which count, ``[C, N]``."""
        count = len(jax.tree.leaves(points)[0])
        return _scores(
            self.problem._replace(batch=batch, key=key), points, size=min(count, self.chunk.size)
        )


class Divided(OnDevice):
    """Generations of a traceable fitness whose candidates are divided among processes.

    Each asks for all candidates, scores its own, and tells the method the fitness of all; only that
    goes from one to another.
    """

    def __init__(
        self,
        processes: Processes,
        method: SearchMethod,
        problem: Problem,
        chunk: memory.Chunk,
        mesh: Mesh | None,
    ):
        super().__init__(method, problem, chunk, mesh)
        self.processes = processes

    def advance(self, state: SearchState, limit: int) -> SearchState:
        """As `OnDevice.advance`; all processes call it together."""
        while int(state.generation) < limit and not bool(self.method.converged(state.state)):
            ask_key, fitness_key = generation_keys(self.problem.key, state.generation)
            candidates = _ask(ask_key, state.state, method=self.method)
            values = self._score(candidates, fitness_key)
            state = _tell(self.method, state, ask_key, candidates, jnp.asarray(values))
        return state

    def _score(self, candidates: Point, key: jax.Array) -> np.ndarray:
        """The fitness of all candidates, of which this process computes its own."""

        def of_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
            points = jax.tree.map(lambda x: x[rows], candidates)

            def attempt(size: int) -> np.ndarray:
                size = min(size, len(rows))
                return np.asarray(_fitness(self.problem, points, key, size=size, mesh=self.mesh))

            return {"fitness": self.chunk.run(attempt)}

        found = self.processes.divided(self.method.population_size, of_rows)
        return found["fitness"]


class OnHost:
    """Generations of a fitness in Python, one at a time."""

    stride = 1

    def __init__(
        self,
        method: SearchMethod,
        fitness: HostFitness,
        problem: Problem,
        chunk: memory.Chunk,
        fit_memory: bool,
    ):
        self.method, self.problem, self.fitness, self.chunk = method, problem, fitness, chunk
        size = min(chunk.size, 1 + len(gate.SCALES))
        self.few = memory.population_chunk(size, lower=fit_memory)

    def prepare(self, generations: int) -> None:
        """Nothing: the first generation compiles what it needs."""

    def begin(self, generations: int) -> SearchState:
        """The state before the first generation."""
        return kernel.begin(self.method, self.problem, generations=generations)

    def advance(self, state: SearchState, limit: int) -> SearchState:
        """The state after one more generation, if there is one left."""
        if int(state.generation) >= limit or bool(self.method.converged(state.state)):
            return state
        ask_key, fitness_key = generation_keys(self.problem.key, state.generation)
        candidates = _ask(ask_key, state.state, method=self.method)
        values = self._evaluate(
            self.fitness.function, candidates, self.problem.batch, fitness_key, self.chunk
        )
        fitness = jnp.asarray(mean_of_present(values))
        return _tell(self.method, state, ask_key, candidates, fitness)

    def scores(self, points: Point, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores of some points on other data, and which count, ``[C, N]``."""
        function = self.fitness.scores or self.fitness.function
        scores = self._evaluate(function, points, batch, key, self.few)
        return jnp.asarray(np.nan_to_num(scores)), jnp.asarray(~np.isnan(scores))

    def _evaluate(
        self, function: Any, points: Point, batch: Any, key: jax.Array, chunk: memory.Chunk
    ) -> np.ndarray:
        """Scores of points, float32 ``[C, N]``, so many at a time."""
        adapters = _decode_many(self.problem.space, points)
        count = len(jax.tree.leaves(adapters)[0])

        def attempt(size: int) -> np.ndarray:
            size = min(size, count)
            found = []
            for start in range(0, count, size):
                # The last chunk repeats its last candidate: one compiled shape.
                rows = np.minimum(np.arange(start, start + size), count - 1)
                part = jax.tree.map(lambda x, rows=rows: x[rows], adapters)
                scores = _host_scores(function(part, batch, key), size)
                found.append(scores[: min(size, count - start)])
            return np.concatenate(found)

        return chunk.run(attempt)


def _host_scores(returned: Any, count: int) -> np.ndarray:
    try:
        scores = np.asarray(returned, np.float32)
    except (TypeError, ValueError):
        scores = np.empty((), np.float32)
    if scores.ndim not in (1, 2) or len(scores) != count or scores.size == 0:
        what = f"an array of shape {scores.shape}" if scores.ndim else repr(returned)[:80]
        raise InputError(
            f"fitness: returned {what} for {count} adapters; it must return an array of floats of "
            f"shape ({count}, N), with N scores of each."
        )
    return scores if scores.ndim == 2 else scores[:, None]


_begin = jax.jit(kernel.begin, static_argnames=("method", "generations"))
_advance = jax.jit(kernel.advance, static_argnames=("method", "population_chunk", "mesh"))
_tell = jax.jit(kernel.told, static_argnames="method")


@functools.partial(jax.jit, static_argnames="method")
def _ask(key: jax.Array, state: State, *, method: SearchMethod) -> Point:
    return method.ask(key, state)


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def _fitness(
    problem: Problem, points: Point, key: jax.Array, *, size: int, mesh: Mesh | None
) -> jax.Array:
    """The fitness of points ``[C, ...]``, so many at a time, float ``[C]``."""

    def score(point: Point) -> jax.Array:
        return kernel.value(problem, point, key)

    return map_chunks(score, (points,), size=size, mesh=mesh)


@jax.jit
def _decode_many(space: Space, points: Point) -> Offsets:
    return jax.vmap(decode, in_axes=(None, 0))(space, points)


@functools.partial(jax.jit, static_argnames="size")
def _scores(problem: Problem, points: Point, *, size: int) -> tuple[jax.Array, jax.Array]:
    """Scores of points ``[C, ...]`` by the fitness's ``scores`` where it has them, and which count.

    Returns:
      float32 ``[C, N]`` and bool ``[C, N]``.
    """
    owner = problem.fitness
    # A function that is not a pytree was wrapped in one.
    owner = owner.func if isinstance(owner, jax.tree_util.Partial) else owner
    function = getattr(owner, "scores", None)

    def one(point: Point) -> tuple[jax.Array, jax.Array]:
        if function is None:
            value = kernel.value(problem, point, problem.key)
            return jnp.asarray(value, jnp.float32)[None], jnp.ones(1, bool)
        offsets = decode(problem.space, point)
        values, counts = function(offsets, problem.batch, problem.key)
        return values.astype(jnp.float32), counts

    return jax.lax.map(one, points, batch_size=size)
