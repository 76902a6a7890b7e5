"""What decoder-only transformers share: adapted linear maps, the walk over layers, the cache."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grpocem_jax.models.base import (
    AdapterParams,
    Context,
    KeyValues,
    Model,
    Params,
    SiteFunction,
    dense,
)
from grpocem_jax.utils.errors import InputError


class Linear(nn.Module):
    """A linear map that hands its kernel to the adapter where there is one.

    Attributes:
      features: of the output.
      site: its path in the block, by which the adapter's arrays are found.
      site_fn: the ``apply`` of the adapter.
      use_bias: whether a bias is added.
    """

    features: int
    site: str
    site_fn: SiteFunction | None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, offsets: AdapterParams) -> jax.Array:
        """Maps ``[T, in]`` to ``[T, features]`` float32."""
        bias: Any = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))[None]
        factors: Any = self.get_variable("params", "kernel")
        if self.site in offsets:
            if self.site_fn is None:
                raise InputError(
                    "adapter: given to a model built without one; build it with "
                    "site_fn=adapter.apply."
                )
            y = self.site_fn(factors, offsets[self.site], x)
        elif factors is not None and not jax.tree_util.all_leaves([factors]):
            raise InputError(
                f"adapter: has no entry for {self.site}, whose kernel is factored; give one for "
                "each adapted site, as init_adapter does (zeros are the base model)."
            )
        else:
            shape = (x.shape[-1], self.features)
            y = dense(self.param("kernel", nn.initializers.normal(0.02), shape), x)
        return y if bias is None else y + bias


def run_layers(
    run: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    num_layers: int,
    prefix: str,
    x: jax.Array,
    allowed: jax.Array,
    offsets: AdapterParams,
    context: Context | None,
    cache: KeyValues | None,
    index: jax.Array | None,
    places: jax.Array | None,
    *shared: jax.Array,
) -> tuple[jax.Array, KeyValues]:
    """Runs all layers, giving each its part of adapter, context and cache.

    Args:
      run: ``(layer, x, adapter, allowed, past, own, index, places, *shared) -> (x, keys, values)``.
        Of that layer: ``offsets`` holds its arrays by the path inside it; ``past`` is a segment of
        `grpocem_jax.models.base.attend`, or None; ``own`` the keys and values to write to, or None;
        ``places`` the tokens whose output is wanted, see `narrow`.
      num_layers: how many.
      prefix: of the sites' names before the number of the layer, ``h``.
      x: float32 ``[T, D]``.
      allowed: bool ``[T, N]``, which of the ``N`` own keys each token attends to.
      offsets: trainable arrays by site.
      context: what is before the tokens, or None.
      cache: `KeyValues` of length ``N`` to write the tokens' own into, or None (``N = T``).
      index: int32 ``[]``, where in ``cache`` to write.
      places: int32 ``[M]``, the tokens whose output is wanted; None for all.
      *shared: further arguments, the same for all layers.

    Returns:
      float32 ``[T, D]``, or ``[M, D]``, and the own `KeyValues`, length ``N``.
    """
    keys, values = [], []
    for layer in range(num_layers):
        past = own = None
        if context is not None:
            reach = jnp.broadcast_to(context.mask, (x.shape[0], context.mask.shape[0]))
            past = (context.key_values.keys[layer], context.key_values.values[layer], reach)
        if cache is not None:
            own = (cache.keys[layer], cache.values[layer])
        start = f"{prefix}.{layer}."
        mine = {k.removeprefix(start): v for k, v in offsets.items() if k.startswith(start)}
        # Every layer but the last is asked for all: the next makes keys and values of them.
        wanted = places if layer == num_layers - 1 else None
        x, k, v = run(layer, x, mine, allowed, past, own, index, wanted, *shared)
        keys.append(k)
        values.append(v)
    return x, KeyValues(tuple(keys), tuple(values))


def narrow(
    places: jax.Array | None,
    x: jax.Array,
    query: jax.Array,
    segments: list[tuple[jax.Array, jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array, jax.Array]]]:
    """What a block goes on with once it has keys and values of all tokens.

    Args:
      places: int32 ``[M]``, the tokens whose output is wanted; None for all.
      x: the block's input ``[T, D]``.
      query: ``[H, T, d]``.
      segments: see `grpocem_jax.models.base.attend`.

    Returns:
      the same with ``M`` in place of ``T``.
    """
    if places is None:
        return x, query, segments
    own = [(keys, values, allowed[places]) for keys, values, allowed in segments]
    return x[places], query[:, places], own


def extend(
    cache: tuple[jax.Array, jax.Array] | None,
    key: jax.Array,
    value: jax.Array,
    index: Any,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a layer: its cache with those of the tokens at ``index``, or only those.

    Args:
      cache: keys and values ``[K, N, d]``, or None.
      key: ``[K, T, d]``.
      value: ``[K, T, d]``.
      index: int32 ``[]``; not used without a cache.
    """
    if cache is None:
        return key, value
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)
        for old, new in zip(cache, (key, value), strict=True)
    )
    return keys, values


