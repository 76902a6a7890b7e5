"""What came of searches that are through: judged as `adapt` does it, and told to their jobs."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from grpocem_jax.adaptation import workflow
from grpocem_jax.adaptation.texts import Encoded
from grpocem_jax.adaptation.workflow import Adaptation
from grpocem_jax.config import SearchConfig
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.search import Point, SearchResult, decode, gate, loop, rows
from grpocem_jax.search.lanes import Lanes
from grpocem_jax.serving.jobs import Job
from grpocem_jax.utils.errors import InputError


class Running:
    """A job in its lanes, one for each part of its texts."""

    def __init__(
        self, job: Job, lanes: Lanes, places: Sequence[int], parts: Sequence[Sequence[Encoded]]
    ):
        self.job, self.lanes, self.places = job, lanes, places
        cut = [[rows.cut(*text) for text in part] for part in parts]
        self.rows = [[row for row in part if row is not None] for part in cut]
        self.start_scores: list[np.ndarray] = []
        self.left = set(places)
        self.began = time.perf_counter()
        self.compiled = 0.0

    @property
    def asked(self) -> list[tuple[int, rows.Row]]:
        """Its texts, each with the lane that searches by it."""
        pairs = zip(self.places, self.rows, strict=True)
        return [(place, row) for place, own in pairs for row in own]


class Judge:
    """Judges searches of one run.

    Args:
      run: what is adapted.
      settings: of the searches.
    """

    def __init__(self, run: TrainedRun, settings: SearchConfig):
        self._run, self._settings = run, settings

    def conclude(
        self, lanes: Lanes, through: list[Running], converged: dict[Running, bool]
    ) -> None:
        """Judges what was found, and ends the jobs."""
        settings = self._settings
        points = lanes.points(settings.returned)
        found = self._judged(lanes, through, points)
        passed = [each for each in through if found[each].passed]
        after = {each: np.concatenate(each.start_scores) for each in through}
        if passed:
            at = lanes.spread({each.places[0]: found[each].point for each in passed})
            asked = [(each.places[0], row) for each in passed for _, row in each.asked]
            scores = iter(lanes.scores(at, asked))
            for each in passed:
                after[each] = np.concatenate([next(scores) for _ in each.asked])
        for each in through:
            try:
                value = self.checked([after[each]], "found")
            except InputError as error:
                each.job.end("failed", error=str(error))
                continue
            before = self.checked(each.start_scores, "to start from")
            result = self._result(lanes, each, found[each], converged[each])
            each.job.end("done", Adaptation(result.offsets, before, value, result))

    def _judged(
        self, lanes: Lanes, through: list[Running], points: Point
    ) -> dict[Running, "_Found"]:
        """Where each job ends: as `loop.cross_fit` and `loop.maximize` have it."""
        means = {
            each: loop.mean_point([jax.tree.map(lambda x, i=i: x[i], points) for i in each.places])
            for each in through
        }
        if not self._settings.gate:
            return {each: _Found(means[each], means[each], True, float("nan")) for each in through}
        own: dict[int, Sequence[rows.Row]] = {}
        before: dict[int, np.ndarray] = {}
        for each in through:
            own.update(zip(each.places, each.rows, strict=True))
            before.update(zip(each.places, each.start_scores, strict=True))
        pairs = [(each.places[0], each.places[1]) for each in through]
        verdicts = lanes.judge(pairs, points, own, before, self._settings.gate_z)
        found = {}
        for each, verdict in zip(through, verdicts, strict=True):
            point, passed = gate.follow(verdict, means[each], lanes.space.origin)
            found[each] = _Found(point, means[each], passed, float(verdict.gain))
        return found

    def _result(
        self, lanes: Lanes, each: Running, found: "_Found", converged: bool
    ) -> SearchResult:
        histories = [lanes.history(place) for place in each.places]
        done = [len(history.best) for history in histories]
        seconds = time.perf_counter() - each.began
        return SearchResult(
            offsets=decode(lanes.space, found.point),
            final=decode(lanes.space, found.mean),
            returned=self._settings.returned if found.passed else "start",
            held_back_gain=found.gain,
            generations=max(done),
            candidates=sum(done) * lanes.method.population_size,
            converged=converged,
            history=loop.mean_history([_extend(x, max(done)) for x in histories]),
            seconds=max(0.0, seconds - each.compiled),
            compile_seconds=min(seconds, each.compiled),
            population_chunk=lanes.at_once,
        )

    def checked(self, scores: Sequence[np.ndarray], which: str) -> float:
        """Mean of log-likelihoods, refused as `adapt` does where it is not finite."""
        value = float(np.concatenate(scores).mean(dtype=np.float64))
        fix = workflow.likelihood_fix(self._run.policy)
        if which == "found":
            fix = workflow.ungated(fix, self._settings)
        return workflow.check_finite(value, "likelihood", which, fix)


class _Found(NamedTuple):
    """Where a job ends: the point, that of the searches, whether it passed, and its gain."""

    point: Point
    mean: Point
    passed: bool
    gain: float


def _extend(history: loop.History, length: int) -> loop.History:
    """A history with NaN up to a length."""
    return loop.History(*(np.pad(x, (0, length - len(x)), constant_values=np.nan) for x in history))
