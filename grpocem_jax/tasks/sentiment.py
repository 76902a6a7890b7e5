"""Naming the sentiment of a review (SST-2)."""

from grpocem_jax.rewards import label_reward
from grpocem_jax.tasks.base import Reward, Task

TASK = Task(
    name="sentiment",
    columns={"text": "the review", "label": "its sentiment"},
    template="Review: {text}\nSentiment:",
    rewards=(Reward(label_reward),),
    shorten="text",
    reference="label",
)
