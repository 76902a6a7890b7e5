"""The model interface: a language model as a frozen record of pure functions.

Every function works on ONE sequence; batches, groups and populations are made by ``jax.vmap``.
Under it, products with shared weights merge over all mapped axes into large matrix products, and
whatever a mapped axis shares (weights, a prompt's keys and values) is held once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Params = Any
"""A nested dict of arrays; at an adapted site the kernel is replaced by the adapter's factors."""

FACTORED = "factored"
"""The entry of parameters with factors that tells them from plain ones; it holds no array."""

AdapterParams = Mapping[str, Any]
"""Trainable arrays of an adapter by site name, for each site with factors; empty where none has."""

SiteFunction = Callable[[Any, Any, jax.Array], jax.Array]
"""``(factors, adapter_at_site, x [..., in]) -> y [..., out]``, the adapted linear map, no bias."""


class KeyValues(NamedTuple):
    """Keys and values of one sequence, a tuple over layers of ``[heads, length, head_dim]``.

    Heads stand first so that attention's products read the cache as it lies; those that several
    heads of queries share are there once.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Context(NamedTuple):
    """A processed prompt that later tokens attend to.

    Attributes:
      key_values: keys and values of the prompt's tokens, length ``S``.
      mask: bool ``[S]``, False on padding.
    """

    key_values: KeyValues
    mask: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder-only language model.

    Records compare and hash by identity, so one record may be a static argument of a jitted
    function; build it once and keep it.

    All of them raise `InputError` where ``offsets`` and ``params`` do not fit: an entry that is no
    site, entries for a model built without an adapter, a site with factors but without an entry.
    Factors that are one array, such as the kernel itself, cannot be told from a kernel: without an
    entry, that array is the linear map.

    Attributes:
      vocab_size: rows of the embedding; tokens are below it.
      context_length: the largest number of positions; the functions do not look, and what lies
        beyond has no meaning.
      sites: names of the linear maps that an adapter may take over, each with its path in the
        parameters, e.g. ``"h.0.attn.c_proj" -> ("h_0", "attn_c_proj", "kernel")``.
      forward: ``(params, offsets, tokens [T], mask [T], context=None, places=None) -> hidden [T,
        D]``, tokens int32 and mask bool. Padding may stand anywhere: masked tokens are attended to
        by none and take no position. With a `Context` the tokens follow it. With ``places``, int32
        ``[M]`` from 0 to ``T - 1``, only the states of these tokens are made, ``[M, D]``: of the
        others the last layer makes keys and values alone.
      prefill: ``(params, offsets, tokens [S], mask [S], context=None) -> (hidden [D], Context)``
        with the hidden state of the last token that is no padding, and the tokens' own keys and
        values.
      init_cache: ``(params, length) -> KeyValues`` of zeros for ``length`` tokens after a context.
      decode_step: ``(params, offsets, context, cache, token [], index []) -> (hidden [D], cache)``
        for the token that is number ``index`` (from 0) after the context. Without a context (None)
        the cache holds all that is before the token; a prompt padded on the right may stand there.
      logits: ``(params, hidden [..., D], start=0, count=None) -> [..., count]`` float32, of
        ``count`` tokens of the vocabulary from ``start`` on; of all of it by default.
      window: the sliding window of the attention, which ``context_length`` does not exceed: within
        it, attention is that of the whole text. None where there is none.
    """

    vocab_size: int
    context_length: int
    sites: Mapping[str, tuple[str, ...]]
    forward: Callable[..., jax.Array]
    prefill: Callable[..., tuple[jax.Array, Context]]
    init_cache: Callable[[Params, int], KeyValues]
    decode_step: Callable[..., tuple[jax.Array, KeyValues]]
    logits: Callable[..., jax.Array]
    window: int | None = None

    @property
    def context(self) -> str:
        """The context length for a message, and where it comes from if that is the window."""
        bound = ", the sliding window of its attention"
        return f"{self.context_length}{bound if self.window == self.context_length else ''}"


