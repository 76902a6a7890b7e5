"""The search of one problem, with a clock around the kernel.

`maximize` drives one search; `cross_fit` drives two, on halves of the data that judge each other
(`gate`), and where they agree a third on all of them.  They compile the kernel (`kernel.advance`),
and return to Python between chunks of generations only where a time budget or a live view asks for
it.  A fitness that judges in Python, such as the reward of completions (`HostFitness`), goes
through the same loop, a generation at a time (`drivers`).
"""

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
from grpocem_jax.search.base import Point, SearchMethod, check_method, needs
from grpocem_jax.search.cem import CEM
from grpocem_jax.search.drivers import Divided, HostFitness, OnDevice, OnHost
from grpocem_jax.search.gradient import GradientAscent
from grpocem_jax.search.kernel import FOLLOWED, Fitness, History, Problem, followed
from grpocem_jax.search.spaces import Space, decode
from grpocem_jax.utils import memory
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, Processes
from grpocem_jax.utils.settings import Range, at_least, number, whole
from grpocem_jax.utils.statistics import mean_of_present

BUDGET = Range("above 0; leave it out for no budget", lambda x: x > 0)

MOMENT_S = 1e-9
"""What is left at least of a budget of time: a generation is run in any case."""


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
      offsets: the adapter of the point returned.
      final: the adapter that the search ended with, whatever the gate says of it.
      returned: "mean" or "best", or "start" where the gate let nothing pass.
      held_back_gain: gain of each half's point on the other half; 0 for the start, NaN of
        `maximize`, which has no gate.
      generations: how many the last search had: that by all of the data or, where the gate let
        nothing pass, the longer one of those by halves.
      candidates: how many candidates the method scored in all searches, without those of the gate.
      converged: whether the method stopped before the generations were used up, in the last search.
      history: its generations, arrays on the host; of those by halves the mean.
      seconds: of all searches, without compilation.
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
    batch: Any,
    key: jax.Array,
    *,
    halves: tuple[Any, Any],
    gate_z: float = 2.0,
    generations: int = 50,
    returned: str = "mean",
    population_chunk: int = 0,
    fit_memory: bool = False,
    mesh: Mesh | None = None,
    processes: Processes = ALONE,
    budget_s: float | None = None,
    on_chunk: Callable[[int, History], None] | None = None,
) -> SearchResult:
    """Searches by each half of some data, and by all of them where the `gate` lets that pass.

    Args:
      method: as in `maximize`.
      fitness: as in `maximize`; of its ``scores`` the gate takes those of single tokens or samples.
      space: as in `maximize`.
      batch: data for the fitness.
      key: PRNG key; consumed. Each search has a key of its own, and all that is judged another.
      halves: the same data in two parts; of one shape, they are searched by one program.
      gate_z: standard errors that the gate takes off, at least 0.
      generations: at most so many of each search.
      returned: which point of each is followed: "mean", or "best" ever scored.
      population_chunk: as in `maximize`.
      fit_memory: as in `maximize`.
      mesh: as in `maximize`.
      processes: as in `maximize`.
      budget_s: seconds for all searches; those of the halves have half of them.
      on_chunk: as in `maximize`, with the mean of the histories of the halves, and then again for
        the search by all of the data.

    Raises:
      InputError: as `maximize`.
    """
    gate_z = number("gate_z", gate_z, at_least(0))
    if not isinstance(halves, list | tuple) or len(halves) != 2:
        found = f"{len(halves)} parts" if hasattr(halves, "__len__") else type(halves).__name__
        raise InputError(f"halves: is {found}; give the data in two parts, (first, second).")
    _check_budget(budget_s)
    *keys, gate_key, last = jax.random.split(key, 4)
    search = functools.partial(
        _Searches,
        method,
        fitness,
        space,
        returned=returned,
        fit_memory=fit_memory,
        mesh=mesh,
        processes=processes,
    )
    parts = search(list(zip(halves, keys, strict=True)), population_chunk=population_chunk)
    parts.run(generations, budget_s and budget_s / 2, on_chunk)
    scores = parts.scores(halves[::-1], gate_key)
    # All processes go on, or none: by the rounding and the clock of the first.
    judged = processes.first(lambda: [float(x) for x in gate.judge(*scores, gate_z)])
    verdict = gate.Verdict(*judged)
    gain = float(verdict.gain)
    if not gate.passes(verdict):
        return parts.result(decode(space, space.origin), "start", gain)
    whole = search([(batch, last)], population_chunk=parts.chunk.size)
    left = budget_s and processes.first(lambda: max(budget_s - parts.seconds, MOMENT_S))
    whole.run(generations, left, on_chunk)
    found = whole.result(decode(space, gate.part(verdict, whole.point())), returned, gain)
    return found._replace(
        candidates=parts.candidates + whole.candidates,
        seconds=parts.seconds + whole.seconds,
        compile_seconds=parts.compile_seconds + whole.compile_seconds,
    )


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
        population_chunk = whole("population_chunk", population_chunk, 0)
        if not isinstance(space, Space):
            raise InputError(
                f"space: is {type(space).__name__}, not a Space; full_space(offsets) makes one of "
                "the offsets to start from."
            )
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
        self.drivers: list[OnHost | OnDevice] = []
        for batch, key in parts:
            if isinstance(fitness, HostFitness):
                problem = Problem(None, space, batch, key)
                self.drivers.append(OnHost(method, fitness, problem, chunk, fit_memory))
            else:
                problem = Problem.of(fitness, space, batch, key)
                divided = processes.count > 1 and "gradient" not in needs(method)
                kind = functools.partial(Divided, processes) if divided else OnDevice
                self.drivers.append(kind(method, problem, chunk, mesh))

    def run(
        self,
        generations: int,
        budget_s: float | None,
        on_chunk: Callable[[int, History], None] | None,
    ) -> None:
        """Runs the generations, or those for which there is time."""
        generations = whole("generations", generations)
        _check_budget(budget_s)
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
    def candidates(self) -> int:
        """How many candidates they have scored in all."""
        return sum(self.generations) * self.method.population_size

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
            candidates=self.candidates,
            converged=self.converged,
            history=self.history(done),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            population_chunk=self.chunk.size,
        )


def _check_budget(budget_s: float | None) -> None:
    if budget_s is not None:
        number("budget_s", budget_s, BUDGET)


def mean_point(points: Sequence[Point]) -> Point:
    """The mean of the points of some searches, on the host; of one its own."""
    if len(points) == 1:
        return points[0]
    return jax.tree.map(lambda *x: np.mean(x, axis=0, dtype=x[0].dtype), *jax.device_get(points))


def mean_history(histories: Sequence[History]) -> History:
    """The mean of histories of one length, on the host; of one itself."""
    if len(histories) == 1:
        return histories[0]
    return History(
        *(
            mean_of_present(np.stack(values), axis=0).astype(np.float32)
            for values in zip(*histories, strict=True)
        )
    )


def _host_history(history: History, done: int) -> History:
    return jax.tree.map(lambda x: x[:done], jax.device_get(history))
