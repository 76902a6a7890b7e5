"""Between text and arrays: prompts to padded batches, completions to text, text to rewards."""

import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import devices, sampling, user_code
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import HUGEST, GenerationConfig
from grpocem_jax.errors import InputError
from grpocem_jax.policy import Policy
from grpocem_jax.tasks import Example, Reward, Task


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


def bucket_length(longest: int, buckets: Sequence[int], limit: int) -> int:
    """The smallest of ``buckets`` that holds ``longest`` tokens, else ``limit``."""
    return min((b for b in buckets if longest <= b <= limit), default=limit)


def pad(prompts: Sequence[np.ndarray], length: int) -> Prompts:
    """Pads the tokens of prompts on the left to ``length``."""
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return Prompts(tokens, mask)


def generate(
    policy: Policy,
    adapter: Offsets,
    prompts: Prompts,
    keys: jax.Array,
    generation: GenerationConfig,
    *,
    num_samples: int,
    temperature: float,
    greedy: bool = False,
    own_adapters: bool = False,
) -> sampling.Rollouts:
    """`sampling.sample` with the settings of a config, prompts divided among the devices."""
    tokens, mask, keys = devices.divide(policy.mesh, (*prompts, keys))
    if own_adapters:
        adapter = devices.divide(policy.mesh, adapter)
    return sampling.sample(
        policy.params,
        adapter,
        tokens,
        mask,
        keys,
        policy.end_ids,
        temperature,
        model=policy.model,
        num_samples=num_samples,
        max_new_tokens=generation.max_new_tokens,
        top_p=generation.top_p,
        repetition_penalty=generation.repetition_penalty,
        greedy=greedy,
        own_adapters=own_adapters,
    )


def decode(policy: Policy, tokens: np.ndarray, mask: np.ndarray) -> list[list[str]]:
    """Texts ``[P][G]`` of completions ``[P, G, N]``, without the token that ended them."""
    end_ids = np.asarray(policy.end_ids)
    groups = []
    for group_tokens, group_mask in zip(tokens, mask, strict=True):
        ids = [row[keep] for row, keep in zip(group_tokens, group_mask, strict=True)]
        ids = [row[:-1] if len(row) and row[-1] in end_ids else row for row in ids]
        groups.append(policy.decode_completions(ids))
    return groups


class Scores(NamedTuple):
    """Rewards of completions.

    Attributes:
      total: weighted sum of the functions' rewards, float32 ``[P, G]``; NaN where all abstained.
      functions: by name what each function gave, float32 ``[P, G]``; NaN where it abstained, or
        does not judge the prompt's task.
    """

    total: np.ndarray
    functions: dict[str, np.ndarray]


def _call(
    function: Any, items: Sequence[Item], texts: Sequence[Sequence[str]]
) -> list[tuple[Any, ...]]:
    """Calls a reward function once for all samples of some items of one task; values ``[P][G]``."""
    size, name = len(texts[0]), Reward(function).name
    examples = [item.example for item in items for _ in range(size)]
    completions = [text for group in texts for text in group]
    names = dict.fromkeys(name for example in examples for name in example.columns)
    if items[0].task.own:
        names.pop("prompt")

    def call(rows: Sequence[int]) -> Any:
        values = function(
            prompts=[examples[row].prompt for row in rows],
            completions=[completions[row] for row in rows],
            **{name: [examples[row].columns.get(name) for row in rows] for name in names},
        )
        try:
            iterator = iter(values)
        except TypeError:
            return values
        # The code of a generator runs here.
        return list(iterator)

    everything, limit = range(len(examples)), items[0].task.reward_timeout_s
    try:
        values = _within(limit, lambda: call(everything))
    except _TimeLimitError:
        raise InputError(
            f"The reward function {name} took more than data.reward_timeout_s={limit:g} for "
            f"{len(examples)} completions of the task {items[0].task.name}; make it faster, or "
            "raise the limit."
        ) from None
    except (Exception, SystemExit) as error:  # whatever the function's own code may raise
        kind, message = user_code.failure(error)
        try:
            where = _within(limit, lambda: _first_failure(call, everything))
            place = (
                "on the whole batch, though on no completion by itself"
                if where is None
                else f"on the completion {completions[where]!r} of the prompt "
                f"{examples[where].prompt!r}"
            )
        except _TimeLimitError:
            place = (
                "on the whole batch, and looking for the completion took more than "
                f"data.reward_timeout_s={limit:g}"
            )
        raise InputError(
            f"The reward function {name} raised {kind} ({message}) {place}; it gets prompts, "
            f"completions and the columns {', '.join(names) or '(none)'} as keywords."
        ) from error
    if not isinstance(values, list):
        raise InputError(
            f"The reward function {name} returned {type(values).__name__}; it must return a list "
            "with a number or None for each completion."
        )
    if len(values) != len(examples):
        raise InputError(
            f"The reward function {name} returned {len(values)} values for "
            f"{len(examples)} completions; it must return one for each."
        )
    return [tuple(values[i : i + size]) for i in range(0, len(values), size)]


