"""Records what PyTorch and transformers compute, for tests/test_parity.py to replay without them.

    python -m tests.parity.record            # every case
    python -m tests.parity.record builtin    # after the built-in model was pretrained again
    python -m tests.parity.record stories    # the real model, from the shared folder

Run from the root of the repository, in an environment with torch and transformers.  Hidden states
and logits are stored at some coordinates, with norms over all of them, so that a file is small.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.parity import stories, weights

REFERENCE = Path(__file__).parent / "reference"
BUILTIN = Path(__file__).parents[2] / "grpocem_jax" / "builtin" / "model"
SHARED = Path(__file__).parents[3] / "shared"
TEXT = "A short text with a name, Anna, and a number, 42. Question: what is the number? Answer:"


def build(fields: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Any:
    """transformers' model with the given weights, in float32 and without dropout."""
    config = AutoConfig.for_model(**fields, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
    report = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if report.missing_keys != tied or report.unexpected_keys:
        raise ValueError(f"the weights do not fit: {report}")
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def outputs(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every block's output ``blocks [L, T, D]``, ``hidden [T, D]`` and ``logits [T, V]``."""
    blocks: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        blocks.append(output[0][0] if isinstance(output, tuple) else output[0])

    base = model.base_model
    layers = base.h if model.config.model_type == "gpt2" else base.layers
    hooks = [block.register_forward_hook(keep) for block in layers]
    out = model(torch.from_numpy(tokens)[None].long(), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return {
        "blocks": torch.stack(blocks).numpy(),
        "hidden": out.hidden_states[-1][0].numpy(),
        "logits": out.logits[0].numpy(),
    }


@torch.no_grad()
def losses(model: Any, texts: list[list[int]]) -> np.ndarray:
    """Cross-entropy of each text, summed over its tokens but the first, in nats ``[n]``."""
    rows = [torch.tensor(text)[None] for text in texts]
    means = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    return torch.stack(means).numpy()


def some(size: int, count: int) -> np.ndarray:
    """The first eight coordinates and ``count`` others, ascending."""
    rng = np.random.default_rng(size)
    first = min(8, size)
    others = first + rng.choice(size - first, min(count, size - first), replace=False)
    return np.concatenate([np.arange(first), np.sort(others)])


def load(folder: Path) -> Any:
    """transformers' model of a folder, float32, with the attention that is written out."""
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def record(case: str) -> None:
    """Writes ``reference/CASE.npz``."""
    more = {}
    if case == "builtin":
        state = load_file(BUILTIN / "model.safetensors")
        tokens = np.array(AutoTokenizer.from_pretrained(BUILTIN)(TEXT)["input_ids"], np.int32)
        model = load(BUILTIN)
    elif case == "stories":
        folder = SHARED / stories.MODEL
        state, model = load_file(folder / "model.safetensors"), load(folder)
        texts = stories.tokens(SHARED)
        tokens = np.array(texts[0][:24], np.int32)
        more = {"losses": losses(model, texts)}
    else:
        fields = {**weights.SHAPES, **weights.LLAMAS}[case]
        state = weights.state(fields)
        tokens = weights.tokens(fields, 12)
        model = build(fields, state)
    full = outputs(model, tokens)
    at_hidden, at_logits = some(full["hidden"].shape[-1], 24), some(full["logits"].shape[-1], 248)
    path = REFERENCE / f"{case}.npz"
    np.savez_compressed(
        path,
        digest=weights.digest(state),
        text=TEXT if case == "builtin" else "",
        tokens=tokens,
        at_hidden=at_hidden,
        blocks=full["blocks"][..., at_hidden],
        block_norms=np.linalg.norm(full["blocks"].astype(np.float64), axis=-1),
        hidden=full["hidden"][..., at_hidden],
        at_logits=at_logits,
        logits=full["logits"][..., at_logits],
        logsumexp=np.logaddexp.reduce(full["logits"].astype(np.float64), axis=-1),
        best=full["logits"].argmax(-1),
        **more,
    )
    print(
        f"{path.name}: {path.stat().st_size} bytes, {len(tokens)} tokens, largest hidden state "
        f"{np.abs(full['blocks']).max():.1f}, largest logit {np.abs(full['logits']).max():.1f}"
    )


def frequencies() -> dict[str, np.ndarray]:
    """The frequencies of each of `weights.LLAMA3`, as transformers computes them."""
    found = {}
    for name, (head_dim, theta, factor, low, high, context) in weights.LLAMA3.items():
        config = LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            max_position_embeddings=16 * context,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            },
        )
        found[name] = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    return found


if __name__ == "__main__":
    if not sys.argv[1:]:
        np.savez_compressed(REFERENCE / "llama3-frequencies.npz", **frequencies())
    for name in sys.argv[1:] or (*weights.SHAPES, *weights.LLAMAS, "builtin"):
        record(name)
