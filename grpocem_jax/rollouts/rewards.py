"""Completions to rewards: of whole completions, of their steps, and of a population."""

import functools
import inspect
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config.schema import HUGEST, GenerationConfig
from grpocem_jax.models import likelihood
from grpocem_jax.rollouts.engine import Completions, complete
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.rollouts.prompts import Item
from grpocem_jax.tasks import scoring
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, Processes
from grpocem_jax.utils.statistics import mean_of_present
from grpocem_jax.utils.terminal import say

LARGEST = 1e18
"""Of a total reward in size: the squares of larger ones overflow in float32."""
BASE_LOGPS = "base_logps"
"""The parameter by which a reward function asks for what `with_base_logps` computes."""


class Scores(NamedTuple):
    """Rewards of completions.

    Attributes:
      total: weighted sum of the functions' rewards, float32 ``[P, G]``; NaN where all abstained.
      functions: by name what each function gave, float32 ``[P, G]``; NaN where it abstained, or
        does not judge the prompt's task.
      errors: for how many completions a function abstained because it failed, summed over the
        functions; None where no task asks for that (``data.reward_on_error="abstain"``).
    """

    total: np.ndarray
    functions: dict[str, np.ndarray]
    errors: int | None = None


def _asks(function: Any) -> bool:
    """Whether a reward function has a parameter of the name `BASE_LOGPS`."""
    try:
        return BASE_LOGPS in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of what is written in C there may be none
        return False


def with_base_logps(
    policy: Policy,
    items: Sequence[Item],
    out: Completions,
    *,
    steps: bool = False,
    own: bool = False,
) -> Completions:
    """Completions with the base model's log-probabilities, where a reward function asks for them.

    Args:
      policy: the policy; its adapter at zero offsets is the base model.
      items: the ``P`` prompts that were completed.
      out: their completions.
      steps: whether `score_steps` will judge them too.
      own: whether each process needs those of its own prompts alone, as `score` does of the same
        prompts. Otherwise the tokens must be shared.

    Returns:
      ``out`` with ``base_logps``, those of prompts whose rewards do not ask empty; as it is where
      none does.
    """
    rows: list[int] = []
    for task_rows in _by_task(items).values():
        task = items[task_rows[0]].task
        functions = [reward.function for reward in task.rewards]
        if any(map(_asks, [*functions, task.process_reward] if steps else functions)):
            rows += task_rows
    if own:
        rows = [row for row in rows if row in policy.processes.own(len(items))]
    if not rows:
        return out
    # To a power of two, so that few numbers of prompts are compiled.
    filled = np.resize(rows, 1 << (len(rows) - 1).bit_length())

    def of_rows(some: np.ndarray) -> dict[str, np.ndarray]:
        asked = filled[some]
        batch = (*(x[asked] for x in out.prompts), out.tokens[asked], out.mask[asked])
        logps = _base_logps(
            policy.params, policy.zero, devices.divide(policy.mesh, batch), model=policy.model
        )
        return {"logps": np.asarray(logps)}

    every = np.arange(len(filled))
    found = of_rows(every) if own else policy.processes.divided(len(every), of_rows)
    logps: list[list[np.ndarray]] = [[np.zeros(0, np.float32)] * len(group) for group in out.texts]
    for row, group in zip(rows, found["logps"], strict=False):
        logps[row] = [x[mask] for x, mask in zip(group, out.mask[row], strict=True)]
    return out._replace(base_logps=logps)


@functools.partial(jax.jit, static_argnames="model")
def _base_logps(params: Any, zero: Offsets, batch: Any, *, model: Any) -> jax.Array:
    def one(prompt: Any, prompt_mask: Any, tokens: Any, mask: Any) -> jax.Array:
        group = (prompt, prompt_mask, tokens, mask)
        return likelihood.completion_logps(model, params, zero, *group, temperature=1.0)[0]

    return jax.vmap(one)(*batch)


def _call(
    function: Any,
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    base_logps: Sequence[Sequence[np.ndarray]] | None,
) -> scoring.Call:
    """The call of a reward function for all samples of some items of one task."""
    examples = [item.example for item in items for _ in texts[0]]
    if base_logps is not None and _asks(function):
        logps = [each for group in base_logps for each in group]
        examples = [
            example._replace(columns={**example.columns, BASE_LOGPS: own})
            for example, own in zip(examples, logps, strict=True)
        ]
    return scoring.Call(function, items[0].task, examples, [x for group in texts for x in group])


