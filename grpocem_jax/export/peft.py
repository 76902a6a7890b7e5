"""A change of weights as a LoRA (Hu et al. 2021, arXiv 2106.09685) in the files of PEFT.

What an adapter changes of a kernel ``[in, out]`` is factored by its singular value decomposition
into ``A [rank, in]`` and ``B [out, rank]``, so that ``x @ (kernel + A^T B^T)`` is the adapted map.
No other factors of that rank come closer in the Frobenius norm (Eckart and Young 1936).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Sites, get
from grpocem_jax.models.base import Params, dense
from grpocem_jax.models.conversion import Layout
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import read_arrays, write_json, write_safetensors


class LoRA(NamedTuple):
    """The factors of one site, float32: ``a [rank, in]``, ``b [out, rank]``."""

    a: Any
    b: Any


def apply(kernel: jax.Array, lora: LoRA, x: jax.Array) -> jax.Array:
    """``x @ (kernel + a^T b^T)`` as PEFT computes it, float32 ``[..., out]``."""
    return dense(kernel, x) + dense(jnp.transpose(lora.b), dense(jnp.transpose(lora.a), x))


def check_rank(rank: int | None, params: Params, sites: Sites) -> int:
    """The rank itself, or the full rank in place of None.

    Raises:
      InputError: it is below 1, or above the full rank: the smaller side of the largest site.
    """
    full = max(min(np.shape(get(params, path))) for path in sites.values())
    if rank is not None and not 1 <= rank <= full:
        raise InputError(
            f"--rank={rank}: must be from 1 to {full}, at which a LoRA of these maps is exact."
        )
    return full if rank is None else rank


def changes(params: Params, merged: Params, sites: Sites, layout: Layout) -> dict[str, np.ndarray]:
    """What an adapter changes at each site, float64 ``[in, out]``.

    Args:
      params: plain parameters of the base model.
      merged: the same with the adapter merged into them.
      sites: the adapted sites.
      layout: of the model's checkpoints, for names in messages.

    Raises:
      InputError: something else is changed as well, such as a bias; it names the tensor.
    """
    names = {tensor.path: name for name, tensor in layout.tensors.items()}
    before, after = _leaves(params), _leaves(merged)
    for path in after.keys() - set(sites.values()):
        if path not in before or not np.array_equal(before[path], after[path]):
            raise InputError(
                f"--format=peft: merging the adapter changes {names.get(path, '.'.join(path))}, "
                "and a LoRA holds changes of linear maps only; give --format=merged."
            )
    return {
        name: np.asarray(after[path], np.float64) - np.asarray(before[path], np.float64)
        for name, path in sites.items()
    }


def _leaves(params: Params) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(part.key for part in path): x for path, x in leaves}


def factor(change: np.ndarray, rank: int) -> LoRA:
    """The LoRA of a rank that is nearest to a change ``[in, out]``.

    Where the rank is above the smaller side of the change, the rest of the factors is zero.
    """
    u, s, vt = np.linalg.svd(np.asarray(change, np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    a, b = (u[:, :rank] * root).T, vt[:rank].T * root
    missing = rank - len(root)
    a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
    return LoRA(a.astype(np.float32), b.astype(np.float32))


def kept(changes: Mapping[str, np.ndarray], loras: Mapping[str, LoRA]) -> float:
    """How much of the changes their LoRAs hold, as a share of the Frobenius norm in [0, 1]."""
    total = sum(float(np.sum(change**2)) for change in changes.values())
    lost = sum(
        float(np.sum((change - loras[name].a.T.astype(np.float64) @ loras[name].b.T) ** 2))
        for name, change in changes.items()
    )
    return float(np.sqrt(max(0.0, 1 - lost / total))) if total else 1.0


def modules(sites: Sites, layout: Layout) -> dict[str, str]:
    """The names of the sites' modules in transformers' model.

    Raises:
      InputError: a site that is no linear map with a tensor of its own in the checkpoint.
    """
    names = {tensor.path: name for name, tensor in layout.tensors.items()}
    found = {}
    for site, path in sites.items():
        name = names.get(path, "")
        if path[-1] != "kernel" or not name.endswith(".weight"):
            raise InputError(
                f"adapter.sites: {site!r} is no linear map of {layout.name} in transformers, so "
                "PEFT has no name for it; give --format=merged."
            )
        found[site] = name.removesuffix(".weight")
    return found


def target_modules(wanted: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest ends of module names by which PEFT finds the wanted ones and no others."""
    wanted = set(wanted)
    others = set(every) - wanted
    targets = set()
    for name in wanted:
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        targets.add(next(x for x in ends if not any(f".{o}".endswith(f".{x}") for o in others)))
    return sorted(targets)


def save(
    folder: Path, loras: Mapping[str, LoRA], *, layout: Layout, sites: Sites, base: str
) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT and vLLM read them.

    Args:
      folder: is there.
      loras: by site name, all of one rank.
      layout: of the base model's checkpoints.
      sites: the sites of ``loras``.
      base: Hub id or folder of the base model.

    Raises:
      InputError: a site that PEFT has no name for.
      OSError, safetensors.SafetensorError: a file that cannot be written.
    """
    names = modules(sites, layout)
    rank = len(next(iter(loras.values())).a)
    every = [name.removesuffix(".weight") for name in layout.tensors if name.endswith(".weight")]
    # GPT-2's maps lie as [in, out] in its checkpoints, those of nn.Linear as [out, in].
    stored_as_used = not any(layout.tensors[f"{name}.weight"].transposed for name in names.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(names.values(), every),
        "fan_in_fan_out": stored_as_used,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    arrays = {
        f"base_model.model.{names[site]}.lora_{part.upper()}.weight": array
        for site, lora in loras.items()
        for part, array in lora._asdict().items()
    }
    write_safetensors(folder / "adapter_model.safetensors", arrays)
    write_json(folder / "adapter_config.json", config)


def load(folder: Path, *, layout: Layout, sites: Sites) -> dict[str, LoRA]:
    """Reads back by site name what `save` wrote."""
    arrays = read_arrays(folder / "adapter_model.safetensors", fix="export it again")
    return {
        site: LoRA(*(arrays[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB"))
        for site, name in modules(sites, layout).items()
    }
