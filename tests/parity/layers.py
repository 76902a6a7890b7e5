"""What is compared with other implementations: a network layer by layer, and losses."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.models import gpt2, hub, likelihood, llama

REFERENCE = Path(__file__).parent / "reference"
TOLERANCE = 2e-4


def run(config: Any, params: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every block's output ``blocks [L, T, D]``, ``hidden [T, D]`` and ``logits [T, V]``."""
    length = len(tokens)
    if isinstance(config, gpt2.Config):
        network, module, prefix = gpt2.GPT2(config), gpt2, "h"
    else:
        network, module, prefix = llama.Llama(config), llama, "layers"

    @jax.jit
    def apply(params, tokens):
        return network.apply(
            {"params": params},
            tokens,
            jnp.arange(length),
            jnp.tril(jnp.ones((length, length), bool)),
            {},
            None,
            None,
            None,
            None,
            capture_intermediates=lambda part, _: isinstance(part, module.Block),
        )

    (hidden, _), state = apply(params, tokens)
    parts = [state["intermediates"][f"{prefix}_{i}"] for i in range(config.num_layers)]
    outputs = [part["__call__"][0] for part in parts]
    logits = module.build(config).logits(params, hidden)
    return jax.device_get(
        {"blocks": jnp.stack([x for x, *_ in outputs]), "hidden": hidden, "logits": logits}
    )


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
