"""Searches at the cost of a training: the part ``searches`` of `studies.methods`.

A search draws its candidates around the base model, scores each by the mean reward of a completion
of each of some prompts, and has after its generations drawn as many completions as the training of
the same number of steps.  What it found is judged as a trained adapter is, on the same held-out
prompts; of `best_perturbations` a vote of the best is judged greedily beside.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from grpocem_jax import adapters, rollouts
from grpocem_jax.adaptation import Text, TrainedRun, adapt, best_perturbations, vote
from grpocem_jax.config import Config, parse_config
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.training import evaluation
from grpocem_jax.training.data import load_data
from studies.common import Columns, gain_interval, interval, say, searching

PROMPTS, POPULATION = 20, 16
"""Of a generation: ``PROMPTS * POPULATION`` completions."""
LORA: dict[str, Any] = {"adapter.type": "lora", "adapter.options": {"rank": 1}}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cem": ({}, {}),
    "random search": ({}, {"momentum": 1.0, "std_momentum": 1.0, "returned": "best"}),
    "sep_cma_es": ({}, {"method": "evosax:Sep_CMA_ES"}),
    "snes": ({}, {"method": "evosax:SNES"}),
    "open_es": ({}, {"method": "evosax:Open_ES"}),
    "eggroll": ({}, {"method": "eggroll"}),
    "cem, lora": (LORA, {}),
    "sep_cma_es, lora": (LORA, {"method": "evosax:Sep_CMA_ES"}),
    "eggroll, lora": (LORA, {"method": "eggroll"}),
    "vote": ({}, {}),
}
"""What differs from the config, and from its search."""
KEPT = 5
"""Perturbations that vote."""


def rows(
    settings: ml_collections.ConfigDict, *, seeds: int, steps: int
) -> Iterator[dict[str, Any]]:
    """The rows of the searches so far, after each.

    Args:
      settings: the config that a training is compared by.
      seeds: searches of each method.
      steps: of the training, 0 for the config's own.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, (changes, search) in METHODS.items():
            own = ml_collections.ConfigDict(settings.to_dict())
            own.update_from_flattened_dict(changes)
            own.seed = seed
            config = parse_config(own)
            found[name].append(_search(config, name, search, steps))
            say({"method": name, **_row(found[name])})
            yield {"rows": [{"method": x, **_row(each)} for x, each in found.items() if each]}


def _search(config: Config, name: str, search: dict[str, Any], steps: int) -> dict[str, Any]:
    """What one search found, judged."""
    policy = load_policy(config)
    data = load_data(config, policy)
    total = len(data.train) // config.prompts_drawn_per_step * config.train.epochs
    budget = (steps or total) * config.prompts_per_step * config.grpo.group_size
    prompts = data.train[:PROMPTS]
    generations = max(1, budget // (POPULATION * len(prompts)))
    config = searching(
        config,
        **{
            "fitness": "reward",
            "gate": False,
            "population_size": POPULATION,
            "generations": generations,
            **search,
        },
    )
    run = TrainedRun(config, policy, policy.zero)
    key = jax.random.key(config.seed)
    began = time.perf_counter()
    if name == "vote":
        kept = best_perturbations(
            run,
            prompts,
            key,
            population_size=POPULATION * generations,
            noise_std=config.cem.noise_std,
            keep=KEPT,
        )
        offsets = jax.tree.map(lambda x: x[0], kept)
    else:
        offsets = adapt(run, prompts, key=key).offsets
    seconds = time.perf_counter() - began
    tasks = [item.task.name for item in data.heldout]
    row: dict[str, Any] = {
        "seconds": seconds,
        "numbers": adapters.num_params(policy.zero),
        "completions": generations * POPULATION * len(prompts),
    }
    judge_key = jax.random.key(config.seed + 1)
    before, after = (
        evaluation.judge(policy, x, data.heldout, judge_key, config) for x in (policy.zero, offsets)
    )
    greedy = after.greedy_rewards
    if name == "vote":
        greedy = _voted(run, kept, data.heldout)
    for judged, old, new in (
        ("heldout", before.rewards, after.rewards),
        ("heldout_greedy", before.greedy_rewards, greedy),
    ):
        row[judged] = evaluation.compare(config.data.tasks, tasks, old, new)["overall"]
    return row


def _voted(run: TrainedRun, kept: Any, items: Sequence[rollouts.Item]) -> np.ndarray:
    """Reward of what a vote decides for each prompt, float ``[n]``."""
    decided = vote(run, kept, [Text(item.example.prompt) for item in items])
    winners = np.array([found.adapter for found in decided])
    own = jax.tree.map(lambda x: x[winners], kept)
    key = jax.random.key(0)
    return evaluation.evaluate(
        run.policy, own, items, key, run.config, greedy=True, own_adapters=True
    )[0]


def _row(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As a row of trainings: mean and half of the 95% interval, over seeds or of the one search."""
    row: dict[str, Any] = {"n": len(found)}
    for judged in ("heldout", "heldout_greedy"):
        row[judged] = gain_interval([one[judged] for one in found])
    row |= {name: found[0][name] for name in ("numbers", "completions")}
    row["seconds"] = sum(one["seconds"] for one in found) / len(found)
    return row


COLUMNS: Columns = {
    "method": lambda r: r["method"],
    "numbers": lambda r: f"{r['numbers']:,}",
    "seeds": lambda r: str(r["n"]),
    "completions": lambda r: f"{r['completions']:,}",
    "gain, sampled": lambda r: interval(r["heldout"]),
    "gain, greedy": lambda r: interval(r["heldout_greedy"]),
    "seconds": lambda r: f"{r['seconds']:.0f}",
}
