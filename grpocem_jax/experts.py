"""Trains a library of expert vectors, which adaptation mixes.

    python -m grpocem_jax.experts --config configs/tiny.py --workdir runs/experts

trains one adapter on each task of the config and one on each of three mixtures: all tasks, those
with labels, and those without.  The report speaks of eight experts and does not define them; this
is our reading.  ``WORKDIR/runs/NAME`` are ordinary run directories; ``WORKDIR/library`` is what
``cem.experts`` takes (`checkpoints.load_library`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import flags

from grpocem_jax import checkpoints, commands, grpo
from grpocem_jax.config import parse_config
from grpocem_jax.errors import InputError
from grpocem_jax.policy import load_policy
from grpocem_jax.tasks import TASKS
from grpocem_jax.terminal import visible
from grpocem_jax.training import train

SNAPSHOTS = 5
"""Points of each training trajectory that the library keeps, for `spaces.principal_space`."""


def mixtures(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The experts' names and what each is trained on: single tasks, then mixtures of several."""
    experts: dict[str, tuple[str, ...]] = {name: (name,) for name in tasks}
    kinds = {
        "labels": tuple(name for name in tasks if "label" in TASKS[name].columns),
        "texts": tuple(name for name in tasks if "label" not in TASKS[name].columns),
        "all": tuple(tasks),
    }
    for name, chosen in kinds.items():
        if len(chosen) > 1 and chosen not in experts.values():
            experts[name] = chosen
    return experts


def train_experts(settings: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Trains the experts of a config one after the other.

    Args:
      settings: a config as for `train`.
      workdir: gets ``runs/`` and ``library/``.

    Returns:
      the library's folder: an adapter folder for each expert, and ``trajectory.safetensors`` with
      snapshots of all trainings, float32 ``[S, ...]`` a site.

    Raises:
      InputError: as `train`; the work directory holds a library already.
    """
    config, workdir = parse_config(settings), Path(workdir)
    library = workdir / "library"
    if library.exists():
        raise InputError(f"--workdir={workdir}: holds a library already; give another folder.")
    policy = load_policy(
        config.model, config.adapter, stop=config.generation.stop, seed=config.seed
    )
    template = grpo.init_state(policy.zero, config.hyperparameters)
    snapshots = []
    experts = mixtures(config.data.tasks)
    for number, (name, tasks) in enumerate(experts.items(), start=1):
        print(f"\nexpert {number} of {len(experts)}: {name} ({', '.join(tasks)})", flush=True)
        own = settings.copy_and_resolve_references()
        own.data.tasks = tasks
        steps = len(tasks) * config.data.max_samples // config.prompts_per_step
        steps = min(steps * config.train.epochs, config.train.max_steps or sys.maxsize)
        own.train.keep_checkpoints = 0
        own.train.checkpoint_every_steps = max(1, -(-steps // SNAPSHOTS))
        run = workdir / "runs" / name
        train(own, run)
        stored = checkpoints.Checkpoints(run)
        for step in stored.steps():
            snapshots.append(stored.restore(template, step)[0].adapter)
        stored.close()
        checkpoints.copy_adapter(run / "adapter", library / name)
    trajectory = jax.tree.map(lambda *x: np.stack(x), *snapshots)
    checkpoints.save_trajectory(library, trajectory)
    print(visible(f"\nlibrary of {len(experts)} experts in {library}"), flush=True)
    return library


def _main(argv: list[str]) -> None:
    del argv
    train_experts(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    commands.define_config()
    flags.DEFINE_string("workdir", "runs/experts", "Folder of the runs and the library.")
    commands.run(_main)
