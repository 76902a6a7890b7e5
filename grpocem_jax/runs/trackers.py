"""Metrics in TensorBoard and Weights & Biases, beside metrics.jsonl.

Names are those of metrics.jsonl behind ``train/``, as Hugging Face's trainers write them, so that
their dashboards fit; held-out reward after training is ``eval/reward`` and
``eval/rewards/TASK/mean``.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from grpocem_jax.config import LoggingConfig
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import say

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
        tracker = _Guarded(name)
        if name == "tensorboard":
            tracker.start(lambda: TensorBoard(workdir, first_step))
        else:
            tracker.start(lambda: WeightsAndBiases(settings.project, workdir, config, run_id))
        made.append(tracker)
    return made


class _Guarded:
    """A tracker that says once that it failed and is left alone from then on.

    metrics.jsonl has everything that a tracker gets, so a run is never stopped for one.
    """

    def __init__(self, name: str):
        self.name, self.where = name, ""
        self._tracker: Tracker | None = None

    def start(self, make: Callable[[], Tracker]) -> None:
        """Makes the tracker."""
        with self._failures():
            self._tracker = make()
            self.where = self._tracker.where
        if self._tracker is None:
            self.where = f"{self.name} could not be started"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of a step."""
        with self._failures():
            if self._tracker is not None:
                self._tracker.log(values, step)

    def close(self) -> None:
        """Writes what is still to be written."""
        with self._failures():
            if self._tracker is not None:
                self._tracker.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the packages may raise
            self._tracker = None
            say(
                f"{self.name} failed and is left out from here on ({_reason(error)}); the run goes "
                "on, and metrics.jsonl has all metrics",
                sys.stderr,
            )


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


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

    ``WANDB_MODE`` decides where it is set. Where the server cannot be reached, or refuses the key,
    the run is kept on disk too.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any], run_id: str | None):
        import wandb

        def start(mode: Any) -> Any:
            return wandb.init(
                project=project,
                name=workdir.name,
                id=run_id,
                resume=None if run_id is None else "allow",
                dir=str(workdir),
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off"),
            )

        mode, why = os.environ.get("WANDB_MODE"), "no key"
        try:
            if mode is None:
                mode = "online" if wandb.login(prompt=False) else "offline"
            self._run = start(mode)
        except Exception as error:  # of many kinds, from requests to wandb's own
            if mode in ("offline", "disabled", "dryrun"):
                raise
            mode, why = "offline", f"online it failed: {_reason(error)}"
            say(f"Weights & Biases goes on offline ({why})", sys.stderr)
            self._run = start(mode)
        self._folder = Path(self._run.dir).parent
        self.where = f"Weights & Biases, {self._run.url if mode == 'online' else mode}"
        if mode == "offline":
            self.where += f" ({why}): later, wandb sync {self._folder}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run, and waits until everything is uploaded where that is possible.

        The file of a run on disk is complete when the process ends: W&B's service writes the rest
        of it after ``finish`` and is waited for at exit.
        """
        try:
            self._run.finish()
        except Exception as error:  # of many kinds
            say(
                f"Weights & Biases has not got everything ({_reason(error)}); later, "
                f"wandb sync {self._folder}",
                sys.stderr,
            )
