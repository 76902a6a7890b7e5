"""The evidence on a real pretrained model, behind studies/adaptation.md.

    python -m studies.pretrained --model FOLDER --texts FOLDER --doc studies/adaptation.md

The model is a Llama trained on stories, such as raincandy-u/TinyStories-656K; the folder of texts
holds ``NAME/train.jsonl`` for each of `KINDS`.  Stories are familiar to the model, all else is
foreign.  Each search starts from the model itself, and what judges is never part of it.  Intervals
are 95%, by Student's t, over prompts or over draws of passages.  The figures are kept in
``studies/pretrained.json``, the plot in ``studies/pretrained.png``; ``--parts=`` only writes the
tables and the plot again.
"""

import itertools
import operator
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpocem_jax.adaptation import TrainedRun
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.models.tokenizer import continuing, load_tokenizer
from grpocem_jax.rollouts.policy import load_policy
from studies import common
from studies.common import interval, mean_ci, prompt_table, say, table
from studies.passages import GRADIENT, KINDS, Study, read

RESULTS = Path("studies/pretrained.json")
PLOT = Path("studies/pretrained.png")
FOREIGN = tuple(kind for kind in KINDS if kind != "stories")
SITES = {
    "one": ("self_attn.o_proj",),
    "all seven": (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    ),
}
JUDGES = 48
"""Passages that judge."""


def load(model: Path, texts: Path, seeds: int) -> Study:
    """The model with a zero adapter at one site of each layer and at all, and the texts."""
    model = _without_a_leading_space(model)
    config = load_config("llama")
    config.model.source = str(model)
    config.data.max_prompt_tokens = 128
    config.search.buckets = (16, 32, 48, 64, 112)
    runs = {}
    for name, sites in SITES.items():
        config.adapter.sites = sites
        parsed = parse_config(config)
        policy = load_policy(parsed)
        runs[name] = TrainedRun(parsed, policy, policy.zero)
    return Study(runs, read(texts), seeds, JUDGES)


def _without_a_leading_space(model: Path) -> Path:
    """A copy of the folder whose tokenizer puts no space before a text.

    That of TinyStories-656K does, and the model, which was trained without it, gives its first two
    tokens 11 nats each: adaptation would mostly learn this.
    """
    folder = shutil.copytree(model, Path(tempfile.mkdtemp()) / model.name)
    continuing(load_tokenizer(model)).save_pretrained(folder)
    return folder


def prompts(study: Study) -> dict[str, Any]:
    """One prompt, judged on what follows it."""
    methods: dict[str, dict[str, Any]] = {
        "cem, sigma 0.3": {"noise_std": 0.3},
        "cem, sigma 0.1": {"noise_std": 0.1},
        "cem, sigma 0.03": {"noise_std": 0.03},
        "gradient": GRADIENT,
    }
    rows = []
    for name, kinds, count in (("familiar", ("stories",), 48), ("foreign", FOREIGN, 10)):
        texts = [pair for kind in kinds for pair in study.prompts(kind, count)]
        for (method, changes), gate in itertools.product(methods.items(), (False, True)):
            gains, fits, adapted = [], [], 0
            for i, (prompt, judge) in enumerate(texts):
                found = study.adapt("one", prompt, i, gate=gate, **changes)
                gains.append(study.gain("one", found, [judge]))
                fits.append(found.fitness_after - found.fitness_before)
                adapted += found.returned != "start"
            row = {"text": name, "method": method, "gate": gate, "n": len(texts)}
            rows.append({**row, "fit": mean_ci(fits), "gain": mean_ci(gains), "adapted": adapted})
            say(rows[-1])
    return {"rows": rows}


def _draws(
    study: Study, kinds: Sequence[str], count: int, sites: str, **changes: Any
) -> tuple[list[float], list[float]]:
    """Gain on other passages and share of draws that were adapted, for each kind and draw."""
    gains, adapted = [], []
    for kind, seed in itertools.product(kinds, range(study.seeds)):
        support, judges = study.passages(kind, count, seed)
        found = study.adapt(sites, support, seed, **changes)
        gains.append(study.gain(sites, found, judges))
        adapted.append(float(found.returned != "start"))
    return gains, adapted


FEWSHOT: dict[str, Any] = {"population_size": 50, "generations": 20}


def support(study: Study) -> dict[str, Any]:
    """Two to thirty-two passages of a kind, judged on others of that kind."""
    methods: dict[str, dict[str, Any]] = {
        "cem": FEWSHOT,
        "cem, gate": {**FEWSHOT, "gate": True},
        "gradient": GRADIENT,
        "gradient, gate": {**GRADIENT, "gate": True},
    }
    rows = []
    for kind, (method, changes), count in itertools.product(KINDS, methods.items(), (2, 4, 8, 32)):
        gains, adapted = _draws(study, (kind,), count, "one", **changes)
        row = {"text": kind, "method": method, "passages": count, "gains": gains}
        rows.append({**row, "gain": mean_ci(gains), "adapted": int(sum(adapted))})
        say(rows[-1])
    return {"rows": rows}


