"""The update of a training step: its program, how much of it runs at once, what went wrong."""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpocem_jax import grpo
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import Config
from grpocem_jax.models.base import Model, Params
from grpocem_jax.models.likelihood import completion_logps
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.utils import memory
from grpocem_jax.utils.processes import ALONE, Processes
from grpocem_jax.utils.terminal import say

LARGE_KL = 1e6
"""A mean k3 estimate from which on something is wrong: a token some 14 nats apart or more."""
MEMORY_FIRST = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""For XLA's CPU compiler, which otherwise starts the recomputation of all layers at once and keeps
what comes of it: 1.9 instead of 1.3 GB at the report's setting. Other backends pass it over."""

update_program = jax.jit(grpo.update, static_argnames=grpo.STATIC, compiler_options=MEMORY_FIRST)
"""`grpo.update` as a program of its own, in the least memory."""

_gradients = jax.jit(
    grpo.gradients,
    static_argnames=tuple(name for name in grpo.STATIC if name != "optimizer"),
    compiler_options=MEMORY_FIRST,
)
_apply = jax.jit(grpo.apply, static_argnames=("optimizer", "beta"))

Updated = tuple[grpo.TrainState, dict[str, jax.Array]]


def over(processes: Processes, program: Callable[..., Updated]) -> Callable[..., Updated]:
    """An update whose batch is divided among processes, with the arguments of `grpo.update`.

    Each takes the gradient of its own prompts; their sum is what the optimizer of each steps by.
    ``micro_batch`` counts the completions of all processes.

    Args:
      processes: the processes.
      program: the update of one process that has all prompts.
    """
    if processes.count == 1:
        return program

    def update(
        state: grpo.TrainState,
        *args: Any,
        micro_batch: int,
        optimizer: optax.GradientTransformation,
        beta: float,
        **options: Any,
    ) -> Updated:
        own = {"micro_batch": micro_batch // processes.count, "beta": beta, **options}
        grads, metrics = processes.total(lambda: _gradients(state.offsets, *args, **own))
        return _apply(state, grads, metrics, optimizer=optimizer, beta=beta)

    return update


def repeat(
    once: Callable[[grpo.TrainState], Updated], state: grpo.TrainState, count: int
) -> Updated:
    """Several updates on the completions of one step, which counts as one.

    Args:
      once: an update.
      state: before the first.
      count: at least 1.

    Returns:
      the state, and each metric's mean over the updates, but for the learning rate of the last and
      whether any was skipped.
    """
    new, found = state, []
    for _ in range(count):
        new, metrics = once(new)
        found.append(metrics)
    joined = {name: jnp.mean(jnp.stack([one[name] for one in found]), 0) for name in metrics}
    joined |= {name: metrics[name] for name in ("learning_rate",) if name in metrics}
    joined["skipped"] = jnp.max(jnp.stack([one["skipped"] for one in found]), 0)
    return new._replace(step=state.step + 1), joined


def shorter_completions(length: int) -> str:
    """What to do where the smallest batch of completions of ``length`` tokens takes too much."""
    if length == 1:
        return "take a smaller model, or a device with more memory"
    return f"lower generation.max_new_tokens={length} to {length // 2}"


@functools.partial(jax.jit, static_argnames="model")
def largest_log_ratio(
    params: Params,
    offsets: Offsets,
    batch: grpo.Batch,
    temperature: float,
    *,
    model: Model,
) -> jax.Array:
    """Largest ``log pi_ref - log pi`` of a token of a step's completions, float32 ``[]``."""
    zero = jax.tree.map(jnp.zeros_like, offsets)

    def of_prompt(row: grpo.Batch) -> jax.Array:
        inputs = (row.prompts, row.prompt_mask, row.completions, row.mask, temperature)
        reference, policy = (
            completion_logps(model, params, own, *inputs)[0] for own in (zero, offsets)
        )
        return jnp.max(jnp.where(row.mask, reference - policy, -jnp.inf))

    return jnp.max(jax.lax.map(of_prompt, batch))


def micro_batch(config: Config, size: int, processes: Processes = ALONE) -> memory.Chunk:
    """The completions of an update that are processed at once: whole groups, at first ``size``.

    They are those of all processes, of which each has as many.
    """
    length = config.generation.max_new_tokens
    group = config.grpo.group_size * processes.count

    def smaller(size: int) -> int | None:
        sizes = range(group, size // 2 + 1, group)
        return max((each for each in sizes if size % each == 0), default=None)

    def advice(size: int, smaller: int | None) -> str:
        if smaller is None:
            return shorter_completions(length)
        batch, count = config.train.batch_size, config.train.accumulation_steps
        return (
            f"continue with train.fit_memory=True, or lower train.batch_size={batch} to {smaller} "
            f"and raise train.accumulation_steps={count} to {count * batch // smaller} in a new "
            "run; neither changes a result but by rounding"
        )

    return memory.Chunk(
        "the micro-batch, train.batch_size",
        size,
        "a step's update",
        lower=config.train.fit_memory,
        smaller=smaller,
        advice=advice,
    )


def find_trouble(
    config: Config,
    policy: Policy,
    record: Mapping[str, float],
    finite: bool,
    state: grpo.TrainState,
    batch: grpo.Batch,
    temperature: float,
) -> tuple[str, str]:
    """Why an update was skipped, and what to do; two empty strings where it was not.

    A KL term that is finite and very large is said here and now.

    Args:
      config: the settings.
      policy: the policy, whose processes each have a part of the batch.
      record: metrics of the update and the number of the step.
      finite: whether the log-probabilities of all completions are.
      state: before the update.
      batch: this process's part.
      temperature: of the completions.
    """
    rate, kl, skipped = config.train.learning_rate, record["kl"], bool(record["skipped"])
    far = finite and math.isfinite(record["policy_loss"]) and not kl < LARGE_KL
    if not (skipped or far):
        return "", ""
    lower = f"lower train.learning_rate={rate:g} to {rate / 4:g}"
    half = f"set model.dtype={policy.dtype!r} to 'bfloat16' or 'float32'"
    if not finite:
        what = f"the logits are not finite in {policy.dtype}"
        return what, half if policy.dtype == "float16" else lower
    if far:
        arguments = (policy.params, state.offsets, batch, temperature)
        largest = max(
            policy.processes.each(lambda: float(largest_log_ratio(*arguments, model=policy.model)))
        )
        what = (
            f"the KL term is {kl:.3g}, as a token is {largest:.0f} nats more probable under "
            "the base model than under the policy"
        )
        beta = config.grpo.beta
        fix = f"{lower}, or raise grpo.beta={beta:g} to {4 * beta:g}"
        if skipped:
            return what, fix
        say(f"step {record['step']}: {what}; {fix} in a new run", sys.stderr)
        return "", ""
    if policy.dtype == "float16":
        return "loss or gradient is not finite in float16", half
    return "loss or gradient is not finite", lower
