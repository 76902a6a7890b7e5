"""Examples of the training split that stand before every prompt of a task."""

import dataclasses
import itertools
from collections.abc import Sequence

from grpocem_jax.config import Config
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.tasks import Example, PromptFormat, Shot, SourceConfig, load_examples
from grpocem_jax.utils.errors import InputError

CHOICE = 16
"""Examples that are drawn for each one shown, to find short ones with every label."""


def task_format(config: Config, policy: Policy, name: str) -> PromptFormat:
    """How the prompts of a task are written, with ``data.TASK.shots`` examples before each.

    The examples are the first of the training split in the order of ``seed``, none longer than its
    share of ``data.max_prompt_tokens``; of a task with labels every label in turn.

    Args:
      config: of which the data are read.
      policy: whose tokenizer and chat template count.
      name: the task.

    Raises:
      InputError: as `grpocem_jax.tasks.load_examples`; a task without references or whose prompts
        are lists of messages, or fewer examples than are to be shown.
    """
    task, source = config.task(name), config.data.sources.get(name, SourceConfig())
    count, form = source.shots, policy.prompt_format
    if not count:
        return form
    field = f"config.data.{name}.shots={count}"
    limit = config.data.max_prompt_tokens // (count + 1)
    drawn = load_examples(
        # A shortened text would not be recognised among the training prompts.
        dataclasses.replace(task, shorten=None),
        source,
        split="train",
        count_tokens=lambda text: len(policy.encode(text)),
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_samples=CHOICE * count,
        seed=config.seed,
        prompt_format=form,
        bad_lines=config.data.bad_lines,
    ).examples
    if task.completion(drawn[0]) is None:
        raise InputError(f"{field}: the task has no reference completions to show; set it to 0.")
    answered = []
    for example in drawn:
        answer = task.completion(example)
        if answer is not None and len(policy.encode(example.prompt + answer)) <= limit:
            answered.append((example, Shot(task.prompt(example.columns), answer)))
    if not all(isinstance(shot.prompt, str) for _, shot in answered):
        raise InputError(
            f"{field}: the task's prompts are lists of messages; put the examples into them, or "
            "set it to 0."
        )
    if len(answered) < count:
        raise InputError(
            f"{field}: of {len(drawn)} examples drawn from the training split {len(answered)} have "
            f"at most {limit} tokens, the share of each in data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens}; lower it, or raise that."
        )
    return dataclasses.replace(form, shots=tuple(_in_turn(answered)[:count]))


def _in_turn(examples: Sequence[tuple[Example, Shot]]) -> list[Shot]:
    """One example of each label after another, in their order."""
    by_label: dict[str, list[Shot]] = {}
    for example, shot in examples:
        by_label.setdefault(str(example.columns.get("label", "")), []).append(shot)
    turns = itertools.zip_longest(*by_label.values())
    return [shot for turn in turns for shot in turn if shot is not None]
