"""Searches beside completions: who waits for whom, and for how long."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Adaptation
from grpocem_jax.search.loop import History
from grpocem_jax.serving.aside import Aside
from grpocem_jax.serving.jobs import QueueFullError
from grpocem_jax.serving.rewarded import Rewarded
from grpocem_jax.utils.errors import InputError
from tests.runs import question_examples
from tests.serving import thin_run


@pytest.fixture
def make():
    """Makes work beside the test, which is closed at its end."""
    made = []

    def make(step, *, is_busy=lambda: True, patience_s=20.0, share=0.5):
        made.append(Aside(step, is_busy, patience_s=patience_s, share=share))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_step_that_is_short_is_waited_for(make):
    left = [True, True, False]
    aside = make(lambda: left.pop(0))
    assert [aside() for _ in range(3)] == [True, True, False]
    assert left == []


def test_a_step_that_is_long_goes_on_beside_the_caller(make):
    ended, calls = threading.Event(), []

    def step():
        calls.append(threading.get_ident())
        return not ended.wait(20)

    aside = make(step, patience_s=0.05)
    began = time.monotonic()
    assert all(aside() for _ in range(1000))
    assert time.monotonic() - began < 5
    assert len(calls) == 1
    ended.set()
    while aside():
        pass
    assert set(calls) != {threading.get_ident()}


def test_a_caller_that_gets_something_to_do_does_not_wait_any_longer(make):
    ended, busy = threading.Event(), threading.Event()
    aside = make(lambda: not ended.wait(20), is_busy=busy.is_set)
    threading.Timer(0.1, busy.set).start()
    began = time.monotonic()
    assert aside()
    assert 0.05 < time.monotonic() - began < 5
    ended.set()


def test_a_step_beside_a_busy_caller_is_followed_by_a_pause_by_the_share(make):
    """A step of 0.3 s beside it, a share of a tenth: 2.7 s without one, unless it is idle."""
    calls, busy = [], [True]

    def step():
        calls.append(time.monotonic())
        time.sleep(0.3 if len(calls) == 1 else 0)
        return True

    aside = make(step, is_busy=lambda: busy[0], patience_s=0.001, share=0.1)
    while len(calls) < 2:
        aside()
        time.sleep(0.01)
    assert calls[1] - calls[0] > 2.9
    calls.clear()
    while not calls:
        aside()
    while len(calls) < 2:
        busy[0] = False
        aside()
    assert calls[1] - calls[0] < 2.5


def test_a_step_that_fails_is_logged_and_the_next_one_goes_on(caplog, make):
    steps = iter([ZeroDivisionError("a bug"), None])

    def step():
        error = next(steps)
        if error:
            raise error
        return False

    aside = make(step)
    assert aside()
    assert "a bug" in caplog.text
    assert not aside()


def test_what_never_began_is_closed(make):
    calls = []
    aside = make(lambda: calls.append("a step"))
    before = threading.active_count()
    aside.close()
    assert calls == []
    assert threading.active_count() <= before


@pytest.fixture(scope="module")
def items():
    run = thin_run()
    task = run.config.task("qa")
    return rollouts.encode(run.policy, task, question_examples(4))


@pytest.fixture
def rewarded(monkeypatch):
    """Searches whose generations the test counts: `adapt` calls back after each, and finds zero."""

    def adapt(run, items, *, key, settings, on_chunk):
        if settings.generations == 13:
            raise InputError("prompts: are unlucky.")
        if settings.generations == 14:
            raise ZeroDivisionError("a bug")
        for done in range(1, settings.generations + 1):
            on_chunk(done, History(*([0.25 * done] for _ in History._fields)))
        return Adaptation(run.offsets, 0.0, float(settings.generations), None)

    monkeypatch.setattr(adaptation, "adapt", adapt)
    run = thin_run()
    made = Rewarded(run, run.config.search, max_queue=2)
    yield made
    made.close()


def test_a_search_by_all_data_begins_again_at_generation_1_with_the_best_so_far(
    rewarded, items, monkeypatch
):
    """As `adapt` calls back behind the gate: first for the halves, then for the search by all."""
    parts = [[0.5, 0.25, 0.75], [1.0, 3.0, 2.0]]

    def adapt(run, items, *, key, settings, on_chunk):
        for best in parts:
            for done in range(1, len(best) + 1):
                on_chunk(done, History(*([np.asarray(best[:done])] * len(History._fields))))
        return Adaptation(run.offsets, 0.0, 1.0, None)

    monkeypatch.setattr(adaptation, "adapt", adapt)
    job, seen = submit(rewarded, items, 3), []
    while not job.ended:
        rewarded.step()
        seen.append([tuple(x) for x in job.curve])
    halves = [(1, 0.5, 0.5), (2, 0.5, 0.25), (3, 0.75, 0.75)]
    whole = [(1, 1.0, 1.0), (2, 3.0, 3.0), (3, 3.0, 2.0)]
    assert seen == [halves[:1], halves[:2], halves, whole[:1], whole[:2], whole, whole]


def submit(rewarded, items, generations=2):
    return rewarded.submit(items, method="cem", seed=1, generations=generations)


def test_a_search_by_reward_goes_on_by_a_generation_a_step(rewarded, items):
    assert not rewarded.step()
    job, other = submit(rewarded, items), submit(rewarded, items, 1)
    seen = []
    while rewarded.step():
        seen.append((job.state, job.generation, other.state, other.generation))
    assert seen == [
        ("running", 1, "queued", 0),
        ("running", 2, "queued", 0),
        ("done", 2, "queued", 0),
        ("done", 2, "running", 1),
        ("done", 2, "done", 1),
    ]
    assert job.result.fitness_after == 2
    assert job.progress.best == 0.5


def test_a_search_that_is_cancelled_ends_at_its_next_turn(rewarded, items):
    job, other = submit(rewarded, items, 9), submit(rewarded, items, 1)
    rewarded.step()
    job.cancel()
    waiting = submit(rewarded, items, 1)
    waiting.cancel()
    while rewarded.step():
        pass
    assert (job.state, job.generation, job.result) == ("cancelled", 1, None)
    assert other.state == "done"
    assert waiting.state == "cancelled"


@pytest.mark.parametrize(
    ("generations", "error"),
    [(13, "prompts: are unlucky."), (14, "the search failed (ZeroDivisionError).")],
)
def test_a_search_that_fails_says_why_and_the_next_one_goes_on(rewarded, items, generations, error):
    job, other = submit(rewarded, items, generations), submit(rewarded, items, 1)
    while rewarded.step():
        pass
    assert (job.state, job.error) == ("failed", error)
    assert other.state == "done"


def test_as_many_as_may_wait_and_no_more(rewarded, items):
    first, _ = submit(rewarded, items), submit(rewarded, items)
    with pytest.raises(QueueFullError, match="2 jobs wait"):
        submit(rewarded, items)
    first.cancel()
    assert submit(rewarded, items).state == "queued"


def test_closing_cancels_what_waits_and_what_runs(rewarded, items):
    running, waiting = submit(rewarded, items, 9), submit(rewarded, items)
    rewarded.step()
    rewarded.close()
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    assert not rewarded.step()


@pytest.mark.parametrize(("method", "space"), [("cem", "full"), ("experts", "experts")])
def test_a_search_by_reward_is_adapt_with_its_own_settings(monkeypatch, items, method, space):
    asked = []

    def adapt(run, items, *, key, settings, on_chunk):
        asked.append((items, jax.random.key_data(key).tolist(), settings))
        return Adaptation(run.offsets, 0.0, 1.0, None)

    monkeypatch.setattr(adaptation, "adapt", adapt)
    run = thin_run()
    rewarded = Rewarded(run, dataclasses.replace(run.config.search, fitness="likelihood"))
    job = rewarded.submit(items, method=method, seed=5, generations=7)
    while rewarded.step():
        pass
    rewarded.close()
    ((given, key, settings),) = asked
    assert given is items
    assert key == jax.random.key_data(jax.random.key(5)).tolist()
    own = {"method": "cem", "space": space, "fitness": "reward", "task": "qa", "generations": 7}
    assert settings == dataclasses.replace(run.config.search, **own)
    assert job.result.fitness_after == 1
