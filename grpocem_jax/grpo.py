"""Group Relative Policy Optimization: advantages, loss and update, as pure functions of arrays.

DeepSeekMath (Shao et al. 2024, arXiv 2402.03300) as the report states it in its eqs. 1-7.  The
pieces (advantages, token weights, token objective, penalties) are separate, so that a variant of
the method is one more function beside them.

The policy of every log-probability here is ``softmax(logits / temperature)`` over the whole
vocabulary.  Rollouts are drawn from it after repetition penalty and top-p, but the ratio compares
the same untruncated distribution at both times, so it is exactly 1 on policy.
"""

import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from grpocem_jax.errors import InputError
from grpocem_jax.likelihood import completion_logps
from grpocem_jax.models.base import Model, Params

ADVANTAGES = ("group", "scaled")
AGGREGATIONS = ("sequence", "token", "constant")
EQUAL = 1e-6
"""Rewards of a group closer together than this are equal: the group carries no signal."""


STEEP = 20.0
"""The log-ratio in nats up to which `k3_divergence` is exponential."""

MEMORY_FIRST = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""For XLA's CPU compiler, which otherwise starts the recomputation of all layers at once and keeps
what comes of it: 1.9 instead of 1.3 GB at the report's setting. Other backends pass it over."""

KEPT_LOGITS_BYTES = 2**28
"""Logits of a micro-batch up to this size are kept for the backward pass: 16 completions of 64
tokens of GPT-2. Larger ones are made again."""


# Advantages


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
    """
    return jnp.where(mask, group_normalize(rewards)[..., None], 0.0)


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
    """
    step_rewards, step_ends = jnp.asarray(step_rewards), jnp.asarray(step_ends)
    groups = (*step_rewards.shape[:-2], -1)
    normalized = group_normalize(step_rewards.reshape(groups), step_ends.reshape(groups))
    normalized = normalized.reshape(step_rewards.shape)
    to_come = jnp.flip(jnp.cumsum(jnp.flip(normalized, -1), -1), -1)
    return jnp.where(mask, to_come, 0.0)


# Loss


def token_weights(mask: jax.Array, aggregation: str) -> jax.Array:
    """Weights ``w`` so that ``sum(w * loss_per_token)`` is the aggregated loss of a whole step.

    Computed over the step before it is cut into micro-batches, so that accumulation is exact.

    Args:
      mask: bool ``[P, G, N]``.
      aggregation: ``sequence``: eq. 1, mean over the tokens of a completion, then over completions.
        ``token``: mean over all tokens (DAPO, arXiv 2503.14476). ``constant``: sum over tokens
        divided by the largest length N, then mean over completions (Dr. GRPO, arXiv 2503.20783).

    Returns:
      float32 ``[P, G, N]``, zero off the mask.
    """
    mask = mask.astype(jnp.float32)
    completions = mask.shape[-3] * mask.shape[-2]
    if aggregation == "sequence":
        return mask / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1.0) / completions
    if aggregation == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    if aggregation == "constant":
        return mask / (mask.shape[-1] * completions)
    raise ValueError(f"aggregation={aggregation!r}: must be one of {', '.join(AGGREGATIONS)}.")


def clipped_objective(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, *, clip: float
) -> jax.Array:
    """``min(rho A, clip(rho, 1 - clip, 1 + clip) A)`` per token, ``rho = exp(logp - old_logp)``."""
    ratio = jnp.exp(logps - old_logps)
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


