"""One program for one device and for many of a process; `processes` is about several of those.

Devices form a mesh of two axes.  Along the first, the prompts of a batch and the candidates of a
population are divided; along the second, which is of length 1 unless a model is too large for one
device, its weights.  Adapters lie on every device.  The functions themselves know nothing of it:
arrays say where they lie, and XLA's partitioner does the rest (GSPMD, Xu et al. 2021, arXiv
2105.04663).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpocem_jax.utils.errors import InputError

AXIS, WEIGHTS = "data", "weights"
"""The axes of a mesh: prompts of a batch, or candidates of a population, and parts of the model."""


def make_mesh(devices: Sequence[jax.Device], *, weight_shards: int = 1) -> Mesh | None:
    """A mesh of some devices; None for one, for which nothing has to be placed.

    Args:
      devices: at least one.
      weight_shards: how many of them hold the model's weights together, each a part; at least 1.

    Raises:
      InputError: ``weight_shards`` does not divide the number of devices.
    """
    shape = (_rows(len(devices), weight_shards), weight_shards)
    if len(devices) == 1:
        return None
    return jax.make_mesh(
        shape, (AXIS, WEIGHTS), axis_types=(AxisType.Auto,) * len(shape), devices=devices
    )


def sharing(count: int, *, weight_shards: int = 1) -> Mesh | None:
    """A mesh of as many of this process's devices as share ``count`` prompts evenly.

    Args:
      count: at least 1.
      weight_shards: as in `make_mesh`; the devices that hold the weights together have the same
        prompts.

    Raises:
      InputError: as `make_mesh`.
    """
    rows = math.gcd(_rows(jax.local_device_count(), weight_shards), count)
    return make_mesh(jax.local_devices()[: rows * weight_shards], weight_shards=weight_shards)


def _rows(count: int, weight_shards: int) -> int:
    """The length of the first axis of a mesh of so many devices."""
    if count % weight_shards:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise InputError(
            f"model.weight_shards={weight_shards} does not divide the number of devices of this "
            f"process, {count}; give {' or '.join(map(str, fitting))}."
        )
    return count // weight_shards


def rows(mesh: Mesh) -> int:
    """Into how many parts a mesh divides the rows of a batch."""
    return mesh.shape[AXIS]


def matrix_dtype(dtype: str) -> str:
    """What ``model.dtype`` stands for: ``auto`` for `fast_dtype`, the others for themselves."""
    return fast_dtype(jax.local_devices()[0], Path("/proc/cpuinfo")) if dtype == "auto" else dtype


def fast_dtype(device: jax.Device, processor: Path) -> str:
    """The type in which a device multiplies matrices fastest.

    bfloat16 on TPUs, GPUs of compute capability 8.0 and above, and processors with AMX; float16 on
    GPUs from 7.0 on, such as the T4, whose tensor cores have no bfloat16; otherwise float32.

    Args:
      device: the device.
      processor: the file in which Linux lists what a processor can do, which need not be there.
    """
    if device.platform == "tpu":
        return "bfloat16"
    if device.platform == "cpu":
        try:
            return "bfloat16" if "amx_bf16" in processor.read_text().split() else "float32"
        except OSError:
            return "float32"
    capability = _compute_capability(device)
    return "bfloat16" if capability >= 8 else "float16" if capability >= 7 else "float32"


def _compute_capability(device: jax.Device) -> float:
    """That of one of NVIDIA's GPUs; 0 of other devices."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):
        return 0.0


EXACT = ("float32", "highest", "F32_F32_F32")
"""Values of ``jax_default_matmul_precision`` with which products of float32 are not shortened."""


def float32_products(device: jax.Device) -> str:
    """The type in which a device multiplies matrices of float32; sums are float32 in any case.

    JAX takes a shorter one where ``jax_default_matmul_precision`` (in the environment
    ``JAX_DEFAULT_MATMUL_PRECISION``) does not ask for `EXACT` products: TF32, with 10 bits behind
    the point instead of 23, on GPUs of compute capability 8.0 and above, bfloat16 on TPUs.
    """
    if jax.config.jax_default_matmul_precision in EXACT:  # type: ignore[attr-defined]
        return "float32"
    if device.platform == "tpu":
        return "bfloat16"
    return "tf32" if _compute_capability(device) >= 8 else "float32"


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays that lie whole on every device of a mesh; as they are where there is none."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def weights_spec(shape: Sequence[int], shards: int) -> PartitionSpec:
    """How an array of weights is divided into so many parts.

    Matrices and larger arrays are divided along their last axis, which of a kernel ``[in, out]`` is
    that of its outputs: each output is then a whole sum on one device.  Where it is no multiple of
    ``shards``, along the last axis that is one; where none is, and of vectors, not at all.

    Args:
      shape: of the array.
      shards: parts, at least 1.
    """
    axes = [i for i, size in enumerate(shape) if size % shards == 0]
    if len(shape) < 2 or not axes:
        return PartitionSpec()
    return PartitionSpec(*(None,) * axes[-1], WEIGHTS)


def weights_place(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Where an array of weights lies on a mesh, by `weights_spec`."""
    return NamedSharding(mesh, weights_spec(shape, mesh.shape[WEIGHTS]))


def place_weights(mesh: Mesh | None, tree: Any) -> Any:
    """A model's weights on a mesh, each divided as `weights_spec` says; as they are without one.

    Args:
      mesh: of `make_mesh`.
      tree: arrays; those on the host go to each device in parts, and nowhere as a whole.
    """
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, weights_place(mesh, np.shape(x))), tree)


def divide(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays whose leading axis is divided among the devices of a mesh.

    Those whose leading axis is no multiple of `rows` lie whole on each, and each computes all that
    comes of them.

    Args:
      mesh: of `make_mesh`.
      tree: arrays, all with a leading axis of one length.
    """
    if mesh is None:
        return tree
    length = len(jax.tree.leaves(tree)[0])
    spec = PartitionSpec(AXIS) if length % rows(mesh) == 0 else PartitionSpec()
    return jax.device_put(tree, NamedSharding(mesh, spec))


def map_chunks(
    function: Callable[..., Any], arrays: tuple[Any, ...], *, size: int, mesh: Mesh | None = None
) -> Any:
    """``function`` of each row of some arrays, so many rows at a time.

    Args:
      function: of one row of each of ``arrays``, traceable.
      arrays: pytrees of arrays with a leading axis of one length ``C``.
      size: rows at a time, at least 1.  On a mesh the next multiple of its `rows`, each of which
        takes an equal part; the last rows are repeated where there are too few.
      mesh: of `make_mesh`.

    Returns:
      the function's values, a leading axis ``C``.
    """
    if mesh is None:
        return jax.lax.map(lambda row: function(*row), arrays, batch_size=size)
    count = len(jax.tree.leaves(arrays)[0])
    size = rows(mesh) * math.ceil(size / rows(mesh))
    chunks = math.ceil(count / size)
    taken = jnp.minimum(jnp.arange(chunks * size), count - 1).reshape(chunks, size)
    placed = NamedSharding(mesh, PartitionSpec(None, AXIS))
    parts = jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(jnp.take(x, taken, axis=0), placed), arrays
    )
    values = jax.lax.map(lambda part: jax.vmap(function)(*part), parts)
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:count], values)
