"""The prompts of a run: which of a task's examples train, which judge, and which choose."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from grpocem_jax import rollouts
from grpocem_jax.config import Config
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.tasks import Example, Loaded, load_examples
from grpocem_jax.tasks.identity import identity
from grpocem_jax.utils.errors import InputError


class Data(NamedTuple):
    """The prompts of a run.

    Attributes:
      train: training prompts of all tasks.
      heldout: held-out prompts of all tasks.
      validation: other prompts of the held-out split, to compare checkpoints by, so that the
        held-out reward is not the largest of several; none where they are not compared.
      lines: where they are from, for the first screen.
      bad_lines: for each task, how many rows were passed over because they cannot be used.
    """

    train: list[rollouts.Item]
    heldout: list[rollouts.Item]
    validation: list[rollouts.Item]
    lines: list[str]
    bad_lines: dict[str, int]

    @property
    def sha256(self) -> str:
        """Hash of what a run is made of and must find again: prompts, order and columns."""
        digest = hashlib.sha256()
        for item in self.train + self.heldout + self.validation:
            try:
                digest.update(identity((item.task.name, *item.example)).encode())
            except InputError as error:
                raise InputError(f"data.{item.task.name}: {error}") from None
        return digest.hexdigest()


def check_length(config: Config, policy: Policy) -> None:
    """Refuses prompts and completions that are longer together than the model's context.

    Raises:
      InputError: they are.
    """
    longest = config.data.max_prompt_tokens + config.generation.max_new_tokens
    if longest > policy.model.context_length:
        raise InputError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and "
            f"generation.max_new_tokens={config.generation.max_new_tokens} make {longest} tokens, "
            f"but the model's context is {policy.model.context}; lower one of them."
        )


def load_data(config: Config, policy: Policy, *, held_out: Sequence[str] = ()) -> Data:
    """Training, held-out and validation prompts of all tasks; no prompt is in two of them.

    That holds across tasks as well: the held-out prompts of all tasks are drawn first, and none of
    them trains or compares checkpoints, whatever the task.

    Args:
      config: the settings.
      policy: for its tokenizer.
      held_out: names of other tasks with a source whose held-out prompts train nothing either.

    Raises:
      InputError: as `grpocem_jax.tasks.load_examples`; too few rows for held-out or validation
        prompts.
    """
    tasks = {name: config.task(name) for name in config.data.tasks}
    others = {name: config.task(name) for name in held_out if name not in tasks}
    formats = {name: rollouts.task_format(config, policy, name) for name in tasks | others}
    # Nothing that a prompt shows with its answer is a prompt itself.
    shown = {form.write(shot.prompt) for form in formats.values() for shot in form.shots}

    def draw(
        name: str, split: Literal["train", "heldout"], limit: int, exclude: Collection[str]
    ) -> Loaded:
        return load_examples(
            (tasks | others)[name],
            config.data.sources[name],
            split=split,
            count_tokens=lambda text: len(policy.encode(text)),
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_samples=limit,
            seed=config.seed,
            prompt_format=formats[name],
            exclude=shown | set(exclude),
            bad_lines=config.data.bad_lines,
        )

    most, more = config.data.heldout_samples, 0
    if config.train.evaluate_every_steps:
        more = config.data.validation_samples
    judges = {name: draw(name, "heldout", most + more, ()) for name in tasks}
    judged = {name: loaded.examples[:most] for name, loaded in judges.items()}
    for name in tasks:
        if len(judged[name]) < 2:
            raise InputError(
                f"data.{name}: its held-out split gives {len(judged[name])} prompt, and an "
                "interval needs at least 2; add rows."
            )
    # Published splits share rows now and then, and tasks share data sets; what judges one task must
    # not have been trained on by another.
    prompts = {example.prompt for examples in judged.values() for example in examples}
    compared = {
        name: [example for example in loaded.examples[most:] if example.prompt not in prompts]
        for name, loaded in judges.items()
    }
    for name in tasks:
        if more and not compared[name]:
            raise InputError(
                f"data.heldout_samples={most}: the held-out split of {name} has no other prompts, "
                "by which to compare checkpoints; lower it, or set train.evaluate_every_steps=0."
            )
    prompts |= {example.prompt for examples in compared.values() for example in examples}
    for name in others:
        prompts |= {example.prompt for example in draw(name, "heldout", most + more, ()).examples}
    trained = {name: draw(name, "train", config.data.max_samples, prompts) for name in tasks}

    def items(examples: Mapping[str, Sequence[Example]]) -> list[rollouts.Item]:
        encoded = (rollouts.encode(policy, tasks[name], own) for name, own in examples.items())
        return [item for own in encoded for item in own]

    lines = []
    for name in tasks:
        note = f", {len(compared[name])} of them to compare checkpoints" if more else ""
        lines += [trained[name].description, judges[name].description + note]
    return Data(
        items({name: loaded.examples for name, loaded in trained.items()}),
        items(judged),
        items(compared),
        lines,
        {name: trained[name].bad_lines + judges[name].bad_lines for name in tasks},
    )
