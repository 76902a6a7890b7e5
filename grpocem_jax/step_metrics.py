"""Metrics of a step's completions and rewards, under TRL's names."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpocem_jax import grpo, rollouts

ZERO_STD = "frac_reward_zero_std"
"""The share of groups with equal rewards, of all tasks; behind it and a slash that of one."""


def lengths(counts: np.ndarray, unended: np.ndarray) -> dict[str, float]:
    """TRL's length metrics, in tokens, of all completions and of those that ended by themselves.

    Args:
      counts: int ``[P, G]``, tokens with the end token.
      unended: bool ``[P, G]``, those cut at the largest length.
    """
    record = {"completions/clipped_ratio": float(unended.mean())}
    # Without a completion that ended TRL gives 0.
    ended = counts[~unended] if not unended.all() else np.zeros(1)
    for kind, values in (("length", counts), ("terminated_length", ended)):
        record |= {
            f"completions/mean_{kind}": float(values.mean()),
            f"completions/min_{kind}": float(values.min()),
            f"completions/max_{kind}": float(values.max()),
        }
    return record


def rewards(items: Sequence[rollouts.Item], scores: rollouts.Scores) -> dict[str, float]:
    """TRL's reward metrics: mean and sample standard deviation over completions, of all of them, by
    task, and by reward function where a task has several."""
    total = scores.total
    present = ~np.isnan(total)
    flat = np.asarray(grpo.equal_rewards(jnp.asarray(total), jnp.asarray(present)))
    record = {
        "reward": float(np.nanmean(total)) if present.any() else 0.0,
        "reward_std": _std(total),
        ZERO_STD: float(flat.mean()),
    }
    tasks = np.array([item.task.name for item in items])
    for name in dict.fromkeys(tasks.tolist()):
        record[f"{ZERO_STD}/{name}"] = float(flat[tasks == name].mean())
    parts = {name: total[tasks == name] for name in dict.fromkeys(tasks.tolist())}
    if any(len(item.task.rewards) > 1 for item in items):
        parts |= {name: values for name, values in scores.functions.items() if name not in parts}
    for name, values in parts.items():
        if not np.isnan(values).all():
            record[f"rewards/{name}/mean"] = float(np.nanmean(values))
            record[f"rewards/{name}/std"] = _std(values)
    if scores.errors is not None:
        record["reward_errors"] = float(scores.errors)
    return record


WINDOW = 20
"""Steps, the last ones, by which a task is judged to be without signal."""

FLAT = 0.9
"""Share of a task's groups with equal rewards from which on it is."""


def without_signal(records: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """Tasks nearly all of whose groups had equal rewards, with the share of those groups.

    Args:
      records: lines of metrics.jsonl; the last `WINDOW` count.
    """
    shares: dict[str, list[float]] = {}
    for record in list(records)[-WINDOW:]:
        for name, value in record.items():
            if name.startswith(f"{ZERO_STD}/") and value is not None:
                shares.setdefault(name.removeprefix(f"{ZERO_STD}/"), []).append(value)
    means = {task: float(np.mean(values)) for task, values in shares.items()}
    return {task: share for task, share in means.items() if share >= FLAT}


def signal_lines(
    records: Collection[Mapping[str, Any]],
    temperature: float | None,
    unchanged: Collection[str] = (),
) -> list[str]:
    """A sentence for each task `without_signal`: what that means, and what to do.

    Args:
      records: lines of metrics.jsonl.
      temperature: of the samples, or None where it is not known.
      unchanged: tasks whose held-out gain is exactly 0.
    """
    now = "" if temperature is None else f" than generation.temperature={temperature:g}"
    steps = min(len(records), WINDOW)
    last = f"the last {steps} steps" if steps > 1 else "the last step"
    return [
        f"{task}: in {last} {share:.0%} of the groups had equal rewards, and such a group teaches "
        "nothing"
        + (", hence the held-out gain of exactly 0" if task in unchanged else "")
        + "; give prompts that are neither too easy nor too hard, a reward that tells answers "
        f"apart more finely, or a higher temperature{now}."
        for task, share in without_signal(records).items()
    ]


def _std(values: np.ndarray) -> float:
    """Sample standard deviation of those that are not NaN, 0 of fewer than two."""
    present = values[~np.isnan(values)]
    return float(present.std(ddof=1)) if len(present) > 1 else 0.0