def init_params(key: jax.Array, network: nn.Module) -> Params:
    """The parameters that a network, as `make_model` takes one, makes for itself."""
    tokens, allowed = jnp.zeros((1,), jnp.int32), jnp.ones((1, 1), bool)

    def init(key: jax.Array) -> Params:
        return network.init(key, tokens, tokens, allowed, {}, None, None, None, None)["params"]

    return jax.jit(init)(key)


def make_model(
    network: Callable[[jnp.dtype], nn.Module],
    head: Callable[[Params], jax.Array],
    *,
    vocab_size: int,
    context_length: int,
    num_layers: int,
    cache_heads: int,
    head_dim: int,
    sites: Mapping[str, tuple[str, ...]],
    window: int | None = None,
) -> Model:
    """The functions of a model around its network.

    Args:
      network: for a dtype of keys and values, a module with the arguments of `run_layers` after
        ``prefix``, but tokens ``[T]`` and positions ``[T]`` (int32) in place of ``x``, up to the
        final norm.
      head: the head's rows ``[V, D]`` of the parameters; their dtype is that of keys and values.
      vocab_size: ``V``.
      context_length: the largest number of positions.
      num_layers: layers, each with a cache.
      cache_heads: heads of keys and values.
      head_dim: their size.
      sites: see `grpocem_jax.models.base.Model`, as for ``window``.
      window: the sliding window of its attention.
    """
    network = functools.cache(network)
    # One program where they are called by themselves; inside another program, a part of it.
    inlined = functools.partial(jax.jit, inline=True)

    def run(
        params,
        offsets,
        tokens,
        positions,
        allowed,
        context=None,
        cache=None,
        index=None,
        places=None,
    ):
        unknown = sorted(set(offsets) - set(sites))
        if unknown:
            raise InputError(
                f"adapter: {unknown[0]!r} is no site of this model; names are those of "
                f"Model.sites, such as {next(iter(sites))!r}."
            )
        return network(head(params).dtype).apply(
            {"params": params}, tokens, positions, allowed, offsets, context, cache, index, places
        )

    def after(context: Context | None) -> jax.Array | int:
        return 0 if context is None else jnp.sum(context.mask, dtype=jnp.int32)

    def full(params, offsets, tokens, mask, context, places=None):
        positions = jnp.maximum(jnp.cumsum(mask) - 1, 0) + after(context)
        causal = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        allowed = causal & mask[None]
        return run(params, offsets, tokens, positions, allowed, context, places=places)

    @inlined
    def forward(params, offsets, tokens, mask, context=None, places=None):
        return full(params, offsets, tokens, mask, context, places)[0]

    @inlined
    def prefill(params, offsets, tokens, mask, context=None):
        hidden, key_values = full(params, offsets, tokens, mask, context)
        last = jnp.max(jnp.where(mask, jnp.arange(len(tokens)), 0))
        return hidden[last], Context(key_values, mask)

    def init_cache(params: Params, length: int) -> KeyValues:
        zeros = (jnp.zeros((cache_heads, length, head_dim), head(params).dtype),) * num_layers
        return KeyValues(zeros, zeros)

    @inlined
    def decode_step(params, offsets, context, cache, token, index):
        allowed = (jnp.arange(cache.keys[0].shape[1]) <= index)[None]
        positions = (after(context) + index)[None]
        hidden, cache = run(params, offsets, token[None], positions, allowed, context, cache, index)
        return hidden[0], cache

    @functools.partial(inlined, static_argnames="count")
    def logits(
        params: Params,
        hidden: jax.Array,
        start: jax.Array | int = 0,
        count: int | None = None,
    ) -> jax.Array:
        rows = head(params)
        if count is not None:
            rows = jax.lax.dynamic_slice_in_dim(rows, start, count)
        return dense(rows.T, hidden)

    return Model(
        vocab_size=vocab_size,
        context_length=context_length,
        sites=sites,
        forward=forward,
        prefill=prefill,
        init_cache=init_cache,
        decode_step=decode_step,
        logits=logits,
        window=window,
    )
