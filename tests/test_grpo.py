"""GRPO: advantages, weights and losses against hand-computed numbers; properties of a step."""

import functools
import inspect
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpocem_jax import adapters, grpo
from grpocem_jax.grpo import step as grpo_step
from grpocem_jax.models import base as models
from grpocem_jax.models import gpt2, likelihood, sampling
from grpocem_jax.training.update import update_program
from grpocem_jax.utils.errors import InputError

PROMPTS, GROUP, LENGTH, PROMPT_LENGTH = 4, 4, 6, 5


# Advantages


def test_group_normalize_uses_the_population_standard_deviation():
    # Mean 2.5, population std sqrt(5/4) = 1.1180 (the sample std, 1.2910, would give -1.1619).
    z = grpo.group_normalize(jnp.array([[1.0, 2.0, 3.0, 4.0]]))
    np.testing.assert_allclose(z, [[-1.3416, -0.4472, 0.4472, 1.3416]], atol=1e-4)


def test_equal_rewards_give_zero_advantage_even_when_rounding_differs():
    rewards = jnp.array([[0.3, 0.1 + 0.2, 0.3, 0.3], [0.0, 0.0, 0.0, 1.0]])
    z = grpo.group_normalize(rewards)
    np.testing.assert_array_equal(z[0], 0.0)
    # One of four differs: z = (3/4) / sqrt(3/16) = sqrt(3), the others -1/sqrt(3).
    np.testing.assert_allclose(z[1], [-(3**-0.5)] * 3 + [3**0.5], rtol=1e-6)


def test_abstained_rewards_neither_count_nor_move():
    z = grpo.group_normalize(jnp.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    np.testing.assert_allclose(z, [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], atol=1e-6)


def test_a_group_of_eight_never_reaches_the_reports_clip():
    # The largest z-score of n values is sqrt(n - 1): 2.6458, scaled 0.26458, far below 3.
    z = grpo.group_normalize(jnp.array([[0.0] * 7 + [1.0]]))
    assert float(z.max()) == pytest.approx(math.sqrt(7), rel=1e-6)
    assert float(grpo.scale_and_clip(z).max()) == pytest.approx(0.1 * math.sqrt(7), rel=1e-6)
    np.testing.assert_allclose(
        grpo.scale_and_clip(jnp.array([-50.0, 2.0, 50.0])), [-3.0, 0.2, 3.0], rtol=1e-6
    )


def test_outcome_advantage_is_the_same_at_every_token_and_zero_beyond_the_end():
    mask = jnp.array([[[True, True, False], [True, False, False]]])
    advantages = grpo.outcome_advantages(jnp.array([[0.0, 2.0]]), mask)
    np.testing.assert_allclose(advantages, [[[-1, -1, 0], [1, 0, 0]]], atol=1e-6)


def test_process_advantage_sums_the_steps_to_come():
    # Completion 0: steps of 1 and 3 end at tokens 1 and 3; completion 1: one step of 2 at token 2.
    # Over the three steps: mean 2, std sqrt(2/3), so z = -1.2247, 1.2247 and 0.
    z = math.sqrt(1.5)
    rewards = jnp.array([[[0.0, 1.0, 0.0, 3.0], [0.0, 0.0, 2.0, 0.0]]])
    ends = jnp.array([[[False, True, False, True], [False, False, True, False]]])
    mask = jnp.array([[[True] * 4, [True, True, True, False]]])
    advantages = grpo.process_advantages(rewards, ends, mask)
    # Tokens 0 and 1 see both steps (-z + z = 0), tokens 2 and 3 only the second.
    np.testing.assert_allclose(advantages[0, 0], [0, 0, z, z], atol=1e-6)
    np.testing.assert_allclose(advantages[0, 1], [0, 0, 0, 0], atol=1e-6)


@pytest.mark.slow
def test_a_single_step_at_the_end_is_outcome_supervision():
    key = jax.random.key(0)
    lengths = jax.random.randint(key, (3, 5), 1, 8)
    mask = jnp.arange(8)[None, None] < lengths[..., None]
    rewards = jax.random.normal(jax.random.key(1), (3, 5))
    ends = jnp.arange(8)[None, None] == lengths[..., None] - 1
    steps = jnp.where(ends, rewards[..., None], 0.0)
    np.testing.assert_allclose(
        grpo.process_advantages(steps, ends, mask),
        grpo.outcome_advantages(rewards, mask),
        atol=1e-5,
    )


# Losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, 2.0),
        (1.5, 2.0, 2.4),  # clipped at 1.2; unclipped would be 3.0
        (0.5, 2.0, 1.0),  # the minimum is the unclipped one; clipped would be 1.6
        (1.5, -2.0, -3.0),  # not clipped: min(-3.0, -2.4)
        (0.5, -2.0, -1.6),  # clipped at 0.8; unclipped would be -1.0
    ],
)
def test_clipped_objective(ratio, advantage, expected):
    value = grpo.clipped_objective(jnp.array([ratio]), jnp.array([advantage]))
    np.testing.assert_allclose(value, [expected], rtol=1e-6)


