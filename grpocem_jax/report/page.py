"""Puts the page together: its head, the sections with their panels, the samples, the settings."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from grpocem_jax.report import courses, panels, plots, sites
from grpocem_jax.report.panels import Panel, Table, exact, interval
from grpocem_jax.report.record import Record
from grpocem_jax.runs import metrics
from grpocem_jax.utils.terminal import one_line, visible

SAMPLES = 12
"""The first prompts of each task that are shown; heldout.jsonl has all."""

EXTREMES = 6
"""Prompts of each task that are shown because their reward rose the most, and fell the most."""

LONGEST = 600
"""Characters of a text that are shown."""

ABSTAINED = "No held-out prompt has a reward both before and after: all reward functions abstained."
"""Of a table of gains without a row."""


class Section(NamedTuple):
    """A heading with panels under it."""

    name: str
    title: str
    panels: Sequence[Panel]
    tables: Sequence[Table] = ()


class Sample(NamedTuple):
    """A held-out prompt with its greedy completions and their rewards.

    Attributes:
      task: the number of its task.
      prompt: its text, as all texts with control characters as escapes but for line breaks.
      before: the completion before training.
      after: the completion after it.
      reward_before: its reward in words, a dash for none.
      reward_after: the same after training.
      change: the difference of the two in words; "" where one of them is not there.
      place: its place among all samples as they come.
      gain_rank: its place where the largest gain comes first; one without a change comes last.
      loss_rank: its place where the largest loss comes first.
    """

    task: int
    prompt: str
    before: str
    after: str
    reward_before: str
    reward_after: str
    change: str
    place: int
    gain_rank: int
    loss_rank: int


def make(record: Record) -> tuple[str, dict[str, bytes]]:
    """The page as HTML, and the PNG of each panel that has a plot, by its name."""
    found = sections(record)
    rendered = {
        panel.name: plots.render(panel.name, panel.draw, height=panel.height)
        for section in found
        for panel in section.panels
        if panel.draw is not None
    }
    tasks, shown = samples(record)
    html = fill(
        "page.html",
        {name: plot.svg for name, plot in rendered.items()},
        title=f"{record.workdir.resolve().name}: report",
        run=record.workdir.resolve().name,
        conclusions=conclusions(record),
        notices=notices(record),
        facts=facts(record),
        sections=found,
        tasks=tasks,
        samples=shown,
        most=SAMPLES,
        extremes=EXTREMES,
        settings=Table("Settings of the run", ["setting", "value"], list(flat(record.config))),
    )
    return html, {name: plot.png for name, plot in rendered.items()}


def fill(template: str, plots_by_panel: Mapping[str, str], **values: Any) -> str:
    """A page of the templates beside this module, whole by itself."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["one_line"] = one_line
    return environment.get_template(template).render(
        style=(folder / "page.css").read_text(encoding="utf-8"),
        colours=plots.COLOURS,
        plots=plots_by_panel,
        **values,
    )


def sections(record: Record) -> list[Section]:
    """All panels, in the order of the page."""
    summary = record.summary
    unfinished = "Held-out reward is measured at the end of training; there is no summary.json."
    temperature = record.setting("generation", "temperature")
    at = "" if temperature is None else f" at T = {temperature:g}"
    curves = functools.partial(courses.curves, record)
    no_memory = f"The backend of this run{_named(summary.get('platform'))} does not report memory."
    training = [
        courses.rewards(record),
        curves("kl_entropy", "KL and entropy", {"kl": "KL divergence", "entropy": "entropy"}),
        curves(
            "policy_loss",
            "Policy loss",
            {"policy_loss": "policy loss"},
            remark="It is no measure of quality; held-out reward is.",
        ),
        curves(
            "zero_variance", "Groups without variance", {"frac_reward_zero_std": "share of groups"}
        ),
        curves("grad_norm", "Gradient norm", {"grad_norm": "gradient norm"}),
        curves("learning_rate", "Learning rate", {"learning_rate": "learning rate"}, smooth=False),
        curves(
            "completion_length",
            "Completion length",
            {"completions/mean_length": "mean length"},
            unit=" tokens",
        ),
        curves(
            "memory",
            "Memory",
            {"device_memory_peak_bytes": "peak device memory"},
            scale=1e-9,
            unit=" GB",
            smooth=False,
            missing=no_memory,
        ),
    ]
    words = ("before training", "after training")
    return [
        Section(
            "result",
            "Held-out reward",
            [
                panels.before_after(
                    key, title, summary.get(key), words, ABSTAINED if key in summary else unfinished
                )
                for key, title in (("heldout", f"Sampled{at}"), ("heldout_greedy", "Greedy"))
            ],
        ),
        Section("training", "Training", training),
        Section(
            "data-and-adapter",
            "Data and adapter",
            [
                panels.data(record),
                sites.spectrum(record),
                sites.offsets(record),
            ],
        ),
        _adaptation(record),
    ]


