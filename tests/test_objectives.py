"""Objectives by hand, tokens that are context, and tokens whose head is not computed."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import variants
from grpocem_jax import grpo
from grpocem_jax.grpo import checks
from grpocem_jax.models import likelihood
from grpocem_jax.utils.errors import InputError

PROMPTS, GROUP, LENGTH = 2, 3, 5


def of_ratios(ratios, advantages, weights=None):
    """Log-probabilities and a batch of one prompt and one completion."""
    old = jnp.full((1, 1, len(ratios)), -2.0)
    everywhere = jnp.ones(old.shape, bool)
    batch = grpo.Batch(
        prompts=jnp.ones((1, 1), jnp.int32),
        prompt_mask=jnp.ones((1, 1), bool),
        completions=jnp.ones(old.shape, jnp.int32),
        mask=everywhere,
        old_logps=old,
        advantages=jnp.broadcast_to(jnp.asarray(advantages, jnp.float32), old.shape),
        weights=grpo.token_weights(everywhere) if weights is None else jnp.array([[weights]]),
    )
    return old + jnp.log(jnp.array([[ratios]])), batch


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.25, 2.0, 2.5),  # inside; the symmetric clip at 1.2 would give 2.4
        (1.5, 2.0, 2.56),  # clipped at 1.28
        (0.75, -2.0, -1.6),  # clipped at 0.8; at 0.72 it would be -1.5
        (1.5, -2.0, -3.0),  # bad tokens that became likelier are never clipped
    ],
)
def test_clip_higher_has_its_own_bound_above(ratio, advantage, expected):
    values, metrics = variants.dapo()(*of_ratios([ratio], advantage))
    np.testing.assert_allclose(values, [[[expected]]], rtol=1e-6)
    high, low = float(ratio > 1.28 and advantage > 0), float(ratio < 0.8 and advantage < 0)
    assert float(metrics["clip_ratio/high_mean"]) == high
    assert float(metrics["clip_ratio/low_mean"]) == low


@pytest.mark.parametrize(
    ("ratios", "advantage", "expected"),
    [
        # The geometric mean of 4 and 1 is 2: clipped at 1.2. By token: 1.2 and 1.
        ([4.0, 1.0], 1.0, [1.2, 1.2]),
        ([4.0, 1.0], -1.0, [-2.0, -2.0]),
        # Of 2 and 1/2 it is 1, though each token's ratio is out of range.
        ([2.0, 0.5], 3.0, [3.0, 3.0]),
        # (1.331 x 1 x 1)^(1/3) = 1.1
        ([1.331, 1.0, 1.0], 2.0, [2.2, 2.2, 2.2]),
    ],
)
def test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens(ratios, advantage, expected):
    objective = grpo.clipped(0.2, 0.2, ratio="sequence")
    values, _ = objective(*of_ratios(ratios, advantage))
    np.testing.assert_allclose(values[0, 0], expected, rtol=1e-5)


def test_the_gradient_of_the_sequence_ratio_is_shared_by_its_tokens():
    logps, batch = of_ratios([1.21, 1.0], 2.0)
    objective = grpo.clipped(0.2, 0.2, ratio="sequence")
    gradient = jax.grad(lambda x: jnp.sum(batch.weights * objective(x, batch)[0]))(logps)
    # J = s A with s = sqrt(1.21 x 1) = 1.1, and ds/dlogp_t = s/2: 1.1 each (by token 1.21 and 1,
    # the first of them clipped, so 0 and 1).
    np.testing.assert_allclose(gradient[0, 0], [1.1, 1.1], rtol=1e-5)
    # Clipped, there is none.
    logps, batch = of_ratios([4.0, 1.0], 2.0)
    gradient = jax.grad(lambda x: jnp.sum(batch.weights * objective(x, batch)[0]))(logps)
    np.testing.assert_array_equal(gradient, 0.0)


def test_tokens_that_are_not_trained_do_not_count_in_the_sequence_ratio():
    weights = [0.5, 0.0, 0.5]
    logps, batch = of_ratios([4.0, 1000.0, 1.0], 1.0, weights)
    values, metrics = grpo.clipped(0.2, 1.5, ratio="sequence")(logps, batch)
    np.testing.assert_allclose(values[0, 0, [0, 2]], [2.0, 2.0], rtol=1e-5)
    assert float(metrics["clip_ratio/high_mean"]) == 0.0


@pytest.mark.slow
def test_of_one_token_completions_the_sequence_ratio_is_the_token_ratio():
    rng = np.random.default_rng(0)
    shape = (4, 8, 1)
    mask = jnp.ones(shape, bool)
    batch = grpo.Batch(
        jnp.ones((4, 2), jnp.int32),
        jnp.ones((4, 2), bool),
        jnp.ones(shape, jnp.int32),
        mask,
        jnp.asarray(-rng.gamma(2.0, size=shape), jnp.float32),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        grpo.token_weights(mask),
    )
    logps = batch.old_logps + jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    def evaluate(ratio):
        objective = grpo.clipped(0.1, 0.3, ratio=ratio)
        values, metrics = objective(logps, batch)
        gradient = jax.grad(lambda x: jnp.sum(objective(x, batch)[0]))(logps)
        return values, gradient, metrics

    for mine, other in zip(
        *map(jax.tree.leaves, map(evaluate, ("token", "sequence"))), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert 0 < float(evaluate("token")[2]["clip_ratio/region_mean"]) < 1


# Advantages that depend on the token


def test_t_spmo_is_what_a_token_adds_to_the_reward_of_its_prefix():
    # Four completions of two tokens: a b, a c, d b, and a b which abstained.
    tokens = np.array([[[1, 2], [1, 3], [4, 2], [1, 2]]], np.int32)
    rewards = np.array([[1.0, 0.0, 0.5, np.nan]], np.float32)
    found = grpo.variants.prefix_advantages()(rewards, None, tokens, np.ones(tokens.shape, bool))
    # The mean of all is 0.5; of those that begin with a also 0.5; a b is worth 1, a c 0.
    np.testing.assert_allclose(found, [[[0, 0.5], [0, -0.5], [0, 0], [0, 0]]], atol=1e-6)
    tokens[0, 2, 0] = 5
    rewards[0, 2] = 2.0
    found = grpo.variants.prefix_advantages()(rewards, None, tokens, np.ones(tokens.shape, bool))
    # Now the mean is 1: beginning with a loses 0.5, with d gains 1.
    np.testing.assert_allclose(found, [[[-0.5, 0.5], [-0.5, -0.5], [1, 0], [0, 0]]], atol=1e-6)


# Context, and a selection of tokens


@pytest.fixture(scope="module")
def batch(tiny):
    keys = jax.random.split(jax.random.key(3), 4)
    shape = (PROMPTS, GROUP, LENGTH)
    mask = jnp.arange(LENGTH)[None, None] < jnp.array([[5, 3, 1], [4, 5, 2]])[..., None]
    return grpo.Batch(
        prompts=jax.random.randint(keys[0], (PROMPTS, 4), 0, tiny.model.vocab_size),
        prompt_mask=jnp.arange(4)[None] >= jnp.array([[0], [2]]),
        completions=jax.random.randint(keys[1], shape, 0, tiny.model.vocab_size),
        mask=mask,
        old_logps=jnp.where(mask, -4.0 + jax.random.normal(keys[2], shape), 0.0),
        advantages=jnp.where(mask, jax.random.normal(keys[3], shape), 0.0),
        weights=grpo.token_weights(mask),
    )


OPTIMIZER = grpo.adamw(learning_rate=0.01, warmup_steps=0)


def update(tiny, batch, **changes):
    settings = {"objective": grpo.clipped(ratio="sequence"), "beta": 0.1, "entropy": 0.1}
    state = grpo.init_state(tiny.adapted(), OPTIMIZER)
    settings |= {"optimizer": OPTIMIZER, "micro_batch": GROUP}
    return grpo.update(
        state, tiny.factored, batch, 0.8, model=tiny.model, **{**settings, **changes}
    )


def same(first, second, atol=1e-6):
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)


@pytest.mark.slow
def test_context_is_attended_to_and_not_trained(tiny, batch):
    trained = batch.mask.at[:, :, 1].set(False)  # as the output of a tool
    weights = grpo.token_weights(trained)
    context = batch._replace(weights=weights)
    found = update(tiny, context)
    # Whatever stands there of another policy plays no part, however improbable.
    for value in (-300.0, 300.0):
        other = context._replace(
            old_logps=jnp.where(trained, batch.old_logps, value),
            advantages=jnp.where(trained, batch.advantages, -value),
        )
        same(update(tiny, other), found)
    # The token itself does: those after it attend to it.
    changed = batch.completions.at[:, :, 1].add(1) % tiny.model.vocab_size
    loss = float(update(tiny, context._replace(completions=changed))[1]["loss"])
    assert loss != pytest.approx(float(found[1]["loss"]), abs=1e-5)
    # And without it, masked out, it would be another loss too.
    masked = float(update(tiny, context._replace(mask=trained))[1]["loss"])
    assert masked != pytest.approx(float(found[1]["loss"]), abs=1e-5)


@pytest.mark.slow
def test_selected_positions_give_what_the_whole_computation_gives(tiny, batch):
    drawn = jax.random.bernoulli(jax.random.key(6), 0.5, batch.mask.shape)
    chosen = batch.mask & drawn & (jnp.cumsum(drawn, -1) <= 2)
    assert {int(n) for n in chosen.sum(-1).ravel()} == {0, 1, 2}
    weights = grpo.token_weights(chosen)
    whole = update(tiny, batch._replace(weights=weights))
    part = update(tiny, batch._replace(weights=weights, positions=grpo.select(weights, 2)))
    same(whole, part)
    assert float(jnp.abs(part[0].offsets["h.0.attn.c_proj"]).max()) > 0


@pytest.mark.slow
def test_log_probabilities_at_positions_are_those_of_all_tokens(tiny, batch):
    positions = jnp.array([[0, 4], [3, 1], [2, 0]])
    inputs = (batch.prompts[0], batch.prompt_mask[0], batch.completions[0], batch.mask[0], 0.7)
    call = functools.partial(
        likelihood.completion_logps, tiny.model, tiny.factored, tiny.adapted(), *inputs
    )
    for part, whole in zip(jax.jit(call)(positions), jax.jit(call)(), strict=True):
        np.testing.assert_allclose(part, jnp.take_along_axis(whole, positions, -1), atol=1e-5)


@pytest.mark.slow
def test_the_head_of_tokens_that_are_not_selected_is_not_computed(tiny, batch):
    def operations(positions):
        some = batch._replace(positions=positions)
        lowered = jax.jit(grpo.update, static_argnames=grpo.STATIC).lower(
            grpo.init_state(tiny.zero, OPTIMIZER), tiny.factored, some, 1.0,
            model=tiny.model, objective=grpo.clipped(), optimizer=OPTIMIZER,
        )  # fmt: skip
        return lowered.compile().cost_analysis()["flops"]

    saved = operations(None) - operations(grpo.select(batch.weights, 1))
    vocabulary, width = tiny.factored["wte"].shape
    tokens = PROMPTS * GROUP * (LENGTH - 1)
    # Forward and backward, a product each.
    assert saved > 2 * (2 * tokens * width * vocabulary)


def test_selection_takes_the_largest_weights_in_order():
    weights = jnp.array([[[0.0, 0.2, 0.0, 0.1, 0.3], [0.0, 0.0, 0.0, 0.5, 0.0]]])
    first, second = grpo.select(weights, 3)[0].tolist()
    assert first == [1, 3, 4]
    assert 3 in second
    assert second == sorted(set(second))
    with pytest.raises(InputError, match="count=6: must be from 1 to the length 5"):
        grpo.select(weights, 6)


def test_a_rule_of_the_users_own_trains_the_least_certain_tokens():
    out = checks.sample_rollouts()
    weights, positions = variants.high_entropy(0.4)(jax.random.key(0), out)
    lengths = np.asarray(out.mask).sum(-1)
    np.testing.assert_array_equal(np.sum(weights > 0, -1), np.minimum(lengths, 2))
    assert positions.shape == (2, 4, 2)
    trained, entropies = np.asarray(weights) > 0, np.asarray(out.entropies)
    lowest = np.where(trained, entropies, np.inf).min(-1)
    highest = np.where(out.mask & ~trained, entropies, -np.inf).max(-1)
    assert (lowest >= highest).all()


def test_advantages_of_the_users_own_are_discounted_from_the_last_token():
    out = checks.sample_rollouts()
    rewards = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = variants.discounted(0.5)(rewards, None, out.tokens, out.mask)
    whole = np.asarray(grpo.outcome_advantages(rewards, out.mask))
    rows = (x.reshape(8, 5) for x in (found, out.mask, whole))
    for row, mask, plain in zip(*rows, strict=True):
        length = int(mask.sum())
        factors = 0.5 ** np.arange(length - 1, -1, -1)
        np.testing.assert_allclose(row[:length], plain[:length] * factors, rtol=1e-6)
        np.testing.assert_array_equal(row[length:], 0)


# Static arguments


@dataclasses.dataclass(frozen=True)
class Counted:
    """Counts how often it is traced."""

    scale: float
    traces = 0

    def __call__(self, logps, batch):
        type(self).traces += 1
        return self.scale * logps * batch.advantages, {"own": jnp.sum(batch.weights * logps)}


@pytest.mark.slow
def test_equal_settings_are_not_compiled_again(tiny, batch):
    assert {grpo.clipped(0.2, 0.3)} == {grpo.clipped(low=0.2, high=0.3)}
    assert grpo.clipped(0.2, 0.3) != grpo.clipped(0.2, 0.3, ratio="sequence")
    assert grpo.adamw(learning_rate=0.5) is grpo.adamw(learning_rate=0.5)
    _, metrics = update(tiny, batch, objective=Counted(1.0))
    before = Counted.traces
    assert before > 0
    update(tiny, batch, objective=Counted(1.0))
    assert Counted.traces == before
    update(tiny, batch, objective=Counted(2.0))
    assert Counted.traces > before
    # Its metric adds up over the micro-batches.
    logps = jax.jit(jax.vmap(functools.partial(likelihood.completion_logps, tiny.model),
                             in_axes=(None, None, 0, 0, 0, 0, None)))(
        tiny.factored, tiny.adapted(), *batch[:4], 0.8
    )[0]  # fmt: skip
    assert float(metrics["own"]) == pytest.approx(float(jnp.sum(batch.weights * logps)), rel=1e-4)


@pytest.mark.slow
def test_any_optax_optimizer_updates_and_its_learning_rate_is_reported_where_it_is_known(
    tiny, batch
):
    def one(optimizer):
        start = grpo.init_state(tiny.adapted(), optimizer)
        after, metrics = update_with(optimizer, start)
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), after.offsets, start.offsets)
        return max(jax.tree.leaves(moved)), metrics

    def update_with(optimizer, state):
        return grpo.update(
            state, tiny.factored, batch, 0.8,
            model=tiny.model, objective=grpo.clipped(), optimizer=optimizer,
        )  # fmt: skip

    # Lion's step is the sign of the gradient times the rate.
    moved, metrics = one(grpo.optimizer(
        functools.partial(optax.lion, weight_decay=0.0), learning_rate=0.02, max_grad_norm=1e9
    ))  # fmt: skip
    assert moved == pytest.approx(0.02, rel=1e-4)
    assert float(metrics["learning_rate"]) == pytest.approx(0.02)
    moved, metrics = one(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    assert float(metrics["learning_rate"]) == 0.5
    moved, metrics = one(optax.lion(0.03, weight_decay=0.0))
    assert moved == pytest.approx(0.03, rel=1e-4)
    assert "learning_rate" not in metrics
    assert math.isfinite(float(metrics["grad_norm"]))
