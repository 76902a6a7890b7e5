"""Held-out reward: what a policy scores on prompts it was not trained on, before and after."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import rollouts
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import Config
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.tasks import Task
from grpocem_jax.utils import memory
from grpocem_jax.utils.statistics import mean_of_present


@dataclasses.dataclass(frozen=True)
class Gain:
    """Mean held-out reward before and after, and the mean of the paired differences.

    Attributes:
      before: mean reward of the base model.
      after: mean reward of the adapted model.
      gain: ``after - before``.
      gain_ci95: 95% interval of the gain over prompts (normal approximation of paired differences).
      n: number of prompts.
    """

    before: float
    after: float
    gain: float
    gain_ci95: tuple[float, float]
    n: int


def accuracies(tasks: Iterable[Task], gains: Mapping[str, Gain]) -> dict[str, Gain]:
    """The gains of the tasks whose reward is 1 or -1 as shares of right answers, in [0, 1]."""
    found = {}
    for task in tasks:
        if task.is_right_or_wrong and task.name in gains:
            gain = gains[task.name]
            low, high = gain.gain_ci95
            found[task.name] = Gain(
                (gain.before + 1) / 2,
                (gain.after + 1) / 2,
                gain.gain / 2,
                (low / 2, high / 2),
                gain.n,
            )
    return found


class Judged(NamedTuple):
    """What a policy makes of ``n`` held-out prompts.

    Attributes:
      rewards: mean reward of each prompt's samples, float64 ``[n]``, NaN where all abstained.
      texts: the samples, ``[n][samples]``.
      greedy_rewards: reward of each prompt's greedy completion, float64 ``[n]``.
      greedy_texts: those completions, ``[n][1]``.
    """

    rewards: np.ndarray
    texts: list[list[str]]
    greedy_rewards: np.ndarray
    greedy_texts: list[list[str]]


def records(items: Sequence[rollouts.Item], before: Judged, after: Judged) -> list[dict[str, Any]]:
    """What heldout.jsonl says of each prompt: the first sample, the mean reward of all samples,
    and the greedy completion with its reward; None for a reward where all abstained."""
    lines = []
    for number, item in enumerate(items):
        line: dict[str, Any] = {"task": item.task.name, "prompt": item.example.prompt}
        for when, judged in (("before", before), ("after", after)):
            rewards = (judged.rewards[number], judged.greedy_rewards[number])
            mean, greedy = (None if np.isnan(x) else float(x) for x in rewards)
            line |= {
                f"reward_{when}": mean,
                f"completion_{when}": judged.texts[number][0],
                f"greedy_reward_{when}": greedy,
                f"greedy_{when}": judged.greedy_texts[number][0],
            }
        lines.append(line)
    return lines


def judge(
    policy: Policy,
    offsets: Offsets,
    items: Sequence[rollouts.Item],
    key: jax.Array,
    config: Config,
    *,
    own_adapters: bool = False,
) -> Judged:
    """Held-out prompts judged with samples and greedily, each prompt processed once.

    The arguments and errors are those of `evaluate`, and so are the results.
    """
    count = config.train.eval_samples + 1
    rewards, texts = _complete(
        policy, offsets, items, key, config, count, greedy=True, own_adapters=own_adapters
    )
    return Judged(
        mean_of_present(rewards[:, :-1]),
        [group[:-1] for group in texts],
        mean_of_present(rewards[:, -1:]),
        [group[-1:] for group in texts],
    )


def evaluate(
    policy: Policy,
    offsets: Offsets,
    items: Sequence[rollouts.Item],
    key: jax.Array,
    config: Config,
    *,
    greedy: bool,
    own_adapters: bool = False,
) -> tuple[np.ndarray, list[list[str]]]:
    """Rewards on held-out prompts.

    Args:
      policy: the policy.
      offsets: its offsets; with ``own_adapters`` one for each prompt, a leading axis ``n``.
      items: ``n`` prompts.
      key: PRNG key; consumed. A prompt's samples depend on it and the prompt's place in ``items``.
        Or one for each prompt, ``[n]``, see `prompt_keys`.
      config: for sampling settings; samples are drawn at ``generation.temperature``.
      greedy: one greedy completion a prompt, instead of ``train.eval_samples`` drawn ones.
      own_adapters: whether each prompt has an adapter of its own.

    Returns:
      mean reward per prompt, float64 ``[n]`` (NaN where all samples abstained), and the texts
      ``[n][samples]``.

    Raises:
      InputError: out of device memory, logits that are not finite, or what `rollouts.score`
        raises.
    """
    count = 1 if greedy else config.train.eval_samples
    rewards, texts = _complete(
        policy, offsets, items, key, config, count, greedy=greedy, own_adapters=own_adapters
    )
    return mean_of_present(rewards), texts


def prompt_keys(key: jax.Array, count: int) -> jax.Array:
    """The keys ``[count]`` that `evaluate` completes prompts with."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(count))


