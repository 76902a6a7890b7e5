"""The search: the loop around a method, as a pure kernel and as a driver with a clock.

`advance` runs generations of a search: asking, scoring, telling, the convergence test and the gate,
all on the device and without returning to Python.  It is a pure function, so searches of many
problems are advanced by one call under `jax.vmap`.

`maximize` drives one search: it compiles the kernel, and returns to Python between chunks of
generations only where a time budget or a live view asks for it.  A fitness that judges in Python,
such as the reward of completions (`HostFitness`), goes through the same driver, a generation at a
time.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
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
      held_back: best lower bound of the gain on held-back text among this generation's points.
    """

    best: Any
    mean: Any
    std: Any
    change: Any
    held_back: Any


class Problem(NamedTuple):
    """What is searched for, and where: the argument of `advance` that may be vmapped.

    Attributes:
      fitness: a pytree that is called as `Fitness`.
      space: where; the search starts at its origin.
      batch: data for the fitness.
      key: PRNG key; generation ``g`` uses ``fold_in(key, g)``, the gate the one after the last.
      held_back: data for the gate, in the form of ``batch``; None for no gate.
      gate_z: standard errors that the gate takes off; float32 ``[]``.
    """

    fitness: Any
    space: Space
    batch: Any
    key: jax.Array
    held_back: Any = None
    gate_z: Any = 1.0

    @classmethod
    def of(
        cls,
        fitness: Fitness,
        space: Space,
        batch: Any,
        key: jax.Array,
        *,
        held_back: Any = None,
        gate_z: float = 1.0,
    ) -> "Problem":
        """A problem whose fitness may be any function, also one that is not a pytree."""
        if jax.tree_util.all_leaves([fitness]):
            fitness = jax.tree_util.Partial(fitness)
        return cls(fitness, space, batch, key, held_back, jnp.float32(gate_z))


class SearchState(NamedTuple):
    """Where a search stands between generations; of `begin` and `advance`.

    Attributes:
      state: the method's own.
      generation: generations run; int32 ``[]``.
      best: the candidate of largest fitness so far, the origin before the first generation.
      best_fitness: its fitness; float32 ``[]``, -inf before the first.
      chosen: the gate's choice so far.
      start_scores: scores of the start on held-back data and which count; None without a gate.
      history: see `History`.
    """

    state: State
    generation: jax.Array
    best: Point
    best_fitness: jax.Array
    chosen: gate.Chosen
    start_scores: Any
    history: History


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
      offsets: the adapter of the point returned.
      final: the adapter that the search ended with, whatever the gate says of it.
      returned: "mean" or "best", or "start" where the gate let nothing pass.
      held_back_gain: its gain on held-back text; 0 for the start, NaN without a gate.
      generations: how many were run.
      candidates: how many candidates the method scored, without those of the gate.
      converged: whether the method stopped before the generations were used up.
      history: the generations, arrays on the host, as long as there were generations.
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
    scores = None
    if problem.held_back is not None:
        key = jax.random.fold_in(problem.key, generations)
        scores = _scores(problem, problem.space.origin, key)
    return _first(method, problem.space.origin, scores, generations)


