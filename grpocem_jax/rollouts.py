"""Between text and arrays: prompts to padded batches, completions to text, text to rewards."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import sampling
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import GenerationConfig
from grpocem_jax.errors import InputError
from grpocem_jax.policy import Policy
from grpocem_jax.tasks import Example, Task


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

    Raises:
      InputError: an empty prompt.
    """
    items = []
    for example in examples:
        tokens = policy.tokenizer.encode(example.prompt, add_special_tokens=False)
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
    """`sampling.sample` with the settings of a config."""
    return sampling.sample(
        policy.params,
        adapter,
        prompts.tokens,
        prompts.mask,
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
        groups.append(policy.tokenizer.batch_decode(ids, skip_special_tokens=True))
    return groups


def _call(function: Any, items: Sequence[Item], texts: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Calls a reward function once for all samples of some items of one task; values ``[P][G]``."""
    size = len(texts[0])
    repeated = [item.example for item in items for _ in range(size)]
    columns = {name: [e.columns[name] for e in repeated] for name in repeated[0].columns}
    values = function(
        prompts=[example.prompt for example in repeated],
        completions=[text for group in texts for text in group],
        **columns,
    )
    if len(values) != len(repeated):
        raise InputError(
            f"The reward function {function.__name__} returned {len(values)} values for "
            f"{len(repeated)} completions; it must return one for each."
        )
    return [list(values[i : i + size]) for i in range(0, len(values), size)]


def _by_task(items: Sequence[Item]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item.task.name, []).append(row)
    return rows


def score(items: Sequence[Item], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Outcome rewards float32 ``[P, G]``; NaN where the reward function abstained.

    Raises:
      InputError: a reward function returned a number that is not finite, or too few values.
    """
    rewards = np.full((len(items), len(texts[0])), np.nan, np.float32)
    for rows in _by_task(items).values():
        chosen, parts = [items[r] for r in rows], [texts[r] for r in rows]
        function = chosen[0].task.reward
        for row, group, completions in zip(
            rows, _call(function, chosen, parts), parts, strict=True
        ):
            for sample, (value, completion) in enumerate(zip(group, completions, strict=True)):
                if value is None:
                    continue
                if not math.isfinite(value):
                    raise InputError(
                        f"The reward function {function.__name__} returned {value} for the "
                        f"completion {completion!r}; rewards are finite numbers, or None."
                    )
                rewards[row, sample] = value
    return rewards


def population_rewards(
    policy: Policy,
    adapters: Offsets,
    items: Sequence[Item],
    key: jax.Array,
    generation: GenerationConfig,
    *,
    num_samples: int,
    buckets: Sequence[int],
    chunk: int = 0,
    common_random_numbers: bool = True,
) -> np.ndarray:
    """The reward fitness: every candidate answers all prompts, in one program.

    Args:
      policy: the policy.
      adapters: offsets of ``C`` candidates, ``[C, ...]`` a site.
      items: ``P`` prompts.
      key: PRNG key; consumed.
      generation: sampling settings, at ``generation.temperature``.
      num_samples: completions of each prompt by each candidate.
      buckets: lengths to which the prompts may be padded.
      chunk: candidates at a time, 0 for all.
      common_random_numbers: candidates share the prompts' keys.

    Returns:
      float64 ``[C, P]``, mean reward over a prompt's samples; NaN where all abstained.
    """
    count = len(jax.tree.leaves(adapters)[0])
    chunk = min(chunk or count, count)
    longest = max(len(item.tokens) for item in items)
    length = bucket_length(longest, buckets, max(longest, buckets[-1]))
    prompts = pad([item.tokens for item in items], length)
    rewards = np.full((count, len(items)), np.nan)
    for start in range(0, count, chunk):
        # The last chunk repeats its last candidate: one compiled shape.
        rows = np.minimum(np.arange(start, start + chunk), count - 1)
        if common_random_numbers:
            keys = jnp.tile(jax.random.split(key, len(items)), chunk)
        else:
            folded = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
            keys = jax.vmap(lambda k: jax.random.split(k, len(items)))(folded).ravel()
        out = generate(
            policy,
            jax.tree.map(lambda x, rows=rows: jnp.repeat(x[rows], len(items), axis=0), adapters),
            Prompts(*(np.tile(x, (chunk, 1)) for x in prompts)),
            keys,
            generation,
            num_samples=num_samples,
            temperature=generation.temperature,
            own_adapters=True,
        )
        texts = decode(policy, *jax.device_get((out.tokens, out.mask)))
        scores = score([*items] * chunk, texts).reshape(chunk, len(items), num_samples)
        present = ~np.isnan(scores)
        total = np.where(present, scores, 0.0).sum(-1)
        means = np.where(present.any(-1), total / np.maximum(present.sum(-1), 1), np.nan)
        rewards[start : start + chunk] = means[: min(chunk, count - start)]
    return rewards


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
    reach = [
        len(policy.tokenizer.decode(ids[: t + 1], skip_special_tokens=True))
        for t in range(len(ids))
    ]
    indices = [int(np.searchsorted(reach, end)) for end in ends]
    return [*indices[:-1], len(ids) - 1]
