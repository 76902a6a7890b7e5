"""Answering a question from a passage (SQuAD)."""

from grpocem_jax.tasks.base import Reward, Task
from grpocem_jax.tasks.rewards import answer_reward

TASK = Task(
    name="qa",
    columns={
        "context": "the passage that holds the answer",
        "question": "the question",
        "answers": "the accepted answers",
    },
    template="{context}\nQuestion: {question}\nAnswer:",
    rewards=(Reward(answer_reward),),
    reference="answers",
)
