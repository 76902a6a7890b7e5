"""A vote over random perturbations: who is kept, who wins, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import TrainedRun, best_perturbations, vote
from grpocem_jax.tasks import TASKS, Example, Reward
from grpocem_jax.utils.errors import InputError
from tests.runs import PROMPT, random_offsets, thin_policy

pytestmark = pytest.mark.usefixtures("one_policy")
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def run():
    policy, config = thin_policy()
    return TrainedRun(config, policy, policy.zero)


@pytest.fixture(scope="module")
def items(run):
    def length(prompts, completions, **columns):
        return [float(sum(map(ord, text)) % 100) for text in completions]

    task = dataclasses.replace(TASKS["general"], rewards=(Reward(length),))
    return rollouts.encode(run.policy, task, [Example(PROMPT, {}), Example(PROMPT, {})])


def stacked(*adapters):
    return jax.tree.map(lambda *x: jnp.stack(x), *adapters)


def test_the_best_of_some_perturbations_are_kept_in_order(run, items):
    options = {"population_size": 6, "noise_std": 1.0}
    everyone = best_perturbations(run, items, KEY, keep=6, **options)
    reward_key = jax.random.split(KEY)[1]
    rewards = rollouts.population_rewards(
        run.policy,
        everyone,
        items,
        reward_key,
        run.config.generation,
        num_samples=1,
        buckets=run.config.search.buckets,
    ).mean(-1)
    assert len(np.unique(rewards)) > 1
    assert rewards.tolist() == sorted(rewards, reverse=True)
    two = best_perturbations(run, items, KEY, keep=2, **options)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[:2]), two, everyone)
    fewest = best_perturbations(run, items, KEY, keep=1, population_size=2)
    assert len(jax.tree.leaves(fewest)[0]) == 1


def test_the_answer_of_most_adapters_wins_and_ties_go_to_the_first(run):
    far = random_offsets(run.policy.zero, 2, scale=3.0)
    prompts = [PROMPT, "The film"]
    base, other = (adaptation.complete(run, offsets, prompts) for offsets in (run.offsets, far))
    assert base != other
    for adapters, expected, adapter, votes in (
        ((far, run.offsets, run.offsets), base, 1, 2),
        ((far, run.offsets, far), other, 0, 2),
        ((run.offsets, far), base, 0, 1),
        ((far, run.offsets), other, 0, 1),
    ):
        decided = vote(run, stacked(*adapters), prompts)
        for text, ours, theirs, found in zip(expected, base, other, decided, strict=True):
            assert found.text == text
            if ours != theirs:
                assert (found.adapter, found.votes) == (adapter, votes)
    # Answers that are equal to the one who counts are votes for each other.
    (found,) = vote(run, stacked(far, run.offsets), prompts[:1], answer=lambda text: "same")
    assert (found.text, found.votes) == (other[0], 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 5, "population_size": 4}, "^keep=5: must be at most population_size=4"),
        ({"keep": 0}, "^keep=0: must be at least 1"),
        ({"samples": 0}, "^samples=0: must be at least 1"),
        ({"noise_std": 0.0}, r"^noise_std=0\.0: must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(run, items, options, reason):
    with pytest.raises(InputError, match=reason):
        best_perturbations(run, items, KEY, **options)


def test_nothing_to_choose_by_is_refused(run, items):
    with pytest.raises(InputError, match=r"^items: there are none"):
        best_perturbations(run, [], KEY)
    context = run.policy.model.context_length
    long = items[0]._replace(tokens=np.ones(context - 2, np.int32))
    with pytest.raises(InputError, match=f"^a prompt of {context - 2} tokens and generation"):
        best_perturbations(run, [*items, long], KEY)

    def nothing(prompts, completions, **columns):
        return [None] * len(completions)

    silent = dataclasses.replace(items[0].task, rewards=(Reward(nothing),))
    with pytest.raises(InputError, match=r"^items: no perturbation got a reward"):
        best_perturbations(run, [item._replace(task=silent) for item in items], KEY)


def test_keys_of_either_kind_choose_the_same(run, items):
    new, old = jax.random.key(4), jax.random.PRNGKey(4)
    options = {"population_size": 3, "keep": 2, "noise_std": 1.0}
    found = (best_perturbations(run, items, key, **options) for key in (new, old))
    jax.tree.map(np.testing.assert_array_equal, *found)
