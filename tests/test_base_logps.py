"""The base model's log-probabilities of completions, which a reward function may ask for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import rollouts
from grpocem_jax.builtin import data
from grpocem_jax.models import sampling
from grpocem_jax.tasks import TASKS
from grpocem_jax.tasks.base import Example, Reward, Task
from tests.runs import thin_policy, tiny_policy


@pytest.fixture(scope="module")
def policy():
    return thin_policy()[0]


def mean_base_logp(prompts, completions, *, base_logps, **columns):
    return [float(np.mean(each)) for each in base_logps]


def length(prompts, completions, **columns):
    assert "base_logps" not in columns
    return [float(len(text)) for text in completions]


ASKS = Task("asks", {"text": ""}, "{text}", (Reward(mean_base_logp), Reward(length, 0.5)))
PLAIN = Task("plain", {"text": ""}, "{text}", (Reward(length),))


def completed(policy, prompts, groups):
    """Completions as a rollout would leave them: each text and an end token."""
    end = int(policy.end_ids[0])
    ids = [[[*policy.encode_completion(text), end] for text in group] for group in groups]
    count = max(len(row) for group in ids for row in group)
    tokens = np.full((len(ids), len(ids[0]), count), 7, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for p, group in enumerate(ids):
        for g, row in enumerate(group):
            tokens[p, g, : len(row)], mask[p, g, : len(row)] = row, True
    zeros = jnp.zeros(tokens.shape)
    return rollouts.Completions(
        rollouts.pad([policy.encode(prompt) for prompt in prompts], 24),
        sampling.Rollouts(jnp.asarray(tokens), jnp.asarray(mask), zeros, zeros),
        tokens,
        mask,
        np.ones(mask.shape[:2], bool),
        np.zeros(mask.shape[:2], bool),
        [list(group) for group in groups],
    )


def expected(policy, prompt, completion):
    """The same from one whole forward, padded, with the log-softmax of all logits."""
    ids = [*policy.encode(prompt), *policy.encode_completion(completion), int(policy.end_ids[0])]
    start, tokens = len(policy.encode(prompt)), np.zeros(32, np.int32)
    tokens[: len(ids)] = ids
    logps = log_softmax(policy.params, policy.zero, tokens, np.arange(32) < len(ids), policy.model)
    return np.asarray(logps)[np.arange(start - 1, len(ids) - 1), ids[start:]]


@functools.partial(jax.jit, static_argnums=4)
def log_softmax(params, offsets, tokens, mask, model):
    hidden = model.forward(params, offsets, tokens, mask, None)
    return jax.nn.log_softmax(model.logits(params, hidden, 0, None))


PROMPTS = ["Review: The soup was cold.", "Text: A dog", "The waiter was kind", "Once"]
GROUPS = [[" It was good.", " No"], [" ran.", " sat and ran off."], [" a", " b"], [" c d", " e"]]


@pytest.mark.parametrize("asking", [[0], [1, 3], [0, 1, 2], [0, 1, 2, 3]])
def test_they_are_those_of_a_whole_forward_for_the_prompts_whose_rewards_ask(policy, asking):
    tasks = [ASKS if row in asking else PLAIN for row in range(4)]
    items = [
        rollouts.encode(policy, task, [Example(prompt, {})])[0]
        for task, prompt in zip(tasks, PROMPTS, strict=True)
    ]
    out = rollouts.with_base_logps(policy, items, completed(policy, PROMPTS, GROUPS))
    scores = rollouts.score(items, out.texts, out.base_logps)
    for row, (prompt, group) in enumerate(zip(PROMPTS, GROUPS, strict=True)):
        for number, text in enumerate(group):
            found = out.base_logps[row][number]
            if row not in asking:
                assert found.size == 0
                assert scores.total[row, number] == len(text)
                continue
            wanted = expected(policy, prompt, text)
            np.testing.assert_allclose(found, wanted, atol=2e-4)
            assert scores.functions["mean_base_logp"][row, number] == pytest.approx(
                wanted.mean(), abs=2e-4
            )


def test_nothing_is_computed_where_no_reward_asks(policy):
    items = rollouts.encode(policy, PLAIN, [Example(prompt, {}) for prompt in PROMPTS])
    out = completed(policy, PROMPTS, GROUPS)
    assert rollouts.with_base_logps(dataclasses.replace(policy, params=None), items, out) is out


def test_a_process_reward_asks_only_where_steps_are_judged(policy):
    def by_steps(prompts, completions, *, base_logps, **columns):
        return [[] for _ in completions]

    task = dataclasses.replace(PLAIN, process_reward=by_steps)
    items = rollouts.encode(policy, task, [Example(prompt, {}) for prompt in PROMPTS])
    out = completed(policy, PROMPTS, GROUPS)
    assert rollouts.with_base_logps(policy, items, out) is out
    asked = rollouts.with_base_logps(policy, items, out, steps=True)
    assert all(logps.size for group in asked.base_logps for logps in group)


def test_they_are_taken_along_with_some_prompts(policy):
    items = rollouts.encode(policy, ASKS, [Example(prompt, {}) for prompt in PROMPTS])
    out = rollouts.with_base_logps(policy, items, completed(policy, PROMPTS, GROUPS))
    some = out.take(np.array([2, 0]))
    assert some.texts == [GROUPS[2], GROUPS[0]]
    assert some.base_logps == [out.base_logps[2], out.base_logps[0]]


def test_word_salad_and_repetition_are_worth_less_than_text():
    """The reward of free text cannot be won by different words, nor by the likeliest ones."""
    policy, _ = tiny_policy()  # as pretrained
    rows = [row["text"] for row in data.rows("general", "heldout")]
    draw = np.random.default_rng(0)
    words = sorted({word for text in rows for word in text.split()})
    means = {}
    for kind in ("text", "shuffled", "salad", "repeated"):
        prompts, groups = [], []
        for text in sorted(rows, key=len)[-30:]:
            opening, rest = text.split()[:3], text.split()[3:]
            made = {
                "text": rest,
                "shuffled": list(draw.permutation(rest)),
                "salad": list(draw.choice(words, len(rest), replace=False)),
                "repeated": (rest[:3] * len(rest))[: len(rest)],
            }[kind]
            prompts.append(" ".join(opening))
            groups.append([f" {' '.join(made).rstrip('.')}."])
        items = rollouts.encode(policy, TASKS["general"], [Example(text, {}) for text in prompts])
        out = rollouts.with_base_logps(policy, items, completed(policy, prompts, groups))
        means[kind] = rollouts.score(items, out.texts, out.base_logps).total.mean()
    assert means["text"] > 0.6
    assert max(means["shuffled"], means["salad"]) < -0.95
    assert means["repeated"] < -0.8
