"""Layer by layer, the networks compute what transformers' do.

Replays numbers that tests/parity/record.py recorded; tests/parity/test_live.py compares live.
"""

from typing import Any

import numpy as np
import pytest

from grpocem_jax.models import gpt2, hub
from tests.parity import stories, weights
from tests.parity.layers import REFERENCE, TOLERANCE, run, story_losses


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
