"""Panels of what changes over the steps of a training or the generations of a search."""

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from grpocem_jax.report import plots
from grpocem_jax.report.panels import Panel, Table, exact, sentence
from grpocem_jax.report.record import Record

MAX_POINTS = 1000
"""Most points of a curve that are drawn and listed, but for its ends, lowest and highest."""


def kept(values: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Places of ``[n, curves]`` to draw: evenly spaced, and each curve's ends and extremes."""
    n = len(values)
    places = {0, n - 1, *range(0, n, -(-n // limit))}
    for column in values.T:
        if not np.isnan(column).all():
            places |= {int(np.nanargmin(column)), int(np.nanargmax(column))}
    return np.array(sorted(places))


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a window around each place, of the values that are there; NaN for none.

    Args:
      values: float ``[n]``, NaN where missing.
      window: places in it, odd; fewer at the ends.
    """
    present = ~np.isnan(values)
    ones = np.ones(window)
    half = window // 2
    total, count = (
        np.convolve(x, ones)[half : half + len(values)]
        for x in (np.where(present, values, 0.0), present.astype(float))
    )
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def smoothing_window(steps: int, share: int) -> int:
    """Places of a moving mean over one ``share``-th of so many steps, odd."""
    return 2 * (steps // (2 * share)) + 1


def course(name: str, steps: np.ndarray, values: np.ndarray, unit: str = "") -> str:
    """A curve in words: its ends and its extremes."""
    present = ~np.isnan(values)
    steps, values = steps[present], values[present]
    low, high = int(values.argmin()), int(values.argmax())
    count = f"{len(values):,} step{'s' if len(values) > 1 else ''}"
    return (
        f"{name} over {count}: {values[0]:.3g}{unit} at first, {values[-1]:.3g}{unit} at last, "
        f"lowest {values[low]:.3g}{unit} at step {steps[low]:.0f}, "
        f"highest {values[high]:.3g}{unit} at step {steps[high]:.0f}."
    )


def _step_table(title: str, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> Table:
    """The columns at the steps that are drawn, with a caption that says which they are."""
    places = kept(np.stack(list(columns.values()), -1))
    every = -(-len(steps) // MAX_POINTS)
    thinned = (
        f": one of every {every} of {len(steps):,} steps, and the lowest and highest; "
        "all are in metrics.jsonl"
        if every > 1
        else ""
    )
    rows = [[f"{steps[i]:.0f}", *(exact(x[i]) for x in columns.values())] for i in places]
    return Table(f"{title}{thinned}", ["step", *columns], rows)


SPACES = {"full": "all offsets", "subspace": "a subspace", "experts": "mixtures of experts"}
NO_STEPS = "No step was recorded: metrics.jsonl is empty or not there."


def curves(
    record: Record,
    name: str,
    title: str,
    metrics: Mapping[str, str],
    *,
    scale: float = 1.0,
    unit: str = "",
    smooth: bool = True,
    remark: str = "",
    missing: str = "",
) -> Panel:
    """A panel of metrics over the steps, one above the other.

    Args:
      record: the run.
      name: of the panel.
      title: of the panel.
      metrics: names in metrics.jsonl, each with what it is called here.
      scale: factor of the values shown.
      unit: of the values shown, with the space before it.
      smooth: whether a moving mean is drawn.
      remark: what else the text says.
      missing: the sentence for a run that has none of them.
    """
    steps = record.steps()
    if not len(steps):
        return Panel(name, title, NO_STEPS)
    found = {label: record.series(key) * scale for key, label in metrics.items()}
    absent = [key for key, label in metrics.items() if np.isnan(found[label]).all()]
    found = {label: values for label, values in found.items() if not np.isnan(values).all()}
    no_metric = f"metrics.jsonl has no {' and no '.join(absent)}." if absent else ""
    if not found:
        return Panel(name, title, missing or f"There is nothing to draw: {no_metric}")
    window = smoothing_window(len(steps), 20) if smooth else 1
    sentences = [sentence(course(label, steps, y, unit)) for label, y in found.items()]
    if window > 1:
        sentences.append(f"The line is the mean over {window} steps, the pale one each step.")
    sentences += [text for text in (remark, no_metric) if text]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        for number, (axes, (label, y)) in enumerate(zip(grid, found.items(), strict=True)):
            mean = moving_mean(y, window) if window > 1 else None
            shown = kept(np.stack([y] if mean is None else [y, mean], -1))
            own = None if mean is None else mean[shown]
            plots.curve(axes, steps[shown], y[shown], own, number)
            axes.set_ylabel(f"{label}{f' ({unit.strip()})' if unit else ''}")
            plots.step_axis(axes, "step" if axes is grid[-1] else "")

    table = _step_table(title, steps, found)
    return Panel(name, title, " ".join(sentences), draw, 1.1 + 1.2 * len(found), table)


def rewards(record: Record) -> Panel:
    """Reward by task over the steps, of validation prompts, and held-out at the edges."""
    name, title, steps = "reward", "Reward by task", record.steps()
    if not len(steps):
        return Panel(name, title, NO_STEPS)
    keys = dict.fromkeys(key for line in record.metrics for key in line)
    tasks = [
        key.removeprefix("rewards/").removesuffix("/mean")
        for key in keys
        if key.startswith("rewards/") and key.endswith("/mean")
    ]
    listed = list(record.setting("data", "tasks") or ())
    tasks.sort(key=lambda task: listed.index(task) if task in listed else len(listed))
    found = {task: record.series(f"rewards/{task}/mean") for task in tasks}
    found = {task: values for task, values in found.items() if not np.isnan(values).all()}
    if not found:
        return Panel(
            name, title, "There is nothing to draw: metrics.jsonl has no rewards/TASK/mean."
        )
    window = smoothing_window(len(steps), 8)
    gains = record.summary.get("heldout", {})
    over_all = record.series("reward")
    sentences = []
    if not np.isnan(over_all).all():
        sentences.append(sentence(course("mean reward of all tasks", steps, over_all)))
    validation = record.series("eval_reward")
    judged = ~np.isnan(validation)
    if judged.any():
        sentences.append(sentence(course("reward on validation prompts", steps, validation)))
    marked = [
        f"{task} {gains[task]['before']:.3f} and {gains[task]['after']:.3f}"
        for task in (*found, "overall")
        if task in gains
    ]
    if marked:
        sentences.append(
            "Held-out reward before (mark at the left edge) and after training (right edge): "
            f"{', '.join(marked)}."
        )
    note = "Marks: held-out reward before training (left) and after (right)." if marked else ""
    if window > 1:
        note += f" Lines: means over {window} steps."

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (task, values) in enumerate(found.items()):
            style: dict[str, Any] = {
                "color": plots.hue(number),
                "marker": plots.marker(number),
            }
            mean = moving_mean(values, window)
            places = kept(mean[:, None])
            axes.plot(steps[places], mean[places], color=style["color"])
            # Marks tell the tasks apart without their colours.
            axes.plot([], [], **style, label=plots.label(task))
            if task in gains:
                edge = {**style, "transform": axes.get_yaxis_transform(), "clip_on": False}
                surface = plots.colour("surface")
                axes.plot([0], [gains[task]["before"]], markerfacecolor=surface, **edge)
                axes.plot([1], [gains[task]["after"]], **edge)
        if len(found) > 1 and not np.isnan(over_all).all():
            mean = moving_mean(over_all, window)
            places, ink = kept(mean[:, None]), plots.colour("ink")
            axes.plot(steps[places], mean[places], color=ink, linewidth=2.2, label="overall")
            if "overall" in gains:
                edge = {"color": ink, "transform": axes.get_yaxis_transform(), "clip_on": False}
                surface = plots.colour("surface")
                axes.plot([0], [gains["overall"]["before"]], "o", markerfacecolor=surface, **edge)
                axes.plot([1], [gains["overall"]["after"]], "o", **edge)
        if judged.any():
            x, y, grey = steps[judged], validation[judged], plots.colour("muted")
            axes.plot(x, y, ".--", color=grey, label="validation, all")
        plots.step_axis(axes)
        axes.set_ylabel("mean reward")
        plots.legend_below(figure, axes)

    columns = {"all": over_all, **({"validation, all": validation} if judged.any() else {})}
    table = _step_table(title, steps, {**columns, **found})
    return Panel(name, title, " ".join(sentences), draw, 3.3, table, note)


def convergence(record: Record) -> Panel:
    """Fitness over the generations of the searches of ``adapt.py --evaluate``."""
    name, title = "cem_convergence", "CEM convergence"
    command = f"grpocem-adapt --workdir {shlex.quote(str(record.workdir))} --evaluate"
    if not record.evaluation:
        return Panel(name, title, "No adaptation was evaluated. This does it:", command=command)
    found = record.evaluation.get("convergence", {})
    curves = {
        f"{which} of a generation": np.array([np.nan if x is None else x for x in found[which]])
        for which in ("best", "mean")
        if found.get(which)
    }
    settings = record.evaluation.get("cem", {})
    if not curves or any(np.isnan(y).all() for y in curves.values()):
        text = "No search was made: the texts were too short for the gate to hold a part back."
        return Panel(name, title, text)
    generations = np.arange(1, len(found["best"]) + 1)
    quantity = {
        "likelihood": "log-likelihood per token (nats)",
        "reward": "mean reward",
    }.get(settings.get("fitness", ""), "fitness")
    sentences = [
        f"{sentence(label)}: {y[0]:.3f} in the first generation, {y[-1]:.3f} in generation "
        f"{len(y)}."
        for label, y in curves.items()
    ]
    if settings.get("method"):
        how = f"CEM, {settings['population_size']:,} candidates a generation"
        how = "gradient ascent" if settings["method"] == "gradient" else how
        gate = "with" if settings["gate"] else "without"
        sentences.append(f"Search: {how}, over {SPACES[settings['space']]}, {gate} the gate.")
    running = found["running"]
    sentences.append(f"Means over {running[0]:,} searches.")
    if running[-1] < running[0]:
        sentences.append(
            f"{running[0] - running[-1]:,} of them ended earlier and count with their last values."
        )
    rows = [
        [str(g), *(exact(y[g - 1]) for y in curves.values()), f"{running[g - 1]:,}"]
        for g in generations
    ]
    table = Table(f"{title}: {quantity}", ["generation", *curves, "searches under way"], rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (label, y) in enumerate(curves.items()):
            axes.plot(generations, y, color=plots.hue(number), label=label)
            axes.plot(generations[-1:], y[-1:], plots.marker(number), color=plots.hue(number))
        plots.step_axis(axes, "generation")
        axes.set_ylabel(quantity)
        plots.legend_below(figure, axes)

    return Panel(name, title, " ".join(sentences), draw, 2.7, table)
