"""Several runs beside each other: settings that differ, held-out gains, curves over each other."""

import collections
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpocem_jax.report import page as pages
from grpocem_jax.report import plots, record
from grpocem_jax.report.courses import course, kept, moving_mean, smoothing_window
from grpocem_jax.report.panels import Panel, Table, exact, interval, sentence
from grpocem_jax.report.record import Record
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import is_file

KINDS = {"heldout": "sampled", "heldout_greedy": "greedy"}
CURVES = {
    "reward": "Reward, all tasks",
    "eval_reward": "Reward on validation prompts",
    "kl": "KL divergence",
    "entropy": "Entropy",
    "completions/mean_length": "Completion length (tokens)",
    "frac_reward_zero_std": "Groups without variance (share)",
    "grad_norm": "Gradient norm",
}
LEFT_OUT = ("logging.",)
"""Settings that are no difference between runs."""


class Run(NamedTuple):
    """A run and the name it has among the others."""

    name: str
    record: Record

    @property
    def state(self) -> str:
        """Whether it has ended, and after how many steps."""
        steps = self.record.summary.get("steps") or len(self.record.metrics)
        what = "finished" if self.record.summary else "UNFINISHED"
        return f"{what}, {steps:,} step{'' if steps == 1 else 's'}"


def read(folders: Sequence[str]) -> list[Run]:
    """Reads runs.

    Args:
      folders: run directories; a run is named after the end of its path that tells it apart.

    Raises:
      InputError: fewer than two, one twice, folders that hold no run, or what `record.read` raises.
    """
    if len(folders) < 2:
        raise InputError(
            f"{len(folders)} folders to compare: give at least two runs, as in grpocem-compare "
            "runs/*."
        )
    odd = [folder for folder in folders if not is_file(Path(folder) / "config.json")]
    if odd:
        hold, leave = ("holds", "it") if len(odd) == 1 else ("hold", "them")
        raise InputError(f"{', '.join(odd)}: {hold} no run (no config.json); leave {leave} out.")
    places = [Path(folder).resolve() for folder in folders]
    twice = [f for f, n in zip(folders, places, strict=True) if places.count(n) > 1]
    if twice:
        raise InputError(f"{twice[0]}: is given twice; give each run once.")
    names = _names(places)
    return [Run(n, record.read(Path(f))) for n, f in zip(names, folders, strict=True)]