def test_k3_by_hand_and_as_an_unbiased_estimate_of_kl():
    # u = ln 2: 2 - ln 2 - 1 = 0.3069; u = -ln 2: 0.5 + ln 2 - 1 = 0.1931.
    value = grpo.k3_divergence(jnp.log(jnp.array([0.25, 0.5])), jnp.log(jnp.array([0.5, 0.25])))
    np.testing.assert_allclose(value, [0.306853, 0.193147], atol=1e-6)
    policy, reference = (
        jax.nn.softmax(jax.random.normal(jax.random.key(i), (50,))) for i in (0, 1)
    )
    expected = jnp.sum(policy * grpo.k3_divergence(jnp.log(policy), jnp.log(reference)))
    kl = jnp.sum(policy * (jnp.log(policy) - jnp.log(reference)))
    np.testing.assert_allclose(expected, kl, rtol=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        # Completions of 1 and 3 tokens. Eq. 1: each completion weighs 1/2, shared by its tokens.
        ("sequence", 1 / 2, 1 / 6),
        ("token", 1 / 4, 1 / 4),
        ("constant", 1 / 8, 1 / 8),  # largest length 4, two completions
    ],
)
def test_token_weights(aggregation, first, second):
    mask = jnp.array([[[True, False, False, False], [True, True, True, False]]])
    weights = grpo.token_weights(mask, aggregation)
    expected = [[[first, 0, 0, 0], [second, second, second, 0]]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_unknown_aggregation_is_named():
    with pytest.raises(InputError, match="aggregation='median'"):
        grpo.token_weights(jnp.ones((1, 1, 1), bool), "median")
    with pytest.raises(InputError, match="aggregation='median'"):
        grpo.aggregate("median")


@pytest.mark.slow
@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_parts_of_the_vocabulary_make_up_its_log_probabilities_and_gradients(
    tiny, chunk, keep_logits
):
    hidden = jax.random.normal(jax.random.key(0), (LENGTH, tiny.factored["wte"].shape[1]))
    tokens = jnp.arange(LENGTH)
    weights = jax.random.normal(jax.random.key(1), (2, LENGTH))

    def in_parts(hidden):
        found = likelihood.token_logps(
            tiny.model, tiny.factored, hidden, tokens, 0.7, chunk=chunk, keep_logits=keep_logits
        )
        return jnp.sum(weights * jnp.stack(found)), found

    def at_once(hidden):
        logps = jax.nn.log_softmax(tiny.model.logits(tiny.factored, hidden) / 0.7)
        entropies = -jnp.sum(jnp.exp(logps) * logps, -1)
        return jnp.sum(weights * jnp.stack([logps[jnp.arange(LENGTH), tokens], entropies]))

    gradient, (logps, entropies) = jax.jit(jax.grad(in_parts, has_aux=True))(hidden)
    logits = np.asarray(tiny.model.logits(tiny.factored, hidden), np.float64) / 0.7
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(logps, np.log(p[np.arange(LENGTH), tokens]), atol=1e-5)
    np.testing.assert_allclose(entropies, -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(at_once)(hidden), atol=1e-5)


def test_logits_are_kept_up_to_a_quarter_of_a_gigabyte(tiny):
    # 2**28 bytes are 2**26 float32.
    largest = 2**26 // tiny.model.vocab_size
    assert grpo.keep_logits(largest, tiny.model)
    assert not grpo.keep_logits(largest + 1, tiny.model)


@pytest.mark.slow
def test_kept_logits_change_no_update(tiny, batch, monkeypatch):
    hp = settings(micro_batch=GROUP, entropy=0.1, beta=0.1)
    results = []
    for limit in (0, 2**28):
        monkeypatch.setattr(grpo_step, "KEPT_LOGITS_BYTES", limit)
        update = jax.jit(functools.partial(grpo_step._update.__wrapped__, model=tiny.model, **hp))
        state = grpo.init_state(tiny.adapted(), hp["optimizer"])
        results.append(update(state, tiny.factored, batch, 0.7))
    for again, kept in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(again, kept, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_log_probabilities_of_large_logits_stay_finite(tiny, scale):
    hidden = scale * jax.random.normal(jax.random.key(0), (LENGTH, tiny.factored["wte"].shape[1]))
    logps, entropies = likelihood.token_logps(
        tiny.model, tiny.factored, hidden, jnp.arange(LENGTH), 1.0, chunk=7
    )
    logits = np.asarray(tiny.model.logits(tiny.factored, hidden), np.float64)
    expected = logits - logits.max(-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    at = expected[np.arange(LENGTH), np.arange(LENGTH)]
    np.testing.assert_allclose(logps, at, rtol=1e-5, atol=1e-5 * scale)
    assert np.all(entropies >= -1e-4)
    assert np.all(np.isfinite(entropies))


# The step


@pytest.fixture(scope="module")
def batch(tiny):
    keys = jax.random.split(jax.random.key(7), 5)
    shape = (PROMPTS, GROUP, LENGTH)
    vocab = tiny.model.vocab_size
    lengths = jax.random.randint(keys[0], shape[:2], 1, LENGTH + 1)
    mask = jnp.arange(LENGTH)[None, None] < lengths[..., None]
    prompt_lengths = jax.random.randint(keys[1], (PROMPTS, 1), 1, PROMPT_LENGTH + 1)
    return grpo.Batch(
        prompts=jax.random.randint(keys[2], (PROMPTS, PROMPT_LENGTH), 0, vocab),
        prompt_mask=jnp.arange(PROMPT_LENGTH)[None] >= PROMPT_LENGTH - prompt_lengths,
        completions=jax.random.randint(keys[3], shape, 0, vocab),
        mask=mask,
        old_logps=jnp.where(mask, -5.0, 0.0),
        advantages=grpo.outcome_advantages(jax.random.normal(keys[4], shape[:2]), mask),
        weights=grpo.token_weights(mask),
    )


@pytest.fixture(scope="module")
def offsets(tiny):
    return tiny.adapted()


OF_OPTIMIZER = set(inspect.signature(grpo.adamw).parameters)


def settings(**changes):
    """Keywords of `grpo.update`: the report's, with others for AdamW, or for the update itself."""
    optimizer = grpo.adamw(**{x: changes.pop(x) for x in OF_OPTIMIZER & changes.keys()})
    report = {"objective": grpo.clipped(), "optimizer": optimizer, "beta": 0.01, "entropy": 0.08}
    return {**report, "micro_batch": 2 * GROUP, **changes}


def make_loss(tiny, *, objective, beta, entropy, **others):
    return functools.partial(
        grpo.loss, model=tiny.model, objective=objective, beta=beta, entropy=entropy
    )


@pytest.mark.slow
def test_the_vmapped_loss_equals_a_loop_over_unpadded_samples(tiny, batch, offsets):
    hp = settings(beta=0.3, entropy=0.2)
    batch = jax.tree.map(lambda x: x[:2], batch)
    batch = batch._replace(weights=grpo.token_weights(batch.mask))
    temperature = 0.8
    loss = jax.jit(make_loss(tiny, **hp))
    value, parts = loss(offsets, tiny.factored, batch, temperature)
    forward = jax.jit(tiny.model.forward)

    def distributions(offsets, prompt, completion):
        tokens = jnp.concatenate([prompt, completion])
        hidden = forward(tiny.factored, offsets, tokens, jnp.ones(len(tokens), bool))
        logits = np.asarray(tiny.model.logits(tiny.factored, hidden), np.float64) / temperature
        logits = logits[len(prompt) - 1 : -1]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    zero = jax.tree.map(jnp.zeros_like, offsets)
    total = 0.0
    for p, g in itertools.product(range(2), range(GROUP)):
        n = int(batch.mask[p, g].sum())
        prompt = batch.prompts[p][batch.prompt_mask[p]]
        completion = batch.completions[p, g, :n]
        policy, reference = (distributions(a, prompt, completion) for a in (offsets, zero))
        per_token = 0.0
        for t, token in enumerate(np.asarray(completion)):
            advantage = float(batch.advantages[p, g, t])
            ratio = math.exp(policy[t, token] + 5.0)
            clipped = min(max(ratio, 0.8), 1.2)
            u = reference[t, token] - policy[t, token]
            per_token += min(ratio * advantage, clipped * advantage)
            per_token -= 0.3 * (math.exp(u) - u - 1)
            per_token -= 0.2 * float((np.exp(policy[t]) * policy[t]).sum())
        total -= per_token / n / (2 * GROUP)
    assert float(value) == pytest.approx(total, abs=2e-5)
    assert float(parts["loss"]) == float(value)


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch(tiny, batch, offsets):
    # By tokens: where each micro-batch divided by its own count, the sums would differ.
    batch = batch._replace(weights=grpo.token_weights(batch.mask, "token"))
    results = []
    for micro in (GROUP, PROMPTS * GROUP):
        hp = settings(micro_batch=micro)
        state = grpo.init_state(offsets, hp["optimizer"])
        results.append(grpo.update(state, tiny.factored, batch, 1.0, model=tiny.model, **hp))
    (many, many_metrics), (one, one_metrics) = results
    assert len({int(n) for n in batch.mask.sum((1, 2))}) > 1
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=1e-4, atol=1e-7)
    for mine, other in zip(
        jax.tree.leaves(many.opt_state), jax.tree.leaves(one.opt_state), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_updates_in_a_scan_of_a_users_program_are_those_of_calls(tiny, batch, offsets):
    hp = settings(learning_rate=0.01, warmup_steps=0)
    step = functools.partial(grpo.update, model=tiny.model, **hp)
    start = grpo.init_state(offsets, hp["optimizer"])

    @jax.jit
    def twice(state, params):
        return jax.lax.scan(lambda x, _: step(x, params, batch, 0.7), state, length=2)

    for update in (step, functools.partial(update_program, model=tiny.model, **hp)):
        first, metrics = update(start, tiny.factored, batch, 0.7)
        second, later = update(first, tiny.factored, batch, 0.7)
        found, both = twice(start, tiny.factored)
        assert int(found.step) == 2
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(second), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
        for name in metrics:
            np.testing.assert_allclose(both[name], [metrics[name], later[name]], atol=1e-5)
    # The second update was one: Adam's step is about the learning rate.
    moved = jnp.abs(second.offsets["h.0.attn.c_proj"] - first.offsets["h.0.attn.c_proj"])
    assert float(moved.max()) > 1e-3


@pytest.mark.slow
def test_at_the_base_model_kl_and_its_gradient_are_exactly_zero(tiny, batch):
    flat = batch._replace(advantages=jnp.zeros_like(batch.advantages))
    hp = settings(beta=1.0, entropy=0.0)
    loss = jax.jit(jax.value_and_grad(make_loss(tiny, **hp), has_aux=True))
    (_, parts), gradient = loss(tiny.zero, tiny.factored, flat, 1.0)
    assert float(parts["kl"]) == 0.0
    assert max(float(jnp.abs(g).max()) for g in gradient.values()) == 0.0


@pytest.mark.slow
def test_without_beta_the_reference_is_not_computed(tiny, batch, offsets):
    def operations(beta):
        hp = settings(beta=beta)
        loss = make_loss(tiny, **hp)
        run = jax.jit(lambda o: loss(o, tiny.factored, batch, 1.0)[0])
        return run.lower(offsets).cost_analysis()["flops"]

    assert operations(0.0) < 0.6 * operations(0.1)


@pytest.mark.slow
def test_first_adamw_step_moves_against_the_gradients_sign_and_decays(tiny, batch, offsets):
    hp = settings(learning_rate=0.01, warmup_steps=4, weight_decay=0.5)
    state = grpo.init_state(offsets, hp["optimizer"])
    after, metrics = grpo.update(state, tiny.factored, batch, 1.0, model=tiny.model, **hp)
    # Step 1 of 4 of warmup; Adam's first direction is g / (|g| + eps), the sign.
    assert float(metrics["learning_rate"]) == pytest.approx(0.01 / 4)
    gradient = jax.jit(jax.grad(make_loss(tiny, **hp), has_aux=True))(
        offsets, tiny.factored, batch, 1.0
    )[0]
    for site, old in offsets.items():
        clear = np.abs(gradient[site]) > 1e-5
        expected = old - 0.0025 * (jnp.sign(gradient[site]) + 0.5 * old)
        np.testing.assert_allclose(after.offsets[site][clear], expected[clear], atol=2e-5)
        assert clear.any()
    assert int(after.step) == 1


# One program for the tests of what `update` reports and keeps.
TARGET_KL = 1e-4
ADAPTIVE = settings(learning_rate=0.01, warmup_steps=0, target_kl=TARGET_KL)
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def sampled(tiny, batch, offsets):
    """A batch of the sampler's own, with an advantage for every token."""
    out = sampling.sample(
        tiny.factored,
        offsets,
        batch.prompts,
        batch.prompt_mask,
        jax.random.split(jax.random.key(3), PROMPTS),
        jnp.arange(5),
        TEMPERATURE,
        model=tiny.model,
        num_samples=GROUP,
        max_new_tokens=LENGTH,
        top_p=0.9,
    )
    advantages = jnp.where(out.mask, jax.random.normal(jax.random.key(4), out.mask.shape), 0.0)
    return batch._replace(
        completions=out.tokens,
        mask=out.mask,
        old_logps=out.logps,
        advantages=advantages,
        weights=grpo.token_weights(out.mask),
    )


def scaled(state, scale):
    """The state with another factor of the learning rate."""
    *others, rate = state.opt_state
    rate = rate._replace(scale=jnp.float32(scale))
    return state._replace(opt_state=(*others, rate))


def updated(tiny, batch, state):
    return grpo.update(state, tiny.factored, batch, TEMPERATURE, model=tiny.model, **ADAPTIVE)


@pytest.mark.slow
def test_on_policy_every_ratio_is_one_at_the_temperature_of_the_rollouts(tiny, sampled, offsets):
    _, metrics = updated(tiny, sampled, grpo.init_state(offsets, ADAPTIVE["optimizer"]))
    expected = -float((np.asarray(sampled.weights) * np.asarray(sampled.advantages)).sum())
    assert float(metrics["policy_loss"]) == pytest.approx(expected, abs=1e-5)
    for name in ("low", "high", "region"):
        assert float(metrics[f"clip_ratio/{name}_mean"]) == 0.0
    # At another temperature, or against no old log-probabilities, it would be another loss.
    off_policy = sampled._replace(old_logps=jnp.zeros_like(sampled.old_logps))
    _, metrics = updated(tiny, off_policy, grpo.init_state(offsets, ADAPTIVE["optimizer"]))
    assert abs(float(metrics["policy_loss"]) - expected) > 0.01


def test_clip_ratios_weigh_the_tokens_whose_ratio_the_objective_clips(tiny, sampled, offsets):
    # Ratios of 1/2, 1 and 3/2 by turns: the range is from 0.8 to 1.2.
    ratios = np.resize([0.5, 1.0, 1.5], sampled.mask.shape)
    old_logps = sampled.old_logps - jnp.asarray(np.log(ratios), jnp.float32)
    shifted = sampled._replace(old_logps=old_logps)
    _, metrics = updated(tiny, shifted, grpo.init_state(offsets, ADAPTIVE["optimizer"]))
    low = high = loss = 0.0
    lengths = np.asarray(sampled.mask).sum(-1)
    for p, g, t in np.argwhere(sampled.mask):
        weight = 1 / lengths[p, g] / (PROMPTS * GROUP)
        ratio, advantage = ratios[p, g, t], float(sampled.advantages[p, g, t])
        low += weight * (ratio == 0.5 and advantage < 0)
        high += weight * (ratio == 1.5 and advantage > 0)
        loss -= weight * min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert low != pytest.approx(high, abs=1e-3)
    assert float(metrics["clip_ratio/low_mean"]) == pytest.approx(low, abs=1e-6)
    assert float(metrics["clip_ratio/high_mean"]) == pytest.approx(high, abs=1e-6)
    assert float(metrics["clip_ratio/region_mean"]) == pytest.approx(low + high, abs=1e-6)
    assert float(metrics["policy_loss"]) == pytest.approx(loss, abs=1e-5)


def test_an_update_that_is_not_finite_changes_nothing_but_the_number_of_steps(
    tiny, sampled, offsets
):
    state, metrics = updated(tiny, sampled, grpo.init_state(offsets, ADAPTIVE["optimizer"]))
    assert float(metrics["skipped"]) == 0.0
    state = scaled(state, 2.0)
    broken = sampled._replace(advantages=sampled.advantages.at[0, 0, 0].set(jnp.nan))
    after, metrics = updated(tiny, broken, state)
    assert float(metrics["skipped"]) == 1.0
    assert int(after.step) == int(state.step) + 1 == 2
    chex.assert_trees_all_equal(after._replace(step=0), state._replace(step=0))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_learning_rate_is_scaled_and_its_scale_follows_the_kl(tiny, sampled, offsets, scale):
    state = scaled(grpo.init_state(offsets, ADAPTIVE["optimizer"]), scale)
    after, metrics = updated(tiny, sampled, state)
    assert float(metrics["learning_rate"]) == pytest.approx(0.01 * scale)
    # Adam's first direction is the sign of the gradient, at most 1, and the decay is far smaller.
    largest = max(float(jnp.abs(after.offsets[name] - offsets[name]).max()) for name in offsets)
    assert largest == pytest.approx(0.01 * scale, rel=0.02)
    assert float(metrics["kl"]) > 2 * TARGET_KL
    assert float(after.opt_state[-1].scale) == pytest.approx(scale / 1.5)
    assert int(after.opt_state[-1].step) == 1


@pytest.mark.slow
def test_gradients_are_clipped_by_their_global_norm(tiny, batch, offsets):
    # Adam's own direction hides the scale, so look at its first moment: (1 - 0.9) * clipped g.
    hp = settings(max_grad_norm=1e-3)
    state = grpo.init_state(offsets, hp["optimizer"])
    after, metrics = grpo.update(state, tiny.factored, batch, 1.0, model=tiny.model, **hp)
    moment = math.sqrt(sum(float((m**2).sum()) for m in after.opt_state[1][0].mu.values()))
    assert float(metrics["grad_norm"]) > 1e-3
    assert moment == pytest.approx(0.1 * 1e-3, rel=1e-4)


@pytest.mark.parametrize(
    ("kl", "expected"), [(0.03, 1 / 1.5), (0.004, 1.5), (0.01, 1.0), (0.02, 1.0)]
)
def test_learning_rate_follows_the_kl(kl, expected):
    scale = grpo.adapt_scale(jnp.float32(1.0), jnp.float32(kl), 0.01, (0.1, 10.0))
    assert float(scale) == pytest.approx(expected)


def test_learning_rate_factor_stays_in_its_range():
    def after(scale, kl):
        return grpo.adapt_scale(jnp.float32(scale), jnp.float32(kl), 0.01, (0.5, 1.2))

    np.testing.assert_allclose([after(1.0, 1.0), after(1.0, 0.0)], [1 / 1.5, 1.2], rtol=1e-6)
    assert float(after(1 / 1.5, 1.0)) == 0.5


def test_warmup_is_linear_and_the_first_update_moves():
    schedule = grpo.warmup(0.4, 4)
    np.testing.assert_allclose([schedule(x) for x in range(6)], [0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert float(grpo.warmup(0.4, 0)(0)) == pytest.approx(0.4)


def test_the_rate_falls_linearly_from_the_warmup_to_the_last_update():
    # After 4 updates of warmup 10 more: half of the way down to a tenth is 0.55 of the peak.
    schedule = grpo.warmup(0.4, 4, total_steps=14, final_scale=0.1)
    rates = [float(schedule(x)) for x in (0, 3, 8, 13, 20)]
    np.testing.assert_allclose(rates, [0.1, 0.4, 0.22, 0.04, 0.04], rtol=1e-6)
    constant = grpo.warmup(0.4, 4, final_scale=0.1)  # of an unknown number of updates
    assert float(constant(13)) == pytest.approx(0.4)
    hp = grpo.adamw(learning_rate=0.4, warmup_steps=0, total_steps=2, final_lr_scale=0.0)
    state = hp.init({"a": jnp.zeros(2)})
    moves = []
    for _ in range(2):
        updates, state = hp.update({"a": jnp.ones(2)}, state, {"a": jnp.zeros(2)}, kl=0.0)
        moves.append(float(-updates["a"][0]))
    np.testing.assert_allclose(moves, [0.2, 0.0], atol=1e-5)


def test_the_scale_of_the_learning_rate_is_applied_before_it_changes():
    rate = grpo.adapt_to_kl(grpo.warmup(0.5, 0), target_kl=0.01)
    state = rate.init({"a": jnp.zeros(2)})
    updates, state = rate.update({"a": jnp.ones(2)}, state, kl=1.0)
    np.testing.assert_array_equal(updates["a"], 1.0)
    updates, state = rate.update({"a": jnp.ones(2)}, state, kl=0.0)
    np.testing.assert_allclose(updates["a"], 1 / 1.5, rtol=1e-6)
    assert float(state.learning_rate) == pytest.approx(0.5 / 1.5)
    assert float(state.scale) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (grpo.clipped, "low", 0.0),
        (grpo.clipped, "high", math.nan),
        (grpo.clipped, "high", "wide"),
        (grpo.clipped, "ratio", "group"),
        (grpo.adamw, "learning_rate", 0.0),
        (grpo.adamw, "warmup_steps", -1),
        (grpo.adamw, "final_lr_scale", 1.5),
        (grpo.adamw, "weight_decay", -0.1),
        (grpo.adamw, "max_grad_norm", 0.0),
        (grpo.adamw, "target_kl", -0.1),
        (grpo.adamw, "lr_scale_range", (0.5,)),
        (grpo.adamw, "lr_scale_range", (2.0, 3.0)),
        (grpo.adamw, "lr_scale_range", (10.0, 0.1)),
        (grpo.adamw, "b1", 1.0),
        (grpo.adamw, "eps", True),
        (grpo.adamw, "learning_rate", optax.constant_schedule(0.1)),
        (grpo.adamw, "learning_rate", jnp.float32(0.1)),
        (grpo.adamw, "learning_rate", [0.1]),
        (grpo.adamw, "warmup_steps", 2.0),
        (grpo.adamw, "total_steps", -1),
        (grpo.adamw, "lr_scale_range", 2.0),
        (grpo.adamw, "lr_scale_range", ("a", "b")),
        (grpo.adamw, "weight_decay", jnp.zeros(2)),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(make, name, value):
    with pytest.raises(InputError) as refused:
        make(**{name: value})
    value = tuple(value) if isinstance(value, list) else value
    fix = "is a schedule" if callable(value) else "must be "
    assert str(refused.value).startswith(f"{name}={value!r}: {fix}")


def test_settings_may_be_numbers_of_numpy_and_lists():
    assert grpo.clipped(np.float32(0.5), np.int64(1)) == grpo.clipped(0.5, 1.0)
    bounds = [0.1, 10.0]
    of_list = grpo.adamw(learning_rate=np.float64(0.5), lr_scale_range=bounds)
    assert of_list is grpo.adamw(learning_rate=0.5, lr_scale_range=tuple(bounds))
    adapter = adapters.lora(rank=np.int64(4), alpha=np.float32(2))
    assert adapter.factor is adapters.lora(rank=4).factor


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": -0.1}, r"^beta=-0\.1: must be at least 0"),
        ({"entropy": -0.1}, r"^entropy=-0\.1: must be at least 0"),
        ({"beta": math.nan}, "^beta=nan: must be at least 0"),
        ({"entropy": "0.1"}, r"^entropy='0\.1': must be a number, at least 0"),
        ({"beta": jnp.float32(0.5)}, r"^beta=Array\(0\.5, .*: is an array.* such as float\(beta\)"),
        ({"micro_batch": 4.0}, r"^micro_batch=4\.0: must be a whole number"),
        (
            {"objective": grpo.clipped},
            r"^objective=clipped: needs no arguments.*objective=clipped\(\)",
        ),
    ],
)
def test_an_argument_of_an_update_that_cannot_be_used_is_named(tiny, batch, offsets, changes, said):
    hp = settings(**changes)
    state = grpo.init_state(offsets, hp["optimizer"])
    with pytest.raises(InputError, match=said):
        grpo.update(state, tiny.factored, batch, 1.0, model=tiny.model, **hp)


def test_a_weight_of_numpy_is_the_number(tiny, batch, offsets):
    def loss(beta):
        hp = settings(beta=beta)
        state = grpo.init_state(offsets, hp["optimizer"])
        return grpo.update(state, tiny.factored, batch, 1.0, model=tiny.model, **hp)[1]["loss"]

    assert loss(np.float32(0.5)) == loss(0.5)


def test_an_optimizer_that_was_not_called_is_named(offsets):
    with pytest.raises(InputError, match=r"^optimizer=.*adamw.* call .* optax\.adamw\(1e-2\)"):
        grpo.init_state(offsets, optax.adamw)


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("advantages", lambda x: x[..., 0], r"has shape \(\d, \d\): .* \[P=\d, G=\d, N=\d+\]"),
        ("advantages", lambda x: x[:1], r"has shape \(1, "),
        ("weights", lambda x: x[..., :1], r"has shape \(\d, \d, 1\)"),
        ("weights", lambda x: None, "is NoneType"),
        ("prompts", lambda x: x.tolist(), r"is list: must be an array of shape \[P=\d, S\]"),
        ("prompt_mask", lambda x: x[:, 1:], r"must be an array of shape \[P=\d, S=\d\]"),
        ("completions", lambda x: x[0], r"must be an array of shape \[P, G, N\]"),
        ("positions", lambda x: jnp.zeros(3, jnp.int32), r"shape \[P=\d, G=\d, K\]"),
    ],
)
def test_a_batch_of_other_shapes_is_refused(tiny, batch, offsets, field, change, said):
    hp = settings()
    state = grpo.init_state(offsets, hp["optimizer"])
    wrong = batch._replace(**{field: change(getattr(batch, field))})
    with pytest.raises(InputError, match=f"^batch.{field} .*{said}"):
        grpo.update(state, tiny.factored, wrong, 1.0, model=tiny.model, **hp)


def test_a_target_of_the_kl_without_the_kl_is_refused(tiny, batch, offsets):
    hp = settings(target_kl=0.01, beta=0.0)
    state = grpo.init_state(offsets, hp["optimizer"])
    with pytest.raises(InputError, match=r"^target_kl=0\.01 follows .* beta=0\.0 leaves out"):
        grpo.update(state, tiny.factored, batch, 1.0, model=tiny.model, **hp)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda mask: grpo.outcome_advantages(jnp.zeros((1, 3)), mask),
            r"^rewards of shape \(1, 3\): must have shape \(2, 3\) for a mask of shape \(2, 3, 4\)",
        ),
        (lambda mask: grpo.outcome_advantages([0.0, 1.0, 2.0], mask), r"^rewards of shape \(3,\)"),
        (
            lambda mask: grpo.process_advantages(jnp.zeros((2, 3, 1)), mask, mask),
            r"^step_rewards of shape \(2, 3, 1\)",
        ),
        (
            lambda mask: grpo.process_advantages(jnp.zeros((2, 3, 4)), mask[:1], mask),
            r"^step_ends of shape \(1, 3, 4\)",
        ),
    ],
)
def test_rewards_of_another_shape_than_the_mask_are_refused(make, said):
    with pytest.raises(InputError, match=said):
        make(jnp.ones((2, 3, 4), bool))


