"""A task of one's own: a data set with a prompt column, and two reward functions.

    python train.py --config examples/own_task/config.py

A minute on 2 CPU cores. The rows of train.jsonl and test.jsonl have ``prompt`` and, for the reward,
``sentiment``; a Hub id of such a data set can stand in place of the folder.
"""

from pathlib import Path

import ml_collections

import grpocem_jax as gj


def get_config() -> ml_collections.ConfigDict:
    """The built-in model and its settings, with another task."""
    config = gj.load_config("tiny")
    config.data.tasks = ("reviews",)
    config.data.reviews = {
        "source": str(Path(__file__).parent),
        "rewards": ("examples.own_task.rewards:right", "examples.own_task.rewards:brief"),
        "reward_weights": (1.0, 0.5),
    }
    config.data.heldout_samples = 40
    config.train.epochs = 2
    return config
