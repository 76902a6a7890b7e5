"""Logits and KL terms that are not finite: what is said, and what still goes on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adaptation, grpo, rollouts
from grpocem_jax.adaptation import TrainedRun
from grpocem_jax.config import parse_config
from grpocem_jax.models.likelihood import completion_logps
from grpocem_jax.models.sampling import Rollouts
from grpocem_jax.rollouts import policy
from grpocem_jax.tasks import Example
from grpocem_jax.training import loop as training
from grpocem_jax.training import update as updates
from grpocem_jax.utils.errors import InputError
from tests.runs import read_lines, training_config

FIX = "set config.model.dtype to 'bfloat16', or to 'float32'"


@functools.cache
def overflowing(dtype):
    """The built-in model with matrices so large that the activations are beyond 65504."""
    config = parse_config(training_config(**{"model.dtype": dtype}))
    found = policy.load_policy(config)
    large = jax.tree.map(lambda x: x * 3e3 if x.dtype == jnp.float16 else x, found.params)
    return TrainedRun(config, dataclasses.replace(found, params=large), found.zero)


def test_float16_that_overflows_is_named_where_a_text_is_completed_or_adapted_to():
    run = overflowing("float16")
    with pytest.raises(InputError, match=f"not finite in float16; .*{FIX}"):
        adaptation.complete(run, run.offsets, ["Review: the soup was cold."])
    with pytest.raises(InputError, match=f"nan for the adapter to start from.*float16.*{FIX}"):
        adaptation.adapt(run, "Review: the soup was cold.")
    with pytest.raises(InputError, match=f"a likelihood is not finite: .*float16.*{FIX}"):
        adaptation.log_likelihoods(run, run.offsets, [adaptation.Text("The soup was cold.")])


def test_float16_that_overflows_ends_a_training_at_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_policy", lambda *args, **options: overflowing("float16")[1])
    with pytest.raises(InputError) as error:
        training.train(training_config(**{"model.dtype": "float16"}), tmp_path / "run")
    assert "step 1: in all completions the logits are not finite in float16" in str(error.value)
    assert FIX in str(error.value)
    assert "learning_rate" not in str(error.value)


def test_of_another_type_the_fix_is_another():
    run = overflowing("float32")
    assert run.policy.nonfinite_logits("use another adapter") == (
        "the logits are not finite in float32; use another adapter"
    )


def drawn(logps):
    logps = jnp.asarray(logps, jnp.float32)
    return Rollouts(jnp.zeros(logps.shape, int), jnp.ones(logps.shape, bool), logps, logps)


def test_a_completion_is_not_finite_if_one_of_its_tokens_is_not(monkeypatch):
    run = overflowing("float32")
    out = drawn([[[-1.0, -2.0], [jnp.nan, -1.0], [-1.0, -jnp.inf]]])
    monkeypatch.setattr(rollouts.engine, "generate", lambda *args, **options: out)
    arguments = (run.policy, run.offsets, [np.ones(3, np.int32)], None, run.config.generation)
    complete = functools.partial(
        rollouts.complete, *arguments, num_samples=3, temperature=1.0, buckets=(8,)
    )
    assert complete().finite.tolist() == [[True, False, False]]
    with pytest.raises(InputError, match="in 2 of 3 completions the logits are not finite"):
        complete(require_finite=True)


def test_a_candidate_far_out_is_worth_nothing_and_the_others_are_judged(monkeypatch):
    run = overflowing("float32")
    task = run.config.task("sentiment")
    columns = {"text": "good", "label": "positive", "labels": ("negative", "positive")}
    items = rollouts.encode(run.policy, task, [Example("Review: good.", columns)])
    bad = [[[jnp.nan, -1.0]], [[-1.0, -1.0]]]
    monkeypatch.setattr(rollouts.engine, "generate", lambda *args, **options: drawn(bad))
    adapters = jax.tree.map(lambda x: jnp.stack([x, x]), run.offsets)
    arguments = (items, jax.random.key(0), run.config.generation)
    found = rollouts.population_rewards(
        run.policy, adapters, *arguments, num_samples=1, buckets=(64,)
    )
    assert np.isnan(found).tolist() == [[True], [False]]
    monkeypatch.setattr(rollouts.engine, "generate", lambda *args, **options: drawn(bad[:1]))
    with pytest.raises(InputError, match="in 1 of 1 completions the logits are not finite"):
        rollouts.population_rewards(
            run.policy, jax.tree.map(lambda x: x[:1], adapters), *arguments, num_samples=1,
            buckets=(64,),
        )  # fmt: skip


def test_k3_is_exponential_up_to_its_bound_and_its_tangent_beyond():
    inside = jnp.array([-50.0, 0.0, 1e-3, 5.0, grpo.objectives.STEEP])
    np.testing.assert_array_equal(
        grpo.k3_divergence(-inside, jnp.zeros(5)), jnp.expm1(inside) - inside
    )
    slope = jax.vmap(jax.grad(lambda u: grpo.k3_divergence(-u, 0.0)))
    # Added to the slope of the tangent and taken off again, it would be off by 32.
    np.testing.assert_allclose(slope(inside[:4]), jnp.expm1(inside[:4]), rtol=1e-6, atol=1e-6)
    at, far = slope(jnp.array([grpo.objectives.STEEP - 1e-3, 700.0]))
    assert at == pytest.approx(np.exp(20.0), rel=2e-3)
    assert far == pytest.approx(np.exp(20.0) - 1, rel=1e-5)
    value = float(grpo.k3_divergence(jnp.float32(-700.0), jnp.float32(0.0)))
    assert value == pytest.approx(np.exp(20.0) * 681 - 701, rel=1e-5)


def test_a_kl_term_that_is_very_large_is_named_with_its_log_ratio(tmp_path, monkeypatch, capsys):
    update = updates.update_program

    def far(state, *args, **options):
        new, found = update(state, *args, **options)
        return new, {**found, "kl": jnp.float32(3e9), "skipped": jnp.float32(skipped)}

    monkeypatch.setattr(training.stages, "update_program", far)
    monkeypatch.setattr(updates, "largest_log_ratio", lambda *args, **options: 119.4)
    changes = {"train.max_steps": 1, "train.max_skipped_updates": 0}
    said = "the KL term is 3e+09, as a token is 119 nats more probable under the base model"
    skipped = 0.0
    training.train(training_config(**changes), tmp_path / "one")
    assert f"step 1: {said}" in capsys.readouterr().err
    skipped = 1.0
    with pytest.raises(InputError) as error:
        training.train(training_config(**changes), tmp_path / "other")
    for part in (said, "lower train.learning_rate=0.02 to 0.005", "raise grpo.beta=0.01 to 0.04"):
        assert part in str(error.value)
    assert read_lines(tmp_path / "other" / "nonfinite.jsonl")


@pytest.mark.parametrize(("kl", "finite"), [(0.1, True), (0.1, False), (3e9, True)])
def test_trouble_is_that_of_an_update_that_was_skipped(kl, finite, monkeypatch):
    monkeypatch.setattr(updates, "largest_log_ratio", lambda *args, **options: 119.4)
    run = overflowing("float32")
    state = grpo.init_state(run.offsets, grpo.adamw())

    def trouble(skipped):
        record = {"step": 1, "kl": kl, "policy_loss": 0.5, "skipped": skipped}
        return updates.find_trouble(run.config, run.policy, record, finite, state, None, 1.0)

    assert trouble(0.0) == ("", "")
    assert all(trouble(1.0))


def test_the_largest_log_ratio_is_that_of_a_token_in_use():
    run = overflowing("float32")
    model, params = run.policy.model, run.policy.params
    offsets = jax.tree.map(lambda x: x + 0.5, run.offsets)
    tokens = jnp.arange(24).reshape(2, 3, 4) % 50
    mask = jnp.arange(4)[None, None] < jnp.array([[[1], [4], [2]]] * 2)
    prompts = jnp.array([[5, 6], [7, 8]])
    batch = grpo.Batch(prompts, prompts > 0, tokens, mask, *(jnp.zeros(tokens.shape),) * 3)
    found = float(updates.largest_log_ratio(params, offsets, batch, 1.0, model=model))
    ratios = []
    for p in range(2):
        both = [
            completion_logps(model, params, x, prompts[p], prompts[p] > 0, tokens[p], mask[p], 1.0)[
                0
            ]
            for x in (run.offsets, offsets)
        ]
        ratios.append(np.asarray(both[0] - both[1])[np.asarray(mask[p])].max())
    assert found == pytest.approx(max(ratios), rel=1e-4)
