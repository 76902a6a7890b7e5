"""Held-out comparison: gains and intervals against numbers worked out by hand."""

import math

import jax
import numpy as np
import pytest

from grpocem_jax import evaluation
from grpocem_jax.config import parse_config
from grpocem_jax.config_files import load_config
from grpocem_jax.errors import InputError
from tests.conftest import OUT_OF_MEMORY


def test_gains_are_paired_and_overall_weighs_tasks_alike():
    tasks = ["qa"] * 4 + ["general"] * 2
    before = np.array([0.0, 0.0, 1.0, 1.0, -1.0, 0.0])
    after = np.array([1.0, 0.0, 1.0, 2.0, 0.0, 1.0])
    gains = evaluation.compare(["qa", "general"], tasks, before, after)
    # qa: differences 1, 0, 0, 1: mean 0.5, sample variance 1/3, standard error sqrt(1/12).
    half = 1.96 * math.sqrt(1 / 12)
    qa = gains["qa"]
    assert (qa.before, qa.after, qa.gain, qa.n) == (0.5, 1.0, 0.5, 4)
    assert qa.gain_ci95 == pytest.approx((0.5 - half, 0.5 + half))
    # general: differences 1 and 1: no variance.
    assert gains["general"].gain_ci95 == pytest.approx((1.0, 1.0))
    # overall: (0.5 + 1) / 2, not the mean over prompts (0.667); standard error sqrt(1/12) / 2.
    overall = gains["overall"]
    assert overall.gain == pytest.approx(0.75)
    assert overall.n == 6
    assert overall.gain_ci95 == pytest.approx((0.75 - half / 2, 0.75 + half / 2))


def test_prompts_that_abstained_are_left_out():
    gains = evaluation.compare(
        ["qa"], ["qa"] * 3, np.array([0.0, np.nan, 0.0]), np.array([1.0, 1.0, 0.0])
    )
    assert (gains["qa"].n, gains["qa"].gain) == (2, 0.5)
    assert evaluation.compare(["qa"], ["qa"], np.array([np.nan]), np.array([0.0])) == {}
    # Nor is there an interval of one: an infinite one is not JSON.
    one = np.array([0.0, np.nan])
    assert evaluation.compare(["qa"], ["qa"] * 2, one, np.ones(2)) == {}


def test_the_mean_reward_weighs_tasks_alike_and_leaves_out_what_abstained():
    # (0.5 + 1) / 2; the mean over prompts would be 2/3.
    assert evaluation.mean_reward(["a", "a", "b", "b"], np.array([0, 1, 1, np.nan])) == 0.75
    assert evaluation.mean_reward(["a", "b"], np.array([0.5, np.nan])) == 0.5
    assert math.isnan(evaluation.mean_reward(["a"], np.array([np.nan])))


def test_no_more_prompts_are_evaluated_at_once_than_there_are(monkeypatch):
    class Generated(Exception):  # noqa: N818
        pass

    def generate(policy, adapter, prompts, *args, **options):
        raise Generated(len(prompts.tokens))

    monkeypatch.setattr(evaluation.rollouts, "generate", generate)
    settings = load_config("tiny")
    settings.train.eval_batch_size = 2**31 - 1
    item = evaluation.rollouts.Item(None, None, np.ones(3, np.int32))
    arguments = ([item] * 3, jax.random.key(0), parse_config(settings))
    with pytest.raises(Generated, match="3"):
        evaluation.evaluate(None, {}, *arguments, greedy=True)


@pytest.mark.parametrize(
    ("size", "advice"),
    [(16, "lower train.eval_batch_size=16 to 8"), (1, "lower generation.max_new_tokens=24")],
)
def test_what_to_lower_is_said_where_memory_runs_out(size, advice, monkeypatch):
    def generate(*args, **options):
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(evaluation.rollouts, "generate", generate)
    settings = load_config("tiny")
    settings.train.eval_batch_size = size
    item = evaluation.rollouts.Item(None, None, np.ones(3, np.int32))
    with pytest.raises(InputError, match=f"out of device memory in the evaluation: {advice}"):
        evaluation.evaluate(
            None, {}, [item] * size, jax.random.key(0), parse_config(settings), greedy=True
        )
