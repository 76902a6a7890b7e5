"""Settings of small runs, run directories that nobody trained, and one policy for all of them."""

import atexit
import dataclasses
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file, save_file

from grpocem_jax.config import Config, parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.rollouts.policy import Policy, load_policy
from grpocem_jax.runs import checkpoints
from grpocem_jax.tasks import TASKS, SourceConfig, load_examples

ROOT = Path(__file__).parents[1]
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"
"""What JAX says where device memory runs out."""
PROMPT = "Review: The soup was cold.\nSentiment:"
OTHER = "Review: The soup was cold and bad.\nSentiment:"
SMALL = {
    "search.generations": 2,
    "cem.population_size": 4,
    "cem.elite_ratio": 0.5,
    "generation.max_new_tokens": 4,
}
# With these and four prompts, the reward's programs are those of 8, 6, 4 and 2 prompts.
REWARD = {
    "search.fitness": "reward",
    "search.task": "qa",
    "search.samples": 2,
}
TRAINING = {
    "data.tasks": ("general",),  # whose reward tells even poor completions apart
    "data.max_samples": 32,
    "data.heldout_samples": 2,
    "generation.max_new_tokens": 4,
    "grpo.group_size": 4,
    "logging.interval": 2,
    "train.batch_size": 16,
    "train.checkpoint_every_steps": 2,
    "train.eval_samples": 1,
    "train.max_steps": 6,
    "train.warmup_steps": 1,
}
GAIN = {"before": 0.125, "after": 0.375, "gain": 0.25, "gain_ci95": [0.125, 0.5], "n": 7}
SUMMARY = {
    "heldout": {"qa": GAIN, "overall": {**GAIN, "after": 0.5}},
    "heldout_greedy": {"qa": {**GAIN, "after": 0.875}},
    "steps": 11,
    "trainable_parameters": 408,
    "model": "builtin",
    "builtin_model": True,
    "random_weights": False,
    "builtin_data": {"qa": True, "general": False},
}


def get_config(**changes):
    """Settings of a short search with the built-in model."""
    config = load_config("tiny")
    config.update_from_flattened_dict({**SMALL, **changes})
    return config


def thin_config(**changes):
    """Settings of a short search with a thin model."""
    return get_config(**{"model.source": thin_model(), **changes})


@functools.cache
def thin_model():
    """A folder with the built-in model cut down to its first layer, which compiles quickly."""
    folder = Path(tempfile.mkdtemp(prefix="thin")) / "model"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    shutil.copytree(ROOT / "grpocem_jax" / "builtin" / "model", folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields["n_layer"] = 1
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    state = load_file(folder / "model.safetensors")
    first = {name: x for name, x in state.items() if re.search(r"\bh\.[1-9]", name) is None}
    save_file(first, folder / "model.safetensors")
    return str(folder)


def training_config(**changes):
    """Settings of a training of six steps on one task, with a thin model."""
    config = load_config("tiny")
    config.update_from_flattened_dict({"model.source": thin_model(), **TRAINING, **changes})
    return config


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sharing_policies() -> Callable[..., Policy]:
    """A `load_policy` that loads one policy for equal settings, so that programs are shared."""
    known: dict[Any, Policy] = {}

    def load(
        config: Config, *, adapter: Any = None, mesh: Any = None, processes: Any = None
    ) -> Policy:
        del processes  # one

        stop, keep = config.generation.stop, config.generation.keep_special_tokens
        chat = (config.data.chat, config.data.system)
        key = (config.model, config.adapter, stop, keep, chat, config.seed, adapter, mesh)
        if key not in known:
            known[key] = load_policy(config, adapter=adapter, mesh=mesh)
        return known[key]

    return load


one_policy = sharing_policies()


def tiny_policy():
    config = parse_config(get_config())
    return one_policy(config), config


def thin_policy():
    config = parse_config(thin_config())
    return one_policy(config), config


def random_offsets(zero, seed=1, scale=0.05):
    keys = jax.random.split(jax.random.key(seed), len(zero))
    return {
        name: scale * jax.random.normal(key, zero[name].shape)
        for key, name in zip(keys, zero, strict=True)
    }


def write_run(folder, *, settings=None, offsets=None, **adapter_config):
    """A run directory with an adapter nobody trained."""
    settings = get_config() if settings is None else settings
    config = parse_config(settings)
    loaded = one_policy(config)
    checkpoints.save_adapter(
        folder / "adapter",
        random_offsets(loaded.zero) if offsets is None else offsets,
        {
            "base_model": loaded.pretrained.source,
            "base_sha256": loaded.pretrained.sha256,
            "type": "svf",
            **dataclasses.asdict(config.adapter),
            **adapter_config,
        },
        "An adapter for tests.",
    )
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    return folder


def write_trained(folder, summary=SUMMARY, changes=(), **options):
    """A run directory with an adapter nobody trained and a summary nobody measured."""
    write_run(folder, **options)
    settings = get_config(**{"generation.stop": (",",), **dict(changes)})
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@functools.cache
def question_examples(count=4):
    """Built-in questions of one length in tokens, so that they make prompts of one shape."""
    loaded, config = thin_policy()

    def length(text):
        return len(loaded.tokenizer.encode(text, add_special_tokens=False))

    drawn = load_examples(
        TASKS["qa"],
        SourceConfig(),
        split="train",
        count_tokens=length,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_samples=100,
        seed=0,
    )
    by_length = {}
    for example in drawn.examples:
        by_length.setdefault(length(example.prompt), []).append(example)
    return next(tuple(group[:count]) for group in by_length.values() if len(group) >= count)


def no_search(*args, **kwargs):
    raise AssertionError("searched")
