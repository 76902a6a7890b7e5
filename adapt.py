"""Adapts a trained adapter at inference: to a prompt, to prompts of a file, or to examples.

    python adapt.py --config configs/tiny.py --workdir runs/tiny --prompt "Review: ..."
    python adapt.py --config configs/tiny.py --workdir runs/tiny --evaluate

Without --prompt, --prompts or --evaluate the prompt is read from standard input.  Any setting can
be overridden: ``--config.cem.population_size=200``.
"""

from absl import flags
from ml_collections import config_flags

from grpocem_jax import commands, inference

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/tiny.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory with a trained adapter.")
PROMPT = flags.DEFINE_string("prompt", None, "The prompt to adapt to and to complete.")
PROMPTS = flags.DEFINE_string(
    "prompts", None, "File of prompts, each adapted to by itself: .txt (one a line) or .jsonl."
)
EXAMPLES = flags.DEFINE_string(
    "examples",
    None,
    "File of examples, adapted to together before the prompts are completed: .txt (one a line), or "
    ".jsonl with text, with prompt and completion, or with the columns of cem.task.",
)
HELDOUT = flags.DEFINE_string(
    "heldout", None, "File of texts that only judge: their likelihood before and after."
)
EVALUATE = flags.DEFINE_bool("evaluate", False, "The report's tables on held-out prompts.")
SAVE = flags.DEFINE_string("save", None, "Folder to save the adapted adapter in.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")


def main(argv: list[str]) -> None:
    """Checks the flags and adapts."""
    del argv
    inference.run(
        CONFIG.value,
        workdir=WORKDIR.value,
        prompt=PROMPT.value,
        prompts=PROMPTS.value,
        examples=EXAMPLES.value,
        heldout=HELDOUT.value,
        evaluate=EVALUATE.value,
        save=SAVE.value,
        as_json=JSON.value,
    )


if __name__ == "__main__":
    commands.run(main)
