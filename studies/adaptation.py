"""The evidence behind studies/adaptation.md, on the built-in model.

    python -m studies.adaptation [--parts prompts,...] [--seeds 5] [--doc studies/adaptation.md]

runs the parts (a few hours in all on 2 CPU cores), keeps the figures of each in
``studies/adaptation.json`` (of ``tasks`` and ``rewards`` after each task, which is not run again),
and writes the tables of all parts at hand into the document, between its markers.  ``--parts=``
only writes the tables again.

Everything starts from the zero adapter, the pretrained model.  What judges (text or prompts) is
never part of a search.  Intervals are 95%, by Student's t, over the units named in a table.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Adaptation, Text, TrainedRun
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.builtin import data, foreign
from grpocem_jax.config import Config, load_config, parse_config
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.training.data import load_data
from studies import common
from studies.common import interval, mean_ci, prompt_table, say, searching, table

RESULTS = Path("studies/adaptation.json")
TASKS = ("qa", "sentiment", "summarization", "classification", "general")
SPACES: dict[str, dict[str, Any]] = {
    "full": {"space": "full", "population_size": 50, "generations": 10},
    "subspace": {"space": "subspace", "population_size": 50, "generations": 10},
    "experts": {"space": "experts", "population_size": 50, "generations": 20},
    "experts per layer": {
        "space": "experts",
        "per_site": True,
        "population_size": 50,
        "generations": 20,
    },
}
"""The search spaces, with the searches that the time of the study allows."""


def load() -> TrainedRun:
    """The built-in model with a zero adapter and the settings of configs/tiny.py."""
    config = parse_config(load_config("tiny"))
    policy = load_policy(config)
    return TrainedRun(config, policy, policy.zero)


class Study:
    """What the parts share."""

    def __init__(self, run: TrainedRun, seeds: int):
        self.run, self.seeds = run, seeds
        data = load_data(run.config, run.policy)
        self.train, self.heldout = data.train, data.heldout
        self.space = functools.cache(
            lambda name: adaptation.make_space(run.policy, run.offsets, self.settings(name).search)
        )

    def settings(self, space: str = "full", **changes: Any) -> Config:
        """The default of configs/tiny.py in a space, with changes."""
        return searching(self.run.config, **{**SPACES[space], **changes})

    def adapt(
        self, texts: str | Sequence[Text], seed: int, settings: Config, space: str = "full"
    ) -> Adaptation:
        """`adaptation.adapt` in a named space."""
        key = jax.random.key(seed)
        run = self.run._replace(config=settings)
        return adaptation.adapt(run, texts, key=key, space=self.space(space))

    def likelihood(self, offsets: Offsets, texts: Sequence[Text]) -> float:
        """Mean over texts of the log-likelihood per token, nats."""
        return float(adaptation.log_likelihoods(self.run, offsets, texts).mean())

    def reward(self, offsets: Offsets, items: Sequence[rollouts.Item], samples: int = 2) -> float:
        """Mean sampled reward of prompts, the same random numbers for every adapter."""
        rewards = rollouts.population_rewards(
            self.run.policy,
            jax.tree.map(lambda x: x[None], offsets),
            items,
            jax.random.key(99),
            self.run.config.generation,
            num_samples=samples,
            buckets=self.run.config.search.buckets,
        )
        return float(np.nanmean(rewards))

    def cut(self, text: str, start: int, stop: int | None) -> str:
        """Some tokens of a text as text."""
        tokenizer = self.run.policy.tokenizer
        return tokenizer.decode(tokenizer.encode(text)[start:stop])

    def texts(self, kind: str, count: int, seed: int, shortest: int) -> list[str]:
        """Texts like the pretraining text ("familiar"), or of a foreign kind."""
        if kind != "familiar":
            return foreign.passages(kind, count, seed)
        tokens = self.run.policy.tokenizer
        found = (
            text
            for text in data.pretraining_texts(1_000_000 + seed, 100 * count)
            if shortest <= len(tokens.encode(text)) <= 100
        )
        return [next(found) for _ in range(count)]


def prompts(study: Study) -> dict[str, Any]:
    """One prompt of 30 tokens, judged on what follows it; gate on and off."""
    methods: dict[str, dict[str, Any]] = {
        "cem, sigma 0.3": {"noise_std": 0.3},
        "cem, sigma 0.1": {"noise_std": 0.1},
        "cem, sigma 0.03": {"noise_std": 0.03},
        "gradient": {"method": "gradient"},
    }
    rows = []
    for kind in ("familiar", "recipe", "log"):
        count = 10 if kind == "familiar" else 5
        texts = study.texts(kind, count, 5, 40)
        for name, changes in methods.items():
            for gate in (False, True):
                if gate and name in ("cem, sigma 0.03", "cem, sigma 0.3"):
                    continue
                settings = study.settings(population_size=100, generations=50, gate=gate, **changes)
                gains, fits, adapted = [], [], 0
                for i, text in enumerate(texts):
                    judge = [Text(study.cut(text, 0, 30), study.cut(text, 30, None))]
                    found = study.adapt(judge[0].prompt, i, settings)
                    before = study.likelihood(study.run.offsets, judge)
                    gains.append(study.likelihood(found.offsets, judge) - before)
                    fits.append(found.fitness_after - found.fitness_before)
                    adapted += found.returned != "start"
                row = {"text": kind, "method": name, "gate": gate, "n": count}
                rows.append(
                    {
                        **row,
                        "fit": mean_ci(fits),
                        "gain": mean_ci(gains),
                        "adapted": adapted,
                    }
                )
                say(rows[-1])
    return {"rows": rows}


def gate(study: Study) -> dict[str, Any]:
    """The same with more prompts: how many standard errors the gate should ask for."""
    rows = []
    for kind in ("familiar", "foreign"):
        for name, asked in (("gradient", (0.0, 1.0, 1.5, 2.0, 3.0)), ("cem", (2.0,))):
            count = 48 if name == "gradient" else 24
            texts = (
                study.texts(kind, count, 7, 40)
                if kind == "familiar"
                else [t for k in foreign.KINDS for t in study.texts(k, count // 2, 7, 40)]
            )

            def gains(texts=texts, **changes: Any) -> tuple[list[float], int]:
                settings = study.settings(
                    population_size=100, generations=50, noise_std=0.1, **changes
                )
                found, adapted = [], 0
                for i, text in enumerate(texts):
                    judge = [Text(study.cut(text, 0, 30), study.cut(text, 30, None))]
                    one = study.adapt(judge[0].prompt, i, settings)
                    before = study.likelihood(study.run.offsets, judge)
                    found.append(study.likelihood(one.offsets, judge) - before)
                    adapted += one.returned != "start"
                return found, adapted

            free, _ = gains(method=name, gate=False)
            for z in asked:
                gated, adapted = gains(method=name, gate_z=z)
                row = {"text": kind, "method": name, "z": z, "n": count, "adapted": adapted}
                rows.append({**row, "gain": mean_ci(gated), "ungated": mean_ci(free)})
                say(rows[-1])
    return {"rows": rows}


def fewshot(study: Study) -> dict[str, Any]:
    """Four passages of a kind of foreign text, judged on 24 others."""
    methods: dict[str, dict[str, Any]] = {
        "cem, gate": {},
        "cem, no gate": {"gate": False},
        "random search": {"momentum": 1.0, "std_momentum": 1.0, "returned": "best", "gate": False},
        "gradient, gate": {"method": "gradient"},
        "gradient, no gate": {"method": "gradient", "gate": False},
    }
    rows = []
    for kind in ("familiar", "recipe", "log"):
        for name, changes in methods.items():
            gains = []
            for seed in range(study.seeds):
                passages = study.texts(kind, 28, 100 + seed, 40)
                texts = [Text(study.cut(passage, 0, 31)) for passage in passages]
                settings = study.settings(generations=20, population_size=64, **changes)
                found = study.adapt(texts[:4], seed, settings)
                before = study.likelihood(study.run.offsets, texts[4:])
                gains.append(study.likelihood(found.offsets, texts[4:]) - before)
            rows.append({"text": kind, "method": name, "n": study.seeds, "gain": mean_ci(gains)})
            say(rows[-1])
    return {"rows": rows}


def _task_rows(
    study: Study,
    spaces: dict[str, dict[str, dict[str, Any]]],
    adapt: Callable[[Sequence[rollouts.Item], int, Config, str], Adaptation],
    done: Sequence[dict[str, Any]],
    **common: Any,
) -> Iterator[dict[str, Any]]:
    """Every task, space, method and seed, judged on 24 held-out prompts of the task.

    Yields the rows after each task.  Tasks of which all are there are not searched again.
    """
    of_tasks = {task: [row for row in done if row["task"] == task] for task in TASKS}
    wanted = [(space, name, study.seeds) for space, own in spaces.items() for name in own]
    for task in TASKS:
        if [(row["space"], row["method"], row["n"]) for row in of_tasks[task]] == wanted:
            continue
        rows = []
        support = [item for item in study.train if item.task.name == task]
        judged = [item for item in study.heldout if item.task.name == task][:24]
        texts = demonstrations(judged, "heldout")

        def judge(offsets, texts=texts, judged=judged):
            return study.likelihood(offsets, texts), study.reward(offsets, judged)

        base = np.array(judge(study.run.offsets))
        for space, methods in spaces.items():
            results: dict[str, list[Any]] = {}
            for seed in range(study.seeds):
                examples = support[8 * seed : 8 * seed + 8]
                for name, changes in methods.items():
                    settings = study.settings(space, **{**common, **changes})
                    found = adapt(examples, seed, settings, space)
                    results.setdefault(name, []).append(judge(found.offsets))
            random = np.array(results["random search"])
            for name, values in results.items():
                row = {"task": task, "space": space, "method": name, "n": study.seeds}
                for column, kind in enumerate(("likelihood", "reward")):
                    gains = np.array(values)[:, column]
                    row[kind] = mean_ci(gains - base[column])
                    row[f"{kind}_over_random"] = mean_ci(gains - random[:, column])
                rows.append(row)
                say(row)
        of_tasks[task] = rows
        yield {"rows": [row for own in of_tasks.values() for row in own]}


def demonstrations(items: Sequence[rollouts.Item], split: str) -> list[Text]:
    """The prompts with answers in the style that the reward prefers."""
    answers = data.demonstrations(items[0].task.name, split)
    return [Text(item.example.prompt, answers[item.example.prompt]) for item in items]


RANDOM: dict[str, Any] = {"momentum": 1.0, "std_momentum": 1.0, "returned": "best"}
SPREAD = {"full": 0.1, "subspace": 1.0, "experts": 0.3, "experts per layer": 0.3}
"""Initial standard deviations; a direction of the subspace has length 1, an expert about 10."""


def tasks(study: Study, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Eight examples of a task by likelihood of their answers."""

    def adapt(items, seed, settings, space):
        settings = searching(settings, noise_std=SPREAD[space])
        if settings.search.method == "gradient":
            # A step costs about three forwards.
            steps = settings.cem.population_size * settings.search.generations // 3
            settings = searching(settings, generations=steps)
        return study.adapt(demonstrations(items, "train"), seed, settings, space)

    searches: dict[str, dict[str, Any]] = {
        "cem": {},
        "cem, gate": {"gate": True},
        "random search": RANDOM,
    }
    gradient: dict[str, dict[str, Any]] = {
        "gradient": {"method": "gradient"},
        "gradient, gate": {"method": "gradient", "gate": True},
    }
    spaces = {
        "full": searches | gradient,
        "subspace": searches,
        "experts": searches | gradient,
        "experts per layer": searches,
    }
    return _task_rows(study, spaces, adapt, done, gate=False)


