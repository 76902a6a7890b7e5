"""PPO (Schulman et al. 2017, arXiv 1707.06347), as far as its memory needs it.

The step is `grpocem_jax.grpo.update` with its objective and optimizer; what differs is the loss,
which has a critic and makes advantages of its values (GAE, arXiv 1506.02438).  In the batch
``advantages`` are the rewards of tokens.  Two critics: a model of its own, all of whose weights are
trained, as in RLHF as it is usually set up; and a linear value head on the policy's hidden states.
Nothing here was tuned to learn.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax import grpo
from grpocem_jax.models.base import Model, Params
from grpocem_jax.models.likelihood import token_logps
from grpocem_jax.training.update import MEMORY_FIRST

DISCOUNT = 1.0
TRACE = 0.95
VALUE_WEIGHT = 0.5


class Trainable(NamedTuple):
    """What PPO trains.

    Attributes:
      offsets: the policy's offsets.
      head: float32 ``[D]``, weights of the value head.
      critic: all parameters of the critic, or None where the policy's hidden states serve.
    """

    offsets: Any
    head: jax.Array
    critic: Params | None


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """The records of the policy's model and of the critic's (its own kernels, no factors)."""

    policy: Model
    critic: Model


def hidden_states(model: Model, params: Params, offsets: Any, batch: grpo.Batch) -> jax.Array:
    """The states that predict each completion token, float32 ``[P, G, N, D]``."""

    def group(prompt: Any, prompt_mask: Any, completions: Any, masks: Any) -> jax.Array:
        last, context = model.prefill(params, offsets, prompt, prompt_mask)

        def one(tokens: jax.Array, mask: jax.Array) -> jax.Array:
            hidden = model.forward(params, offsets, tokens[:-1], mask[:-1], context)
            return jnp.concatenate([last[None], hidden])

        return jax.vmap(one)(completions, masks)

    return jax.vmap(group)(batch.prompts, batch.prompt_mask, batch.completions, batch.mask)


def advantages(rewards: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Generalized advantage estimates.

    Args:
      rewards: float32 ``[..., N]``, of tokens.
      values: float32 ``[..., N]``.
      mask: bool ``[..., N]``.

    Returns:
      float32 ``[..., N]``, zero off the mask.
    """
    following = jnp.where(mask[..., 1:], values[..., 1:], 0.0)
    following = jnp.concatenate([following, jnp.zeros_like(values[..., :1])], -1)
    delta = rewards + DISCOUNT * following - values

    def back(trace: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        change, there = part
        trace = jnp.where(there, change + DISCOUNT * TRACE * trace, 0.0)
        return trace, trace

    steps = (jnp.moveaxis(delta, -1, 0), jnp.moveaxis(mask, -1, 0))
    _, traces = jax.lax.scan(back, jnp.zeros(rewards.shape[:-1]), steps, reverse=True)
    return jnp.moveaxis(traces, 0, -1)


def loss(
    trainable: Trainable,
    params: Params,
    batch: grpo.Batch,
    temperature: jax.Array,
    *,
    model: Models,
    objective: grpo.Objective,
    beta: float,
    entropy: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`grpo.loss` with advantages from the critic, plus the value loss."""

    def judged(offsets: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden = hidden_states(model.policy, params, offsets, batch)
        score = functools.partial(
            token_logps,
            model.policy,
            params,
            temperature=temperature,
            keep_logits=grpo.keep_logits(batch.completions.size, model.policy),
        )
        return hidden, *jax.vmap(jax.vmap(score))(hidden, batch.completions)

    hidden, logps, entropies = judged(trainable.offsets)
    if trainable.critic is not None:
        hidden = hidden_states(model.critic, trainable.critic, {}, batch)
    values = hidden @ trainable.head
    estimates = advantages(batch.advantages, jax.lax.stop_gradient(values), batch.mask)
    returns = estimates + jax.lax.stop_gradient(values)
    total, metrics = grpo.surrogate(
        logps,
        entropies,
        lambda: judged(jax.tree.map(jnp.zeros_like, trainable.offsets))[1],
        batch._replace(advantages=estimates),
        objective=objective,
        beta=beta,
        entropy=entropy,
    )
    value_loss = jnp.sum(batch.weights * (values - returns) ** 2)
    total = total + VALUE_WEIGHT * value_loss
    return total, metrics | {"loss": total, "value_loss": value_loss}


update = jax.jit(
    functools.partial(grpo.update, loss=loss),
    static_argnames=tuple(name for name in grpo.STATIC if name != "loss"),
    donate_argnames=("state",),
    compiler_options=MEMORY_FIRST,
)
"""`grpo.update` with this loss; the state before it is given up."""
