"""The slots of an engine on the device, and the programs that fill them and go on with them.

A slot holds what a completion needs to go on: the keys and values of its tokens, its adapter, its
settings and the hidden state from which the next token is chosen.  Shapes are few
and known, so no program is compiled for another mix of requests, and every row of every product is
computed as if it were alone: the tokens of a slot do not depend on what is in the others.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.models import sampling
from grpocem_jax.models.base import Context, KeyValues, Model, Params

NOTHING, NOT_FINITE = -1, -2
"""What stands for a token where a slot has none, and where its logits are not finite."""


class Slots(NamedTuple):
    """``B`` slots of at most ``L`` tokens, prompt and completion together.

    Attributes:
      cache: keys and values of each slot's tokens, ``[B, heads, L, head_dim]`` a layer; what lies
        at ``held`` and beyond has no meaning, but is finite.
      hidden: float32 ``[B, D]``, the state after the last token.
      offsets: each slot's adapter, a leading axis ``B``; None where all share one.
      held: int32 ``[B]``, tokens in the cache.
      made: int32 ``[B]``, tokens of the completion so far.
      limit: int32 ``[B]``, the most of them.
      active: bool ``[B]``, whether the completion goes on.
      temperature: float32 ``[B]``; 0 takes the most probable tokens.
      top_p: float32 ``[B]``, in (0, 1].
      seed: uint32 ``[B]``; token ``t`` is drawn with ``fold_in(key(seed), t)``.
      seen: bool ``[B, V]``, tokens of prompt and completion; ``[B, 0]`` where nobody asks.
    """

    cache: KeyValues
    hidden: jax.Array
    offsets: Any
    held: jax.Array
    made: jax.Array
    limit: jax.Array
    active: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array
    seen: jax.Array


class Prefilled(NamedTuple):
    """``P`` processed prompts of ``S`` tokens; the fields are those of `Slots`, one row each."""

    cache: KeyValues
    hidden: jax.Array
    offsets: Any
    held: jax.Array
    seen: jax.Array


class Head(NamedTuple):
    """The beginning of prompts: processed tokens without padding.

    Attributes:
      cache: their keys and values, ``[heads, S, head_dim]`` a layer.
      seen: bool ``[V]`` or ``[0]``, as in `Slots`.
    """

    cache: KeyValues
    seen: jax.Array


class Admitted(NamedTuple):
    """What goes into slots with a batch of prompts; arrays have at least ``number`` entries.

    Attributes:
      source: int32, the prompt of each, a row of the batch; several may have the same.
      slot: int32, where each goes.
      limit: int32, most tokens of the completion.
      temperature: float32.
      top_p: float32.
      seed: uint32.
      number: int32 ``[]``, how many there are.
    """

    source: Any
    slot: Any
    limit: Any
    temperature: Any
    top_p: Any
    seed: Any
    number: Any


@functools.partial(jax.jit, static_argnames=("model", "slots", "length", "own", "penalized"))
def empty(
    params: Params,
    zero: Offsets,
    *,
    model: Model,
    slots: int,
    length: int,
    own: bool,
    penalized: bool,
) -> Slots:
    """Slots with nothing in them.

    Args:
      params: the model's parameters.
      zero: offsets of the form that all have.
      model: the model.
      slots: ``B``.
      length: ``L``.
      own: whether each slot has an adapter of its own.
      penalized: whether repetition is penalised, for which tokens are remembered.
    """
    cache = model.init_cache(params, length)
    prompt = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    hidden, _ = jax.eval_shape(model.prefill, params, zero, *prompt)

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros((slots, *x.shape), x.dtype)

    numbers = jnp.zeros(slots, jnp.int32)
    return Slots(
        cache=jax.tree.map(zeros, cache),
        hidden=zeros(hidden),
        offsets=jax.tree.map(zeros, zero) if own else None,
        held=numbers,
        made=numbers,
        limit=numbers,
        active=jnp.zeros(slots, bool),
        temperature=jnp.zeros(slots, jnp.float32),
        top_p=jnp.ones(slots, jnp.float32),
        seed=jnp.zeros(slots, jnp.uint32),
        seen=jnp.zeros((slots, model.vocab_size if penalized else 0), bool),
    )


@functools.partial(jax.jit, static_argnames="rows")
def make_table(start: Offsets, *, rows: int) -> Offsets:
    """A table of ``rows`` adapters, all of them ``start``."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), start)


