"""The stages of a step, apart or not: who completes what by which adapter, and what comes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import grpo
from grpocem_jax.config import parse_config
from grpocem_jax.grpo import variants
from grpocem_jax.training import loop as training
from grpocem_jax.training import stages, sweep
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.data import load_data
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, Processes
from tests.runs import one_policy, read_lines, training_config
from tests.threads import together

STALE = {"train.staleness": 1}
STEPS = 4


@pytest.fixture(scope="module")
def given():
    """Settings, policy, algorithm and prompts of a run one step behind."""
    config = parse_config(
        training_config(**STALE, **{"train.max_steps": STEPS, "logging.interval": 1})
    )
    policy = one_policy(config)
    return config, policy, make_algorithm(config), load_data(config, policy).train


def course(given, processes, apart, *, first=0, state=None, behind=None):
    """States, texts and metrics of the steps of a run, from one of them on."""
    config, policy, algorithm, items = given
    train = dataclasses.replace(config.train, rollout_processes=apart)
    config = dataclasses.replace(config, train=train)
    policy = dataclasses.replace(policy, processes=processes)
    stage = stages.Stages(config, policy, algorithm, items, jax.random.key(0), total=STEPS, size=16)
    state = grpo.init_state(policy.zero, algorithm.optimizer) if state is None else state
    behind, found = state.offsets if behind is None else behind, []
    for step in range(first, STEPS):
        prepared, updated = stage.run(state, behind, step)
        state, behind = updated.state, state.offsets
        found.append((jax.device_get(state), prepared.texts, updated.metrics))
    return found


@pytest.fixture(scope="module")
def alone(given):
    return course(given, ALONE, 0)


def distance(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("count", "apart", "tolerance"), [(2, 1, 0.0), (3, 1, 1e-6), (3, 2, 1e-6), (2, 0, 1e-6)]
)
def test_rollouts_apart_are_the_run_one_step_behind(given, alone, count, apart, tolerance):
    """Bit for bit, but where the rows of a stage are divided, which is rounded otherwise."""
    found = together(count, lambda processes: course(given, processes, apart), 110, 120)
    assert distance(alone[-1][0].offsets, alone[0][0].offsets) > 1e-2
    for own in found:
        assert not isinstance(own, BaseException), own
        for one, other, first in zip(alone, own, found[0], strict=True):
            assert one[1] == other[1]
            assert distance(one[0].offsets, other[0].offsets) <= tolerance
            # The same everywhere, bit for bit, and so is what is said of it.
            assert distance(first[0].offsets, other[0].offsets) == 0
            assert int(other[0].step) == int(one[0].step)
            assert other[2] == first[2]
            shared = {name: other[2][name] for name in one[2]}
            assert shared == pytest.approx(one[2], abs=1e-4)
            assert set(other[2]) - set(one[2]) == (
                {"rollout_time", "update_time"} if apart else set()
            )


def test_the_rollouts_in_flight_are_made_again_from_the_adapter_that_made_them(given, alone):
    def rest(processes):
        state, behind = alone[1][0], alone[0][0].offsets
        return course(given, processes, 1, first=2, state=state, behind=behind)

    for own in together(2, rest, end_s=120):
        assert [each[1] for each in own] == [each[1] for each in alone[2:]]
        assert distance(own[-1][0].offsets, alone[-1][0].offsets) == 0


def test_a_step_is_completed_by_the_adapter_before_the_step_before(given, monkeypatch):
    used, sample = [], stages.Stages.sample

    def seen(self, offsets, step):
        used.append(offsets)
        return sample(self, offsets, step)

    monkeypatch.setattr(stages.Stages, "sample", seen)
    states = [each[0] for each in course(given, ALONE, 0)]
    zero = given[1].zero
    for offsets, expected in zip(used, [zero, zero, *(x.offsets for x in states)], strict=False):
        assert distance(offsets, expected) == 0


def test_the_ratio_is_that_to_the_policy_that_sampled(alone):
    """It is 1 for the first step alone, as the second one's completions are of the base model."""
    kl = [each[2]["policy_loss"] for each in alone]
    assert abs(kl[0]) < 1e-6
    assert min(map(abs, kl[1:])) > 1e-5


def test_an_error_in_the_rollouts_ends_the_updates_too(given, monkeypatch):
    sample = stages.Stages.sample

    def fails(self, offsets, step):
        if step == 2:
            raise InputError("the reward function judge raised ValueError")
        return sample(self, offsets, step)

    monkeypatch.setattr(stages.Stages, "sample", fails)
    for error in together(2, lambda processes: course(given, processes, 1), end_s=120):
        assert isinstance(error, InputError)
        assert "the reward function judge raised ValueError" in str(error)


