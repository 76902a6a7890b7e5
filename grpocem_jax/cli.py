"""The commands ``grpocem-train``, ``-adapt`` and ``-serve``: their flags and nothing else."""

import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from grpocem_jax.adaptation import command as inference
from grpocem_jax.compare import compare
from grpocem_jax.config import commands
from grpocem_jax.serving.options import Limits, Options
from grpocem_jax.training import sweep
from grpocem_jax.training.loop import train as train_run
from grpocem_jax.utils import cluster
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import say


def train() -> None:
    """Trains an adapter."""
    config = commands.define_config()
    workdir = flags.DEFINE_string("workdir", None, "Run directory; by default runs/CONFIG-TIME.")
    grid = flags.DEFINE_string(
        "sweep",
        None,
        "Train a run for each combination of seeds, learning rates and tasks, all in one program: "
        "'seed=0,1,2 train.learning_rate=0.01,0.02 data.tasks=qa,sentiment+general'.",
    )

    join = commands.define_processes()

    def main(argv: list[str]) -> None:
        del argv
        if workdir.value == "":
            raise InputError("--workdir='': is no folder; give one, or leave the flag out.")
        name = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
        default = f"runs/{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        if grid.value is None:
            train_run(config.value, workdir.value or default)
            return
        if cluster.here().count > 1:
            raise InputError("--sweep: is for one process; leave --distributed out.")
        folder = Path(workdir.value or default)
        runs = sweep.sweep(config.value, sweep.parse(grid.value), folder)
        page = folder / "compare.html"
        compare([str(folder / name) for name in runs], page)
        say(f"{sweep.table(runs)}\npage      {page}")

    commands.run(main, join=join)


def adapt() -> None:
    """Adapts a trained adapter at inference."""
    config = commands.define_config(of_run=True)
    workdir = flags.DEFINE_string("workdir", None, "Run directory with a trained adapter.")
    prompt = flags.DEFINE_string("prompt", None, "The prompt to adapt to and to complete.")
    prompts = flags.DEFINE_string(
        "prompts", None, "File of prompts, each adapted to by itself: .txt (one a line) or .jsonl."
    )
    examples = flags.DEFINE_string(
        "examples",
        None,
        "File of examples, adapted to together before the prompts are completed: .txt (one a "
        "line), or .jsonl with text, with prompt and completion, or with the columns of "
        "search.task.",
    )
    heldout = flags.DEFINE_string(
        "heldout",
        None,
        "File of texts that only judge, in the forms of --examples: likelihood before and after, "
        "with search.fitness=reward their reward, and right answers of a task with labels.",
    )
    evaluate = flags.DEFINE_bool("evaluate", False, "The report's tables on held-out prompts.")
    save = flags.DEFINE_string(
        "save",
        None,
        "Folder to make for the adapted adapter; relative to the current directory.",
    )
    model = flags.DEFINE_string("model", None, commands.MODEL_HELP)
    as_json = flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")
    join = commands.define_processes()

    def main(argv: list[str]) -> None:
        del argv
        inference.run(
            config.value,
            workdir=workdir.value,
            prompt=prompt.value,
            prompts=prompts.value,
            examples=examples.value,
            heldout=heldout.value,
            evaluate=evaluate.value,
            save=save.value,
            model=model.value,
            as_json=as_json.value,
        )

    commands.run(main, join=join)


def serve() -> None:
    """Serves a model and its adapters over HTTP."""
    config = commands.define_config(of_run=True)
    workdir = flags.DEFINE_string("workdir", None, "Run directory with a trained adapter.")
    model = flags.DEFINE_string("model", None, commands.MODEL_HELP)
    add_key = flags.DEFINE_string(
        "add_key", None, "Name of a tenant: make a key for it, add its hash to --keys, and end."
    )
    of_options, of_limits = _define_fields(Options), _define_fields(Limits)

    def main(argv: list[str]) -> None:
        del argv
        for name in ("starlette", "uvicorn", "prometheus_client"):
            if importlib.util.find_spec(name) is None:
                raise InputError(f"{name} is not installed; install grpocem_jax[serve].")
        from grpocem_jax.serving import command

        options = Options(**{name: flag.value for name, flag in of_options.items()})
        limits = Limits(**{name: flag.value for name, flag in of_limits.items()})
        if add_key.value is not None:
            command.make_key(options.keys, add_key.value)
            return
        command.run(
            config.value,
            workdir=workdir.value,
            model=model.value,
            options=options,
            limits=limits,
        )

    commands.run(main)


def _define_fields(record: Any) -> dict[str, flags.FlagHolder]:
    """A flag for each field of a record of settings, of which it says what the field means."""
    define: dict[Any, Any] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
    }
    return {
        field.name: define[field.type](field.name, field.default, field.metadata["doc"])
        for field in dataclasses.fields(record)
    }
