"""Layer by layer, the networks compute what transformers' do.

Replays numbers that tests/parity/record.py recorded; tests/parity/test_live.py compares live.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.models import gpt2, hub, likelihood, llama
from tests.parity import stories, weights

REFERENCE = Path(__file__).parent / "parity" / "reference"
TOLERANCE = 2e-4


def run(config: Any, params: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every block's output ``blocks [L, T, D]``, ``hidden [T, D]`` and ``logits [T, V]``."""
    length = len(tokens)
    if isinstance(config, gpt2.Config):
        network, module, prefix = gpt2.GPT2(config), gpt2, "h"
    else:
        network, module, prefix = llama.Llama(config), llama, "layers"
    (hidden, _), state = network.apply(
        {"params": params},
        tokens,
        jnp.arange(length),
        jnp.tril(jnp.ones((length, length), bool)),
        {},
        None,
        None,
        None,
        capture_intermediates=lambda part, _: isinstance(part, module.Block),
    )
    parts = [state["intermediates"][f"{prefix}_{i}"] for i in range(config.num_layers)]
    outputs = [part["__call__"][0] for part in parts]
    logits = module.build(config).logits(params, hidden)
    return jax.device_get(
        {"blocks": jnp.stack([x for x, *_ in outputs]), "hidden": hidden, "logits": logits}
    )


def compare(found: dict[str, np.ndarray], reference: Any) -> None:
    def close(name: str, x: np.ndarray) -> None:
        np.testing.assert_allclose(x, reference[name], rtol=0, atol=TOLERANCE, err_msg=name)

    at_hidden, at_logits = reference["at_hidden"], reference["at_logits"]
    close("blocks", found["blocks"][..., at_hidden])
    close("block_norms", np.linalg.norm(found["blocks"].astype(np.float64), axis=-1))
    close("hidden", found["hidden"][..., at_hidden])
    close("logits", found["logits"][..., at_logits])
    close("logsumexp", np.logaddexp.reduce(found["logits"].astype(np.float64), axis=-1))
    np.testing.assert_array_equal(found["logits"].argmax(-1), reference["best"])


@pytest.mark.parametrize("case", [*weights.SHAPES, *weights.LLAMAS])
def test_layers_and_logits_equal_transformers(case):
    reference = np.load(REFERENCE / f"{case}.npz")
    fields = {**weights.SHAPES, **weights.LLAMAS}[case]
    state = weights.state(fields)
    assert weights.digest(state) == reference["digest"], (
        "numpy draws other numbers than when the reference was recorded; "
        "run python -m tests.parity.record"
    )
    architecture = hub.ARCHITECTURES[fields["model_type"]]
    config = architecture.config_from_hf(fields, case)
    params = architecture.params_from_state(state, config, case)
    compare(run(config, params, reference["tokens"]), reference)


def test_the_builtin_model_equals_transformers():
    again = "run python -m tests.parity.record builtin"
    path = REFERENCE / "builtin.npz"
    assert path.is_file(), again
    reference = np.load(path)
    pretrained = hub.load_model("builtin")
    state = gpt2.params_to_state(pretrained.params, pretrained.config)
    assert weights.digest(state) == reference["digest"], f"the model is another; {again}"
    tokens = pretrained.tokenizer.encode(str(reference["text"]))
    np.testing.assert_array_equal(tokens, reference["tokens"])
    compare(run(pretrained.config, pretrained.params, reference["tokens"]), reference)


def story_losses(pretrained: hub.Pretrained, texts: list[list[int]]) -> np.ndarray:
    """Cross-entropy of each text of up to 200 tokens, summed over them but the first, nats."""
    model = pretrained.build()
    tokens, mask = np.zeros((len(texts), 200), np.int32), np.zeros((len(texts), 200), bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, True

    @jax.jit
    @jax.vmap
    def loss(tokens, mask):
        hidden = model.forward(pretrained.params, {}, tokens[:-1], mask[:-1])
        logps, _ = likelihood.token_logps(model, pretrained.params, hidden, tokens[1:], 1.0)
        return -jnp.sum(jnp.where(mask[1:], logps, 0.0))

    return np.asarray(loss(tokens, mask))


def test_a_real_model_equals_transformers_and_is_as_good_on_its_stories(shared):
    reference = np.load(REFERENCE / "stories.npz")
    pretrained = hub.load_model(str(shared / stories.MODEL))
    texts = stories.tokens(shared)
    tokenizer = pretrained.tokenizer
    assert [tokenizer.encode(text)[:200] for text in stories.texts(shared)] == texts
    compare(run(pretrained.config, pretrained.params, reference["tokens"]), reference)
    counts = np.array([len(text) - 1 for text in texts])
    found = story_losses(pretrained, texts)
    np.testing.assert_allclose(found / counts, reference["losses"] / counts, rtol=0, atol=1e-3)
