"""The search for an adapter: all generations in one compiled program, and a gate on the result.

`search` is for fitness functions that JAX can trace: asking, scoring, telling, the convergence
test and the gate happen on the device, and nothing returns to Python between generations, except
in chunks of them where a time budget or a live view asks for it.  `search_on_host` is the same
loop around a fitness that judges text in Python.

**The gate.**  What fits a text need not help with the next one: on text like its training text a
model adapted to a prompt does worse on the continuation (docs/adaptation.md).  So the search holds
back a part of its own text and follows its mean on it, at 1/4, 1/2 and 1 of the way from the
start.  The result is the point with the largest lower confidence bound of the held-back gain,

    mean(d) - z std(d) / sqrt(n),   d_i = score of the point - score of the start, i = 1..n,

or the start, whose bound is zero, where none is above it.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpocem_jax import memory
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.adapters.spaces import Space, decode
from grpocem_jax.cem import CEM, GradientAscent, Point
from grpocem_jax.errors import InputError

SCALES = (0.25, 0.5, 1.0)
FOLLOWED = ("mean", "best")

Fitness = Callable[[Offsets, Any, jax.Array], jax.Array]
"""``(adapter, batch, key) -> float32 []``, traceable. It may be a pytree, as `fitness.Likelihood`;
of a plain function, arrays that it closes over become constants of the program. A method
``scores`` with the same arguments that returns scores ``[N]`` and which of them count, bool
``[N]``, gives the gate more than the mean to judge by."""


class History(NamedTuple):
    """What happened in each generation, float32 ``[generations]``; NaN after the last one run.

    Attributes:
      best: largest fitness.
      mean: mean fitness.
      std: root mean square of the search distribution's standard deviation; 0 for a gradient.
      change: norm of the mean's move.
      held_back: best lower bound of the gain on held-back text among this generation's points.
    """

    best: Any
    mean: Any
    std: Any
    change: Any
    held_back: Any


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


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
      adapter: the adapter of the point returned.
      final: the adapter that the search ended with, whatever the gate says of it.
      returned: "mean" or "best", or "start" where the gate let nothing pass.
      held_back_gain: its gain on held-back text; 0 for the start, NaN without a gate.
      generations: how many were run.
      candidates: how many candidates the method scored, without those of the gate.
      converged: whether the mean stopped moving before the generations were used up.
      history: the generations, arrays on the host, as long as there were generations.
      seconds: of the search, without compilation.
      compile_seconds: spent before it to trace and compile, or to find the compiled program; of
        `search_on_host`, which compiles on the way, 0, and ``seconds`` has all.
      population_chunk: candidates scored at a time in the end; of `search_on_host`, whose fitness
        knows it, 0.
    """

    adapter: Offsets
    final: Offsets
    returned: str
    held_back_gain: float
    generations: int
    candidates: int
    converged: bool
    history: History
    seconds: float
    compile_seconds: float
    population_chunk: int = 0


class _Problem(NamedTuple):
    fitness: Any
    space: Space
    batch: Any
    held_back: Any
    gate_z: jax.Array
    key: jax.Array


class _Loop(NamedTuple):
    state: Any
    chosen: Chosen
    start_scores: Any
    history: History


