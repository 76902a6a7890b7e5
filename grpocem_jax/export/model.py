"""Takes a trained model away: merged into a folder that transformers loads, or as a LoRA for PEFT.

    python -m grpocem_jax.export --workdir runs/TRAINED --out exported
    python -m grpocem_jax.export --workdir runs/TRAINED --out lora --format peft --rank 64

A merged model is its base but for the adapted weights: it has the base's config.json, the dtypes of
its files, its tokenizer and chat templates, and its generation_config.json with the run's stop
tokens; and a model card, export.json, and the adapter by itself in ``adapter/``.  Before the folder
gets its name it is read back, and its logits are compared with those of base model and adapter.
The other format is that of `grpocem_jax.export.peft`.
"""

import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from safetensors import SafetensorError

from grpocem_jax import adapters
from grpocem_jax.export import peft, screens
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from grpocem_jax.models import tokenizer as tokenizers
from grpocem_jax.rollouts.policy import attach, naming
from grpocem_jax.runs import checkpoints
from grpocem_jax.runs.trained import TrainedRun, load_run
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import say

FORMATS = ("merged", "peft")

TOLERANCE = 1e-3
"""The largest difference of a logit that is let pass, what rounding the weights does apart."""

DTYPES = ("float32", "bfloat16", "float16")

SEQUENCES, LENGTH = 4, 64
"""The shape of the tokens on which logits are compared."""


class Exported(NamedTuple):
    """What `export_model` wrote; differences are the largest absolute ones of any logit.

    Attributes:
      folder: the exported model.
      difference: between base model with adapter, and the folder as it is read back.
      transformers_difference: the same with the folder loaded by transformers; None where PyTorch,
        which transformers needs for it, is not installed, and for ``format="peft"``.
      effect: between base model and base model with adapter, to compare the others with.
      dtype: in which the adapted weights are stored.
      rounding: the part of ``difference`` that comes from rounding to ``dtype``.
      rank: of the LoRA; None for a merged model.
      kept: the part of the change of the weights that the LoRA holds, as a share of its Frobenius
        norm; 1 for a merged model.
    """

    folder: Path
    difference: float
    transformers_difference: float | None
    effect: float
    dtype: str = "float32"
    rounding: float = 0.0
    rank: int | None = None
    kept: float = 1.0


def export_model(
    workdir: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    model: str | None = None,
    format: str = "merged",
    dtype: str | None = None,
    rank: int | None = None,
    settings: ml_collections.ConfigDict | None = None,
) -> Exported:
    """Writes the model of a run, merged into a Hugging Face folder or as a LoRA for PEFT.

    Args:
      workdir: a run directory.
      out: the folder to make; must not exist. It is there only if everything went well.
      adapter: folder of another adapter of the same model and settings, as ``adapt.py --save``
        writes it; by default the run's own.
      format: ``merged``, a model of its own; or ``peft``, a LoRA that PEFT puts on the base model.
      dtype: of a merged model's weights, one of `DTYPES`; by default those of the base's files.
        The adapter is merged in float32 and the result rounded.
      rank: of the LoRA, 1 to the smaller side of the largest adapted map, which is the default and
        exact. Smaller ranks keep the largest singular values of each map's change.
      model: where the base model lies now, if not where the run found it.
      settings: other settings than the run's own.

    Raises:
      InputError: ``out`` exists or cannot be written; there is no trained run; the adapter is of
        another model or was made with other settings; an option that is unknown, out of range or
        of the other format; the logits of what was written differ by more than `TOLERANCE` from
        what they must be; a change that no LoRA holds.
    """
    workdir, out = files.expand(workdir, "--workdir"), files.expand(out, "--out")
    check_new(out)
    check_options(format, dtype, rank)
    source = workdir / "adapter" if adapter is None else files.expand(adapter, "--adapter")
    run = load_run(workdir, settings, adapter=adapter, model=model)
    pretrained = run.policy.pretrained
    lora = format == "peft"
    if lora:
        rank = _check_lora(run, rank)
    card = _card(run, workdir / "summary.json", own_adapter=adapter is None, lora=lora)
    say(screens.exporting(run, source, lora=lora), sys.stderr)
    # The run's own parameters may be in bfloat16.
    attached = attach(pretrained, run.config, dtype="float32")
    try:
        # A GPU would otherwise round the operands of float32 products to 10 bits.
        with files.new_folder(out) as folder, jax.default_matmul_precision("highest"):
            merged = _merge(run, attached)
            if rank is not None:
                exported = _export_lora(run, attached, merged, folder, rank)
            else:
                exported = _export_merged(run, attached, merged, folder, dtype)
                checkpoints.copy_adapter(source, folder / "adapter")
            exported = exported._replace(folder=out)
            measured = f"{card}\n{screens.measured(exported)}"
            (folder / "README.md").write_text(measured, encoding="utf-8")
            record = {"format": format, "base_sha256": pretrained.sha256, **exported._asdict()}
            del record["folder"]
            files.write_json(folder / "export.json", record)
            return exported
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--out={out}: cannot be written ({reason}); make room there or give another folder."
        ) from None


