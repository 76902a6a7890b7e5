"""Metrics in TensorBoard and Weights & Biases, beside metrics.jsonl.

Names are those of metrics.jsonl behind ``train/``, as Hugging Face's trainers write them, so that
their dashboards fit; held-out reward after training is ``eval/reward`` and
``eval/rewards/TASK/mean``.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from grpocem_jax.config import LoggingConfig
from grpocem_jax.errors import InputError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """Somewhere metrics go."""

    where: str
    """A line for the first screen."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of a step."""

    def close(self) -> None:
        """Writes what is still to be written."""


def check(settings: LoggingConfig) -> None:
    """Refuses trackers whose package is absent.

    Raises:
      InputError: the first of them.
    """
    for name in settings.report_to:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"config.logging.report_to names {name!r}, but the package {PACKAGES[name]} is not "
                "installed; run pip install 'grpocem_jax[logging]', or leave it out."
            )


def start(
    settings: LoggingConfig,
    workdir: Path,
    config: Mapping[str, Any],
    *,
    run_id: str | None = None,
    first_step: int = 1,
) -> list[Tracker]:
    """Starts the trackers that the settings name.

    Args:
      settings: the logging section of the config.
      workdir: the run directory; its name is the run's.
      config: all settings, as they go to Weights & Biases.
      run_id: the run's id there; a run that continues keeps it.
      first_step: what was written of this step and later ones by an earlier start does not count.
    """
    made: list[Tracker] = []
    for name in settings.report_to:
        if name == "tensorboard":
            made.append(TensorBoard(workdir, first_step))
        else:
            made.append(WeightsAndBiases(settings.project, workdir, config, run_id))
    return made


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory."""

    def __init__(self, workdir: Path, first_step: int):
        import tensorboardX

        folder = workdir / "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still to be written."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; on disk only where no key is at hand, without asking for one.

    ``WANDB_MODE`` decides where it is set.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any], run_id: str | None):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.login(prompt=False) else "offline"
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=run_id,
            resume=None if run_id is None else "allow",
            dir=str(workdir),
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        folder = Path(self._run.dir).parent
        self.where = {
            "online": f"Weights & Biases, {self._run.url}",
            "offline": f"Weights & Biases, offline (no key): later, wandb sync {folder}",
        }.get(mode, f"Weights & Biases, {mode}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is written."""
        self._run.finish()