def test_micro_batches_hold_whole_groups(tiny, batch, offsets):
    for micro in (GROUP + 2, 3 * GROUP, 0):
        hp = settings(micro_batch=micro)
        state = grpo.init_state(offsets, hp["optimizer"])
        with pytest.raises(InputError, match=f"micro_batch={micro}"):
            grpo.update(state, tiny.factored, batch, 1.0, model=tiny.model, **hp)


@pytest.mark.slow
def test_grpo_raises_the_probability_of_what_is_rewarded(tiny):
    """A bandit: of one-token completions, those with an even id are rewarded."""
    model, params = tiny.model, tiny.factored
    hp = settings(micro_batch=256, learning_rate=0.1, warmup_steps=0, beta=0.0, entropy=0.0)
    prompt = jnp.array([[1, 2, 3]])
    mask = jnp.ones_like(prompt, bool)

    @jax.jit
    def log_policy(offsets):
        hidden, _ = model.prefill(params, offsets, prompt[0], mask[0])
        return jax.nn.log_softmax(model.logits(params, hidden))

    def even_mass(offsets):
        return float(jnp.exp(log_policy(offsets))[::2].sum())

    state = grpo.init_state(tiny.zero, hp["optimizer"])
    before = even_mass(state.offsets)
    for step in range(30):
        logps = log_policy(state.offsets)
        tokens = jax.random.categorical(jax.random.key(step), logps, shape=(1, 256, 1))
        batch = grpo.Batch(
            prompt,
            mask,
            tokens,
            jnp.ones_like(tokens, bool),
            logps[tokens],
            grpo.group_normalize(1.0 - (tokens[..., 0] % 2))[..., None],
            grpo.token_weights(jnp.ones_like(tokens, bool)),
        )
        state, _ = grpo.update(state, params, batch, 1.0, model=model, **hp)
    assert even_mass(state.offsets) > before + 0.1


