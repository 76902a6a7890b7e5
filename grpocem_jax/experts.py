"""Trains a library of expert vectors, which adaptation mixes.

    python -m grpocem_jax.experts --config configs/tiny.py --workdir runs/experts

trains one adapter on each task of the config and one on each of three mixtures: all tasks, those
with labels, and those without.  The report speaks of eight experts and does not define them; this
is our reading.  ``WORKDIR/runs/NAME`` are ordinary run directories; ``WORKDIR/library`` is what
``search.experts`` takes (`checkpoints.load_library`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import flags

from grpocem_jax import grpo
from grpocem_jax.config import commands, parse_config
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.runs import checkpoints
from grpocem_jax.tasks import Task
from grpocem_jax.training import stages
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.loop import train
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import say

SNAPSHOTS = 5
"""Points of each training trajectory that the library keeps, for `spaces.principal_space`."""


def mixtures(tasks: Sequence[Task]) -> dict[str, tuple[str, ...]]:
    """The experts' names and what each is trained on: single tasks, then mixtures of several.

    Raises:
      InputError: a task of the user's own that has the name of a mixture.
    """
    experts: dict[str, tuple[str, ...]] = {task.name: (task.name,) for task in tasks}
    kinds = {
        "labels": tuple(task.name for task in tasks if "label" in task.columns),
        "texts": tuple(task.name for task in tasks if "label" not in task.columns),
        "all": tuple(task.name for task in tasks),
    }
    for name, chosen in kinds.items():
        if len(chosen) > 1 and chosen not in experts.values():
            if name in experts:
                raise InputError(
                    f"config.data.tasks names {name!r}, as one of the experts on several tasks is "
                    "called; give the task another name."
                )
            experts[name] = chosen
    return experts


def train_experts(settings: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Trains the experts of a config one after the other.

    Where it was interrupted, the same call continues it. The library is made when all are trained.

    Args:
      settings: a config as for `train`.
      workdir: gets ``runs/`` and ``library/``.

    Returns:
      the library's folder: an adapter folder for each expert, and ``trajectory.safetensors`` with
      snapshots of all trainings, float32 ``[S, ...]`` a site.

    Raises:
      InputError: as `train`; the work directory holds a library already; a task of the
        user's own has the name of a mixture.
      Interrupted: as `train`.
    """
    config, workdir = parse_config(settings), files.expand(workdir, "--workdir")
    library = workdir / "library"
    if library.exists():
        raise InputError(f"--workdir={workdir}: holds a library already; give another folder.")
    experts = mixtures([config.task(name) for name in config.data.tasks])
    policy = load_policy(config)
    first = grpo.init_state(policy.zero, make_algorithm(config).optimizer)
    template = stages.checkpointed(config, first, policy.zero)
    snapshots = []
    for number, (name, tasks) in enumerate(experts.items(), start=1):
        say(f"\nexpert {number} of {len(experts)}: {name} ({', '.join(tasks)})")
        own = settings.copy_and_resolve_references()
        own.data.tasks = tasks
        steps = len(tasks) * config.data.max_samples // config.prompts_drawn_per_step
        steps = min(steps * config.train.epochs, config.train.max_steps or sys.maxsize)
        own.train.keep_checkpoints = 0
        every = max(1, -(-steps // SNAPSHOTS))
        own.train.checkpoint_every_steps = every
        run = workdir / "runs" / name
        # The library is judged on all tasks.
        train(own, run, held_out=config.data.tasks)
        stored = checkpoints.Checkpoints(run)
        *before, last = stored.steps()
        # An interruption leaves a checkpoint too, at any step.
        for step in (*(step for step in before if step % every == 0), last):
            snapshots.append(stored.restore(template, step)[0].offsets)
        stored.close()
    trajectory = jax.tree.map(lambda *x: np.stack(x), *snapshots)
    with (
        files.writing(f"--workdir={workdir}", "make room; the same command continues the run"),
        files.new_folder(library) as folder,
    ):
        for name in experts:
            checkpoints.copy_adapter(workdir / "runs" / name / "adapter", folder / name)
        checkpoints.save_trajectory(folder, trajectory)
    say(f"\nlibrary of {len(experts)} experts in {library}")
    return library


def _main(argv: list[str]) -> None:
    del argv
    if not flags.FLAGS.workdir:
        raise InputError("--workdir='': is no folder; give one, or leave the flag out.")
    train_experts(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    commands.define_config()
    flags.DEFINE_string("workdir", "runs/experts", "Folder of the runs and the library.")
    commands.run(_main)