class Architecture(Protocol):
    """What the module of an architecture has; ``config`` is its own record.

    Attributes:
      Config: the record's class, with ``vocab_size`` and ``context_length``.
      SHAPES: configs of published sizes by the name after ``random:``.
    """

    @property
    def Config(self) -> type:  # noqa: D102, N802
        ...

    @property
    def SHAPES(self) -> Mapping[str, Any]:  # noqa: D102, N802
        ...

    def build(self, config: Any, site_fn: SiteFunction | None = None) -> Model:
        """The model's functions; ``site_fn`` is the ``apply`` of the adapter it will carry."""

    def init_params(self, key: jax.Array, config: Any) -> Params:
        """Random float32 parameters."""

    def layout(self, config: Any) -> Any:
        """The tensors of its checkpoints and where each goes, a `conversion.Layout`."""

    def config_from_hf(self, fields: Mapping[str, Any], where: str) -> Any:
        """Reads a ``config.json``, the file ``where``; refuses what is not implemented."""

    def config_to_hf(self, config: Any) -> dict[str, Any]:
        """The ``config.json`` that transformers reads, without token ids."""

    def params_from_state(
        self, state: Mapping[str, np.ndarray], config: Any, where: str
    ) -> dict[str, Any]:
        """Parameters float32 from the tensors of a checkpoint, the file ``where``."""

    def params_to_state(self, params: Params, config: Any) -> dict[str, np.ndarray]:
        """The inverse of ``params_from_state``, with the names transformers writes."""


def dense(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """``x @ kernel`` with operands in the kernel's dtype, accumulated and returned in float32.

    Args:
      kernel: float ``[in, out]``.
      x: float ``[..., in]``.

    Returns:
      float32 ``[..., out]``.
    """
    return jnp.dot(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


KEPT = "kept"


def keep(x: jax.Array) -> jax.Array:
    """Marks what `remat` keeps for the backward pass, beside a block's input."""
    return checkpoint_name(x, KEPT)


def remat(block: Callable[..., Any]) -> Callable[..., Any]:
    """A block that keeps what is marked with `keep` for the backward pass and makes the rest again.

    With the results of its large products kept, the rest is cheap to make and most of the memory.
    One and the same function for every layer is also traced only once.
    """
    return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(KEPT))


def attend(query: jax.Array, segments: list[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """Softmax attention over several segments of keys and values, without joining them.

    Args:
      query: ``[H, T, d]``.
      segments: ``(keys [K, S, d], values [K, S, d], allowed [T, S] bool)`` each, with lengths ``S``
        of their own. ``K`` divides ``H``: each run of ``H / K`` heads shares keys and values, which
        are not repeated for them (grouped-query attention). Every query must be allowed some key
        for its row to be meaningful; rows with none are finite.

    Returns:
      float32 ``[H, T, d]``: softmax(q k^T / sqrt(d)) v, softmax in float32.
    """
    scale = query.shape[-1] ** -0.5
    heads, length, size = query.shape
    key_heads = segments[0][0].shape[0]
    shared = heads // key_heads
    # The heads that share keys are rows of one product: [K, R, d] with R = H / K * T.
    rows = query.reshape(key_heads, shared * length, size)
    scores = [
        jnp.where(
            jnp.tile(allowed, (shared, 1))[None],
            scale
            * jnp.einsum(
                "krd,ksd->krs",
                rows.astype(keys.dtype),
                keys,
                preferred_element_type=jnp.float32,
            ),
            jnp.finfo(jnp.float32).min,
        )
        for keys, _, allowed in segments
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out, start = jnp.zeros((), jnp.float32), 0
    for _, values, allowed in segments:
        part = weights[..., start : start + allowed.shape[-1]]
        start += allowed.shape[-1]
        out = out + jnp.einsum(
            "krs,ksd->krd", part.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
    return out.reshape(query.shape)


def cast_params(
    params: Params, dtype: jnp.dtype, place: Callable[[Any], Any] = lambda array: array
) -> Params:
    """The mixed-precision switch: matrices in ``dtype``, vectors (norms, biases) in float32.

    Products then take operands in ``dtype`` and accumulate in float32 (`dense`, `attend`); the
    residual stream, norms, softmax and logits stay float32.

    Args:
      params: nested dict of arrays, with factors at adapted sites or without; not changed.
      dtype: ``jnp.float32`` or ``jnp.bfloat16``, of arrays with at least two axes.
      place: puts an array where it is to lie, before it changes its type.

    Returns:
      the same structure and shapes, arrays on the device.
    """
    return jax.tree.map(
        lambda x: jnp.asarray(place(x), dtype if x.ndim >= 2 else jnp.float32), params
    )
