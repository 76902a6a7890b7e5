"""GGUF files as checkpoints: weights dequantised, settings and tokenizer from the metadata.

    pip install 'grpocem_jax[gguf]'

The weights keep the names of transformers, and the rest becomes a folder as transformers has them
(config.json, tokenizer.json), so that everything else takes a GGUF file as it takes any checkpoint.
The format, its keys and the names of its tensors are those of llama.cpp.
"""

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpocem_jax.models import gpt2, llama
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import cache_folder, new_folder, write_json

SUFFIX = ".gguf"

CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that are never split, in llama.cpp's numbers; no text is made of the former."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2", "llama-bpe")
"""Values of ``tokenizer.ggml.pre``: how a text is split before its parts are encoded."""

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_WHOLE = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}

_NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class Checkpoint(NamedTuple):
    """A GGUF file as a checkpoint of transformers.

    Attributes:
      folder: with config.json, generation_config.json and the tokenizer's files.
      state: its tensors, float32, by the names that transformers has for them.
    """

    folder: Path
    state: dict[str, np.ndarray]


def read(path: Path) -> Checkpoint:
    """Reads a file.

    Raises:
      InputError: gguf is not installed; a file that is cut off or no GGUF, an architecture, kind of
        number or tokenizer that is not implemented, or metadata that is missing or does not fit.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            f"model.source={str(path)!r}: reading GGUF takes the package gguf, which is not "
            "installed; run pip install 'grpocem_jax[gguf]'."
        ) from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader checks little, and raises what NumPy does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: is not a whole GGUF file that the package gguf can read ({reason}); fetch it "
            "again."
        ) from error
    where = str(path)
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3", "gpt2"):
        raise InputError(
            f"{where}: general.architecture={kind!r} is not implemented; use a file of llama, "
            "qwen2, qwen3 or gpt2."
        )
    config = _config(fields, tensors, where)
    (gpt2 if kind == "gpt2" else llama).config_from_hf(config, where)
    _check_token_ids(fields, where)
    state = _state(config, tensors, where)
    return Checkpoint(_folder(config, fields, where), state)


def _need(fields: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        raise InputError(f"{where}: the metadata has no {name}; use a file made by llama.cpp.")
    return fields[name]


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of config.json."""
    kind = fields["general.architecture"]

    def need(name: str) -> Any:
        return _need(fields, f"{kind}.{name}", where)

    def size(name: str, default: int | None = None) -> int:
        value = need(name) if default is None else fields.get(f"{kind}.{name}", default)
        if type(value) is not int or value < 1:
            raise InputError(
                f"{where}: {kind}.{name}={value!r}: must be a positive integer; use a file made by "
                "llama.cpp."
            )
        return value

    tokens = _need(fields, "tokenizer.ggml.tokens", where)
    common = {"model_type": kind, "vocab_size": fields.get(f"{kind}.vocab_size", len(tokens))}
    if kind == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": size("block_count"),
            "n_embd": size("embedding_length"),
            "n_inner": size("feed_forward_length"),
            "n_head": size("attention.head_count"),
            "n_positions": size("context_length"),
            "layer_norm_epsilon": need("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        how = "in rope_freqs.weight" if scaling == "none" else repr(scaling)
        raise InputError(
            f"{where}: scaled rotary positions ({how}) are not implemented for GGUF; use the "
            "checkpoint that the file was made from."
        )
    width, heads = size("embedding_length"), size("attention.head_count")
    kv_heads = size("attention.head_count_kv", heads)
    head_dim = size("attention.key_length", max(width // heads, 1))
    for name, tensor in tensors.items():
        part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
        if part is None:
            continue
        key, count = ("head_count", heads) if part[1] == "q" else ("head_count_kv", kv_heads)
        rows = int(tensor.shape[-1])
        if rows != count * head_dim:
            raise InputError(
                f"{where}: {kind}.attention.{key}={count} heads of {head_dim} numbers do not make "
                f"the {rows} rows of the tensor {name}; use a file made by llama.cpp."
            )
    turned = fields.get(f"{kind}.rope.dimension_count", head_dim)
    if turned != head_dim:
        raise InputError(
            f"{where}: {kind}.rope.dimension_count={turned} turns a part of each head of "
            f"{head_dim} only, which is not implemented; use another model."
        )
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    return common | {
        "architectures": [f"{name}ForCausalLM"],
        "num_hidden_layers": size("block_count"),
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.get(f"{kind}.rope.freq_base", 10_000.0),
        "hidden_act": "silu",
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _state(
    config: Mapping[str, Any], tensors: Mapping[str, Any], where: str
) -> dict[str, np.ndarray]:
    """The tensors by transformers' names, dequantised and in its layout."""
    from gguf import quants

    kind = config["model_type"]
    block, whole = (_GPT2_BLOCK, _GPT2_WHOLE) if kind == "gpt2" else (_BLOCK, _WHOLE)
    prefix = "h" if kind == "gpt2" else "model.layers"
    state = {}
    for name, tensor in tensors.items():
        if kind == "gpt2" and name == "output.weight":
            continue  # GPT-2's head is its embedding, which llama.cpp writes twice
        inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        outer = re.fullmatch(r"(\w+)\.(weight|bias)", name)
        if inner and inner[2] in block:
            target = f"{prefix}.{inner[1]}.{block[inner[2]]}.{inner[3]}"
        elif outer and outer[1] in whole:
            target = f"{whole[outer[1]]}.{outer[2]}"
        else:
            raise InputError(
                f"{where}: the tensor {name} has no place in {kind}, as llama.cpp writes it; use "
                "another file."
            )
        try:
            array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except Exception as error:
            raise InputError(
                f"{where}: the tensor {name} holds {tensor.tensor_type.name} numbers, which the "
                f"package gguf does not dequantise ({error}); use a file of another quantisation."
            ) from error
        state[target] = _as_transformers(array, target, config)
    return state


def _as_transformers(array: np.ndarray, name: str, config: Mapping[str, Any]) -> np.ndarray:
    """Undoes what llama.cpp's conversion does to the layout of a tensor."""
    if config["model_type"] == "gpt2":
        linear = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
        return np.ascontiguousarray(array.T) if linear else array
    turned = re.search(r"self_attn\.([qk])_proj\.", name)
    if config["model_type"] != "llama" or not turned:
        return array
    # Its Llama turns neighbouring entries of a head, transformers' those half a head apart.
    heads = config["num_attention_heads" if turned[1] == "q" else "num_key_value_heads"]
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def _check_token_ids(fields: Mapping[str, Any], where: str) -> None:
    """Refuses a start, end or padding token that is none of the tokens."""
    count = len(fields["tokenizer.ggml.tokens"])
    for key in _NAMED_TOKENS.values():
        value = fields.get(key, 0)
        if type(value) is not int or not 0 <= value < count:
            raise InputError(
                f"{where}: {key}={value!r}: must be a token, an integer from 0 to {count - 1}; use "
                "a file made by llama.cpp."
            )


def _folder(config: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> Path:
    """A folder with config and tokenizer, kept in the cache by what is in it."""
    tokenizer = _tokenizer(fields, where)
    names = {
        field: fields["tokenizer.ggml.tokens"][fields[key]]
        for field, key in _NAMED_TOKENS.items()
        if key in fields
    }
    settings = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    ends = {"eos_token_id": fields.get("tokenizer.ggml.eos_token_id")}
    files = {
        "config.json": dict(config) | ends,
        "generation_config.json": ends,
        "tokenizer.json": json.loads(tokenizer),
        "tokenizer_config.json": settings,
    }
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_folder()
    folder = (root or _temporary()) / "gguf" / digest
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new_folder(folder) as made:
                for name, content in files.items():
                    write_json(made / name, content)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process made the same one meanwhile.
    return folder


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="grpocem_jax-"))


def _tokenizer(fields: Mapping[str, Any], where: str) -> str:
    """The contents of tokenizer.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre

    kind = _need(fields, "tokenizer.ggml.model", where)
    if kind != "gpt2":
        raise InputError(
            f"{where}: tokenizer.ggml.model={kind!r} is not implemented, only 'gpt2' (byte-level "
            "BPE); use the checkpoint that the file was made from."
        )
    how = fields.get("tokenizer.ggml.pre", "gpt-2")
    splits: dict[str, Callable[[], list[Any]]] = {
        "gpt-2": lambda: [pre.ByteLevel(add_prefix_space=False)],
        "smollm": lambda: [
            pre.Digits(individual_digits=True),
            pre.ByteLevel(add_prefix_space=False),
        ],
        "qwen2": lambda: _split_by(pre, Regex(_QWEN2)),
        "llama-bpe": lambda: _split_by(pre, Regex(_LLAMA3)),
    }
    if how not in splits:
        raise InputError(
            f"{where}: tokenizer.ggml.pre={how!r} is not implemented; use a file with one of "
            f"{', '.join(PRE_TOKENIZERS)}."
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = _need(fields, "tokenizer.ggml.merges", where)
    made = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=how == "llama-bpe",
        )
    )
    if how == "qwen2":
        made.normalizer = normalizers.NFC()
    parts = splits[how]()
    made.pre_tokenizer = parts[0] if len(parts) == 1 else pre.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    made.add_tokens(
        [
            AddedToken(token, normalized=False, special=type_ == CONTROL)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (CONTROL, USER_DEFINED)
        ]
    )
    if fields.get("tokenizer.ggml.add_bos_token") or (
        how == "llama-bpe" and "tokenizer.ggml.add_bos_token" not in fields
    ):
        start = _need(fields, "tokenizer.ggml.bos_token_id", where)
        made.post_processor = processors.TemplateProcessing(
            single=f"{tokens[start]} $A",
            pair=f"{tokens[start]} $A $B",
            special_tokens=[(tokens[start], start)],
        )
    return made.to_str()


def _split_by(pre: Any, pattern: Any) -> list[Any]:
    return [
        pre.Split(pattern, behavior="isolated", invert=False),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