class _TimeLimitError(Exception):
    pass


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What the function returns or raises; `_TimeLimitError` if that takes longer.

    The thread of a function that hangs is left behind, and does not keep the process alive.
    """
    if not seconds:
        return function()
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((True, function()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        good, value = results.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    except queue.Empty:
        raise _TimeLimitError from None
    if not good:
        raise value
    return value


def _first_failure(call: Any, rows: Sequence[int]) -> int | None:
    for row in rows:
        try:
            call([row])
        except (Exception, SystemExit) as error:
            user_code.failure(error)  # a signal is none of the row's
            return row
    return None


def _reward(value: Any, name: str, item: Item, completion: str) -> float:
    """A reward as a number, NaN where the function abstained."""
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # whatever the value's own code may raise
        number = math.nan
    # Larger ones are infinite in float32.
    if not abs(number) <= HUGEST:
        try:
            shown = repr(value)
        except Exception:  # Python prints no integer of thousands of digits
            shown = f"a value of type {type(value).__name__}"
        raise InputError(
            f"The reward function {name} returned {shown} for the completion {completion!r} of "
            f"the prompt {item.example.prompt!r}; rewards are finite numbers, or None."
        )
    return number


def _by_task(items: Sequence[Item]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item.task.name, []).append(row)
    return rows


def score(items: Sequence[Item], texts: Sequence[Sequence[str]]) -> Scores:
    """Outcome rewards of ``P`` prompts' ``G`` completions.

    Raises:
      InputError: a reward function raised, exited or took too long, returned something else than a
        number that is finite in float32 or None, or another number of values; it names the
        function, and where one can be found the prompt and the completion.  A weighted sum that
        is not finite in float32.
    """
    shape = (len(items), len(texts[0]))
    total = np.full(shape, np.nan, np.float32)
    functions: dict[str, np.ndarray] = {}
    for rows in _by_task(items).values():
        chosen, parts = [items[r] for r in rows], [texts[r] for r in rows]
        for reward in chosen[0].task.rewards:
            values = functions.setdefault(reward.name, np.full(shape, np.nan, np.float32))
            found = _call(reward.function, chosen, parts)
            for row, item, group, completions in zip(rows, chosen, found, parts, strict=True):
                for sample, (value, text) in enumerate(zip(group, completions, strict=True)):
                    values[row, sample] = _reward(value, reward.name, item, text)
            before = total[rows]
            with np.errstate(over="ignore"):
                own = reward.weight * values[rows]
                # The sum of those that did not abstain.
                sums = np.where(np.isnan(before), own, before + np.where(np.isnan(own), 0.0, own))
            if np.isinf(sums).any():
                raise InputError(
                    f"The rewards of the task {chosen[0].task.name} with the weight "
                    f"{reward.weight:g} of {reward.name} add up to more than float32 holds; lower "
                    "the rewards, or their weights."
                )
            total[rows] = sums
    return Scores(total, functions)


def population_rewards(
    policy: Policy,
    adapters: Offsets,
    items: Sequence[Item],
    key: jax.Array,
    generation: GenerationConfig,
    *,
    num_samples: int,
    buckets: Sequence[int],
) -> np.ndarray:
    """The reward fitness: every candidate answers all prompts, in one program.

    Args:
      policy: the policy.
      adapters: offsets of ``C`` candidates, ``[C, ...]`` a site.
      items: ``P`` prompts.
      key: PRNG key; consumed. All candidates share the random numbers of a prompt.
      generation: sampling settings, at ``generation.temperature``.
      num_samples: completions of each prompt by each candidate.
      buckets: lengths to which the prompts may be padded.

    Returns:
      float64 ``[C, P]``, mean reward over a prompt's samples; NaN where all abstained.
    """
    count = len(jax.tree.leaves(adapters)[0])
    longest = max(len(item.tokens) for item in items)
    # What lies beyond the model's context is never needed.
    limit = min(buckets[-1], policy.model.context_length)
    length = bucket_length(longest, buckets, max(longest, limit))
    prompts = pad([item.tokens for item in items], length)
    out = generate(
        policy,
        jax.tree.map(lambda x: jnp.repeat(x, len(items), axis=0), adapters),
        Prompts(*(np.tile(x, (count, 1)) for x in prompts)),
        jnp.tile(jax.random.split(key, len(items)), count),
        generation,
        num_samples=num_samples,
        temperature=generation.temperature,
        own_adapters=True,
    )
    texts = decode(policy, *jax.device_get((out.tokens, out.mask)))
    scores = score([*items] * count, texts).total.reshape(count, len(items), num_samples)
    present = ~np.isnan(scores)
    total = np.where(present, scores, 0.0).sum(-1)
    return np.where(present.any(-1), total / np.maximum(present.sum(-1), 1), np.nan)


def score_steps(
    policy: Policy,
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    tokens: np.ndarray,
    mask: np.ndarray,
    outcomes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of the steps of completions, for `grpo.process_advantages`.

    A task without a process reward has one step a completion, worth its outcome.

    Args:
      policy: for its tokenizer.
      items: ``P`` prompts.
      texts: ``[P][G]`` decoded completions.
      tokens: int32 ``[P, G, N]``.
      mask: bool ``[P, G, N]``.
      outcomes: float32 ``[P, G]`` from `score`.

    Returns:
      rewards float32 ``[P, G, N]`` at the last token of each step, and where those are, bool.
      The last step of a completion ends with its end token.
    """
    rewards = np.zeros(mask.shape, np.float32)
    ends = np.zeros(mask.shape, bool)
    lengths = mask.sum(-1)
    for rows in _by_task(items).values():
        chosen, parts = [items[r] for r in rows], [texts[r] for r in rows]
        function = chosen[0].task.process_reward
        if function is None:
            for row in rows:
                for sample in np.flatnonzero(~np.isnan(outcomes[row])).tolist():
                    last = int(lengths[row, sample]) - 1
                    rewards[row, sample, last] = outcomes[row, sample]
                    ends[row, sample, last] = True
            continue
        for row, group in zip(rows, _call(function, chosen, parts), strict=True):
            for sample, steps in enumerate(group):
                ids = tokens[row, sample, : lengths[row, sample]]
                for step, index in zip(
                    steps, _step_tokens(policy, ids, [s.end for s in steps]), strict=True
                ):
                    rewards[row, sample, index] += step.reward
                    ends[row, sample, index] = True
    return rewards, ends


def _step_tokens(policy: Policy, ids: np.ndarray, ends: Sequence[int]) -> list[int]:
    """The index of the token that completes each of the first ``ends`` characters."""
    if not ends:
        return []
    parts = policy.decode_completions([ids[: t + 1] for t in range(len(ids))])
    reach = [len(part) for part in parts]
    indices = [int(np.searchsorted(reach, end)) for end in ends]
    return [*indices[:-1], len(ids) - 1]
