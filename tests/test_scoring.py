"""Calls of reward functions: awaited together, tried again, with copies of their own."""

import asyncio
import dataclasses
import threading
import time
import warnings

import numpy as np
import pytest

from grpocem_jax import rollouts
from grpocem_jax.runs import metrics
from grpocem_jax.tasks import scoring
from grpocem_jax.tasks.base import Example, Reward, StepReward, Task
from grpocem_jax.training import step_metrics
from grpocem_jax.utils.errors import InputError


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(scoring, "FIRST_PAUSE_S", 0.001)


def make_task(*functions, name="own", **settings):
    task = Task(name, {"prompt": ""}, "{prompt}", tuple(map(Reward, functions)), own=True)
    return dataclasses.replace(task, **settings)


def items(task, *prompts, **columns):
    examples = [Example(p, {"prompt": p, **columns}) for p in prompts]
    return [rollouts.Item(task, example, np.zeros(1, np.int32)) for example in examples]


def total(task, texts=("a", "bb"), **columns):
    return rollouts.score(items(task, "x", **columns), [list(texts)]).total[0].tolist()


async def lengths(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class Judge:
    async def __call__(self, prompts, completions, **columns):
        return [float(len(text)) for text in completions]


async def one_by_one(prompts, completions, **columns):
    for text in completions:
        await asyncio.sleep(0)
        yield float(len(text))


def hands_on(prompts, completions, **columns):
    return lengths(prompts, completions)


@pytest.mark.parametrize("limit", [0.0, 60.0, 1e30])
@pytest.mark.parametrize("function", [lengths, Judge(), one_by_one, hands_on])
def test_asynchronous_rewards_are_awaited(function, limit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of a coroutine nobody awaited
        assert total(make_task(function, reward_timeout_s=limit)) == [1.0, 2.0]


def test_asynchronous_rewards_of_all_functions_and_tasks_wait_at_the_same_time():
    # Each waits until all three have come, which one after the other would be never.
    came = []

    def make(name):
        async def waits(prompts, completions, **columns):
            came.append(name)
            while len(came) < 3:
                await asyncio.sleep(0.001)
            return [1.0] * len(completions)

        waits.__name__ = name
        return waits

    one = make_task(make("a"), make("b"), name="one", reward_timeout_s=60.0)
    other = make_task(make("c"), name="other", reward_timeout_s=60.0)
    scores = rollouts.score(items(one, "x") + items(other, "y"), [["t"], ["t"]])
    assert scores.total.tolist() == [[2.0], [1.0]]


def test_rewards_are_awaited_where_a_loop_is_running_already():
    async def notebook():
        return total(make_task(lengths))

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_a_time_limit_ends_a_coroutine_that_waits_and_one_that_holds_the_loop_up():
    forever = threading.Event()

    async def waits(prompts, completions, **columns):
        await asyncio.sleep(60)

    async def blocks(prompts, completions, **columns):
        forever.wait(60)

    for function in (waits, blocks):
        started = time.monotonic()
        with pytest.raises(InputError, match=r"took more than data.reward_timeout_s=0.05 for 2 co"):
            total(make_task(function, reward_timeout_s=0.05))
        assert time.monotonic() - started < 30
    forever.set()


@pytest.mark.parametrize("error", [ValueError("odd"), TimeoutError("slow"), SystemExit(3)])
def test_an_asynchronous_reward_that_raises_is_named(error):
    async def fails(prompts, completions, **columns):
        raise error

    with pytest.raises(InputError, match=f"fails raised {type(error).__name__}"):
        total(make_task(fails, reward_timeout_s=60.0))


def test_a_reward_that_was_cancelled_is_named():
    async def gives_up(prompts, completions, **columns):
        raise asyncio.CancelledError

    with pytest.raises(InputError, match="gives_up raised CancelledError"):
        total(make_task(gives_up))


def failing(times):
    calls = []

    def judge(prompts, completions, **columns):
        calls.append(len(completions))
        if len(calls) <= times:
            raise ConnectionError("gone")
        return [1.0] * len(completions)

    return judge, calls


def test_a_reward_that_raises_is_not_called_again_unless_asked():
    judge, calls = failing(1)
    with pytest.raises(InputError) as error:
        total(make_task(judge))
    assert calls == [2]
    for part in (
        "judge raised ConnectionError (gone) in line ",
        " of test_scoring.py for 2 completions of the task own, the first of 'x'",
        "data.find_failing_completion=True",
    ):
        assert part in str(error.value)


def test_a_failed_call_is_tried_again_as_often_as_asked(capsys):
    judge, calls = failing(2)
    assert total(make_task(judge, reward_retries=2)) == [1.0, 1.0]
    assert calls == [2, 2, 2]
    err = capsys.readouterr().err
    assert "retry 1 of 2 in 0.001 s" in err
    assert "retry 2 of 2 in 0.002 s" in err
    judge, calls = failing(3)
    with pytest.raises(InputError, match=r"the first of 'x' \(3 times\); it gets"):
        total(make_task(judge, reward_retries=2))
    assert calls == [2, 2, 2]


def test_only_the_call_that_failed_is_tried_again():
    judge, calls = failing(1)
    counted = []

    async def other(prompts, completions, **columns):
        counted.append(len(completions))
        return [0.5] * len(completions)

    assert total(make_task(judge, other, reward_retries=1)) == [1.5, 1.5]
    assert (calls, counted) == ([2, 2], [2])


def test_a_failure_that_ends_the_run_leaves_no_coroutine_that_nobody_awaited():
    judge, _ = failing(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match="judge raised"):
            total(make_task(lengths, judge))
    assert [str(x.message) for x in caught] == []


def short(prompts, completions, **columns):
    return [1.0]


def odd(prompts, completions, **columns):
    return [1.0, "high"]


@pytest.mark.parametrize(
    ("function", "expected", "errors"),
    [
        (failing(9)[0], [np.nan, np.nan], 2),
        (short, [np.nan, np.nan], 2),
        (odd, [1.0, np.nan], 1),
        (lengths, [1.0, 2.0], 0),
    ],
)
def test_a_reward_that_fails_abstains_where_asked_and_is_counted_and_said(
    function, expected, errors, capsys
):
    task = make_task(function, reward_on_error="abstain")
    one = items(task, "x")
    scores = rollouts.score(one, [["a", "bb"]])
    np.testing.assert_array_equal(scores.total[0], expected)
    assert step_metrics.rewards(one, scores)["reward_errors"] == errors
    assert ("abstain" in capsys.readouterr().err) == (errors > 0)


def test_errors_are_counted_only_where_they_do_not_stop_the_run():
    one = items(make_task(lengths), "x")
    assert "reward_errors" not in step_metrics.rewards(one, rollouts.score(one, [["a", "b"]]))


def test_a_process_reward_that_fails_leaves_no_steps():
    def steps(prompts, completions, **columns):
        raise ValueError

    task = make_task(lengths, process_reward=steps, reward_on_error="abstain")
    mask = np.ones((1, 2, 3), bool)
    rewards, ends = rollouts.score_steps(
        None, items(task, "x"), [["abc", "abc"]], np.zeros((1, 2, 3), int), mask, np.zeros((1, 2))
    )
    assert not ends.any()
    assert not rewards.any()
    assert StepReward(1, 0.5).reward == 0.5


def test_what_a_reward_changes_in_its_arguments_is_seen_by_nobody():
    def careless(prompts, completions, *, answers, **columns):
        for answer in answers:
            answer["words"].pop()
        prompts.clear()
        completions.reverse()
        answers.clear()
        return [1.0, 2.0]

    def counts(prompts, completions, *, answers, **columns):
        return [float(len(a["words"]) + len(c)) for a, c in zip(answers, completions, strict=True)]

    answers = {"words": ["one", "two"]}
    task = make_task(careless, counts)
    for _ in range(2):
        # Two rows of one example: neither sees what was taken from the other.
        assert total(task, ("a", "bbb"), answers=answers) == [1.0 + 3.0, 2.0 + 5.0]
    assert answers == {"words": ["one", "two"]}


def test_what_to_set_a_time_limit_to_is_said():
    def slow(prompts, completions, **columns):
        threading.Event().wait(5)

    with pytest.raises(InputError, match=r"set data.reward_timeout_s=0.1, or 0 for any time"):
        total(make_task(slow, reward_timeout_s=0.05))


# Tasks without signal


def records(*shares, task="qa"):
    return [{"step": n, f"frac_reward_zero_std/{task}": x} for n, x in enumerate(shares, start=1)]


def test_a_task_is_without_signal_by_its_last_steps():
    assert metrics.without_signal(records(*[0.0] * 5, *[1.0] * 20)) == {"qa": 1.0}
    assert metrics.without_signal(records(*[1.0] * 25, *[0.0] * 3)) == {}
    # 18 of 20 is the share at which it begins.
    assert metrics.without_signal(records(*[1.0] * 18, 0.0, 0.0)) == {"qa": 0.9}
    assert metrics.without_signal(records(1.0, None, 0.7)) == {}
    assert metrics.without_signal([{"step": 1, "frac_reward_zero_std": 1.0}]) == {}


def test_what_to_do_without_signal_is_said_and_a_gain_of_zero_explained():
    (line,) = metrics.signal_lines(records(1.0, 1.0), 0.7, ["qa"])
    for part in ("qa: in the last 2 steps 100%", "gain of exactly 0", "temperature=0.7"):
        assert part in line
    (line,) = metrics.signal_lines(records(1.0, 1.0), None)
    assert "gain" not in line


def test_the_share_of_equal_groups_is_measured_by_task():
    one = items(make_task(lengths, name="one"), "x", "y")
    other = items(make_task(lengths, name="other"), "z")
    every = one + other
    record = step_metrics.rewards(
        every, rollouts.score(every, [["a", "b"], ["a", "bb"], ["a", "b"]])
    )
    assert record["frac_reward_zero_std/one"] == 0.5
    assert record["frac_reward_zero_std/other"] == 1.0
    assert record["frac_reward_zero_std"] == pytest.approx(2 / 3)
