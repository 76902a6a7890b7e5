"""One optimizer step's rollouts, as objectives and `grpo.update` take them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.utils.errors import InputError


class Batch(NamedTuple):
    """The rollouts of ``P`` prompts, ``G`` samples each, at most ``N`` tokens.

    ``mask`` says which tokens exist: the model attends to them and they take a position.
    ``weights`` says which of them are trained, and how their losses add up. A token with a weight
    of zero is context: the output of a tool, or one that a method leaves out.

    Attributes:
      prompts: int32 ``[P, S]``, padded on the left.
      prompt_mask: bool ``[P, S]``.
      completions: int32 ``[P, G, N]``.
      mask: bool ``[P, G, N]``.
      old_logps: float32 ``[P, G, N]``, log-probabilities at the time of sampling; any finite
        numbers where the weight is zero.
      advantages: float32 ``[P, G, N]``; any finite numbers where the weight is zero.
      weights: float32 ``[P, G, N]``, at least 0, zero off the mask; those of a whole step, so that
        micro-batches add up (`token_weights`).
      positions: int32 ``[P, G, K]``, or None for all. Distinct positions in ``0..N-1`` that include
        every token of a weight above zero; log-probabilities are computed there and nowhere else,
        so the head of the model sees ``K`` states of a completion instead of ``N``.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    completions: jax.Array
    mask: jax.Array
    old_logps: jax.Array
    advantages: jax.Array
    weights: jax.Array
    positions: jax.Array | None = None


AXES = {
    "completions": "PGN",
    "mask": "PGN",
    "old_logps": "PGN",
    "advantages": "PGN",
    "weights": "PGN",
    "prompts": "PS",
    "prompt_mask": "PS",
    "positions": "PGK",
}
"""The axes of each field of a `Batch`, in the order in which `check_shapes` reads their lengths."""


def check_shapes(batch: Batch) -> None:
    """Refuses a batch whose fields do not fit each other, as they could broadcast.

    Raises:
      InputError: a field that is no array, or has another shape than `Batch` says.
    """
    sizes: dict[str, int] = {}
    for name, axes in AXES.items():
        array = getattr(batch, name)
        if name == "positions" and array is None:
            continue
        shape = getattr(array, "shape", ())
        fits = len(shape) == len(axes) and all(
            sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            found = f"is {type(array).__name__}" if shape == () else f"has shape {shape}"
            wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
            raise InputError(f"batch.{name} {found}: must be an array of shape [{wanted}].")


def seen_by_objective(batch: Batch) -> Batch:
    """The batch at its ``positions``, with zero log-probability and advantage where untrained."""
    if batch.positions is not None:
        names = ("completions", "mask", "old_logps", "advantages", "weights")
        picked = {
            name: jnp.take_along_axis(getattr(batch, name), batch.positions, -1) for name in names
        }
        batch = batch._replace(**picked)
    trained = batch.weights != 0
    return batch._replace(
        old_logps=jnp.where(trained, batch.old_logps, 0.0),
        advantages=jnp.where(trained, batch.advantages, 0.0),
    )
