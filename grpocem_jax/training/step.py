"""A step of training but for its programs: which prompts and keys, and completions to a batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import grpo, rollouts
from grpocem_jax.config import Config
from grpocem_jax.models import sampling
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.training import step_metrics
from grpocem_jax.training.algorithm import Algorithm
from grpocem_jax.utils.errors import InputError


class Keys(NamedTuple):
    """PRNG keys of a step: one for each prompt's completions, of the weight rule, of a draw."""

    prompts: jax.Array
    weights: jax.Array
    draw: jax.Array


class Prepared(NamedTuple):
    """What an update takes of a step's completions, and what is said of them.

    Attributes:
      items: the ``P`` prompts that are trained on.
      texts: their completions, ``[P][G]``.
      rewards: float32 ``[P, G]``, NaN where all reward functions abstained.
      batch: the rollouts with advantages and weights.
      metrics: of all completions that were drawn.
      tokens: how many were read and written, for all that were drawn.
      finite: whether all log-probabilities of all that were drawn are finite.
      rows: which of the step's prompts are trained on, int ``[P]``.
    """

    items: Sequence[rollouts.Item]
    texts: Sequence[Sequence[str]]
    rewards: np.ndarray
    batch: grpo.Batch
    metrics: dict[str, float]
    tokens: int
    finite: bool
    rows: np.ndarray


def total_steps(config: Config, num_items: int) -> int:
    """Optimizer steps of a run with so many training prompts."""
    steps = num_items // config.prompts_drawn_per_step * config.train.epochs
    return min(steps, config.train.max_steps or steps)


