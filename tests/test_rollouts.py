"""Between text and arrays: padding, buckets, decoding, scoring, step rewards."""

import dataclasses
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import grpo, rollouts
from grpocem_jax.runs import rundir
from grpocem_jax.tasks.base import Example, Reward, StepReward, Task
from grpocem_jax.utils.errors import InputError

# One token a letter; token 0 ends a text.
POLICY = types.SimpleNamespace(
    end_ids=np.array([0]),
    encode=lambda text: [ord(c) for c in text],
    decode_completions=lambda rows: ["".join(chr(i) for i in row if i) for row in rows],
)


def make_task(reward, process_reward=None):
    rewards = () if reward is None else (Reward(reward),)
    return Task("echo", {"text": ""}, "{text}", rewards, process_reward)


def items(task, *prompts):
    examples = [Example(p, {"answer": p.upper()}) for p in prompts]
    return rollouts.encode(POLICY, task, examples)


def finding(task):
    """The task, with a search for the completion that a reward raises on."""
    return dataclasses.replace(task, find_failing_completion=True)


def completions(*groups):
    length = max(len(text) for group in groups for text in group)
    tokens = np.zeros((len(groups), len(groups[0]), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for p, group in enumerate(groups):
        for g, text in enumerate(group):
            tokens[p, g, : len(text)] = [ord(c) for c in text]
            mask[p, g, : len(text)] = True
    return tokens, mask


def test_prompts_are_padded_on_the_left():
    prompts = rollouts.pad([item.tokens for item in items(make_task(None), "ab", "c")], 3)
    np.testing.assert_array_equal(prompts.tokens, [[0, 97, 98], [0, 0, 99]])
    np.testing.assert_array_equal(prompts.mask, [[False, True, True], [False, False, True]])


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="echo: a prompt is empty"):
        items(make_task(None), "a", "")


@pytest.mark.parametrize(("longest", "expected"), [(1, 8), (8, 8), (9, 16), (17, 20), (21, 21)])
def test_the_smallest_bucket_that_holds_the_prompt(longest, expected):
    assert rollouts.bucket_length(longest, (8, 16, 20)) == expected
    assert rollouts.bucket_length(longest, (20, 8, 16)) == expected


def test_decoding_leaves_out_the_end_token_only():
    tokens, mask = completions(["ab\0", "abc"])
    assert rollouts.decode(POLICY, tokens, mask) == [["ab", "abc"]]


def test_rewards_come_back_in_place_and_columns_are_repeated_by_group():
    def reward(prompts, completions, *, answer):
        return [
            None if c == "?" else float(len(c)) if a == p.upper() else -1.0
            for p, c, a in zip(prompts, completions, answer, strict=True)
        ]

    scores = rollouts.score(items(make_task(reward), "x", "y"), [["a", "bb"], ["?", "cccc"]])
    np.testing.assert_array_equal(scores.total, [[1.0, 2.0], [np.nan, 4.0]])
    np.testing.assert_array_equal(scores.functions["reward"], scores.total)


def test_a_total_is_the_weighted_sum_of_the_functions_that_do_not_abstain():
    def length(prompts, completions, **columns):
        return [float(len(c)) for c in completions]

    def vowels(prompts, completions, **columns):
        return [None if c == "?" else sum(letter in "aeiou" for letter in c) for c in completions]

    task = dataclasses.replace(make_task(None), rewards=(Reward(length), Reward(vowels, -0.5)))
    scores = rollouts.score(items(task, "x"), [["aeb", "?"]])
    np.testing.assert_array_equal(scores.total, [[3 - 0.5 * 2, 1.0]])
    np.testing.assert_array_equal(scores.functions["vowels"], [[2.0, np.nan]])


class HostileError(Exception):
    """An error and a value of which nothing can be had."""

    def __str__(self):
        raise self

    __repr__ = __float__ = __str__


@pytest.mark.parametrize(
    "value",
    [
        *("0.5", b"1", "high", float("nan"), float("-inf"), [1.0, 2.0]),
        *(1e39, -1e39, 10**400, 10**5000, HostileError()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_finite_number_is_no_reward_whatever_it_looks_like(value):
    def odd(prompts, completions, **columns):
        return [1.0, value]

    with pytest.raises(InputError) as error:
        rollouts.score(items(make_task(odd), "x"), [["good", "bad"]])
    assert "odd returned" in str(error.value)
    assert "for the completion 'bad' of the prompt 'x'" in str(error.value)


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        *((3e38, weights) for weights in [(10.0, 1.0), (1.0, 1.0), (1.0, -10.0), (10.0, -10.0)]),
        (1e9, (1e10, 1.0)),  # its square would be infinite
    ],
)
def test_a_weighted_sum_that_float32_does_not_hold_squared_is_refused(value, weights):
    def one(prompts, completions, **columns):
        return [value] * len(completions)

    def two(prompts, completions, **columns):
        return [value] * len(completions)

    rewards = tuple(Reward(f, w) for f, w in zip((one, two), weights, strict=True))
    task = dataclasses.replace(make_task(None), rewards=rewards)
    # In float32 the sums of 3e38 are infinite, and the last is NaN, as if both had abstained.
    with pytest.raises(InputError, match=r"the task echo .* more than 1e\+18 in size"):
        rollouts.score(items(task, "x"), [["a", "b"]])


def test_the_largest_rewards_have_the_advantages_of_small_ones():
    rewards = np.array([1.0, -1.0, 0.5, 0.0], np.float32)
    small, large = (grpo.group_normalize(x) for x in (rewards, rewards * np.float32(1e18)))
    np.testing.assert_allclose(large, small, rtol=1e-5)


def test_numbers_of_any_library_are_rewards():
    def mixed(prompts, completions, **columns):
        return np.array([0.5, -1.0])

    def single(prompts, completions, **columns):
        return [np.float32(0.25), jnp.float32(2.0)]

    for function, expected in ((mixed, [[0.5, -1.0]]), (single, [[0.25, 2.0]])):
        scores = rollouts.score(items(make_task(function), "x"), [["a", "b"]])
        np.testing.assert_array_equal(scores.total, expected)


def test_a_reward_that_raises_is_named_with_the_sample_it_raises_on():
    def divides(prompts, completions, **columns):
        return [1 / len(c.strip()) for c in completions]

    with pytest.raises(InputError) as error:
        rollouts.score(items(finding(make_task(divides)), "x", "y"), [["a", "b"], ["c", " "]])
    assert "divides raised ZeroDivisionError" in str(error.value)
    assert "on the completion ' ' of the prompt 'y'" in str(error.value)


def late(prompts, completions, **columns):
    for completion in completions:
        yield 1 / len(completion.strip())


def leaves(prompts, completions, **columns):
    if any(not c.strip() for c in completions):
        sys.exit(0)
    return [1.0] * len(completions)


def hostile(prompts, completions, **columns):
    if any(not c.strip() for c in completions):
        raise HostileError
    return [1.0] * len(completions)


@pytest.mark.parametrize("limit", [0.0, 60.0, 1e30])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (late, "late raised ZeroDivisionError"),
        (leaves, "leaves raised SystemExit (0)"),
        (hostile, "hostile raised HostileError (no message)"),
    ],
)
def test_generators_exits_and_errors_without_words_are_named_with_the_sample(function, said, limit):
    task = dataclasses.replace(finding(make_task(function)), reward_timeout_s=limit)
    scores = rollouts.score(items(task, "x"), [["a", "b"]])
    np.testing.assert_array_equal(scores.total, [[1.0, 1.0]])
    with pytest.raises(InputError) as error:
        rollouts.score(items(task, "x", "y"), [["a", "b"], ["c", " "]])
    assert f"The reward function {said}" in str(error.value)
    assert "on the completion ' ' of the prompt 'y'" in str(error.value)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), rundir.Interrupted(143)])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_signal_ends_the_run_where_it_comes_inside_a_reward(end, rows):
    def interrupted(prompts, completions, **columns):
        if len(completions) != rows:
            raise ValueError
        raise end

    with pytest.raises(type(end)) as error:
        rollouts.score(items(finding(make_task(interrupted)), "x"), [["a", "b"]])
    assert error.value is end


