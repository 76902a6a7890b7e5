"""Computes on several devices and on one what `test_devices.py` compares; prints it as JSON.

python -m tests.two_devices [WEIGHT_SHARDS]
"""

import contextlib
import functools
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from grpocem_jax import adaptation, grpo, rollouts
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.search import CEM, GradientAscent, fitness, kernel, loop
from grpocem_jax.search.spaces import full_space
from grpocem_jax.training import loop as training
from grpocem_jax.training import screens
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.data import load_data
from grpocem_jax.training.update import update_program
from grpocem_jax.utils import devices
from tests.runs import one_policy, thin_model

PROMPT = "Review: The soup was cold, but the waiter was kind."
WEIGHT_SHARDS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
MESH = devices.make_mesh(jax.devices(), weight_shards=WEIGHT_SHARDS)


def settings() -> Any:
    """A small run of two micro-batches a step."""
    config = load_config("tiny")
    small = {
        "model.source": thin_model(),
        "model.weight_shards": WEIGHT_SHARDS,
        "data.tasks": ("general",),
        "data.max_samples": 16,
        "data.heldout_samples": 2,
        "generation.max_new_tokens": 4,
        "grpo.group_size": 4,
        "train.accumulation_steps": 2,
        "train.batch_size": 8,
        "train.checkpoint_every_steps": 1,
        "train.eval_samples": 1,
        "train.max_steps": 2,
        "train.warmup_steps": 1,
    }
    config.update_from_flattened_dict(small)
    return config