@pytest.mark.slow
def test_half_precision_keeps_the_gradient_of_many_tokens(tiny):
    # The published spread of initial weights, 0.02, makes small gradients.
    params = gpt2.init_params(jax.random.key(0), tiny.config)
    factored = adapters.factor_params(tiny.adapter, params, tiny.sites)
    half = models.cast_params(factored, jnp.float16)
    prompts, group, length = 16, 16, 16
    keys = jax.random.split(jax.random.key(7), 3)
    shape = (prompts, group, length)
    mask = jnp.ones(shape, bool)
    rewards = jax.random.normal(keys[0], shape[:2])
    batch = grpo.Batch(
        prompts=jax.random.randint(keys[1], (prompts, 5), 0, tiny.model.vocab_size),
        prompt_mask=jnp.ones((prompts, 5), bool),
        completions=jax.random.randint(keys[2], shape, 0, tiny.model.vocab_size),
        mask=mask,
        old_logps=jnp.full(shape, -4.1),
        advantages=0.1 * grpo.outcome_advantages(rewards, mask),
        weights=grpo.token_weights(mask),
    )
    hp = settings(micro_batch=prompts * group, beta=0.0, entropy=0.0, max_grad_norm=1e9)
    state = grpo.init_state(tiny.adapted(), hp["optimizer"])

    def by_update(params):
        after, _ = grpo.update(state, params, batch, 1.0, model=tiny.model, **hp)
        # Adam's first moment after one step.
        return np.concatenate([x / 0.1 for x in after.opt_state[1][0].mu.values()])

    def unscaled(params):
        gradient = jax.grad(make_loss(tiny, **hp), has_aux=True)
        found, _ = jax.jit(gradient)(state.offsets, params, batch, 1.0)
        return np.concatenate(list(found.values()))

    exact = unscaled(factored)

    def error(gradient):
        return np.linalg.norm(gradient - exact) / np.linalg.norm(exact)

    assert error(by_update(half)) < 0.01
    assert error(unscaled(half)) > 0.04  # 0.056, of what rounds to zero on the way


def test_groups_whose_rewards_differ_come_first_and_keep_their_order():
    nan = np.nan
    rewards = np.array([[1, 1], [0, 1], [nan, 1], [2, 1], [nan, nan]])
    assert grpo.informative_first(rewards, 2).tolist() == [1, 3]
    # What is missing is filled up with the first of the others.
    assert grpo.informative_first(rewards, 4).tolist() == [0, 1, 2, 3]
    assert grpo.informative_first(rewards, 5).tolist() == [0, 1, 2, 3, 4]
