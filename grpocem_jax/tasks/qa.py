"""Answering a question from a passage (SQuAD)."""

from grpocem_jax.rewards import answer_reward
from grpocem_jax.tasks.base import Task

TASK = Task(
    name="qa",
    columns={
        "context": "the passage that holds the answer",
        "question": "the question",
        "answers": "the accepted answers",
    },
    template="{context}\nQuestion: {question}\nAnswer:",
    reward=answer_reward,
    reference="answers",
)
