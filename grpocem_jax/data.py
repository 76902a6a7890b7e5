"""The prompts of a run: which of a task's examples train, which judge, and which choose."""

import hashlib
from collections.abc import Container
from typing import Literal, NamedTuple

from grpocem_jax import rollouts
from grpocem_jax.config import Config
from grpocem_jax.errors import InputError
from grpocem_jax.policy import Policy
from grpocem_jax.tasks import Loaded, load_examples


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
            digest.update(repr((item.task.name, *item.example)).encode())
        return digest.hexdigest()


def load_data(config: Config, policy: Policy) -> Data:
    """Training, held-out and validation prompts of all tasks; no prompt is in two of them.

    Raises:
      InputError: as `grpocem_jax.tasks.load_examples`; too few rows for held-out or validation
        prompts.
    """
    tasks = {name: config.task(name) for name in config.data.tasks}

    def draw(
        name: str, split: Literal["train", "heldout"], limit: int, exclude: Container[str]
    ) -> Loaded:
        return load_examples(
            tasks[name],
            config.data.sources[name],
            split=split,
            count_tokens=lambda text: len(policy.encode(text)),
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_samples=limit,
            seed=config.seed,
            exclude=exclude,
            bad_lines=config.data.bad_lines,
        )

    train: list[rollouts.Item] = []
    heldout: list[rollouts.Item] = []
    validation: list[rollouts.Item] = []
    lines = []
    bad_lines = {}
    most, more = config.data.heldout_samples, 0
    if config.train.evaluate_every_steps:
        more = config.data.validation_samples
    for name in config.data.tasks:
        judges = draw(name, "heldout", most + more, ())
        judged = judges.examples[:most]
        if len(judged) < 2:
            raise InputError(
                f"data.{name}: its held-out split gives {len(judged)} prompt, and an interval "
                "needs at least 2; add rows."
            )
        prompts = {example.prompt for example in judged}
        compared = [example for example in judges.examples[most:] if example.prompt not in prompts]
        if more and not compared:
            raise InputError(
                f"data.heldout_samples={most}: the held-out split of {name} has no other prompts, "
                "by which to compare checkpoints; lower it, or set train.evaluate_every_steps=0."
            )
        # Published splits share rows now and then; what judges must not have been trained on.
        prompts |= {example.prompt for example in compared}
        trained = draw(name, "train", config.data.max_samples, prompts)
        train += rollouts.encode(policy, tasks[name], trained.examples)
        heldout += rollouts.encode(policy, tasks[name], judged)
        validation += rollouts.encode(policy, tasks[name], compared)
        note = f", {len(compared)} of them to compare checkpoints" if more else ""
        bad_lines[name] = trained.bad_lines + judges.bad_lines
        lines += [trained.description, judges.description + note]
    return Data(train, heldout, validation, lines, bad_lines)
