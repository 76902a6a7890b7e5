"""The report's study on a real language model of its size, behind studies/real.md.

    make study-real DATA=FOLDER
    python -m studies.real --data FOLDER --doc studies/real.md

trains SmolLM2-135M-Instruct on the tasks of ``configs/smollm2.py``, or another model
(``--model openai-community/gpt2 --site attn.c_proj``).  FOLDER holds the data as that config wants
them; ``--data hub`` takes them from the Hugging Face Hub.  Each training is a run in
``--workdir``: the same command goes on where it was cut off, and trains nothing twice.  The figures
are kept in ``studies/real.json``; ``--parts=`` only writes the tables again.

What is trained on the two label tasks is judged on 200 held-out prompts of each, all else on 100,
and by what the model then thinks of 100 passages of the held-out texts of ``general``: the price.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Text, TrainedRun
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.models.likelihood import completion_logps
from grpocem_jax.rollouts.policy import Policy, load_policy
from grpocem_jax.training import evaluation
from grpocem_jax.training import loop as training
from grpocem_jax.training.data import load_data
from grpocem_jax.utils.files import write_json
from studies import common
from studies.common import interval, mean_ci, say, table

RESULTS = Path("studies/real.json")
LABELS = ("sentiment", "classification")
FIVE = ("qa", "sentiment", "summarization", "classification", "general")
SITES = {
    "self_attn.o_proj": (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    ),
    "attn.c_proj": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}
"""The attention's output, and all linear maps of a layer, of Llama and of GPT-2."""
LONGER: dict[str, Any] = {
    "data.tasks": FIVE,
    "data.max_prompt_tokens": 192,
    "data.heldout_samples": 100,
    "generation.max_new_tokens": 32,
    "generation.prompt_buckets": (64, 128, 192),
    "grpo.group_size": 8,
    "grpo.dynamic_sampling": 1,
    "train.eval_samples": 2,
    "train.max_steps": 60,
}
"""What the five tasks need: longer prompts and completions."""
RECIPES: dict[str, dict[str, Any]] = {
    "scales, all maps": {"adapter.sites": "all"},
    "scales, the report's rate": {"train.learning_rate": 5e-5, "train.warmup_steps": 100},
    "LoRA of rank 1": {"adapter.type": "lora", "adapter.options": {"rank": 1}},
    "a bias (steering vector)": {"adapter.type": "steering"},
    **{
        f"scales, largest {share:.1%}": {"adapter.rank_ratio": share}
        for share in (0.0035, 0.028, 0.112)
    },
}
"""What else is trained on the same prompts, by what differs from the config."""
SHOTS = (0, 2, 4, 8)
PASSAGES, SHORTEST, WORDS = 100, 8, 60
"""Held-out texts of the task general that are scored, and how few and how many words of each."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained, on what, and where.

    Attributes:
      model: its source.
      site: the linear map whose scales are trained, a key of `SITES`.
      data: the folder of the data, or ``hub``.
      workdir: the folder of the runs.
      seeds: how many.
    """

    model: str
    site: str
    data: str
    workdir: Path
    seeds: int

    def settings(self, changes: dict[str, Any], seed: int = 0) -> ml_collections.ConfigDict:
        """The config with some changes; ``all`` as sites stands for all linear maps."""
        config = load_config(f"smollm2:{self.data}")
        config.model.source = self.model
        config.adapter.sites = (self.site,)
        if changes.get("adapter.sites") == "all":
            changes = {**changes, "adapter.sites": SITES[self.site]}
        config.update_from_flattened_dict(changes)
        config.seed = seed
        return config

    def train(self, name: str, changes: dict[str, Any], seed: int = 0) -> dict[str, Any]:
        """A run, trained unless it is there: what the tables need of it."""
        workdir = self.workdir / f"{name}, seed {seed}".replace(" ", "-").replace(",", "")
        summary = training.train(self.settings(changes, seed), workdir)
        price = workdir / "likelihood.json"
        if not price.exists():
            write_json(price, self._likelihood(adaptation.load_run(workdir)))
        row = {
            "name": name,
            "seed": seed,
            "parameters": summary["trainable_parameters"],
            "steps": summary["steps"],
            "sampled": summary["heldout"],
            "greedy": summary["heldout_greedy"],
            "likelihood": json.loads(price.read_text()),
        }
        say({**row, "sampled": row["sampled"]["overall"], "greedy": row["greedy"]["overall"]})
        return row

    def _likelihood(self, run: TrainedRun) -> dict[str, Any]:
        """Log-likelihood of held-out free text before training, and its change, nats a token."""
        changes = {
            "data.tasks": ("general",),
            "data.heldout_samples": 4 * PASSAGES,
            "data.max_prompt_tokens": 128,
            "data.general.prompt_words": WORDS,
        }
        items = load_data(parse_config(self.settings(changes)), run.policy).heldout
        prompts = [item.example.prompt for item in items]
        long = [text for text in prompts if len(text.split()) >= SHORTEST]
        texts = [Text(text) for text in long[:PASSAGES]]
        before, after = (
            adaptation.log_likelihoods(run, offsets, texts)
            for offsets in (run.policy.zero, run.offsets)
        )
        return {"before": float(before.mean()), "change": mean_ci(after - before)}


