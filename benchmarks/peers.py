"""What one would run instead of this package: PyTorch and transformers, for `--peers`.

The same model, the same numbers, the same work, in the same precision, on the GPU where there is
one.  What a benchmark times comes back as a function, so that it times the work and not its
preparation.  TRL is in `benchmarks.peers_trl`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
import transformers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtype of the weights, and of all that is computed with them, by the name of a precision."""


class _Site(NamedTuple):
    """A linear map with ``kernel == (u * s) @ vt``; ``offsets [C, k]`` of the leading values.

    ``kernel [in, out]`` is the weight of a ``Conv1D`` and, of a ``Linear``, a view of its own.
    """

    module: Any
    kernel: torch.Tensor
    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    offsets: torch.Tensor


def load(
    state: Mapping[str, np.ndarray], fields: Mapping[str, Any], *, precision: str = "float32"
) -> Any:
    """transformers' model with the given weights, in evaluation mode and without dropout.

    Args:
      state: float32 tensors by the names transformers writes, without a tied head
        (``params_to_state`` of the architecture).
      fields: of a ``config.json`` (``config_to_hf`` of the architecture).
      precision: one of `DTYPES`. Products of float32 are exact from then on, or TF32 with "tf32".

    Returns:
      the model, on `DEVICE`, with PyTorch's fused attention (transformers' default).

    Raises:
      ValueError: the tensors are not those of the model.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    options: dict[str, Any] = {**fields, **no_dropout, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    tensors = {name: torch.tensor(np.asarray(x, np.float32)) for name, x in state.items()}
    report = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if report.missing_keys != tied or report.unexpected_keys:
        raise ValueError(f"the weights do not fit: {report}")
    model.tie_weights()
    return model.eval().to(DEVICE)


def torch_loop(
    model: Any,
    tokens: np.ndarray,
    offsets: Mapping[str, np.ndarray],
    count: int,
) -> Callable[[], np.ndarray]:
    """Scores candidates one after another, each by putting its weights into the model.

    The new weight ``U diag(s (1 + offset)) V^T`` is computed as the old one plus
    ``U_k diag(s_k offset) V_k^T``, straight into the model: no copy, and a fifth less work with
    four fifths of the singular values trainable.

    Args:
      model: from `load`; has its own weights again after each call.
      tokens: integers ``[T]``, the text.
      offsets: float32 ``[C, k]`` of the leading singular values, by site (``h.0.attn.c_proj``).
      count: the candidates to score, at most ``C``.

    Returns:
      a function of nothing that returns float32 ``[count]``: the mean log-likelihood of a token of
      ``tokens[1:]``, in nats.
    """
    inputs, targets = _text(tokens)
    updates = []
    for site in _sites(model, offsets):
        k = site.offsets.shape[1]
        factors = site.u[:, :k].contiguous(), site.s[:k], site.vt[:k]
        updates.append((site.kernel, site.kernel.clone(), *factors, site.offsets))

    @torch.inference_mode()
    def score() -> np.ndarray:
        scores = torch.empty(count, device=DEVICE)
        try:
            for candidate in range(count):
                for weight, original, u, s, vt, changes in updates:
                    torch.addmm(original, u * (s * changes[candidate]), vt, out=weight)
                logits = model(inputs, use_cache=False).logits
                scores[candidate] = -F.cross_entropy(logits[0], targets)
        finally:
            for weight, original, *_ in updates:
                weight.copy_(original)
        return scores.cpu().numpy()

    return score


def torch_batched(
    model: Any,
    tokens: np.ndarray,
    offsets: Mapping[str, np.ndarray],
    *,
    chunk: int | None = None,
) -> Callable[[], np.ndarray]:
    """Scores all candidates as one batch, each site applying the factors of its weight.

    Args:
      model: from `load`; computes what it did before after each call.
      tokens: integers ``[T]``, the text.
      offsets: float32 ``[C, k]`` of the leading singular values, by site (``h.0.attn.c_proj``).
      chunk: candidates in a batch; all of them by default, which holds logits ``[C, T - 1, V]``
        twice.

    Returns:
      a function of nothing that returns float32 ``[C]``: the mean log-likelihood of a token of
      ``tokens[1:]``, in nats.
    """
    inputs, targets = _text(tokens)
    sites = _sites(model, offsets)
    count = len(sites[0].offsets)

    @torch.inference_mode()
    def score() -> np.ndarray:
        scores = []
        for start in range(0, count, chunk or count):
            with _factored(sites, slice(start, start + (chunk or count))) as size:
                logits = model(inputs.expand(size, -1), use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(size), reduction="none")
            scores.append(-losses.view(size, -1).mean(1))
        return torch.cat(scores).float().cpu().numpy()

    return score


def transformers_generate(
    model: Any,
    prompts: np.ndarray,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
) -> Callable[[], np.ndarray]:
    """Samples completions with ``model.generate``; none ends before ``max_new_tokens``.

    Args:
      model: from `load`.
      prompts: integers ``[P, S]``, without padding.
      num_samples: ``G``, completions of each prompt.
      max_new_tokens: ``N``.
      temperature: above 0.
      top_p: nucleus mass in (0, 1].
      repetition_penalty: at least 1, over the prompt and the completion.

    Returns:
      a function of nothing that returns int64 ``[P, G, N]``.
    """
    inputs = torch.tensor(np.asarray(prompts), dtype=torch.long, device=DEVICE)
    mask = torch.ones_like(inputs)

    @torch.inference_mode()
    def generate() -> np.ndarray:
        sequences = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            do_sample=True,
            num_return_sequences=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=0,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        completions = sequences[:, inputs.shape[1] :]
        return completions.view(len(inputs), num_samples, max_new_tokens).cpu().numpy()

    return generate


def _text(tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes in, ``[1, T - 1]``, and what is to be predicted, ``[T - 1]``."""
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long, device=DEVICE)
    return ids[None, :-1], ids[1:]


def _sites(model: Any, offsets: Mapping[str, np.ndarray]) -> list[_Site]:
    sites = []
    for name, rows in offsets.items():
        module = model.base_model.get_submodule(name)
        kernel = module.weight.detach()
        kernel = kernel.T if isinstance(module, torch.nn.Linear) else kernel
        factors = torch.linalg.svd(kernel.double(), full_matrices=False)
        u, s, vt = (x.to(kernel.dtype).contiguous() for x in factors)
        changes = torch.tensor(np.asarray(rows, np.float32), device=DEVICE).to(kernel.dtype)
        sites.append(_Site(module, kernel, u, s, vt, changes))
    return sites


@contextlib.contextmanager
def _factored(sites: list[_Site], candidates: slice) -> Iterator[int]:
    """Within it, row ``i`` of a batch has the ``i``-th candidate's weights; their number."""

    def forward(site: _Site, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        inner = (x @ site.u).mul_(scales)
        rows, bias = inner.flatten(0, 1), site.module.bias
        y = rows @ site.vt if bias is None else torch.addmm(bias, rows, site.vt)
        return y.view(*x.shape[:-1], -1)

    try:
        for site in sites:
            changes = site.offsets[candidates]
            padded = F.pad(changes, (0, len(site.s) - changes.shape[1]))
            scales = (site.s * (1 + padded))[:, None]
            site.module.forward = functools.partial(forward, site, scales)
        yield len(changes)
    finally:
        for site in sites:
            vars(site.module).pop("forward", None)