def advance(
    method: SearchMethod,
    problem: Problem,
    search: SearchState,
    limit: jax.Array | int,
    *,
    returned: str = "mean",
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
      returned: the point that the gate follows, "mean" or "best"; static.
      population_chunk: candidates scored at a time; 0 for all of them; static.
      mesh: devices among which the candidates are divided, see `grpocem_jax.utils.devices`; static.

    Returns:
      the state of the search after these generations.
    """
    size = method.population_size
    # The key after those of the generations.
    gate_key = jax.random.fold_in(problem.key, len(search.history.best))
    parts = 0 < population_chunk < size
    gate_chunk = min(len(gate.SCALES), population_chunk) if parts else len(gate.SCALES)

    def unfinished(search: SearchState) -> jax.Array:
        return (search.generation < limit) & ~method.converged(search.state)

    def generation(search: SearchState) -> SearchState:
        ask_key, fitness_key = _keys(problem.key, search.generation)
        candidates = method.ask(ask_key, search.state)

        def score(point: Point) -> jax.Array:
            return problem.fitness(decode(problem.space, point), problem.batch, fitness_key)

        gradient = None
        if "gradient" in needs(method):
            # One at a time: a backward pass holds the activations of the forward pass.
            values, gradient = jax.lax.map(jax.value_and_grad(score), candidates)
        else:
            values = map_chunks(score, (candidates,), size=population_chunk or size, mesh=mesh)
        search = _told(method, search, ask_key, candidates, values, gradient)
        if problem.held_back is None:
            return search
        points = gate.scaled(_followed(search, returned))
        own = jax.lax.map(
            lambda point: _scores(problem, point, gate_key), points, batch_size=gate_chunk
        )
        return _judged(search, points, own, problem.gate_z)

    return jax.lax.while_loop(unfinished, generation, search)


def maximize(
    method: SearchMethod,
    fitness: Fitness | HostFitness,
    space: Space,
    batch: Any,
    key: jax.Array,
    *,
    generations: int = 50,
    held_back: Any = None,
    gate_z: float = 1.0,
    returned: str = "mean",
    population_chunk: int = 0,
    fit_memory: bool = False,
    mesh: Mesh | None = None,
    budget_s: float | None = None,
    on_chunk: Callable[[int, History], None] | None = None,
) -> SearchResult:
    """Searches a space for the adapter with the largest fitness.

    Generation ``g`` uses ``fold_in(key, g)``, all its candidates the same random numbers, and the
    gate those of one key, so a search in chunks, or one that stops early, has the same generations
    as one in a piece.

    Args:
      method: the search method.
      fitness: what is maximised, in JAX or in Python.
      space: where; the search starts at its origin.
      batch: data for the fitness.
      key: PRNG key; consumed.
      generations: at most so many.
      held_back: data for the gate, in the form of ``batch``; None returns what the search ends
        with.
      gate_z: standard errors that the gate takes off, at least 0.
      returned: which point is followed and returned: "mean", or "best" ever scored.
      population_chunk: candidates scored at a time; 0 for all of them.
      fit_memory: whether ``population_chunk`` is halved where device memory runs out, and the
        generations that did not fit are tried again.
      mesh: devices among which the candidates are divided, see `utils.devices`; where the fitness
        has parameters, they lie on each of them.
      budget_s: seconds; the search stops at the first chance after them. Chunks grow and shrink
        with the time that is left. Compilation does not count.
      on_chunk: called with the number of generations done and their history, after the first and
        at least every tenth of them; with a `HostFitness` after each.

    Returns:
      `SearchResult`; with the gate its adapter may be the start.

    Raises:
      InputError: a setting out of range; a method that `check_method` refuses, or that needs a
        gradient of a `HostFitness`; scores on the host of another shape; out of device memory.
    """
    _check(generations, gate_z, returned, budget_s, population_chunk)
    if not isinstance(method, CEM | GradientAscent):
        check_method(method, space.origin)
    if isinstance(fitness, HostFitness) and "gradient" in needs(method):
        raise InputError(
            f"method={type(method).__name__}: needs a gradient, which a fitness in Python has not; "
            "take a method without, such as CEM."
        )
    size = min(population_chunk or method.population_size, method.population_size)
    chunk = memory.population_chunk(size, lower=fit_memory)
    driver: _OnHost | _OnDevice
    if isinstance(fitness, HostFitness):
        problem = Problem(None, space, batch, key, held_back, jnp.float32(gate_z))
        driver = _OnHost(method, fitness, problem, returned, chunk, fit_memory)
    else:
        problem = Problem.of(fitness, space, batch, key, held_back=held_back, gate_z=gate_z)
        driver = _OnDevice(method, problem, returned, chunk, mesh)

    clock = CompileClock.start()
    try:
        started = time.perf_counter()
        driver.prepare(generations)
        began, compiled = time.perf_counter(), clock.seconds

        def spent() -> float:
            return time.perf_counter() - began - (clock.seconds - compiled)

        state, done = driver.begin(generations), 0
        while done < generations:
            limit = min(generations, done + (driver.stride or generations))
            if budget_s is not None:
                seconds = spent()
                if done and seconds >= budget_s:
                    break
                # The first generation is the measure of the others.
                affordable = int((budget_s - seconds) / (seconds / done)) if done else 1
                limit = min(limit, done + max(1, affordable))
            if on_chunk is not None:
                # The first by itself: how long one takes is then known.
                limit = min(limit, done + max(1, generations // 10) if done else 1)
            state = driver.advance(state, limit)
            done = int(state.generation)
            if on_chunk is not None:
                on_chunk(done, _host_history(state.history, done))
            if done < limit or bool(method.converged(state.state)):
                break
        seconds = spent()
        compile_seconds = began - started + clock.seconds - compiled
    finally:
        clock.stop()
    final = _followed(state, returned)
    point, gain = final, math.nan
    if held_back is not None:
        point, gain = state.chosen.point, float(state.chosen.gain)
        returned = returned if float(state.chosen.bound) > 0 else "start"
    return SearchResult(
        offsets=decode(space, point),
        final=decode(space, final),
        returned=returned,
        held_back_gain=gain,
        generations=done,
        candidates=done * method.population_size,
        converged=bool(method.converged(state.state)),
        history=_host_history(state.history, done),
        seconds=seconds,
        compile_seconds=compile_seconds,
        population_chunk=chunk.size,
    )


class _OnDevice:
    """Generations of a traceable fitness, as many in a program as the limit says."""

    stride = 0

    def __init__(
        self,
        method: SearchMethod,
        problem: Problem,
        returned: str,
        chunk: memory.Chunk,
        mesh: Mesh | None,
    ):
        self.method, self.problem, self.chunk = method, problem, chunk
        self.options: dict[str, Any] = {"returned": returned, "mesh": mesh}

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
                **self.options,
            )
            return jax.block_until_ready(done)

        return self.chunk.run(attempt)


class _OnHost:
    """Generations of a fitness in Python, one at a time."""

    stride = 1

    def __init__(
        self,
        method: SearchMethod,
        fitness: HostFitness,
        problem: Problem,
        returned: str,
        chunk: memory.Chunk,
        fit_memory: bool,
    ):
        self.method, self.problem, self.returned = method, problem, returned
        self.function = fitness.function
        self.scores = fitness.scores or fitness.function
        self.chunk = chunk
        self.few = memory.population_chunk(min(chunk.size, len(gate.SCALES)), lower=fit_memory)

    def prepare(self, generations: int) -> None:
        """Nothing: the first generation compiles what it needs."""

    def begin(self, generations: int) -> SearchState:
        scores = None
        origin = self.problem.space.origin
        if self.problem.held_back is not None:
            self.gate_key = jax.random.fold_in(self.problem.key, generations)
            scores = jax.tree.map(lambda x: x[0], self._held_back(_expand(origin)))
        return _first(self.method, origin, scores, generations)

    def advance(self, state: SearchState, limit: int) -> SearchState:
        del limit
        ask_key, fitness_key = _keys(self.problem.key, state.generation)
        candidates = _ask(ask_key, state.state, method=self.method)
        values = self._evaluate(
            self.function, candidates, self.problem.batch, fitness_key, self.chunk
        )
        present = ~np.isnan(values)
        fitness = np.where(present, values, 0).sum(-1) / np.maximum(present.sum(-1), 1)
        fitness = np.where(present.any(-1), fitness, np.nan)
        state = _tell(self.method, state, ask_key, candidates, jnp.asarray(fitness))
        if self.problem.held_back is None:
            return state
        points = gate.scaled(_followed(state, self.returned))
        return _judge(state, points, self._held_back(points), self.problem.gate_z)

    def _held_back(self, points: Point) -> tuple[jax.Array, jax.Array]:
        scores = self._evaluate(
            self.scores, points, self.problem.held_back, self.gate_key, self.few
        )
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


def _first(method: SearchMethod, origin: Point, scores: Any, generations: int) -> SearchState:
    empty = jnp.full(generations, jnp.nan, jnp.float32)
    return SearchState(
        state=method.init(origin),
        generation=jnp.int32(0),
        best=jax.tree.map(jnp.asarray, origin),
        best_fitness=jnp.float32(-jnp.inf),
        chosen=gate.begin(origin),
        start_scores=scores,
        history=History(*(empty,) * len(History._fields)),
    )


def _keys(key: jax.Array, generation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of a generation: to ask with, and of the fitness of all its candidates."""
    ask, fitness = jax.random.split(jax.random.fold_in(key, generation))
    return ask, fitness


def _told(
    method: SearchMethod,
    search: SearchState,
    ask_key: jax.Array,
    candidates: Point,
    fitness: jax.Array,
    gradient: Point | None = None,
) -> SearchState:
    """The search after a generation, before the gate has looked at it."""
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
        held_back=jnp.float32(jnp.nan),
    )


