"""Methods of the literature: numbers computed by hand, and what each becomes in its limits."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpocem_jax as gj
from grpocem_jax import adapters, grpo, rollouts
from grpocem_jax.config import parse_config
from grpocem_jax.grpo import checks, variants
from grpocem_jax.grpo.variants.bnpo import LARGEST, match_moments
from grpocem_jax.grpo.variants.t_spmo import shared_prefixes
from grpocem_jax.models.sampling import Rollouts
from grpocem_jax.training import step as steps
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.update import repeat
from grpocem_jax.utils.errors import InputError
from tests.runs import training_config

NAN = float("nan")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def of(advantages, rewards, tokens=None, mask=None):
    """Advantages of the first tokens, ``[P, G]``."""
    rewards = np.asarray(rewards, np.float32)
    tokens = np.zeros((*rewards.shape, 2), np.int32) if tokens is None else tokens
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    found = advantages(rewards, np.full(mask.shape, NAN, np.float32), tokens, mask)
    return np.asarray(found)


def batch_of(advantages, logps, old_logps, weights=None):
    mask = jnp.ones(np.shape(logps), bool)
    prompts = jnp.ones((len(logps), 1), jnp.int32)
    weights = grpo.token_weights(mask) if weights is None else jnp.asarray(weights)
    return grpo.Batch(
        prompts,
        prompts > 0,
        mask.astype(jnp.int32),
        mask,
        jnp.asarray(old_logps, jnp.float32),
        jnp.asarray(advantages, jnp.float32),
        weights,
    )


def value_and_gradient(objective, logps, batch):
    def total(logps):
        return jnp.sum(batch.weights * objective(logps, batch)[0])

    return jax.value_and_grad(total)(jnp.asarray(logps, jnp.float32))


# Advantages


def test_centred_takes_the_mean_off_and_leaves_the_spread():
    found = of(variants.centred(), [[1, 0, 0, 0], [1, NAN, 0, NAN]])
    close(found[..., 0], [[0.75, -0.25, -0.25, -0.25], [0.5, 0, -0.5, 0]])
    close(found[..., 0], found[..., 1])


def test_leave_one_out_compares_with_the_others():
    found = of(variants.rloo(), [[1, 0, 0, 0], [1, NAN, 0, NAN], [1, NAN, NAN, NAN]])
    close(found[..., 0], [[1, -1 / 3, -1 / 3, -1 / 3], [1, 0, -1, 0], [0, 0, 0, 0]])


def test_reinforce_pp_normalises_over_the_step():
    rewards = [[1, 0], [3, 1]]
    close(of(variants.reinforce_pp(), rewards)[..., 0], np.array([[1, -1], [2, -2]]) / 2.5**0.5)
    whole = (np.array(rewards) - 1.25) / np.std(rewards)
    close(of(variants.reinforce_pp(baseline=False), rewards)[..., 0], whole)
    # Of a step of equal rewards nothing can be learnt.
    close(of(variants.reinforce_pp(baseline=False), [[0.1, 0.1], [0.1, 0.1]]), 0)


def test_bnpo_divides_by_the_beta_density_at_the_mean():
    # Means 1/4 and 3/4: mean 1/2, variance 1/16, so a = b = 3/2 and alpha = beta = 3/2.
    rewards = [[1, -1, -1, -1], [1, 1, 1, -1]]
    density = math.sqrt(0.25 * 0.75) / (math.gamma(1.5) ** 2 / math.gamma(3))
    close(
        of(variants.bnpo(), rewards)[..., 0],
        np.array([[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]]) / density,
    )


def test_bnpo_at_its_clamps():
    # Means 0 and 1 have the largest variance: a = b = 0, a flat density, and no signal.
    a, b = match_moments(jnp.array([0.0, 1.0]), jnp.ones(2, bool))
    close([a, b], 0)
    close(of(variants.bnpo(), [[0, 0], [1, 1]]), 0)
    # Equal means: a + b at its largest.
    a, b = match_moments(jnp.array([0.25, 0.25]), jnp.ones(2, bool))
    close([a, b], [0.25 * LARGEST, 0.75 * LARGEST])
    same = of(variants.bnpo(), [[1, 0, 0, 0], [1, 0, 0, 0]])[..., 0]
    assert np.isfinite(same).all()
    close(same[0, 0] / same[0, 1], -3)
    # The unit of rewards does not matter.
    close(of(variants.bnpo(), [[9, 5, 5, 5], [9, 5, 5, 5]])[..., 0], same)
    # One group far from many that are alike, where the density is next to nothing: a tenth.
    found = of(variants.bnpo(), [[1, 0] * 4] * 63 + [[1] + [0] * 7])[..., 0]
    close(found[-1], 10 * np.array([7 / 8, *[-1 / 8] * 7]))


def test_krpo_filters_the_baseline_reward_by_reward():
    x, variance, expected = 0.0, 1.0, []
    for reward in (1.0, 0.0, 0.5):
        predicted = variance + 1e-5
        gain = predicted / (predicted + 1e-2)
        x, variance = x + gain * (reward - x), (1 - gain) * predicted
        expected.append((reward - x) / math.sqrt(variance))
    found = of(variants.krpo(), [[1.0, NAN, 0.0, 0.5], [0.3, 0.3, 0.3, 0.3]])[..., 0]
    close(found[0], [expected[0], 0, *expected[1:]], rtol=1e-3)
    close(found[1], 0)


PREFIXES = np.array([[[5, 6, 7], [5, 6, 8], [5, 9, 0], [4, 0, 0]]], np.int32)


def test_t_spmo_compares_each_token_with_its_prefix():
    mask = PREFIXES > 0
    found = of(variants.prefix_advantages(), [[1, 0, 0, 1]], PREFIXES, mask)
    third = 1 / 3
    close(
        found[0],
        [
            [third - 0.5, 0.5 - third, 0.5],
            [third - 0.5, 0.5 - third, -0.5],
            [third - 0.5, -third, 0],
            [0.5, 0, 0],
        ],
    )
    # Where all branch at the first token, that token has the whole of the centred reward.
    apart = np.arange(1, 5, dtype=np.int32)[None, :, None] * np.ones((1, 1, 3), np.int32)
    rewards = [[1, 0, 0, 1]]
    found = of(variants.prefix_advantages(), rewards, apart)
    close(found[..., 0], of(variants.centred(), rewards)[..., 0])
    close(found[..., 1:], 0)


def test_t_spmo_weighs_each_edge_of_the_tree_once():
    mask = jnp.asarray(PREFIXES > 0)
    out = Rollouts(jnp.asarray(PREFIXES), mask, mask * 0.0, mask * 0.0)
    weights, positions = variants.prefix_weights()(jax.random.key(0), out)
    assert positions is None
    # Six edges: 5 (of three), 6 after 5 (of two), 7, 8, 9 and 4.
    expected = [[1 / 3, 1 / 2, 1], [1 / 3, 1 / 2, 1], [1 / 3, 1, 0], [1, 0, 0]]
    close(weights[0], np.array(expected) / 6)
    assert np.asarray(shared_prefixes(out.tokens, mask)).sum() == 9 + 1 + 4 + 1 + 1 + 1


# Shaping


def test_the_unlikely_keep_their_reward():
    logps = jnp.array([[[-1.0, -1.0], [-3.0, -3.0], [-0.1, -5.0], [0.0, 0.0]]])
    mask = jnp.ones(logps.shape, bool).at[0, 2, 1].set(False)  # -0.1 for the third
    shaped = variants.unlikeliness()(jnp.array([[1.0, 1.0, 2.0, -1.0]]), logps, mask)
    close(shaped, [[1 - 0.25 / 4, 1, 2 - 0.5 * 0.5, -1]])
    shaped = variants.unlikeliness()(jnp.array([[1.0, NAN, 1.0, -1.0]]), logps, mask)
    close(shaped, [[1, NAN, 1 - 0.25 / 3, -1]])
    close(variants.unlikeliness(0.0)(jnp.ones((1, 4)), logps, mask), 1)


def test_overlong_completions_lose_up_to_one():
    mask = jnp.arange(10)[None, None] < jnp.array([[[5], [6], [8], [10]]])
    shaped = variants.overlong(share=0.4)(jnp.array([[1.0, 1.0, NAN, 1.0]]), mask * 0.0, mask)
    close(shaped, [[1, 1, NAN, 0]])
    shaped = variants.overlong(share=0.4)(jnp.zeros((1, 4)), mask * 0.0, mask)
    close(shaped, [[0, 0, -0.5, -1]])


@pytest.mark.parametrize("name", variants.SHAPINGS)
def test_a_shaping_keeps_to_its_signature(name):
    grpo.check_shaping(variants.SHAPINGS[name]())


@pytest.mark.parametrize(
    ("shaping", "said"),
    [
        (lambda rewards: rewards, "raised TypeError"),
        (lambda rewards, logps, mask: logps, "returned float32 of shape"),
        (lambda rewards, logps, mask: jnp.nan_to_num(rewards), "gave a reward to a completion"),
        (lambda rewards, logps, mask: rewards * jnp.inf, "not finite"),
        (lambda rewards, logps, mask: None, "returned None"),
    ],
)
def test_a_shaping_that_does_not_is_named(shaping, said):
    with pytest.raises(InputError, match=f"the reward shaping .*{said}"):
        grpo.check_shaping(shaping)


# Objectives


def test_the_policy_gradient_does_not_know_the_old_policy():
    logps, old = np.array([[[-1.0, -2.0]]]), np.array([[[-9.0, -0.1]]])
    batch = batch_of([[[2.0, -1.0]]], logps, old)
    value, gradient = value_and_gradient(variants.policy_gradient(), logps, batch)
    close(value, 0.5)
    close(gradient, [[[1.0, -0.5]]])


def test_cispo_bounds_the_weight_and_drops_no_token():
    ratio = np.array([[[0.5, 3.0, 1.0]]])
    old = np.full((1, 1, 3), -2.0)
    logps = old + np.log(ratio)
    batch = batch_of(np.ones((1, 1, 3)), logps, old)
    _, gradient = value_and_gradient(variants.cispo(high=1.0), logps, batch)
    close(gradient * 3, [[[0.5, 2.0, 1.0]]])
    _, gradient = value_and_gradient(variants.cispo(low=0.2, high=1.0), logps, batch)
    close(gradient * 3, [[[0.8, 2.0, 1.0]]])
    # Clipping gives the second token none.
    _, gradient = value_and_gradient(grpo.clipped(0.9, 1.0), logps, batch)
    close(gradient * 3, [[[0.5, 0.0, 1.0]]])
    metrics = variants.cispo(high=1.0)(jnp.asarray(logps), batch)[1]
    close(metrics["clip_ratio/region_mean"], 1 / 3)


def test_rebel_is_the_error_of_pairs_and_on_policy_the_policy_gradient_of_completions():
    advantages = np.array([[[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]])
    old = -np.ones((1, 3, 2))
    logps = old + np.array([[[0.2, 0.1], [0.0, 0.0], [-0.1, 0.3]]])
    batch, eta = batch_of(advantages, logps, old), 0.5
    value, gradient = value_and_gradient(variants.rebel(eta), logps, batch)
    d = np.array([0.3, 0.0, 0.2]) / eta - np.array([1.0, 0.0, -1.0])
    # The mean square about the mean is half of that of all pairs.
    pairs = np.mean((d[:, None] - d[None]) ** 2)
    close(value, -eta / 4 * pairs)
    expected = -(d - d.mean()) / 3
    close(gradient, np.broadcast_to(expected[None, :, None], (1, 3, 2)))
    _, gradient = value_and_gradient(variants.rebel(eta), old, batch)
    close(gradient, advantages / 3)


def test_optimal_values_are_soft_maxima_of_rewards():
    rewards = [[1.0, 0.0, NAN, 0.0], [NAN, NAN, NAN, NAN], [2.0, 2.0, 2.0, 2.0]]
    expected = 0.5 * math.log((math.exp(2.0) + 2) / 3)
    close(variants.optimal_values(rewards, 0.5), [expected, 0.0, 2.0])
    close(variants.optimal_values(rewards[:1], 1e-3), [1.0 + 1e-3 * math.log(1 / 3)])
    close(variants.optimal_values(rewards[:1], 1e4), [1 / 3], rtol=1e-3)
    found = of(variants.optimal_advantages(0.5), rewards)[..., 0]
    close(found, [[1 - expected, -expected, 0, -expected], [0] * 4, [0] * 4])
    # Values from before the training are part of the reward.
    found = of(variants.optimal_advantages(offline=True), rewards)[..., 0]
    close(found, np.nan_to_num(rewards))


def test_a_star_po_regresses_the_ratio_to_the_reference_on_the_advantage():
    advantages = np.array([[[0.5, 0.5], [-0.3, -0.3]]])
    reference = jnp.full((1, 2, 2), -1.0)
    logps = reference + np.array([[[0.2, 0.1], [-0.5, 0.0]]])
    batch = batch_of(advantages, logps, logps)
    objective, beta = variants.a_star_po(0.2), 0.2

    def of_logps(x, batch):
        return objective(x, batch, reference=reference)

    value, gradient = value_and_gradient(of_logps, logps, batch)
    error = beta * np.array([0.3, -0.5]) - np.array([0.5, -0.3])
    close(value, np.mean(-(error**2) / (2 * beta)))
    close(gradient, np.broadcast_to(-error[None, :, None] / 2, (1, 2, 2)))
    metrics = of_logps(jnp.asarray(logps, jnp.float32), batch)[1]
    close(metrics["a_star_po/squared_error"], np.mean(error**2))
    # On the reference it is the policy gradient of completions.
    _, gradient = value_and_gradient(of_logps, reference, batch)
    close(gradient, advantages / 2)


def test_an_objective_that_needs_the_reference_gets_it_without_a_kl_term():
    old = -np.ones((1, 2, 2), np.float32)
    batch = batch_of(np.ones((1, 2, 2)), old, old)
    asked = []

    def reference():
        asked.append(True)
        return jnp.full((1, 2, 2), -2.0)

    for objective, count in ((variants.a_star_po(1.0), 1), (grpo.clipped(), 0)):
        asked.clear()
        grpo.surrogate(
            jnp.asarray(old), jnp.zeros((1, 2, 2)), reference, batch,
            objective=objective, beta=0.0, entropy=0.0,
        )  # fmt: skip
        assert len(asked) == count
    total, _ = grpo.surrogate(
        jnp.asarray(old), jnp.zeros((1, 2, 2)), reference, batch,
        objective=variants.a_star_po(1.0), beta=0.0, entropy=0.0,
    )  # fmt: skip
    close(total, 0.5)  # (2 nats - 1)^2 / 2


def test_a_sequence_ratio_of_one_token_is_that_of_the_token():
    old = -np.ones((1, 3, 1))
    logps = old + np.array([[[0.5], [-0.5], [0.1]]])
    batch = batch_of([[[1.0], [-1.0], [1.0]]], logps, old)
    for objective in (grpo.clipped(), grpo.clipped(ratio="sequence")):
        found = value_and_gradient(objective, logps, batch)
        close(found[0], np.mean([1.2, -0.8, math.exp(0.1)]), rtol=1e-5)
    close(found[1], value_and_gradient(grpo.clipped(), logps, batch)[1])


# Weights


def test_s_grpo_trains_the_first_tokens_and_a_sample_of_the_others():
    mask = jnp.ones((50, 4, 20), bool).at[0, 0, 3:].set(False)
    out = Rollouts(mask.astype(jnp.int32), mask, mask * 0.0, mask * 0.0)
    weights, positions = variants.s_grpo(alpha=4, probability=0.5, k=8)(jax.random.key(0), out)
    trained = np.asarray(weights) > 0
    assert positions.shape == (50, 4, 8)
    assert trained[..., :4].sum() == 50 * 4 * 4 - 1
    assert trained.sum(-1).max() == 8
    close(weights.sum(-1), 1 / 200)
    later = trained[..., 4:8]  # before the largest number is reached
    assert 0.4 < later.mean() < 0.6


def test_s_grpo_of_all_tokens_is_grpo():
    out = checks.sample_rollouts()
    weights, positions = variants.s_grpo(alpha=0, probability=1.0, k=64)(jax.random.key(0), out)
    close(weights, grpo.token_weights(out.mask))
    assert np.array_equal(positions, np.broadcast_to(np.arange(5), positions.shape))


# Optimizers


def test_invadam_multiplies_by_the_root_of_the_second_moment():
    start, gradient = {"a": jnp.zeros(2)}, {"a": jnp.array([0.5, -2.0])}
    for share, expected in ((0.0, [-0.25, 4.0]), (1.0, [-1.0, 1.0]), (0.5, [-0.625, 2.5])):
        optimizer = variants.invadam(0.1, adam=share)
        updates, _ = optimizer.update(gradient, optimizer.init(start), start)
        close(updates["a"], 0.1 * np.array(expected))
    # As DualAdam with all of Adam's update it is Adam.
    ours, theirs = variants.invadam(0.1, adam=1.0), optax.adam(0.1)
    states = [ours.init(start), theirs.init(start)]
    for step in range(3):
        changed = jax.tree.map(lambda x, step=step: x + step, gradient)
        found = [
            optimizer.update(changed, state, start)
            for optimizer, state in zip((ours, theirs), states, strict=True)
        ]
        close(found[0][0]["a"], found[1][0]["a"])
        states = [state for _, state in found]


@pytest.mark.parametrize(("degree", "ahead"), [(1, 0), (1, 5), (2, 5)])
def test_extrapolation_goes_on_along_a_path(degree, ahead):
    # Adam on a constant gradient goes straight on by its rate, which makes a parabola here.
    every, rates = 4, lambda count: 0.01 * (1 + (degree - 1) * count)
    optimizer = variants.extrapolated(rates, every=every, ahead=ahead, degree=degree)
    offsets, gradient = {"a": jnp.array([1.0, -1.0])}, {"a": jnp.array([-3.0, 2.0])}
    state, signs = optimizer.init(offsets), np.array([1.0, -1.0])
    for count in range(every):
        updates, state = optimizer.update(gradient, state, offsets)
        if count < every - 1:
            close(updates["a"], rates(count) * signs, rtol=1e-4)
        offsets = optax.apply_updates(offsets, updates)
    # The path is of points before an update, so the change begins at the last of these.
    later = sum(rates(every - 1 + i) for i in range(ahead))
    close(updates["a"], (rates(every - 1) + later) * signs, rtol=1e-3)
    updates, _ = optimizer.update(gradient, state, offsets)
    close(updates["a"], rates(every) * signs, rtol=1e-4)


def grown(sites, gradients, steps, **options):
    """Offsets and ranks after updates with the same gradient of the scales."""
    offsets = {
        name: {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "scale": jnp.zeros(4)}
        for name in sites
    }
    optimizer = variants.increlora(0.1, **options)
    state = optimizer.init(offsets)
    ranks = []
    for _ in range(steps):
        gradient = jax.tree.map(jnp.zeros_like, offsets)
        for name, size in zip(sites, gradients, strict=True):
            gradient[name]["scale"] = size * jnp.ones(4)
        updates, state = optimizer.update(gradient, state, offsets)
        offsets = optax.apply_updates(offsets, updates)
        ranks.append(np.asarray(state.ranks).tolist())
    return offsets, ranks


def test_increlora_grows_where_it_matters_and_never_beyond_its_budget():
    offsets, ranks = grown(["z", "y", "x"], [1.0, 3.0, 2.0], 20, budget=8, every=2, grow=1)
    # Sites in the order of their names: x, y, z.
    assert ranks[0] == [1, 1, 1]
    assert ranks[1] == [1, 2, 1]
    assert max(map(sum, ranks)) == sum(ranks[-1]) == 8
    assert ranks[-1] == [3, 4, 1]  # y is full, then x
    for name, rank in zip("xyz", ranks[-1], strict=True):
        assert np.count_nonzero(offsets[name]["scale"]) == rank
    _, ranks = grown(["x", "y"], [1.0, 1.0], 12, budget=7, every=1, grow=2)
    assert max(map(sum, ranks)) == 7


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: variants.krpo(measurement_noise=0.0), "measurement_noise=0.0: must be above 0"),
        (lambda: variants.krpo(process_noise=-1.0), "process_noise=-1.0: must be at least 0"),
        (lambda: variants.reinforce_pp(baseline=1), "baseline=1: must be True or False"),
        (lambda: variants.unlikeliness(2.0), "strength=2.0: must be from 0 to 1"),
        (lambda: variants.overlong(0.0), "share=0.0: must be above 0"),
        (lambda: variants.cispo(low=2.0), "low=2.0: must be from 0 to 1"),
        (lambda: variants.cispo(high=-1.0), "high=-1.0: must be at least 0"),
        (lambda: variants.a_star_po(0.0), "beta=0.0: must be above 0"),
        (lambda: variants.optimal_advantages(0), "beta=0: must be above 0"),
        (lambda: variants.optimal_advantages(offline=1), "offline=1: must be True or False"),
        (lambda: variants.rebel(0.0), "eta=0.0: must be above 0"),
        (lambda: variants.s_grpo(alpha=-1), "alpha=-1: must be at least 0"),
        (lambda: variants.s_grpo(alpha=4, k=2), "k=2: must be at least 4"),
        (lambda: variants.s_grpo(probability=1.5), "probability=1.5: must be from 0 to 1"),
        (lambda: variants.invadam(0.1, adam=2.0), "adam=2.0: must be from 0 to 1"),
        (lambda: variants.invadam(0.1, b1=1.0), "b1=1.0: must be from 0"),
        (lambda: variants.extrapolated(0.1, every=1), "every=1: must be at least"),
        (lambda: variants.extrapolated(0.1, ahead=-1), "ahead=-1: must be at least 0"),
        (lambda: variants.extrapolated(0.1, degree=0), "degree=0: must be at least 1"),
        (lambda: variants.increlora(0.1, budget=0), "budget=0: must be at least 1"),
        (lambda: variants.increlora(0.1, budget=1, decay=1.0), "decay=1.0: must be from 0"),
        (lambda: grown(["x", "y"], [1.0, 1.0], 1, budget=1), "budget=1: must be at least 2"),
        (
            lambda: variants.increlora(0.1, budget=9).init({"x": jnp.zeros(3)}),
            "set adapter.type='increlora'",
        ),
        (lambda: adapters.vera(d=0), "d=0: must be other than 0"),
        (lambda: adapters.vera(rank=0), "rank=0: must be at least 1"),
        (lambda: adapters.grasp(groups=0), "groups=0: must be at least 1"),
        (lambda: adapters.stoch_grasp(noise=0.0), "noise=0.0: must be above 0"),
        (lambda: adapters.tinylora(size=0), "size=0: must be at least 1"),
        (lambda: adapters.tera(rank=0), "rank=0: must be at least 1"),
        (lambda: adapters.hut(rank=0), "rank=0: must be at least 1"),
        (lambda: adapters.lora_xs(rank=0), "rank=0: must be at least 1"),
        (lambda: adapters.increlora(max_rank=0), "max_rank=0: must be at least 1"),
        (lambda: adapters.lora(rank=2.0), "rank=2.0: must be a whole number, at least 1"),
        (lambda: adapters.vera(d="0"), "d='0': must be a number, other than 0"),
        (lambda: variants.overlong("all"), "share='all': must be a number, above 0"),
        (lambda: variants.rebel(jnp.float32(1)), r"eta=Array\(1.*: must be a number, above 0"),
    ],
)
def test_a_value_out_of_range_is_named(make, said):
    with pytest.raises(InputError, match=said):
        make()


# By config


TRAINED = {
    "shaped, two updates": {
        "grpo.shaping": "overlong",
        "grpo.advantages": "bnpo",
        "grpo.objective": "cispo",
        "grpo.updates": 2,
    },
    "a tree of completions, a shared vector": {
        "grpo.objective": "policy_gradient",
        "grpo.advantages": "t_spmo",
        "grpo.weights": "t_spmo",
        "adapter.type": "tinylora",
        "adapter.options": {"size": 4, "sites_per_vector": 0},
    },
    "growing ranks": {
        "adapter.type": "increlora",
        "adapter.options": {"max_rank": 2},
        "train.optimizer": "increlora",
        "train.optimizer_options": {"budget": 2, "every": 1},
    },
    "drawn": {"adapter.type": "stoch_grasp", "grpo.weights": "s_grpo"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_methods_train_search_and_export_together(name, tmp_path):
    changes = {"train.max_steps": 1, "search.generations": 1, "search.experts": "", **TRAINED[name]}
    settings = training_config(
        **{"train.warmup_steps": 0, "search.gate": False, "cem.population_size": 4, **changes}
    )
    summary = gj.train(settings, tmp_path / "run")
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["skipped"] == 0.0
    run = gj.load_run(tmp_path / "run")
    assert adapters.num_params(run.offsets) == summary["trainable_parameters"]
    assert any(np.any(x) for x in jax.tree.leaves(run.offsets))
    found = gj.adapt(run, "A text to adapt to.")
    assert found.returned == "mean"
    # It refuses a merged model whose logits are others than the adapted one's.
    gj.export_model(tmp_path / "run", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"grpo.supervision": "process", "grpo.advantages": "t_spmo"},
            "config.grpo.advantages='t_spmo' is for rewards of whole completions",
        ),
        (
            {"grpo.supervision": "process", "grpo.shaping": "overlong"},
            "config.grpo.shaping='overlong' is for rewards of whole completions",
        ),
        (
            {"grpo.supervision": "process", "grpo.shaping": "mine:shaping"},
            "config.grpo.shaping='mine:shaping' is for rewards of whole completions",
        ),
        ({"grpo.advantages": "bnpoo"}, "config.grpo.advantages='bnpoo'.*bnpo"),
        ({"grpo.updates": 0}, "config.grpo.updates=0: must be at least 1"),
    ],
)
def test_a_combination_without_a_meaning_is_refused(changes, said):
    settings = gj.load_config("tiny")
    settings.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=said):
        parse_config(settings)


def test_options_that_a_method_does_not_take_are_named():
    settings = gj.load_config("tiny")
    settings.grpo.advantages = "krpo"
    settings.grpo.advantages_options = {"low": 0.0}
    with pytest.raises(InputError, match=r"config.grpo.advantages='krpo' with options .*'low'"):
        make_algorithm(parse_config(settings))


# Several updates


def test_updates_of_a_step_count_as_one_step():
    state = grpo.TrainState(jnp.float32(1.0), jnp.int32(5), jnp.int32(7))

    def once(state):
        metrics = {"loss": state.offsets, "learning_rate": state.offsets / 10, "skipped": 0.0}
        metrics["skipped"] = jnp.where(state.offsets == 2, 1.0, 0.0)
        return grpo.TrainState(state.offsets + 1, state.opt_state + 1, state.step + 1), metrics

    new, metrics = repeat(once, state, 3)
    assert (int(new.offsets), int(new.opt_state), int(new.step)) == (4, 8, 8)
    close([metrics["loss"], metrics["learning_rate"], metrics["skipped"]], [2.0, 0.3, 1.0])


# Adapters


def kernel_of(rows=6, columns=8, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def adapted(adapter, kernel, change):
    """The factors, offsets moved by ``change``, and what they give for some inputs."""
    factors = adapter.factor(jax.random.key(1), kernel)
    offsets = adapter.init(jax.random.key(2), {"h.0": factors})
    offsets = jax.tree.map(lambda x: x + change, offsets)
    x = np.random.default_rng(3).normal(size=(5, len(kernel))).astype(np.float32)
    return x, factors, adapter.view(offsets)["h.0"]


def test_grasp_with_a_group_for_each_input_is_a_diagonal_scale_and_shift():
    kernel, adapter = kernel_of(), adapters.grasp(groups=99)
    x, factors, own = adapted(adapter, kernel, 0.0)
    rng = np.random.default_rng(5)
    own = {name: jnp.asarray(0.3 * rng.normal(size=6), jnp.float32) for name in own}
    group = np.empty(6, int)
    group[np.random.default_rng(0).permutation(6)] = np.arange(6)
    shift, scale = np.asarray(own["shift"])[group], 1 + np.asarray(own["scale"])[group]
    close(adapter.apply(factors, own, x), (x - shift) / scale @ kernel, rtol=1e-4, atol=1e-5)


def test_grasp_cuts_the_inputs_into_groups_of_nearly_equal_size():
    adapter = adapters.grasp(groups=4)
    factors = adapter.factor(jax.random.key(0), np.eye(10, dtype=np.float32))
    own = {"shift": jnp.arange(4.0), "scale": jnp.zeros(4)}
    moved = -np.asarray(adapter.apply(factors, own, jnp.zeros((1, 10))))[0]
    assert sorted(np.bincount(moved.round().astype(int))) == [2, 2, 3, 3]


def test_stoch_grasp_draws_about_its_mean_with_its_deviation():
    adapter = adapters.stoch_grasp(groups=3, noise=0.2)
    start = adapter.init(jax.random.key(0), {f"h.{i}": kernel_of() for i in range(2)})
    start = jax.tree.map(lambda x: x + 0.5, start)
    drawn = jax.vmap(adapter.draw, (0, None))(jax.random.split(jax.random.key(1), 4000), start)
    for own in drawn.values():
        close(own["shift_rho"], 0.5)
        for part in ("shift", "scale"):
            close(own[part].mean(0), 0.5, atol=0.03)
            close(own[part].std(0), 0.2 * math.exp(0.5), rtol=0.06)
    assert abs(np.corrcoef(drawn["h.0"]["shift"][:, 0], drawn["h.1"]["shift"][:, 0])[0, 1]) < 0.1


def test_a_draw_is_the_same_where_it_is_compiled():
    """Compiled programs have the sites in another order than a model has them."""
    adapter, sites = adapters.stoch_grasp(groups=3), {f"h.{i}": (f"h.{i}",) for i in (9, 10)}
    params = {name: kernel_of() for name in sites}
    start = adapters.init_adapter(adapter, jax.random.key(0), params, sites)
    drawn = [draw(jax.random.key(1), start) for draw in (adapter.draw, jax.jit(adapter.draw))]
    chex.assert_trees_all_close(*drawn, rtol=1e-5)


def test_vera_is_its_formula_and_shares_what_is_random():
    kernel, adapter = kernel_of(), adapters.vera(rank=3, d=0.1)
    x, factors, own = adapted(adapter, kernel, 0.2)
    left = (x @ np.asarray(factors.a)) * 0.3
    close(
        adapter.apply(factors, own, x), x @ kernel + left @ np.asarray(factors.b) * 0.2, rtol=1e-4
    )
    other = adapter.factor(jax.random.key(9), kernel_of(seed=4))
    assert np.array_equal(factors.a, other.a)
    assert np.array_equal(factors.b, other.b)


def test_lora_xs_stays_among_the_leading_singular_vectors():
    kernel, adapter = kernel_of(), adapters.lora_xs(rank=2)
    x, factors, own = adapted(adapter, kernel, 0.0)
    own = jnp.array([[0.5, 0.0], [0.0, 0.5]])
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    s[:2] *= 1.5  # a diagonal R scales the singular values
    close(adapter.apply(factors, own, x), x @ (u * s) @ vt, rtol=1e-3, atol=1e-4)


def test_tinylora_is_lora_xs_with_its_matrix_in_a_subspace_and_shares_vectors():
    kernel, adapter = kernel_of(), adapters.tinylora(rank=2, size=3, sites_per_vector=2)
    names = [f"h.{i}" for i in range(5)]
    factors = {name: adapter.factor(jax.random.key(i), kernel) for i, name in enumerate(names)}
    offsets = adapter.init(jax.random.key(0), factors)
    assert list(offsets) == ["h.0+h.1", "h.2+h.3", "h.4"]
    assert adapters.num_params(offsets) == 9
    offsets["h.2+h.3"] = jnp.array([1.0, -2.0, 0.5])
    seen = adapter.view(offsets)
    assert np.array_equal(seen["h.2"], seen["h.3"])
    assert not np.any(seen["h.1"])
    r = np.einsum("i,ijk->jk", np.asarray(seen["h.2"]), np.asarray(factors["h.2"].p))
    x = np.ones((1, 6), np.float32)
    same = adapters.lora_xs(rank=2)
    frozen = same.factor(jax.random.key(0), kernel)
    close(
        adapter.apply(factors["h.2"], seen["h.2"], x),
        same.apply(frozen, jnp.asarray(r), x),
        rtol=1e-4,
        atol=1e-5,
    )
    one = adapters.tinylora(size=3, sites_per_vector=0).init(jax.random.key(0), factors)
    assert list(one) == ["+".join(names)]


def test_hut_is_a_hadamard_product_of_the_kernel():
    kernel, adapter = kernel_of(), adapters.hut(rank=2)
    x, factors, own = adapted(adapter, kernel, 0.3)
    changed = kernel * (1 + np.asarray(own["a"]) @ np.asarray(own["b"]))
    close(adapter.apply(factors, own, x), x @ changed, rtol=1e-4, atol=1e-4)


def test_tera_is_its_sum_and_of_a_high_rank():
    kernel, adapter = kernel_of(6, 8), adapters.tera(rank=2)
    x, factors, own = adapted(adapter, kernel, 0.25)
    u1, u2, u3, u4 = map(np.asarray, factors.factors)
    assert (len(u1), len(u2), u3.shape[1], u4.shape[1]) == (2, 3, 2, 4)
    d = np.asarray(own) + np.array([[1.0], [1], [1], [0]])
    core = np.asarray(factors.core).reshape(2, 2, 2, 2)  # [b, a, c, d]
    change = np.einsum(
        "bacd,ia,jb,ck,dl->ijkl", core, u1 * d[0], u2 * d[1], u3 * d[2][:, None], u4 * d[3][:, None]
    ).reshape(6, 8)
    close(adapter.apply(factors, own, x), x @ (kernel + change), rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(change) == 4
    assert own.size == 8


def test_increlora_without_scales_is_not_there():
    kernel, adapter = kernel_of(), adapters.increlora(max_rank=3)
    x, factors, own = adapted(adapter, kernel, 0.0)
    one = {**own, "scale": jnp.array([2.0, 0.0, 0.0])}
    change = 2 * np.outer(own["a"][:, 0], own["b"][0])
    close(adapter.apply(factors, one, x), x @ (kernel + change), rtol=1e-4, atol=1e-4)


def test_what_a_method_reads_of_the_others_completions_is_what_processes_share():
    """Advantages of a group are the same with zeros in place of what a rule does not read."""
    config = parse_config(training_config())

    def shared(shown=False, **settings):
        changed = dataclasses.replace(config.grpo, **settings)
        own = dataclasses.replace(config, grpo=changed)
        return steps.shared(own, make_algorithm(own), shown=shown)

    assert shared() == set()
    assert shared(shown=True) == {"texts"}
    assert shared(weights="token", shaping="overlong", advantages="scaled") == set()
    assert shared(advantages="t_spmo", weights="t_spmo") == {"tokens"}
    assert shared(shaping="unlikeliness") == {"logps"}
    assert shared(dynamic_sampling=2) == set(rollouts.SHARED)
    own = "tests.test_variants:rule"
    assert shared(advantages=own) == {"tokens", "logps", "entropies"}
    assert shared(advantages="tests.test_variants:modest") == set()
    with pytest.raises(
        InputError, match=r"reads\('rewards'\): must be of tokens, logps, entropies"
    ):
        grpo.reads("rewards")


@pytest.mark.parametrize("name", variants.ADVANTAGES)
def test_an_advantage_function_reads_no_more_than_it_says(name):
    function = variants.ADVANTAGES[name]()
    rng = np.random.default_rng(0)
    rewards, tokens = rng.random((3, 4), np.float32), rng.integers(0, 2, (3, 4, 5), np.int32)
    mask = np.arange(5) < rng.integers(1, 6, (3, 4, 1))
    given = rewards, np.full(mask.shape, NAN, np.float32)
    whole = function(*given, tokens, mask)
    if "tokens" not in grpo.read_by(function):
        np.testing.assert_array_equal(function(*given, 0 * tokens, mask), whole)
    else:
        assert np.any(np.asarray(function(*given, 0 * tokens, mask)) != np.asarray(whole))


def rule():
    """An advantage function that does not say what it reads."""
    return lambda rewards, step_rewards, tokens, mask: jnp.zeros(jnp.shape(mask))


def modest():
    """The same, which says it."""
    return grpo.reads()(rule())
