"""Weights of small models that two environments make alike; imports nothing but numpy."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_positions": 24,
        "n_embd": 40,
        "n_layer": 2,
        "n_head": 5,
        "layer_norm_epsilon": 1e-3,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "layer_norm_epsilon": 1e-5,
    },
}
"""Fields of a GPT-2's ``config.json`` by the name of the case."""

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}

LLAMAS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "llama-tied": _LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama-biases": _LLAMA
    | {
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": _LLAMA
    | {
        "model_type": "qwen2",
        "hidden_size": 42,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 8,
    },
    "qwen2-untied": _LLAMA
    | {
        "model_type": "qwen2",
        "hidden_size": 30,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0},
    },
    "llama-scaled": _LLAMA
    | {
        "num_key_value_heads": 1,
        "head_dim": 16,
        # Wavelengths are 6.3 * 100^(i / 8): some below 4, some above 16, and some between.
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 6.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": _LLAMA
    | {
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen3-biases": _LLAMA
    | {
        "model_type": "qwen3",
        "hidden_size": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "mistral-window": _LLAMA
    | {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 12},
    "mistral": _LLAMA
    | {
        "model_type": "mistral",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 12,
        "sliding_window": None,
    },
}
"""The same of Llama and what is built like it: odd numbers of heads, groups of 1, some and all."""

LLAMA3: Mapping[str, tuple[int, float, float, float, float, int]] = {
    "llama-3.1-8b": (128, 5e5, 8.0, 1.0, 4.0, 8192),
    "llama-3.2-1b": (64, 5e5, 32.0, 1.0, 4.0, 8192),
    "other": (20, 1e4, 3.0, 0.5, 3.5, 300),
}
"""Size of a head, rope_theta, factor, low_freq_factor, high_freq_factor and the context before."""


def state(fields: Mapping[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors float32 under the names of a Hugging Face checkpoint, without a tied head.

    Drawn by name, so their order does not matter. The scales give attention that prefers some
    tokens and hidden states that grow over the layers, as trained weights do: at width 768 the
    matrices have standard deviation 0.04 and the embeddings 0.1; no bias is zero, no norm 1.
    """
    gpt2 = fields["model_type"] == "gpt2"
    shapes = _gpt2(fields) if gpt2 else _llama(fields)
    d = int(fields["n_embd" if gpt2 else "hidden_size"])

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng((seed, zlib.crc32(name.removeprefix("transformer.").encode())))
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 2:
            embedding = name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight"))
            return values * np.float32((0.1 if embedding else 0.04) * (768 / d) ** 0.5)
        norm = name.endswith("weight")
        return np.float32(norm) + np.float32(0.1) * values

    return {name: draw(name, shape) for name, shape in shapes.items()}


def _gpt2(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
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
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def _llama(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    d, inner = fields["hidden_size"], fields["intermediate_size"]
    size = fields.get("head_dim", d // fields["num_attention_heads"])
    queries, keys = (size * fields[f"num_{x}_heads"] for x in ("attention", "key_value"))
    qwen2 = fields["model_type"] == "qwen2"
    attention, mlp = fields.get("attention_bias", False), fields.get("mlp_bias", False)
    linears = {
        "self_attn.q_proj": (queries, d, attention or qwen2),
        "self_attn.k_proj": (keys, d, attention or qwen2),
        "self_attn.v_proj": (keys, d, attention or qwen2),
        "self_attn.o_proj": (d, queries, attention),
        "mlp.gate_proj": (inner, d, mlp),
        "mlp.up_proj": (inner, d, mlp),
        "mlp.down_proj": (d, inner, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (fields["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], d)
    for i in range(fields["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (d,)
        for name in ("q_norm", "k_norm") if fields["model_type"] == "qwen3" else ():
            shapes[f"model.layers.{i}.self_attn.{name}.weight"] = (size,)
        for name, (size_out, size_in, bias) in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (size_out, size_in)
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = (size_out,)
    return shapes


def tokens(fields: Mapping[str, Any], length: int, *, seed: int = 0) -> np.ndarray:
    """Token ids int32 ``[length]``."""
    rng = np.random.default_rng((seed, length))
    return rng.integers(0, int(fields["vocab_size"]), length, dtype=np.int32)


def digest(tensors: Mapping[str, np.ndarray]) -> int:
    """A checksum of all tensors, names and values."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode() + np.ascontiguousarray(tensors[name]).tobytes(), value)
    return value
