"""Panels of the adapter: the singular values of its sites, and what training made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from grpocem_jax.report import plots
from grpocem_jax.report.courses import kept
from grpocem_jax.report.panels import Panel, Table, exact
from grpocem_jax.report.record import Record


def layer_and_kind(site: str, number: int) -> tuple[int, str]:
    """The layer in a site's name and the rest of it: ``h.3.attn.c_proj`` is (3, attn.c_proj).

    A name without a layer gets ``number``.
    """
    parts = site.replace("/", ".").split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not places:
        return number, site
    return int(parts[places[0]]), ".".join(parts[places[0] + 1 :]) or site


def _by_kind(sites: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """The sites of each kind with their layers, ascending."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for number, site in enumerate(sites):
        layer, kind = layer_and_kind(site, number)
        kinds.setdefault(kind, []).append((layer, site))
    return {kind: sorted(found) for kind, found in kinds.items()}


def spectrum(record: Record) -> Panel:
    """Singular values of each site's frozen matrix."""
    name, title, values = "spectrum", "Spectrum by layer", record.spectrum
    if not values:
        text = "This adapter has no singular values, or the run did not write spectrum.safetensors."
        return Panel(name, title, text)
    trained = {site: np.size(record.offsets.get(site, ())) for site in values}
    rows = [
        [site, f"{len(s):,}", f"{trained[site]:,}", exact(s[0]), exact(s[trained[site] - 1]),
         exact(s[-1])]
        for site, s in values.items()
    ]  # fmt: skip
    columns = ["site", "singular values", "trained", "largest", "smallest trained", "smallest"]
    kinds = _by_kind(list(values))
    count, total = sum(trained.values()), sum(map(len, values.values()))
    text = (
        f"{count:,} of {total:,} singular values at {len(values)} sites are trained. Largest: "
        f"{min(s[0] for s in values.values()):.3g} to {max(s[0] for s in values.values()):.3g}; "
        f"smallest: {min(s[-1] for s in values.values()):.3g} to "
        f"{max(s[-1] for s in values.values()):.3g}. Later layers have stronger colour; a line "
        "ends in dots where values are not trained."
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (kind, sites) in enumerate(kinds.items()):
            for place, (_, site) in enumerate(sites):
                s, k = values[site], trained[site]
                style: dict[str, Any] = {
                    "color": plots.hue(number),
                    "alpha": plots.fading(place, len(sites)),
                }
                last = place == len(sites) - 1
                for start, stop, line in ((0, k, "-"), (k - 1, len(s), ":")):
                    if stop - start > 1:
                        shown = start + kept(s[start:stop, None], 100)
                        label = plots.label(kind) if last and line == "-" else None
                        axes.plot(shown + 1, s[shown], line, linewidth=1, label=label, **style)
        axes.set_yscale("log")
        plots.step_axis(axes, "number of the singular value")
        axes.set_ylabel("singular value")
        plots.legend_below(figure, axes)

    return Panel(name, title, text, draw, 2.7, Table(title, columns, rows))


def offsets(record: Record) -> Panel:
    """What training did to each site's numbers."""
    name, title = "offsets", "Offsets by layer"
    arrays = {site: np.ravel(x).astype(float) for site, x in record.offsets.items() if x.size}
    if not arrays:
        return Panel(name, title, "There is no trained adapter in the run directory.")
    kinds = _by_kind(list(arrays))
    every = np.concatenate(list(arrays.values()))
    largest = max(arrays, key=lambda site: np.abs(arrays[site]).max())
    text = (
        f"{every.size:,} trained numbers at {len(arrays)} sites: root mean square "
        f"{np.sqrt(np.mean(every**2)):.3g}, from {every.min():.3g} to {every.max():.3g}; the one "
        f"farthest from zero, the base model, is at {largest}. Thin bars: lowest to highest; thick "
        "bars: the middle half; dots: the median."
    )
    rows = [
        [site, f"{x.size:,}", exact(np.sqrt(np.mean(x**2))), exact(x.min()), exact(np.median(x)),
         exact(x.max())]
        for site, x in arrays.items()
    ]  # fmt: skip
    columns = ["site", "numbers", "root mean square", "lowest", "median", "highest"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        size = 5.0 if len(arrays) <= 24 else 2.5
        for number, (kind, sites) in enumerate(kinds.items()):
            shift = 0.7 * ((number + 0.5) / len(kinds) - 0.5)
            place = np.array([layer for layer, _ in sites]) + shift
            own = [arrays[site] for _, site in sites]
            low, first, middle, third, high = (
                np.array([np.percentile(x, q) for x in own]) for q in (0, 25, 50, 75, 100)
            )
            style: dict[str, Any] = {"color": plots.hue(number)}
            axes.vlines(place, low, high, linewidth=1, **style)
            axes.vlines(place, first, third, linewidth=0.8 * size, alpha=0.5, **style)
            style |= {"marker": plots.marker(number), "markersize": size}
            axes.plot(place, middle, linestyle="", label=plots.label(kind), **style)
        axes.axhline(0, color=plots.colour("muted"), linewidth=0.8)
        plots.step_axis(axes, "layer")
        axes.set_ylabel("offset")
        plots.legend_below(figure, axes)

    return Panel(name, title, text, draw, 2.7, Table(title, columns, rows))
