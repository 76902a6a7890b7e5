"""Steps ahead along the path of training, after NExt (Chen et al. 2026, arXiv 2604.11446)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpocem_jax.utils.settings import whole


class ExtrapolatedState(NamedTuple):
    """State of `extrapolated`.

    Attributes:
      base: of Adam.
      updates: done, int32 ``[]``.
      path: the offsets before the last ``every`` updates, each leaf with a leading axis ``every``.
    """

    base: Any
    updates: jax.Array
    path: Any


def extrapolated(
    learning_rate: optax.ScalarOrSchedule,
    *,
    every: int = 25,
    ahead: int = 10,
    degree: int = 1,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW that after every ``every`` updates also goes where the path of these leads.

    A polynomial in time is fitted to the last ``every`` points of each number by least squares, and
    its change over the next ``ahead`` updates is added.  NExt trains a network that predicts the
    leading singular vectors of a LoRA's path; here the path itself is a few thousand numbers, and a
    polynomial stands for the network.

    Args:
      learning_rate: or a schedule.
      every: updates between two steps ahead, above ``degree``.
      ahead: updates that a step ahead stands for, at least 0; 0 is AdamW.
      degree: of the polynomial, at least 1.
      weight_decay: as of `optax.adamw`.

    Raises:
      InputError: a value outside its range.
    """
    ahead, degree = whole("ahead", ahead, 0), whole("degree", degree)
    every = whole("every", every, degree + 1)
    base = optax.adamw(learning_rate, weight_decay=weight_decay)
    # What is fitted is linear in the points, so the change is a fixed sum of them.
    times = np.arange(every) / every
    design = np.vander(times, degree + 1)
    now, then = np.vander([times[-1], times[-1] + ahead / every], degree + 1)
    change = (then - now) @ np.linalg.pinv(design)

    def init(offsets: Any) -> ExtrapolatedState:
        path = jax.tree.map(lambda x: jnp.zeros((every, *jnp.shape(x)), x.dtype), offsets)
        return ExtrapolatedState(base.init(offsets), jnp.int32(0), path)

    def update(
        gradient: Any, state: ExtrapolatedState, offsets: Any = None
    ) -> tuple[Any, ExtrapolatedState]:
        updates, inner = base.update(gradient, state.base, offsets)
        place = state.updates % every
        path = jax.tree.map(lambda all_, x: all_.at[place].set(x), state.path, offsets)
        due = place == every - 1

        def step(update: jax.Array, points: jax.Array) -> jax.Array:
            further = jnp.tensordot(jnp.asarray(change, points.dtype), points, axes=1)
            return update + jnp.where(due, further, 0.0)

        updates = jax.tree.map(step, updates, path)
        return updates, ExtrapolatedState(inner, state.updates + 1, path)

    return optax.GradientTransformation(init, update)
