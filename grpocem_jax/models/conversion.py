"""Between Hugging Face checkpoints and parameters: fields of a config.json, and tensors."""

import itertools
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpocem_jax.models.base import Params
from grpocem_jax.utils.errors import InputError

HEAD = "lm_head.weight"
MAX_LAYERS = 10_000

WRAPPERS = frozenset(
    "module _orig_mod _forward_module _fsdp_wrapped_module _checkpoint_wrapped_module".split()
)
"""Parts of tensors' names that are of `DistributedDataParallel`, `torch.compile`, DeepSpeed, FSDP
and activation checkpointing, and not of the model."""

PEFT = "base_model.model."
"""The same of PEFT, whose unmerged adapters have names with `_LORA`."""

_LORA = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\.")


class Tensor(NamedTuple):
    """Where a tensor of a checkpoint goes.

    Attributes:
      path: of the leaf in the parameters.
      shape: in the checkpoint.
      transposed: a linear map that the checkpoint has as ``[out, in]``; ours are ``[in, out]``.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False


class Layout(NamedTuple):
    """The tensors of a model's checkpoint.

    Attributes:
      name: of the architecture, for messages.
      prefix: that names have in a model with a head and lack in one without.
      tensors: by the name that transformers writes.
      tied: name of the embedding that is the head as well; None where ``tensors`` has the head.
      passed_over: pattern of names, without the prefix, of what is in checkpoints and no weight.
      switches: fields of config.json that say whether some tensors are there, by a pattern of
        their names, for messages.
    """

    name: str
    prefix: str
    tensors: Mapping[str, Tensor]
    tied: str | None
    passed_over: str
    switches: Mapping[str, str] = MappingProxyType({})

    def switch(self, name: str) -> str | None:
        """The field of config.json that says whether a tensor is there, if there is one."""
        fields = (field for pattern, field in self.switches.items() if re.search(pattern, name))
        return next(fields, None)

    def sites(self) -> dict[str, tuple[str, ...]]:
        """The linear maps by checkpoint name, without prefix, and the paths of their kernels."""
        return {
            name.removeprefix(self.prefix).removesuffix(".weight"): tensor.path
            for name, tensor in self.tensors.items()
            if tensor.path[-1] == "kernel"
        }


def params_from_state(
    state: Mapping[str, np.ndarray], layout: Layout, where: str
) -> dict[str, Any]:
    """Builds the parameters from a checkpoint's tensors, float32, using each exactly once.

    The prefix may be there or not, and so may the names of what training wraps around a model
    (`WRAPPERS`).  Of a tied embedding and head one will do; if both are there,
    they must be equal.

    Args:
      state: tensors by name, in any floating-point dtype.
      layout: what they must be.
      where: the file, for messages.

    Raises:
      InputError: a tensor is missing, left over, of another shape or not of finite floating-point
        numbers; it names the tensor.
    """
    left: dict[str, str] = {}
    for name in state:
        if _LORA.search(name):
            raise InputError(
                f"{where}: the tensor {name} is of an adapter that has not been merged; call "
                "merge_and_unload() of PEFT and save what it returns."
            )
        bare = _unwrapped(name).removeprefix(layout.prefix)
        if bare in left:
            raise InputError(f"{where}: {left[bare]} and {name} are the same tensor; keep one.")
        left[bare] = name
    params: dict[str, Any] = {}
    for name, tensor in layout.tensors.items():
        bare = name.removeprefix(layout.prefix)
        if bare not in left and name == layout.tied and HEAD in left:
            name = bare = HEAD
        if bare not in left:
            field = layout.switch(name)
            doubt = f", or {field} in config.json is wrong" if field else ""
            raise InputError(
                f"{where}: the tensor {name} is missing; this is no complete {layout.name}{doubt}."
            )
        stored = state[left.pop(bare)]
        if stored.shape != tensor.shape:
            raise InputError(
                f"{where}: the tensor {name} has shape {stored.shape}, but config.json says "
                f"{tensor.shape}."
            )
        if not jnp.issubdtype(stored.dtype, jnp.floating):
            raise InputError(
                f"{where}: the tensor {name} holds {stored.dtype} numbers; use a checkpoint that "
                "is not quantised."
            )
        with np.errstate(over="ignore"):
            array = np.asarray(stored, np.float32)
        if not np.isfinite(array).all():
            raise InputError(
                f"{where}: the tensor {name} has numbers that are not finite; fetch it again."
            )
        branch = params
        for part in tensor.path[:-1]:
            branch = branch.setdefault(part, {})
        branch[tensor.path[-1]] = np.ascontiguousarray(array.T) if tensor.transposed else array
    if layout.tied is not None and HEAD in left:
        embedding = _leaf(params, layout.tensors[layout.tied])
        if not np.array_equal(np.asarray(state[left.pop(HEAD)], np.float32), embedding):
            raise InputError(
                f"{where}: {HEAD} differs from {layout.tied.removeprefix(layout.prefix)}, but this "
                f"{layout.name} ties the two; correct tie_word_embeddings in config.json."
            )
    for bare, name in left.items():
        if not re.fullmatch(layout.passed_over, bare):
            field = layout.switch(name)
            fix = f"correct {field} in" if field else "use the file's own"
            raise InputError(
                f"{where}: the tensor {name} belongs to no {layout.name} weight; {fix} config.json."
            )
    return params


def params_to_state(params: Params, layout: Layout) -> dict[str, np.ndarray]:
    """The inverse of `params_from_state`, with the names transformers writes; a tied head once."""
    state = {}
    for name, tensor in layout.tensors.items():
        array = np.asarray(_leaf(params, tensor), np.float32)
        state[name] = np.ascontiguousarray(array.T) if tensor.transposed else array
    return state


def _unwrapped(name: str) -> str:
    """A tensor's name in the model itself."""
    parts = name.removeprefix(PEFT).split(".")
    inner = ".".join(part for part in parts if part not in WRAPPERS)
    # Several may be around each other.
    return _unwrapped(inner) if inner.startswith(PEFT) else inner


