"""GGUF files of the small random models, with the layout that llama.cpp's conversion gives them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

from tests.parity import weights

BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
WHOLE = {
    **{"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"},
    **{"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"},
}
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,", "Ġ"]
MERGES = ["t h", "th e", "Ġ a"]
TOKENS = ["<|end|>", *LETTERS, "th", "the", "Ġa", "<think>"]


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Queries or keys as llama.cpp's Llama has them: halves of a head interleaved."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def tensors(fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The random weights of a small model by the names of GGUF."""
    kind, found = fields["model_type"], {}
    for full, array in weights.state(fields).items():
        name = full.removeprefix("transformer.").removeprefix("model.")
        inner = re.fullmatch(r"(?:h|layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        if inner:
            target = f"blk.{inner[1]}.{BLOCK[inner[2]]}.{inner[3]}"
        else:
            stem, part = name.rsplit(".", 1)
            target = f"{WHOLE[stem]}.{part}"
        if re.search(r"\.(c_attn|c_proj|c_fc)\.weight", name):
            array = array.T
        if kind == "llama" and (side := re.search(r"\.([qk])_proj\.", name)):
            heads = "num_attention_heads" if side[1] == "q" else "num_key_value_heads"
            array = permuted(array, fields[heads])
        found[target] = np.ascontiguousarray(array, np.float32)
    return found


def write(
    path: Path,
    fields: Mapping[str, Any],
    *,
    quantised: GGMLQuantizationType | None = None,
    pre: str = "gpt-2",
    tokenizer: str = "gpt2",
    leave_out: str = "",
    **metadata: Any,
) -> Path:
    """Writes a small model.

    Args:
      path: of the file.
      fields: of its config.json.
      quantised: the type of its matrices.
      pre: ``tokenizer.ggml.pre``.
      tokenizer: ``tokenizer.ggml.model``.
      leave_out: a piece of metadata that is not written.
      metadata: further strings by their keys, with ``__`` for dots.
    """
    kind = metadata.pop("architecture", fields["model_type"])
    file = GGUFWriter(path, kind)
    gpt2 = fields["model_type"] == "gpt2"
    width = fields["n_embd" if gpt2 else "hidden_size"]
    heads = fields["n_head" if gpt2 else "num_attention_heads"]
    numbers = {
        "block_count": fields["n_layer" if gpt2 else "num_hidden_layers"],
        "context_length": fields["n_positions" if gpt2 else "max_position_embeddings"],
        "embedding_length": width,
        "feed_forward_length": 4 * width if gpt2 else fields["intermediate_size"],
        "attention.head_count": heads,
        "vocab_size": fields["vocab_size"],
    }
    if gpt2:
        file.add_layer_norm_eps(fields["layer_norm_epsilon"])
    else:
        numbers["attention.head_count_kv"] = fields["num_key_value_heads"]
        numbers["attention.key_length"] = fields.get("head_dim") or width // heads
        file.add_layer_norm_rms_eps(fields["rms_norm_eps"])
        theta = (fields.get("rope_parameters") or fields)["rope_theta"]
        file.add_rope_freq_base(theta)
    for name, number in numbers.items():
        if name != leave_out:
            file.add_uint32(f"{kind}.{name}", number)
    for name, text in metadata.items():
        file.add_string(name.replace("__", "."), text)
    file.add_tokenizer_model(tokenizer)
    file.add_tokenizer_pre(pre)
    tokens = [*TOKENS, *(f"[unused{i}]" for i in range(fields["vocab_size"] - len(TOKENS)))]
    if leave_out != "tokens":
        file.add_token_list(tokens)
    types = {"<|": TokenType.CONTROL, "[u": TokenType.CONTROL, "<t": TokenType.USER_DEFINED}
    file.add_token_types([types.get(token[:2], TokenType.NORMAL) for token in tokens])
    if leave_out != "merges":
        file.add_token_merges(MERGES)
    file.add_bos_token_id(0)
    file.add_eos_token_id(0)
    for name, array in tensors(fields).items():
        if quantised is not None and array.ndim == 2:
            file.add_tensor(name, quantize(array, quantised), raw_dtype=quantised)
        else:
            file.add_tensor(name, array)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
