"""Searches beside completions: who waits for whom, and for how long."""

import math
import threading
import time

import pytest

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Adaptation
from grpocem_jax.search.loop import History
from grpocem_jax.serving.aside import Aside
from grpocem_jax.serving.rewarded import Rewarded
from grpocem_jax.serving.searches import QueueFullError
from grpocem_jax.utils.errors import InputError
from tests.runs import question_examples
from tests.serving import thin_run


def test_a_step_that_is_short_is_waited_for():
    left = [True, True, False]
    aside = Aside(lambda: left.pop(0), patience_s=20)
    assert [aside(idle=False) for _ in range(3)] == [True, True, False]
    assert left == []
    aside.close()


def test_a_step_that_is_long_goes_on_beside_the_caller():
    ended, calls = threading.Event(), []

    def step():
        calls.append(threading.get_ident())
        return not ended.wait(20)

    aside = Aside(step, patience_s=0.05)
    began = time.monotonic()
    assert all(aside(idle=False) for _ in range(1000))
    assert time.monotonic() - began < 5
    assert aside(idle=True)
    assert len(calls) == 1
    ended.set()
    while aside(idle=True):
        pass
    assert set(calls) != {threading.get_ident()}
    aside.close()


def test_a_step_that_fails_is_logged_and_the_next_one_goes_on(caplog):
    steps = iter([ZeroDivisionError("a bug"), None])

    def step():
        error = next(steps)
        if error:
            raise error
        return False

    aside = Aside(step, patience_s=20)
    assert aside(idle=False)
    assert "a bug" in caplog.text
    assert not aside(idle=False)
    aside.close()


def test_what_never_began_is_closed():
    Aside(lambda: False, patience_s=1).close()


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


def test_a_search_by_reward_is_that_of_adapt_on_the_same_prompts(items):
    import dataclasses

    import jax
    import numpy as np

    run = thin_run()
    rewarded = Rewarded(run, run.config.search)
    job = submit(rewarded, items, 2)
    while rewarded.step():
        pass
    rewarded.close()
    settings = dataclasses.replace(
        run.config.search, method="cem", fitness="reward", task="qa", generations=2
    )
    alone = adaptation.adapt(run, items, key=jax.random.key(1), settings=settings)
    assert job.state == "done", job.error
    assert math.isclose(job.result.fitness_after, alone.fitness_after)
    for name, value in alone.offsets.items():
        np.testing.assert_array_equal(job.result.offsets[name], value)
