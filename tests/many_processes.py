"""Trains and adapts as one of several processes, and prints what `test_distributed.py` compares.

python -m tests.many_processes FOLDER PORT COUNT INDEX [APART]

With APART 1, all processes but the first one sample, one step behind, and nothing is adapted.
"""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import collectives
from grpocem_jax import adaptation
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import SearchConfig
from grpocem_jax.config.files import load_config
from grpocem_jax.runs.trained import TrainedRun, load_run
from grpocem_jax.training import loop as training
from grpocem_jax.training import step as steps
from grpocem_jax.training import update
from grpocem_jax.training.data import load_data
from grpocem_jax.utils import cluster
from studies.counted import count
from tests.runs import OUT_OF_MEMORY

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
        "train.fit_memory": True,
        "train.max_steps": 4,
        "train.warmup_steps": 1,
        "logging.interval": 2,
        "cem.population_size": 8,
        "cem.elite_ratio": 0.5,
        "search.generations": 2,
        "search.task": "general",
        "search.samples": 2,
        "search.gate": False,
    }
    config.update_from_flattened_dict(small)
    return config


def trouble(index: int) -> None:
    """Lets memory run out in process 1 of two, once, and the last prompt spoil the last step."""
    gradients, prepare = update._gradients, steps.prepare
    calls: list[int] = []

    def short_of_memory(*args: Any, micro_batch: int, **options: Any) -> Any:
        if index == 1 and micro_batch == 8:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
        return gradients(*args, micro_batch=micro_batch, **options)

    def spoilt(*args: Any) -> Any:
        prepared = prepare(*args)
        calls.append(1)
        if len(calls) < 4:
            return prepared
        weights = prepared.batch.weights.at[-1].set(np.nan)  # a prompt of the last process
        return prepared._replace(batch=prepared.batch._replace(weights=weights))

    update._gradients, steps.prepare = short_of_memory, spoilt


def gathered() -> dict[str, int]:
    """Bytes that the compiled programs between the processes leave on each of them."""
    mesh = cluster.here()._transport._mesh
    place = NamedSharding(mesh, PartitionSpec())
    parts = NamedSharding(mesh, PartitionSpec(cluster.AXIS))
    found = {}
    for name, program, kind in (("gather", cluster._same, "u1"), ("total", cluster._sum, "f4")):
        row = jax.ShapeDtypeStruct((mesh.size, 1024), kind, sharding=parts)
        found[name] = sum(collectives.received(program.lower(row, place).compile()).values())
    return found


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


def main(folder: Path, port: int, processes: int, index: int, apart: int = 0) -> dict[str, Any]:
    """Trains and adapts; in the folder lies the model."""
    if processes > 1:
        cluster.join(cluster.Place(f"127.0.0.1:{port}", processes, index), wait_s=600)
    done = count()
    trouble(index)
    training.report.write = lambda workdir: workdir / "report"  # seconds of drawing
    with cluster.here().together():
        # Another folder in each, as on machines that share none: process 0's is the run's.
        config = settings(str(folder / "model"))
        if apart:
            config.train.update({"staleness": 1, "rollout_processes": processes - 1})
        name = f"run{processes}" + "-apart" * apart
        summary = training.train(config, folder / f"{name}-{index}")
        run = load_run(folder / f"{name}-0")
        result = {"adapter": found(run.offsets), **({} if apart else adapted(run))}
    rounds, received = cluster.here().traffic
    return {
        "found": result,
        "done": done,
        "traffic": {"rounds": rounds, "bytes": received},
        "compiled": gathered() if processes > 1 else {},
        "summary": {name: summary[name] for name in ("micro_batch", "skipped_updates")},
        "devices used": summary["devices_used"],
        "steps": summary["steps"],
    }


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    # Threads of Gloo write to the same descriptor, in between.
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = main(Path(place), *map(int, numbers))
    print(json.dumps({**result, "said": said.getvalue()}))