def _leaf(params: Params, tensor: Tensor) -> Any:
    for part in tensor.path:
        params = params[part]
    return params


def check_implemented(
    fields: Mapping[str, Any], implemented: Mapping[str, Any], where: str
) -> None:
    """Refuses fields of a config.json that ask for something else than what is implemented.

    Raises:
      InputError: it names the file, the field and its value.
    """
    for field, value in implemented.items():
        if fields.get(field, value) != value:
            raise InputError(
                f"{where}: {field}={fields[field]!r} is not implemented (only {value!r} is); "
                "use a checkpoint of the standard architecture."
            )


def check_positive(fields: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuses a config.json in which one of the fields is no positive integer of 32 bits.

    Raises:
      InputError: it names the file, and the field that is missing or its value.
    """
    for field in names:
        if field not in fields:
            raise InputError(f"{where}: the field {field!r} is missing; add it.")
        if type(fields[field]) is not int or fields[field] < 1:
            raise InputError(f"{where}: {field}={fields[field]!r}: must be a positive integer.")
        # A model is laid out layer by layer before its weights are looked at.
        largest = MAX_LAYERS if "layer" in field else 2**31 - 1
        if fields[field] > largest:
            raise InputError(f"{where}: {field} is too large; it must be at most {largest}.")


def positive(value: Any, field: str, where: str) -> float:
    """A field's value, a number above 0 that float32 holds.

    Raises:
      InputError: it names the file, the field and its value.
    """
    if type(value) not in (int, float) or not 1e-37 < value < 1e38:
        raise InputError(f"{where}: {field}={value!r}: must be a positive number.")
    return float(value)


def stored_dtypes(state: Mapping[str, np.ndarray], layout: Layout) -> dict[str, np.dtype]:
    """The dtypes in which a checkpoint has the tensors of a layout, by the layout's names.

    They have at most 32 bits, as parameters do.

    Args:
      state: tensors by name, with any prefix, and with any parts between those of the layout's.
      layout: that of the checkpoint.
    """
    stored = [(name.split(".")[::-1], x.dtype) for name, x in state.items()]
    dtypes = {}
    for name in layout.tensors:
        ends = [name.removeprefix(layout.prefix)] + [HEAD] * (name == layout.tied)
        for end, (parts, kind) in itertools.product(ends, stored):
            left = iter(parts)
            if all(part in left for part in reversed(end.split("."))):
                dtypes[name] = min(kind, np.dtype(np.float32), key=lambda x: x.itemsize)
                break
    return dtypes