def prompts(config: Config, items: Sequence[rollouts.Item], step: int) -> list[rollouts.Item]:
    """The prompts that a step completes: a shuffle an epoch, of seed and epoch alone."""
    size = config.prompts_drawn_per_step
    epoch, position = divmod(step, len(items) // size)
    order = np.random.default_rng((config.seed, epoch)).permutation(len(items))
    return [items[i] for i in order[position * size : (position + 1) * size]]


def keys(key: jax.Array, step: int, count: int) -> Keys:
    """The keys of a step with ``count`` prompts, of the run's base key."""
    own = jax.random.fold_in(key, step)
    # The first keys of a step are those of its prompts.
    weights, draw = (jax.random.fold_in(own, count + i) for i in (0, 1))
    return Keys(jax.random.split(own, count), weights, draw)


def temperature(config: Config, step: int, total: int) -> float:
    """That of a step of ``total``."""
    first, last = config.generation.temperature, config.generation.final_temperature
    return sampling.anneal(first, last, step / max(total - 1, 1))


def differences(config: Config, planned: int, total: int, done: int) -> list[str]:
    """What ``done`` steps of a run planned otherwise differ in from those of one of ``total``."""
    generation, train = config.generation, config.train
    found = []
    if generation.temperature != generation.final_temperature:
        found.append(
            f"the temperatures of steps 1 to {done} were those of a run of {planned} steps, "
            f"not of {total}"
        )
    if train.final_lr_scale < 1:
        found.append(
            f"the learning rates of steps 1 to {done} were those of a run of {planned} steps, "
            f"not of {total}"
        )
    every = train.evaluate_every_steps
    if every and done == planned and done % every:
        found.append(
            f"the adapter of step {done} was judged by the validation prompts as the last one"
        )
    return found


def with_likelihoods(
    config: Config,
    policy: Policy,
    items: Sequence[rollouts.Item],
    out: rollouts.Completions,
    step: int,
) -> rollouts.Completions:
    """Completions with what reward functions ask for beside their texts.

    Raises:
      InputError: none of them has finite log-probabilities, in float16.
    """
    if not out.finite.any() and policy.dtype == "float16":
        fix = policy.nonfinite_logits("")
        raise InputError(f"step {step + 1}: in all completions {fix}, in a new run.")
    process = config.grpo.supervision == "process"
    own = config.grpo.dynamic_sampling == 1
    return rollouts.with_base_logps(policy, items, out, steps=process, own=own)


def shown(config: Config, step: int, total: int) -> bool:
    """Whether the completions of a step of ``total``, counted from 0, are written down."""
    return step % config.logging.interval == 0 or step + 1 == total


def shown_at_the_end_only(config: Config, step: int, total: int) -> bool:
    """Whether a step's completions are written down only because it is the last, see `shown`."""
    return step + 1 == total and step % config.logging.interval != 0


def shared(config: Config, algorithm: Algorithm, *, shown: bool) -> set[str]:
    """What of a step's completions all processes must have, of `rollouts.SHARED`.

    Prompts stay where they were completed, and what is computed of the whole step is computed of
    rewards and lengths, unless a part of the algorithm reads more.

    Args:
      config: the settings.
      algorithm: shaping, advantages and weights.
      shown: whether the step's texts are written down.
    """
    if config.grpo.dynamic_sampling > 1:  # prompts are chosen from all, and divided anew
        return set(rollouts.SHARED)
    parts = (algorithm.shaping, algorithm.advantages, algorithm.weights)
    return {name for part in parts for name in grpo.read_by(part)} | ({"texts"} if shown else set())


def prepare(
    config: Config,
    policy: Policy,
    algorithm: Algorithm,
    items: Sequence[rollouts.Item],
    out: rollouts.Completions,
    key: jax.Array,
) -> Prepared:
    """Scores completions and makes the batch of an update of them.

    Args:
      config: the settings.
      policy: what completed the prompts.
      algorithm: shaping, advantages and weights.
      items: the prompts that were completed.
      out: their completions, `with_likelihoods`.
      key: PRNG key of the weight rule.

    Raises:
      InputError: whatever a reward function or a part of the algorithm does wrong.
    """
    scores = rollouts.score(items, out.texts, out.base_logps, processes=policy.processes)
    metrics = {
        **step_metrics.rewards(items, scores),
        **step_metrics.lengths(out.mask.sum(-1), out.cut),
    }
    tokens = int(out.mask.sum() + out.prompts.mask.sum() * config.grpo.group_size)
    rewards, rows = scores.total, np.arange(len(items))
    finite = bool(out.finite.all())
    if len(items) > config.prompts_per_step:
        rows = grpo.informative_first(rewards, config.prompts_per_step)
        items, out, rewards = [items[i] for i in rows.tolist()], out.take(rows), rewards[rows]
    given = jnp.asarray(rewards, jnp.float32)
    shaped = np.asarray(algorithm.shaping(given, out.rollouts.logps, out.rollouts.mask))
    step_rewards = _step_rewards(config, policy, items, out, shaped)
    # Copies, since arrays of JAX on the host cannot be written to.
    own = (np.array(x) for x in (shaped, step_rewards, out.tokens, out.mask))
    advantages = algorithm.advantages(*own)
    weights, positions = algorithm.weights(key, out.rollouts)
    batch = grpo.Batch(
        jnp.asarray(out.prompts.tokens),
        jnp.asarray(out.prompts.mask),
        out.rollouts.tokens,
        out.rollouts.mask,
        out.rollouts.logps,
        jnp.asarray(advantages),
        weights,
        positions,
    )
    return Prepared(items, out.texts, rewards, batch, metrics, tokens, finite, rows)


def _step_rewards(
    config: Config,
    policy: Policy,
    items: Sequence[rollouts.Item],
    out: rollouts.Completions,
    rewards: np.ndarray,
) -> np.ndarray:
    """Rewards at the last token of each step, float32 ``[P, G, N]``, NaN elsewhere."""
    if config.grpo.supervision == "process":
        values, ends = rollouts.score_steps(
            policy,
            items,
            out.texts,
            out.tokens,
            out.mask,
            rewards,
            out.base_logps,
            processes=policy.processes,
        )
    else:  # one step a completion, worth its outcome
        values = rewards[..., None].astype(np.float32)
        ends = np.arange(out.mask.shape[-1]) == out.mask.sum(-1, keepdims=True) - 1
    return np.where(ends, values, np.float32(np.nan))


def records(prepared: Prepared, step: int) -> Iterator[dict[str, Any]]:
    """What completions.jsonl says of each completion of a step."""
    advantages = np.asarray(prepared.batch.advantages)
    for row, item in enumerate(prepared.items):
        for sample, text in enumerate(prepared.texts[row]):
            numbers = {
                "reward": float(prepared.rewards[row, sample]),
                "advantage": float(advantages[row, sample, 0]),
            }
            yield {
                "step": step,
                "task": item.task.name,
                "prompt": item.example.prompt,
                "completion": text,
                **{name: x if np.isfinite(x) else None for name, x in numbers.items()},
            }
