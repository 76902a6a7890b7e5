"""The peers of the benchmarks compute what this package does, in every precision."""

import jax
import numpy as np
import pytest

import grpocem_jax as gj
from grpocem_jax.models import hub
from grpocem_jax.search import fitness
from tests.parity import weights

pytest.importorskip("torch", reason="PyTorch is not installed; use make parity")

from benchmarks import peers

pytestmark = pytest.mark.parity

FIELDS = weights.SHAPES["small"]
COUNT, LENGTH = 5, 9
TOLERANCE = {"float32": 1e-4, "tf32": 1e-4, "bfloat16": 0.1, "float16": 0.01}
"""Nats a token, of some 8. On a CPU products of float32 are exact under either name."""


@pytest.mark.parametrize("precision", peers.DTYPES)
def test_pytorch_scores_candidates_as_a_search_does(precision):
    module = hub.ARCHITECTURES[FIELDS["model_type"]]
    config = module.config_from_hf(FIELDS, "peers")
    state = weights.state(FIELDS)
    params = module.params_from_state(state, config, "peers")
    pretrained = hub.Pretrained("peers", "random", module, config, params, None, ())
    attached = gj.attach(pretrained, gj.svf(rank_ratio=0.8), ["attn.c_proj"])
    tokens = weights.tokens(FIELDS, LENGTH)
    rng = np.random.default_rng(0)
    offsets = {
        site: 0.3 * rng.standard_normal((COUNT, *zero.shape)).astype(np.float32)
        for site, zero in attached.zero.items()
    }
    everywhere = np.ones((1, LENGTH), bool)
    texts = fitness.Texts(np.asarray(tokens)[None], everywhere, everywhere)
    score = fitness.Likelihood(attached.params, attached.model)
    expected = jax.vmap(score, in_axes=(0, None, None))(offsets, texts, jax.random.key(0))
    model = peers.load(
        module.params_to_state(params, config), module.config_to_hf(config), precision=precision
    )
    for score_peer in (
        peers.torch_batched(model, tokens, offsets, chunk=2),
        peers.torch_loop(model, tokens, offsets, COUNT),
    ):
        found = score_peer()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[precision])
