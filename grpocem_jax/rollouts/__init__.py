"""Rollouts: prompts to completions, completions to rewards, and the policy that makes them."""

from grpocem_jax.rollouts.engine import SHARED, Completions, complete, decode, generate
from grpocem_jax.rollouts.prompts import Item, Prompts, batches, bucket_length, encode, pad
from grpocem_jax.rollouts.rewards import (
    Scores,
    population_rewards,
    score,
    score_steps,
    with_base_logps,
)
from grpocem_jax.rollouts.shots import task_format

__all__ = [
    "SHARED",
    "Completions",
    "Item",
    "Prompts",
    "Scores",
    "batches",
    "bucket_length",
    "complete",
    "decode",
    "encode",
    "generate",
    "pad",
    "population_rewards",
    "score",
    "score_steps",
    "task_format",
    "with_base_logps",
]