def test_a_reward_that_raises_on_the_batch_alone_says_so():
    def picky(prompts, completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(InputError, match=r"picky raised RuntimeError .* though on no completion"):
        rollouts.score(items(finding(make_task(picky)), "x"), [["a", "b"]])


def test_a_reward_that_returns_no_list_is_named():
    def nothing(prompts, completions, **columns):
        return None

    with pytest.raises(InputError, match=r"nothing returned NoneType .*; it must return a list"):
        rollouts.score(items(make_task(nothing), "x"), [["a", "b"]])


def test_a_reward_that_is_not_finite_names_function_and_sample():
    def broken(prompts, completions, **columns):
        return [float("inf")] * len(completions)

    with pytest.raises(InputError, match=r"broken returned inf for the completion 'a'"):
        rollouts.score(items(make_task(broken), "x"), [["a", "b"]])


def test_a_reward_function_that_returns_too_few_values_is_named():
    def short(prompts, completions, **columns):
        return [0.0]

    with pytest.raises(InputError, match="short returned 1 values for 2 completions"):
        rollouts.score(items(make_task(short), "x"), [["a", "b"]])


def test_step_rewards_stand_at_the_tokens_that_end_the_steps():
    def steps(prompts, completions, **columns):
        return [[StepReward(2, 0.5), StepReward(len(c), -0.5)] for c in completions]

    task = make_task(None, steps)
    tokens, mask = completions(["abcd\0", "abc"])
    texts = rollouts.decode(POLICY, tokens, mask)
    rewards, ends = rollouts.score_steps(
        POLICY, items(task, "x"), texts, tokens, mask, np.zeros((1, 2), np.float32)
    )
    # The first step ends with the second letter, the last with the end token (or the last letter).
    np.testing.assert_array_equal(rewards[0], [[0, 0.5, 0, 0, -0.5], [0, 0.5, -0.5, 0, 0]])
    np.testing.assert_array_equal(ends[0], rewards[0] != 0)


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ([97, 2, 3, 97, 97], [1, 0, 1, 1, 1]),
        ([97, 2, 97, 97, 97], [1, 1, 1, 0, 1]),  # half a character for good, and five in all
    ],
)
def test_a_step_that_ends_in_a_character_of_two_tokens_ends_with_the_second(tokens, ends):
    """Tokens 2 and 3 are the halves of a letter with an accent."""

    def decode(rows):
        letters = ("".join(map(chr, row)).replace("\2\3", "\u00e9") for row in rows)
        return [text.replace("\2", "\ufffd") for text in letters]

    def steps(prompts, completions, **columns):
        return [[StepReward(end, 1.0) for end in (1, 2, 3, len(c))] for c in completions]

    policy = types.SimpleNamespace(**{**vars(POLICY), "decode_completions": decode})
    ids = np.array([[tokens]])
    rewards, found = rollouts.score_steps(
        policy,
        items(make_task(None, steps), "x"),
        [decode([tokens])],
        ids,
        np.ones(ids.shape, bool),
        np.zeros((1, 1), np.float32),
    )
    np.testing.assert_array_equal(found[0, 0], np.array(ends, bool))
    np.testing.assert_array_equal(rewards[0, 0], ends)


