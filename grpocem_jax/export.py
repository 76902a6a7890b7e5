"""Takes a trained model away: the adapter merged into a folder that transformers loads.

    python -m grpocem_jax.export --workdir runs/TRAINED --out exported

``OUT`` holds config.json, model.safetensors, the tokenizer's files, generation_config.json, a model
card, and the adapter by itself in ``adapter/``.  Before it gets its name it is read back, and its
logits are compared with those of base model and adapter.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from safetensors import SafetensorError

from grpocem_jax import checkpoints, commands, files, screens
from grpocem_jax.adaptation import TrainedRun, load_run
from grpocem_jax.adapters import base as adapters
from grpocem_jax.errors import InputError
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from grpocem_jax.policy import Carrier, own_code, put_adapter
from grpocem_jax.terminal import visible

TOLERANCE = 1e-3
"""The largest difference of a logit that is let pass."""

SEQUENCES, LENGTH = 4, 64
"""The shape of the tokens on which logits are compared."""


class Exported(NamedTuple):
    """What `export_model` wrote.

    Attributes:
      folder: the exported model.
      difference: largest absolute difference between the logits of base model and adapter and those
        of the folder, read back by `load_model`.
      transformers_difference: the same with the folder loaded by transformers; None where PyTorch,
        which transformers needs for it, is not installed.
    """

    folder: Path
    difference: float
    transformers_difference: float | None


def export_model(
    workdir: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    settings: ml_collections.ConfigDict | None = None,
) -> Exported:
    """Merges the adapter of a run into its model and writes both as a Hugging Face folder.

    Args:
      workdir: a run directory.
      out: the folder to make; must not exist. It is there only if everything went well.
      adapter: folder of another adapter of the same model and settings, as ``adapt.py --save``
        writes it; by default the run's own.
      settings: other settings than the run's own.

    Raises:
      InputError: ``out`` exists or cannot be written; there is no trained run; the adapter is of
        another model or was made with other settings; the logits of the merged model differ by more
        than `TOLERANCE`.
    """
    workdir, out = Path(workdir), Path(out)
    _check_new(out)
    source = workdir / "adapter" if adapter is None else Path(adapter)
    run = load_run(workdir, settings, adapter=adapter)
    card = _card(run, workdir / "summary.json", own_adapter=adapter is None)
    print(visible(screens.exporting(run, source)), file=sys.stderr, flush=True)
    # The run's own parameters may be in bfloat16.
    carrier = put_adapter(run.policy.pretrained, run.config.adapter, seed=run.config.seed)
    try:
        # A GPU would otherwise round the operands of float32 products to 10 bits.
        with files.new_folder(out) as folder, jax.default_matmul_precision("highest"):
            _save(run, carrier, folder)
            checkpoints.copy_adapter(source, folder / "adapter")
            (folder / "README.md").write_text(card, encoding="utf-8")
            return Exported(out, *_compare(run, carrier, folder))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--out={out}: cannot be written ({reason}); make room there or give another folder."
        ) from None


def _check_new(out: Path) -> None:
    if "\0" in str(out):
        raise InputError(f"--out={out}: is no name of a folder; give another.")
    if os.path.lexists(out):
        raise InputError(f"--out={out}: exists already; give another folder, or delete this one.")


def _card(run: TrainedRun, path: Path, *, own_adapter: bool) -> str:
    """The model card, filled from a summary.json."""
    from huggingface_hub import ModelCardData

    pretrained = run.policy.pretrained
    metadata = ModelCardData(
        base_model=pretrained.source if pretrained.kind == "hub" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["grpo", "svf", "grpocem_jax"],
    )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return screens.merged_card(
            run.config,
            summary,
            metadata=metadata.to_yaml(),
            tolerance=TOLERANCE,
            own_adapter=own_adapter,
        )
    except (
        AttributeError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: the model card cannot be filled from it ({error!r}); give a run that ended."
        ) from None


def _save(run: TrainedRun, carrier: Carrier, folder: Path) -> None:
    """Writes the merged model, and what transformers' ``generate`` reads: the run's stop tokens."""
    from transformers import GenerationConfig

    pretrained, tokenizer = run.policy.pretrained, run.policy.tokenizer
    with own_code(run.config.adapter, "merge"):
        merged = adapters.merge_params(carrier.method, carrier.params, run.adapter, carrier.sites)
    hub.save_model(folder, pretrained.config, merged, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=np.unique(run.policy.end_ids).tolist(),
        pad_token_id=pad,
    ).save_pretrained(folder)


def _compare(run: TrainedRun, carrier: Carrier, folder: Path) -> tuple[float, float | None]:
    """The fields of `Exported`; refuses differences above `TOLERANCE`."""
    size = (SEQUENCES, min(LENGTH, carrier.model.context_length))
    tokens = np.random.default_rng(0).integers(0, carrier.model.vocab_size, size, np.int32)
    expected = np.asarray(_logits(carrier.params, run.adapter, tokens, model=carrier.model))
    loaded = hub.load_model(str(folder))
    params = models.cast_params(loaded.params, jnp.dtype(jnp.float32))
    found = _logits(params, {}, tokens, model=loaded.build())
    by_transformers = _transformers_logits(folder, tokens)
    difference = _difference(found, expected, "read back")
    if by_transformers is None:
        return difference, None
    return difference, _difference(by_transformers, expected, "in transformers")


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

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def _difference(found: Any, expected: np.ndarray, how: str) -> float:
    """The largest absolute difference; refuses one above `TOLERANCE`, or that is no number."""
    difference = float(np.abs(np.asarray(found) - expected).max())
    if not difference <= TOLERANCE:
        raise InputError(
            f"the logits of the merged model, {how}, differ by {difference:.2g} from those of base "
            f"model and adapter, more than {TOLERANCE:g}, so it was not kept; use the adapter as "
            "it is."
        )
    return difference


def _check_push(repository: str) -> None:
    """Refuses, before any work, a name that the Hub would refuse, and a push without a token."""
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise InputError(
            f"--push_to_hub={repository}: is no name of a model on the Hub; give USER/NAME."
        ) from None
    if huggingface_hub.get_token() is None:
        raise InputError(
            f"--push_to_hub={repository}: there is no token for the Hub; run `hf auth login`, or "
            "set HF_TOKEN."
        )


def _push(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder as a new model on the Hub, and returns its address."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repository, private=private or None)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--push_to_hub={repository}: the Hub did not take it ({reason}); {folder} is whole: "
            f"mend this and run `hf upload {repository} {folder}`."
        ) from None
    return str(made)


def run(
    *,
    workdir: str | None,
    out: str | None,
    settings: ml_collections.ConfigDict | None = None,
    adapter: str | None = None,
    repository: str | None = None,
    private: bool = False,
) -> Exported:
    """Runs the command; arguments are its flags.

    Raises:
      InputError: flags that are missing or contradict each other, and whatever `export_model`
        raises; no token for the Hub, a name that it refuses or has already, or no network to it.
    """
    if not workdir:
        raise InputError("--workdir is missing; give a run directory with a trained adapter.")
    if not out:
        raise InputError("--out is missing; give a folder to make.")
    if private and repository is None:
        raise InputError("--private is for the Hub; give --push_to_hub=USER/NAME too.")
    _check_new(Path(out))
    if repository is not None:
        _check_push(repository)
    exported = export_model(workdir, out, adapter=adapter, settings=settings)
    print(visible(screens.exported(*exported)), flush=True)
    if repository is not None:
        print(visible(f"pushed    {_push(exported.folder, repository, private)}"), flush=True)
    return exported


def main() -> None:
    """The command."""
    config = commands.define_config(of_run=True)
    workdir = flags.DEFINE_string("workdir", None, "Run directory with a trained adapter.")
    out = flags.DEFINE_string("out", None, "Folder to make; must not exist.")
    adapter = flags.DEFINE_string(
        "adapter", None, "Folder of another adapter of the same run, from adapt.py --save."
    )
    repository = flags.DEFINE_string(
        "push_to_hub", None, "USER/NAME: upload the folder to the Hugging Face Hub under this name."
    )
    private = flags.DEFINE_bool("private", False, "With --push_to_hub: only you can see it.")
    commands.run(
        lambda argv: run(
            workdir=workdir.value,
            out=out.value,
            settings=config.value,
            adapter=adapter.value,
            repository=repository.value,
            private=private.value,
        )
    )


if __name__ == "__main__":
    main()
