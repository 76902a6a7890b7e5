"""A search that a request asks for: what to adapt to, how, and for how long."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Text
from grpocem_jax.config import Config
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.serving.completions import MOST_SEED, read_messages
from grpocem_jax.serving.errors import ApiError, brief
from grpocem_jax.serving.fields import Fields, is_text
from grpocem_jax.serving.options import Limits
from grpocem_jax.tasks import TASKS, SourceConfig, example_of
from grpocem_jax.tasks.rows import Row
from grpocem_jax.utils.errors import InputError

METHODS = ("gradient", "cem", "experts")
"""The gradient and the Cross-Entropy Method over all offsets, and the latter over the weights of a
library of experts."""

MOST_NAME = 64


@dataclasses.dataclass(frozen=True)
class Search:
    """What a request asks for, checked.

    Attributes:
      subject: texts, or prompts of a task.
      method: one of `METHODS`.
      generations: at most how many.
      seed: of the search.
      name: a label for the adapter, "" for none.
      reward: the task whose reward is the fitness; None where it is the likelihood.
    """

    subject: Sequence[str | Text] | Sequence[rollouts.Item]
    method: str
    generations: int
    seed: int
    name: str
    reward: str | None

    @property
    def record(self) -> dict[str, Any]:
        """What the store says of it: all but the texts."""
        return {
            "method": self.method,
            "examples": len(self.subject),
            "reward": self.reward,
            "seed": self.seed,
        }


def read(body: dict[str, Any], run: TrainedRun, limits: Limits, *, experts: bool) -> Search:
    """Reads the fields of a request.

    Args:
      body: a JSON object.
      run: what is adapted.
      limits: of the tenant.
      experts: whether there is a library of experts.

    Raises:
      ApiError: a field that is missing, of another type or out of its range, or a text that cannot
        be adapted to.
    """
    fields = Fields(body)
    name = read_name(fields.take("name"))
    method = fields.choice("method", METHODS)
    generations = fields.integer("generations", 1, limits.max_generations)
    seed = fields.integer("seed", 0, MOST_SEED)
    reward = fields.choice("reward", rewards(run.config))
    given = {x: fields.take(x) for x in ("examples", "prompt", "prompts")}
    fields.finish()
    present = [x for x, value in given.items() if value is not None]
    if len(present) != 1:
        raise ApiError(
            400,
            f"{' and '.join(present) or 'examples'}: give examples, or a prompt, or prompts with "
            "a reward.",
            param=present[0] if present else "examples",
        )
    (subject_name,) = present
    if (reward is not None) != (subject_name == "prompts"):
        raise ApiError(
            400,
            f"reward={brief(reward)}: prompts have one, of {', '.join(rewards(run.config))}, and "
            "texts have none.",
            param="reward",
        )
    if method is None:
        method = "cem" if reward else "gradient"
    if method == "gradient" and reward:
        raise ApiError(
            400,
            "method='gradient': a reward has no gradient; give cem or experts.",
            param="method",
        )
    if method == "experts" and not experts:
        raise ApiError(
            400,
            "method='experts': the server has no library of experts; give gradient or cem.",
            param="method",
        )
    listed = [given["prompt"]] if subject_name == "prompt" else given[subject_name]
    if not isinstance(listed, list) or not 0 < len(listed) <= limits.max_examples:
        raise fields.refuse(
            subject_name, listed, f"a list with 1 to {limits.max_examples} examples"
        )
    subject = _items(run, listed, reward) if reward else _texts(run, listed, subject_name)
    return Search(
        subject=subject,
        method=method,
        generations=min(run.config.search.generations, limits.max_generations)
        if generations is None
        else generations,
        seed=secrets.randbelow(MOST_SEED + 1) if seed is None else seed,
        name=name,
        reward=reward,
    )


def read_name(given: Any) -> str:
    """A label for an adapter, "" for none.

    Raises:
      ApiError: no printable text of at most 64 characters.
    """
    if given is not None and not (is_text(given, MOST_NAME) and given.isprintable()):
        raise Fields({}).refuse("name", given, f"a string of 1 to {MOST_NAME} printable characters")
    return given or ""


def rewards(config: Config) -> list[str]:
    """The names of the tasks whose reward a search may have."""
    return list(dict.fromkeys((*config.data.tasks, *TASKS)))


def _texts(run: TrainedRun, listed: list[Any], name: str) -> list[Text]:
    texts = []
    limit = min(run.config.search.buckets[-1], run.policy.model.context_length)
    for number, given in enumerate(listed):
        where = name if name == "prompt" else f"{name}[{number}]"
        prompt, completion = _parts(given, where)
        try:
            text = Text(run.policy.prompt_format.write(prompt), completion)
            count = len(run.policy.encode(text.prompt))
            count += len(run.policy.encode_completion(text.completion))
            if count > limit:
                raise ApiError(
                    400,
                    f"{where} has {count} tokens: must have at most {limit}; shorten it.",
                    param=where,
                )
            if not text.prompt.strip():
                raise ApiError(400, f"{where} is empty; give some text.", param=where)
            if name != "prompt" or count != 1:
                adaptation.encode(run.policy, text, run.config.search)
        except InputError as error:
            raise ApiError(400, f"{where}: {error}", param=where) from None
        texts.append(text)
    return texts


def _parts(given: Any, where: str) -> tuple[Any, str]:
    """Prompt and completion of an example: a string, or an object with text, or with both."""
    most = 2**24  # the body is bounded
    must = "a string, or an object with text, or with prompt and completion"
    if is_text(given, most):
        return given, ""
    if isinstance(given, list):
        return read_messages(given, where, most), ""
    if not isinstance(given, dict):
        raise Fields({}).refuse(where, given, must)
    fields = Fields(given, f"{where}.")
    text, prompt = fields.string("text", most=most), fields.take("prompt")
    completion = fields.string("completion", most=most)
    fields.finish()
    if isinstance(prompt, list):
        prompt = read_messages(prompt, f"{where}.prompt", most)
    elif prompt is not None and not is_text(prompt, most):
        raise fields.refuse("prompt", prompt, "a string, or a list of messages")
    if (text is None) == (prompt is None) or (text is not None and completion is not None):
        raise Fields({}).refuse(where, given, must)
    return (prompt if text is None else text), completion or ""


def _items(run: TrainedRun, listed: list[Any], reward: str) -> list[rollouts.Item]:
    """Prompts of a task, each an object with the columns that its reward reads."""
    fewest = 4 if run.config.search.gate else 1
    if len(listed) < fewest:
        raise ApiError(
            400,
            f"prompts: {len(listed)} are too few to judge by; give at least {fewest}.",
            param="prompts",
        )
    examples = []
    try:
        task = run.config.task(reward)
        source = run.config.data.sources.get(reward, SourceConfig())
        form = rollouts.task_format(run.config, run.policy, reward)
        for number, values in enumerate(listed):
            where = f"prompts[{number}]"
            if not isinstance(values, Mapping):
                raise Fields({}).refuse(where, values, f"an object with {', '.join(task.columns)}")
            _check_text(values, where)
            row = Row(where, lambda values=values: values)  # type: ignore[misc]
            examples.append(example_of(task, row, source, form))
        items = rollouts.encode(run.policy, task, examples)
    except InputError as error:
        raise ApiError(400, f"prompts: {error}", param="prompts") from None
    for number, item in enumerate(items):
        room = min(adaptation.room(run), run.config.data.max_prompt_tokens)
        if len(item.tokens) > room:
            raise ApiError(
                400,
                f"prompts[{number}] has {len(item.tokens)} tokens: must have at most {room}; "
                "shorten it.",
                param=f"prompts[{number}]",
            )
    return items


def _check_text(value: Any, where: str) -> None:
    """Refuses strings with halves of surrogate pairs, at any depth."""
    if isinstance(value, str) and value and not is_text(value, len(value)):
        raise Fields({}).refuse(where, value, "text that UTF-8 has")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_text(name, where)
            _check_text(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, where)
