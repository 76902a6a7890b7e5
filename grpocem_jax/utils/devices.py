"""One program for one device and for many of a process; `processes` is about several of those.

Parameters and adapters lie on every device; the prompts of a batch and the candidates of a
population are divided among them.  The functions themselves know nothing of it: arrays say where
they lie, and XLA's partitioner does the rest (GSPMD, Xu et al. 2021, arXiv 2105.04663).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
"""The only axis of a mesh: prompts of a batch, or candidates of a population."""


def make_mesh(devices: Sequence[jax.Device]) -> Mesh | None:
    """A mesh of some devices; None for one, for which nothing has to be placed."""
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def sharing(count: int) -> Mesh | None:
    """A mesh of as many of this process's devices as share ``count`` prompts evenly."""
    return make_mesh(jax.local_devices()[: math.gcd(jax.local_device_count(), count)])


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
    try:
        capability = float(device.compute_capability)
    except (AttributeError, ValueError):  # no GPU of NVIDIA's
        return "float32"
    return "bfloat16" if capability >= 8 else "float16" if capability >= 7 else "float32"


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays that lie whole on every device of a mesh; as they are where there is none."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def divide(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays whose leading axis is divided among the devices of a mesh.

    Those whose leading axis is no multiple of the number of devices lie whole on each, and each
    computes all that comes of them.

    Args:
      mesh: of `make_mesh`.
      tree: arrays, all with a leading axis of one length.
    """
    if mesh is None:
        return tree
    length = len(jax.tree.leaves(tree)[0])
    spec = PartitionSpec(AXIS) if length % mesh.size == 0 else PartitionSpec()
    return jax.device_put(tree, NamedSharding(mesh, spec))


def map_chunks(
    function: Callable[..., Any], arrays: tuple[Any, ...], *, size: int, mesh: Mesh | None = None
) -> Any:
    """``function`` of each row of some arrays, so many rows at a time.

    Args:
      function: of one row of each of ``arrays``, traceable.
      arrays: pytrees of arrays with a leading axis of one length ``C``.
      size: rows at a time, at least 1.  On a mesh the next multiple of its devices, each of which
        takes an equal part; the last rows are repeated where there are too few.
      mesh: of `make_mesh`.

    Returns:
      the function's values, a leading axis ``C``.
    """
    if mesh is None:
        return jax.lax.map(lambda row: function(*row), arrays, batch_size=size)
    count = len(jax.tree.leaves(arrays)[0])
    size = mesh.size * math.ceil(size / mesh.size)
    chunks = math.ceil(count / size)
    rows = jnp.minimum(jnp.arange(chunks * size), count - 1).reshape(chunks, size)
    placed = NamedSharding(mesh, PartitionSpec(None, AXIS))
    parts = jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(jnp.take(x, rows, axis=0), placed), arrays
    )
    values = jax.lax.map(lambda part: jax.vmap(function)(*part), parts)
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:count], values)
