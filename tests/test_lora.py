"""LoRA, and what the adapter interface has beyond maps that stand alone: `view`, `draw`, a bias."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.custom_adapter import scale_and_shift
from grpocem_jax import adapters, grpo
from grpocem_jax.utils.errors import InputError
from tests.tiny import SITES

KEY = jax.random.key(0)
TOKENS, MASK = jnp.arange(1, 9), jnp.ones(8, bool)


@pytest.fixture(scope="module")
def tiny(deep):
    return deep


def put(tiny, adapter, sites=("attn.c_proj",)):
    """An adapter on the tiny model."""
    return adapters.attach(tiny.pretrained, adapter, sites)


def moved(zero, scale=0.3):
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(zero)))
    leaves, structure = jax.tree.flatten(zero)
    leaves = [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def logits(model, params, offsets):
    return model.logits(params, model.forward(params, offsets, TOKENS, MASK))


@pytest.mark.slow
def test_lora_begins_at_the_base_model_and_so_do_zeros(tiny):
    model, params, _, sites, zero = put(tiny, adapters.lora(rank=3), SITES)
    assert jax.tree.map(jnp.shape, zero["h.0.attn.c_proj"]) == {"a": (40, 3), "b": (3, 40)}
    assert len(sites) == 8
    base = logits(tiny.base, tiny.params, {})
    for offsets in (zero, jax.tree.map(jnp.zeros_like, zero)):
        np.testing.assert_allclose(logits(model, params, offsets), base, atol=1e-6)


def test_lora_is_the_product_of_its_factors_times_alpha_over_rank():
    adapter = adapters.lora(rank=2, alpha=6)
    kernel = jnp.eye(3)
    own = {"a": jnp.ones((3, 2)), "b": jnp.full((2, 3), 0.5)}
    # 6 / 2 times the sum over two directions of 1 x 0.5.
    expected = jnp.eye(3) + 3 * 2 * 0.5
    np.testing.assert_allclose(adapter.merge(kernel, own), expected)
    np.testing.assert_allclose(adapter.apply(kernel, own, jnp.eye(3)), expected)


def test_products_of_lora_take_bfloat16_and_accumulate_in_float32():
    adapter = adapters.lora(rank=2)
    kernel = jnp.ones((600, 3), jnp.bfloat16)
    own = {"a": jnp.zeros((600, 2)), "b": jnp.zeros((2, 3))}
    # bfloat16 has 8 bits: it drops the 2**-10 of x, and would make 600 of a sum of 601.
    x = jnp.full((1, 600), 1 + 2**-10).at[0, 0].set(2.0)
    y = adapter.apply(kernel, own, x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 601.0)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2.0}, {"rank": 2, "alpha": 0}])
def test_a_rank_or_alpha_out_of_range_is_named(options):
    name, value = list(options.items())[-1]
    with pytest.raises(InputError, match=f"{name}={value}: must be "):
        adapters.lora(**options)


@pytest.mark.slow
def test_a_bias_that_an_adapter_merges_to_is_added_to_that_of_the_map(tiny):
    model, params, adapter, sites, zero = put(tiny, scale_and_shift())
    offsets = moved(zero)
    merged = adapters.merge_params(adapter, params, offsets, sites)
    bias = merged["h_0"]["attn_c_proj"]["bias"] - tiny.params["h_0"]["attn_c_proj"]["bias"]
    np.testing.assert_allclose(bias, offsets["h.0.attn.c_proj"]["shift"], atol=1e-6)
    found = logits(tiny.base, merged, {})
    np.testing.assert_allclose(found, logits(model, params, offsets), atol=1e-4)
    assert np.abs(found - logits(tiny.base, tiny.params, {})).max() > 0.1


def test_a_bias_where_the_map_has_none_is_refused(tiny):
    _, params, adapter, sites, zero = put(tiny, scale_and_shift())
    del params["h_1"]["attn_c_proj"]["bias"]
    with pytest.raises(InputError, match=r"merges to a bias at h\.1\.attn\.c_proj, and this model"):
        adapters.merge_params(adapter, params, zero, sites)


def shared_scale():
    """A scale for each output, the same in every layer."""
    return adapters.Adapter(
        factor=lambda key, kernel: jnp.asarray(kernel),
        init=lambda key, factors: {"scale": jnp.zeros(next(iter(factors.values())).shape[1])},
        apply=lambda kernel, own, x: (x @ kernel) * (1 + own)[None],
        merge=lambda kernel, own: kernel * (1 + own)[None],
        view=lambda offsets: {f"h.{i}.attn.c_proj": offsets["scale"] for i in range(2)},
    )


@pytest.mark.slow
def test_what_sites_share_is_trained_once_and_reaches_all_of_them(tiny):
    model, params, adapter, sites, zero = put(tiny, shared_scale())
    assert adapters.num_params(zero) == 40
    offsets = moved(zero)
    found = logits(model, params, offsets)
    merged = adapters.merge_params(adapter, params, offsets, sites)
    np.testing.assert_allclose(logits(tiny.base, merged, {}), found, atol=1e-4)
    # As scales of their own with equal values.
    alone = put(tiny, _own())
    each = dict.fromkeys(sites, offsets["scale"])
    np.testing.assert_allclose(logits(alone.model, alone.params, each), found, atol=1e-6)
    gradient = jax.grad(lambda o: logits(model, params, o).sum())(offsets)["scale"]
    by_site = jax.grad(lambda o: logits(alone.model, alone.params, o).sum())(each)
    np.testing.assert_allclose(gradient, sum(by_site.values()), rtol=1e-3, atol=1e-3)


def _own():
    shared = shared_scale()
    return adapters.Adapter(
        shared.factor,
        adapters.each_site(lambda key, kernel: jnp.zeros(kernel.shape[1])),
        shared.apply,
        shared.merge,
    )


@pytest.mark.slow
def test_prompts_are_processed_and_continued_with_what_is_shared(tiny):
    model, params, _, _, zero = put(tiny, shared_scale())
    offsets = moved(zero)
    whole = model.forward(params, offsets, TOKENS, MASK)
    hidden, context = model.prefill(params, offsets, TOKENS[:5], MASK[:5])
    np.testing.assert_allclose(hidden, whole[4], atol=1e-4)
    cache = model.init_cache(params, 3)
    for index in range(3):
        hidden, cache = model.decode_step(
            params, offsets, context, cache, TOKENS[5 + index], jnp.int32(index)
        )
        np.testing.assert_allclose(hidden, whole[5 + index], atol=1e-4)


def test_a_view_that_leaves_a_site_out_is_named(tiny):
    adapter = shared_scale()._replace(view=lambda offsets: {"h.0.attn.c_proj": offsets["scale"]})
    with pytest.raises(adapters.AdapterError, match=r"view has nothing for h\.1\.attn\.c_proj"):
        put(tiny, adapter)


@pytest.mark.slow
def test_an_update_with_a_draw_is_that_of_the_offsets_drawn(tiny):
    def draw(key, offsets):
        noise = {n: jax.random.normal(key, x.shape) for n, x in offsets.items()}
        return {n: 2 * x + 0.1 * noise[n] for n, x in offsets.items()}

    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1, 60, (2, 4, 5)), jnp.int32)
    there = jnp.ones(tokens.shape, bool)
    batch = grpo.Batch(
        tokens[:, 0, :3],
        there[:, 0, :3],
        tokens,
        there,
        jnp.full(tokens.shape, -4.0),
        jnp.asarray(rng.normal(size=tokens.shape), jnp.float32),
        grpo.token_weights(there),
    )
    optimizer = optax.sgd(1.0)
    offsets = tiny.adapted()
    common = {"model": tiny.model, "objective": grpo.clipped(high=1e9, low=0.999), "beta": 0.1}
    state, metrics = grpo.update(
        grpo.init_state(offsets, optimizer), tiny.factored, batch, 1.0,
        optimizer=optimizer, draw=draw, key=KEY, **common,
    )  # fmt: skip

    def loss(offsets):
        return grpo.loss(draw(KEY, offsets), tiny.factored, batch, 1.0, entropy=0.0, **common)[0]

    value, gradient = jax.value_and_grad(loss)(offsets)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for name in offsets:
        np.testing.assert_allclose(
            state.offsets[name], offsets[name] - gradient[name], rtol=1e-4, atol=1e-6
        )
    with pytest.raises(InputError, match="key: is missing"):
        grpo.update(
            grpo.init_state(offsets, optimizer), tiny.factored, batch, 1.0,
            optimizer=optimizer, draw=draw, **common,
        )  # fmt: skip