def two(study: Study) -> dict[str, Any]:
    """The config as it is, on the two label tasks."""
    return {"rows": [study.train("scales", {}, seed) for seed in range(study.seeds)]}


def five(study: Study) -> dict[str, Any]:
    """All five tasks together."""
    return {"rows": [study.train("five tasks", LONGER, seed) for seed in range(study.seeds)]}


def recipes(study: Study) -> Iterator[dict[str, Any]]:
    """Other adapters, other numbers of them and the report's rate, at the same completions."""
    rows = []
    for name, changes in RECIPES.items():
        rows.append(study.train(name, changes))
        yield {"rows": rows}


def prompting(study: Study) -> dict[str, Any]:
    """No training: examples before the prompt, and contextual calibration."""
    rows: list[dict[str, Any]] = []
    policy: Policy | None = None
    for shots in SHOTS:
        changes: dict[str, Any] = {f"data.{task}.shots": shots for task in LABELS}
        changes["data.max_prompt_tokens"] = 80 * (shots + 1)
        changes["generation.prompt_buckets"] = (80 * (shots + 1),)
        changes["data.max_samples"] = max(shots, 8)
        changes["data.heldout_samples"] = 100
        config = parse_config(study.settings(changes))
        policy = policy or load_policy(config)
        items = load_data(config, policy).heldout
        rewards, _ = evaluation.evaluate(
            policy, policy.zero, items, jax.random.key(0), config, greedy=True
        )
        calibrated = _calibrated(TrainedRun(config, policy, policy.zero), items)
        names = [item.task.name for item in items]
        for kind, right in (("greedy", rewards > 0), ("calibrated", calibrated)):
            row = {"shots": shots, "answers": kind}
            for task in LABELS:
                values = [x for x, name in zip(right, names, strict=True) if name == task]
                row[task] = mean_ci(values)
            rows.append(row)
            say(row)
    return {"rows": rows}


def _calibrated(run: TrainedRun, items: Sequence[Any]) -> np.ndarray:
    """Whether the label of the largest calibrated likelihood is right, bool ``[n]``.

    Contextual calibration (Zhao et al. 2021, arXiv 2102.09690): each label's likelihood is divided
    by that after the same prompt with "N/A" in place of the text.
    """
    right = []
    free: dict[str, np.ndarray] = {}
    for item in items:
        labels, columns = item.example.columns["labels"], item.example.columns
        prompt, name = item.example.prompt, item.task.name
        if name not in free:
            # The text stands in the last example, that of the question.
            start = prompt.rindex(columns["text"][:20])
            end = prompt.rindex("\n", start)
            free[name] = _likelihoods(run, f"{prompt[:start]}N/A{prompt[end:]}", labels)
        scores = _likelihoods(run, prompt, labels) - free[name]
        right.append(labels[int(np.argmax(scores))] == columns["label"])
    return np.array(right)


