"""The command ``grpocem-export``: its flags and nothing else."""

from absl import flags

from grpocem_jax.config import commands
from grpocem_jax.export import command
from grpocem_jax.export.model import DTYPES


def main() -> None:
    """The command."""
    config = commands.define_config(of_run=True)
    workdir = flags.DEFINE_string("workdir", None, "Run directory with a trained adapter.")
    out = flags.DEFINE_string("out", None, "Folder to make; must not exist.")
    adapter = flags.DEFINE_string(
        "adapter", None, "Folder of another adapter of the same run, from adapt.py --save."
    )
    model = flags.DEFINE_string("model", None, commands.MODEL_HELP)
    format = flags.DEFINE_string(
        "format", "merged", "merged: a model of its own; peft: a LoRA that PEFT and vLLM load."
    )
    dtype = flags.DEFINE_string(
        "dtype", None, f"Of a merged model, one of {', '.join(DTYPES)}; by default the base's."
    )
    rank = flags.DEFINE_integer(
        "rank", None, "Of a LoRA; by default the full rank, at which it is exact."
    )
    repository = flags.DEFINE_string(
        "push_to_hub", None, "USER/NAME: upload the folder to the Hugging Face Hub under this name."
    )
    private = flags.DEFINE_bool("private", False, "With --push_to_hub: only you can see it.")
    commands.run(
        lambda argv: command.run(
            workdir=workdir.value,
            out=out.value,
            settings=config.value,
            adapter=adapter.value,
            model=model.value,
            format=format.value,
            dtype=dtype.value,
            rank=rank.value,
            repository=repository.value,
            private=private.value,
        )
    )


if __name__ == "__main__":
    main()