def settings(study: Study) -> dict[str, Any]:
    """Eight passages: one site or all, and how far the search goes."""
    methods: dict[str, dict[str, Any]] = {
        **{f"cem, sigma {std}": {**FEWSHOT, "noise_std": std} for std in (0.03, 0.1, 0.3)},
        **{
            f"gradient, {rate}": {**GRADIENT, "learning_rate": rate}
            for rate in (0.005, 0.01, 0.02, 0.05)
        },
    }
    rows = []
    for sites, (method, changes) in itertools.product(SITES, methods.items()):
        for name, kinds in (("familiar", ("stories",)), ("foreign", FOREIGN[:2])):
            gains, _ = _draws(study, kinds, 8, sites, **changes)
            row = {"sites": sites, "method": method, "text": name, "n": len(gains)}
            rows.append({**row, "gain": mean_ci(gains)})
            say(rows[-1])
    return {"rows": rows}


def spent(study: Study) -> dict[str, Any]:
    """Gain on other passages against forwards of the eight passages."""
    kinds, size = ("mathematics", "news"), 50
    methods: dict[str, tuple[int, dict[str, Any]]] = {
        **{
            f"CEM, sigma {std}": (size, {"population_size": size, "noise_std": std})
            for std in (0.03, 0.1, 0.3)
        },
        # A step is a forward and, at twice its cost, a backward.
        **{
            f"gradient, {rate}": (3, {"method": "gradient", "learning_rate": rate})
            for rate in (0.005, 0.02)
        },
    }
    rows = []
    for sites, (method, (cost, changes)) in itertools.product(SITES, methods.items()):
        lengths = (2, 8, 30) if cost == size else (1, 3, 10, 30, 100, 300)
        for length in lengths:
            # The generations of a longer search begin with those of a shorter one.
            gains, _ = _draws(study, kinds, 8, sites, **changes, generations=length)
            row = {"sites": sites, "method": method, "forwards": cost * length, "n": len(gains)}
            rows.append({**row, "gain": mean_ci(gains)})
            say(rows[-1])
    return {"rows": rows}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The document's tables by the name of their markers; draws the plot on the way."""
    made = {}
    if "prompts" in results:
        made["pretrained prompts"] = prompt_table(results["prompts"]["rows"])
    if "support" in results:
        made["pretrained support"] = _cross(
            {
                ((row["text"], row["method"]), f"{row['passages']} passages"): row["gain"]
                for row in results["support"]["rows"]
            },
            ("text", "method"),
        )
    if "settings" in results:
        made["pretrained settings"] = _cross(
            {
                ((row["method"],), f"{row['text']} text, {row['sites']}"): row["gain"]
                for row in results["settings"]["rows"]
            },
            ("method",),
        )
    if "spent" in results:
        plot(results["spent"]["rows"], PLOT)
    return made


def _cross(
    gains: dict[tuple[tuple[str, ...], str], Sequence[float]], labels: tuple[str, ...]
) -> str:
    """A table of gains by the labels of their row and their column."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for (row, column), gain in gains.items():
        named = rows.setdefault(row, dict(zip(labels, row, strict=True)))
        named[column] = interval(gain)
    columns = dict.fromkeys((column for row in rows.values() for column in row), "")
    return table(
        [{**columns, **row} for row in rows.values()],
        {name: operator.itemgetter(name) for name in columns},
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws gain against forwards, a panel for one site and one for all."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SITES), figsize=(9, 3.6), sharey=True)
    for panel, sites in zip(panels, SITES, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if (row["sites"], row["method"]) == (sites, method)]
            x = [row["forwards"] for row in mine]
            middle, half = np.array([row["gain"] for row in mine]).T
            style = "--" if method.startswith("gradient") else "-"
            (line,) = panel.plot(x, middle, style, marker="o", markersize=3, label=method)
            panel.fill_between(x, middle - half, middle + half, color=line.get_color(), alpha=0.15)
        panel.set_xscale("log")
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_title(f"{sites} site{'s' if sites != 'one' else ''} a layer")
        panel.set_xlabel("forwards of the support set")
    panels[0].set_ylim(-0.6, 1.1)  # a gradient that runs too long falls far below
    panels[0].set_ylabel("gain on other passages, nats a token")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


PARTS = {f.__name__: f for f in (prompts, settings, support, spent)}


def main() -> None:
    """Reads the flags, runs the parts and writes the tables."""
    common.run(
        "Adaptation of a real pretrained model, behind studies/adaptation.md.",
        PARTS,
        tables,
        lambda args: load(args.model, args.texts, args.seeds),
        results=RESULTS,
        needed=("--model", "--texts"),
    )


if __name__ == "__main__":
    main()