def _put(table: Any, row: jax.Array, values: Any) -> Any:
    """Writes one row of every array; what is shorter than a row leaves the rest of it."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        start: Sequence[Any] = (row, *(0,) * (old.ndim - 1))
        return jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)

    return jax.tree.map(write, table, values)


@functools.partial(jax.jit, donate_argnames="table")
def put_row(table: Offsets, row: jax.Array, offsets: Offsets) -> Offsets:
    """The table with an adapter at a row."""
    return _put(table, row, offsets)


@functools.partial(jax.jit, donate_argnames="slots")
def wipe(slots: Slots, slot: jax.Array) -> Slots:
    """A slot whose keys and values are zero again, after numbers that were not finite."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), slots.cache)
    return slots._replace(cache=_put(slots.cache, slot, zeros))


@functools.partial(jax.jit, static_argnames="length")
def resize(slots: Slots, *, length: int) -> Slots:
    """The same slots with room for another number ``L`` of tokens, which must hold theirs."""

    def fit(x: jax.Array) -> jax.Array:
        more = max(0, length - x.shape[2])
        return jnp.pad(x[:, :, :length], ((0, 0), (0, 0), (0, more), (0, 0)))

    return slots._replace(cache=jax.tree.map(fit, slots.cache))


@functools.partial(jax.jit, static_argnames=("model", "penalized"))
def prefill(
    params: Params,
    shared: Offsets,
    table: Offsets | None,
    heads: Sequence[Head] | None,
    prompts: jax.Array,
    mask: jax.Array,
    rows: jax.Array,
    *,
    model: Model,
    penalized: bool,
) -> Prefilled:
    """Processes prompts.

    Args:
      params: the model's parameters.
      shared: the adapter of all, where there is no table.
      table: adapters by row, or None.
      heads: what each prompt begins with, ``P`` of equal length; None for nothing.
      prompts: int32 ``[P, S]``, what comes behind, padded on the right.
      mask: bool ``[P, S]``, at least one True in each row.
      rows: int32 ``[P]``, the adapter of each prompt, a row of the table.
      model: the model.
      penalized: as in `empty`.

    Returns:
      the prompts, heads and what comes behind together.
    """
    axis = None if table is None else 0
    own = None if table is None else jax.tree.map(lambda x: x[rows], table)
    before = context = None
    if heads is not None:
        before = jax.tree.map(lambda *x: jnp.stack(x), *heads)
        context = Context(before.cache, jnp.ones((len(prompts), _length(before.cache)), bool))
    hidden, behind = jax.vmap(model.prefill, (None, axis, 0, 0, 0))(
        params, shared if own is None else own, prompts, mask, context
    )
    cache, held = behind.key_values, jnp.sum(mask, -1, dtype=jnp.int32)
    seen = jnp.zeros((len(prompts), 0), bool)
    if penalized:
        # Padding goes to row V, which is cut off.
        known = jnp.where(mask, prompts, model.vocab_size)
        seen = jax.vmap(lambda row: jnp.zeros(model.vocab_size + 1, bool).at[row].set(True))(known)
        seen = seen[:, :-1]
    if before is not None:
        cache = jax.tree.map(lambda *x: jnp.concatenate(x, 2), before.cache, cache)
        held, seen = held + _length(before.cache), seen | before.seen
    return Prefilled(cache, hidden, own, held, seen)


def _length(cache: KeyValues) -> int:
    """Tokens of each prompt."""
    return cache.keys[0].shape[2]


@jax.jit
def head(prompts: Prefilled, row: jax.Array) -> Head:
    """One of the prompts, which fills its row, as the beginning of others."""
    return jax.tree.map(lambda x: x[row], Head(prompts.cache, prompts.seen))


@functools.partial(jax.jit, donate_argnames="slots")
def place(slots: Slots, prompts: Prefilled, admitted: Admitted) -> Slots:
    """Puts processed prompts into the slots that complete them; the slots are donated."""

    def put(number: jax.Array, slots: Slots) -> Slots:
        prompt = jax.tree.map(lambda x: x[admitted.source[number]], prompts)
        made = Slots(
            **prompt._asdict(),
            made=jnp.int32(0),
            limit=admitted.limit[number],
            active=jnp.bool_(True),
            temperature=admitted.temperature[number],
            top_p=admitted.top_p[number],
            seed=admitted.seed[number],
        )
        return _put(slots, admitted.slot[number], made)

    return jax.lax.fori_loop(0, admitted.number, put, slots)