def _of_rows(rows: Sequence[int], *values: Sequence[Any] | None) -> list[Any]:
    """The elements of each sequence at some rows."""
    return [None if value is None else [value[row] for row in rows] for value in values]


def _rewards(call: scoring.Call, values: Sequence[Any]) -> tuple[list[float], int]:
    """The rewards that a call returned, and how many of its values are none."""
    rewards, wrong = [], []
    for value, example, completion in zip(values, call.examples, call.completions, strict=True):
        try:
            rewards.append(_reward(value, call.name, example.prompt, completion))
        except InputError as error:
            if call.task.reward_on_error == "stop":
                raise
            rewards.append(math.nan)
            wrong.append(error)
    if wrong:
        say(f"{len(wrong)} of {len(values)} completions abstain: {wrong[0]}", sys.stderr)
    return rewards, len(wrong)


def _reward(value: Any, name: str, prompt: str, completion: str) -> float:
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
            f"the prompt {prompt!r}; rewards are finite numbers, or None."
        )
    return number


def _by_task(items: Sequence[Item]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item.task.name, []).append(row)
    return rows


def score(
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    base_logps: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    processes: Processes = ALONE,
) -> Scores:
    """Outcome rewards of ``P`` prompts' ``G`` completions.

    Args:
      items: ``P`` prompts.
      texts: ``[P][G]`` decoded completions.
      base_logps: of `with_base_logps`, ``[P][G]``; None where no reward asks for them.
      processes: those that share the prompts; a function is called with the completions of its
        process.

    Raises:
      InputError: a reward function raised, exited or took too long, returned something else than a
        number that is finite in float32 or None, or another number of values; it names the
        function, and where one can be found the prompt and the completion.  A weighted sum that
        is not finite in float32.
    """
    own = _of_rows(processes.own(len(items)), items, texts, base_logps)
    found = processes.each(lambda: _score(len(texts[0]), *own)._asdict())
    parts = [Scores(**part) for part in found]
    names = dict.fromkeys(
        reward.name
        for task_rows in _by_task(items).values()
        for reward in items[task_rows[0]].task.rewards
    )

    def of(name: str, part: Scores) -> np.ndarray:
        return part.functions.get(name, np.full(part.total.shape, np.nan, np.float32))

    counted = any(item.task.reward_on_error == "abstain" for item in items)
    return Scores(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([of(name, part) for part in parts]) for name in names},
        sum(part.errors or 0 for part in parts) if counted else None,
    )


def _score(
    group: int,
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    base_logps: Sequence[Sequence[np.ndarray]] | None,
) -> Scores:
    """`score` of a process's own prompts with ``group`` completions each; there may be none."""
    shape = (len(items), group)
    total = np.full(shape, np.nan, np.float32)
    functions: dict[str, np.ndarray] = {}
    judged = [
        (reward, rows)
        for rows in _by_task(items).values()
        for reward in items[rows[0]].task.rewards
    ]
    calls = [
        _call(reward.function, *_of_rows(rows, items, texts, base_logps)) for reward, rows in judged
    ]
    errors = 0
    for (reward, rows), call, found in zip(judged, calls, scoring.call(calls), strict=True):
        values = functions.setdefault(reward.name, np.full(shape, np.nan, np.float32))
        if found is None:
            errors += len(call.completions)
        else:
            numbers, wrong = _rewards(call, found)
            errors += wrong
            values[rows] = np.reshape(numbers, (len(rows), -1))
        before = total[rows]
        with np.errstate(over="ignore"):
            own = reward.weight * values[rows]
            # The sum of those that did not abstain.
            sums = np.where(np.isnan(before), own, before + np.where(np.isnan(own), 0.0, own))
        if (np.abs(sums) > LARGEST).any():
            raise InputError(
                f"The rewards of the task {call.task.name} with the weight {reward.weight:g} of "
                f"{reward.name} add up to more than {LARGEST:g} in size; lower the rewards, or "
                "their weights."
            )
        total[rows] = sums
    return Scores(total, functions, errors)