def check_options(format: str, dtype: str | None, rank: int | None) -> None:
    """Refuses options that are unknown, or of the other format."""
    if format not in FORMATS:
        raise InputError(f"--format={format}: must be one of {', '.join(FORMATS)}.")
    if format == "peft" and dtype is not None:
        raise InputError(
            f"--dtype={dtype}: is for --format=merged; a LoRA is in float32, and PEFT casts it."
        )
    if format != "peft" and rank is not None:
        raise InputError(f"--rank={rank}: is for a LoRA; give --format=peft too.")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}.")


def _check_lora(run: TrainedRun, rank: int | None) -> int:
    """The rank of a LoRA; refuses, before any work, what cannot be one."""
    policy = run.policy
    pretrained, sites = policy.pretrained, policy.sites
    if pretrained.kind in ("random", "gguf"):
        raise InputError(
            f"--format=peft: the weights of {pretrained.source} are in no folder that PEFT could "
            "put a LoRA on; give --format=merged."
        )
    peft.modules(sites, pretrained.architecture.layout(pretrained.config))
    return peft.check_rank(rank, pretrained.params, sites)


def check_new(out: Path) -> None:
    """Refuses ``--out`` where something is there, or no folder can be.

    Raises:
      InputError: it does.
    """
    if "\0" in str(out):
        raise InputError(f"--out={out}: is no name of a folder; give another.")
    if os.path.lexists(out):
        raise InputError(f"--out={out}: exists already; give another folder, or delete this one.")


def _card(run: TrainedRun, path: Path, *, own_adapter: bool, lora: bool = False) -> str:
    """The model card, filled from a summary.json."""
    from huggingface_hub import ModelCardData

    pretrained = run.policy.pretrained
    metadata = ModelCardData(
        base_model=pretrained.source if pretrained.kind == "hub" else None,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation",
        tags=["grpo", "svf", "grpocem_jax", *["lora"] * lora],
    )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return screens.exported_card(
            run.config,
            summary,
            metadata=metadata.to_yaml(),
            own_adapter=own_adapter,
            base=_base(pretrained) if lora else None,
        )
    except (
        AttributeError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: the model card cannot be filled from it ({error!r}); give a run that ended."
        ) from None


def _base(pretrained: hub.Pretrained) -> str:
    """The base model by a name that PEFT and transformers load it by."""
    return pretrained.source if pretrained.kind == "hub" else str(_folder(pretrained).absolute())


def _folder(pretrained: hub.Pretrained) -> Path:
    # Only a named shape has none, and without a tokenizer there is no run.
    assert pretrained.folder is not None
    return pretrained.folder


def _merge(run: TrainedRun, attached: adapters.Attached) -> models.Params:
    """Plain parameters of the adapted model, float32."""
    with naming(run.config.adapter), adapters.calling("merge"):
        return adapters.merge_params(attached.adapter, attached.params, run.offsets, attached.sites)


def _export_merged(
    run: TrainedRun,
    attached: adapters.Attached,
    merged: models.Params,
    folder: Path,
    dtype: str | None,
) -> Exported:
    """Writes the merged model with its base's settings and tokenizer, and checks it."""
    pretrained = run.policy.pretrained
    architecture, config = pretrained.architecture, pretrained.config
    dtypes = pretrained.dtypes if dtype is None else {}
    state = {
        name: _rounded(name, x, jnp.dtype(dtypes.get(name, dtype or jnp.float32)))
        for name, x in architecture.params_to_state(merged, config).items()
    }
    source = _folder(pretrained)
    files.write_json(folder / "config.json", _config(pretrained, source, dtype))
    files.write_json(folder / "generation_config.json", _generation_config(run, source))
    tokenizers.copy_tokenizer(source, folder)
    files.write_safetensors(folder / "model.safetensors", state)

    tokens = _tokens(attached.model)
    expected = _logits(attached.params, run.offsets, tokens, model=attached.model)
    plain = pretrained.build()
    unrounded = _logits(merged, {}, tokens, model=plain)
    _check(unrounded, expected, "in float32")
    rounded = architecture.params_from_state(state, config, str(folder))
    wanted = _logits(_float32(rounded), {}, tokens, model=plain)
    loaded = hub.load_model(str(folder))
    found = _logits(_float32(loaded.params), {}, tokens, model=loaded.build())
    _check(found, wanted, "read back")
    by_transformers = _transformers_logits(folder, tokens)
    if by_transformers is not None:
        _check(by_transformers, wanted, "in transformers")
    layout = architecture.layout(config)
    names = {tensor.path: name for name, tensor in layout.tensors.items()}
    return Exported(
        folder,
        _difference(found, expected),
        None if by_transformers is None else _difference(by_transformers, expected),
        effect=_difference(expected, _logits(_float32(pretrained.params), {}, tokens, model=plain)),
        dtype="/".join(sorted({str(state[names[path]].dtype) for path in attached.sites.values()})),
        rounding=_difference(wanted, unrounded),
    )


