"""Continuing the opening of a text (WikiText), judged sentence by sentence as well."""

from grpocem_jax.tasks.base import Reward, Task
from grpocem_jax.tasks.rewards import text_process_reward, text_reward

TASK = Task(
    name="general",
    columns={"text": "the text, of which the opening becomes the prompt"},
    template="{text}",
    rewards=(Reward(text_reward),),
    process_reward=text_process_reward,
    shorten="text",
)
