"""Rollouts: a group of completions for each prompt, from one jitted program.

A prompt is processed once and its keys and values are shared by its group; the decode loop stands
outside ``vmap`` (which would copy the caches of a loop inside it) and stops when every completion
has ended.  The policy is ``softmax(logits / temperature)``: its log-probabilities and entropy are
what is returned, before repetition penalty, top-k, top-p and min-p, so that a policy ratio of 1
means "the same policy" (see `grpocem_jax.grpo`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grpocem_jax.models.base import AdapterParams, Model, Params
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import Range, at_least, number, share, whole, within


class Rollouts(NamedTuple):
    """Completions of ``P`` prompts, ``G`` samples each, at most ``N`` tokens.

    Attributes:
      tokens: int32 ``[P, G, N]``, zero after the end.
      mask: bool ``[P, G, N]``, True up to and including the token that ends the completion: an end
        token, or the one that completes a stop string.
      logps: float32 ``[P, G, N]``, log-probability of each token under the policy; zero off mask.
      entropies: float32 ``[P, G, N]``, entropy of the policy in nats at each token; zero off mask.
    """

    tokens: jax.Array
    mask: jax.Array
    logps: jax.Array
    entropies: jax.Array


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Divides positive and multiplies negative logits of seen tokens (Keskar et al. 2019).

    Args:
      logits: float32 ``[V]``.
      seen: bool ``[V]``, tokens of the prompt and of the completion so far.
      penalty: at least 1; 1 changes nothing.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index at which the running sum of the weights passes ``uniform`` of their total.

    A draw from the distribution proportional to the weights, for ``uniform`` in [0, 1), to float32
    rounding.  The sum runs over blocks first and then inside one of them, so that a draw reads the
    weights once.

    Args:
      weights: float32 ``[V]``, at least 0 and not all 0.
      uniform: float32 ``[]``.

    Returns:
      int32 ``[]``; the weight there is above 0.
    """
    size = math.isqrt(weights.shape[0]) + 1
    blocks = jnp.pad(weights, (0, -weights.shape[0] % size)).reshape(-1, size)

    def passes(sums: jax.Array, goal: jax.Array) -> jax.Array:
        # Rounding must not put the goal at the end, past the last weight, nor before the first.
        goal = jnp.minimum(jnp.maximum(goal, 0.0), jnp.nextafter(sums[-1], 0.0))
        return jnp.argmax(sums > goal)

    sums = jnp.cumsum(jnp.sum(blocks, -1))
    block = passes(sums, uniform * sums[-1])
    before = jnp.where(block > 0, sums[block - 1], 0.0)
    index = block * size + passes(jnp.cumsum(blocks[block]), uniform * sums[-1] - before)
    return index.astype(jnp.int32)


