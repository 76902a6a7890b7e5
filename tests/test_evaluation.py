"""Held-out comparison: gains and intervals against numbers worked out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import rollouts
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.tasks import TASKS, Example, Reward
from grpocem_jax.training import evaluation
from grpocem_jax.utils.errors import InputError
from tests.runs import OUT_OF_MEMORY, random_offsets, tiny_policy

pytestmark = pytest.mark.usefixtures("one_policy")


def test_a_reward_of_1_or_minus_1_is_an_accuracy():
    tasks = ["sentiment"] * 4 + ["qa"] * 2
    before = np.array([1.0, -1.0, -1.0, -1.0, 0.5, 0.5])
    after = np.array([1.0, 1.0, -1.0, 1.0, 0.5, 1.0])
    gains = evaluation.compare(["sentiment", "qa"], tasks, before, after)
    judged = [TASKS["sentiment"], TASKS["qa"]]
    (found,) = evaluation.accuracies(judged, gains).values()
    # One of four right before, three after; half of the gain of reward, and of its interval.
    assert (found.before, found.after, found.gain, found.n) == (0.25, 0.75, 0.5, 4)
    assert found.gain_ci95 == tuple(x / 2 for x in gains["sentiment"].gain_ci95)
    other = dataclasses.replace(judged[0], rewards=(Reward(lambda **_: []),))
    assert evaluation.accuracies([other], gains) == {}
    (reward,) = judged[0].rewards
    double = dataclasses.replace(judged[0], rewards=(reward._replace(weight=2.0),))
    assert evaluation.accuracies([double], gains) == {}


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

    def complete(policy, offsets, prompts, *args, **options):
        raise Generated(len(prompts))

    monkeypatch.setattr(evaluation.rollouts, "complete", complete)
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
    def complete(*args, **options):
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(evaluation.rollouts, "complete", complete)
    settings = load_config("tiny")
    settings.train.eval_batch_size = size
    item = evaluation.rollouts.Item(None, None, np.ones(3, np.int32))
    with pytest.raises(InputError, match=f"out of device memory in the evaluation: {advice}"):
        evaluation.evaluate(
            None, {}, [item] * size, jax.random.key(0), parse_config(settings), greedy=True
        )


# Evaluation against a loop over prompts

# The longest first, and the first and the last are the same: batches of two hold prompts that are
# not in the order of ``items``, and a last one is filled up.
PROMPTS = (
    "Review: The soup was cold and the waiter was rude.\nSentiment:",
    "Review: The tea was warm and good.\nSentiment:",
    "Review: Bad.\nSentiment:",
    "The film",
    "Review: The soup was cold and the waiter was rude.\nSentiment:",
)
KEY = jax.random.key(5)


def by_words(prompts, completions, **columns):
    """A reward that tells prompts and completions apart."""
    return [float(len(p)) + worth(c) for p, c in zip(prompts, completions, strict=True)]


def worth(text):
    return sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 1000 / 1000


@pytest.fixture(scope="module")
def setting():
    """Policy, config and prompts; an adapter for each prompt."""
    policy, config = tiny_policy()
    train = dataclasses.replace(config.train, eval_batch_size=2, eval_samples=2)
    # At which the small model is not of one mind.
    generation = dataclasses.replace(config.generation, temperature=3.0)
    config = dataclasses.replace(config, train=train, generation=generation)
    task = dataclasses.replace(TASKS["general"], rewards=(Reward(by_words),))
    items = rollouts.encode(policy, task, [Example(prompt, {}) for prompt in PROMPTS])
    own = [random_offsets(policy.zero, seed, scale=2.0) for seed in range(len(items))]
    return policy, config, items, jax.tree.map(lambda *x: jnp.stack(x), *own)


def evaluated(setting, *, greedy):
    policy, config, items, own = setting
    return evaluation.evaluate(policy, own, items, KEY, config, greedy=greedy, own_adapters=True)


def alone(setting, row, adapter_row, *, greedy):
    """The completions of one prompt with an adapter and its own key, in a batch of itself."""
    policy, config, items, own = setting
    out = rollouts.complete(
        policy,
        jax.tree.map(lambda x: x[np.array([adapter_row] * 2)], own),
        [items[row].tokens] * 2,
        jnp.stack([jax.random.fold_in(KEY, row)] * 2),
        config.generation,
        num_samples=1 if greedy else config.train.eval_samples,
        temperature=config.generation.temperature,
        buckets=config.generation.prompt_buckets[-1:],
        greedy=greedy,
        own_adapters=True,
    )
    return out.texts[0]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_prompt_is_evaluated_as_if_alone_with_its_own_adapter_and_key(setting, greedy):
    rewards, texts = evaluated(setting, greedy=greedy)
    rows = range(len(PROMPTS))
    assert texts == [alone(setting, row, row, greedy=greedy) for row in rows]
    expected = [
        len(prompt) + np.mean([worth(text) for text in group])
        for prompt, group in zip(PROMPTS, texts, strict=True)
    ]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert [len(group) for group in texts] == [1 if greedy else 2] * len(PROMPTS)
    # By length, prompts 2 and 3 share a batch, and 0 and 1; with each other's adapters they would
    # be completed otherwise.
    others = [alone(setting, row, other, greedy=greedy) for row, other in enumerate((1, 0, 3, 2))]
    assert all(mine != other for mine, other in zip(texts, others, strict=False))


def test_judging_is_evaluating_with_samples_and_greedily(setting):
    policy, config, items, own = setting
    judged = evaluation.judge(policy, own, items, KEY, config, own_adapters=True)
    expected = (*evaluated(setting, greedy=False), *evaluated(setting, greedy=True))
    for found, wanted in zip(judged, expected, strict=True):
        if isinstance(wanted, list):
            assert found == wanted
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_samples_are_drawn_and_differ_between_places_where_greedy_completions_do_not(setting):
    policy, config, items, own = setting
    same = jax.tree.map(lambda x: jnp.stack([x[0]] * len(x)), own)
    drawn, best = (
        evaluation.evaluate(policy, same, items, KEY, config, greedy=greedy, own_adapters=True)[1]
        for greedy in (False, True)
    )
    assert PROMPTS[0] == PROMPTS[4]
    assert drawn[0] != drawn[4]
    assert best[0] == best[4]
    assert len({text for group in drawn for text in group}) > len(PROMPTS)
    assert any(group != greedy * 2 for group, greedy in zip(drawn, best, strict=True))
