"""GPT-2: its norms, its initial parameters, its sites, and what its backward pass keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.models import base, gpt2
from tests.parity import weights
from tests.tiny import SITES

TEXT = weights.tokens(weights.SHAPES["small"], 19)


def test_norms_survive_a_large_common_offset_of_the_hidden_state(tiny):
    """A norm removes it; E[x^2] - E[x]^2 would lose all but two digits of the variance."""
    forward = jax.jit(lambda params: tiny.base.forward(params, {}, TEXT, np.ones(19, bool)))
    shifted = tiny.params | {"wpe": tiny.params["wpe"] + 300.0}
    np.testing.assert_allclose(forward(shifted), forward(tiny.params), rtol=0, atol=2e-3)


def test_initial_parameters_have_the_published_statistics():
    config = gpt2.GPT2Config(
        vocab_size=500, context_length=100, width=64, num_layers=2, num_heads=2
    )
    init = jax.jit(functools.partial(gpt2.init_params, config=config))
    params = init(jax.random.key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert x.dtype == jnp.float32
        if x.ndim == 1:
            np.testing.assert_array_equal(x, 1.0 if "scale" in name else 0.0, err_msg=name)
        else:
            # 0.02 / sqrt(2 * 2) = 0.01 for what is added to the residual stream.
            std = 0.01 if "c_proj" in name else 0.02
            assert np.std(x) == pytest.approx(std, rel=0.05), name
            assert abs(np.mean(x)) < 4 * std / x.size**0.5, name
    np.testing.assert_array_equal(init(jax.random.key(0))["wte"], params["wte"])
    assert np.abs(init(jax.random.key(1))["wte"] - params["wte"]).max() > 0.01


def test_sites_have_the_names_of_the_checkpoint(deep):
    assert list(deep.base.sites) == [f"h.{i}.{site}" for i in range(2) for site in SITES]
    assert deep.base.sites["h.1.mlp.c_fc"] == ("h_1", "mlp_c_fc", "kernel")


def test_the_backward_pass_keeps_the_large_products_and_no_attention_weights(tiny):
    """What `remat` keeps of a block: its input, and what is marked."""
    block = gpt2.Block(tiny.config, tiny.adapter.apply, jnp.float32)
    length, width = len(TEXT), tiny.config.width
    x = jnp.ones((length, width))
    allowed = jnp.ones((length, length), bool)

    @base.remat
    def run(params, x, allowed):
        return block.apply({"params": params}, x, {}, allowed, None, None, None, None)[0]

    _, backward = jax.vjp(lambda x: run(tiny.params["h_0"], x, allowed), x)
    weights = {x.shape for x in jax.tree.leaves(tiny.params["h_0"])}
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape not in weights]
    products = [(length, 3 * width), (length, width), (length, 4 * width)]
    assert sorted(shapes) == sorted([x.shape, allowed.shape, *products])