def rewards(study: Study, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Eight prompts of a task by the reward of completions."""

    def adapt(items, seed, settings, space):
        settings = searching(settings, noise_std=SPREAD[space])
        return adaptation.adapt(
            study.run._replace(config=settings),
            items,
            key=jax.random.key(seed),
            space=study.space(space),
        )

    searches: dict[str, dict[str, Any]] = {"cem": {}, "random search": RANDOM}
    gated: dict[str, dict[str, Any]] = {
        "cem, gate": {"gate": True},
        "cem, gate at z = 0": {"gate": True, "gate_z": 0.0},
    }
    common = {
        "generations": 8,
        "population_size": 24,
        "fitness": "reward",
        "samples": 1,
        "gate": False,
    }
    spaces = {"full": searches, "experts": searches | gated}
    return _task_rows(study, spaces, adapt, done, **common)


def options(study: Study) -> dict[str, Any]:
    """One change at a time from a common setting, on foreign text; what it does and costs."""
    common = {"population_size": 50, "generations": 20, "gate": False, "noise_std": 0.1}
    variants: dict[str, dict[str, Any]] = {
        "common setting": {},
        "sigma 0.03": {"noise_std": 0.03},
        "sigma 0.3 (the report)": {"noise_std": 0.3},
        "floor on sigma 0.05": {"min_std": 0.05},
        "keep-old weight of sigma 0.8": {"std_momentum": 0.8},
        "momentum 0": {"momentum": 0.0},
        "momentum 0.7": {"momentum": 0.7},
        "elite ratio 0.1": {"elite_ratio": 0.1},
        "elite ratio 0.5": {"elite_ratio": 0.5},
        "best instead of mean": {"returned": "best"},
        "population 25": {"population_size": 25},
        "population 100": {"population_size": 100},
        "population 200": {"population_size": 200},
        "5 generations": {"generations": 5},
        "80 generations": {"generations": 80},
        "gate": {"gate": True},
    }
    rows = []
    for name, changes in variants.items():
        fits, gains, sigmas = [], [], []
        for seed in range(study.seeds):
            kind = foreign.KINDS[seed % 2]
            texts = [Text(study.cut(p, 0, 31)) for p in study.texts(kind, 27, 300 + seed, 0)]
            settings = study.settings(**{**common, **changes})
            found = study.adapt(texts[:3], seed, settings)
            before = study.likelihood(study.run.offsets, texts[3:])
            gains.append(study.likelihood(found.offsets, texts[3:]) - before)
            fits.append(found.fitness_after - found.fitness_before)
            sigmas.append(float(found.search.history.std[-1]) if found.search else np.nan)
        row = {
            "variant": name,
            "fit": mean_ci(fits),
            "gain": mean_ci(gains),
            "n": study.seeds,
        }
        rows.append({**row, "sigma": float(np.mean(sigmas))})
        say(rows[-1])
    lengths = []
    for length in (8, 15, 30, 60):
        settings = study.settings(population_size=100, generations=50)
        gains, seconds = [], []
        for i, text in enumerate(study.texts("recipe", 8, 400, 0)):
            judge = [Text(study.cut(text, 0, length), study.cut(text, length, None))]
            found = study.adapt(judge[0].prompt, i, settings)
            before = study.likelihood(study.run.offsets, judge)
            gains.append(study.likelihood(found.offsets, judge) - before)
            seconds.append(found.search.seconds if found.search else 0.0)
        lengths.append(
            {
                "tokens": length,
                "gain": mean_ci(gains),
                "seconds": float(np.median(seconds)),
                "n": 8,
            }
        )
        say(lengths[-1])
    return {"rows": rows, "lengths": lengths}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The document's tables by the name of their markers."""
    made = {}
    if "prompts" in results:
        made["prompts"] = prompt_table(results["prompts"]["rows"])
    if "gate" in results:
        made["gate"] = table(
            results["gate"]["rows"],
            {
                "text": lambda r: r["text"],
                "method": lambda r: r["method"],
                "z": lambda r: f"{r['z']:g}",
                "gain without the gate": lambda r: interval(r["ungated"]),
                "gain with it": lambda r: interval(r["gain"]),
                "adapted": lambda r: f"{r['adapted']} of {r['n']}",
            },
        )
    if "fewshot" in results:
        made["fewshot"] = table(
            results["fewshot"]["rows"],
            {
                "text": lambda r: r["text"],
                "method": lambda r: r["method"],
                "gain on other passages": lambda r: interval(r["gain"]),
            },
        )
    for part in ("tasks", "rewards"):
        if part in results:
            made[part] = table(
                results[part]["rows"],
                {
                    "task": lambda r: r["task"],
                    "space": lambda r: r["space"],
                    "method": lambda r: r["method"],
                    "likelihood of answers": lambda r: interval(r["likelihood"]),
                    "against random search": lambda r: interval(r["likelihood_over_random"]),
                    "reward": lambda r: interval(r["reward"]),
                    "reward against random search": lambda r: interval(r["reward_over_random"]),
                },
            )
    if "options" in results:
        made["options"] = table(
            results["options"]["rows"],
            {
                "change": lambda r: r["variant"],
                "gain on the examples": lambda r: interval(r["fit"]),
                "gain on other passages": lambda r: interval(r["gain"]),
                "sigma at the end": lambda r: f"{r['sigma']:.3f}",
            },
        )
        made["lengths"] = table(
            results["options"]["lengths"],
            {
                "tokens of the prompt": lambda r: str(r["tokens"]),
                "gain on what follows": lambda r: interval(r["gain"]),
                "seconds": lambda r: f"{r['seconds']:.1f}",
            },
        )
    return made


PARTS = {f.__name__: f for f in (prompts, gate, fewshot, tasks, rewards, options)}


def main() -> None:
    """Reads the flags, runs the parts and writes the tables."""
    common.run(
        "The evidence behind studies/adaptation.md.",
        PARTS,
        tables,
        lambda args: Study(load(), args.seeds),
        results=RESULTS,
    )


if __name__ == "__main__":
    main()