def _rounded(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if np.isfinite(array).all() and not np.isfinite(rounded.astype(np.float32)).all():
        raise InputError(
            f"--dtype={dtype}: {name} has numbers that are too large for it; give --dtype=float32."
        )
    return rounded


def _config(pretrained: hub.Pretrained, source: Path, dtype: str | None) -> dict[str, Any]:
    """The base's config.json, with what other versions and programs would take for granted.

    Args:
      pretrained: the base model.
      source: its folder.
      dtype: to say in place of the base's; None leaves it.
    """
    base = files.read_object(source / "config.json", fix=hub.AGAIN)
    standard = pretrained.architecture.config_to_hf(pretrained.config)
    # A base without a head names another class; and its code does not come along.
    fields = standard | base | {"architectures": standard["architectures"]}
    fields.pop("auto_map", None)
    # Transformers 5 reads what 4 wrote, not the other way round.
    rope = fields.pop("rope_parameters", None)
    if rope:
        fields["rope_theta"] = rope.get("rope_theta", fields["rope_theta"])
        scaling = {name: x for name, x in rope.items() if name != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            fields["rope_scaling"] = scaling
    if pretrained.kind == "random":
        dtype = dtype or "float32"
    if dtype is not None:
        fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    return fields


def _generation_config(run: TrainedRun, source: Path) -> dict[str, Any]:
    """The base's generation_config.json, with the run's stop tokens beside the base's.

    Of a base without the file, its config.json has the settings, as in transformers.
    """
    from transformers import GenerationConfig

    pretrained, tokenizer = run.policy.pretrained, run.policy.tokenizer
    path = source / "generation_config.json"
    if path.is_file():
        fields = files.read_object(path, fix=hub.AGAIN)
    else:
        config = files.read_object(source / "config.json", fix=hub.AGAIN)
        fields = {name: config[name] for name in GenerationConfig().to_dict() if name in config}
        fields.pop("transformers_version", None)
    # Else transformers would take the settings from config.json again.
    fields.pop("_from_model_config", None)
    encoded = (run.policy.encode_completion(text) for text in run.config.generation.stop)
    stop = [ids[0] for ids in encoded if len(ids) == 1]
    end_ids = list(dict.fromkeys([*pretrained.end_ids, *stop]))
    stated = fields.get("eos_token_id")
    if end_ids and end_ids != (stated if isinstance(stated, list) else [stated]):
        fields["eos_token_id"] = end_ids
    pads = [tokenizer.pad_token_id, tokenizer.eos_token_id, *end_ids]
    own = {
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": next((x for x in pads if x is not None), None),
    }
    missing = {name: x for name, x in own.items() if x is not None and fields.get(name) is None}
    return fields | missing


def _export_lora(
    run: TrainedRun, attached: adapters.Attached, merged: models.Params, folder: Path, rank: int
) -> Exported:
    """Writes the change of the weights as a LoRA, and measures what it computes."""
    pretrained, sites = run.policy.pretrained, attached.sites
    layout = pretrained.architecture.layout(pretrained.config)
    changes = peft.changes(pretrained.params, merged, sites, layout)
    loras = {name: peft.factor(change, rank) for name, change in changes.items()}
    peft.save(folder, loras, layout=layout, sites=sites, base=_base(pretrained))

    tokens = _tokens(attached.model)
    expected = _logits(attached.params, run.offsets, tokens, model=attached.model)
    params, model = _float32(pretrained.params), pretrained.build(peft.apply)
    found = _logits(params, peft.load(folder, layout=layout, sites=sites), tokens, model=model)
    full = all(rank >= min(change.shape) for change in changes.values())
    _check(found, expected, f"as a LoRA of rank {rank}", TOLERANCE if full else math.inf)
    return Exported(
        folder,
        _difference(found, expected),
        None,
        effect=_difference(expected, _logits(params, {}, tokens, model=model)),
        rank=rank,
        kept=peft.kept(changes, loras),
    )


def _tokens(model: models.Model) -> np.ndarray:
    size = (SEQUENCES, min(LENGTH, model.context_length))
    return np.random.default_rng(0).integers(0, model.vocab_size, size, np.int32)


def _float32(params: models.Params) -> models.Params:
    return models.cast_params(params, jnp.dtype(jnp.float32))


@functools.partial(jax.jit, static_argnames="model")
def _logits(params, adapter, tokens, *, model):
    """Logits float32 ``[B, T, V]`` of tokens ``[B, T]``."""

    def of_sequence(row):
        return model.logits(params, model.forward(params, adapter, row, jnp.ones(row.shape, bool)))

    return jax.vmap(of_sequence)(tokens)


def _transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray | None:
    """What transformers computes from the folder; None without PyTorch, which it needs for it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_torch_available

    if not is_torch_available():
        return None
    import torch

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def _difference(found: Any, expected: Any) -> float:
    """The largest absolute difference."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


def _check(found: Any, expected: Any, how: str, tolerance: float = TOLERANCE) -> None:
    """Refuses a difference above the tolerance, or one that is no number."""
    difference = _difference(found, expected)
    if not difference <= tolerance:
        raise InputError(
            f"the logits of the merged model, {how}, differ by {difference:.2g} from what they "
            f"must be, more than {tolerance:g}, so it was not kept; use the adapter as it is."
        )