def search(
    method: CEM | GradientAscent,
    fitness: Fitness,
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
    """Searches a space for the adapter of largest fitness.

    Args:
      method: the settings of the method.
      fitness: what to maximise.
      space: where; the search starts at its origin.
      batch: what the fitness is measured on; any pytree of arrays.
      key: PRNG key; consumed. Generation ``g`` uses ``fold_in(key, g)``, so a search in chunks is
        the search in one piece; the gate uses ``fold_in(key, generations)``.
      generations: at most so many.
      held_back: a batch for the gate; None returns what the search ends with.
      gate_z: standard errors by which the held-back gain must exceed zero, at least 0.
      returned: "mean" or "best": which point is returned, and followed by the gate.
      population_chunk: candidates scored at a time, 0 for all, and points of the gate; less
        memory, the same result up to rounding.
      fit_memory: whether ``population_chunk`` is halved where device memory runs out, and the
        generations that did not fit are tried again.
      mesh: devices among which the candidates are divided, see `grpocem_jax.devices`; where the
        fitness has parameters, they lie on each of them.
      budget_s: seconds; the search stops at the first chance after them. Chunks grow and shrink
        with the time that is left. Compilation does not count.
      on_chunk: called with the number of generations done and their history, after the first and
        at least every tenth of them.

    Returns:
      `SearchResult`; with the gate its adapter may be the start.

    Raises:
      InputError: a setting out of range; out of device memory.
    """
    _check(generations, gate_z, returned, budget_s, population_chunk)
    if jax.tree_util.all_leaves([fitness]):
        fitness = jax.tree_util.Partial(fitness)
    problem = _Problem(fitness, space, batch, held_back, jnp.float32(gate_z), key)
    size = min(population_chunk or method.population_size, method.population_size)
    chunk = memory.population_chunk(size, lower=fit_memory)

    def advance(loop: _Loop, limit: int) -> _Loop:
        def attempt(size: int) -> _Loop:
            done = _advance(
                problem,
                loop,
                jnp.int32(limit),
                method=method,
                returned=returned,
                population_chunk=size,
                mesh=mesh,
            )
            return jax.block_until_ready(done)

        return chunk.run(attempt)

    started = time.perf_counter()
    loop = _begin(problem, method=method, generations=generations)
    # Zero generations compile the program without running it.
    loop = advance(loop, 0)
    compiled = time.perf_counter()

    done = 0
    while done < generations:
        limit = generations
        if budget_s is not None:
            spent = time.perf_counter() - compiled
            if done and spent >= budget_s:
                break
            # The first generation is the measure of the others.
            affordable = int((budget_s - spent) / (spent / done)) if done else 1
            limit = min(limit, done + max(1, affordable))
        if on_chunk is not None:
            # The first by itself: how long one takes is then known.
            limit = min(limit, done + max(1, generations // 10) if done else 1)
        loop = advance(loop, limit)
        done = int(loop.state.generation)
        if on_chunk is not None:
            on_chunk(done, _host_history(loop.history, done))
        if done < limit or bool(method.converged(loop.state)):
            break
    seconds = time.perf_counter() - compiled
    final = decode(space, getattr(loop.state, returned))
    point, gain, returned = _result(loop.state, loop.chosen, returned, held_back is not None)
    return SearchResult(
        adapter=decode(space, point),
        final=final,
        returned=returned,
        held_back_gain=gain,
        generations=done,
        candidates=done * method.population_size,
        converged=bool(method.converged(loop.state)),
        history=_host_history(loop.history, done),
        seconds=seconds,
        compile_seconds=compiled - started,
        population_chunk=chunk.size,
    )


@functools.partial(jax.jit, static_argnames=("method", "generations"))
def _begin(problem: _Problem, *, method: Any, generations: int) -> _Loop:
    empty = jnp.full(generations, jnp.nan, jnp.float32)
    scores = None
    if problem.held_back is not None:
        key = jax.random.fold_in(problem.key, generations)
        scores = _scores(problem, problem.space.origin, key)
    return _Loop(
        method.init(problem.space.origin),
        _start(problem.space.origin),
        scores,
        History(*(empty,) * len(History._fields)),
    )


@functools.partial(jax.jit, static_argnames=("method", "returned", "population_chunk", "mesh"))
def _advance(
    problem: _Problem,
    loop: _Loop,
    limit: jax.Array,
    *,
    method: Any,
    returned: str,
    population_chunk: int,
    mesh: Mesh | None = None,
) -> _Loop:
    """Generations until the search has converged or has had ``limit`` of them."""

    # The key after those of the generations.
    gate_key = jax.random.fold_in(problem.key, len(loop.history.best))
    parts = 0 < population_chunk < method.population_size
    gate_chunk = min(len(SCALES), population_chunk) if parts else len(SCALES)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.state.generation < limit) & ~method.converged(loop.state)

    def generation(loop: _Loop) -> _Loop:
        number = loop.state.generation
        key = jax.random.fold_in(problem.key, number)

        def score(point: Point, key: jax.Array) -> jax.Array:
            return problem.fitness(decode(problem.space, point), problem.batch, key)

        state, scores = method.step(key, loop.state, score, population_chunk, mesh)
        chosen, bound = loop.chosen, jnp.float32(jnp.nan)
        if problem.held_back is not None:
            points = scaled(getattr(state, returned))
            own = jax.lax.map(
                lambda point: _scores(problem, point, gate_key), points, batch_size=gate_chunk
            )
            chosen, bound = choose(chosen, points, own, loop.start_scores, problem.gate_z)
        record = _record(state, scores, bound)
        history = jax.tree.map(lambda h, x: h.at[number].set(x), loop.history, record)
        return _Loop(state, chosen, loop.start_scores, history)

    return jax.lax.while_loop(unfinished, generation, loop)


def search_on_host(
    method: CEM,
    evaluate: Callable[[Offsets, jax.Array], np.ndarray],
    space: Space,
    key: jax.Array,
    *,
    generations: int = 50,
    evaluate_held_back: Callable[[Offsets, jax.Array], np.ndarray] | None = None,
    baseline: Offsets | None = None,
    gate_z: float = 1.0,
    returned: str = "mean",
    budget_s: float | None = None,
    on_chunk: Callable[[int, History], None] | None = None,
) -> SearchResult:
    """`search` with a fitness in Python, such as rewards of decoded completions.

    Args:
      method: the settings of the method.
      evaluate: ``(adapters [C, ...], key) -> float [C, N]``, ``N`` scores of each candidate, of
        which the mean is its fitness; NaN where there is none.
      space: where; the search starts at its origin.
      key: PRNG key; consumed.
      generations: at most so many.
      evaluate_held_back: the same for the gate, on other data; None returns what the search ends
        with.
      baseline: the adapter that the gate compares with and returns where nothing passes, if that
        is not the space's start; the start is then one more point that may pass.
      gate_z: as in `search`.
      returned: as in `search`.
      budget_s: seconds; compilation counts, as the first generation brings it about.
      on_chunk: called after each generation, as in `search`.

    Returns:
      `SearchResult`, whose ``seconds`` contain compilation and the time of ``evaluate``.

    Raises:
      InputError: a setting out of range.
    """
    _check(generations, gate_z, returned, budget_s)
    started = time.perf_counter()
    state, chosen = method.init(space.origin), _start(space.origin)
    gate_key = jax.random.fold_in(key, generations)
    if evaluate_held_back is not None:
        origin = jax.tree.map(lambda x: x[None], space.origin)
        own = _present(evaluate_held_back(_decode_many(space, origin), gate_key))
        start_scores = jax.tree.map(lambda x: x[0], own)
        if baseline is not None:
            compared = jax.tree.map(lambda x: x[None], baseline)
            start_scores = _present(evaluate_held_back(compared, gate_key)[0])
            chosen, _ = choose(chosen, origin, own, start_scores, jnp.float32(gate_z))
    records = []
    for number in range(generations):
        ask_key, fitness_key = jax.random.split(jax.random.fold_in(key, number))
        candidates = _ask(ask_key, state, method=method)
        scores = np.asarray(evaluate(_decode_many(space, candidates), fitness_key), np.float32)
        present = ~np.isnan(scores)
        fitness = np.where(present, scores, 0).sum(-1) / np.maximum(present.sum(-1), 1)
        fitness = np.where(present.any(-1), fitness, np.nan)
        state = _tell(state, candidates, jnp.asarray(fitness), method=method)
        bound = jnp.float32(jnp.nan)
        if evaluate_held_back is not None:
            points = scaled(getattr(state, returned))
            own = _present(evaluate_held_back(_decode_many(space, points), gate_key))
            chosen, bound = choose(chosen, points, own, start_scores, jnp.float32(gate_z))
        records.append(_record(state, jnp.asarray(fitness), bound))
        history = History(*(np.asarray(jax.device_get(x)) for x in zip(*records, strict=True)))
        if on_chunk is not None:
            on_chunk(number + 1, history)
        if bool(method.converged(state)):
            break
        if budget_s is not None and time.perf_counter() - started >= budget_s:
            break
    gated = evaluate_held_back is not None
    final = decode(space, getattr(state, returned))
    point, gain, returned = _result(state, chosen, returned, gated)
    adapter = decode(space, point)
    return SearchResult(
        adapter=baseline if returned == "start" and baseline is not None else adapter,
        final=final,
        returned=returned,
        held_back_gain=gain,
        generations=len(records),
        candidates=len(records) * method.population_size,
        converged=bool(method.converged(state)),
        history=history,
        seconds=time.perf_counter() - started,
        compile_seconds=0.0,
    )


@functools.partial(jax.jit, static_argnames="method")
def _ask(key: jax.Array, state: Any, *, method: CEM) -> Point:
    return method.ask(key, state)


@functools.partial(jax.jit, static_argnames="method")
def _tell(state: Any, candidates: Point, fitness: jax.Array, *, method: CEM) -> Any:
    return method.tell(state, candidates, fitness)


@jax.jit
def _decode_many(space: Space, points: Point) -> Offsets:
    return jax.vmap(decode, in_axes=(None, 0))(space, points)


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


def _scores(problem: _Problem, point: Point, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores of a point on the held-back batch, by the fitness's ``scores`` where it has them."""
    adapter = decode(problem.space, point)
    owner = problem.fitness
    # A function that is no pytree was wrapped in one.
    owner = owner.func if isinstance(owner, jax.tree_util.Partial) else owner
    function = getattr(owner, "scores", None)
    if function is not None:
        values, counts = function(adapter, problem.held_back, key)
    else:
        values = problem.fitness(adapter, problem.held_back, key)[None]
        counts = jnp.ones(1, bool)
    return values.astype(jnp.float32), counts


def _present(scores: np.ndarray) -> tuple[jax.Array, jax.Array]:
    scores = np.asarray(scores, np.float32)
    return jnp.asarray(np.nan_to_num(scores)), jnp.asarray(~np.isnan(scores))


def _start(origin: Point) -> Chosen:
    return Chosen(jax.tree.map(jnp.asarray, origin), jnp.float32(0.0), jnp.float32(0.0))


def _record(state: Any, scores: jax.Array, bound: jax.Array) -> History:
    scores = scores.astype(jnp.float32)
    finite = jnp.isfinite(scores)
    leaves = jax.tree.leaves(state.std) if hasattr(state, "std") else [jnp.float32(0.0)]
    square = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves) / sum(x.size for x in leaves)
    return History(
        best=jnp.max(jnp.where(finite, scores, -jnp.inf)),
        mean=jnp.sum(jnp.where(finite, scores, 0.0)) / jnp.maximum(jnp.sum(finite), 1),
        std=jnp.sqrt(square),
        change=state.change,
        held_back=bound,
    )


def _result(state: Any, chosen: Chosen, returned: str, gated: bool) -> tuple[Point, float, str]:
    if not gated:
        return getattr(state, returned), math.nan, returned
    gain = float(chosen.gain)
    return chosen.point, gain, returned if float(chosen.bound) > 0 else "start"


def _host_history(history: History, done: int) -> History:
    return jax.tree.map(lambda x: x[:done], jax.device_get(history))


def _check(
    generations: int, gate_z: float, returned: str, budget_s: float | None, chunk: int = 0
) -> None:
    if generations < 1:
        raise InputError(f"cem.generations={generations}: must be at least 1.")
    if chunk < 0:
        raise InputError(f"cem.population_chunk={chunk}: must be at least 0.")
    if not gate_z >= 0:
        raise InputError(f"cem.gate_z={gate_z}: must be at least 0.")
    if returned not in FOLLOWED:
        raise InputError(f"cem.returned={returned!r}: must be one of {', '.join(FOLLOWED)}.")
    if budget_s is not None and not budget_s > 0:
        raise InputError(f"cem.budget_s={budget_s}: must be above 0; leave it out for no budget.")
