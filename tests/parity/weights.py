"""Weights of a GPT-2 that two environments make alike; imports nothing but numpy."""

import zlib
from collections.abc import Mapping

import numpy as np

SHAPES: Mapping[str, Mapping[str, float]] = {
    "small": {
        "vocab_size": 61,
        "n_positions": 24,
        "n_embd": 40,
        "n_layer": 2,
        "n_head": 5,
        "layer_norm_epsilon": 1e-3,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "layer_norm_epsilon": 1e-5,
    },
}
"""Fields of ``config.json`` by the name of the case."""


def state(fields: Mapping[str, float], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors float32 under the names of a Hugging Face GPT-2 checkpoint.

    Drawn by name, so their order does not matter. The scales give attention that prefers some
    tokens and hidden states that grow over the layers, as trained weights do: at width 768 the
    matrices have standard deviation 0.04 and the embeddings 0.1; no bias is zero, no norm 1.
    """
    d = int(fields["n_embd"])
    linears = {
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "mlp.c_fc": (d, 4 * d),
        "mlp.c_proj": (4 * d, d),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (int(fields["vocab_size"]), d),
        "wpe.weight": (int(fields["n_positions"]), d),
        "ln_f.weight": (d,),
        "ln_f.bias": (d,),
    }
    for i in range(int(fields["n_layer"])):
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            shapes[f"h.{i}.{name}"] = (d,)
        for name, shape in linears.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[1:]

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 2:
            scale = 0.1 if name in ("wte.weight", "wpe.weight") else 0.04
            return values * np.float32(scale * (768 / d) ** 0.5)
        return np.float32("ln_" in name and "weight" in name) + np.float32(0.1) * values

    return {f"transformer.{name}": draw(name, shape) for name, shape in shapes.items()}


def tokens(fields: Mapping[str, float], length: int, *, seed: int = 0) -> np.ndarray:
    """Token ids int32 ``[length]``."""
    rng = np.random.default_rng((seed, length))
    return rng.integers(0, int(fields["vocab_size"]), length, dtype=np.int32)


def digest(tensors: Mapping[str, np.ndarray]) -> int:
    """A checksum of all tensors, names and values."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode() + np.ascontiguousarray(tensors[name]).tobytes(), value)
    return value
