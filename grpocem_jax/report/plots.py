"""How plots look: matplotlib figures as SVG for the page, in its colours, and as PNG beside it."""

import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpocem_jax.utils.terminal import one_line

COLOURS = {
    "surface": ("#ffffff", "#1a1f26"),
    "ink": ("#1c2128", "#e4e7eb"),
    "muted": ("#5a636e", "#a3acb8"),
    "grid": ("#dde1e6", "#39414b"),
    "hue0": ("#2463a6", "#79b2f2"),
    "hue1": ("#b8501b", "#f29b66"),
    "hue2": ("#23804f", "#62c795"),
    "hue3": ("#97417f", "#e391cc"),
    "hue4": ("#7d6608", "#d9bf52"),
    "hue5": ("#5a55b8", "#aaa6ff"),
    "hue6": ("#a93540", "#f58d94"),
    "hue7": ("#3f6f78", "#8fc4ce"),
}
"""Colours in light and dark. A plot is drawn in the light ones, each a name for what it is; the
page's own variables take their place in the SVG."""

HUES = tuple(name for name in COLOURS if name.startswith("hue"))
MARKERS = "osD^vPX*"
LONGEST_LABEL = 18
WIDTH = 3.5  # inches: text is of the page's size on a column, and 12 pixels on a phone of 375
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

Draw = Callable[[Figure], None]


def colour(name: str) -> str:
    """The light colour of this name, which `render` makes a variable of the page."""
    return COLOURS[name][0]


def hue(number: int) -> str:
    """The colour of the series of this number; they repeat after eight."""
    return colour(HUES[number % len(HUES)])


def marker(number: int) -> str:
    """The marker of the series of this number; they repeat after eight."""
    return MARKERS[number % len(MARKERS)]


STYLE = {
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": colour("ink"),
    "axes.labelcolor": colour("muted"),
    "axes.edgecolor": colour("grid"),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": colour("grid"),
    "grid.linewidth": 0.6,
    "xtick.color": colour("grid"),
    "ytick.color": colour("grid"),
    "xtick.labelcolor": colour("muted"),
    "ytick.labelcolor": colour("muted"),
    "ytick.left": False,
    "figure.facecolor": colour("surface"),
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.1,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "svg.fonttype": "none",
}


class Rendered(NamedTuple):
    """A plot as an ``<svg>`` element and as a PNG file."""

    svg: str
    png: bytes


def render(name: str, draw: Draw, *, height: float) -> Rendered:
    """Draws a plot; the same numbers give the same bytes.

    Args:
      name: of the panel. Identifiers of the SVG start with it, so that plots can share a page; the
        elements ``NAME-title`` and ``NAME-text`` of the page name and describe the plot.
      draw: draws on an empty figure.
      height: of the figure, in inches.
    """
    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        vector, raster = io.BytesIO(), io.BytesIO()
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        figure.set_layout_engine("none")  # it stays as it was laid out
        figure.savefig(raster, format="png", dpi=160, metadata={"Software": None})
    return Rendered(_inline(name, vector.getvalue()), raster.getvalue())


def _inline(name: str, svg: bytes) -> str:
    """The SVG as an element of the page: scalable, named, with its colours, identifiers its own."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for tag in ("metadata", "style"):
            for child in parent.findall(f"{{{SVG}}}{tag}"):
                parent.remove(child)
    text = svg.decode()
    used = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
            elif key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href":
                element.set(key, f"#{name}-{value[1:]}")
            else:
                value = value.replace("url(#", f"url(#{name}-")
                for variable, (light, _) in COLOURS.items():
                    value = value.replace(light, f"var(--{variable})")
                element.set(key, value)
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    root.set("aria-describedby", f"{name}-text")
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def label(text: str) -> str:
    """A name as a plot has room for it: one short line, and no mathematics between dollar signs."""
    text = one_line(text)
    text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
    return text.replace("$", r"\$")


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, mean: np.ndarray | None, number: int) -> None:
    """A curve, pale behind its moving mean where there is one, with a dot at its end."""
    present = ~np.isnan(y)
    x, y = x[present], y[present]
    if mean is None:
        axes.plot(x, y, color=hue(number))
        last = y[-1]
    else:
        axes.plot(x, y, color=hue(number), linewidth=0.8, alpha=0.4)
        axes.plot(x, mean[present], color=hue(number), linewidth=1.8)
        last = mean[present][-1]
    axes.plot(x[-1:], [last], "o", color=hue(number), clip_on=False)


def step_axis(axes: Axes, name: str = "step") -> None:
    """Names the x axis and gives it whole numbers."""
    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(visible=False, axis="x")


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """The legend of the axes, below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def before_after(
    figure: Figure,
    names: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    words: tuple[str, str],
) -> None:
    """A row for each name, with a hollow mark, a full mark and the interval of their difference.

    Args:
      figure: to draw on.
      names: of the rows, from the top.
      before: float ``[n]``.
      after: float ``[n]``.
      low: lower end of the interval of ``after - before``, float ``[n]``.
      high: its upper end.
      words: what the two marks stand for.
    """
    axes = figure.subplots()
    rows = np.arange(len(names))
    axes.hlines(rows, before, after, color=colour("muted"), linewidth=0.9)
    bars = axes.hlines(rows, before + low, before + high, color=hue(0), linewidth=5, alpha=0.35)
    (hollow,) = axes.plot(
        before, rows, "o", markerfacecolor=colour("surface"), markeredgecolor=colour("ink")
    )
    (full,) = axes.plot(after, rows, "o", color=hue(0))
    axes.set_yticks(rows, [label(name) for name in names])
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.set_ylim(len(names) - 0.5, -0.5)
    for row, gain in enumerate(after - before):
        text = f"{gain:+.3f}".replace("-", "−")
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_xlabel("mean reward")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(visible=False, axis="y")
    labels = [words[0], words[1], "95% interval of the gain"]
    figure.legend([hollow, full, bars], labels, loc="outside lower center", ncols=2)


def bars(figure: Figure, names: Sequence[str], counts: dict[str, list[int]]) -> None:
    """Horizontal bars with their numbers: for each name one of each kind in ``counts``."""
    axes = figure.subplots()
    rows, thick = np.arange(len(names)), 0.8 / len(counts)
    for number, (kind, values) in enumerate(counts.items()):
        places = rows - 0.4 + thick * (number + 0.5)
        drawn = axes.barh(places, values, thick * 0.9, color=hue(number), label=kind)
        axes.bar_label(drawn, [f"{value:,}" for value in values], padding=3, fontsize=9)
    axes.set_yticks(rows, [label(name) for name in names])
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("prompts")
    axes.grid(visible=False, axis="y")
    legend_below(figure, axes)


def fading(number: int, of: int) -> float:
    """Opacity of one of several lines of one colour, from pale to full."""
    return 0.25 + 0.75 * (number + 1) / of