@functools.partial(
    jax.jit,
    static_argnames=("model", "most", "top_k", "min_p", "repetition_penalty"),
    donate_argnames="slots",
)
def decode(
    params: Params,
    shared: Offsets,
    slots: Slots,
    end_ids: jax.Array,
    keep: jax.Array,
    steps: jax.Array,
    until: jax.Array,
    *,
    model: Model,
    most: int,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
) -> tuple[Slots, jax.Array]:
    """Goes on with all active slots by some tokens.

    Args:
      params: the model's parameters.
      shared: the adapter of all slots, where they have none of their own.
      slots: the slots; donated.
      end_ids: int32 ``[E]``, tokens that end a completion.
      keep: bool ``[B]``; slots where it is False are active no longer.
      steps: int32 ``[]``, tokens for each slot, at most ``most``; fewer once no slot is active.
      until: int32 ``[]``; returns once so many completions have ended.
      model: the model.
      most: the largest number of steps, a static value.
      top_k: as in `sampling.draw`.
      min_p: as in `sampling.draw`.
      repetition_penalty: as in `sampling.penalize_repetition`.

    Returns:
      the slots, and int32 ``[most, B]``: the tokens of each slot in their order, `NOTHING` after
      them, and `NOT_FINITE` in the place of one whose logits are not finite, which ends it.
    """
    axis = None if slots.offsets is None else 0
    advance = jax.vmap(model.decode_step, (None, axis, None, 0, 0, 0))
    pick = functools.partial(sampling.draw, top_k=top_k, min_p=min_p)

    def choose(slots: Slots) -> tuple[jax.Array, jax.Array]:
        """The next token of each slot, and whether its logits are finite."""
        logits = jax.vmap(model.logits, (None, 0))(params, slots.hidden)
        if repetition_penalty != 1.0:
            penalize = jax.vmap(sampling.penalize_repetition, (0, 0, None))
            logits = penalize(logits, slots.seen, repetition_penalty)
        largest = jnp.max(logits, -1, keepdims=True)
        # The first of the most probable tokens; on a CPU several times faster than an argmax.
        numbers = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        best = jnp.min(jnp.where(logits == largest, numbers, model.vocab_size - 1), -1)
        drawn = slots.active & (slots.temperature > 0)

        def sampled() -> jax.Array:
            keys = jax.vmap(lambda seed, t: jax.random.fold_in(jax.random.key(seed), t))(
                slots.seed, slots.made
            )
            # Slots that draw nothing must not be waited for.
            temperature = jnp.where(drawn, slots.temperature, 1.0)[:, None]
            scaled = (logits - largest) / temperature
            tokens = jax.vmap(pick)(keys, scaled, jnp.where(drawn, slots.top_p, 1.0))
            return jnp.where(drawn, tokens, best)

        token = jax.lax.cond(jnp.any(drawn), sampled, lambda: best)
        return token, jnp.isfinite(largest[:, 0])

    def unfinished(state: tuple[jax.Array, Slots, jax.Array, jax.Array]) -> jax.Array:
        number, slots, _, ended = state
        return (number < steps) & jnp.any(slots.active) & (ended < until)

    def extend(
        state: tuple[jax.Array, Slots, jax.Array, jax.Array],
    ) -> tuple[jax.Array, Slots, jax.Array, jax.Array]:
        number, slots, tokens, ended = state
        token, finite = choose(slots)
        active = slots.active
        shown = jnp.where(active, jnp.where(finite, token, NOT_FINITE), NOTHING)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, shown, number, 0)
        made = slots.made + active
        goes_on = active & finite & ~jnp.isin(token, end_ids) & (made < slots.limit)
        # A slot that is free writes to its first place, which the next prompt overwrites.
        index = jnp.where(goes_on, slots.held, 0)
        offsets = shared if slots.offsets is None else slots.offsets
        hidden, cache = advance(params, offsets, None, slots.cache, token, index)
        seen = slots.seen
        if repetition_penalty != 1.0:
            seen = seen | jax.nn.one_hot(token, model.vocab_size, dtype=bool)
        slots = slots._replace(
            cache=cache,
            hidden=hidden,
            held=jnp.where(goes_on, slots.held + 1, 0),
            made=made,
            active=goes_on,
            seen=seen,
        )
        ended = ended + jnp.sum(active & ~goes_on, dtype=jnp.int32)
        return number + 1, slots, tokens, ended

    slots = slots._replace(active=slots.active & keep)
    tokens = jnp.full((most, len(slots.active)), NOTHING, jnp.int32)
    state = (jnp.int32(0), slots, tokens, jnp.int32(0))
    _, slots, tokens, _ = jax.lax.while_loop(unfinished, extend, state)
    return slots, tokens