def in_nucleus(weights: jax.Array, token: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Whether a token is of the smallest set of most probable ones with mass at least ``top_p``.

    It is if the tokens more probable than itself have less than ``top_p`` between them (nucleus
    sampling, Holtzman et al. 2020, arXiv 1904.09751).  Tokens that tie with the last one all are.

    Args:
      weights: float32 ``[V]``, a distribution times any constant.
      token: int32 ``[]``.
      top_p: in (0, 1].

    Returns:
      bool ``[]``.
    """
    above = jnp.sum(jnp.where(weights > weights[token], weights, 0.0))
    return ~(above >= top_p * jnp.sum(weights))  # of NaN, every token: nothing to draw for


def draw(
    key: jax.Array,
    logits: jax.Array,
    top_p: float | jax.Array,
    *,
    top_k: int = 0,
    min_p: float = 0.0,
) -> jax.Array:
    """A token of what top-k, top-p and min-p leave, in this order, as in transformers.

    Top-k keeps the ``k`` most probable tokens and those that tie with the last of them (Fan et al.
    2018, arXiv 1805.04833); top-p the nucleus of their distribution (`in_nucleus`); min-p what is
    at least ``min_p`` times as probable as the most probable token (Nguyen et al. 2024, arXiv
    2407.01082).

    The nucleus is drawn from by rejection: exact, without a sort and without making the set.  Draws
    until a token of the nucleus comes.  One that is not of it takes everything less probable out of
    the next draws, which are then from the rest: a draw fails with probability ``1 - top_p`` at
    most, and what can still fail about halves each time.

    Args:
      key: PRNG key; consumed. Try ``n`` uses ``fold_in(key, n)``.
      logits: float32 ``[V]``.
      top_p: in (0, 1]; may be traced.
      top_k: at least 0; 0 keeps all.
      min_p: in [0, 1]; 0 keeps all.

    Returns:
      int32 ``[]``.
    """
    weights = jnp.exp(logits - jnp.max(logits))
    if 0 < top_k < len(weights):
        least = jax.lax.top_k(weights, top_k)[0][-1]
        weights = jnp.where(weights >= least, weights, 0.0)
    # The largest weight is 1.  Both sets hold all that is more probable than a token of theirs, so
    # the nucleus, of the weights without min-p, may as well be looked at afterwards.
    candidates = jnp.where(weights >= min_p, weights, 0.0) if min_p else weights

    def attempt(number: jax.Array, floor: jax.Array) -> tuple[jax.Array, jax.Array]:
        uniform = jax.random.uniform(jax.random.fold_in(key, number), dtype=jnp.float32)
        return number, inverse_cdf(jnp.where(candidates > floor, candidates, 0.0), uniform)

    def outside(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        # At 1 all are inside; a sum in float32 may say otherwise of the least probable.
        return ~in_nucleus(weights, state[1], top_p) & (top_p < 1.0)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, token = state
        return attempt(number + 1, weights[token])

    first = attempt(jnp.int32(0), jnp.float32(0.0))
    if isinstance(top_p, float | int) and top_p >= 1.0:
        return first[1]
    return jax.lax.while_loop(outside, again, first)[1]


def sample(
    params: Params,
    offsets: AdapterParams,
    prompts: ArrayLike | Sequence[Sequence[int]],
    prompt_mask: ArrayLike | Sequence[Sequence[bool]],
    keys: jax.Array,
    end_ids: ArrayLike | Sequence[int],
    temperature: jax.Array | float,
    *,
    model: Model,
    num_samples: int,
    max_new_tokens: int,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    greedy: bool = False,
    own_adapters: bool = False,
    stop_table: jax.Array | None = None,
) -> Rollouts:
    """Samples completions.

    The result for a prompt depends on its tokens and its key alone, not on its neighbours in the
    batch or its padding.

    Args:
      params: the model's parameters, with factors at the adapter's sites.
      offsets: offsets of the adapter; with ``own_adapters`` one for each prompt, a leading axis
        ``P``.
      prompts: int32 ``[P, S]`` or lists, padded on the left.
      prompt_mask: bool ``[P, S]`` or lists, False on padding; at least one True in each row.
      keys: PRNG keys ``[P]``; consumed. Token ``t`` of sample ``g`` uses
        ``fold_in(split(key, G)[g], t)``.
      end_ids: int32 ``[E]`` or a list, tokens that end a completion. An argument, not a constant
        of the program, so that other ids need no other program.
      temperature: above 0; a traced value, so that annealing it does not compile again.
      model: the model record.
      num_samples: ``G``, completions of each prompt.
      max_new_tokens: ``N``. With the tokens of the longest prompt at most ``model.context_length``;
        lengths are no static values and are not looked at here.
      top_p: nucleus mass in (0, 1].
      top_k: most probable tokens that are drawn from, at least 0; 0 for all.
      min_p: smallest probability of a token that is drawn, as a share of the most probable token's,
        in [0, 1]; 0 for any.
      repetition_penalty: at least 1, over the prompt and the completion. It comes first, then the
        temperature, top-k, top-p and min-p, see `draw`.
      greedy: the last sample takes the most probable tokens; others are drawn as without it.
      own_adapters: every prompt has an adapter of its own, as the candidates of a population have.
      stop_table: int32 ``[K, V]``, what ends a completion beside ``end_ids``: of each state and
        token the next state. A completion begins in state 0 and ends with the token that leads to
        state ``K``, see `models.tokenizer.stop_table`.

    Returns:
      `Rollouts`.

    Raises:
      InputError: a setting out of range; a temperature is looked at where it is a number, not
        where it is traced. Prompts, a mask or keys whose shapes do not fit each other.
    """
    rows, mask = _array("prompts", prompts), _array("prompt_mask", prompt_mask)
    if rows.ndim != 2 or mask.shape != rows.shape:
        raise InputError(
            f"prompts of shape {rows.shape} and prompt_mask of shape {mask.shape}: must both be "
            "[P, S]; pad shorter prompts on the left."
        )
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if (keys.shape if typed else keys.shape[:-1]) != rows.shape[:1]:
        raise InputError(
            f"keys of shape {keys.shape}: must be one key for each of the {len(rows)} prompts, "
            f"such as jax.random.split(key, {len(rows)})."
        )
    if not isinstance(temperature, jax.core.Tracer):
        given = temperature if np.ndim(temperature) else np.asarray(temperature).item()
        number(
            "temperature",
            given,
            Range("above 0; greedy=True takes the most probable tokens", lambda x: x > 0),
        )
    return _sample(
        params,
        offsets,
        rows,
        mask,
        keys,
        _array("end_ids", end_ids),
        temperature,
        model=model,
        num_samples=whole("num_samples", num_samples),
        max_new_tokens=whole("max_new_tokens", max_new_tokens),
        top_p=number("top_p", top_p, share()),
        top_k=whole("top_k", top_k, 0),
        min_p=number("min_p", min_p, within(0, 1)),
        repetition_penalty=number("repetition_penalty", repetition_penalty, at_least(1)),
        greedy=greedy,
        own_adapters=own_adapters,
        stop_table=stop_table,
    )


def _array(name: str, values: Any) -> Any:
    """An array as it is; lists as an array of integers, or of bools where these are all."""
    if hasattr(values, "shape"):
        return values
    try:
        found = np.asarray(values)
        return found if found.dtype == bool else found.astype(np.int32)
    except (TypeError, ValueError):
        raise InputError(
            f"{name}: must be an array, or lists of numbers of one length; pad shorter prompts on "
            "the left."
        ) from None


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "num_samples",
        "max_new_tokens",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "greedy",
        "own_adapters",
    ),
)
def _sample(
    params: Params,
    offsets: AdapterParams,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    end_ids: jax.Array,
    temperature: jax.Array | float,
    *,
    model: Model,
    num_samples: int,
    max_new_tokens: int,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    greedy: bool,
    own_adapters: bool,
    stop_table: jax.Array | None,
) -> Rollouts:
    temperature = jnp.asarray(temperature, jnp.float32)
    num_prompts = prompts.shape[0]
    axis = 0 if own_adapters else None
    hidden, context = jax.vmap(model.prefill, in_axes=(None, axis, 0, 0))(
        params, offsets, prompts, prompt_mask
    )
    keys = jax.vmap(lambda key: jax.random.split(key, num_samples))(keys)
    last = jnp.arange(num_samples) == num_samples - 1

    def choose(hidden, key, seen, last, index):
        """One token of one sample: (token, log-probability, entropy)."""
        logits = model.logits(params, hidden)
        logps = jax.nn.log_softmax(logits / temperature)
        entropy = -jnp.sum(jnp.exp(logps) * logps)
        if repetition_penalty != 1.0:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        if greedy and num_samples == 1:
            token = jnp.argmax(logits)
        else:
            key = jax.random.fold_in(key, index)
            token = draw(key, logits / temperature, top_p, top_k=top_k, min_p=min_p)
        if greedy and num_samples > 1:
            token = jnp.where(last, jnp.argmax(logits), token)
        return token.astype(jnp.int32), logps[token], entropy

    def advance(offsets, context, cache, token, index):
        return model.decode_step(params, offsets, context, cache, token, index)

    choose_group = jax.vmap(choose, in_axes=(0, 0, 0, 0, None))
    choose_all = jax.vmap(choose_group, in_axes=(0, 0, 0, None, None))
    advance_group = jax.vmap(advance, in_axes=(None, None, 0, 0, None))
    advance_all = jax.vmap(advance_group, in_axes=(axis, 0, 0, 0, None))

    group = (num_prompts, num_samples)
    if repetition_penalty != 1.0:
        # The scatter of a masked token goes to row V, which is cut off.
        rows = jnp.where(prompt_mask, prompts, model.vocab_size)
        seen = jax.vmap(lambda row: jnp.zeros(model.vocab_size + 1, bool).at[row].set(True))(rows)
        seen = jnp.broadcast_to(seen[:, None, :-1], (*group, model.vocab_size))
    else:
        seen = jnp.zeros((*group, 0), bool)

    def record(out: Rollouts, index, chosen, ended, stop):
        token, logp, entropy = (jnp.where(ended, 0, x) for x in chosen)
        values = Rollouts(token, ~ended, logp, entropy)
        out = jax.tree.map(lambda x, v: x.at[..., index].set(v), out, values)
        ended = ended | jnp.isin(token, end_ids)
        if stop_table is not None:
            # In the last state there is nothing to look up: the index is clipped.
            stop = stop_table[stop, token]
            ended = ended | (stop == len(stop_table))
        return out, token, ended, stop

    def mark(seen, token):
        if repetition_penalty == 1.0:
            return seen
        return seen | jax.nn.one_hot(token, model.vocab_size, dtype=bool)

    shape = (*group, max_new_tokens)
    out = Rollouts(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    hidden = jnp.broadcast_to(hidden[:, None], (*group, hidden.shape[-1]))
    chosen = choose_all(hidden, keys, seen, last, 0)
    ended, stop = (
        jnp.zeros(group, bool),
        None if stop_table is None else jnp.zeros(group, jnp.int32),
    )
    out, token, ended, stop = record(out, 0, chosen, ended, stop)
    cache = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (*group, *x.shape)), model.init_cache(params, max_new_tokens)
    )

    def unfinished(state):
        index, _, ended, *_ = state
        return (index < max_new_tokens) & ~jnp.all(ended)

    def extend(state):
        index, token, ended, stop, seen, cache, out = state
        hidden, cache = advance_all(offsets, context, cache, token, index - 1)
        seen = mark(seen, token)
        chosen = choose_all(hidden, keys, seen, last, index)
        out, token, ended, stop = record(out, index, chosen, ended, stop)
        return index + 1, token, ended, stop, seen, cache, out

    state = (jnp.int32(1), token, ended, stop, seen, cache, out)
    return jax.lax.while_loop(unfinished, extend, state)[-1]


def anneal(start: float, end: float, fraction: float) -> float:
    """The temperature at a ``fraction`` in [0, 1] of training: linear from ``start`` to ``end``."""
    return start + (end - start) * min(max(fraction, 0.0), 1.0)