def _complete(
    policy: Policy,
    offsets: Offsets,
    items: Sequence[rollouts.Item],
    key: jax.Array,
    config: Config,
    num_samples: int,
    *,
    greedy: bool,
    own_adapters: bool,
) -> tuple[np.ndarray, list[list[str]]]:
    """Rewards float64 ``[n, num_samples]`` and texts; with ``greedy`` the last of each is."""
    size = min(config.train.eval_batch_size, max(len(items), 1))
    advice = (
        f"lower train.eval_batch_size={config.train.eval_batch_size} to {size // 2}"
        if size > 1
        else f"lower generation.max_new_tokens={config.generation.max_new_tokens}"
    )
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    keys = key if key.ndim > (0 if typed else 1) else prompt_keys(key, len(items))
    rewards = np.full((len(items), num_samples), np.nan)
    texts: list[list[str]] = [[] for _ in items]
    for rows, filled in rollouts.batches([item.tokens for item in items], size):
        with memory.advise("the evaluation", advice):
            out = rollouts.complete(
                policy,
                jax.tree.map(lambda x, rows=filled: x[rows], offsets) if own_adapters else offsets,
                [items[i].tokens for i in filled],
                keys[filled],
                config.generation,
                num_samples=num_samples,
                temperature=config.generation.temperature,
                buckets=(*config.generation.prompt_buckets, config.data.max_prompt_tokens),
                greedy=greedy,
                own_adapters=own_adapters,
                require_finite=True,
                shared=("tokens", "texts"),
            )
            out = rollouts.with_base_logps(policy, [items[i] for i in filled], out)
        groups = out.texts[: len(rows)]
        logps = None if out.base_logps is None else out.base_logps[: len(rows)]
        own = [items[i] for i in rows]
        scores = rollouts.score(own, groups, logps, processes=policy.processes)
        rewards[rows] = scores.total
        for row, group in zip(rows, groups, strict=True):
            texts[row] = group
    return rewards, texts


def mean_reward(tasks: Sequence[str], rewards: np.ndarray) -> float:
    """Mean reward of ``n`` prompts over tasks, each weighing the same; NaN where all abstained.

    Args:
      tasks: the task of each prompt.
      rewards: float ``[n]``, NaN where abstained.
    """
    labels = np.asarray(tasks)
    parts = [rewards[(labels == name) & ~np.isnan(rewards)] for name in np.unique(labels)]
    means = [part.mean() for part in parts if len(part)]
    return float(np.mean(means)) if means else math.nan


def compare(
    names: Iterable[str], tasks: Sequence[str], before: np.ndarray, after: np.ndarray
) -> dict[str, Gain]:
    """Gains by task, and ``overall``: the mean over tasks, each weighing the same.

    A task with fewer than two prompts whose rewards did not abstain has no interval and is left
    out.

    Args:
      names: the tasks to report, in order.
      tasks: the task of each of ``n`` prompts.
      before: mean reward of each prompt, float ``[n]``, NaN where abstained.
      after: the same with the adapter.
    """
    gains, variances = {}, []
    labels = np.asarray(tasks)
    for name in names:
        rows = (labels == name) & ~np.isnan(before) & ~np.isnan(after)
        difference = after[rows] - before[rows]
        n = len(difference)
        if n < 2:
            continue
        variance = float(difference.var(ddof=1)) / n
        variances.append(variance)
        gains[name] = _gain(float(before[rows].mean()), float(after[rows].mean()), variance, n)
    if gains:
        gains["overall"] = _gain(
            float(np.mean([g.before for g in gains.values()])),
            float(np.mean([g.after for g in gains.values()])),
            sum(variances) / len(variances) ** 2,
            sum(g.n for g in gains.values()),
        )
    return gains


def _gain(before: float, after: float, variance: float, n: int) -> Gain:
    half = 1.96 * math.sqrt(variance)
    gain = after - before
    return Gain(before, after, gain, (gain - half, gain + half), n)
