"""What a panel of the page is, and those of the held-out prompts and the data.

A panel whose numbers a run does not have says so in a sentence instead of showing an empty plot.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from grpocem_jax.report import plots
from grpocem_jax.report.record import Record


class Table(NamedTuple):
    """Rows of text, each as long as ``columns``; the first of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Panel(NamedTuple):
    """One panel.

    Attributes:
      name: of its PNG, and the start of its identifiers on the page.
      title: its heading.
      text: what the plot shows, with its numbers; or why there is none.
      draw: draws it; None where there is nothing to draw.
      height: of the plot in inches.
      table: the numbers drawn.
      note: how to read the plot, seen in place of ``text`` where the plot shows its numbers.
      command: the command that makes what is missing.
    """

    name: str
    title: str
    text: str
    draw: plots.Draw | None = None
    height: float = 2.3
    table: Table | None = None
    note: str = ""
    command: str = ""


def exact(value: Any) -> str:
    """A number as tables show it: six digits; a dash for one that is not there."""
    if value is None or np.isnan(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def sentence(text: str) -> str:
    """The text with a capital at its start."""
    return text[:1].upper() + text[1:]


def before_after(
    name: str,
    title: str,
    gains: Mapping[str, Mapping[str, Any]] | None,
    words: tuple[str, str],
    missing: str,
) -> Panel:
    """Reward by task before and after, with the 95% interval of the gain.

    Args:
      name: of the panel.
      title: of the panel.
      gains: ``heldout`` of summary.json or one like it.
      words: what before and after are called.
      missing: the sentence where there are no gains.
    """
    if not gains:
        return Panel(name, title, missing)
    names = list(gains)
    low, high = (np.array([gains[n]["gain_ci95"][end] for n in names]) for end in (0, 1))
    before, after = (np.array([gains[n][when] for n in names]) for when in ("before", "after"))
    listed = "; ".join(
        f"{n} {gains[n]['before']:.3f} to {gains[n]['after']:.3f}, gain {interval(gains[n])}"
        for n in names
    )
    text = sentence(f"{words[0]} to {words[1]}, with the 95% interval of the gain: {listed}.")
    note = (
        "The gain is at the right. The bar is its 95% interval, drawn around the full mark: one "
        "that does not reach the hollow mark leaves out a gain of zero."
    )
    rows = [
        [n, *(exact(gains[n][key]) for key in ("before", "after", "gain")), exact(a), exact(b),
         f"{gains[n]['n']:,}"]
        for n, a, b in zip(names, low, high, strict=True)
    ]  # fmt: skip
    columns = ["task", *words, "gain", "from", "to", "prompts"]

    def draw(figure: Figure) -> None:
        plots.before_after(figure, names, before, after, low, high, words)

    table = Table(f"{title}; from and to: 95% interval of the gain", columns, rows)
    return Panel(name, title, text, draw, 1.2 + 0.27 * len(names), table, note)


def interval(gain: Mapping[str, Any]) -> str:
    """A gain with its interval: ``+0.221 [+0.183, +0.259]``."""
    low, high = gain["gain_ci95"]
    return f"{gain['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"


def data(record: Record) -> Panel:
    """Prompts of each task, to train on and held out."""
    name, title = "data", "Data"
    counts = record.summary.get("data", {})
    if not counts:
        return Panel(name, title, "summary.json does not say how many prompts each task had.")
    split = {
        "training": [task["train"] for task in counts.values()],
        "held out": [task["heldout"] for task in counts.values()],
    }
    text = "Training and held-out prompts: " + "; ".join(
        f"{task} {own['train']:,} and {own['heldout']:,}, from {own['source']}"
        for task, own in counts.items()
    )
    rows = [
        [task, own["source"], f"{own['train']:,}", f"{own['heldout']:,}"]
        for task, own in counts.items()
    ]
    table = Table("Prompts by task", ["task", "source", "training", "held out"], rows)

    def draw(figure: Figure) -> None:
        plots.bars(figure, list(counts), split)

    return Panel(name, title, f"{text}.", draw, 1.2 + 0.34 * len(counts), table)
