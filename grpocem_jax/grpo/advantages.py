"""Advantages: what a completion's rewards say of each of its tokens (eqs. 3-5 and 7).

An advantage function is ``(rewards, step_rewards, tokens, mask) -> advantages``, see `Advantages`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grpocem_jax.utils.errors import InputError

Advantages = Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike], ArrayLike]
"""An advantage function: ``(rewards, step_rewards, tokens, mask) -> advantages``.

- rewards: float32 ``[P, G]``, NaN where the reward function abstained.
- step_rewards: float32 ``[P, G, N]``, the reward of a step at the step's last token, NaN at every
  other token; a completion that abstained has no step.
- tokens: int32 ``[P, G, N]``.
- mask: bool ``[P, G, N]``.

It returns finite float32 ``[P, G, N]``, also where rewards are NaN. Training calls it once a step,
not inside `jax.jit`, with NumPy arrays of whole steps that it may write to.
"""

SUPERVISIONS = ("outcome", "process")
EQUAL = 1e-6
"""Rewards of a group closer together than this are equal: the group carries no signal."""


def group_normalize(rewards: ArrayLike, present: ArrayLike | None = None) -> jax.Array:
    """Eq. 3: ``(r - mean(r)) / std(r)`` over the last axis, population standard deviation.

    Args:
      rewards: float ``[..., G]``; NaN where the reward function abstained.
      present: bool ``[..., G]``, which entries exist; by default those that are not NaN.

    Returns:
      float ``[..., G]``: zero where not present, and zero for a whole group whose rewards are
      equal (their range is at most `EQUAL`): dividing rounding errors by an epsilon would turn
      them into advantages.
    """
    rewards = jnp.asarray(rewards)
    present = ~jnp.isnan(rewards) if present is None else jnp.asarray(present)
    count = jnp.maximum(jnp.sum(present, -1, keepdims=True), 1)
    rewards = jnp.where(present, rewards, 0.0)
    mean = jnp.sum(rewards, -1, keepdims=True) / count
    centred = jnp.where(present, rewards - mean, 0.0)
    std = jnp.sqrt(jnp.sum(centred**2, -1, keepdims=True) / count)
    flat = equal_rewards(rewards, present)[..., None]
    return jnp.where(flat, 0.0, centred / jnp.where(flat, 1.0, std))


@jax.jit
def equal_rewards(rewards: ArrayLike, present: ArrayLike) -> jax.Array:
    """Whether all present rewards of a group are equal to within `EQUAL`; bool ``[...]``."""
    high = jnp.max(jnp.where(present, rewards, -jnp.inf), -1)
    low = jnp.min(jnp.where(present, rewards, jnp.inf), -1)
    return ~(high - low > EQUAL)


def informative_first(rewards: np.ndarray, count: int) -> np.ndarray:
    """The groups to train on of more that were drawn, as in DAPO's dynamic sampling.

    A group whose rewards are all equal has no advantages and teaches nothing (Yu et al. 2025, arXiv
    2503.14476, eq. 11).  DAPO draws until it has enough others; here the number drawn is fixed, and
    groups without signal fill up what is missing.

    Args:
      rewards: float ``[P, G]``, NaN where abstained.
      count: groups to take, at most ``P``.

    Returns:
      int ``[count]``, rows of ``rewards`` in ascending order.
    """
    flat = np.asarray(equal_rewards(rewards, ~np.isnan(rewards)))
    return np.sort(np.argsort(flat, kind="stable")[:count])


@jax.jit
def scale_and_clip(advantages: jax.Array, *, scale: float = 0.1, clip: float = 3.0) -> jax.Array:
    """Eq. 7: ``clip(scale * z, -clip, clip)`` of group-normalised rewards ``z``."""
    return jnp.clip(scale * advantages, -clip, clip)


@jax.jit
def outcome_advantages(rewards: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Outcome supervision: every token of a completion gets its group-normalised reward.

    Args:
      rewards: float ``[P, G]``, NaN where abstained.
      mask: bool ``[P, G, N]``.

    Returns:
      float ``[P, G, N]``, zero off the mask.

    Raises:
      InputError: rewards of another shape than the completions of the mask.
    """
    rewards, mask = jnp.asarray(rewards), jnp.asarray(mask)
    _check_shape("rewards", rewards, mask.shape[:-1], mask)
    return jnp.where(mask, group_normalize(rewards)[..., None], 0.0)


def _check_shape(name: str, given: jax.Array, wanted: tuple[int, ...], mask: jax.Array) -> None:
    if given.shape != wanted:
        raise InputError(
            f"{name} of shape {given.shape}: must have shape {wanted} for a mask of shape "
            f"{mask.shape}."
        )


@jax.jit
def process_advantages(step_rewards: ArrayLike, step_ends: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Process supervision, eqs. 4-5: a token's advantage sums the rewards of the steps that end
    at or after it, normalised over all steps of the group.

    Args:
      step_rewards: float ``[P, G, N]``, the reward of a step at the step's last token.
      step_ends: bool ``[P, G, N]``, True at the last token of each step; a completion without any
        abstains.
      mask: bool ``[P, G, N]``.

    Returns:
      float ``[P, G, N]``, zero off the mask. A completion with a single step at its end gets what
      `outcome_advantages` would give where every completion of the group has one step.

    Raises:
      InputError: arrays of different shapes.
    """
    step_rewards, step_ends = jnp.asarray(step_rewards), jnp.asarray(step_ends)
    mask = jnp.asarray(mask)
    _check_shape("step_rewards", step_rewards, mask.shape, mask)
    _check_shape("step_ends", step_ends, mask.shape, mask)
    groups = (*step_rewards.shape[:-2], -1)
    normalized = group_normalize(step_rewards.reshape(groups), step_ends.reshape(groups))
    normalized = normalized.reshape(step_rewards.shape)
    to_come = jnp.flip(jnp.cumsum(jnp.flip(normalized, -1), -1), -1)
    return jnp.where(mask, to_come, 0.0)


def group_advantages(
    rewards: ArrayLike,
    step_rewards: ArrayLike,
    tokens: ArrayLike,
    mask: ArrayLike,
    *,
    supervision: str = "outcome",
) -> jax.Array:
    """Group-relative advantages of outcomes (eq. 3) or of steps (eqs. 4-5).

    Args:
      rewards: as in `Advantages`, like the next three.
      step_rewards: read where ``supervision`` is ``process``.
      tokens: not read.
      mask: bool ``[P, G, N]``.
      supervision: ``outcome`` or ``process``.

    Returns:
      float32 ``[P, G, N]``, zero off the mask.

    Raises:
      InputError: another ``supervision``.
    """
    if supervision not in SUPERVISIONS:
        raise InputError(f"supervision={supervision!r}: must be one of {', '.join(SUPERVISIONS)}.")
    if supervision == "outcome":
        return outcome_advantages(rewards, mask)
    ends = ~jnp.isnan(jnp.asarray(step_rewards))
    return process_advantages(jnp.where(ends, step_rewards, 0.0), ends, mask)


def scaled_advantages(
    rewards: ArrayLike,
    step_rewards: ArrayLike,
    tokens: ArrayLike,
    mask: ArrayLike,
    *,
    supervision: str = "outcome",
    scale: float = 0.1,
    clip: float = 3.0,
) -> jax.Array:
    """Eq. 7 of `group_advantages`, whose arguments these are; see `scale_and_clip`."""
    found = group_advantages(rewards, step_rewards, tokens, mask, supervision=supervision)
    return scale_and_clip(found, scale=scale, clip=clip)
