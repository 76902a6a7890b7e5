"""The loss and the optimizer step, as pure functions of arrays."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpocem_jax.grpo.batch import Batch, check_shapes, seen_by_objective
from grpocem_jax.grpo.objectives import Objective, check_called, k3_divergence
from grpocem_jax.models.base import Model, Params
from grpocem_jax.models.likelihood import completion_logps
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import at_least, number, whole

KEPT_LOGITS_BYTES = 2**28
"""Logits of a micro-batch up to this size are kept for the backward pass: 16 completions of 64
tokens of GPT-2. Larger ones are made again."""

METRICS = ("loss", "policy_loss", "kl", "entropy", "grad_norm", "learning_rate", "skipped")
"""Metrics of `update` beside the objective's own, under TRL's names."""

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""A loss: ``(trainable, params, batch, temperature, *, model, objective, beta, entropy)`` to a
scalar, to be minimised, and metrics. Both are sums weighted by ``batch.weights``. `loss` is one."""


class TrainState(NamedTuple):
    """What an optimizer step changes.

    Attributes:
      offsets: the offsets.
      opt_state: of the optimizer.
      step: int32 ``[]``, optimizer steps done.
    """

    offsets: Any
    opt_state: Any
    step: jax.Array


def init_state(offsets: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Raises:
      InputError: no optimizer, such as ``optax.adamw`` itself.
    """
    if not callable(getattr(optimizer, "init", None)):
        raise InputError(
            f"optimizer={optimizer!r}: is no optax.GradientTransformation; call what makes one, "
            "as in optax.adamw(1e-2)."
        )
    return TrainState(offsets, optimizer.init(offsets), jnp.int32(0))


def keep_logits(num_tokens: int, model: Model) -> bool:
    """Whether the logits of so many tokens are kept for the backward pass."""
    return 4 * num_tokens * model.vocab_size <= KEPT_LOGITS_BYTES


def surrogate(
    logps: jax.Array,
    entropies: jax.Array,
    reference: Callable[[], jax.Array],
    batch: Batch,
    *,
    objective: Objective,
    beta: float,
    entropy: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 1 from log-probabilities: ``-sum(w (objective - beta k3 + entropy H))``.

    Args:
      logps: float32 ``[P, G, N]``, of the policy; ``[P, G, K]`` with `Batch.positions`.
      entropies: its entropies at the same tokens.
      reference: gives the log-probabilities of the reference; called where ``beta`` is not 0, or
        the objective needs them.
      batch: with the weights of the whole step.
      objective: see `Objective`.
      beta: weight of the KL term.
      entropy: weight of the entropy bonus.

    Returns:
      the loss and its metrics, each a weighted sum.
    """
    batch = seen_by_objective(batch)
    weights, trained = batch.weights, batch.weights != 0
    logps = jnp.where(trained, logps, 0.0)
    needs = getattr(objective, "needs", ())
    ref_logps = jnp.zeros_like(logps)
    if beta or needs:
        ref_logps = jnp.where(trained, jax.lax.stop_gradient(reference()), 0.0)
    told = {"reference": ref_logps} if needs else {}
    values, metrics = objective(logps, batch, **told)
    policy_loss = -jnp.sum(weights * values)
    bonus = jnp.sum(weights * entropies)
    kl = jnp.float32(0.0)
    if beta:
        kl = jnp.sum(weights * k3_divergence(logps, ref_logps))
    total = policy_loss + beta * kl - entropy * bonus
    parts = {"loss": total, "policy_loss": policy_loss, "kl": kl, "entropy": bonus}
    return total, parts | metrics


def loss(
    offsets: Any,
    params: Params,
    batch: Batch,
    temperature: jax.Array | float,
    *,
    model: Model,
    objective: Objective,
    beta: float,
    entropy: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 1 with its KL and entropy terms, to be minimised, on some of a step's prompts.

    The reference is the base model, the same parameters with zero offsets.

    Returns:
      the loss and its metrics as `surrogate` gives them; those of micro-batches add up.
    """
    tokens = batch.completions if batch.positions is None else batch.positions
    evaluate = functools.partial(
        completion_logps, model, keep_logits=keep_logits(tokens.size, model)
    )
    # Jitted, so that policy and reference are one function and traced once.
    over_prompts = jax.jit(jax.vmap(evaluate, in_axes=(None, None, 0, 0, 0, 0, None, 0)))
    inputs = (
        batch.prompts,
        batch.prompt_mask,
        batch.completions,
        batch.mask,
        temperature,
        batch.positions,
    )
    logps, entropies = over_prompts(params, offsets, *inputs)

    def reference() -> jax.Array:
        return over_prompts(params, jax.tree.map(jnp.zeros_like, offsets), *inputs)[0]

    return surrogate(
        logps, entropies, reference, batch, objective=objective, beta=beta, entropy=entropy
    )


STATIC = ("model", "objective", "optimizer", "beta", "entropy", "micro_batch", "loss", "draw")
"""Static arguments of `update`, for a `jax.jit` of one's own around it."""


def update(
    state: TrainState,
    params: Params,
    batch: Batch,
    temperature: jax.Array | float,
    *,
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    beta: float = 0.0,
    entropy: float = 0.0,
    micro_batch: int | None = None,
    loss: Loss = loss,
    draw: Callable[[jax.Array, Any], Any] | None = None,
    key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on gradients accumulated over micro-batches of whole groups.

    Where the loss or its gradient is not finite, nothing but the step's number changes.

    With parameters in float16 the loss is differentiated times about the number of tokens, as the
    gradients of a mean over them are below what float16 can hold.

    Args:
      state: before the step.
      params: frozen parameters of the model.
      batch: the step's rollouts.
      temperature: the rollouts' own.
      model: the model record, static by identity.
      objective: what is maximised at each token, such as ``clipped()``. Static: made anew, it must
        equal the one before or the step is compiled again.
      optimizer: any `optax.GradientTransformation` with its learning rate, such as
        ``optax.adamw(1e-2)``. Static by identity, so make it once. It gets the step's ``kl`` and
        ``value``, the loss, as extra arguments where it takes any.
      beta: weight of the KL term, a number of at least 0; 0 leaves the reference out altogether,
        unless the objective needs it. Static: each value compiles a program of its own.
      entropy: weight of the entropy bonus, a number of at least 0. Static as well.
      micro_batch: completions processed at once, a multiple of the group size ``G`` that divides
        ``P * G``; by default all of them.
      loss: another loss than eq. 1, for methods that train more than a policy.
      draw: ``(key, offsets) -> offsets`` of a stochastic adapter (`Adapter.draw`): the loss is that
        of a draw, and its gradient goes through it.
      key: PRNG key of the draw, the one that the rollouts were made with.

    Returns:
      the next state and float32 scalars: loss, policy_loss, kl, entropy, the objective's metrics,
      grad_norm (before clipping), learning_rate where the optimizer's state has it (as that of
      `grpo.optimizer` and of `optax.inject_hyperparams` does), and skipped, 1 where the update was.

    Raises:
      InputError: ``beta`` or ``entropy`` that is no number, or below 0; a micro-batch that is not
        whole groups, or does not divide the batch; a draw without a key; a field of the batch of
        another shape than `Batch` says; a function that makes objectives instead of one.
    """
    return _update(
        state,
        params,
        batch,
        temperature,
        model=model,
        objective=objective,
        optimizer=optimizer,
        beta=_static("beta", beta),
        entropy=_static("entropy", entropy),
        micro_batch=micro_batch,
        loss=loss,
        draw=draw,
        key=key,
    )


@functools.partial(jax.jit, static_argnames=STATIC)
def _update(
    state: TrainState,
    *args: Any,
    optimizer: optax.GradientTransformation,
    beta: float,
    **options: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    grads, metrics = gradients(state.offsets, *args, beta=beta, **options)
    return apply(state, grads, metrics, optimizer=optimizer, beta=beta)


def _static(name: str, weight: float) -> float:
    """The weight of a penalty; at 0 it is no part of the program."""
    if isinstance(weight, jax.Array):
        raise InputError(
            f"{name}={weight!r}: is an array, and each value has a program of its own; give a "
            f"number, such as float({name})."
        )
    return number(name, weight, at_least(0))


def gradients(
    offsets: Any,
    params: Params,
    batch: Batch,
    temperature: jax.Array | float,
    *,
    model: Model,
    objective: Objective,
    beta: float = 0.0,
    entropy: float = 0.0,
    micro_batch: int | None = None,
    loss: Loss = loss,
    draw: Callable[[jax.Array, Any], Any] | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of a loss on a batch, of which those of parts of a step add up. Traceable.

    Args:
      offsets: the offsets.
      params: as those after it, as in `update`.
      batch: all rollouts of a step, or those of some prompts with the weights of the whole step.

    Returns:
      the gradient, and the metrics of the loss.

    Raises:
      InputError: as `update`.
    """
    check_called(objective)
    check_shapes(batch)
    beta, entropy = _static("beta", beta), _static("entropy", entropy)
    if draw is not None and key is None:
        raise InputError("key: is missing; give the one that the rollouts were drawn with.")
    prompts, group = batch.completions.shape[:2]
    micro_batch = prompts * group if micro_batch is None else whole("micro_batch", micro_batch)
    if micro_batch % group or prompts * group % micro_batch:
        raise InputError(
            f"micro_batch={micro_batch}: must be a multiple of the group size {group} and "
            f"divide the {prompts * group} completions of a step."
        )
    size = micro_batch // group
    # Prompts that lie apart, so that of those divided among devices each has some in every part.
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size, -1, *x.shape[1:]), 0, 1), batch)
    temperature = jnp.asarray(temperature, jnp.float32)
    half = any(x.dtype == jnp.float16 for x in jax.tree.leaves(params))
    scale = 2.0 ** round(math.log2(batch.mask.size)) if half else 1.0
    of_model = functools.partial(loss, model=model, objective=objective, beta=beta, entropy=entropy)

    def of_draw(offsets: Any, *rest: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        if draw is not None and key is not None:
            offsets = draw(key, offsets)
        return of_model(offsets, *rest)

    gradient = jax.grad(of_draw, has_aux=True)

    def accumulate(total: Any, part: Batch) -> tuple[Any, dict[str, jax.Array]]:
        part = part._replace(weights=part.weights * scale)
        grads, metrics = gradient(offsets, params, part, temperature)
        total = jax.tree.map(lambda x, y: x + y / scale, total, grads)
        return total, jax.tree.map(lambda x: x / scale, metrics)

    zero = jax.tree.map(jnp.zeros_like, offsets)
    grads, parts = jax.lax.scan(accumulate, zero, micro)
    return grads, {name: jnp.sum(values, 0) for name, values in parts.items()}


def apply(
    state: TrainState,
    grads: Any,
    metrics: dict[str, jax.Array],
    *,
    optimizer: optax.GradientTransformation,
    beta: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The optimizer's step with the gradient of a whole step. Traceable.

    Args:
      state: before the step.
      grads: of `gradients`, or the sum of several.
      metrics: the same.
      optimizer: as in `update`.
      beta: weight of the KL term.

    Returns:
      as `update`.
    """
    metrics = {**metrics, "grad_norm": optax.global_norm(grads)}
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grads,
        state.opt_state,
        state.offsets,
        value=metrics["loss"],
        kl=metrics["kl"] if beta else None,
    )
    offsets = optax.apply_updates(state.offsets, updates)
    rates = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
    if rates:
        metrics["learning_rate"] = jnp.asarray(rates[-1][1], jnp.float32)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
    new = TrainState(offsets, opt_state, state.step)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return kept._replace(step=state.step + 1), metrics
