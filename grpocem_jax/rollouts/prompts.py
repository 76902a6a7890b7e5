"""Prompts of a task as tokens, and tokens as the padded arrays of a batch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.tasks import Example, Task
from grpocem_jax.utils.errors import InputError


class Item(NamedTuple):
    """An example of a task with its prompt's tokens (int32 ``[S]``)."""

    task: Task
    example: Example
    tokens: np.ndarray


class Prompts(NamedTuple):
    """A padded batch: tokens int32 ``[P, S]``, padded on the left, and mask bool ``[P, S]``."""

    tokens: np.ndarray
    mask: np.ndarray


def encode(policy: Policy, task: Task, examples: Sequence[Example]) -> list[Item]:
    """Tokenizes prompts.

    Args:
      policy: for its tokenizer.
      task: whose rewards will judge the completions; its template is not read.
      examples: each with its whole prompt, and in ``columns`` what the rewards read.

    Returns:
      an item for each example.

    Raises:
      InputError: an empty prompt.
    """
    items = []
    for example in examples:
        tokens = policy.encode(example.prompt)
        if not tokens:
            raise InputError(f"{task.name}: a prompt is empty; every prompt needs some text.")
        items.append(Item(task, example, np.asarray(tokens, np.int32)))
    return items


def bucket_length(longest: int, buckets: Sequence[int]) -> int:
    """The smallest of ``buckets`` that holds ``longest`` tokens, else ``longest`` itself."""
    return min((bucket for bucket in buckets if bucket >= longest), default=longest)


def batches(prompts: Sequence[np.ndarray], size: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Splits prompts into batches of one size.

    Prompts of similar length share a batch, so that short ones are padded to a small bucket.  The
    last batch repeats its first prompt until it is full: one compiled shape.

    Args:
      prompts: tokens of each, int32 ``[S]``.
      size: prompts in a batch, at least 1.

    Yields:
      the numbers of the prompts in a batch, and the same with the repetitions, int ``[size]``.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, np.array(rows + rows[:1] * (size - len(rows)))


def pad(prompts: Sequence[np.ndarray], length: int) -> Prompts:
    """Pads the tokens of prompts on the left to ``length``."""
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return Prompts(tokens, mask)
