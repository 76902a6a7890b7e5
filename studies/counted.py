"""Runs a command and counts what this process does of the work that processes divide.

    python -m studies.counted COUNTS.json train.py|adapt.py ARGUMENTS...

The counts, as JSON: prompts completed, completions judged, prompts updated, candidates scored.  One
process by itself updates and scores in programs of its own, which are not counted.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from grpocem_jax import cli, rollouts
from grpocem_jax.search import drivers
from grpocem_jax.tasks import scoring
from grpocem_jax.training import update

COMMANDS = {"train.py": cli.train, "adapt.py": cli.adapt}


def count() -> dict[str, int]:
    """Begins to count; the numbers are those of the dict, and grow."""
    names = ("prompts completed", "completions judged", "prompts updated", "scored")
    done = dict.fromkeys(names, 0)
    generate, call = rollouts.engine.generate, scoring.call
    gradients, fitness = update._gradients, drivers._fitness

    def counted_generate(
        policy: Any, offsets: Any, prompts: Any, *args: Any, **options: Any
    ) -> Any:
        done["prompts completed"] += len(prompts.tokens)
        return generate(policy, offsets, prompts, *args, **options)

    def counted_call(calls: Any) -> Any:
        done["completions judged"] += sum(len(each.completions) for each in calls)
        return call(calls)

    def counted_gradients(offsets: Any, params: Any, batch: Any, *args: Any, **options: Any) -> Any:
        done["prompts updated"] += len(batch.completions)
        return gradients(offsets, params, batch, *args, **options)

    def counted_fitness(problem: Any, points: Any, *args: Any, **options: Any) -> Any:
        done["scored"] += len(jax.tree.leaves(points)[0])
        return fitness(problem, points, *args, **options)

    replaced: list[tuple[Any, str, Any]] = [
        (rollouts.engine, "generate", counted_generate),
        (scoring, "call", counted_call),
        (update, "_gradients", counted_gradients),
        (drivers, "_fitness", counted_fitness),
    ]
    for module, name, function in replaced:
        setattr(module, name, function)
    return done


if __name__ == "__main__":
    path, *command = sys.argv[1:]
    done = count()
    sys.argv = command
    try:
        COMMANDS[command[0]]()
    finally:
        Path(path).write_text(json.dumps(done))
