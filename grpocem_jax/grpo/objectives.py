"""Objectives: what is maximised at each token, and the penalties beside it.

An objective is ``(logps, batch) -> (values, metrics)``, see `Objective`. A variant of the method is
one more function that returns one.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpocem_jax.grpo.batch import Batch
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, number

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""An objective: ``(logps, batch) -> (values, metrics)``.

- logps: float32 ``[P, G, N]``, log-probabilities of the completions' tokens under the policy that
  is trained.
- batch: the rollouts. Where ``batch.weights`` is zero a token is not trained, and ``logps``,
  ``old_logps`` and ``advantages`` are zero. With `Batch.positions`, all of them are at these
  positions, ``[P, G, K]``.

It returns values float32 ``[P, G, N]``, finite, of which ``sum(batch.weights * values)`` is
maximised, and a dict of metrics, float32 scalars. Each is a sum weighted by ``batch.weights``, so
that those of micro-batches add up to the step's. It must be traceable and differentiable, and
hashable, since it is a static argument of `grpo.update`: one that equals another is not compiled
again.

An objective with an attribute ``needs = ("reference",)`` gets ``reference`` as a keyword too: the
log-probabilities of the tokens under the reference policy, zero where not trained.
"""

RATIOS = ("token", "sequence")

STEEP = 20.0
"""The log-ratio in nats up to which `k3_divergence` is exponential."""


def clipped_objective(
    ratio: jax.Array, advantages: jax.Array, *, low: float = 0.2, high: float = 0.2
) -> jax.Array:
    """``min(rho A, clip(rho, 1 - low, 1 + high) A)`` per token, eq. 1's clipped policy ratio."""
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)


def sequence_log_ratio(log_ratio: jax.Array, trained: jax.Array) -> jax.Array:
    """The mean of a completion's log-ratios, at every token of it (GSPO, arXiv 2507.18071).

    Its value is the logarithm of GSPO's ``s_i = (pi(y) / pi_old(y))^(1/|y|)``. Its gradient is that
    of the token's own log-ratio, GSPO-token (eq. 14 there), which equals GSPO's where all tokens
    of a completion share advantage and weight and holds for tokens of different advantages too.

    Args:
      log_ratio: float32 ``[..., N]``.
      trained: bool ``[..., N]``, the tokens that count.

    Returns:
      float32 ``[..., N]``; the number of ``trained`` tokens may be zero.
    """
    count = jnp.maximum(jnp.sum(trained, -1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(trained, log_ratio, 0.0), -1, keepdims=True) / count
    return jax.lax.stop_gradient(mean - log_ratio) + log_ratio


@dataclasses.dataclass(frozen=True)
class _Clipped:
    low: float
    high: float
    ratio: str

    def __call__(self, logps: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_ratio = logps - batch.old_logps
        if self.ratio == "sequence":
            log_ratio = sequence_log_ratio(log_ratio, batch.weights != 0)
        ratio = jnp.exp(log_ratio)
        values = clipped_objective(ratio, batch.advantages, low=self.low, high=self.high)
        low = jnp.sum(batch.weights * ((ratio < 1 - self.low) & (batch.advantages < 0)))
        high = jnp.sum(batch.weights * ((ratio > 1 + self.high) & (batch.advantages > 0)))
        return values, {
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low + high,
        }


def clipped(low: float = 0.2, high: float = 0.2, ratio: str = "token") -> Objective:
    """The clipped policy ratio of PPO and GRPO, eq. 1.

    Args:
      low: the ratio is clipped at ``1 - low``, above 0.
      high: the ratio is clipped at ``1 + high``, above 0; larger than ``low`` in DAPO (arXiv
        2503.14476, section 3.1).
      ratio: ``token``: a ratio for each token. ``sequence``: the geometric mean of a completion's
        ratios, for all its tokens (GSPO, arXiv 2507.18071), whose range is some hundred times
        smaller.

    Returns:
      an `Objective` with the metrics ``clip_ratio/low_mean``, ``high_mean`` and ``region_mean``,
      the share of the weights whose ratio is clipped. Equal settings give equal objectives.

    Raises:
      InputError: a value outside its range.
    """
    low, high = number("low", low, above(0)), number("high", high, above(0))
    if ratio not in RATIOS:
        raise InputError(f"ratio={ratio!r}: must be one of {', '.join(RATIOS)}.")
    return _Clipped(low, high, ratio)


def check_called(objective: Objective) -> None:
    """Refuses a function that makes objectives, such as `clipped`, in the place of one.

    Raises:
      InputError: it can do without arguments, of which an objective needs two.
    """
    try:
        parameters = inspect.signature(objective).parameters.values()
    except (TypeError, ValueError):  # of what is no function, or tells nothing
        return
    if all(x.default is not x.empty for x in parameters):
        name = getattr(objective, "__name__", repr(objective))
        raise InputError(
            f"objective={name}: needs no arguments, so it makes objectives and is none; call it, "
            f"as in objective={name}()."
        )


def k3_divergence(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Eq. 6: ``exp(u) - u - 1`` with ``u = ref_logp - logp``, an unbiased estimate of
    KL(policy || reference) per token, never negative (Schulman's k3).

    Beyond ``u`` = `STEEP` it goes on along its tangent: its gradient there is already 5e8 and no
    update gets more from a larger one, but a single such token must not make the loss infinite.
    """
    u = ref_logps - logps
    inside = jnp.minimum(u, STEEP)
    # Apart, so that the tangent's slope does not drown the gradient of small log-ratios.
    beyond = jnp.maximum(u - STEEP, 0.0)
    return jnp.expm1(inside) - inside + math.expm1(STEEP) * beyond
