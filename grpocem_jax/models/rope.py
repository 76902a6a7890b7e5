"""Rotary positions (Su et al. 2021, arXiv 2104.09864), plain or with the scaling of Llama 3.1."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.models import conversion
from grpocem_jax.utils.errors import InputError

LLAMA3 = "llama3"
FIELDS = ("rope_parameters", "rope_scaling")
"""Where a config.json has the kind of positions: in transformers 5, and before."""


class Llama3Scaling(NamedTuple):
    """What stretches the low frequencies (``rope_type: llama3``), for longer texts than at first.

    Attributes:
      factor: by which the lowest frequencies are divided, at least 1.
      low: wavelengths above ``original_context / low`` are stretched by all of the factor.
      high: those below ``original_context / high`` are left alone; ``high`` is above ``low``.
      original_context: the context length before.
    """

    factor: float
    low: float
    high: float
    original_context: int

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """The scaled frequencies, float64 ``[n]`` as the given ones."""
        turns = self.original_context * frequencies / (2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles by which queries and keys are turned.

    Pair ``i`` of a head turns by ``position * theta ** (-2 i / head_dim)``, before scaling.

    Args:
      positions: int32 ``[T]``.
      head_dim: even.
      theta: the base.
      scaling: of the frequencies, or None.

    Returns:
      float32 ``[T, head_dim / 2]`` each.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns queries or keys ``[H, T, d]``; pair ``i`` is entries ``i`` and ``i + d / 2``."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[None], sin[None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def from_hf(fields: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    """The base and the scaling that a ``config.json``, the file ``where``, states.

    Raises:
      InputError: two that differ, or a kind of positions that is not implemented.
    """
    stated = {name: fields[name] for name in FIELDS if fields.get(name)}
    read = {name: _read(value, name, fields, where) for name, value in stated.items()}
    if len(set(read.values())) > 1:
        first, second = (f"{name}={value!r}" for name, value in stated.items())
        raise InputError(
            f"{where}: {first} and {second} differ; keep the one that the checkpoint was trained "
            "with."
        )
    if read:
        return next(iter(read.values()))
    return conversion.positive(fields.get("rope_theta", 1e4), "rope_theta", where), None


def _read(
    value: Any, name: str, fields: Mapping[str, Any], where: str
) -> tuple[float, Llama3Scaling | None]:
    stated = f"{where}: {name}={value!r}"
    left = dict(value) if isinstance(value, Mapping) else {"rope_type": value}
    kind = left.pop("type", "default")
    kind = left.pop("rope_type", kind)
    theta = left.pop("rope_theta", fields.get("rope_theta", 1e4))
    whole = left.pop("partial_rotary_factor", 1.0) == 1.0
    scaling = None
    if kind == LLAMA3:
        context = left.pop("original_max_position_embeddings", fields["max_position_embeddings"])
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (left.pop(name, None) for name in names)
        if (
            any(type(x) not in (int, float) for x in (factor, low, high))
            or not 1 <= factor < 1e38
            or not 0 < low < high < 1e38
            or type(context) is not int
            or not 1 <= context < 2**31
        ):
            raise InputError(
                f"{stated}: 'llama3' needs factor of at least 1, low_freq_factor above 0 and below "
                "high_freq_factor, and original_max_position_embeddings; use the checkpoint's own "
                "config.json."
            )
        scaling = Llama3Scaling(float(factor), float(low), float(high), context)
    if kind not in ("default", LLAMA3) or left or not whole:
        raise InputError(
            f"{stated} is not implemented (only 'default', plain rotary positions, and 'llama3' "
            "are); use a checkpoint without other rope scaling."
        )
    return conversion.positive(theta, "rope_theta", where), scaling


def to_hf(theta: float, scaling: Llama3Scaling | None) -> dict[str, Any]:
    """The fields of a ``config.json``, as all versions of transformers read them."""
    if scaling is None:
        return {"rope_theta": theta}
    return {
        "rope_theta": theta,
        "rope_scaling": {
            "rope_type": LLAMA3,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_context,
        },
    }