def _named(value: Any) -> str:
    return f" ({value})" if value else ""


def _adaptation(record: Record) -> Section:
    found, name, title = record.evaluation, "adaptation", "Adaptation at inference"
    shown = [courses.convergence(record)]
    if not found:
        return Section(name, title, shown)
    words = ("trained adapter", "adapted")
    to = "task" if found.get("cem", {}).get("support") else "prompt"
    for key, own in (("heldout", "sampled"), ("heldout_greedy", "greedy")):
        gains = found.get(key, {})
        missing = ABSTAINED if key in found else f"evaluation.json has no {key}."
        shown.append(
            panels.before_after(
                f"adapted_{key}", f"Adapted to each {to}, {own}", gains, words, missing
            )
        )
    columns = {
        "fitness_before": "fitness before",
        "fitness_after": "after",
        "adapted": "share adapted",
        "converged": "share converged",
        "generations": "generations",
        "candidates": "candidates",
        "seconds": "seconds",
        "heldout_before": "reference log-likelihood before",
        "heldout_after": "after",
        "searches": "searches",
    }
    rows = [
        [task, *(exact(row.get(key)) for key in columns)]
        for task, row in found.get("adaptation", {}).items()
    ]
    unit = "fitness is mean reward; " if found.get("cem", {}).get("fitness") == "reward" else ""
    caption = f"Searches by task: means, {unit}with log-likelihoods per token in nats"
    return Section(name, title, shown, [Table(caption, ["task", *columns.values()], rows)])


def conclusions(record: Record) -> list[str]:
    """What came of the run, in sentences: first the sampled reward, then the greedy one."""
    if not record.summary:
        return [
            "Training has not finished: there is no summary.json, so nothing is known about "
            "held-out reward."
        ]
    temperature = record.setting("generation", "temperature")
    kinds = {
        "heldout": "of sampled completions"
        + ("" if temperature is None else f" (T = {temperature:g})"),
        "heldout_greedy": "of greedy completions",
    }
    return [
        _conclusion(record.summary[key], what)
        if record.summary.get(key)
        else f"Nothing is known about held-out reward {what}. {ABSTAINED}"
        for key, what in kinds.items()
        if key in record.summary
    ]


def _conclusion(gains: Mapping[str, Any], what: str) -> str:
    gain = gains["overall"]
    low, high = gain["gain_ci95"]
    verdict = "the interval includes zero, so this does not show that training changed it"
    if low > 0:
        verdict = "training raised it"
    elif high < 0:
        verdict = "training lowered it"
    lost = [name for name, own in gains.items() if name != "overall" and own["gain_ci95"][1] < 0]
    losses = f" Lower than before: {', '.join(lost)}." if lost else ""
    tasks = len(gains) - 1
    return (
        f"Mean held-out reward {what} went from {gain['before']:.3f} to {gain['after']:.3f}, a "
        f"gain of {interval(gain)} (95% interval, {gain['n']:,} prompts of {tasks} "
        f"task{'s' if tasks > 1 else ''}): {verdict}.{losses}"
    )


def notices(record: Record) -> list[str]:
    """What a reader must know before believing the numbers."""
    summary, found = record.summary, []
    if summary.get("random_weights"):
        found.append(
            "The model has random weights: this run tests plumbing and speed, and its rewards mean "
            "nothing."
        )
    if summary.get("builtin_model"):
        found.append(
            "The model is the tiny one that comes with the package, not a published language model."
        )
    found += summary.get("continued", [])
    gains = summary.get("heldout", {})
    unchanged = [name for name, own in gains.items() if list(own["gain_ci95"]) == [0.0, 0.0]]
    temperature = record.setting("generation", "temperature")
    found += metrics.signal_lines(record.metrics, temperature, unchanged)
    builtin = [name for name, own in summary.get("builtin_data", {}).items() if own]
    if builtin:
        found.append(
            f"Built-in data, generated from templates: {', '.join(builtin)}. They show that the "
            "method works, not how good it is at reading."
        )
    return found


