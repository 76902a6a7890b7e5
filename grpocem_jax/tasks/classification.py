"""Naming the topic of a news text (AG News)."""

from grpocem_jax.tasks.base import Reward, Task
from grpocem_jax.tasks.rewards import label_reward

TASK = Task(
    name="classification",
    columns={"text": "the text", "label": "its topic"},
    template="Text: {text}\nTopic:",
    rewards=(Reward(label_reward),),
    shorten="text",
    reference="label",
)
