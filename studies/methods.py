"""The methods of the literature beside the report's, behind docs/methods.md.

    python -m studies.methods --quick
    python -m studies.methods --parts=builtin,noise,searches --steps=100 --doc docs/methods.md
    python -m studies.methods --parts=smollm2 --data FOLDER --seeds=3 --doc docs/methods.md

Each method is a few changes of a config (`METHODS`), and trains on the same prompts with as many
completions as ``grpo``, the config as it is: on the built-in model by ``configs/tiny.py``, or on
SmolLM2-135M by ``configs/smollm2.py``.  ``noise`` judges adapters under noise on the weights, and
``searches`` lets searches draw as many completions as a training (studies/method_searches.py).

Each training is a process and a run in ``--workdir``: the same command goes on where it was cut
off, also with more ``--seeds``, of which all methods have their first before any its second.
``--only=NAME,NAME`` runs some methods.  The figures are kept in ``studies/methods.json`` as they
come; ``--quick`` trains each for three steps, prints a row and keeps nothing.
"""

import dataclasses
import json
import math
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from grpocem_jax.adaptation import TrainedRun, load_run
from grpocem_jax.config import commands
from grpocem_jax.config.files import load_config
from grpocem_jax.rollouts import Item
from grpocem_jax.runs import metrics
from grpocem_jax.training import evaluation
from grpocem_jax.training import loop as training
from grpocem_jax.training.data import load_data
from studies import common, method_searches
from studies.common import Columns, gain_interval, interval, mean_ci, say, table

RESULTS = Path("studies/methods.json")
QUICK = 3
"""Steps of ``--quick``."""
RATIO: dict[str, Any] = {"grpo.updates": 2}
"""Two updates on a step's completions: with one, all ratios are 1 and their rules alike."""
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"grpo.advantages": "centred", "grpo.weights": "constant"},
    "rloo": {"grpo.advantages": "rloo"},
    "reinforce_pp": {"grpo.advantages": "reinforce_pp"},
    "bnpo": {"grpo.advantages": "bnpo"},
    "krpo": {"grpo.advantages": "krpo"},
    "unlikeliness": {"grpo.shaping": "unlikeliness"},
    "rebel": {"grpo.objective": "rebel", "grpo.advantages": "centred"},
    "a_star_po": {
        "grpo.objective": "a_star_po",
        "grpo.advantages": "a_star_po",
        "grpo.beta": 0.0,
    },
    "grpo, 2 updates": RATIO,
    "dapo": {
        **RATIO,
        "grpo.objective_options": {"low": 0.2, "high": 0.28},
        "grpo.weights": "token",
        "grpo.shaping": "overlong",
    },
    "gspo": {**RATIO, "grpo.objective_options": {"low": 3e-4, "high": 4e-4, "ratio": "sequence"}},
    "cispo": {**RATIO, "grpo.objective": "cispo"},
    "s_grpo": {"grpo.objective": "policy_gradient", "grpo.weights": "s_grpo"},
    "t_spmo": {
        "grpo.objective": "policy_gradient",
        "grpo.advantages": "t_spmo",
        "grpo.weights": "t_spmo",
    },
    "invadam": {"train.optimizer": "invadam", "train.optimizer_options": {"adam": 0.5}},
    "extrapolated": {"train.optimizer": "extrapolated"},
    **{
        name: {"adapter.type": name}
        for name in ("vera", "steering", "ia3", "grasp", "stoch_grasp", "hut", "tera", "lora_xs")
    },
    "lora": {"adapter.type": "lora", "adapter.options": {"rank": 1}},
    "tinylora": {"adapter.type": "tinylora"},
    "increlora": {
        "adapter.type": "increlora",
        "adapter.options": {"max_rank": 4},
        "train.optimizer": "increlora",
        "train.optimizer_options": {"budget": 60},
    },
}
"""What differs from the config."""


LEVELS = (0.0, 0.02, 0.05, 0.1)
"""Standard deviations of the noise on the weights, in those of each matrix."""
DRAWS = 5
"""Draws of that noise."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Where runs go and how many there are.

    Attributes:
      workdir: the folder of the runs.
      seeds: how many.
      data: the folder of SmolLM2's data, or ``hub``.
      only: names of `METHODS`, or empty for all.
      steps: of a run; 0 for the config's.
    """

    workdir: Path
    seeds: int
    data: str = "hub"
    only: tuple[str, ...] = ()
    steps: int = 0

    def rows(self, config: str) -> Iterator[list[dict[str, Any]]]:
        """The rows of the methods on a config so far, after each run."""
        names = self.only or tuple(METHODS)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for seed in range(self.seeds):
            for name in names:
                found[name].append(self.train(config, name, seed))
                row = {"method": name, **_row(found[name])}
                say(row)
                yield _against_grpo([{"method": x, **_row(own)} for x, own in found.items() if own])

    def train(self, config: str, name: str, seed: int) -> dict[str, Any]:
        """The summary of a run, with the ``peak_bytes`` of its process where it had one."""
        settings = self.settings(config, METHODS[name], seed)
        workdir = self.run(config, name, seed)
        if self.steps == QUICK:
            return training.train(settings, workdir)
        measured = workdir / "measured.json"
        if not measured.exists():
            with futures.ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn")
            ) as pool:
                peak = pool.submit(_train, settings.to_dict(), workdir).result()
            measured.write_text(json.dumps({"peak_bytes": peak}))
        summary = json.loads((workdir / "summary.json").read_text())
        return summary | json.loads(measured.read_text())

    def run(self, config: str, name: str, seed: int) -> Path:
        """The run directory."""
        folder = self.workdir / config.partition(":")[0]
        return folder / f"{name}-{seed}".replace(", ", "-").replace(" ", "-")

    def settings(
        self, config: str, changes: dict[str, Any], seed: int
    ) -> ml_collections.ConfigDict:
        """The config with some changes."""
        settings = load_config(config)
        settings.update_from_flattened_dict(changes)
        settings.seed = seed
        if self.steps:
            settings.train.max_steps = self.steps
        if self.steps == QUICK:
            settings.data.heldout_samples = 2
        return settings


def _train(settings: dict[str, Any], workdir: Path) -> int | None:
    """Trains in a process of its own; the most memory that it had, in bytes.

    None where the run had been trained before.
    """
    commands.keep_compiled_programs()
    if (workdir / "summary.json").exists():
        return None
    training.train(ml_collections.ConfigDict(settings), workdir)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return metrics.peak_memory_bytes() or resident * (1 if sys.platform == "darwin" else 1024)


def _row(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The gains of the seeds: mean and half of the 95% interval, over seeds or of the one run."""
    row: dict[str, Any] = {"n": len(summaries)}
    for judged in ("heldout", "heldout_greedy"):
        gains = [evaluation.Gain(**summary[judged]["overall"]) for summary in summaries]
        row[judged] = gain_interval(gains)
        row[f"{judged}_gains"] = [gain.gain for gain in gains]
    row["numbers"] = summaries[0]["trainable_parameters"]
    # The first run of a method may compile what later ones find, and others may share the machine.
    row["seconds"] = min(summary["train_seconds"] for summary in summaries)
    peaks = [summary["peak_bytes"] for summary in summaries if summary.get("peak_bytes")]
    return row | ({"peak_bytes": min(peaks)} if peaks else {})


def _against_grpo(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the greedy gain less that of ``grpo`` with the same seed, mean and interval."""
    gains = {row["method"]: row["heldout_greedy_gains"] for row in rows}
    for row in rows:
        pairs = zip(gains[row["method"]], gains.get("grpo", ()), strict=False)
        differences = [own - base for own, base in pairs]
        if len(differences) > 1:
            row["over_grpo"] = mean_ci(differences)
    return rows


def builtin(study: Study) -> Iterator[dict[str, Any]]:
    """On the built-in model, the five tasks."""
    return ({"rows": rows} for rows in study.rows("tiny"))


def smollm2(study: Study) -> Iterator[dict[str, Any]]:
    """On SmolLM2-135M, two tasks of labels."""
    return ({"rows": rows} for rows in study.rows(f"smollm2:{study.data}"))


def noise(study: Study) -> Iterator[dict[str, Any]]:
    """GRASP and StochGRASP of ``builtin`` under Gaussian noise on the weights of the model."""
    found: dict[tuple[str, float], list[evaluation.Gain]] = {}
    for seed in range(study.seeds):
        for name in ("grasp", "stoch_grasp"):
            study.train("tiny", name, seed)
            run = load_run(study.run("tiny", name, seed))
            items = load_data(run.config, run.policy).heldout
            for level in LEVELS:
                gains = found.setdefault((name, level), [])
                draws = range(DRAWS if level else 1)
                gains += [_under_noise(run, items, level, draw) for draw in draws]
        rows: list[dict[str, Any]] = []
        for level in LEVELS:
            row: dict[str, Any] = {"level": level, "n": len(found["grasp", level])}
            for name in ("grasp", "stoch_grasp"):
                gains = found[name, level]
                row[name] = gain_interval(gains)
            rows.append(row)
        say(rows[-1])
        yield {"rows": rows}


def _under_noise(
    run: TrainedRun, items: Sequence[Item], level: float, draw: int
) -> evaluation.Gain:
    """Mean greedy reward with the adapter less that without, both on the same noisy weights."""
    policy = dataclasses.replace(
        run.policy, params=noisy(run.policy.params, level, jax.random.key(draw))
    )
    before, after = (
        evaluation.evaluate(policy, x, items, jax.random.key(0), run.config, greedy=True)[0]
        for x in (policy.zero, run.offsets)
    )
    tasks = [item.task.name for item in items]
    return evaluation.compare(run.config.data.tasks, tasks, before, after)["overall"]


def noisy(params: Any, level: float, key: jax.Array) -> Any:
    """Parameters with Gaussian noise on each matrix, ``level`` times its standard deviation."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [
        x if x.ndim < 2 else x + level * jnp.std(x) * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def searches(study: Study) -> Iterator[dict[str, Any]]:
    """Searches on the built-in model with as many completions as a training."""
    settings = study.settings("tiny", {}, 0)
    return method_searches.rows(settings, seeds=study.seeds, steps=study.steps)


PARTS = {f.__name__: f for f in (builtin, noise, searches, smollm2)}
TRAINED: Columns = {
    "method": lambda r: r["method"],
    "numbers": lambda r: f"{r['numbers']:,}",
    "seeds": lambda r: str(r["n"]),
    "gain, sampled": lambda r: interval(r["heldout"]),
    "gain, greedy": lambda r: interval(r["heldout_greedy"]),
    "against grpo": lambda r: interval(r["over_grpo"]) if "over_grpo" in r else "",
    "seconds": lambda r: f"{r['seconds']:.0f}",
    "peak MB": lambda r: f"{r['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in r else "",
}
COLUMNS: dict[str, Columns] = {
    "builtin": TRAINED,
    "smollm2": TRAINED,
    "noise": {
        "noise": lambda r: f"{r['level']:g}",
        "draws": lambda r: str(r["n"]),
        "grasp": lambda r: interval(r["grasp"]),
        "stoch_grasp": lambda r: interval(r["stoch_grasp"]),
    },
    "searches": method_searches.COLUMNS,
}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The document's tables by the name of their markers."""
    return {
        f"methods {name}": table(found["rows"], COLUMNS[name]) for name, found in results.items()
    }


def main() -> None:
    """Reads the flags, trains and writes the tables."""
    if "--quick" in sys.argv[1:]:
        commands.keep_compiled_programs()
        with tempfile.TemporaryDirectory() as folder:
            study = Study(Path(folder), 1, steps=QUICK)
            for rows in study.rows("tiny"):
                assert math.isfinite(rows[-1]["heldout"][0]), rows[-1]
                print(json.dumps(rows[-1]), flush=True)
            for found in searches(study):
                print(json.dumps(found["rows"][-1]), flush=True)
        return
    common.run(
        __doc__ or "",
        PARTS,
        tables,
        lambda args: Study(
            args.workdir,
            args.seeds,
            args.data,
            tuple(filter(None, args.only.split(","))),
            args.steps,
        ),
        results=RESULTS,
        seeds=5,
        flags={"--workdir": Path("runs/methods"), "--data": "hub", "--only": "", "--steps": 0},
    )


if __name__ == "__main__":
    main()
