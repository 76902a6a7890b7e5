"""Summarizing a document (XSum), with GPT-2's own cue for it."""

from grpocem_jax.tasks.base import Reward, Task
from grpocem_jax.tasks.rewards import summary_reward

TASK = Task(
    name="summarization",
    columns={"document": "the text to summarize", "summary": "its reference summaries"},
    template="{document}\nTL;DR:",
    rewards=(Reward(summary_reward),),
    shorten="document",
    reference="summary",
)
