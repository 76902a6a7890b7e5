"""Rollouts: a group of completions for each prompt, from one jitted program.

A prompt is processed once and its keys and values are shared by its group; the decode loop stands
outside ``vmap`` (which would copy the caches of a loop inside it) and stops when every completion
has ended.  The policy is ``softmax(logits / temperature)``: its log-probabilities and entropy are
what is returned, before repetition penalty and top-p, so that a policy ratio of 1 means "the same
policy" (see `grpocem_jax.grpo`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.models.base import AdapterParams, Model, Params


class Rollouts(NamedTuple):
    """Completions of ``P`` prompts, ``G`` samples each, at most ``N`` tokens.

    Attributes:
      tokens: int32 ``[P, G, N]``, zero after the end.
      mask: bool ``[P, G, N]``, True up to and including the end token.
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


def top_p_mask(probs: jax.Array, top_p: float) -> jax.Array:
    """The smallest set of most probable tokens with mass at least ``top_p``, without a sort.

    Bisects for the largest threshold whose tokens reach the mass.  Non-negative floats order like
    their bit patterns, so 30 halvings of the integers find it exactly; tokens that tie with the
    last one are all kept (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).

    Args:
      probs: float32 ``[V]``, a distribution.
      top_p: in (0, 1].

    Returns:
      bool ``[V]``.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    one = jnp.array(1.0, jnp.float32).view(jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle, probs, 0.0)) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one + 1))
    return bits >= low


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "num_samples",
        "max_new_tokens",
        "top_p",
        "repetition_penalty",
        "greedy",
        "own_adapters",
    ),
)
def sample(
    params: Params,
    adapter: AdapterParams,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    end_ids: jax.Array,
    temperature: jax.Array | float,
    *,
    model: Model,
    num_samples: int,
    max_new_tokens: int,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    greedy: bool = False,
    own_adapters: bool = False,
) -> Rollouts:
    """Samples completions.

    The result for a prompt depends on its tokens and its key alone, not on its neighbours in the
    batch or its padding.

    Args:
      params: the model's parameters, with factors at the adapter's sites.
      adapter: offsets of the adapter; with ``own_adapters`` one for each prompt, a leading axis
        ``P``.
      prompts: int32 ``[P, S]``, padded on the left.
      prompt_mask: bool ``[P, S]``, False on padding; at least one True in each row.
      keys: PRNG keys ``[P]``; consumed. Token ``t`` of sample ``g`` uses
        ``fold_in(split(key, G)[g], t)``.
      end_ids: int32 ``[E]``, tokens that end a completion. An argument, not a constant of the
        program, so that other ids need no other program.
      temperature: above 0; a traced value, so that annealing it does not compile again.
      model: the model record.
      num_samples: ``G``, completions of each prompt.
      max_new_tokens: ``N``.
      top_p: nucleus mass in (0, 1].
      repetition_penalty: at least 1, over the prompt and the completion.
      greedy: take the most probable token instead of drawing one.
      own_adapters: every prompt has an adapter of its own, as the candidates of a population have.

    Returns:
      `Rollouts`.
    """
    num_prompts = prompts.shape[0]
    axis = 0 if own_adapters else None
    hidden, context = jax.vmap(model.prefill, in_axes=(None, axis, 0, 0))(
        params, adapter, prompts, prompt_mask
    )
    keys = jax.vmap(lambda key: jax.random.split(key, num_samples))(keys)

    def choose(hidden, key, seen, index):
        """One token of one sample: (token, log-probability, entropy)."""
        logits = model.logits(params, hidden)
        logps = jax.nn.log_softmax(logits / temperature)
        entropy = -jnp.sum(jnp.exp(logps) * logps)
        if repetition_penalty != 1.0:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        if greedy:
            token = jnp.argmax(logits)
        else:
            logits = logits / temperature
            if top_p < 1.0:
                logits = jnp.where(top_p_mask(jax.nn.softmax(logits), top_p), logits, -jnp.inf)
            token = jax.random.categorical(jax.random.fold_in(key, index), logits)
        return token.astype(jnp.int32), logps[token], entropy

    def advance(adapter, context, cache, token, index):
        return model.decode_step(params, adapter, context, cache, token, index)

    over_samples = functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
    choose_all = jax.vmap(over_samples(choose), in_axes=(0, 0, 0, None))
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

    def record(out: Rollouts, index, chosen, ended):
        token, logp, entropy = (jnp.where(ended, 0, x) for x in chosen)
        values = Rollouts(token, ~ended, logp, entropy)
        out = jax.tree.map(lambda x, v: x.at[..., index].set(v), out, values)
        ended = ended | jnp.isin(token, end_ids)
        return out, token, ended

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
    out, token, ended = record(out, 0, choose_all(hidden, keys, seen, 0), jnp.zeros(group, bool))
    cache = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (*group, *x.shape)), model.init_cache(params, max_new_tokens)
    )

    def unfinished(state):
        index, _, ended, *_ = state
        return (index < max_new_tokens) & ~jnp.all(ended)

    def extend(state):
        index, token, ended, seen, cache, out = state
        hidden, cache = advance_all(adapter, context, cache, token, index - 1)
        seen = mark(seen, token)
        out, token, ended = record(out, index, choose_all(hidden, keys, seen, index), ended)
        return index + 1, token, ended, seen, cache, out

    state = (jnp.int32(1), token, ended, seen, cache, out)
    return jax.lax.while_loop(unfinished, extend, state)[-1]


def anneal(start: float, end: float, fraction: float) -> float:
    """The temperature at a ``fraction`` in [0, 1] of training: linear from ``start`` to ``end``."""
    return start + (end - start) * min(max(fraction, 0.0), 1.0)
