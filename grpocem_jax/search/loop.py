"""The search: the loop around a method, as a pure kernel and as a driver with a clock.

`advance` runs generations of a search: asking, scoring, telling and the convergence test, all on
the device and without returning to Python.  It is a pure function, so searches of many problems are
advanced by one call under `jax.vmap`.

`maximize` drives one search, `cross_fit` two on halves of the data that judge each other (`gate`):
they compile the kernel, and return to Python between chunks of generations only where a time budget
or a live view asks for it.  A fitness that judges in Python, such as the reward of completions
(`HostFitness`), goes through the same driver, a generation at a time.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.search import gate
from grpocem_jax.search.base import (
    Point,
    SearchMethod,
    State,
    check_method,
    needs,
    norm,
    rank_fitness,
)
from grpocem_jax.search.cem import CEM
from grpocem_jax.search.gradient import GradientAscent
from grpocem_jax.search.spaces import Space, decode
from grpocem_jax.utils import memory
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.devices import map_chunks
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, Processes

FOLLOWED = ("mean", "best")

Fitness = Callable[[Offsets, Any, jax.Array], jax.Array]
"""``(adapter, batch, key) -> float32 []``, traceable. It may be a pytree, as `fitness.Likelihood`;
of a plain function, arrays that it closes over become constants of the program. A method
``scores`` with the same arguments that returns scores ``[N]`` and which of them count, bool
``[N]``, gives the gate more than the mean to judge by."""


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


class History(NamedTuple):
    """What happened in each generation, float32 ``[generations]``; NaN after the last one run.

    Attributes:
      best: largest fitness.
      mean: mean fitness.
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


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
      offsets: the adapter of the point returned.
      final: the adapter that the search ended with, whatever the gate says of it.
      returned: "mean" or "best", or "start" where the gate let nothing pass.
      held_back_gain: gain of each half's point on the other half; 0 for the start, NaN of
        `maximize`, which has no gate.
      generations: how many were run; of two searches, by the longer.
      candidates: how many candidates the method scored, without those of the gate.
      converged: whether the method stopped before the generations were used up.
      history: the generations, arrays on the host, as long as there were generations; of two
        searches the mean.
      seconds: of the search, without compilation.
      compile_seconds: spent to compile, or to find the compiled program.
      population_chunk: candidates scored at a time in the end.
    """

    offsets: Offsets
    final: Offsets
    returned: str
    held_back_gain: float
    generations: int
    candidates: int
    converged: bool
    history: History
    seconds: float
    compile_seconds: float
    population_chunk: int


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
            return problem.fitness(decode(problem.space, point), problem.batch, fitness_key)

        gradient = None
        if "gradient" in needs(method):
            # One at a time: a backward pass holds the activations of the forward pass.
            values, gradient = jax.lax.map(jax.value_and_grad(score), candidates)
        else:
            values = map_chunks(score, (candidates,), size=population_chunk or size, mesh=mesh)
        return told(method, search, ask_key, candidates, values, gradient)

    return jax.lax.while_loop(unfinished, generation, search)


def maximize(
    method: SearchMethod,
    fitness: Fitness | HostFitness,
    space: Space,
    batch: Any,
    key: jax.Array,
    *,
    generations: int = 50,
    returned: str = "mean",
    population_chunk: int = 0,
    fit_memory: bool = False,
    mesh: Mesh | None = None,
    processes: Processes = ALONE,
    budget_s: float | None = None,
    on_chunk: Callable[[int, History], None] | None = None,
) -> SearchResult:
    """Searches a space for the adapter with the largest fitness.

    Generation ``g`` uses ``fold_in(key, g)``, all its candidates the same random numbers, so a
    search in chunks, or one that stops early, has the same generations as one in a piece.

    Args:
      method: the search method.
      fitness: what is maximised, in JAX or in Python.
      space: where; the search starts at its origin.
      batch: data for the fitness.
      key: PRNG key; consumed.
      generations: at most so many.
      returned: which point is returned: "mean", or "best" ever scored.
      population_chunk: candidates scored at a time; 0 for all of them.
      fit_memory: whether ``population_chunk`` is halved where device memory runs out, and the
        generations that did not fit are tried again.
      mesh: devices among which the candidates are divided, see `utils.devices`; where the fitness
        has parameters, they lie on each of them.
      processes: those among which the candidates are divided, each with a mesh of its own; all
        call this with the same arguments, and have the same result.
      budget_s: seconds, by the clock of process 0; the search stops at the first chance after
        them. Chunks grow and shrink with the time that is left. Compilation does not count.
      on_chunk: called with the number of generations done and their history, after the first and
        at least every tenth of them; with a `HostFitness` after each.

    Raises:
      InputError: a setting out of range; a method that `check_method` refuses, or that needs a
        gradient of a `HostFitness`; scores on the host of another shape; out of device memory.
    """
    found = _Searches(
        method,
        fitness,
        space,
        [(batch, key)],
        returned=returned,
        population_chunk=population_chunk,
        fit_memory=fit_memory,
        mesh=mesh,
        processes=processes,
    )
    found.run(generations, budget_s, on_chunk)
    offsets = decode(space, found.point())
    return found.result(offsets, returned, math.nan)


def cross_fit(
    method: SearchMethod,
    fitness: Fitness | HostFitness,
    space: Space,
    halves: tuple[Any, Any],
    key: jax.Array,
    *,
    gate_z: float = 1.0,
    generations: int = 50,
    returned: str = "mean",
    population_chunk: int = 0,
    fit_memory: bool = False,
    mesh: Mesh | None = None,
    processes: Processes = ALONE,
    budget_s: float | None = None,
    on_chunk: Callable[[int, History], None] | None = None,
) -> SearchResult:
    """Searches by each half of some data, and returns the mean or the start, as `gate` has it.

    Args:
      method: as in `maximize`.
      fitness: as in `maximize`; of its ``scores`` the gate takes those of single tokens or samples.
      space: as in `maximize`.
      halves: data for the fitness, twice; of one shape, they are searched by one program.
      key: PRNG key; consumed. Each search has a key of its own, and all that is judged another.
      gate_z: standard errors that the gate takes off, at least 0.
      generations: at most so many of each search.
      returned: which point of each is followed: "mean", or "best" ever scored.
      population_chunk: as in `maximize`.
      fit_memory: as in `maximize`.
      mesh: as in `maximize`.
      processes: as in `maximize`.
      budget_s: seconds for both searches.
      on_chunk: as in `maximize`, with the mean of the two histories.

    Raises:
      InputError: as `maximize`.
    """
    if not gate_z >= 0:
        raise InputError(f"gate_z={gate_z}: must be at least 0.")
    *keys, gate_key = jax.random.split(key, 3)
    found = _Searches(
        method,
        fitness,
        space,
        list(zip(halves, keys, strict=True)),
        returned=returned,
        population_chunk=population_chunk,
        fit_memory=fit_memory,
        mesh=mesh,
        processes=processes,
    )
    found.run(generations, budget_s, on_chunk)
    verdict = gate.judge(*found.scores(halves[::-1], gate_key), gate_z)
    point, passed = gate.follow(verdict, found.point(), space.origin)
    return found.result(decode(space, point), returned if passed else "start", float(verdict.gain))


class _Searches:
    """One or more searches side by side, on data and with keys of their own."""

    def __init__(
        self,
        method: SearchMethod,
        fitness: Fitness | HostFitness,
        space: Space,
        parts: Sequence[tuple[Any, jax.Array]],
        *,
        returned: str,
        population_chunk: int,
        fit_memory: bool,
        mesh: Mesh | None,
        processes: Processes,
    ):
        if population_chunk < 0:
            raise InputError(f"population_chunk={population_chunk}: must be at least 0.")
        if returned not in FOLLOWED:
            raise InputError(f"returned={returned!r}: must be one of {', '.join(FOLLOWED)}.")
        if not isinstance(method, CEM | GradientAscent):
            check_method(method, space.origin)
        host = isinstance(fitness, HostFitness)
        if host and "gradient" in needs(method):
            raise InputError(
                f"method={type(method).__name__}: needs a gradient, which a fitness in Python has "
                "not; take a method without, such as CEM."
            )
        size = min(population_chunk or method.population_size, method.population_size)
        chunk = memory.population_chunk(size, lower=fit_memory)
        self.method, self.space, self.returned, self.chunk = method, space, returned, chunk
        self.processes = processes
        self.drivers: list[_OnHost | _OnDevice] = []
        for batch, key in parts:
            if isinstance(fitness, HostFitness):
                problem = Problem(None, space, batch, key)
                self.drivers.append(_OnHost(method, fitness, problem, chunk, fit_memory))
            else:
                problem = Problem.of(fitness, space, batch, key)
                divided = processes.count > 1 and "gradient" not in needs(method)
                kind = functools.partial(_Divided, processes) if divided else _OnDevice
                self.drivers.append(kind(method, problem, chunk, mesh))

    def run(
        self,
        generations: int,
        budget_s: float | None,
        on_chunk: Callable[[int, History], None] | None,
    ) -> None:
        """Runs the generations, or those for which there is time."""
        if generations < 1:
            raise InputError(f"generations={generations}: must be at least 1.")
        if budget_s is not None and not budget_s > 0:
            raise InputError(f"budget_s={budget_s}: must be above 0; leave it out for no budget.")
        clock = CompileClock.start()
        try:
            started = time.perf_counter()
            for driver in self.drivers:
                driver.prepare(generations)
            began, compiled = time.perf_counter(), clock.seconds

            def spent() -> float:
                return time.perf_counter() - began - (clock.seconds - compiled)

            stride = self.drivers[0].stride or generations
            self.states, done = [driver.begin(generations) for driver in self.drivers], 0
            while done < generations:
                limit = min(generations, done + stride)
                if budget_s is not None:
                    seconds = self.processes.first(spent)
                    if done and seconds >= budget_s:
                        break
                    # The first generation is the measure of the others.
                    affordable = int((budget_s - seconds) / (seconds / done)) if done else 1
                    limit = min(limit, done + max(1, affordable))
                if on_chunk is not None:
                    # The first by itself: how long one takes is then known.
                    limit = min(limit, done + max(1, generations // 10) if done else 1)
                self.states = [
                    driver.advance(state, limit)
                    for driver, state in zip(self.drivers, self.states, strict=True)
                ]
                done = max(self.generations)
                if on_chunk is not None:
                    on_chunk(done, self.history(done))
                if done < limit or self.converged:
                    break
            self.seconds = spent()
            self.compile_seconds = began - started + clock.seconds - compiled
        finally:
            clock.stop()

    @property
    def generations(self) -> list[int]:
        """How many each search has had."""
        return [int(state.generation) for state in self.states]

    @property
    def converged(self) -> bool:
        """Whether no search has anything left to do."""
        return all(bool(self.method.converged(state.state)) for state in self.states)

    def history(self, done: int) -> History:
        """The mean of the searches' histories, on the host."""
        return mean_history([_host_history(state.history, done) for state in self.states])

    def points(self) -> list[Point]:
        """Where each search is."""
        return [followed(state, self.returned) for state in self.states]

    def point(self) -> Point:
        """The mean of these points."""
        return mean_point(self.points())

    def scores(self, batches: Sequence[Any], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores of each search's point, `gate.scaled`, on other data, and which count.

        Args:
          batches: data for each search.
          key: PRNG key.

        Returns:
          float32 ``[4, N]`` and bool ``[4, N]`` with ``N`` scores of all batches.
        """
        found = [
            driver.scores(gate.scaled(point), batch, key)
            for driver, point, batch in zip(self.drivers, self.points(), batches, strict=True)
        ]
        values, present = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
        return values, present

    def result(self, offsets: Offsets, returned: str, gain: float) -> SearchResult:
        """The result with these offsets."""
        done = max(self.generations)
        return SearchResult(
            offsets=offsets,
            final=decode(self.space, self.point()),
            returned=returned,
            held_back_gain=gain,
            generations=done,
            candidates=sum(self.generations) * self.method.population_size,
            converged=self.converged,
            history=self.history(done),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            population_chunk=self.chunk.size,
        )


def followed(search: SearchState, returned: str) -> Point:
    """Where a search is, by one of `FOLLOWED`."""
    point: Point = search.best if returned == "best" else search.state.mean
    return point


def mean_point(points: Sequence[Point]) -> Point:
    """The mean of the points of some searches; of one its own."""
    return jax.tree.map(lambda *x: sum(x) / len(x), *points) if len(points) > 1 else points[0]


def mean_history(histories: Sequence[History]) -> History:
    """The mean of histories of one length, on the host; of one itself."""
    if len(histories) == 1:
        return histories[0]
    return History(*(_mean_of_present(values) for values in zip(*histories, strict=True)))


def _mean_of_present(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of some arrays without what is NaN in one; NaN where it is in all."""
    stacked = np.stack(values)
    present = ~np.isnan(stacked)
    sums, count = np.where(present, stacked, 0).sum(0), present.sum(0)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan).astype(np.float32)


