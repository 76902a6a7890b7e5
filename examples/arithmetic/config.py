"""Arithmetic by exact match, the tasks of S-GRPO and T-SPMO (Lee and Tong 2025, arXiv 2504.20834).

    python train.py --config examples/arithmetic/config.py
    python train.py --config examples/arithmetic/config.py:svamp
    python train.py --config examples/arithmetic/config.py:FOLDER

Multiplications made by multiplication.py, or the word problems of SVAMP (Patel et al. 2021, arXiv
2103.07191) from the Hugging Face Hub or from a FOLDER with its train.jsonl and test.jsonl.  The
model is that of configs/smollm2.py.
"""

from pathlib import Path

import ml_collections

import grpocem_jax as gj


def get_config(data: str = "multiplication") -> ml_collections.ConfigDict:
    """configs/smollm2.py with another task and its prompts."""
    config = gj.load_config("smollm2:builtin")
    task = ml_collections.ConfigDict({"rewards": ("examples.arithmetic.rewards:exact",)})
    if data == "multiplication":
        task.source = str(Path(__file__).parent)
        config.data.max_prompt_tokens = 16
    else:
        task.source = "ChilleD/SVAMP" if data == "svamp" else data
        task.heldout_split = "test"
        task.template = "{Body}. {Question}\nThe answer is a number.\nAnswer:"
        config.data.max_prompt_tokens = 128
    config.data.tasks = ("arithmetic",)
    config.data.arithmetic = task
    config.data.heldout_samples = 100
    config.generation.prompt_buckets = (config.data.max_prompt_tokens,)
    config.generation.max_new_tokens = 6
    return config
