"""Log-likelihoods of given tokens, without ever holding ``[length, vocabulary]``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.models.base import AdapterParams, Model, Params, keep, remat

CHUNK = 2048
"""Rows of the vocabulary that go through the head at a time: a product large enough to run at full
speed, whose logits are still in the cache when they are summed."""


class _Sums(NamedTuple):
    """What has been seen of each token's logits ``z``, float32 ``[N]``.

    With ``m`` the largest so far: ``normalizer = sum(exp(z - m))`` and
    ``weighted = sum(exp(z - m) (z - m))``; ``target`` is the token's own logit.
    """

    largest: jax.Array
    normalizer: jax.Array
    weighted: jax.Array
    target: jax.Array


def token_logps(
    model: Model,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array | float,
    *,
    chunk: int = CHUNK,
    keep_logits: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token and entropy of the policy, a part of the vocabulary at a time.

    The normaliser is summed up as in an online softmax (Milakov and Gimelshein 2018, arXiv
    1805.02867), so that a part's logits are read once, where they were made.

    Args:
      model: the model record.
      params: its parameters.
      hidden: ``[N, D]``, the states that predict the tokens.
      tokens: int32 ``[N]``.
      temperature: above 0.
      chunk: rows of the vocabulary at a time.
      keep_logits: keep them all, float32 ``[N, V]``, for the backward pass, which makes them again
        otherwise: a product of the size of the head for that memory.

    Returns:
      float32 ``[N]`` and ``[N]`` (nats).
    """

    def add(sums: _Sums, start: jax.Array | int, count: int) -> _Sums:
        logits = model.logits(params, hidden, start, count)
        logits = (keep(logits) if keep_logits else logits) / temperature
        largest = jnp.maximum(sums.largest, jax.lax.stop_gradient(jnp.max(logits, -1)))
        shifted = logits - largest[:, None]
        exps = jnp.exp(shifted)
        drop = sums.largest - largest
        scale = jnp.exp(drop)
        mine = jnp.arange(count)[None] == (tokens - start)[:, None]
        return _Sums(
            largest,
            scale * sums.normalizer + jnp.sum(exps, -1),
            scale * (sums.weighted + drop * sums.normalizer) + jnp.sum(exps * shifted, -1),
            sums.target + jnp.sum(jnp.where(mine, logits, 0.0), -1),
        )

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    # A finite start: its products with zero are zero.
    sums = _Sums(jnp.full_like(zeros, -1e30), zeros, zeros, zeros)
    whole, rest = divmod(model.vocab_size, chunk)
    if whole:
        part = remat(lambda sums, start: (add(sums, start, chunk), None))
        sums, _ = jax.lax.scan(part, sums, jnp.arange(whole) * chunk)
    if rest:
        sums = remat(lambda sums: add(sums, whole * chunk, rest))(sums)
    log_normalizer = jnp.log(sums.normalizer)
    logps = sums.target - sums.largest - log_normalizer
    return logps, log_normalizer - sums.weighted / sums.normalizer


def completion_logps(
    model: Model,
    params: Params,
    offsets: AdapterParams,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    completions: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float,
    positions: jax.Array | None = None,
    *,
    keep_logits: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies of one prompt's group; the prompt is processed once.

    Args:
      model: the model record.
      params: its parameters.
      offsets: offsets.
      prompt: int32 ``[S]``, padded on the left.
      prompt_mask: bool ``[S]``.
      completions: int32 ``[G, N]``.
      mask: bool ``[G, N]``.
      temperature: above 0.
      positions: int32 ``[G, K]`` from 0 to ``N - 1``, the tokens asked about; None for all. The
        head sees ``K`` states of a completion.
      keep_logits: as in `token_logps`, ``[G, N, V]`` or ``[G, K, V]`` of them.

    Returns:
      float32 ``[G, N]`` and ``[G, N]``, or ``[G, K]``; zero off the mask.
    """
    last, context = model.prefill(params, offsets, prompt, prompt_mask)

    def one(tokens, mask, positions):
        hidden = last[None]
        if len(tokens) > 1:
            rest = model.forward(params, offsets, tokens[:-1], mask[:-1], context)
            hidden = jnp.concatenate([hidden, rest])
        if positions is not None:
            hidden, tokens, mask = hidden[positions], tokens[positions], mask[positions]
        found = token_logps(model, params, hidden, tokens, temperature, keep_logits=keep_logits)
        return [jnp.where(mask, x, 0.0) for x in found]

    logps, entropies = jax.vmap(one)(completions, mask, positions)
    return logps, entropies
