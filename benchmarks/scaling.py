"""How the time of a CEM generation grows with the work.

    python -m benchmarks.scaling [--config configs/gpt2.py] [--plot docs/scaling.png] [--json]

Varies one thing at a time: the population, the tokens of the text, and the published sizes of
GPT-2; fits ``seconds = c * work^exponent`` by least squares on logarithms.
"""

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import flags

from benchmarks import cem, common
from grpocem_jax.models import gpt2
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import is_folder

POPULATIONS = (10, 30, 100, 300, 1000)
LENGTHS = (8, 16, 32, 64, 128, 256)


class Series(NamedTuple):
    """Seconds of a generation against one quantity.

    Attributes:
      quantity: what varies.
      fixed: what does not.
      work: its values.
      seconds: median seconds of a generation.
      exponent: of the fitted power law.
    """

    quantity: str
    fixed: str
    work: list[float]
    seconds: list[float]
    exponent: float


def exponent(work: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log work."""
    return float(np.polyfit(np.log(work), np.log(seconds), 1)[0])


def seconds_of(subject: common.Subject, length: int, repetitions: int) -> float:
    """Median seconds of a generation."""
    run, _ = cem.generation(subject, common.random_tokens(subject, length))
    return common.alternate({"generation": run}, repetitions)["generation"].median


def with_population(subject: common.Subject, settings: Any, size: int) -> common.Subject:
    """The same model with another population."""
    changed = ml_collections.ConfigDict(settings)
    changed.cem.population_size = size
    return subject._replace(config=common.parse_config(changed))


def measure(settings: Any, *, repetitions: int) -> list[Series]:
    """All series; some minutes on two cores."""
    series = []

    def add(quantity: str, fixed: str, work: list[float], seconds: list[float]) -> None:
        series.append(Series(quantity, fixed, work, seconds, exponent(work, seconds)))

    subject = common.load(settings)
    seconds = [
        seconds_of(with_population(subject, settings, size), 12, repetitions)
        for size in POPULATIONS
    ]
    add("candidates", f"{subject.source}, 12 tokens", list(map(float, POPULATIONS)), seconds)
    few = with_population(subject, settings, 20)
    lengths = [n for n in LENGTHS if n <= subject.attached.model.context_length]
    seconds = [seconds_of(few, length, repetitions) for length in lengths]
    # The first token is not scored, and the last one predicts nothing.
    scored = [float(length - 1) for length in lengths]
    add("scored tokens", f"{subject.source}, 20 candidates", scored, seconds)
    sizes, seconds = [], []
    del subject, few
    for shape in gpt2.SHAPES:
        changed = ml_collections.ConfigDict(settings)
        changed.model.source = f"random:{shape}"
        changed.cem.population_size = 10
        subject = common.load(changed)
        sizes.append(float(subject.pretrained.num_params()))
        seconds.append(seconds_of(subject, 12, repetitions))
        del subject  # the next one may need all the memory there is
        gc.collect()
    add("parameters", f"{', '.join(gpt2.SHAPES)}; 10 candidates, 12 tokens", sizes, seconds)
    return series


def check_plot(path: str) -> None:
    """Refuses, before any work, a file that a plot cannot be drawn to.

    Raises:
      InputError: the name of a folder, a file in a folder that is not there or must not be written,
        or a format that Matplotlib does not write.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise InputError(f"--plot={path}: its name must end in .png, .svg or .pdf; give another.")
    if is_folder(path) or not os.access(Path(path).parent, os.W_OK):
        raise InputError(f"--plot={path}: cannot be written; give a file in a folder of yours.")


def plot(series: Sequence[Series], path: str) -> None:
    """Draws the series beside each other on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(series), figsize=(4 * len(series), 3.4))
    for axis, part in zip(axes, series, strict=True):
        axis.loglog(part.work, part.seconds, "o", color="#1f4e79")
        scale = np.exp(np.mean(np.log(part.seconds) - part.exponent * np.log(part.work)))
        line = np.array([min(part.work), max(part.work)])
        axis.loglog(line, scale * line**part.exponent, color="#c55a11", linewidth=1)
        axis.set_xticks([float(f"{x:.3g}") for x in part.work])
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.minorticks_off()
        axis.set_xlabel(part.quantity)
        axis.set_ylabel("seconds per generation")
        axis.set_title(f"exponent {part.exponent:.2f}", fontsize=10)
        axis.grid(True, alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def command(values: flags.FlagValues) -> tuple[str, dict[str, Any]]:
    """Measures and plots; returns the text to show and the JSON record."""
    if values.plot is not None:
        check_plot(values.plot)
    series = measure(values.config, repetitions=values.repetitions)
    rows = [("", "work", "seconds")]
    for part in series:
        rows.append((f"{part.quantity} ({part.fixed})", "", f"exponent {part.exponent:.2f}"))
        for work, seconds in zip(part.work, part.seconds, strict=True):
            rows.append(("", f"{work:,.0f}", f"{seconds:.3f}"))
    if values.plot:
        plot(series, values.plot)
    return common.table(rows), {"series": [part._asdict() for part in series]}


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("repetitions", 3, "Timed repetitions, after one to warm up.", 1)
    flags.DEFINE_string("plot", None, "File to draw the plot to.")
    common.run(command)