def _judged(search: SearchState, points: Point, scores: Any, gate_z: jax.Array) -> SearchState:
    """The search after the gate has looked at some points of its last generation."""
    chosen, bound = gate.choose(search.chosen, points, scores, search.start_scores, gate_z)
    held_back = search.history.held_back.at[search.generation - 1].set(bound)
    return search._replace(chosen=chosen, history=search.history._replace(held_back=held_back))


def _followed(search: SearchState, returned: str) -> Point:
    return search.best if returned == "best" else search.state.mean


_begin = jax.jit(begin, static_argnames=("method", "generations"))
_advance = jax.jit(advance, static_argnames=("method", "returned", "population_chunk", "mesh"))
_tell = jax.jit(_told, static_argnames="method")
_judge = jax.jit(_judged)


@functools.partial(jax.jit, static_argnames="method")
def _ask(key: jax.Array, state: State, *, method: SearchMethod) -> Point:
    return method.ask(key, state)


@jax.jit
def _decode_many(space: Space, points: Point) -> Offsets:
    return jax.vmap(decode, in_axes=(None, 0))(space, points)


def _expand(point: Point) -> Point:
    return jax.tree.map(lambda x: x[None], point)


def _scores(problem: Problem, point: Point, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores of a point on the held-back batch, by the fitness's ``scores`` where it has them."""
    offsets = decode(problem.space, point)
    owner = problem.fitness
    # A function that is not a pytree was wrapped in one.
    owner = owner.func if isinstance(owner, jax.tree_util.Partial) else owner
    function = getattr(owner, "scores", None)
    if function is not None:
        values, counts = function(offsets, problem.held_back, key)
    else:
        values = problem.fitness(offsets, problem.held_back, key)[None]
        counts = jnp.ones(1, bool)
    return values.astype(jnp.float32), counts


def _host_history(history: History, done: int) -> History:
    return jax.tree.map(lambda x: x[:done], jax.device_get(history))


def _check(
    generations: int, gate_z: float, returned: str, budget_s: float | None, chunk: int = 0
) -> None:
    if generations < 1:
        raise InputError(f"generations={generations}: must be at least 1.")
    if chunk < 0:
        raise InputError(f"population_chunk={chunk}: must be at least 0.")
    if not gate_z >= 0:
        raise InputError(f"gate_z={gate_z}: must be at least 0.")
    if returned not in FOLLOWED:
        raise InputError(f"returned={returned!r}: must be one of {', '.join(FOLLOWED)}.")
    if budget_s is not None and not budget_s > 0:
        raise InputError(f"budget_s={budget_s}: must be above 0; leave it out for no budget.")
