"""The report's two tables on held-out prompts: rewards by task, and what adaptation did.

Each held-out prompt is adapted to by itself, as the report does; or, with ``search.support``, one
search a task adapts to some of its training examples, and the held-out prompts only judge.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Adaptation, Text, TrainedRun
from grpocem_jax.runs.screens import unit
from grpocem_jax.training import evaluation, screens
from grpocem_jax.utils.errors import InputError


def adapted_tables(
    run: TrainedRun,
    support: Sequence[rollouts.Item],
    heldout: Sequence[rollouts.Item],
    *,
    key: jax.Array,
    progress: Any = lambda done, of: None,
) -> dict[str, Any]:
    """Adapts and judges on held-out prompts.

    Args:
      run: the trained run; ``config.search.support`` says what is adapted to.
      support: training prompts of the tasks, none of them held out.
      heldout: held-out prompts.
      key: PRNG key; consumed.
      progress: called with the number of searches done and of all.

    Returns:
      ``heldout`` (sampled) and ``heldout_greedy``: gains by task, as in summary.json;
      ``adaptation``: means by task of what `adaptation.summary` gives, with ``heldout_before`` and
      ``heldout_after``: mean log-likelihood per token of the held-out references, where the task
      has them; ``convergence``: `convergence` of all searches.

    Raises:
      InputError: too few support examples; a reward without them.
    """
    config, settings = run.config, run.config.search
    space = adaptation.make_space(run.policy, run.offsets, settings)
    search_key, sample_key = jax.random.split(key)
    names = list(dict.fromkeys(item.task.name for item in heldout))
    results: list[Adaptation] = []
    shared: dict[str, Adaptation] = {}
    searches = len(names) if settings.support else len(heldout)
    if settings.fitness == "reward" and not settings.support:
        raise InputError(
            "config.search.support=0: the reward of a held-out prompt is what judges, so it cannot "
            "be adapted to; set config.search.support to a number of training prompts."
        )
    for number, item in enumerate(heldout):
        name = item.task.name
        own_key = jax.random.fold_in(search_key, names.index(name) if settings.support else number)
        if not settings.support:
            results.append(
                adaptation.adapt(run, Text(item.example.prompt), key=own_key, space=space)
            )
            progress(len(results), searches)
            continue
        if name not in shared:
            examples = [i for i in support if i.task.name == name][: settings.support]
            if len(examples) < settings.support:
                raise InputError(
                    f"config.search.support={settings.support}: the task {name} has only "
                    f"{len(examples)} training examples; lower it."
                )
            shared[name] = _adapt_to_examples(run, examples, own_key, space)
            progress(len(shared), searches)
        results.append(shared[name])

    offsets = jax.tree.map(lambda *x: jnp.stack(x), *(r.offsets for r in results))
    tasks = [item.task.name for item in heldout]
    tables: dict[str, Any] = {}
    before = evaluation.judge(run.policy, run.offsets, heldout, sample_key, config)
    after = evaluation.judge(run.policy, offsets, heldout, sample_key, config, own_adapters=True)
    for name, rewards in (
        ("heldout", (before.rewards, after.rewards)),
        ("heldout_greedy", (before.greedy_rewards, after.greedy_rewards)),
    ):
        gains = evaluation.compare(names, tasks, *rewards)
        tables[name] = {task: dataclasses.asdict(gain) for task, gain in gains.items()}

    likelihood = _reference_likelihoods(run, heldout, offsets)
    tables["adaptation"] = {}
    for name in names:
        rows = [i for i, task in enumerate(tasks) if task == name]
        chosen = [shared[name]] if settings.support else [results[i] for i in rows]
        entry = _means([adaptation.summary(result) for result in chosen])
        if likelihood is not None and not np.isnan(likelihood[rows]).any():
            before_after = likelihood[rows].mean(0)
            entry["heldout_before"], entry["heldout_after"] = map(float, before_after)
        tables["adaptation"][name] = entry
    tables["convergence"] = convergence(list(shared.values()) or results)
    return tables


def convergence(results: Sequence[Adaptation]) -> dict[str, list[Any]]:
    """How the searches of several adaptations went, generation by generation.

    A search that ended early counts with its last values in the generations after.

    Args:
      results: the adaptations; those without a search do not count.

    Returns:
      ``best`` and ``mean``: means over the searches of each generation's largest and mean fitness,
      None where no search has one; ``running``: how many searches had this generation. All are as
      long as the longest search.
    """
    histories = [result.search.history for result in results if result.search is not None]
    longest = max((len(history.best) for history in histories), default=0)
    running = [sum(len(h.best) > number for h in histories) for number in range(longest)]
    found: dict[str, list[Any]] = {}
    for name in ("best", "mean"):
        curves = [np.asarray(getattr(history, name), np.float64) for history in histories]
        rows = [np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in curves]
        means = [values[np.isfinite(values)] for values in np.array(rows).T]
        found[name] = [float(values.mean()) if len(values) else None for values in means]
    return {**found, "running": running}


def _adapt_to_examples(
    run: TrainedRun, examples: Sequence[rollouts.Item], key: jax.Array, space: Any
) -> Adaptation:
    if run.config.search.fitness == "reward":
        return adaptation.adapt(run, examples, key=key, space=space)
    texts = [reference_text(item) or Text(item.example.prompt) for item in examples]
    return adaptation.adapt(run, texts, key=key, space=space)


def reference_text(item: rollouts.Item) -> Text | None:
    """The prompt with its reference completion, or None where the task has none."""
    completion = item.task.completion(item.example)
    return None if completion is None else Text(item.example.prompt, completion)


def _reference_likelihoods(
    run: TrainedRun, items: Sequence[rollouts.Item], offsets: Any
) -> np.ndarray | None:
    """Before and after, float ``[n, 2]``; NaN where the task has no reference."""
    texts = [reference_text(item) for item in items]
    rows = [i for i, text in enumerate(texts) if text is not None]
    if not rows:
        return None
    chosen = [text for text in texts if text is not None]
    own = jax.tree.map(lambda x: x[np.array(rows)], offsets)
    values = np.full((len(items), 2), np.nan)
    values[rows, 0] = adaptation.log_likelihoods(run, run.offsets, chosen)
    values[rows, 1] = adaptation.log_likelihoods(run, own, chosen, own_adapters=True)
    return values


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = (
        "fitness_before", "fitness_after", "generations", "candidates", "seconds", "converged",
        "adapted",
    )  # fmt: skip
    means = {}
    for name in numbers:
        present = [record[name] for record in records if record[name] is not None]
        means[name] = float(np.mean(present)) if present else None
    return {**means, "searches": len(records)}


def show(tables: dict[str, Any], config: Any) -> str:
    """Both tables as text."""
    titles = {
        "heldout": f"sampled at T={config.generation.temperature:g}",
        "heldout_greedy": "greedy",
    }
    lines = ["held-out reward, trained adapter against adapted"]
    for name, title in titles.items():
        gains = {
            task: evaluation.Gain(**{**gain, "gain_ci95": tuple(gain["gain_ci95"])})
            for task, gain in tables[name].items()
        }
        lines += [screens.table(gains, title), ""]
    lines.append(f"adaptation, fitness in {unit(config.search.fitness)}")
    lines.append(
        f"{'':<20}{'fitness':>9}{'after':>9}{'adapted':>9}{'converged':>10}"
        f"{'generations':>12}{'seconds':>9}{'held-out nats/token':>25}"
    )
    for name, row in tables["adaptation"].items():
        judged = (
            f"{row['heldout_before']:.3f} to {row['heldout_after']:.3f}"
            if "heldout_before" in row
            else "no reference"
        )
        fitness = [
            "none" if row[key] is None else f"{row[key]:.3f}"
            for key in ("fitness_before", "fitness_after")
        ]
        lines.append(
            f"  {name:<18}{fitness[0]:>9}{fitness[1]:>9}"
            f"{row['adapted']:9.0%}{row['converged']:10.0%}{row['generations']:12.1f}"
            f"{row['seconds']:9.2f}{judged:>25}"
        )
    return "\n".join(lines)