# Whole runs


def test_a_run_one_step_behind_continues_to_the_same_bits(tmp_path):
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    training.train(training_config(**STALE), whole)
    training.train(training_config(**STALE, **{"train.max_steps": 3}), begun)
    assert training.train(training_config(**STALE), begun)["resumed_after_step"] == 3
    for name in ("adapter/adapter_model.safetensors", "completions.jsonl"):
        assert (begun / name).read_bytes() == (whole / name).read_bytes()
    records = [read_lines(workdir / "metrics.jsonl") for workdir in (begun, whole)]
    assert len(records[0]) == 6
    for one, other in zip(*records, strict=True):
        assert {**one, "step_time": 0} == {**other, "step_time": 0}


def test_a_checkpoint_has_the_adapter_before_only_where_it_is_used(given):
    config, policy, algorithm, _ = given
    state = grpo.init_state(policy.zero, algorithm.optimizer)
    behind = jax.tree.map(lambda x: x + 1, policy.zero)
    saved = stages.checkpointed(config, state, behind)
    assert stages.from_checkpoint(config, saved) == (state, behind)
    on = dataclasses.replace(config, train=dataclasses.replace(config.train, staleness=0))
    assert stages.checkpointed(on, state, behind) is state
    assert stages.from_checkpoint(on, state) == (state, state.offsets)


# Bad input


@pytest.mark.parametrize(
    ("count", "apart", "said"),
    [
        (
            1,
            1,
            "config.train.rollout_processes=1: there is one process, of which at least one must",
        ),
        (2, 2, "there are 2 processes, of which at least one must update; give at most 1"),
        (5, 2, "makes 4 prompts, which cannot be divided evenly among 3 processes"),
    ],
)
def test_processes_that_cannot_be_divided_are_refused(given, count, apart, said):
    train = dataclasses.replace(given[0].train, rollout_processes=apart)
    with pytest.raises(InputError) as error:
        stages.check_processes(dataclasses.replace(given[0], train=train), Processes(0, count))
    assert said in str(error.value)


def test_processes_apart_need_not_divide_a_step(given):
    train = dataclasses.replace(given[0].train, rollout_processes=3)
    config = dataclasses.replace(given[0], train=train)
    stages.check_processes(config, Processes(0, 4))
    at_once = [stages.prompts_at_once(config, Processes(i, 4)) for i in range(4)]
    assert at_once == [4, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.staleness": 2}, "config.train.staleness=2: must be from 0 to 1"),
        ({"train.rollout_processes": -1}, "config.train.rollout_processes=-1: must be at least 0"),
        ({"train.rollout_processes": 1}, "set config.train.staleness=1, or leave it 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(InputError) as error:
        parse_config(training_config(**changes))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["policy_gradient", "a_star_po", "tests.test_stages:blind", "tests.test_stages:penalised"],
)
def test_an_objective_without_a_ratio_is_refused(name):
    config = parse_config(training_config(**STALE, **{"grpo.objective": name}))
    with pytest.raises(InputError) as error:
        make_algorithm(config)
    assert f"config.train.staleness=1 with config.grpo.objective={name!r}" in str(error.value)
    assert "such as 'clipped' or 'cispo'" in str(error.value)


def blind():
    return lambda logps, batch: (logps * batch.advantages, {})


def penalised():
    """The policy gradient, held near to the base model."""

    def objective(logps, batch, *, reference):
        values, metrics = variants.policy_gradient()(logps, batch)
        return values - 0.01 * (logps - reference) ** 2, metrics

    objective.needs = ("reference",)
    return objective


@pytest.mark.parametrize("name", ["clipped", "cispo", "rebel"])
def test_an_objective_with_a_ratio_is_taken(name):
    config = parse_config(training_config(**STALE, **{"grpo.objective": name}))
    objective = make_algorithm(config).objective
    tokens, present = jnp.ones((1, 2, 3), jnp.int32), jnp.ones((1, 2, 3), bool)
    logps, advantages = jnp.full((1, 2, 3), -1.0), jnp.array([[[1.0] * 3, [-1.0] * 3]])
    weights = grpo.token_weights(present)
    batch = grpo.Batch(tokens[:, 0], present[:, 0], tokens, present, logps, advantages, weights)
    older = batch._replace(old_logps=logps.at[0, 1].add(-0.05))
    values = [np.asarray(objective(logps, x)[0]) for x in (batch, older)]
    assert np.abs(values[0] - values[1]).max() > 1e-3


def test_a_sweep_is_never_behind(tmp_path):
    with pytest.raises(InputError, match=r"train\.staleness=1 is for single runs; set it to 0"):
        sweep.sweep(training_config(**STALE), {"seed": [0, 1]}, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