def k3_divergence(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """Eq. 6: ``exp(u) - u - 1`` with ``u = ref_logp - logp``, an unbiased estimate of
    KL(policy || reference) per token, never negative (Schulman's k3).

    Beyond ``u`` = `STEEP` it goes on along its tangent: its gradient there is already 5e8 and no
    update gets more from a larger one, but a single such token must not make the loss infinite.
    """
    u = ref_logps - logps
    bounded = jnp.minimum(u, STEEP)
    return jnp.expm1(bounded) - u + math.exp(STEEP) * (u - bounded)


# Update


class Batch(NamedTuple):
    """One optimizer step's rollouts, ``P`` prompts of ``G`` samples.

    Attributes:
      prompts: int32 ``[P, S]``, padded on the left.
      prompt_mask: bool ``[P, S]``.
      completions: int32 ``[P, G, N]``.
      mask: bool ``[P, G, N]``.
      old_logps: float32 ``[P, G, N]``, log-probabilities at the time of sampling.
      advantages: float32 ``[P, G, N]``.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    completions: jax.Array
    mask: jax.Array
    old_logps: jax.Array
    advantages: jax.Array


PARTS = (
    "loss",
    "policy_loss",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)
"""The loss and what it is made of, under TRL's names."""


class TrainState(NamedTuple):
    """What an optimizer step changes.

    Attributes:
      adapter: the offsets.
      opt_state: of the optimizer.
      step: int32 ``[]``, optimizer steps done.
      lr_scale: float32 ``[]``, factor of the adaptive learning rate.
    """

    adapter: Any
    opt_state: Any
    step: jax.Array
    lr_scale: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Static settings of the update; the defaults are the report's.

    Attributes:
      clip: range of the policy ratio, above 0.
      beta: weight of the KL term, at least 0; 0 leaves the reference out altogether.
      entropy: weight of the entropy bonus, at least 0.
      aggregation: see `token_weights`.
      micro_batch: completions processed at once; a multiple of the group size.
      learning_rate: peak, reached after ``warmup_steps`` of linear warmup, then constant.
      warmup_steps: optimizer steps.
      weight_decay: pulls the offsets to zero, the base model (AdamW, arXiv 1711.05101).
      max_grad_norm: global norm to which gradients are clipped.
      target_kl: if above 0, the learning rate adapts: it is divided by 1.5 when the measured KL
        exceeds twice the target, multiplied by 1.5 below half of it, within ``lr_scale_range``
        of its schedule.
      lr_scale_range: smallest and largest factor, above 0, with 1 between them.

    Raises:
      InputError: a value outside its range; ``target_kl`` without ``beta``.
    """

    clip: float = 0.2
    beta: float = 0.01
    entropy: float = 0.08
    aggregation: str = "sequence"
    micro_batch: int = 16
    learning_rate: float = 5e-5
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 0.5
    target_kl: float = 0.0
    lr_scale_range: tuple[float, float] = (0.1, 10.0)

    def __post_init__(self) -> None:
        bounds = tuple(self.lr_scale_range)
        # A list would be no static argument.
        object.__setattr__(self, "lr_scale_range", bounds)
        for name, holds, needed in (
            ("clip", self.clip > 0, "above 0"),
            ("beta", self.beta >= 0, "at least 0"),
            ("entropy", self.entropy >= 0, "at least 0"),
            ("aggregation", self.aggregation in AGGREGATIONS, "one of " + ", ".join(AGGREGATIONS)),
            ("micro_batch", self.micro_batch >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("target_kl", self.target_kl >= 0, "at least 0"),
            (
                "lr_scale_range",
                len(bounds) == 2 and 0 < bounds[0] <= 1 <= bounds[1],
                "two numbers above 0 with 1 between them",
            ),
        ):
            if not holds:
                raise InputError(f"{name}={getattr(self, name)!r}: must be {needed}.")
        if self.target_kl and not self.beta:
            raise InputError(
                f"target_kl={self.target_kl} follows the KL divergence, which beta={self.beta} "
                "leaves out; set one of them otherwise."
            )


def optimizer(hp: Hyperparameters) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `update` applies (it adapts)."""
    return optax.chain(
        optax.clip_by_global_norm(hp.max_grad_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(hp.weight_decay),
    )


def init_state(adapter: Any, hp: Hyperparameters) -> TrainState:
    """The state before the first step."""
    return TrainState(adapter, optimizer(hp).init(adapter), jnp.int32(0), jnp.float32(1.0))


def adapt_lr_scale(scale: jax.Array, kl: jax.Array, hp: Hyperparameters) -> jax.Array:
    """The next learning-rate factor given the measured KL (see `Hyperparameters.target_kl`)."""
    if hp.target_kl <= 0:
        return scale
    factor = jnp.where(kl > 2 * hp.target_kl, 1 / 1.5, jnp.where(kl < hp.target_kl / 2, 1.5, 1.0))
    return jnp.clip(scale * factor, *hp.lr_scale_range)


def keep_logits(num_tokens: int, model: Model) -> bool:
    """Whether the logits of so many tokens are kept for the backward pass."""
    return 4 * num_tokens * model.vocab_size <= KEPT_LOGITS_BYTES


def loss(
    adapter: Any,
    params: Params,
    batch: Batch,
    weights: jax.Array,
    temperature: jax.Array | float,
    *,
    model: Model,
    hp: Hyperparameters,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 1 with its KL and entropy terms, to be minimised, on some of a step's prompts.

    ``-sum(w (min(rho A, clip(rho) A) - beta k3 + entropy H))`` with the weights ``w`` of the whole
    step, so that the losses of micro-batches add up to the step's.

    Returns:
      the loss and its parts, each a weighted sum: `PARTS`.
    """
    evaluate = functools.partial(
        completion_logps, model, keep_logits=keep_logits(batch.completions.size, model)
    )
    # Jitted, so that policy and reference are one function and traced once.
    over_prompts = jax.jit(jax.vmap(evaluate, in_axes=(None, None, 0, 0, 0, 0, None)))
    inputs = (batch.prompts, batch.prompt_mask, batch.completions, batch.mask, temperature)
    logps, entropies = over_prompts(params, adapter, *inputs)
    objective = clipped_objective(logps, batch.old_logps, batch.advantages, clip=hp.clip)
    policy_loss = -jnp.sum(weights * objective)
    entropy = jnp.sum(weights * entropies)
    kl = jnp.float32(0.0)
    if hp.beta:
        zero = jax.tree.map(jnp.zeros_like, adapter)
        ref_logps, _ = jax.lax.stop_gradient(over_prompts(params, zero, *inputs))
        kl = jnp.sum(weights * k3_divergence(logps, ref_logps))
    total = policy_loss + hp.beta * kl - hp.entropy * entropy
    ratio = jnp.exp(logps - batch.old_logps)
    low = jnp.sum(weights * ((ratio < 1 - hp.clip) & (batch.advantages < 0)))
    high = jnp.sum(weights * ((ratio > 1 + hp.clip) & (batch.advantages > 0)))
    parts = {
        "loss": total,
        "policy_loss": policy_loss,
        "kl": kl,
        "entropy": entropy,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }
    return total, parts


@functools.partial(jax.jit, static_argnames=("model", "hp"))
def update(
    state: TrainState,
    params: Params,
    batch: Batch,
    temperature: jax.Array | float,
    *,
    model: Model,
    hp: Hyperparameters,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step: gradients accumulated over micro-batches of whole groups, then AdamW.

    Where the loss or its gradient is not finite, nothing but the step's number changes.

    With parameters in float16 the loss is differentiated times about the number of tokens, as the
    gradients of a mean over them are below what float16 can hold.

    Args:
      state: before the step.
      params: frozen parameters of the model.
      batch: the step's rollouts; ``P * G`` is a multiple of ``hp.micro_batch``.
      temperature: the rollouts' own.
      model: the model record.
      hp: static settings.

    Returns:
      the next state and float32 scalars: `PARTS`, grad_norm (before clipping), learning_rate, and
      skipped, 1 where the update was.

    Raises:
      ValueError: a micro-batch that is not whole groups, or does not divide the batch.
    """
    prompts, group = batch.completions.shape[:2]
    if hp.micro_batch % group or prompts * group % hp.micro_batch:
        raise ValueError(
            f"micro_batch={hp.micro_batch}: must be a multiple of the group size {group} and "
            f"divide the {prompts * group} completions of a step."
        )
    weights = token_weights(batch.mask, hp.aggregation)
    size = hp.micro_batch // group
    # Prompts that lie apart, so that of those divided among devices each has some in every part.
    micro = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(size, -1, *x.shape[1:]), 0, 1), (batch, weights)
    )
    temperature = jnp.asarray(temperature, jnp.float32)
    half = any(x.dtype == jnp.float16 for x in jax.tree.leaves(params))
    scale = 2.0 ** round(math.log2(batch.mask.size)) if half else 1.0
    gradient = jax.grad(functools.partial(loss, model=model, hp=hp), has_aux=True)

    def accumulate(total, part):
        batch, weights = part
        new = gradient(state.adapter, params, batch, weights * scale, temperature)
        return jax.tree.map(lambda x, y: x + y / scale, total, new), None

    start = (
        jax.tree.map(jnp.zeros_like, state.adapter),
        {name: jnp.float32(0.0) for name in PARTS},
    )
    (grads, metrics), _ = jax.lax.scan(accumulate, start, micro)

    done = (state.step + 1).astype(jnp.float32)
    warmup = jnp.minimum(done / max(hp.warmup_steps, 1), 1.0)
    rate = hp.learning_rate * warmup * state.lr_scale
    direction, opt_state = optimizer(hp).update(grads, state.opt_state, state.adapter)
    adapter = jax.tree.map(lambda a, d: a - rate * d, state.adapter, direction)
    metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": rate}
    lr_scale = adapt_lr_scale(state.lr_scale, metrics["kl"], hp)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
    new = TrainState(adapter, opt_state, state.step, lr_scale)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return kept._replace(step=state.step + 1), metrics


update_alone = jax.jit(
    inspect.unwrap(update), static_argnames=("model", "hp"), compiler_options=MEMORY_FIRST
)
"""`update` as a program of its own, in the least memory; options of the compiler are not for a part
of another program."""
