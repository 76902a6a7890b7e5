"""What a task is: a prompt template, the columns it reads, and rewards of completions.

Reward functions run on the host on decoded text and have TRL's signature,
``f(prompts, completions, **columns) -> list[float | None]``: ``columns`` holds one list per
column of the data set, ``None`` abstains, and the values of this package's own rewards lie in
[-1, 1].
"""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from grpocem_jax.tasks.rewards import (
    ProcessRewardFunction,
    RewardFunction,
    StepReward,
    label_reward,
)

__all__ = ["Example", "ProcessRewardFunction", "Reward", "RewardFunction", "StepReward", "Task"]


class Reward(NamedTuple):
    """A reward function and its weight in the sum of a task's rewards."""

    function: RewardFunction
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The function's own name, as in logs and messages."""
        return getattr(self.function, "__name__", type(self.function).__name__)


class Example(NamedTuple):
    """One prompt and the columns its reward function reads."""

    prompt: str
    columns: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task as data: everything that training and evaluation need to know of it.

    The columns that occur in the template hold text.  A column named ``label`` holds one of the
    source's label names, and its examples get a further column ``labels`` with all of them.  Every
    other column that is listed holds references: one string or a list of them.

    Attributes:
      name: the task's name in configs, logs and summaries.
      columns: required columns of the data set, by name, each with a phrase for error messages.
      template: the prompt as a format string over ``columns``; ``{labels}`` are the label names.
      rewards: outcome rewards of whole completions; a completion's is their weighted sum, without
        those that abstain.
      process_reward: rewards of the steps of each completion (the last step ends where the
        completion does), or None where only the outcome is judged.
      shorten: the column whose text may lose its last words so that a prompt fits, or None when a
        shortened text could make the example unanswerable; such examples are dropped and counted.
      reference: the column with the reference completion, or None where there is none.
      lead: what stands between a prompt and its reference completion.
      own: a task of the user's own: the column ``prompt`` is the prompt as it stands (a string, or
        a list of messages) unless there is a template, a column ``completion`` the reference where
        the data set has one, and the reward functions get every other column as it is.
      reward_timeout_s: seconds that one call of a reward function may take; 0 for any time.
      reward_retries: how often a call that fails is tried again.
      reward_on_error: what then comes of a failed call: "stop" raises, "abstain" leaves its
        completions without this reward.
      find_failing_completion: whether a function that raised is called again for each completion
        by itself, to name the one that it raises on.
    """

    name: str
    columns: Mapping[str, str]
    template: str
    rewards: tuple[Reward, ...]
    process_reward: ProcessRewardFunction | None = None
    shorten: str | None = None
    reference: str | None = None
    lead: str = " "
    own: bool = False
    reward_timeout_s: float = 0.0
    reward_retries: int = 0
    reward_on_error: str = "stop"
    find_failing_completion: bool = False

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that the prompt shows."""
        fields = {field for _, field, _, _ in string.Formatter().parse(self.template) if field}
        return tuple(name for name in self.columns if name in fields)

    def completion(self, example: "Example") -> str | None:
        """The reference as a completion of the prompt, or None where the task has none."""
        if self.reference is None:
            return None
        value: Any = example.columns.get(self.reference)
        if self.own:
            return value if isinstance(value, str) and value else None
        return f"{self.lead}{value if isinstance(value, str) else value[0]}"

    def prompt(self, columns: Mapping[str, Any]) -> Any:
        """The template with an example's columns in it; a prompt of messages as it is."""
        if self.takes_prompts:
            return columns["prompt"]
        labels = columns.get("labels")
        named = {"labels": ", ".join(labels)} if isinstance(labels, tuple) else {}
        return self.template.format_map({**columns, **named})

    @property
    def takes_prompts(self) -> bool:
        """Whether a column holds the whole prompt, a string or a list of messages."""
        return self.template == "{prompt}"

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether the reward is 1 for the right answer and -1 for any other: an accuracy."""
        return list(self.rewards) == [Reward(label_reward)]

    @property
    def is_free_text(self) -> bool:
        """Whether the rows are running text, with nothing to compare a completion with."""
        return not self.own and set(self.columns) == set(self.text_columns)