def facts(record: Record) -> list[tuple[str, str]]:
    """What was trained on what: names and values of the list at the head of the page."""
    summary, setting = record.summary, record.setting
    sites_named = ", ".join(setting("adapter", "sites") or record.offsets)
    trainable = sum(x.size for x in record.offsets.values())
    kind = "offsets of singular values" if record.spectrum else "numbers"
    total = summary.get("total_parameters")
    share = f", {100 * trainable / total:.3f}% of the model" if total else ""
    source = summary.get("model") or setting("model", "source")
    dtype = summary.get("dtype") or setting("model", "dtype")
    found = {
        "Model": source and f"{source}{f', {total:,} parameters' if total else ''}, frozen",
        "Adapter": f"{trainable:,} {kind} at {sites_named}{share}" if record.offsets else None,
        "Steps": summary.get("steps") or len(record.metrics) or None,
        "Each step": (batch := setting("train", "batch_size"))
        and f"{batch * setting('train', 'accumulation_steps')} completions in groups of "
        f"{setting('grpo', 'group_size')}, learning rate {setting('train', 'learning_rate'):g}",
        "Seed": record.config.get("seed"),
        "Device": summary.get("platform")
        and f"{summary['platform']} ({summary.get('device')}), {dtype}",
        "Time": summary.get("seconds")
        and f"{summary['seconds']:.0f} s, of them {summary['train_seconds']:.0f} s of training and "
        f"{summary['compile_seconds']:.0f} s of compilation",
        "Speed": speed(record),
        "Code": (version := record.run.get("version"))
        and f"grpocem_jax {version}"
        + (f", commit {record.run['commit']}" if record.run.get("commit") else ""),
        "Versions": summary.get("versions")
        and ", ".join(
            [
                *(f"{name} {version}" for name, version in summary["versions"].items()),
                f"Python {summary.get('python')}",
            ]
        ),
        "Command": record.run.get("command"),
    }
    return [(name, one_line(str(value))) for name, value in found.items() if value is not None]


def speed(record: Record) -> str | None:
    """Steps and tokens a second by the median step, which compilation does not slow."""
    times = record.series("step_time")
    present = times[~np.isnan(times)]
    if not len(present) or not np.median(present) > 0:
        return None
    median = float(np.median(present))
    tokens = np.diff(record.series("num_tokens"), prepend=0.0)
    known = tokens[~np.isnan(tokens)]
    rate = f", {np.median(known) / median:,.0f} tokens per second" if len(known) else ""
    return f"{1 / median:.3g} steps per second ({median:.3g} s each){rate}"


def samples(record: Record) -> tuple[list[str], list[Sample]]:
    """The tasks, and prompts of each: the first ones, and those of the largest changes."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for line in record.heldout:
        lines.setdefault(str(line.get("task")), []).append(line)
    chosen: list[tuple[int, Mapping[str, Any], float | None]] = []
    for number, own in enumerate(lines.values()):
        changes = [_change(line) for line in own]
        known = sorted((x, i) for i, x in enumerate(changes) if x is not None)
        ranked = [i for _, i in known]
        kept = {*range(min(SAMPLES, len(own))), *ranked[:EXTREMES], *ranked[-EXTREMES:]}
        chosen += [(number, own[i], changes[i]) for i in sorted(kept)]
    ranks = []
    for sign in (-1, 1):
        order = sorted((x is None, sign * (x or 0.0), i) for i, (_, _, x) in enumerate(chosen))
        ranks.append({i: rank for rank, (*_, i) in enumerate(order)})
    return list(lines), [
        Sample(
            task,
            _shown(line.get("prompt"), end=True),
            # Completions begin with the space between words.
            _shown(line.get("greedy_before")).removeprefix(" "),
            _shown(line.get("greedy_after")).removeprefix(" "),
            _reward(line.get("greedy_reward_before")),
            _reward(line.get("greedy_reward_after")),
            "" if change is None else f"reward {change:+.3g}" if change else "reward unchanged",
            place,
            ranks[0][place],
            ranks[1][place],
        )
        for place, (task, line, change) in enumerate(chosen)
    ]


def _reward(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _change(line: Mapping[str, Any]) -> float | None:
    """By how much the reward of the greedy completion changed; None where there is none."""
    before, after = line.get("greedy_reward_before"), line.get("greedy_reward_after")
    return None if before is None or after is None else after - before


def _shown(text: Any, *, end: bool = False) -> str:
    """A text with its line breaks, other control characters as escapes, cut where it is long."""
    text = visible(str(text).replace("\r\n", "\n"))
    if len(text) <= LONGEST:
        return text
    return f"…{text[-LONGEST:]}" if end else f"{text[:LONGEST]}…"


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings with their names with dots, values as text."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", one_line(str(value))
