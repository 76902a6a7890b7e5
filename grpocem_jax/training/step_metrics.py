"""Metrics of a step's completions and rewards, under TRL's names."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grpocem_jax import grpo, rollouts
from grpocem_jax.runs import metrics


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
        metrics.ZERO_STD: float(flat.mean()),
    }
    tasks = np.array([item.task.name for item in items])
    for name in dict.fromkeys(tasks.tolist()):
        record[f"{metrics.ZERO_STD}/{name}"] = float(flat[tasks == name].mean())
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


def _std(values: np.ndarray) -> float:
    """Sample standard deviation of those that are not NaN, 0 of fewer than two."""
    present = values[~np.isnan(values)]
    return float(present.std(ddof=1)) if len(present) > 1 else 0.0
