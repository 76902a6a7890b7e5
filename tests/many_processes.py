"""Trains and adapts as one of several processes, and prints what `test_distributed.py` compares.

python -m tests.many_processes FOLDER PORT COUNT INDEX
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from grpocem_jax import adaptation
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import SearchConfig
from grpocem_jax.config.files import load_config
from grpocem_jax.runs.trained import TrainedRun, load_run
from grpocem_jax.training import loop as training
from grpocem_jax.training.data import load_data
from grpocem_jax.utils import cluster
from studies.counted import count

TEXT = "Review: The soup was cold, but the waiter was kind."


def settings(model: str) -> Any:
    """Steps of four prompts with four completions each."""
    config = load_config("tiny")
    small = {
        "model.source": model,
        "data.tasks": ("general",),
        "data.max_samples": 16,
        "data.heldout_samples": 2,
        "generation.max_new_tokens": 4,
        "grpo.group_size": 4,
        "train.batch_size": 16,
        "train.checkpoint_every_steps": 1,
        "train.eval_samples": 1,
        "train.max_steps": 3,
        "train.warmup_steps": 1,
        "logging.interval": 1,
        "cem.population_size": 8,
        "cem.elite_ratio": 0.5,
        "search.generations": 2,
        "search.task": "general",
        "search.samples": 2,
        "search.gate": False,
    }
    config.update_from_flattened_dict(small)
    return config


def found(offsets: Offsets) -> dict[str, Any]:
    """Offsets as JSON."""
    return {name: np.asarray(value).tolist() for name, value in offsets.items()}


def adapted(run: TrainedRun) -> dict[str, Any]:
    """Where searches end: on the likelihood of a text and on a reward."""
    items = load_data(run.config, run.policy).train[:4]
    reward = dataclasses.replace(run.config.search, fitness="reward")

    def by(what: Any, own: SearchConfig) -> dict[str, Any]:
        return found(adaptation.adapt(run, what, settings=own).offsets)

    return {
        "likelihood": by(TEXT, run.config.search),
        "reward": by(items, reward),
    }


def main(folder: Path, port: int, processes: int, index: int) -> dict[str, Any]:
    """Trains and adapts; in the folder lies the model."""
    if processes > 1:
        cluster.join(cluster.Place(f"127.0.0.1:{port}", processes, index), wait_s=120)
    done = count()
    training.report.write = lambda workdir: workdir / "report"  # seconds of drawing
    with cluster.here().together():
        # Another folder in each, as on machines that share none: process 0's is the run's.
        config = settings(str(folder / "model"))
        summary = training.train(config, folder / f"run{processes}-{index}")
        run = load_run(folder / f"run{processes}-0")
        result = {"adapter": found(run.offsets), **adapted(run)}
    rounds, received = cluster.here().traffic
    return {
        "found": result,
        "done": done,
        "traffic": {"rounds": rounds, "bytes": received},
        "devices used": summary["devices_used"],
        "steps": summary["steps"],
    }


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    line = json.dumps(main(Path(place), *map(int, numbers)))
    print(line, file=sys.__stdout__)
