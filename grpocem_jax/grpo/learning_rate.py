"""The learning rate: linear warmup and decay, and a factor that follows the measured KL."""

import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, at_least, number, whole, within

FACTOR = 1.5
"""By how much a step raises or lowers the scale."""


def warmup(
    learning_rate: float, steps: int, *, total_steps: int = 0, final_scale: float = 1.0
) -> optax.Schedule:
    """Linear warmup over ``steps`` updates, then constant, or linear to the end of training.

    The first update has ``learning_rate / steps``, the last of the warmup ``learning_rate``, and
    the last of all ``final_scale * learning_rate``, unless the warmup is as long as the training.

    Args:
      learning_rate: the largest, above 0.
      steps: updates of the warmup, at least 0.
      total_steps: updates in all; 0 where their number is not known, and the rate stays constant.
      final_scale: from 0 to 1.

    Raises:
      InputError: a value outside its range; a schedule for ``learning_rate``.
    """
    if callable(learning_rate):
        raise InputError(
            f"learning_rate={learning_rate!r}: is a schedule, and this one has a warmup and a "
            "decay of its own; give its peak as a number, or use optax.adamw(your_schedule)."
        )
    learning_rate = number("learning_rate", learning_rate, above(0))
    steps = whole("warmup_steps", steps, 0)
    total_steps = whole("total_steps", total_steps, 0)
    final_scale = number("final_lr_scale", final_scale, within(0, 1))

    def schedule(count: jax.Array | int) -> jax.Array:
        done = jnp.asarray(count + 1, jnp.float32)
        rate = learning_rate * jnp.minimum(done / max(steps, 1), 1.0)
        if final_scale == 1 or not total_steps:
            return rate
        course = jnp.clip((done - steps) / max(total_steps - steps, 1), 0.0, 1.0)
        return rate * (1 - (1 - final_scale) * course)

    return schedule


class LearningRateState(NamedTuple):
    """The state of `adapt_to_kl`.

    Attributes:
      step: int32 ``[]``, updates done.
      scale: float32 ``[]``, factor of the next update.
      learning_rate: float32 ``[]``, of the last update, its factor included.
    """

    step: jax.Array
    scale: jax.Array
    learning_rate: jax.Array


def adapt_scale(
    scale: jax.Array, kl: jax.Array, target_kl: float, scale_range: tuple[float, float]
) -> jax.Array:
    """The next factor of the learning rate, see `adapt_to_kl`."""
    factor = jnp.where(kl > 2 * target_kl, 1 / FACTOR, jnp.where(kl < target_kl / 2, FACTOR, 1.0))
    return jnp.clip(scale * factor, *scale_range)


def adapt_to_kl(
    schedule: optax.Schedule,
    *,
    target_kl: float = 0.0,
    scale_range: tuple[float, float] = (0.1, 10.0),
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by a factor that follows the KL divergence, as in adaptive-KL PPO.

    The factor is divided by 1.5 after an update whose measured KL exceeds twice the target, and
    multiplied by 1.5 after one below half of it. Stands last in an `optax.chain`. Like
    `optax.contrib.reduce_on_plateau` it reads what it follows from an extra argument of the
    update, ``kl``, which `grpo.update` gives.

    Args:
      schedule: the learning rate by which the updates have been scaled; for the record in the
        state, and not applied again.
      target_kl: at least 0; at 0 the factor stays 1.
      scale_range: smallest and largest factor, above 0, with 1 between them.

    Raises:
      InputError: a value outside its range.
    """
    target_kl = number("target_kl", target_kl, at_least(0))
    bounds: Any = tuple(scale_range) if isinstance(scale_range, Iterable) else ()
    known = len(bounds) == 2 and all(isinstance(x, numbers.Real) for x in bounds)
    if not (known and 0 < bounds[0] <= 1 <= bounds[1]):
        raise InputError(
            f"lr_scale_range={scale_range!r}: must be two numbers above 0 with 1 between them."
        )

    def init(params: Any) -> LearningRateState:
        del params
        return LearningRateState(jnp.int32(0), jnp.float32(1.0), jnp.float32(0.0))

    def update(
        updates: Any,
        state: LearningRateState,
        params: Any = None,
        *,
        kl: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, LearningRateState]:
        del params, extra
        scale = state.scale
        rate = jnp.asarray(schedule(state.step) * scale, jnp.float32)
        if target_kl:
            if kl is None:
                raise InputError(
                    f"target_kl={target_kl} follows the KL divergence, which beta=0.0 leaves out; "
                    "set one of them otherwise."
                )
            updates = jax.tree.map(lambda x: x * scale, updates)
            scale = adapt_scale(scale, kl, target_kl, bounds)
        return updates, LearningRateState(state.step + 1, scale, rate)

    return optax.GradientTransformationExtraArgs(init, update)
