"""Many users adapt at once: their searches are advanced together and judged as `adapt` does it.

    searches = Searches(run)
    job = searches.submit([Text("Review: The soup was cold.\\nSentiment:", " negative"), ...])
    while searches.step():
        print(job.progress)
    print(job.result.offsets)

A job's result is that of `grpocem_jax.adaptation.adapt` with the same examples, key and
`Searches.settings_of` its method, up to rounding, whoever else is there.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grpocem_jax.adaptation import texts, workflow
from grpocem_jax.adaptation.texts import Encoded, Text
from grpocem_jax.adaptation.workflow import Adaptation
from grpocem_jax.config import SearchConfig, make_method
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.search import Likelihood
from grpocem_jax.search.lanes import Lanes
from grpocem_jax.serving.jobs import METHODS, Job, Progress, Waiting
from grpocem_jax.serving.judging import Judge, Running
from grpocem_jax.utils import memory
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError

LARGEST_SEED = 2**31 - 1


class Searches:
    """The jobs of many users: those that wait, and those that run.

    One thread calls `step` again and again; any may `submit`.

    Args:
      run: what is adapted, its adapter the start of all searches.
      users: how many jobs run at once; the others wait in the order in which they came.
      settings: other settings than ``run.config.search``; method and space are the jobs' own.
      max_queue: how many jobs may wait.
      max_examples: texts of a job, at most.
      max_generations: generations of a job, at most.

    Raises:
      InputError: settings that are for a single search: another fitness than the likelihood, or a
        budget of time; a number below 1.
    """

    def __init__(
        self,
        run: TrainedRun,
        *,
        users: int = 32,
        settings: SearchConfig | None = None,
        max_queue: int = 256,
        max_examples: int = 64,
        max_generations: int = 1000,
    ):
        settings = settings or run.config.search
        for name, value in (
            ("users", users),
            ("max_queue", max_queue),
            ("max_examples", max_examples),
            ("max_generations", max_generations),
        ):
            if value < 1:
                raise InputError(f"{name}={value}: must be at least 1.")
        if settings.fitness != "likelihood":
            raise InputError(
                f"config.search.fitness={settings.fitness!r}: many users adapt at once by the "
                "likelihood of their examples; set it to 'likelihood'."
            )
        if settings.budget_s is not None:
            raise InputError(
                f"config.search.budget_s={settings.budget_s}: a budget of time is for a search by "
                "itself; leave it out, and give each job its generations."
            )
        self.run, self.users, self.settings = run, users, settings
        self.max_queue, self.max_examples = max_queue, max_examples
        self.max_generations = max(max_generations, settings.generations)
        self._score = Likelihood(run.policy.params, run.policy.model)
        self._judge = Judge(run, settings)
        self._each = 2 if settings.gate else 1
        self._lanes: dict[str, Lanes] = {}
        self._waiting = Waiting(max_queue)
        self._running: list[Running] = []
        self._round: list[Lanes] = []
        self._lock = threading.Lock()
        self._stepping = threading.Lock()
        self._clock = CompileClock()

    def settings_of(self, method: str, generations: int | None = None) -> SearchConfig:
        """The settings with which `grpocem_jax.adaptation.adapt` finds what a job finds.

        Raises:
          InputError: no such method, or a number of generations out of range.
        """
        if method not in METHODS:
            raise InputError(f"method={method!r}: must be one of {', '.join(METHODS)}.")
        count = self.settings.generations if generations is None else generations
        if isinstance(count, bool) or not isinstance(count, int):
            raise InputError(f"generations={count!r}: must be an integer.")
        if not 1 <= count <= self.max_generations:
            raise InputError(
                f"generations={count}: must be at least 1 and at most {self.max_generations}."
            )
        return dataclasses.replace(self.settings, **METHODS[method], generations=count)

    def submit(
        self,
        examples: str | Text | Sequence[str | Text],
        *,
        method: str = "gradient",
        seed: int = 0,
        generations: int | None = None,
    ) -> Job:
        """Lets a job wait for its turn.

        Args:
          examples: texts to adapt to, from 1 to ``max_examples``.
          method: "gradient", "cem", or "experts", which is CEM over weights of the experts.
          seed: of the PRNG key.
          generations: at most so many; by default those of the settings.

        Raises:
          InputError: a text that is empty, has nothing to score or is too long; too many texts or
            none; another argument out of range; no expert library.
          QueueFullError: too many jobs wait.
        """
        settings = self.settings_of(method, generations)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            raise InputError(f"seed={seed!r}: must be an integer from 0 to {LARGEST_SEED}.")
        listed = workflow.only_texts(workflow.as_list(examples), settings)
        if len(listed) > self.max_examples:
            raise InputError(
                f"examples: {len(listed)} texts are more than the {self.max_examples} that a job "
                "may have; give fewer."
            )
        one_token = workflow.is_one_token(self.run.policy, listed, settings)
        parts: Sequence[Sequence[Encoded]] = []
        if not one_token:
            encoded = [texts.encode(self.run.policy, text, settings) for text in listed]
            # Without halves there is nothing to search by, and only the likelihood is told.
            parts = (texts.deal(encoded) if settings.gate else None) or [encoded]
        job = Job(method, settings.generations, seed, parts)
        if one_token:
            nothing = Adaptation(
                self.run.offsets, float("nan"), float("nan"), None, workflow.ONE_TOKEN
            )
            job.end("done", nothing)
            return job
        self._lanes_of(method)
        return self._waiting.add(job)

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that run."""
        with self._lock:
            return sum(not each.job.ended for each in self._running)

    def step(self, *, pieces: int | None = None) -> bool:
        """Runs one generation of every running search, after jobs that wait took free places.

        Jobs whose searches are through are judged and end.  A job that fails ends with its
        sentence, and the others go on.

        Args:
          pieces: where other work waits too, the generation is divided into pieces that take about
            as long as each other, of which so many are run at most; jobs come and go when the
            generation is through. None for all of it.

        Returns:
          False where nothing is running.

        Raises:
          InputError: ``pieces`` below 1.
        """
        if pieces is not None and pieces < 1:
            raise InputError(f"pieces={pieces}: must be at least 1, or None for all.")
        with self._stepping:
            self._clock = CompileClock.start()
            try:
                if not self._round:
                    self._leave()
                    fresh = self._admit()
                    self._round = list({id(x.lanes): x.lanes for x in self._running}.values())
                    self._begin_all(fresh)
                if not self._round:
                    return False
                left = pieces
                while self._round and left != 0:
                    used = self._guarded(self._round[0], self._advance, left)
                    left = None if left is None else left - used
                if not self._round:
                    self._leave()
            finally:
                self._clock.stop()
                for each in self._running:
                    each.compiled += self._clock.seconds
            return True

    def _lanes_of(self, method: str) -> Lanes:
        """The lanes of a method; they are made when the first job asks for it.

        Raises:
          InputError: no expert library.
        """
        with self._lock:
            if method not in self._lanes:
                run, settings = self.run, self.settings_of(method)
                self._lanes[method] = Lanes(
                    make_method(dataclasses.replace(run.config, search=settings)),
                    self._score,
                    workflow.make_space(run.policy, run.offsets, settings),
                    lanes=self._each * self.users,
                    generations=self.max_generations,
                    mesh=run.policy.mesh,
                )
            return self._lanes[method]

    def _leave(self) -> None:
        """Frees the places of jobs that have ended."""
        ended = [each for each in self._running if each.job.ended]
        for each in ended:
            for place in each.places:
                each.lanes.clear(place)
        with self._lock:
            self._running = [each for each in self._running if each not in ended]

    def _admit(self) -> list[Running]:
        """Gives free places to jobs that wait."""
        fresh = []
        with self._lock:
            while len(self._running) < self.users and (begun := self._waiting.begin()):
                job, parts = begun
                lanes = self._lanes[job.method]
                taken = {x for each in self._running if each.lanes is lanes for x in each.places}
                free = (place for place in range(lanes.lanes) if place not in taken)
                each = Running(job, lanes, [next(free) for _ in parts], parts)
                self._running.append(each)
                fresh.append(each)
        return fresh

    def _guarded(self, lanes: Lanes, work: Callable[[Lanes, Any], int], argument: Any) -> int:
        """What ``work`` returns; an error there ends the jobs in the lanes, and no others."""
        advice = "give fewer users at once, or shorter texts"
        try:
            with memory.advise("the searches of many users", advice):
                return work(lanes, argument)
        except Exception as error:
            for each in self._running:
                if each.lanes is lanes:
                    each.job.end("failed", error=str(error) or type(error).__name__)
            lanes.reset()
            self._round = [x for x in self._round if x is not lanes]
            if not isinstance(error, InputError):
                raise
            return 0

    def _advance(self, lanes: Lanes, pieces: int | None) -> int:
        """Pieces of a generation in some lanes; how many they were."""
        used = 0
        own = [x for x in self._running if x.lanes is lanes and not x.job.ended]
        if own:
            used, through = lanes.advance(pieces)
            if not through:
                return used
            self._follow(lanes, own)
        else:
            lanes.reset()
        self._round.remove(lanes)
        return used

    def _begin_all(self, fresh: list[Running]) -> None:
        """Lets the searches of new jobs begin, also those after one that fails by a bug."""
        failure: Exception | None = None
        for lanes in self._round:
            try:
                self._guarded(lanes, self._begin, [x for x in fresh if x.lanes is lanes])
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _begin(self, lanes: Lanes, fresh: list[Running]) -> int:
        """Scores the start by the texts of new jobs, and lets their searches begin."""
        if not fresh:
            return 0
        asked = [pair for each in fresh for pair in each.asked]
        scores = iter(lanes.scores(lanes.origins(), asked))
        for each in fresh:
            each.start_scores = [np.concatenate([next(scores) for _ in part]) for part in each.rows]
            try:
                before = self._judge.checked(each.start_scores, "to start from")
            except InputError as error:
                each.job.end("failed", error=str(error))
                continue
            if len(each.places) < self._each:
                run = self.run
                note = workflow.TOO_FEW_TOKENS
                each.job.end("done", Adaptation(run.offsets, before, before, None, note))
                continue
            self._search(lanes, each)
        return len(fresh)

    def _search(self, lanes: Lanes, each: Running) -> None:
        """Puts the searches of a job into its lanes, with the keys of `search.cross_fit`."""
        key = jax.random.key(each.job.seed)
        keys = [key]
        if self.settings.gate:
            first, second, _, last = jax.random.split(key, 4)
            keys = [first, second] if each.verdict is None else [last]
        for place, part, own in zip(each.places, each.rows, keys, strict=True):
            lanes.place(place, part, own, each.job.generations)

    def _follow(self, lanes: Lanes, own: list[Running]) -> None:
        """Tells jobs where they are, and ends those whose searches are through."""
        seen = lanes.progress()
        through = []
        for each in own:
            places = list(each.places)
            generation = int(seen.generation[places].max())
            best, mean = (float(x[places].mean()) for x in (seen.best, seen.mean))
            each.job.note(Progress(generation, best, mean))
            for place in sorted(each.left):
                if seen.ended[place] or seen.generation[place] >= each.job.generations:
                    each.left.discard(place)
                    lanes.clear(place)
            if not each.left:
                through.append(each)
        if through:
            ended = {x: bool(seen.ended[list(x.places)].all()) for x in through}
            for each in self._judge.conclude(lanes, through, ended, self._clock):
                self._search(lanes, each)
