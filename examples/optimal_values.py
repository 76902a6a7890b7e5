"""The first stage of A*-PO: what the best policy near the base model is worth at each prompt.

    python -m examples.optimal_values --config examples/arithmetic/config.py --out FOLDER
    python train.py --config examples/arithmetic/config.py \
        --config.data.arithmetic.source=FOLDER \
        --config.data.arithmetic.rewards="('examples.arithmetic.rewards:exact','grpocem_jax.tasks.rewards:optimal_value')" \
        --config.data.arithmetic.reward_weights="(1.0,-1.0)" \
        --config.grpo.objective=a_star_po --config.grpo.advantages=a_star_po \
        --config.grpo.advantages_options.offline=True --config.grpo.beta=0

The base model completes each training prompt of the config's task, and FOLDER gets its rows with
the column ``optimal_value``, ``beta log mean exp(r / beta)`` of their rewards (arXiv 2505.20686);
held-out rows come without it.  The task must be one of rows in files.
"""  # noqa: E501

import json
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

import grpocem_jax as gj
from grpocem_jax import rollouts
from grpocem_jax.config import Config
from grpocem_jax.grpo.variants import optimal_values
from grpocem_jax.rollouts import Item
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.training.data import load_data


def values(
    config: Config, policy: Policy, items: list[Item], *, samples: int, beta: float
) -> np.ndarray:
    """The value of each prompt, float ``[n]``, from completions of the base model."""
    rewards = np.full((len(items), samples), np.nan, np.float32)
    keys = jax.random.split(jax.random.key(config.seed), len(items))
    lengths = [item.tokens for item in items]
    for rows, filled in rollouts.batches(lengths, config.train.eval_batch_size):
        own = [items[i] for i in filled]
        out = rollouts.complete(
            policy,
            policy.zero,
            [item.tokens for item in own],
            keys[np.array(filled)],
            config.generation,
            num_samples=samples,
            temperature=config.generation.temperature,
            buckets=(*config.generation.prompt_buckets, config.data.max_prompt_tokens),
        )
        out = rollouts.with_base_logps(policy, own, out)
        rewards[rows] = rollouts.score(own, out.texts, out.base_logps).total[: len(rows)]
    return np.asarray(optimal_values(rewards, beta))


def write(folder: Path, split: str, items: list[Item], columns: dict[str, np.ndarray]) -> None:
    """Writes prompts as rows, with further columns."""
    lines = []
    for number, item in enumerate(items):
        extra = {name: float(found[number]) for name, found in columns.items()}
        row = {**item.example.columns, **extra, "prompt": item.example.prompt}
        lines.append(json.dumps(row))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    """Estimates the values and writes the rows."""
    del argv
    given = flags.FLAGS
    config = gj.parse_config(gj.load_config(given.config))
    policy = gj.load_policy(config)
    data = load_data(config, policy)
    found = values(config, policy, list(data.train), samples=given.samples, beta=given.beta)
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, "train", list(data.train), {"optimal_value": found})
    write(folder, "test", list(data.heldout), {})
    print(f"{len(found)} prompts, values from {found.min():.3f} to {found.max():.3f}, in {folder}")


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "The config of the training.", required=True)
    flags.DEFINE_string("out", None, "Folder for the rows.", required=True)
    flags.DEFINE_integer("samples", 8, "Completions of each prompt.")
    flags.DEFINE_float("beta", 0.5, "Of the value, above 0.")
    app.run(main)