def score_steps(
    policy: Policy,
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    tokens: np.ndarray,
    mask: np.ndarray,
    outcomes: np.ndarray,
    base_logps: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    processes: Processes = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of the steps of completions, for `grpo.process_advantages`.

    A task without a process reward has one step a completion, worth its outcome, and so has a
    completion without steps of its own: one that ends at once.  Steps that end in the same token
    are one, worth their sum.

    Args:
      policy: for its tokenizer.
      items: ``P`` prompts.
      texts: ``[P][G]`` decoded completions.
      tokens: int32 ``[P, G, N]``.
      mask: bool ``[P, G, N]``.
      outcomes: float32 ``[P, G]`` from `score`.
      base_logps: as in `score`.
      processes: as in `score`.

    Returns:
      rewards float32 ``[P, G, N]`` at the last token of each step, and where those are, bool.
      The last step of a completion ends with its end token.
    """
    rows = processes.own(len(items))
    own = _of_rows(rows, items, texts, base_logps)
    at = slice(rows.start, rows.stop)
    parts = processes.each(lambda: _score_steps(policy, tokens[at], mask[at], outcomes[at], *own))
    rewards, ends = (np.concatenate(each) for each in zip(*parts, strict=True))
    return rewards, ends


def _score_steps(
    policy: Policy,
    tokens: np.ndarray,
    mask: np.ndarray,
    outcomes: np.ndarray,
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    base_logps: Sequence[Sequence[np.ndarray]] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`score_steps` of a process's own prompts, of which there may be none."""
    rewards = np.zeros(mask.shape, np.float32)
    ends = np.zeros(mask.shape, bool)
    lengths = mask.sum(-1)

    def one_step(row: int, sample: int) -> None:
        last = int(lengths[row, sample]) - 1
        rewards[row, sample, last] = outcomes[row, sample]
        ends[row, sample, last] = True

    for rows in _by_task(items).values():
        function = items[rows[0]].task.process_reward
        if function is None:
            for row in rows:
                for sample in np.flatnonzero(~np.isnan(outcomes[row])).tolist():
                    one_step(row, sample)
            continue
        (found,) = scoring.call([_call(function, *_of_rows(rows, items, texts, base_logps))])
        if found is None:
            continue
        samples = len(texts[0])
        for number, row in enumerate(rows):
            for sample, steps in enumerate(found[number * samples :][:samples]):
                if not steps and not np.isnan(outcomes[row, sample]):
                    one_step(row, sample)
                ids = tokens[row, sample, : lengths[row, sample]]
                for step, index in zip(
                    steps, _step_tokens(policy, ids, [s.end for s in steps]), strict=True
                ):
                    rewards[row, sample, index] += step.reward
                    ends[row, sample, index] = True
    return rewards, ends & ~np.isnan(outcomes)[..., None]


def _step_tokens(policy: Policy, ids: np.ndarray, ends: Sequence[int]) -> list[int]:
    """The index of the token that completes each of the first ``ends`` characters."""
    if not ends:
        return []
    parts = policy.decode_completions([ids[: t + 1] for t in range(len(ids))])
    # A token may end within a character, which is decoded to U+FFFD until the next one.
    reach = [len(part if parts[-1].startswith(part) else part.rstrip("\ufffd")) for part in parts]
    indices = [int(np.searchsorted(reach, end)) for end in ends]
    return [*indices[:-1], len(ids) - 1]


def population_rewards(
    policy: Policy,
    offsets: Offsets,
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
      offsets: those of ``C`` candidates, ``[C, ...]`` a site.
      items: ``P`` prompts.
      key: PRNG key; consumed. All candidates share the random numbers of a prompt.
      generation: sampling settings, at ``generation.temperature``.
      num_samples: completions of each prompt by each candidate.
      buckets: lengths to which the prompts may be padded.

    Returns:
      float64 ``[C, P]``, mean reward over a prompt's samples; NaN where all abstained, or where
      their logits are not finite.

    Raises:
      InputError: what `score` raises; logits of a single adapter that are not finite.
    """
    count = len(jax.tree.leaves(offsets)[0])
    out = complete(
        policy,
        jax.tree.map(lambda x: jnp.repeat(x, len(items), axis=0), offsets),
        [item.tokens for item in items] * count,
        jax.random.split(key, len(items))[np.tile(np.arange(len(items)), count)],
        generation,
        num_samples=num_samples,
        temperature=generation.temperature,
        buckets=buckets,
        own_adapters=True,
        # What a single adapter makes is meant to be judged; of many, some may be far out.
        require_finite=count == 1,
        shared=(),
    )
    asked = [*items] * count
    out = with_base_logps(policy, asked, out, own=True)
    judged = score(asked, out.texts, out.base_logps, processes=policy.processes)
    scores = np.where(out.finite, judged.total, np.nan)
    scores = scores.reshape(count, len(items), num_samples)
    return mean_of_present(scores)
