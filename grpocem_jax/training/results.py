"""What a run leaves behind: held-out reward, summary, adapters, and what the report draws."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grpocem_jax import adapters, rollouts
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import Config
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.runs import checkpoints, metrics
from grpocem_jax.training import evaluation, screens
from grpocem_jax.utils.files import write_json, write_safetensors
from grpocem_jax.utils.terminal import say

Gains = dict[str, evaluation.Gain]

BEST = "best_adapter"
"""Folder of the adapter of the best checkpoint, beside ``adapter/``, which is the last."""


class Heldout(NamedTuple):
    """Held-out prompts and what the policy made of them before and after training."""

    items: Sequence[rollouts.Item]
    before: evaluation.Judged
    after: evaluation.Judged

    def gains(self, names: Sequence[str]) -> tuple[Gains, Gains]:
        """Gains of the tasks of these names, sampled and greedy."""
        tasks = [item.task.name for item in self.items]
        before, after = self.before, self.after
        return (
            evaluation.compare(names, tasks, before.rewards, after.rewards),
            evaluation.compare(names, tasks, before.greedy_rewards, after.greedy_rewards),
        )


def judge(
    policy: Policy,
    offsets: Offsets,
    items: Sequence[rollouts.Item],
    key: jax.Array,
    config: Config,
) -> Heldout:
    """Judges the base model and the trained adapter, with the same random numbers.

    The base model is measured here too and not at first: it does not change, and one who starts a
    run sees its first steps at once.
    """
    say("held-out reward before training", sys.stderr)
    before = evaluation.judge(policy, policy.zero, items, key, config)
    say("held-out reward after training", sys.stderr)
    return Heldout(items, before, evaluation.judge(policy, offsets, items, key, config))


def summarize(
    config: Config,
    policy: Policy,
    offsets: Offsets,
    train_items: Sequence[rollouts.Item],
    bad_lines: Mapping[str, int],
    heldout: Heldout,
    course: dict[str, Any],
) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
      config: the run's.
      policy: what was trained.
      offsets: the trained offsets.
      train_items: the training prompts.
      bad_lines: for each task, how many rows were passed over because they cannot be used.
      heldout: what was made of the held-out ones.
      course: what the run says of its course, taken as it is.
    """
    sampled, greedy = heldout.gains(config.data.tasks)
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(offsets)])
    pretrained, sources = policy.pretrained, config.data.sources
    counts = {
        name: {
            "source": sources[name].source,
            "train": sum(item.task.name == name for item in train_items),
            "heldout": sum(item.task.name == name for item in heldout.items),
            "bad_lines": bad_lines[name],
        }
        for name in config.data.tasks
    }
    return {
        "heldout": {name: dataclasses.asdict(gain) for name, gain in sampled.items()},
        "heldout_greedy": {name: dataclasses.asdict(gain) for name, gain in greedy.items()},
        "heldout_accuracy": _accuracies(config, sampled),
        "heldout_greedy_accuracy": _accuracies(config, greedy),
        "trainable_parameters": adapters.num_params(policy.zero),
        "total_parameters": pretrained.num_params(),
        "offsets": {
            "max_abs": float(np.abs(values).max()),
            "rms": float(np.sqrt(np.mean(values**2))),
        },
        "model": pretrained.source,
        "dtype": policy.dtype,
        "builtin_model": pretrained.kind == "builtin",
        "random_weights": pretrained.kind == "random",
        "builtin_data": {name: sources[name].source == "builtin" for name in config.data.tasks},
        "data": counts,
        **course,
        **metrics.environment(),
        "devices_used": policy.num_devices,
    }


def _accuracies(config: Config, gains: Gains) -> dict[str, Any]:
    found = evaluation.accuracies(map(config.task, config.data.tasks), gains)
    return {name: dataclasses.asdict(gain) for name, gain in found.items()}


def write(
    workdir: Path,
    config: Config,
    policy: Policy,
    offsets: Offsets,
    best: Offsets | None,
    heldout: Heldout,
    summary: dict[str, Any],
) -> None:
    """Writes adapters, heldout.jsonl, spectrum.safetensors and, last, summary.json.

    Args:
      workdir: the run directory.
      config: the run's.
      policy: what was trained.
      offsets: the trained offsets.
      best: those of the best checkpoint, or None where checkpoints were not compared.
      heldout: as in `summarize`.
      summary: what `summarize` gave.
    """
    described = policy.adapter_config(config.adapter)
    card = screens.model_card(config, summary)
    checkpoints.save_adapter(workdir / "adapter", offsets, described, card)
    if best is not None:
        card = screens.best_card(config, summary)
        checkpoints.save_adapter(workdir / BEST, best, described, card)
    judged = metrics.JsonLines(workdir / "heldout.jsonl", size=0)
    for line in evaluation.records(*heldout):
        judged.write(line)
    judged.close()
    spectrum = adapters.singular_values(policy.params, policy.sites)
    if spectrum:
        write_safetensors(workdir / "spectrum.safetensors", spectrum)
    write_json(workdir / "summary.json", summary)
