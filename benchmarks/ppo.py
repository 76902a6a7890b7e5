"""PPO (Schulman et al. 2017, arXiv 1707.06347), as far as its memory needs it.

The policy, its reference, the rollouts and the micro-batches are those of `grpocem_jax.grpo`; what
differs is the critic, and that advantages come from its values (GAE, arXiv 1506.02438).  Two
critics: a model of its own, all of whose weights are trained, as in RLHF as it is usually set up;
and a linear value head on the policy's hidden states.  Nothing here was tuned to learn.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpocem_jax import grpo
from grpocem_jax.likelihood import token_logps
from grpocem_jax.models.base import Model, Params

DISCOUNT = 1.0
TRACE = 0.95
VALUE_WEIGHT = 0.5


class Batch(NamedTuple):
    """One step's rollouts; arrays as in `grpo.Batch`.

    Attributes:
      prompts: int32 ``[P, S]``.
      prompt_mask: bool ``[P, S]``.
      completions: int32 ``[P, G, N]``.
      mask: bool ``[P, G, N]``.
      old_logps: float32 ``[P, G, N]``.
      rewards: float32 ``[P, G]``.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    completions: jax.Array
    mask: jax.Array
    old_logps: jax.Array
    rewards: Any


class Trainable(NamedTuple):
    """What PPO trains.

    Attributes:
      adapter: the policy's offsets.
      head: float32 ``[D]``, weights of the value head.
      critic: all parameters of the critic, or None where the policy's hidden states serve.
    """

    adapter: Any
    head: jax.Array
    critic: Params | None


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """The records of the policy's model and of the critic's (its own kernels, no factors)."""

    policy: Model
    critic: Model


def hidden_states(model: Model, params: Params, adapter: Any, batch: Batch) -> jax.Array:
    """The states that predict each completion token, float32 ``[P, G, N, D]``."""

    def group(prompt: Any, prompt_mask: Any, completions: Any, masks: Any) -> jax.Array:
        last, context = model.prefill(params, adapter, prompt, prompt_mask)

        def one(tokens: jax.Array, mask: jax.Array) -> jax.Array:
            hidden = model.forward(params, adapter, tokens[:-1], mask[:-1], context)
            return jnp.concatenate([last[None], hidden])

        return jax.vmap(one)(completions, masks)

    return jax.vmap(group)(batch.prompts, batch.prompt_mask, batch.completions, batch.mask)


def advantages(rewards: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Generalized advantage estimates; the reward comes at the last token.

    Args:
      rewards: float32 ``[...]``.
      values: float32 ``[..., N]``.
      mask: bool ``[..., N]``.

    Returns:
      float32 ``[..., N]``, zero off the mask.
    """
    following = jnp.where(mask[..., 1:], values[..., 1:], 0.0)
    following = jnp.concatenate([following, jnp.zeros_like(values[..., :1])], -1)
    last = mask & (jnp.cumsum(mask, -1) == jnp.sum(mask, -1, keepdims=True))
    delta = jnp.where(last, rewards[..., None], 0.0) + DISCOUNT * following - values

    def back(trace: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        change, there = part
        trace = jnp.where(there, change + DISCOUNT * TRACE * trace, 0.0)
        return trace, trace

    steps = (jnp.moveaxis(delta, -1, 0), jnp.moveaxis(mask, -1, 0))
    _, traces = jax.lax.scan(back, jnp.zeros(rewards.shape), steps, reverse=True)
    return jnp.moveaxis(traces, 0, -1)


def loss(
    trainable: Trainable,
    params: Params,
    batch: Batch,
    weights: jax.Array,
    temperature: jax.Array,
    *,
    models: Models,
    hp: grpo.Hyperparameters,
) -> jax.Array:
    """The clipped objective with KL and entropy terms as in `grpo.loss`, plus the value loss."""

    def judged(adapter: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden = hidden_states(models.policy, params, adapter, batch)
        score = functools.partial(
            token_logps,
            models.policy,
            params,
            temperature=temperature,
            keep_logits=grpo.keep_logits(batch.completions.size, models.policy),
        )
        return hidden, *jax.vmap(jax.vmap(score))(hidden, batch.completions)

    hidden, logps, entropies = judged(trainable.adapter)
    if trainable.critic is not None:
        hidden = hidden_states(models.critic, trainable.critic, {}, batch)
    values = hidden @ trainable.head
    estimates = advantages(batch.rewards, jax.lax.stop_gradient(values), batch.mask)
    returns = estimates + jax.lax.stop_gradient(values)
    objective = grpo.clipped_objective(logps, batch.old_logps, estimates, clip=hp.clip)
    total = VALUE_WEIGHT * (values - returns) ** 2 - objective - hp.entropy * entropies
    if hp.beta:
        zero = jax.tree.map(jnp.zeros_like, trainable.adapter)
        _, ref_logps, _ = jax.lax.stop_gradient(judged(zero))
        total = total + hp.beta * grpo.k3_divergence(logps, ref_logps)
    return jnp.sum(weights * total)


@functools.partial(
    jax.jit,
    static_argnames=("models", "hp"),
    donate_argnames=("trainable", "opt_state"),
    compiler_options=grpo.MEMORY_FIRST,
)
def update(
    trainable: Trainable,
    opt_state: Any,
    params: Params,
    batch: Batch,
    temperature: jax.Array,
    *,
    models: Models,
    hp: grpo.Hyperparameters,
) -> tuple[Trainable, Any]:
    """One optimizer step, gradients accumulated over micro-batches as in `grpo.update`."""
    weights = grpo.token_weights(batch.mask, hp.aggregation)
    size = hp.micro_batch // batch.completions.shape[1]
    micro = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (batch, weights))
    gradient = jax.grad(functools.partial(loss, models=models, hp=hp))

    def accumulate(total: Trainable, part: Any) -> tuple[Trainable, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, params, *part, temperature)), None

    grads, _ = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, trainable), micro)
    direction, opt_state = grpo.optimizer(hp).update(grads, opt_state, trainable)
    return optax.apply_updates(
        trainable, jax.tree.map(lambda d: -hp.learning_rate * d, direction)
    ), opt_state
