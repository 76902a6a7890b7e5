"""Initial parameters in which an induction circuit is laid out.

To look up an answer, a transformer attends to where the current token stood before and copies what
followed: a head that looks one token back in one layer, a head that uses it in the next (Olsson et
al. 2022, arXiv 2209.11895).  From random parameters a model this small forms the circuit only after
many times the text that the built-in one is trained on, so both heads are given to it at the start
and trained like everything else.
"""

import jax
import numpy as np

from grpocem_jax.models import gpt2
from grpocem_jax.models.base import Params

TOKEN_SCALE = 3.0
KERNEL_SCALE = 2.5
RESIDUAL_SCALE = 0.1


def init_params(key: jax.Array, config: gpt2.GPT2Config) -> Params:
    """Parameters of a GPT-2 with four heads and two layers or more, float32 on the host.

    The residual stream, of four head sizes, starts in three parts: a quarter for the position, a
    half for the token, a quarter for the previous token.

    - Positions are sines and cosines, so that one rotation of a key stands for one step back.
    - Head 0 of layer 0 attends to the previous token and writes it into the last quarter.
    - Head 0 of layer 1 attends to where the previous token is the current one, and copies.
    - The other heads from layer 1 on copy tokens from wherever they attend to, which is everywhere.
    - Embeddings and kernels are wider than GPT-2's, whose 0.02 suits its larger widths, and what
      the other maps write to the residual stream is small, so that they do not drown the circuit.
    """
    size = config.width // config.num_heads
    position, token, previous = slice(0, size), slice(size, 3 * size), slice(3 * size, None)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    params = jax.tree.map(np.array, jax.device_get(gpt2.init_params(key, config)))

    params["wte"] *= TOKEN_SCALE
    params["wte"][:, position] = params["wte"][:, previous] = 0.0
    # Multiples of the golden section modulo 1 are spread evenly and share no period.
    frequencies = np.pi * (np.arange(1, size // 2 + 1) * 0.618034 % 1.0)
    angles = np.arange(config.context_length)[:, None] * frequencies
    params["wpe"][:] = 0.0
    params["wpe"][:, position] = 0.1 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    cos, sin = np.diag(np.cos(frequencies)), np.diag(np.sin(frequencies))
    step = np.block([[cos, -sin], [sin, cos]])

    def read(part: slice, matrix: np.ndarray) -> np.ndarray:
        kernel = np.zeros((config.width, size))
        kernel[part] = matrix
        return kernel

    def subspace() -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((2 * size, size)))[0]

    def set_head(layer: int, head: int, query=None, key=None, value=None, output=None) -> None:
        block, own = params[f"h_{layer}"], slice(head * size, (head + 1) * size)
        parts = np.split(block["attn_c_attn"]["kernel"], 3, axis=1)
        for part, kernel in zip(parts, (query, key, value), strict=True):
            if kernel is not None:
                part[:, own] = kernel
        block["attn_c_proj"]["kernel"][own] = output

    for layer in range(config.num_layers):
        block = params[f"h_{layer}"]
        for name in ("attn_c_attn", "attn_c_proj", "mlp_c_fc", "mlp_c_proj"):
            block[name]["kernel"] *= KERNEL_SCALE
            if name.endswith("c_proj"):
                block[name]["kernel"] *= RESIDUAL_SCALE
    seen, eye = subspace(), np.eye(size)
    set_head(
        0,
        0,
        query=read(position, 1.2 * eye),
        key=read(position, 1.2 * step),
        value=read(token, seen),
        output=0.07 * read(previous, eye).T,
    )
    for layer in range(1, config.num_layers):
        for head in range(config.num_heads):
            copied = subspace()
            strength = 0.15 if (layer, head) == (1, 0) else 0.05
            copy = {"value": read(token, copied), "output": strength * read(token, copied).T}
            if (layer, head) == (1, 0):
                copy |= {"query": read(token, 1.5 * seen), "key": read(previous, 1.5 * eye)}
            set_head(layer, head, **copy)
    return params