def _names(places: Sequence[Path]) -> list[str]:
    """The last part of each path; the whole of each, from where they part, where that is not its
    own."""
    names = [place.name for place in places]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(places)
    return [os.path.relpath(place, common) for place in places]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What differs, with its value in each run: settings, weights, training prompts, code."""
    found: dict[str, list[str]] = {}
    all_settings = [dict(pages.flat(run.record.config)) for run in runs]
    for name in dict.fromkeys(name for own in all_settings for name in own):
        if not name.startswith(LEFT_OUT):
            found[name] = [own.get(name, "not set") for own in all_settings]
    for title, key in (
        ("hash of the model", "model"),
        ("hash of the training prompts", "data"),
        ("version", "version"),
        ("commit", "commit"),
    ):
        found[title] = [str(run.record.run.get(key) or "not known")[:12] for run in runs]
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def gains(runs: Sequence[Run], key: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Held-out gains by task, ``overall`` first, and by run; only of runs that have them."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {"overall": {}}
    for run in runs:
        for task, gain in run.record.summary.get(key, {}).items():
            found.setdefault(task, {})[run.name] = gain
    return {task: own for task, own in found.items() if own}


def _judged(runs: Sequence[Run], key: str) -> list[Run]:
    """The runs that have ended, of which some or all may be without gains."""
    return [run for run in runs if key in run.record.summary]


def show(runs: Sequence[Run]) -> str:
    """The comparison as text."""
    wide = max(len(run.name) for run in runs)
    lines = [f"{len(runs)} runs"]
    lines += [f"  {run.name:<{wide}}  {run.state}" for run in runs]
    lines += ["", "settings that differ"]
    different = differing(runs)
    for name, values in different.items():
        having = collections.defaultdict(list)
        for run, value in zip(runs, values, strict=True):
            having[value].append(run.name)
        said = [f"{value} ({', '.join(those)})" for value, those in having.items()]
        lines.append(f"  {name}: {'; '.join(said)}")
    if not different:
        lines.append("  none")
    for key, how in KINDS.items():
        found = gains(runs, key)
        width = max(wide + 4, len(title := f"held-out reward, {how}"))
        head = f"{title:<{width}}{'before':>8}{'after':>8}{'gain':>8}"
        lines += ["", f"{head}   95% interval       n"]
        for task, own in found.items():
            lines.append(f"  {task}")
            for name, g in own.items():
                low, high = g["gain_ci95"]
                lines.append(
                    f"{f'    {name}':<{width}}{g['before']:8.3f}{g['after']:8.3f}{g['gain']:+8.3f}"
                    f"   [{low:+.3f}, {high:+.3f}]{g['n']:6d}"
                )
        if not found:
            missing = pages.ABSTAINED if _judged(runs, key) else "no run has ended"
            lines.append(f"  {missing}")
    return "\n".join(lines)


def page(runs: Sequence[Run]) -> str:
    """The comparison as one HTML page.

    Raises:
      InputError: a file of a run that is not as training writes it.
    """
    try:
        return _page(runs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            "a file of these runs is not as training writes it "
            f"({type(error).__name__}: {error}); restore or remove what was changed there."
        ) from error


def _page(runs: Sequence[Run]) -> str:
    judged = [_gain_panel(runs, key, how) for key, how in KINDS.items()]
    tasks = dict.fromkeys(
        name
        for run in runs
        for line in run.record.metrics
        for name in line
        if name.startswith("rewards/") and name.endswith("/mean")
    )
    metrics = {
        **CURVES,
        **{
            name: f"Reward, {name.removeprefix('rewards/').removesuffix('/mean')}" for name in tasks
        },
    }
    shown = [_curve_panel(runs, number, *each) for number, each in enumerate(metrics.items())]
    curves = [panel for panel in shown if panel is not None]
    rendered = {
        panel.name: plots.render(panel.name, panel.draw, height=panel.height).svg
        for panel in (*judged, *curves)
        if panel.draw is not None
    }
    different = differing(runs)
    rows = [
        [
            run.name,
            run.state,
            pages.speed(run.record) or "–",
            str(run.record.run.get("command") or "–"),
        ]
        for run in runs
    ]
    return pages.fill(
        "compare.html",
        rendered,
        title="comparison of runs",
        conclusion=_conclusion(runs),
        unfinished=[run.name for run in runs if not run.record.summary],
        runs=Table("Runs", ["run", "state", "speed", "command"], rows),
        settings=Table(
            "Settings that differ",
            ["setting", *(run.name for run in runs)],
            [[name, *values] for name, values in different.items()],
        ),
        judged=judged,
        curves=curves,
    )


def _conclusion(runs: Sequence[Run]) -> str:
    """Which run gained the most, and whether the intervals tell it apart from the next."""
    found = gains(runs, "heldout").get("overall", {})
    ended = _judged(runs, "heldout")
    if not found and ended:
        return f"Nothing is known about held-out reward. {pages.ABSTAINED}"
    if not found:
        return "No run has ended, so nothing is known about held-out reward."
    ranked = sorted(found, key=lambda name: found[name]["gain"], reverse=True)
    best = f"Largest gain in sampled held-out reward: {ranked[0]}, {interval(found[ranked[0]])}"
    if len(ranked) == 1:
        return f"{best}; no other run has {'held-out reward' if ended[1:] else 'ended'}."
    first, second = found[ranked[0]], found[ranked[1]]
    apart = first["gain_ci95"][0] > second["gain_ci95"][1]
    verdict = "the intervals do not overlap" if apart else "the intervals overlap"
    return f"{best}; next is {ranked[1]}, {interval(second)}: {verdict}."


def _gain_panel(runs: Sequence[Run], key: str, how: str) -> Panel:
    name, title, found = f"gain_{how}", f"Gain in held-out reward, {how}", gains(runs, key)
    if not found:
        unfinished = "No run has ended: there is no summary.json."
        return Panel(name, title, pages.ABSTAINED if _judged(runs, key) else unfinished)
    rows = [
        [f"{task}, {run}", exact(g["before"]), exact(g["after"]), exact(g["gain"]),
         *(exact(end) for end in g["gain_ci95"]), f"{g['n']:,}"]
        for task, own in found.items()
        for run, g in own.items()
    ]  # fmt: skip
    text = ". ".join(
        f"{sentence(task)}: " + "; ".join(f"{run} {interval(g)}" for run, g in own.items())
        for task, own in found.items()
    )
    columns = ["task and run", "before", "after", "gain", "from", "to", "prompts"]
    table = Table(f"{title}; from and to: 95% interval", columns, rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        judged = [run.name for run in runs if any(run.name in own for own in found.values())]
        for number, run in enumerate(runs):
            if run.name not in judged:
                continue
            shift = 0.7 * ((judged.index(run.name) + 0.5) / len(judged) - 0.5)
            places = [row + shift for row, own in enumerate(found.values()) if run.name in own]
            own = [own[run.name] for own in found.values() if run.name in own]
            style: dict[str, Any] = {"color": plots.hue(number)}
            low, high = np.array([g["gain_ci95"] for g in own]).T
            axes.hlines(places, low, high, linewidth=2.5, alpha=0.45, **style)
            axes.plot([g["gain"] for g in own], places, plots.marker(number), **style,
                      label=plots.label(run.name))  # fmt: skip
        axes.axvline(0, color=plots.colour("muted"), linewidth=0.8)
        axes.set_yticks(range(len(found)), [plots.label(task) for task in found])
        axes.tick_params(axis="y", labelcolor=plots.colour("ink"))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel("gain in mean reward")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=False, axis="y")
        plots.legend_below(figure, axes)

    height = 1.3 + (0.12 + 0.13 * len(runs)) * len(found)
    return Panel(name, title, f"{text}.", draw, height + _legend(runs), table,
                 "Bars are 95% intervals of the gain.")  # fmt: skip


def _legend(runs: Sequence[Run]) -> float:
    """Inches that the legend takes."""
    return 0.17 * -(-len(runs) // 2)


def _curve_panel(runs: Sequence[Run], number: int, key: str, title: str) -> Panel | None:
    """A metric of all runs over each other; None where no run has it."""
    found = {}
    for place, run in enumerate(runs):
        values = run.record.series(key)
        present = ~np.isnan(values)
        if present.any():
            found[run.name] = (place, run.record.steps()[present], values[present])
    if not found:
        return None
    text = " ".join(sentence(course(name, steps, y)) for name, (_, steps, y) in found.items())
    note = "Lines are moving means, of a twentieth of each run; the dots are their ends."

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, (place, steps, values) in found.items():
            mean = moving_mean(values, smoothing_window(len(values), 20))
            shown = kept(mean[:, None])
            style: dict[str, Any] = {"color": plots.hue(place)}
            axes.plot(steps[shown], mean[shown], **style)
            axes.plot(steps[-1:], mean[-1:], plots.marker(place), **style, clip_on=False,
                      label=plots.label(name))  # fmt: skip
        plots.step_axis(axes)
        plots.legend_below(figure, axes)

    return Panel(f"curve_{number}", title, text, draw, 2.2 + _legend(runs), None, note)
