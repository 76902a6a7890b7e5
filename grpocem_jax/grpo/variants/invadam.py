"""InvAdam and DualAdam (Shi et al. 2026, arXiv 2603.07122): Adam with its scale turned over."""

import jax
import jax.numpy as jnp
import optax

from grpocem_jax.utils.settings import above, below, number, within


def invadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Updates ``-rate m sqrt(v)`` instead of Adam's ``-rate m / sqrt(v)``.

    With the bias-corrected moments ``m`` and ``v`` of Adam.  A parameter whose gradient is large
    gets a larger step, and the step is of the size of a squared gradient, so that the rate is
    another than Adam's.  DualAdam mixes both; that the mixture is fixed is ours, as is the root.

    Args:
      learning_rate: or a schedule.
      adam: weight of Adam's update beside ``1 - adam`` of this one, from 0 to 1: DualAdam.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of Adam's quotient, above 0.

    Raises:
      InputError: a value outside its range.
    """
    adam, eps = number("adam", adam, within(0, 1)), number("eps", eps, above(0))
    b1, b2 = number("b1", b1, below(0, 1)), number("b2", b2, below(0, 1))

    def init(offsets: optax.Params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, offsets)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, zeros)

    def update(
        gradient: optax.Updates, state: optax.ScaleByAdamState, offsets: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del offsets
        count = state.count + 1
        mu = optax.tree_utils.tree_update_moment(gradient, state.mu, b1, 1)
        nu = optax.tree_utils.tree_update_moment(gradient, state.nu, b2, 2)
        m = optax.tree_utils.tree_bias_correction(mu, b1, count)
        v = optax.tree_utils.tree_bias_correction(nu, b2, count)
        updates = jax.tree.map(
            lambda m, v: m * (adam / (jnp.sqrt(v) + eps) + (1 - adam) * jnp.sqrt(v)), m, v
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )
