"""The methods of the literature beside the report's, behind docs/methods.md.

    python -m studies.methods --quick
    python -m studies.methods --parts=builtin --seeds=1 --steps=100 --doc docs/methods.md
    python -m studies.methods --parts=smollm2 --data FOLDER --doc docs/methods.md

Each method is a few changes of a config (`METHODS`), and trains on the same prompts with as many
completions as ``grpo``, the config as it is: on the built-in model by ``configs/tiny.py``, or on
SmolLM2-135M by ``configs/smollm2.py``.  Each training is a run in ``--workdir``: the same command
goes on where it was cut off.  ``--only=NAME,NAME`` runs some.  The figures are kept in
``studies/methods.json``; ``--quick`` trains each for three steps, prints a row and keeps nothing.
"""

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from grpocem_jax.config.files import load_config
from grpocem_jax.training import loop as training
from studies import common
from studies.common import interval, mean_ci, say, table

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

    def rows(self, config: str) -> Iterator[dict[str, Any]]:
        """A row for each method on a config."""
        for name in self.only or METHODS:
            folder = self.workdir / config.partition(":")[0]
            summaries = []
            for seed in range(self.seeds):
                settings = self.settings(config, METHODS[name], seed)
                workdir = folder / f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
                summaries.append(training.train(settings, workdir))
            row = {"method": name, **_row(summaries)}
            say(row)
            yield row

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


def _row(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The gains of the seeds: mean and half of the 95% interval, over seeds or of the one run."""
    row: dict[str, Any] = {"n": len(summaries)}
    for judged in ("heldout", "heldout_greedy"):
        gains = [summary[judged]["overall"] for summary in summaries]
        low, high = gains[0]["gain_ci95"]
        one = (gains[0]["gain"], (high - low) / 2)
        row[judged] = mean_ci([gain["gain"] for gain in gains]) if len(gains) > 1 else one
    row["numbers"] = summaries[0]["trainable_parameters"]
    row["seconds"] = sum(summary["train_seconds"] for summary in summaries) / len(summaries)
    return row


def builtin(study: Study) -> dict[str, Any]:
    """On the built-in model, the five tasks."""
    return {"rows": list(study.rows("tiny"))}


def smollm2(study: Study) -> dict[str, Any]:
    """On SmolLM2-135M, two tasks of labels."""
    return {"rows": list(study.rows(f"smollm2:{study.data}"))}


PARTS = {f.__name__: f for f in (builtin, smollm2)}
COLUMNS = {
    "method": lambda r: r["method"],
    "numbers": lambda r: f"{r['numbers']:,}",
    "gain, sampled": lambda r: interval(r["heldout"]),
    "gain, greedy": lambda r: interval(r["heldout_greedy"]),
    "seconds": lambda r: f"{r['seconds']:.0f}",
}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The document's tables by the name of their markers."""
    return {f"methods {name}": table(found["rows"], COLUMNS) for name, found in results.items()}


def main() -> None:
    """Reads the flags, trains and writes the tables."""
    if "--quick" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            for row in Study(Path(folder), 1, steps=QUICK).rows("tiny"):
                assert math.isfinite(row["heldout"][0]), row
                print(json.dumps(row), flush=True)
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
        seeds=3,
        flags={"--workdir": Path("runs/methods"), "--data": "hub", "--only": "", "--steps": 0},
    )


if __name__ == "__main__":
    main()
