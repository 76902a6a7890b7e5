"""What a run left behind, read from its directory."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import is_file, parse_object, read_arrays, read_object

FIX = "restore or remove it"


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of a run directory; what is not there is empty.

    Attributes:
      workdir: the directory.
      config: config.json.
      run: run.json, with the command that started the run.
      summary: summary.json, which a run writes at its end.
      metrics: the lines of metrics.jsonl, one a step.
      heldout: the lines of heldout.jsonl, one a held-out prompt.
      evaluation: evaluation.json, which ``adapt.py --evaluate`` writes.
      offsets: the trained arrays, by site.
      spectrum: all singular values of each site's frozen matrix, descending.
    """

    workdir: Path
    config: dict[str, Any]
    run: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    evaluation: dict[str, Any]
    offsets: dict[str, np.ndarray]
    spectrum: dict[str, np.ndarray]

    def setting(self, section: str, name: str) -> Any:
        """A value of the config, None where it has none."""
        return self.config.get(section, {}).get(name)

    def steps(self) -> np.ndarray:
        """The step of each line of metrics, float64 ``[n]``."""
        return self.series("step")

    def series(self, key: str) -> np.ndarray:
        """A metric over the steps, float64 ``[n]``; NaN in lines that do not have it."""
        values = [line.get(key) for line in self.metrics]
        return np.array([x if isinstance(x, int | float) else math.nan for x in values], float)


def read(workdir: Path) -> Record:
    """Reads a run directory.

    Args:
      workdir: the directory; of a run that is under way, or an adapter on its own, the files that
        are not there are left empty.

    Raises:
      InputError: no run there, or a file in it that cannot be read.
    """
    weights = workdir / "adapter" / "adapter_model.safetensors"
    if not is_file(workdir / "config.json") and not is_file(weights):
        raise InputError(
            f"--workdir={workdir}: holds no run; give a folder that train.py has written to."
        )
    return Record(
        workdir=workdir,
        config=_object(workdir / "config.json"),
        run=_object(workdir / "run.json"),
        summary=_object(workdir / "summary.json"),
        metrics=_lines(workdir / "metrics.jsonl"),
        heldout=_lines(workdir / "heldout.jsonl"),
        evaluation=_object(workdir / "evaluation.json"),
        offsets=_arrays(weights),
        spectrum=_arrays(workdir / "spectrum.safetensors"),
    )


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, fix=FIX) if path.exists() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {FIX}.") from None
    # Model text may hold characters that other ways of splitting take for the end of a line.
    lines = enumerate(text.split("\n"), start=1)
    return [parse_object(line, f"{path}, line {n}", fix=FIX) for n, line in lines if line]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return read_arrays(path, fix=FIX) if path.exists() else {}