def _likelihoods(run: TrainedRun, prompt: str, labels: Sequence[str]) -> np.ndarray:
    """Log-probability of each label after a prompt; float32 ``[labels]``."""
    policy = run.policy
    ids = [policy.encode_completion(f" {label}") for label in labels]
    mask = np.arange(max(map(len, ids))) < np.array([[len(row)] for row in ids])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(ids)
    encoded = np.asarray(policy.encode(prompt), np.int32)
    length = run.config.data.max_prompt_tokens
    padded = rollouts.pad([encoded], max(length, len(encoded)))
    group = (padded.tokens[0], padded.mask[0], tokens, mask)
    return np.asarray(_label_logps(policy.params, run.offsets, *group, model=policy.model))


@functools.partial(jax.jit, static_argnames="model")
def _label_logps(
    params: Any, offsets: Any, prompt: Any, prompt_mask: Any, tokens: Any, mask: Any, *, model: Any
) -> jax.Array:
    group = (prompt, prompt_mask, tokens, mask)
    return completion_logps(model, params, offsets, *group, temperature=1.0)[0].sum(-1)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The document's tables by the name of their markers."""
    made = {}
    labels: dict[str, Callable[[Any], str]] = {
        "sentiment, right under greedy decoding": lambda r: _percent(r, "sentiment"),
        "news topic": lambda r: _percent(r, "classification"),
        "sampled reward, both": lambda r: _gain(r["sampled"]["overall"]),
        "likelihood of other text": _price,
    }
    if "two" in results:
        made["real two"] = table(
            results["two"]["rows"], {"seed": lambda r: str(r["seed"]), **labels}
        )
    if "five" in results:
        made["real five"] = table(
            [
                {"seed": row["seed"], "task": task, **{k: row[k] for k in ("sampled", "greedy")}}
                for row in results["five"]["rows"]
                for task in (*FIVE, "overall")
            ],
            {
                "seed": lambda r: str(r["seed"]),
                "task": lambda r: r["task"],
                "reward, sampled": lambda r: _gain(r["sampled"][r["task"]]),
                "greedy": lambda r: _gain(r["greedy"][r["task"]]),
            },
        )
    if "two" in results and "recipes" in results:
        made["real recipes"] = table(
            [*results["two"]["rows"][:1], *results["recipes"]["rows"]],
            {
                "trained": lambda r: r["name"],
                "numbers": lambda r: f"{r['parameters']:,}",
                **labels,
            },
        )
    if "prompting" in results:
        made["real prompting"] = table(
            results["prompting"]["rows"],
            {
                "examples": lambda r: str(r["shots"]),
                "answers": lambda r: r["answers"],
                "sentiment": lambda r: _share(r["sentiment"]),
                "news topic": lambda r: _share(r["classification"]),
            },
        )
    return made


def _share(value: Sequence[float]) -> str:
    return f"{value[0]:.1%} ± {value[1]:.1%}"


def _percent(row: dict[str, Any], task: str) -> str:
    """Right answers before and after, and the gain in points, of rewards of 1 and -1."""
    gain = row["greedy"][task]
    low, high = (50 * x for x in gain["gain_ci95"])
    before, after = ((1 + gain[name]) / 2 for name in ("before", "after"))
    return f"{before:.0%} to {after:.0%}, {50 * gain['gain']:+.1f} points [{low:.0f}, {high:.0f}]"


def _gain(gain: dict[str, Any]) -> str:
    low, high = gain["gain_ci95"]
    change = f"{gain['gain']:+.3f} [{low:.3f}, {high:.3f}]"
    return f"{gain['before']:.3f} to {gain['after']:.3f}: {change}"


def _price(row: dict[str, Any]) -> str:
    return f"{row['likelihood']['before']:.2f}: {interval(row['likelihood']['change'])}"


PARTS = {f.__name__: f for f in (two, five, recipes, prompting)}


def main() -> None:
    """Reads the flags, trains and writes the tables."""
    common.run(
        "The report's study on a real language model.",
        PARTS,
        tables,
        lambda args: Study(args.model, args.site, str(args.data), args.workdir, args.seeds),
        results=RESULTS,
        seeds=3,
        needed=("--data",),
        flags={
            "--model": "smollm2",
            "--site": "self_attn.o_proj",
            "--workdir": Path("runs/real"),
        },
    )


if __name__ == "__main__":
    main()
