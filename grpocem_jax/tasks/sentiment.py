"""Naming the sentiment of a review (SST-2)."""

from grpocem_jax.tasks.base import Reward, Task
from grpocem_jax.tasks.rewards import label_reward

TASK = Task(
    name="sentiment",
    columns={"text": "the review", "label": "its sentiment"},
    template="Review: {text}\nSentiment:",
    rewards=(Reward(label_reward),),
    shorten="text",
    reference="label",
)
