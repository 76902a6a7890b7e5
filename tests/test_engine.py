"""The rollout engine: what the completions of a prompt depend on, and what they do not."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adaptation, rollouts
from grpocem_jax.tasks import TASKS, Example, Reward
from grpocem_jax.utils.errors import InputError
from tests.runs import random_offsets, thin_policy

# Of four lengths, so that padding differs from row to row.
TEXTS = (
    "The film",
    "Review: The soup was cold and the waiter was rude.\nSentiment:",
    "Review: Bad.\nSentiment:",
    "Review: The tea was warm and good.\nSentiment:",
)


pytestmark = pytest.mark.usefixtures("one_policy")


@pytest.fixture(scope="module")
def policy():
    return thin_policy()[0]


@pytest.fixture(scope="module")
def prompts(policy):
    return [np.asarray(policy.encode(text), np.int32) for text in TEXTS]


@pytest.fixture(scope="module")
def own(policy):
    """An adapter for each prompt, far enough from one another to be told apart."""
    each = [random_offsets(policy.zero, seed, scale=2.0) for seed in range(len(TEXTS))]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


@pytest.fixture(scope="module")
def complete(policy):
    generation = thin_policy()[1].generation
    # At the temperature the small model is not of one mind.
    options = {"num_samples": 2, "temperature": 3.0, "buckets": (32,)}

    def call(offsets, prompts, keys, policy=policy, **changes):
        return rollouts.complete(
            policy, offsets, prompts, keys, generation, **{**options, **changes}
        )

    return call


def keys(seed=3):
    return jax.random.split(jax.random.key(seed), len(TEXTS))


def row(tree, number):
    return jax.tree.map(lambda x: x[number], tree)


def assert_same(found, other, rows=slice(None), other_rows=slice(None)):
    """The same tokens, and log-probabilities up to rounding."""
    np.testing.assert_array_equal(found.tokens[rows], other.tokens[other_rows])
    np.testing.assert_array_equal(found.mask[rows], other.mask[other_rows])
    assert found.texts[rows] == other.texts[other_rows]
    for name in ("logps", "entropies"):
        mine, theirs = (getattr(x.rollouts, name) for x in (found, other))
        np.testing.assert_allclose(mine[rows], theirs[other_rows], atol=1e-4)


def test_a_stop_string_that_the_last_token_completes_is_an_end(policy, complete, prompts):
    long = complete(policy.zero, prompts, keys())
    found = np.argwhere(long.cut)
    assert len(found) > 0
    for row, sample in found:
        stop = long.texts[row][sample][-4:]
        stopping = dataclasses.replace(policy, stop_strings=(stop,))
        assert stopping.stopped([long.tokens[row, sample]]) == [True]
        assert policy.stopped([long.tokens[row, sample]]) == [False]
    again = complete(policy.zero, prompts, keys(), policy=stopping)
    assert not again.cut[row, sample]
    np.testing.assert_array_equal(again.tokens, long.tokens)


def test_a_row_with_an_adapter_of_its_own_is_completed_as_by_that_adapter_alone(
    complete, prompts, own
):
    together = complete(own, prompts, keys(), own_adapters=True)
    assert together.tokens.shape[:2] == (4, 2)
    for number, prompt in enumerate(prompts):
        one = slice(number, number + 1)
        assert_same(together, complete(row(own, number), [prompt], keys()[one]), one)
        # With the next row's adapter it would be completed otherwise.
        other = complete(row(own, (number + 1) % len(prompts)), [prompt], keys()[one])
        assert other.texts[0] != together.texts[number]


def test_a_batch_is_completed_as_its_prompts_one_by_one(complete, prompts, own):
    offsets = row(own, 0)
    together = complete(offsets, prompts, keys())
    for number, prompt in enumerate(prompts):
        one = slice(number, number + 1)
        assert_same(together, complete(offsets, [prompt], keys()[one]), one)
    assert len(set(map(tuple, together.texts))) == len(prompts)


def test_in_another_order_the_completions_go_with_their_prompts(complete, prompts, own):
    order = np.array([2, 0, 3, 1])
    found = complete(own, prompts, keys(), own_adapters=True)
    mixed = complete(row(own, order), [prompts[i] for i in order], keys()[order], own_adapters=True)
    assert [found.texts[i] for i in order] == mixed.texts
    np.testing.assert_array_equal(found.tokens[order], mixed.tokens)


def test_a_longer_bucket_pads_more_and_changes_nothing(complete, prompts, own):
    short, long = (
        complete(row(own, 0), prompts, keys(), buckets=buckets) for buckets in ((32,), (8, 64))
    )
    assert short.prompts.tokens.shape == (4, 32)
    assert long.prompts.tokens.shape == (4, 64)
    assert short.prompts.mask.sum() == long.prompts.mask.sum() == sum(map(len, prompts))
    assert_same(short, long)


def test_greedy_completions_depend_on_neither_key_nor_temperature(complete, prompts, own):
    greedy = functools.partial(complete, row(own, 0), prompts, num_samples=1, greedy=True)
    first, second = greedy(keys(seed=1)), greedy(keys(seed=2), temperature=0.5)
    assert first.texts == second.texts
    np.testing.assert_array_equal(first.tokens, second.tokens)
    # Drawn ones do depend on the key.
    drawn = functools.partial(complete, row(own, 0), prompts, num_samples=1)
    assert drawn(keys(seed=1)).texts != drawn(keys(seed=2)).texts


def test_what_is_on_the_host_is_what_is_on_the_device(complete, prompts, policy):
    out = complete(policy.zero, prompts, keys())
    np.testing.assert_array_equal(out.tokens, out.rollouts.tokens)
    np.testing.assert_array_equal(out.mask, out.rollouts.mask)
    assert isinstance(out.tokens, np.ndarray)
    assert isinstance(out.mask, np.ndarray)
    assert out.finite.shape == (4, 2)
    assert out.finite.all()
    assert out.texts == rollouts.decode(policy, out.tokens, out.mask)


def test_a_reward_is_called_once_for_all_completions_of_its_task(complete, prompts, policy):
    calls = collections.defaultdict(list)

    def task(name, value):
        def reward(prompts, completions, **columns):
            calls[name].append((list(prompts), list(completions)))
            return [value] * len(completions)

        return dataclasses.replace(TASKS["general"], name=name, rewards=(Reward(reward),))

    # The rows of two tasks, mixed.
    tasks = {"one": task("one", 1.0), "two": task("two", 2.0)}
    names = ("one", "two", "two", "one")
    items = [
        rollouts.Item(tasks[name], Example(text, {}), prompt)
        for name, text, prompt in zip(names, TEXTS, prompts, strict=True)
    ]
    out = complete(policy.zero, prompts, keys())
    scores = rollouts.score(items, out.texts)
    for name, first, second in (("one", 0, 3), ("two", 1, 2)):
        ((asked, judged),) = calls[name]
        assert asked == [TEXTS[first]] * 2 + [TEXTS[second]] * 2
        assert judged == out.texts[first] + out.texts[second]
    np.testing.assert_array_equal(scores.total, [[1, 1], [2, 2], [2, 2], [1, 1]])


def test_a_candidate_is_worth_the_mean_reward_of_its_own_completions(
    complete, prompts, own, policy
):
    def length(prompts, completions, **columns):
        return [float(sum(map(ord, text)) % 100) for text in completions]

    task = dataclasses.replace(TASKS["general"], rewards=(Reward(length),))
    items = [rollouts.Item(task, Example(t, {}), p) for t, p in zip(TEXTS, prompts, strict=True)]
    generation = dataclasses.replace(thin_policy()[1].generation, temperature=3.0)
    key = jax.random.key(3)
    arguments = (items, key, generation)
    found = rollouts.population_rewards(policy, own, *arguments, num_samples=2, buckets=(32,))
    expected = [
        rollouts.score(items, complete(row(own, c), prompts, keys()).texts).total.mean(-1)
        for c in range(4)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(np.unique(found, axis=0)) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_batches_hold_each_prompt_once_by_length_and_are_filled_with_the_first(size):
    lengths = (9, 2, 5, 2, 7)
    batches = list(rollouts.batches([np.zeros(n, np.int32) for n in lengths], size))
    order = [i for rows, _ in batches for i in rows]
    # By length, and of equal lengths the first first.
    assert order == [1, 3, 2, 4, 0]
    for rows, filled in batches:
        assert filled.tolist() == rows + rows[:1] * (size - len(rows))
    assert all(len(rows) == size for rows, _ in batches[:-1])


def test_a_prompt_that_cannot_be_completed_is_refused_before_the_others_are(monkeypatch, policy):
    def generated(*args, **options):
        raise AssertionError("generated")

    monkeypatch.setattr(rollouts.engine, "generate", generated)
    run = adaptation.TrainedRun(thin_policy()[1], policy, policy.zero)
    with pytest.raises(InputError, match="the prompt is empty"):
        adaptation.complete(run, policy.zero, ["The film", " "])
