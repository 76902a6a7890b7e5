"""Small base models as folders, and runs on them with adapters that nobody trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, pre_tokenizers, processors

from grpocem_jax.config.files import load_config
from grpocem_jax.config import parse_config
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.runs import checkpoints
from tests.parity import weights

GAIN = {"before": 0.125, "after": 0.375, "gain": 0.25, "gain_ci95": [0.125, 0.5], "n": 7}
SUMMARY = {
    "heldout": {"qa": GAIN},
    "heldout_greedy": {"qa": GAIN},
    "steps": 11,
    "trainable_parameters": 64,
    "model": "small",
    "builtin_model": False,
    "random_weights": False,
    "builtin_data": {},
}
GENERATION = {
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": [1, 2],
    "pad_token_id": 3,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"


class Base(NamedTuple):
    """A base model: fields of its config.json, the adapted sites, and the dtype of its weights."""

    fields: Mapping[str, Any]
    sites: tuple[str, ...]
    dtype: str = "float32"


BASES = {
    "gpt2": Base(weights.SHAPES["small"], ("attn.c_attn", "attn.c_proj")),
    "gpt2-half": Base(weights.SHAPES["small"], ("h.1.attn.c_proj",), "float16"),
    "llama": Base(weights.LLAMAS["llama"], ("self_attn.o_proj",), "bfloat16"),
    "llama-biases": Base(weights.LLAMAS["llama-biases"], ("self_attn.k_proj", "mlp.down_proj")),
    "qwen2": Base(weights.LLAMAS["qwen2"], ("self_attn.o_proj",), "bfloat16"),
    "qwen3": Base(weights.LLAMAS["qwen3"], ("self_attn.o_proj",), "bfloat16"),
    "qwen2-untied": Base(weights.LLAMAS["qwen2-untied"], ("mlp.up_proj",)),
    "mistral": Base(weights.LLAMAS["mistral"], ("self_attn.q_proj",), "float16"),
}


def make_tokenizer(size: int) -> tokenizers.Tokenizer:
    """A word for each id, a start token before every text, and special tokens that are no words."""
    special = ["<s>", "</s>", "<end>", "<pad>", "<turn>"]
    vocabulary = {name: i for i, name in enumerate(special)}
    vocabulary |= {f"w{i}": i for i in range(len(special), size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w5"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return words


def write_base(folder: Path, base: Base, **files: Mapping[str, Any] | None) -> Path:
    """Writes the folder of a base model.

    Args:
      folder: made if it is not there.
      base: what it holds.
      files: other fields for ``config``, ``generation_config`` and ``tokenizer_config``; a file
        that is None is left out, and a field that is None as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 3}
    written: dict[str, Mapping[str, Any]] = {
        "config": {**base.fields, **ends, "dtype": base.dtype, "initializer_range": 0.03},
        "generation_config": GENERATION,
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<turn>"],
            "chat_template": TEMPLATE,
        },
    }
    for name, fields in written.items():
        changes = files.get(name, {})
        if changes is not None:
            fields = {key: x for key, x in {**fields, **changes}.items() if x is not None}
            (folder / f"{name}.json").write_text(json.dumps(fields))
    make_tokenizer(base.fields["vocab_size"]).save(str(folder / "tokenizer.json"))
    state = {
        name: x.astype(jnp.dtype(base.dtype)) for name, x in weights.state(base.fields).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_run(
    folder: Path, source: Path | str, sites: tuple[str, ...], *, scale: float = 0.3, **changes: Any
) -> Path:
    """Writes a run directory: normal offsets of a standard deviation, a summary nobody measured."""
    settings = load_config("llama")
    settings.model.source = str(source)
    settings.adapter.sites = sites
    settings.update_from_flattened_dict(changes)
    config = parse_config(settings)
    policy = load_policy(config)
    keys = jax.random.split(jax.random.key(1), len(policy.zero))
    offsets = {
        name: scale * jax.random.normal(key, zero.shape)
        for key, (name, zero) in zip(keys, policy.zero.items(), strict=True)
    }
    checkpoints.save_adapter(
        folder / "adapter", offsets, policy.adapter_config(config.adapter), "An adapter for tests."
    )
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder
