"""Log-likelihoods of given tokens, without ever holding ``[length, vocabulary]``."""

import jax
import jax.numpy as jnp

from grpocem_jax.models.base import AdapterParams, Model, Params


def token_logps(
    model: Model,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array | float,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token and entropy of the policy, the head ``chunk`` tokens at a time.

    Each chunk is recomputed in the backward pass, so ``[N, V]`` never exists.

    Args:
      model: the model record.
      params: its parameters.
      hidden: ``[N, D]``, the states that predict the tokens.
      tokens: int32 ``[N]``.
      temperature: above 0.
      chunk: tokens at a time.

    Returns:
      float32 ``[N]`` and ``[N]`` (nats).
    """
    length = tokens.shape[0]
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    tokens = jnp.pad(tokens, (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def head(part):
        states, targets = part
        logps = jax.nn.log_softmax(model.logits(params, states) / temperature, axis=-1)
        entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
        return jnp.take_along_axis(logps, targets[:, None], axis=-1)[:, 0], entropy

    logps, entropies = jax.lax.map(head, (hidden, tokens))
    return logps.reshape(-1)[:length], entropies.reshape(-1)[:length]


def completion_logps(
    model: Model,
    params: Params,
    adapter: AdapterParams,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    completions: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float,
    *,
    chunk: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies of one prompt's group; the prompt is processed once.

    Args:
      model: the model record.
      params: its parameters.
      adapter: offsets.
      prompt: int32 ``[S]``, padded on the left.
      prompt_mask: bool ``[S]``.
      completions: int32 ``[G, N]``.
      mask: bool ``[G, N]``.
      temperature: above 0.
      chunk: tokens at a time through the head.

    Returns:
      float32 ``[G, N]`` and ``[G, N]``; zero off the mask.
    """
    last, context = model.prefill(params, adapter, prompt, prompt_mask)

    def one(tokens, mask):
        hidden = model.forward(params, adapter, tokens[:-1], mask[:-1], context)
        hidden = jnp.concatenate([last[None], hidden])
        return token_logps(model, params, hidden, tokens, temperature, chunk=chunk)

    logps, entropies = jax.vmap(one)(completions, mask)
    return jnp.where(mask, logps, 0.0), jnp.where(mask, entropies, 0.0)
