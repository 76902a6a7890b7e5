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
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError


class Running:
    """A job in its lanes: one for each half of its texts or, once they passed, one for all.

    Attributes:
      job: the job.
      lanes: where its searches are.
      places: which of them are its own.
      rows: the texts of each of these.
      verdict: the gate's on the searches by halves, once they are over.
      compiled: seconds of compilation in the steps that are over.
      spent: candidates of searches that are over.
    """

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
        self.verdict: gate.Verdict | None = None
        self.spent = 0

    def join(self, spent: int) -> None:
        """Makes one part of all texts, after the halves passed."""
        self.spent = spent
        self.places, self.rows = self.places[:1], [[row for part in self.rows for row in part]]
        self.start_scores = [np.concatenate(self.start_scores)]
        self.left = set(self.places)
        self.job.restart()

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
        self,
        lanes: Lanes,
        through: list[Running],
        converged: dict[Running, bool],
        clock: CompileClock,
    ) -> list[Running]:
        """Judges what was found, and ends the jobs but for those that are to search all texts.

        Args:
          lanes: where the searches are.
          through: the jobs.
          converged: whether their searches stopped before the generations were used up.
          clock: of this step.

        Returns:
          these, joined.
        """
        points = lanes.points(self._settings.returned)
        halves = [each for each in through if len(each.places) == 2]
        for each, judged in zip(halves, self._verdicts(lanes, halves, points), strict=True):
            each.verdict = judged
        joined, found = [], {}
        for each in through:
            at = [jax.tree.map(lambda x, i=i: x[i], points) for i in each.places]
            mean, verdict = loop.mean_point(at), each.verdict
            if verdict is None:
                found[each] = _Found(mean, mean, True, float("nan"))
            elif not gate.passes(verdict):
                found[each] = _Found(lanes.space.origin, mean, False, float(verdict.gain))
            elif each in halves:
                joined.append(each)
            else:
                point = gate.part(verdict, mean)
                found[each] = _Found(point, mean, True, float(verdict.gain))
        passed = [each for each in found if found[each].passed]
        after = {each: np.concatenate(each.start_scores) for each in found}
        if passed:
            spread = lanes.spread({each.places[0]: found[each].point for each in passed})
            asked = [(each.places[0], row) for each in passed for _, row in each.asked]
            scores = iter(lanes.scores(spread, asked))
            for each in passed:
                after[each] = np.concatenate([next(scores) for _ in each.asked])
        for each in found:
            try:
                value = self.checked([after[each]], "found")
            except InputError as error:
                each.job.end("failed", error=str(error))
                continue
            before = self.checked(each.start_scores, "to start from")
            compiled = each.compiled + clock.seconds
            result = self._result(lanes, each, found[each], converged[each], compiled)
            each.job.end("done", Adaptation(result.offsets, before, value, result))
        for each in joined:
            each.join(self._candidates(lanes, each))
        return joined

    def _verdicts(
        self, lanes: Lanes, halves: Sequence[Running], points: Point
    ) -> list[gate.Verdict]:
        """What the gate says of jobs by halves, as in `loop.cross_fit`."""
        own: dict[int, Sequence[rows.Row]] = {}
        before: dict[int, np.ndarray] = {}
        for each in halves:
            own.update(zip(each.places, each.rows, strict=True))
            before.update(zip(each.places, each.start_scores, strict=True))
        pairs = [(each.places[0], each.places[1]) for each in halves]
        return lanes.judge(pairs, points, own, before, self._settings.gate_z) if pairs else []

    def _candidates(self, lanes: Lanes, each: Running) -> int:
        """How many candidates a job's searches have scored."""
        done = sum(len(lanes.history(place).best) for place in each.places)
        return each.spent + done * lanes.method.population_size

    def _result(
        self, lanes: Lanes, each: Running, found: "_Found", converged: bool, compiled: float
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
            candidates=self._candidates(lanes, each),
            converged=converged,
            history=loop.mean_history([_extend(x, max(done)) for x in histories]),
            seconds=max(0.0, seconds - compiled),
            compile_seconds=min(seconds, compiled),
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
