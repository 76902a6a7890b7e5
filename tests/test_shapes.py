"""Shapes and dtypes of the public functions are those that their docstrings say."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import grpocem_jax as gj
from tests.tiny import Tiny

P, G, N, S, C, K = 2, 4, 5, 6, 7, 3
KEY = jax.random.key(0)


def prompts() -> tuple[jax.Array, jax.Array]:
    return jnp.ones((P, S), jnp.int32), jnp.arange(S)[None] >= jnp.array([[0], [2]])


def rollouts(tiny: Tiny) -> gj.Rollouts:
    tokens, mask = prompts()
    return jax.eval_shape(
        lambda: gj.sample(
            tiny.factored, tiny.zero, tokens, mask, jax.random.split(KEY, P), jnp.array([0]), 1.0,
            model=tiny.model, num_samples=G, max_new_tokens=N,
        )
    )  # fmt: skip


def batch() -> gj.Batch:
    tokens, mask = prompts()
    there = jnp.ones((P, G, N), bool)
    ones = jnp.ones((P, G, N))
    return gj.Batch(
        tokens, mask, jnp.ones((P, G, N), jnp.int32), there, -ones, ones, gj.token_weights(there)
    )


def test_completions_have_an_axis_for_prompts_samples_and_tokens(tiny):
    out = rollouts(tiny)
    chex.assert_shape([out.tokens, out.mask, out.logps, out.entropies], (P, G, N))
    chex.assert_type([out.tokens, out.mask, out.logps, out.entropies], [int, bool, float, float])


def test_log_probabilities_are_those_of_each_token_or_of_the_positions_asked_for(tiny):
    tokens, mask = prompts()
    completions, there = jnp.ones((G, N), jnp.int32), jnp.ones((G, N), bool)

    def of(positions=None):
        return gj.completion_logps(
            tiny.model, tiny.factored, tiny.zero, tokens[0], mask[0], completions, there, 1.0,
            positions,
        )  # fmt: skip

    chex.assert_shape(jax.eval_shape(of), (G, N))
    chex.assert_shape(jax.eval_shape(of, jnp.zeros((G, K), jnp.int32)), (G, K))
    hidden = jax.eval_shape(tiny.model.forward, tiny.factored, tiny.zero, tokens[0], mask[0])
    chex.assert_shape(hidden, (S, 40))
    found = jax.eval_shape(
        lambda hidden: gj.token_logps(tiny.model, tiny.factored, hidden, tokens[0], 1.0), hidden
    )
    chex.assert_shape(found, (S,))
    chex.assert_type(found, float)


def test_advantages_weights_and_objectives_are_of_every_token(tiny):
    given = batch()
    rewards = jnp.arange(P * G, dtype=jnp.float32).reshape(P, G)
    advantages = gj.outcome_advantages(rewards, given.mask)
    values, metrics = gj.clipped()(given.old_logps, given)
    chex.assert_shape([advantages, given.weights, values], (P, G, N))
    chex.assert_type([advantages, given.weights, values], float)
    chex.assert_rank(list(metrics.values()), 0)


def test_an_update_keeps_structure_and_gives_scalars(tiny):
    optimizer = optax.adamw(1e-2)
    state = gj.init_state(tiny.zero, optimizer)
    after, metrics = jax.eval_shape(
        lambda state, batch: gj.update(
            state, tiny.factored, batch, 1.0,
            model=tiny.model, objective=gj.clipped(), optimizer=optimizer, beta=0.1,
        ),
        state, batch(),
    )  # fmt: skip
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_shape(list(metrics.values()), ())
    chex.assert_type(list(metrics.values()), float)


@pytest.mark.parametrize("method", [gj.CEM(population_size=C), gj.GradientAscent()])
def test_a_search_method_asks_for_candidates_and_keeps_its_state(method):
    start = {"a": jnp.zeros(K), "b": jnp.zeros((K, 2))}
    state = method.init(start)
    candidates = method.ask(KEY, state)
    count = method.population_size
    chex.assert_tree_shape_prefix(candidates, (count,))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.tree.map(lambda x: x[0], candidates), start)
    if count > 1:
        after = method.tell(state, candidates, jnp.arange(count, dtype=jnp.float32))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.mean, start)


def test_a_likelihood_is_a_scalar_and_a_search_gives_offsets(tiny):
    everywhere = jnp.ones((P, S), bool)
    texts = gj.search.Texts(jnp.ones((P, S), jnp.int32), everywhere, everywhere)
    score = gj.Likelihood(tiny.factored, tiny.model)
    chex.assert_shape(jax.eval_shape(score, tiny.zero, texts, KEY), ())
    logps, scored = jax.eval_shape(score.scores, tiny.zero, texts, KEY)
    chex.assert_equal_shape([logps, scored])
    space = gj.full_space(tiny.zero)
    found = gj.maximize(gj.CEM(population_size=4), score, space, texts, KEY, generations=2)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.offsets, tiny.zero)
    chex.assert_shape([found.history.best, found.history.mean], (2,))


def test_an_attached_model_takes_offsets_by_site(tiny):
    for adapter, width in ((gj.svf(rank_ratio=0.5), 20), (gj.svf(), 32)):
        attached = gj.attach(tiny.pretrained, adapter, ["attn.c_proj"])
        chex.assert_shape(list(attached.zero.values()), (width,))
        assert set(attached.zero) == set(attached.sites)
        merged = gj.merge_params(adapter, attached.params, attached.zero, attached.sites)
        chex.assert_trees_all_close(merged, jax.device_get(tiny.params), atol=1e-5)


def test_a_temperature_and_other_values_do_not_trace_a_function_again(tiny):
    given, optimizer = batch(), optax.adamw(1e-2)
    state = gj.init_state(tiny.zero, optimizer)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, batch, temperature):
        return gj.update(
            state, tiny.factored, batch, temperature,
            model=tiny.model, objective=gj.clipped(), optimizer=optimizer,
        )[0]  # fmt: skip

    for temperature in (1.0, 0.5, 2.0):
        state = step(state, given, temperature)
    chex.assert_tree_all_finite(state.offsets)
    with pytest.raises(AssertionError, match="traced"):
        step(state, jax.tree.map(lambda x: x[:1], given), 1.0)
