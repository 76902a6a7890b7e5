"""GRPO on a real pretrained model with a reward of one's own, behind docs/reproduction.md.

    python -m studies.stories --model FOLDER --texts FILE --doc docs/reproduction.md

trains ``examples/stories`` with seeds 0, 1 and 2 on a model that tells stories, such as
raincandy-u/TinyStories-656K.  FILE has real stories in lines of JSON with ``text``: what training
costs is the fall of their likelihood.  About ten minutes on 2 CPU cores.  The figures are kept in
``studies/stories.json``; ``--parts=`` only writes the tables again.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grpocem_jax import adaptation
from grpocem_jax.adaptation import Text
from grpocem_jax.config.files import load_config
from grpocem_jax.training import loop as training
from studies import common
from studies.common import interval, mean_ci, say, table

RESULTS = Path("studies/stories.json")
STORIES, WORDS = 200, 120
"""Real stories, and how many words of each are scored."""
SHOWN = 3
"""Held-out prompts whose greedy completions are shown, of seed 0."""


class Study(NamedTuple):
    """The model's folder, the file of stories, and the number of seeds."""

    model: Path
    texts: Path
    seeds: int


def seeds(study: Study) -> dict[str, Any]:
    """Training with each seed: reward and likelihood before and after."""
    lines = study.texts.read_text(encoding="utf-8").splitlines()[:STORIES]
    stories = [Text(" ".join(json.loads(line)["text"].split(" ")[:WORDS])) for line in lines]
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, str]] = []
    for seed in range(study.seeds):
        config = load_config("examples/stories/config.py")
        config.model.source = str(study.model)
        config.seed = seed
        with tempfile.TemporaryDirectory() as workdir:
            summary = training.train(config, workdir)
            run = adaptation.load_run(workdir)
            heldout = [
                json.loads(line)
                for line in (Path(workdir) / "heldout.jsonl").read_text().splitlines()
            ]
        zero = jax.tree.map(np.zeros_like, run.offsets)
        before, after = (adaptation.log_likelihoods(run, x, stories) for x in (zero, run.offsets))
        row = {
            "seed": seed,
            "prompts": len(heldout),
            "sampled": summary["heldout"]["overall"],
            "greedy": summary["heldout_greedy"]["overall"],
            "likelihood_before": float(before.mean()),
            "likelihood": mean_ci(after - before),
        }
        rows.append(row)
        say(row)
        if not shown:
            shown = [
                {key: line[key] for key in ("prompt", "greedy_before", "greedy_after")}
                for line in heldout[:SHOWN]
            ]
    return {"rows": rows, "shown": shown}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The document's tables by the name of their markers."""
    if "seeds" not in results:
        return {}

    def gain(found: dict[str, Any]) -> str:
        low, high = found["gain_ci95"]
        return f"{found['before']:.3f} to {found['after']:.3f}: {found['gain']:+.3f} " + (
            f"[{low:.3f}, {high:.3f}]"
        )

    rewards = table(
        results["seeds"]["rows"],
        {
            "seed": lambda r: str(r["seed"]),
            "held-out reward, sampled": lambda r: gain(r["sampled"]),
            "greedy": lambda r: gain(r["greedy"]),
            "likelihood of real stories, nats a token": lambda r: (
                f"{r['likelihood_before']:.3f}: {interval(r['likelihood'])}"
            ),
        },
    )
    samples = table(
        results["seeds"]["shown"],
        {
            "prompt": lambda r: _cell(r["prompt"]),
            "before": lambda r: _cell(r["greedy_before"]),
            "after": lambda r: _cell(r["greedy_after"]),
        },
    )
    return {"stories": rewards, "stories completions": samples}


def _cell(text: str) -> str:
    """A text in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PARTS = {"seeds": seeds}


def main() -> None:
    """Reads the flags, trains and writes the tables."""
    common.run(
        "GRPO on a real pretrained model.",
        PARTS,
        tables,
        lambda args: Study(args.model, args.texts, args.seeds),
        results=RESULTS,
        seeds=3,
        needed=("--model", "--texts"),
    )


if __name__ == "__main__":
    main()