def difference(one: Any, two: Any) -> float:
    """The largest difference of two trees of arrays."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def largest(tree: Any) -> float:
    """The largest number of a tree of arrays."""
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


def work(program: jax.stages.Compiled) -> float:
    """Floating-point operations of a program, on each of its devices."""
    return program.cost_analysis()["flops"]


config = parse_config(settings())
one = one_policy(config)
two = one_policy(config, mesh=MESH)
items = load_data(config, one).train[:4]
prompts = rollouts.pad([item.tokens for item in items], 64)
generate = functools.partial(
    rollouts.generate,
    offsets=one.zero,
    prompts=prompts,
    keys=jax.random.split(jax.random.key(0), len(items)),
    generation=config.generation,
    num_samples=4,
    temperature=1.0,
)


def compare_rollouts() -> dict[str, Any]:
    """Completions of the same keys."""
    first, second = (generate(policy) for policy in (one, two))
    return {
        "same tokens": difference(first.tokens, second.tokens) == 0,
        "logps": difference(first.logps, second.logps),
    }


def compare_update(micro_batches: int) -> dict[str, float]:
    """One update on completions with random rewards, by the program of the runs."""
    out = generate(one)
    rewards = np.random.default_rng(0).normal(size=out.mask.shape[:2])
    batch = grpo.Batch(
        *prompts,
        out.tokens,
        out.mask,
        out.logps,
        grpo.outcome_advantages(rewards, out.mask),
        grpo.token_weights(out.mask),
    )
    algorithm = make_algorithm(config)
    state = grpo.init_state(one.zero, algorithm.optimizer)
    options = {
        "model": one.model,
        "objective": algorithm.objective,
        "optimizer": algorithm.optimizer,
        "beta": config.grpo.beta,
        "entropy": config.grpo.entropy,
        "micro_batch": 16 // micro_batches,
    }
    alone = (state, one.params, batch, 1.0)
    together = (devices.replicate(MESH, state), two.params, devices.divide(MESH, batch), 1.0)
    programs = [update_program.lower(*args, **options).compile() for args in (alone, together)]
    first, second = (
        program(*args)[0].offsets for program, args in zip(programs, (alone, together), strict=True)
    )
    counts = [work(program) for program in programs]
    return {
        "moved": largest(first),
        "difference": difference(first, second),
        "work": counts[1] / counts[0],
    }


def search(policy: Any, method: Any, chunk: int) -> loop.SearchResult:
    """A short search on the likelihood of a text."""
    encoded = [adaptation.encode(policy, PROMPT, config.search)]
    return loop.maximize(
        method,
        fitness.Likelihood(policy.params, policy.model),
        full_space(policy.zero),
        adaptation.batch(encoded, config.search),
        jax.random.key(0),
        generations=3,
        population_chunk=chunk,
        mesh=policy.mesh,
    )


def compare_search(method: Any, *chunks: int) -> dict[int, dict[str, float]]:
    """Where the searches end, those of several devices by how many candidates they take at once."""
    first = search(one, method, 0).offsets
    ends = {chunk: search(two, method, chunk).offsets for chunk in chunks}
    return {
        chunk: {"moved": largest(first), "difference": difference(first, second)}
        for chunk, second in ends.items()
    }


def work_of_a_generation() -> float:
    """The share of a generation that a device does, of what one does alone."""
    batch = adaptation.batch([adaptation.encode(one, PROMPT, config.search)], config.search)
    method = CEM(population_size=10)

    space = full_space(one.zero)

    @functools.partial(jax.jit, static_argnames="mesh")
    def step(score, key, *, mesh):
        problem = kernel.Problem(score, space, batch, key)
        first = kernel.begin(method, problem, generations=1)
        return kernel.advance(method, problem, first, 1, mesh=mesh)

    key = jax.random.key(0)
    counts = [
        work(step.lower(fitness.Likelihood(p.params, p.model), key, mesh=p.mesh).compile())
        for p in (one, two)
    ]
    return counts[1] / counts[0]


def train(workdir: Path, count: int) -> tuple[dict[str, Any], str]:
    """A run on so many devices: its summary, and the line of the first screen on the device."""
    real, out = jax.local_device_count, io.StringIO()
    if count == 1:
        jax.local_device_count = lambda: 1
    try:
        with contextlib.redirect_stdout(out):
            summary = training.train(settings(), workdir)
    finally:
        jax.local_device_count = real
    (line,) = (x for x in out.getvalue().splitlines() if x.startswith("device "))
    return summary, line


def offsets(workdir: Path) -> dict[str, np.ndarray]:
    """The trained adapter."""
    return load_file(workdir / "adapter" / "adapter_model.safetensors")


def completions(workdir: Path) -> list[str]:
    """A run's texts; rewards by the base model's likelihood differ in their last digits."""
    lines = (workdir / "completions.jsonl").read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines]


def compare_runs(folder: Path) -> dict[str, Any]:
    """A run on one device, on two, and begun on two and continued on one."""
    counts = (1, 2)
    runs = [train(folder / str(count), count) for count in counts]
    first, second = (offsets(folder / str(count)) for count in counts)
    texts = [completions(folder / str(count)) for count in counts]
    begun = shutil.copytree(folder / "2", folder / "begun")
    for name in ("summary.json", "checkpoints/2"):
        path = begun / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    continued, _ = train(begun, 1)
    return {
        "run": {
            "devices_used": [summary["devices_used"] for summary, _ in runs],
            "same completions": texts[0] == texts[1],
            "completions": texts[0],
            "adapter": {name: x.tolist() for name, x in first.items()},
            "moved": largest(first),
            "difference": difference(first, second),
            "screen": runs[1][1],
        },
        "continued": {
            "resumed_after_step": continued["resumed_after_step"],
            "difference": difference(first, offsets(begun)),
        },
    }


def share_of_weights() -> float:
    """The part of the weights that lies on a device."""
    leaves = jax.tree.leaves(two.params)
    return sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)


def of_shared_weights(folder: Path) -> dict[str, Any]:
    """With weights in parts on a device each: a step's programs, and a run on all devices."""
    summary, line = train(folder / "all", jax.device_count())
    return {
        "rollouts": compare_rollouts(),
        "update": compare_update(1),
        "search": compare_search(CEM(population_size=10), 0)[0],
        "weights": share_of_weights(),
        "generation": work_of_a_generation(),
        "sharing": [devices.sharing(n, weight_shards=WEIGHT_SHARDS).size for n in (1, 2, 3, 4)],
        "run": {
            "devices_used": summary["devices_used"],
            "completions": completions(folder / "all"),
            "adapter": {name: x.tolist() for name, x in offsets(folder / "all").items()},
            "screen": line,
        },
    }


if __name__ == "__main__":
    training.report.write = lambda workdir: workdir / "report"  # seconds of drawing
    training.load_policy = one_policy
    with tempfile.TemporaryDirectory() as place:
        if WEIGHT_SHARDS > 1:
            found = of_shared_weights(Path(place))
        else:
            found = {
                "rollouts": compare_rollouts(),
                "update": compare_update(2),
                "search": compare_search(CEM(population_size=10), 0, 3),
                "generation": work_of_a_generation(),
                "sharing": [getattr(devices.sharing(count), "size", 1) for count in (1, 2, 3, 4)],
                "one of two": screens.first(config, one, [], Path("run")).splitlines()[0],
                "gradient": compare_search(GradientAscent(), 0)[0],
                **compare_runs(Path(place)),
            }
    print(json.dumps(found))