def test_a_completion_whose_outcome_abstains_has_no_step():
    def steps(prompts, completions, **columns):
        return [[StepReward(len(text), 1.0)] for text in completions]

    tokens, mask = completions(["ab\0", "abc"])
    outcomes = np.array([[np.nan, -1.0]], np.float32)
    _, ends = rollouts.score_steps(
        POLICY, items(make_task(None, steps), "x"), [["ab", "abc"]], tokens, mask, outcomes
    )
    np.testing.assert_array_equal(ends[0], [[False] * 3, [False, False, True]])


def test_a_completion_that_ends_at_once_is_worth_its_outcome():
    def steps(prompts, completions, **columns):
        return [[StepReward(len(text), 1.0)] if text else [] for text in completions]

    tokens, mask = completions(["\0", "ab\0"])
    rewards, ends = rollouts.score_steps(
        POLICY,
        items(make_task(None, steps), "x"),
        [["", "ab"]],
        tokens,
        mask,
        np.array([[-1.0, 0.5]], np.float32),
    )
    np.testing.assert_array_equal(rewards[0], [[-1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(ends[0], rewards[0] != 0)


def test_without_a_process_reward_the_outcome_is_the_only_step():
    tokens, mask = completions(["ab\0", "abc"])
    outcomes = np.array([[0.25, np.nan]], np.float32)
    rewards, ends = rollouts.score_steps(
        POLICY, items(make_task(None), "x"), [["ab", "abc"]], tokens, mask, outcomes
    )
    np.testing.assert_array_equal(rewards[0], [[0, 0, 0.25], [0, 0, 0]])
    np.testing.assert_array_equal(ends[0], [[False, False, True], [False] * 3])


def test_a_reward_that_hangs_is_named_after_its_time():
    forever = threading.Event()

    def hangs(prompts, completions, **columns):
        forever.wait()
        return [0.0] * len(completions)

    task = dataclasses.replace(make_task(hangs), reward_timeout_s=0.05)
    with pytest.raises(InputError, match=r"hangs took more than data.reward_timeout_s=0.05 for 2"):
        rollouts.score(items(task, "x"), [["a", "b"]])
    forever.set()


def test_the_time_limit_bounds_the_search_for_the_sample_a_reward_raises_on():
    forever = threading.Event()

    def hangs(prompts, completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("too many")
        forever.wait(60)
        return [0.0]

    task = dataclasses.replace(finding(make_task(hangs)), reward_timeout_s=0.05)
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"hangs raised RuntimeError \(too many\) .* for 2 completions"
    ) as e:
        rollouts.score(items(task, "x"), [["a", "b"]])
    forever.set()
    assert "took more than data.reward_timeout_s=0.05" in str(e.value)
    assert time.monotonic() - started < 30


def test_a_time_limit_changes_neither_values_nor_errors():
    def divides(prompts, completions, **columns):
        return [1 / len(c) for c in completions]

    task = dataclasses.replace(make_task(divides), reward_timeout_s=60.0)
    scores = rollouts.score(items(task, "x"), [["a", "bb"]])
    np.testing.assert_array_equal(scores.total, [[1.0, 0.5]])
    with pytest.raises(InputError, match="divides raised ZeroDivisionError"):
        rollouts.score(items(task, "x"), [["a", ""]])
