"""The tasks, by name."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from grpocem_jax.tasks import classification, general, qa, sentiment, summarization
from grpocem_jax.tasks.base import Example, Reward, Task
from grpocem_jax.tasks.prompts import Messages, PromptFormat, Shot, template_fields
from grpocem_jax.tasks.sources import Loaded, SourceConfig, example_of, load_examples
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError

__all__ = [
    "TASKS",
    "Example",
    "Loaded",
    "Messages",
    "PromptFormat",
    "Reward",
    "Shot",
    "SourceConfig",
    "Task",
    "example_of",
    "load_examples",
    "make_task",
]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        module.TASK.name: module.TASK
        for module in (qa, sentiment, summarization, classification, general)
    }
)


def make_task(name: str, source: SourceConfig) -> Task:
    """The task of this name with the rewards and the template that its source asks for.

    Args:
      name: one of `TASKS`, or a name of the user's own, which has no prompts and rewards but those
        of its source.
      source: ``rewards``, ``reward_weights`` and ``template`` are read here.

    Raises:
      InputError: a name of the user's own without rewards or that cannot stand in a log, a reward
        that cannot be imported, weights that are not one for each, or a template that is not over
        the task's columns.
    """
    field = f"config.data.{name}"
    if len(source.reward_weights) not in (0, len(source.rewards)):
        raise InputError(
            f"{field}.reward_weights={source.reward_weights}: give one for each of the "
            f"{len(source.rewards)} functions in {field}.rewards, or none at all."
        )
    weights = source.reward_weights or (1.0,) * len(source.rewards)
    rewards = tuple(
        Reward(user_code.load_function(reference, field=f"{field}.rewards"), weight)
        for reference, weight in zip(source.rewards, weights, strict=True)
    )
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise InputError(
            f"{field}.rewards={source.rewards}: two functions have the same name, which logs tell "
            "them apart by; rename one."
        )
    fields = template_fields(source.template, f"{field}.template") if source.template else ()
    if name in TASKS:
        task = TASKS[name]
        if rewards:
            task = dataclasses.replace(task, rewards=rewards, process_reward=None)
        return _with_template(task, source.template, fields) if fields else task
    if name == "overall" or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise InputError(
            f"config.data.tasks names {name!r}: a task's name is letters, digits, - and _, and not "
            "'overall'; give it another."
        )
    own = f"{name!r} is a task of your own (those of the package are {', '.join(TASKS)})"
    nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    if source.source == "builtin":
        raise InputError(
            f"{field}.source is missing: {own}, so give it a Hub id or a folder with a column "
            f"prompt{hint}"
        )
    if not rewards:
        raise InputError(
            f"{field}.rewards is missing: {own}, so give it one or more reward functions as "
            f"package.module:function{hint}"
        )
    columns = dict.fromkeys(fields, "a part of the prompt") or {"prompt": "the prompt"}
    template = source.template or "{prompt}"
    return Task(name, columns, template, rewards, reference="completion", own=True)


def _with_template(task: Task, template: str, fields: tuple[str, ...]) -> Task:
    """A task of the package with another template.

    Raises:
      InputError: a template that shows something else than columns, or the answer.
    """
    shown = [name for name in task.columns if name != task.reference]
    known = [*shown, *(["labels"] if "label" in task.columns else [])]
    for name in fields:
        if name not in known:
            what = "is the answer" if name == task.reference else "the task does not have"
            raise InputError(
                f"config.data.{task.name}.template={template!r}: names {name!r}, which {what}; "
                f"choose from {', '.join(known)}."
            )
    if not set(fields) & set(shown):
        raise InputError(
            f"config.data.{task.name}.template={template!r}: names no column, so all prompts would "
            f"be the same; put {' or '.join(f'{{{name}}}' for name in shown)} in it."
        )
    shorten = task.shorten if task.shorten in fields else None
    return dataclasses.replace(task, template=template, shorten=shorten)
