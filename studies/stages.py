"""When rollouts apart pay: what the stages of a step cost by the number of prompts of a process.

    python -m studies.stages --paper
    taskset -c 0 python -m studies.stages [--config tiny] [--repetitions 3]

Each stage is measured with all prompts of a step and with half of them, in processor seconds, the
least of some repetitions, so that other work on the machine counts little.  Of that follows
what a step takes of two processes that divide everything, and of one that samples while the other
updates.  The exchanges between them are not in it.

`--paper` measures nothing: it calculates the same of many GPUs, from the figures of one H100 in
docs/benchmarks.md.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from grpocem_jax import grpo
from grpocem_jax.config import commands, parse_config
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.data import load_data
from grpocem_jax.training.stages import Stages

LENGTHS = (24, 64)
STEPS = 5
UPDATES = (1, 2, 4)
"""Updates on the completions of a step, each of which costs what one does."""


# GPT-2's shape in bfloat16 on one H100: tokens a second of decoding, by rows, and an update.
DECODED = {64: 69_970, 512: 184_346}
UPDATE_S, UPDATED, NEW_TOKENS = 0.050, 64, 64


def on_gpus(completions: int, devices: int) -> tuple[float, float, int]:
    """A step of ``completions`` on each of some GPUs: divided, apart, and how many sample then."""
    few, many = DECODED
    passes = [rows / rate for rows, rate in DECODED.items()]  # of one token of all rows
    slope = (passes[1] - passes[0]) / (many - few)

    def rollouts(rows: float) -> float:
        return NEW_TOKENS * (passes[0] + slope * (rows - few))

    def update(rows: float) -> float:
        return UPDATE_S * rows / UPDATED

    total = completions * devices
    apart, sampling = min(
        (max(rollouts(total / k), update(total / (devices - k))), k) for k in range(1, devices)
    )
    return rollouts(completions) + update(completions), apart, sampling


def seconds(function: Callable[[int], Any], repetitions: int) -> float:
    """The least processor time of a function of a step's number, its mean over some steps."""
    function(0)  # compiles it
    taken = []
    for step in range(STEPS):
        own = []
        for _ in range(repetitions):
            began = time.process_time()
            jax.block_until_ready(function(step))
            own.append(time.process_time() - began)
        taken.append(min(own))
    return sum(taken) / len(taken)


def measure(settings: Any, length: int, share: int, repetitions: int) -> tuple[float, float]:
    """Processor seconds of the rollouts and of an update of one of ``share`` parts of a step."""
    own = settings.copy_and_resolve_references()
    own.generation.max_new_tokens = length
    own.train.batch_size //= share
    config = parse_config(own)
    policy, algorithm = load_policy(config), make_algorithm(config)
    items = load_data(config, policy).train
    size, key = config.train.batch_size, jax.random.key(0)
    stages = Stages(config, policy, algorithm, items, key, total=100, size=size)
    state = grpo.init_state(policy.zero, algorithm.optimizer)
    prepared = [stages.sample(policy.zero, step) for step in range(STEPS)]
    return (
        seconds(lambda step: stages.sample(policy.zero, step).batch, repetitions),
        seconds(lambda step: stages.update(state, prepared[step], step).state, repetitions),
    )


def main(argv: Sequence[str]) -> None:
    """Runs the study and prints its figures."""
    del argv
    values = flags.FLAGS
    if values.paper:
        for completions in (16, 64, 256, 512):
            for devices in (2, 8, 64):
                divided, apart, sampling = on_gpus(completions, devices)
                print(
                    f"{completions} completions on each of {devices}: divided {divided:.3f} s, "
                    f"apart {apart:.3f} s with {sampling} that sample, {apart / divided:.2f}"
                )
        return
    found = []
    for length in LENGTHS:
        rolled, updated = measure(values.config, length, 1, values.repetitions)
        half_rolled, half_updated = measure(values.config, length, 2, values.repetitions)
        for updates in UPDATES:
            divided = half_rolled + updates * half_updated
            apart = max(rolled, updates * updated)
            found.append(
                {
                    "max_new_tokens": length,
                    "updates": updates,
                    "rollouts": [rolled, half_rolled],
                    "update": [updates * updated, updates * half_updated],
                    "divided": divided,
                    "apart": apart,
                    "apart / divided": apart / divided,
                }
            )
            print(json.dumps(found[-1]), flush=True)


if __name__ == "__main__":
    commands.define_config(default="tiny")
    flags.DEFINE_boolean("paper", False, "Calculates, from what one GPU took.")
    flags.DEFINE_integer("repetitions", 3, "Of each measurement.")
    commands.run(main)
