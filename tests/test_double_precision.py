"""With JAX's 64-bit types switched on, what is public does what it does without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import grpo
from grpocem_jax.models import sampling
from grpocem_jax.search import CEM, GradientAscent, fitness, loop, spaces

PROMPTS, GROUP, LENGTH = 2, 4, 6


def both(function):
    """Results with 32-bit and with 64-bit types."""
    with jax.enable_x64(False):
        single = jax.device_get(function())
    with jax.enable_x64(True):
        double = jax.device_get(function())
    return single, double


def offsets(tiny, seed=1):
    with jax.enable_x64(False):
        return jax.device_get(tiny.adapted(seed))


def types(tree):
    return jax.tree.map(lambda x: np.asarray(x).dtype, tree)


def draw(tiny):
    return sampling.sample(
        tiny.factored,
        offsets(tiny),
        jnp.arange(PROMPTS * 5, dtype=jnp.int32).reshape(PROMPTS, 5),
        jnp.ones((PROMPTS, 5), bool),
        jax.random.split(jax.random.key(1), PROMPTS),
        jnp.array([-1], jnp.int32),
        jnp.array(0.8),
        model=tiny.model,
        num_samples=GROUP,
        max_new_tokens=LENGTH,
        top_p=0.7,
        repetition_penalty=1.2,
    )


def test_samples_are_the_same(tiny):
    single, double = both(lambda: draw(tiny))
    assert types(double) == types(single)
    np.testing.assert_array_equal(double.tokens, single.tokens)
    np.testing.assert_allclose(double.logps, single.logps, atol=1e-5)


def test_updates_are_the_same(tiny):
    optimizer = grpo.adamw(target_kl=0.01, learning_rate=0.01)
    rewards = np.random.default_rng(0).normal(size=(PROMPTS, GROUP)).astype(np.float32)
    out = jax.device_get(draw(tiny))

    def step():
        batch = grpo.Batch(
            jnp.arange(PROMPTS * 5, dtype=jnp.int32).reshape(PROMPTS, 5),
            jnp.ones((PROMPTS, 5), bool),
            out.tokens,
            out.mask,
            out.logps,
            grpo.outcome_advantages(rewards, out.mask),
            grpo.token_weights(jnp.asarray(out.mask)),
        )
        state = grpo.init_state(jax.tree.map(jnp.asarray, offsets(tiny)), optimizer)
        for _ in range(2):
            state, metrics = grpo.update(
                state,
                tiny.factored,
                batch,
                jnp.array(0.8),
                model=tiny.model,
                objective=grpo.clipped(),
                optimizer=optimizer,
                beta=0.01,
                entropy=0.08,
                micro_batch=GROUP,
            )
        return state, metrics

    single, double = both(step)
    assert types(double) == types(single)
    assert types(double[0].offsets) == types(tiny.zero)
    for x, y in zip(jax.tree.leaves(double), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "space"),
    [
        (CEM(population_size=4, elite_ratio=0.5), "full"),
        (GradientAscent(), "experts"),
        (GradientAscent(), "principal"),
    ],
)
def test_searches_are_the_same(tiny, method, space):
    tokens = jax.device_get(jax.random.randint(jax.random.key(3), (2, 8), 0, 61))

    def search():
        start = tiny.zero
        experts = [offsets(tiny, seed) for seed in (1, 2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *experts)
        made = {
            "full": lambda: spaces.full_space(start),
            "experts": lambda: spaces.expert_space(start, experts, per_site=True),
            "principal": lambda: spaces.principal_space(start, stacked, 1),
        }[space]()
        on = jnp.ones(tokens.shape, bool)
        texts = fitness.Texts(jnp.asarray(tokens), on, on)
        likelihood = fitness.Likelihood(tiny.factored, tiny.model)
        found = loop.cross_fit(
            method,
            likelihood,
            made,
            texts,
            jax.random.key(0),
            halves=(texts, texts),
            generations=2,
        )
        return found.final, found.history

    single, double = both(search)
    assert types(double) == types(single)
    if isinstance(method, GradientAscent):  # CEM's normal numbers are others of 64 bits
        for x, y in zip(jax.tree.leaves(double), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-4)
    else:
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(double))
