"""Layer by layer, the network computes what transformers' GPT2LMHeadModel does.

Replays numbers that tests/parity/record.py recorded; tests/parity/test_live.py compares live.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.models import gpt2, hub
from tests.parity import weights

REFERENCE = Path(__file__).parent / "parity" / "reference"
TOLERANCE = 2e-4


def run(config: gpt2.GPT2Config, params: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every block's output ``blocks [L, T, D]``, ``hidden [T, D]`` and ``logits [T, V]``."""
    length = len(tokens)
    (hidden, _), state = gpt2.GPT2(config).apply(
        {"params": params},
        tokens,
        jnp.arange(length),
        jnp.tril(jnp.ones((length, length), bool)),
        {},
        None,
        None,
        None,
        capture_intermediates=lambda module, _: isinstance(module, gpt2.Block),
    )
    outputs = [state["intermediates"][f"h_{i}"]["__call__"][0] for i in range(config.num_layers)]
    logits = gpt2.build(config).logits(params, hidden)
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


@pytest.mark.parametrize("case", weights.SHAPES)
def test_layers_and_logits_equal_transformers(case):
    reference = np.load(REFERENCE / f"{case}.npz")
    fields = weights.SHAPES[case]
    state = weights.state(fields)
    assert weights.digest(state) == reference["digest"], (
        "numpy draws other numbers than when the reference was recorded; "
        "run python -m tests.parity.record"
    )
    config = gpt2.config_from_hf(fields, case)
    params = gpt2.params_from_state(state, config, case)
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
