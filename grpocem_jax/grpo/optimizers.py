"""Optimizers: gradient clipping, a base such as AdamW, and the learning rate as one chain."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from grpocem_jax.grpo.learning_rate import adapt_to_kl, warmup
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, at_least, below, number

Make = Callable[..., optax.GradientTransformation]


def _once(make: Make) -> Make:
    """A function that gives the same transformation for equal arguments that are hashable."""
    cached = functools.lru_cache(make)

    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> optax.GradientTransformation:
        options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
        try:
            hash((args, tuple(options.values())))
        except TypeError:
            return make(*args, **options)  # which says what is wrong
        return cached(*args, **options)

    return made


@_once
def optimizer(
    base: Callable[..., optax.GradientTransformation] = optax.adamw,
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    max_grad_norm: float = 0.5,
    target_kl: float = 0.0,
    lr_scale_range: tuple[float, float] = (0.1, 10.0),
    total_steps: int = 0,
    final_lr_scale: float = 1.0,
) -> optax.GradientTransformation:
    """Gradients clipped by their global norm, then ``base`` at a rate that may follow the KL.

    Args:
      base: ``(learning_rate) -> optax.GradientTransformation`` for a schedule of the learning rate,
        as optax's own optimizers are.
      learning_rate: peak, reached after the warmup; above 0.
      warmup_steps: updates of linear warmup, at least 0.
      max_grad_norm: largest global norm of a gradient, above 0.
      target_kl: as in `adapt_to_kl`, like the next one.
      lr_scale_range: smallest and largest factor of the learning rate.
      total_steps: as in `warmup`, like the next one; 0 for a constant rate after the warmup.
      final_lr_scale: factor of the learning rate at the last of ``total_steps``, linear after the
        warmup, from 0 to 1.

    Returns:
      a transformation that includes its learning rate, and whose state has it for the metrics of
      `grpo.update`. Equal arguments give the same one, so that `grpo.update` is not compiled again.

    Raises:
      InputError: a value outside its range.
    """
    max_grad_norm = number("max_grad_norm", max_grad_norm, above(0))
    schedule = warmup(
        learning_rate, warmup_steps, total_steps=total_steps, final_scale=final_lr_scale
    )
    rate = adapt_to_kl(schedule, target_kl=target_kl, scale_range=lr_scale_range)
    made = base(learning_rate=schedule)
    if not isinstance(made, optax.GradientTransformation):
        raise InputError(
            f"the optimizer is {type(made).__name__}; it must be an optax.GradientTransformation."
        )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), made, rate)


@_once
def adamw(
    *,
    learning_rate: float = 5e-5,
    warmup_steps: int = 100,
    weight_decay: float = 0.01,
    max_grad_norm: float = 0.5,
    target_kl: float = 0.0,
    lr_scale_range: tuple[float, float] = (0.1, 10.0),
    total_steps: int = 0,
    final_lr_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) in `optimizer`; the defaults are the report's.

    Args:
      learning_rate: as in `optimizer`.
      warmup_steps: as in `optimizer`.
      weight_decay: pull of the offsets to zero, the base model; at least 0.
      max_grad_norm: as in `optimizer`.
      target_kl: as in `optimizer`.
      lr_scale_range: as in `optimizer`.
      total_steps: as in `optimizer`.
      final_lr_scale: as in `optimizer`.
      b1: decay of the first moment, from 0 to below 1.
      b2: decay of the second moment, from 0 to below 1.
      eps: added to the root of the second moment, above 0.

    Raises:
      InputError: a value outside its range.
    """
    weight_decay = number("weight_decay", weight_decay, at_least(0))
    b1, b2 = number("b1", b1, below(0, 1)), number("b2", b2, below(0, 1))
    eps = number("eps", eps, above(0))
    return optimizer(
        functools.partial(optax.adamw, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        max_grad_norm=max_grad_norm,
        target_kl=target_kl,
        lr_scale_range=lr_scale_range,
        total_steps=total_steps,
        final_lr_scale=final_lr_scale,
    )
