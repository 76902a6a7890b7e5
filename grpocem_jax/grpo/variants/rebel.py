"""REBEL (Gao et al. 2024, arXiv 2404.16767): regression of relative rewards."""

import dataclasses

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.batch import Batch
from grpocem_jax.grpo.objectives import Objective
from grpocem_jax.utils.settings import above, number


@dataclasses.dataclass(frozen=True)
class _Rebel:
    eta: float

    def __call__(self, logps: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        trained = batch.weights != 0
        count = jnp.sum(trained, -1)
        log_ratio = jnp.sum(jnp.where(trained, logps - batch.old_logps, 0.0), -1)
        reward = jnp.sum(jnp.where(trained, batch.advantages, 0.0), -1) / jnp.maximum(count, 1)
        residual, present = log_ratio / self.eta - reward, count > 0
        number = jnp.maximum(jnp.sum(present, -1, keepdims=True), 1)
        mean = jnp.sum(jnp.where(present, residual, 0.0), -1, keepdims=True) / number
        square = jnp.where(present, residual - mean, 0.0) ** 2
        values = jnp.broadcast_to(-0.5 * self.eta * square[..., None], logps.shape)
        each = jnp.sum(batch.weights, -1)
        return values, {"rebel/squared_error": jnp.sum(each * square)}


def rebel(eta: float = 1.0) -> Objective:
    """The squared error of a completion's log-ratio as a prediction of its advantage.

    With ``d_i = log(pi(y_i) / pi_old(y_i)) / eta - A_i``, the value of every token of completion
    ``i`` is ``-eta/2 (d_i - mean(d))^2`` over the group: the paper's pair of completions, for all
    pairs of a group.  On the old policy its gradient is ``A_i - mean(A)`` times that of the
    completion's log-probability, not of its mean over tokens.  For advantages that are differences
    of rewards, not divided by their spread, use ``grpo.advantages=centred``.

    Args:
      eta: above 0; how far the policy goes for a reward of 1, in nats a completion.

    Returns:
      an `Objective` with the metric ``rebel/squared_error``. The completion's tokens are those of a
      weight above zero.

    Raises:
      InputError: ``eta`` is not above 0.
    """
    return _Rebel(number("eta", eta, above(0)))
