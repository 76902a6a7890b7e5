"""PEFT with another LoRA for each row of a batch, which is what one would serve adapters with."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft
import torch

from benchmarks import peers


def with_adapters(model: Any, sites: Sequence[str], *, count: int, rank: int = 1) -> Any:
    """The model with LoRAs named ``"0"``, ``"1"``, ..., all of them without effect.

    Args:
      model: from `peers.load`; its modules are replaced.
      sites: linear maps that they change (``h.0.attn.c_proj``).
      count: how many.
      rank: of each.
    """
    inner = model.base_model
    conv = any(not isinstance(inner.get_submodule(site), torch.nn.Linear) for site in sites)
    config = peft.LoraConfig(r=rank, target_modules=list(sites), fan_in_fan_out=conv)
    adapted = peft.get_peft_model(model, config, adapter_name="0")
    for number in range(1, count):
        adapted.add_adapter(str(number), config)
    return adapted.eval()


def draw(model: Any, scale: float = 0.1) -> None:
    """Gives every LoRA of `with_adapters` an effect of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scale * noise.to(parameter))


def generate(
    model: Any, prompts: np.ndarray, names: Sequence[str], max_new_tokens: int
) -> Callable[[], np.ndarray]:
    """Completes prompts greedily, each with its own adapter; no token ends a completion.

    Args:
      model: from `with_adapters`.
      prompts: integers ``[P, S]``, without padding.
      names: the adapter of each prompt.
      max_new_tokens: ``N``.

    Returns:
      a function of nothing that returns int64 ``[P, N]``.
    """
    inputs = torch.tensor(np.asarray(prompts), dtype=torch.long, device=peers.DEVICE)
    mask = torch.ones_like(inputs)

    @torch.inference_mode()
    def complete() -> np.ndarray:
        sequences = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            adapter_names=list(names),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return sequences[:, inputs.shape[1] :].cpu().numpy()

    return complete


def choose_threads(function: Callable[[], Any]) -> int:
    """Lets PyTorch use one thread or one for each processor, whichever is faster; how many.

    More threads slow a small model down, above all where others use the processors too.
    """
    seconds = {}
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        started = time.perf_counter()
        function()
        seconds[threads] = time.perf_counter() - started
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best