class _OnDevice:
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
        del generations
        return self.first

    def advance(self, state: SearchState, limit: int) -> SearchState:
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


class _Divided(_OnDevice):
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


class _OnHost:
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
        return begin(self.method, self.problem, generations=generations)

    def advance(self, state: SearchState, limit: int) -> SearchState:
        if int(state.generation) >= limit or bool(self.method.converged(state.state)):
            return state
        ask_key, fitness_key = generation_keys(self.problem.key, state.generation)
        candidates = _ask(ask_key, state.state, method=self.method)
        values = self._evaluate(
            self.fitness.function, candidates, self.problem.batch, fitness_key, self.chunk
        )
        present = ~np.isnan(values)
        fitness = np.where(present, values, 0).sum(-1) / np.maximum(present.sum(-1), 1)
        fitness = np.where(present.any(-1), fitness, np.nan)
        return _tell(self.method, state, ask_key, candidates, jnp.asarray(fitness))

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
        best=jnp.max(jnp.where(finite, fitness, -jnp.inf)),
        mean=jnp.sum(jnp.where(finite, fitness, 0.0)) / jnp.maximum(jnp.sum(finite), 1),
        std=jnp.sqrt(square),
        change=change,
    )


_begin = jax.jit(begin, static_argnames=("method", "generations"))
_advance = jax.jit(advance, static_argnames=("method", "population_chunk", "mesh"))
_tell = jax.jit(told, static_argnames="method")


@functools.partial(jax.jit, static_argnames="method")
def _ask(key: jax.Array, state: State, *, method: SearchMethod) -> Point:
    return method.ask(key, state)


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def _fitness(
    problem: Problem, points: Point, key: jax.Array, *, size: int, mesh: Mesh | None
) -> jax.Array:
    """The fitness of points ``[C, ...]``, so many at a time, float ``[C]``."""

    def score(point: Point) -> jax.Array:
        return problem.fitness(decode(problem.space, point), problem.batch, key)

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
        offsets = decode(problem.space, point)
        if function is None:
            value = problem.fitness(offsets, problem.batch, problem.key)
            return value[None].astype(jnp.float32), jnp.ones(1, bool)
        values, counts = function(offsets, problem.batch, problem.key)
        return values.astype(jnp.float32), counts

    return jax.lax.map(one, points, batch_size=size)


def _host_history(history: History, done: int) -> History:
    return jax.tree.map(lambda x: x[:done], jax.device_get(history))
