"""GPT-2 (Radford et al. 2019) in Flax Linen: the network, its parameters and its checkpoints.

Parameter names mirror the Hugging Face checkpoint; GPT-2 stores its linear maps as ``[in, out]``,
which is Flax's layout too, so nothing is transposed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.errors import InputError
from grpocem_jax.models.base import (
    AdapterParams,
    Context,
    KeyValues,
    Model,
    Params,
    SiteFunction,
    attend,
    dense,
    keep,
    remat,
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the defaults are GPT-2 124M's."""

    vocab_size: int = 50257
    context_length: int = 1024
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    layer_norm_epsilon: float = 1e-5


Config = GPT2Config
"""The config record under the name every architecture's module gives it."""

SHAPES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(width=1024, num_layers=24, num_heads=16),
    "gpt2-large": GPT2Config(width=1280, num_layers=36, num_heads=20),
    "gpt2-xl": GPT2Config(width=1600, num_layers=48, num_heads=25),
}
"""The published sizes, for ``random:NAME``."""


class Linear(nn.Module):
    """A linear map with bias that hands its kernel to the adapter where there is one."""

    features: int
    site: str
    site_fn: SiteFunction | None

    @nn.compact
    def __call__(self, x: jax.Array, adapter: AdapterParams) -> jax.Array:
        """Maps ``[T, in]`` to ``[T, features]`` float32."""
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.site in adapter and self.site_fn is not None:
            factors: Any = self.get_variable("params", "kernel")
            return self.site_fn(factors, adapter[self.site], x) + bias[None]
        shape = (x.shape[-1], self.features)
        return dense(self.param("kernel", nn.initializers.normal(0.02), shape), x) + bias[None]


class Block(nn.Module):
    """One pre-norm transformer block."""

    config: GPT2Config
    site_fn: SiteFunction | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, adapter, allowed, past, cache, index):
        """Returns the block's output ``[T, D]`` and its keys and values.

        ``adapter`` holds the block's own arrays by path, ``attn.c_proj``; the other arguments are
        those of `GPT2`, of this layer.
        """
        config = self.config
        length, width = x.shape
        heads = (config.num_heads, width // config.num_heads)

        def linear(features: int, path: str) -> Linear:
            return Linear(features, path, self.site_fn, name=path.replace(".", "_"))

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(config.layer_norm_epsilon, use_fast_variance=False, name=name)

        qkv = keep(linear(3 * width, "attn.c_attn")(norm("ln_1")(x), adapter))
        query, key, value = (
            jnp.swapaxes(part.reshape(length, *heads), 0, 1).astype(self.dtype)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        if cache is None:
            keys, values = key, value
        else:
            keys, values = (
                jax.lax.dynamic_update_slice(old, new, (0, index, 0))
                for old, new in zip(cache, (key, value), strict=True)
            )
        segments = [] if past is None else [past]
        mixed = jnp.swapaxes(attend(query, [*segments, (keys, values, allowed)]), 0, 1)
        x = keep(x + linear(width, "attn.c_proj")(mixed.reshape(length, width), adapter))

        wide = keep(linear(4 * width, "mlp.c_fc")(norm("ln_2")(x), adapter))
        x = x + linear(width, "mlp.c_proj")(nn.gelu(wide, approximate=True), adapter)
        return x, keys, values


class GPT2(nn.Module):
    """The network up to the final norm, on one sequence; the head is `Model.logits`.

    Attributes:
      config: the shape.
      site_fn: the ``apply`` of the adapter.
      run_block: `Block` as a function of its parameters and arguments, for all layers; without it
        every layer is a module of its own, as to make parameters or to look inside.
    """

    config: GPT2Config
    site_fn: SiteFunction | None = None
    run_block: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, tokens, positions, allowed, adapter, context, cache, index):
        """Runs the blocks.

        Args:
          tokens: int32 ``[T]``.
          positions: int32 ``[T]``.
          allowed: bool ``[T, N]``, which of the ``N`` own keys each token attends to.
          adapter: trainable arrays by site.
          context: the `Context` before the tokens, or None.
          cache: `KeyValues` of length ``N`` to write the tokens' own into, or None (``N = T``).
          index: int32 ``[]``, where in ``cache`` to write.

        Returns:
          hidden states float32 ``[T, D]`` and the own `KeyValues`, length ``N``.
        """
        config = self.config
        init = nn.initializers.normal(0.02)
        wte = self.param("wte", init, (config.vocab_size, config.width))
        wpe = self.param("wpe", init, (config.context_length, config.width))
        x = jnp.take(wte, tokens, axis=0).astype(jnp.float32)
        x = x + jnp.take(wpe, positions, axis=0).astype(jnp.float32)
        keys, values = [], []
        for i in range(config.num_layers):
            past = own = None
            if context is not None:
                reach = jnp.broadcast_to(context.mask, (x.shape[0], context.mask.shape[0]))
                past = (context.key_values.keys[i], context.key_values.values[i], reach)
            if cache is not None:
                own = (cache.keys[i], cache.values[i])
            arguments = (x, _of_block(adapter, i), allowed, past, own, index)
            if self.run_block is None:
                block = Block(config, self.site_fn, wte.dtype, name=f"h_{i}")
                x, k, v = block(*arguments)
            else:
                x, k, v = self.run_block(self.variables["params"][f"h_{i}"], *arguments)
            keys.append(k)
            values.append(v)
        x = nn.LayerNorm(config.layer_norm_epsilon, use_fast_variance=False, name="ln_f")(x)
        return x, KeyValues(tuple(keys), tuple(values))


def _of_block(adapter: AdapterParams, layer: int) -> dict[str, Any]:
    """A block's own arrays by the path inside it."""
    prefix = f"h.{layer}."
    return {k.removeprefix(prefix): x for k, x in adapter.items() if k.startswith(prefix)}


def _names(config: GPT2Config) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Checkpoint name of every parameter: its path in the parameters and its shape."""
    d = config.width
    norm = {"weight": "scale", "bias": "bias"}
    names: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "wte.weight": (("wte",), (config.vocab_size, d)),
        "wpe.weight": (("wpe",), (config.context_length, d)),
    }
    linears: dict[str, tuple[int, ...]] = {
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "mlp.c_fc": (d, 4 * d),
        "mlp.c_proj": (4 * d, d),
    }
    for i in range(config.num_layers):
        for part, leaf in norm.items():
            for ln in ("ln_1", "ln_2"):
                names[f"h.{i}.{ln}.{part}"] = ((f"h_{i}", ln, leaf), (d,))
        for path, shape in linears.items():
            module = path.replace(".", "_")
            names[f"h.{i}.{path}.weight"] = ((f"h_{i}", module, "kernel"), shape)
            names[f"h.{i}.{path}.bias"] = ((f"h_{i}", module, "bias"), shape[1:])
    for part, leaf in norm.items():
        names[f"ln_f.{part}"] = (("ln_f", leaf), (d,))
    return names


def build(config: GPT2Config, site_fn: SiteFunction | None = None) -> Model:
    """The model's pure functions; ``site_fn`` is the ``apply`` of the adapter it will carry."""

    @functools.cache
    def network(dtype: jnp.dtype) -> GPT2:
        block = Block(config, site_fn, dtype)
        return GPT2(config, site_fn, remat(lambda params, *x: block.apply({"params": params}, *x)))

    def run(params, adapter, tokens, positions, allowed, context=None, cache=None, index=None):
        return network(params["wte"].dtype).apply(
            {"params": params}, tokens, positions, allowed, adapter, context, cache, index
        )

    def after(context: Context | None) -> jax.Array | int:
        return 0 if context is None else jnp.sum(context.mask, dtype=jnp.int32)

    def full(params, adapter, tokens, mask, context):
        positions = jnp.maximum(jnp.cumsum(mask) - 1, 0) + after(context)
        causal = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        return run(params, adapter, tokens, positions, causal & mask[None], context)

    def forward(params, adapter, tokens, mask, context=None):
        return full(params, adapter, tokens, mask, context)[0]

    def prefill(params, adapter, tokens, mask):
        hidden, key_values = full(params, adapter, tokens, mask, None)
        return hidden[-1], Context(key_values, mask)

    def init_cache(params: Params, length: int) -> KeyValues:
        shape = (config.num_heads, length, config.width // config.num_heads)
        zeros = (jnp.zeros(shape, params["wte"].dtype),) * config.num_layers
        return KeyValues(zeros, zeros)

    def decode_step(params, adapter, context, cache, token, index):
        allowed = (jnp.arange(cache.keys[0].shape[1]) <= index)[None]
        positions = (after(context) + index)[None]
        hidden, cache = run(params, adapter, token[None], positions, allowed, context, cache, index)
        return hidden[0], cache

    def logits(
        params: Params,
        hidden: jax.Array,
        start: jax.Array | int = 0,
        count: int | None = None,
    ) -> jax.Array:
        rows = params["wte"]
        if count is not None:
            rows = jax.lax.dynamic_slice_in_dim(rows, start, count)
        return dense(rows.T, hidden)

    sites = {
        name.removesuffix(".weight"): path
        for name, (path, _) in _names(config).items()
        if path[-1] == "kernel"
    }
    return Model(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        sites=sites,
        forward=forward,
        prefill=prefill,
        init_cache=init_cache,
        decode_step=decode_step,
        logits=logits,
    )


def init_params(key: jax.Array, config: GPT2Config) -> Params:
    """Random float32 parameters as GPT-2 was initialised: normal(0.02), residual maps smaller.

    The two maps of a block that write to the residual stream have standard deviation
    ``0.02 / sqrt(2 * num_layers)``.
    """
    tokens = jnp.zeros((1,), jnp.int32)
    allowed = jnp.ones((1, 1), bool)
    network = GPT2(config)
    params = jax.jit(
        lambda k: network.init(k, tokens, tokens, allowed, {}, None, None, None)["params"]
    )(key)

    def scale(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        residual = path[-1].key == "kernel" and path[-2].key.endswith("c_proj")
        return x * (2 * config.num_layers) ** -0.5 if residual else x

    return jax.tree_util.tree_map_with_path(scale, params)


def config_from_hf(fields: Mapping[str, Any], where: str) -> GPT2Config:
    """Reads the fields of a ``config.json``; ``where`` names the file in errors.

    Raises:
      InputError: a field is missing, or asks for something that is not implemented.
    """
    implemented = {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for field, value in implemented.items():
        if fields.get(field, value) != value:
            raise InputError(
                f"{where}: {field}={fields[field]!r} is not implemented (only {value!r} is); "
                "use a checkpoint of the standard GPT-2 architecture."
            )
    try:
        config = GPT2Config(
            vocab_size=fields["vocab_size"],
            context_length=fields["n_positions"],
            width=fields["n_embd"],
            num_layers=fields["n_layer"],
            num_heads=fields["n_head"],
            layer_norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        )
    except KeyError as error:
        raise InputError(
            f"{where}: the field {error} is missing; a GPT-2 config.json has it."
        ) from None
    for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if type(fields[field]) is not int or fields[field] < 1:
            raise InputError(f"{where}: {field}={fields[field]!r}: must be a positive integer.")
    if fields.get("n_inner") not in (None, 4 * config.width):
        raise InputError(
            f"{where}: n_inner={fields['n_inner']} is not implemented; it must be 4 * n_embd."
        )
    if config.width % config.num_heads:
        raise InputError(
            f"{where}: n_head={config.num_heads} does not divide n_embd={config.width}."
        )
    return config


def config_to_hf(config: GPT2Config, *, end_token: int) -> dict[str, Any]:
    """The ``config.json`` that transformers reads, with one token as beginning and end of text."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "activation_function": "gelu_new",
        "bos_token_id": end_token,
        "eos_token_id": end_token,
    }


def params_from_state(
    state: Mapping[str, np.ndarray], config: GPT2Config, where: str
) -> dict[str, Any]:
    """Builds the parameters from a checkpoint's tensors, float32, using each exactly once.

    The prefix ``transformer.`` may be there or not. The attention's mask buffers, which old
    checkpoints carry and which are not weights, are passed over; a separate ``lm_head.weight`` must
    equal the embedding it is tied to.

    Raises:
      InputError: a tensor is missing, left over or of another shape; it names the tensor.
    """
    left: dict[str, str] = {}
    for name in state:
        bare = name.removeprefix("transformer.")
        if bare in left:
            raise InputError(f"{where}: {left[bare]} and {name} are the same tensor; keep one.")
        left[bare] = name
    params: dict[str, Any] = {}
    for name, (path, shape) in _names(config).items():
        if name not in left:
            raise InputError(f"{where}: the tensor {name} is missing; this is no complete GPT-2.")
        array = np.asarray(state[left.pop(name)], np.float32)
        if array.shape != shape:
            raise InputError(
                f"{where}: the tensor {name} has shape {array.shape}, but config.json says {shape}."
            )
        branch = params
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = array
    head = left.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(state[head], params["wte"]):
        raise InputError(
            f"{where}: lm_head.weight differs from wte.weight, but GPT-2 ties the two; "
            "this checkpoint is not a GPT-2."
        )
    for name in left:
        if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            raise InputError(f"{where}: the tensor {left[name]} belongs to no GPT-2 weight.")
    return params


def params_to_state(params: Params, config: GPT2Config) -> dict[str, np.ndarray]:
    """The inverse of `params_from_state`, with the names transformers writes; tied head once."""
    state = {}
    for name, (path, _) in _names(config).items():
        leaf = params
        for part in path:
            leaf = leaf[part]
        state[f"transformer.{name}"] = np.asarray(leaf, np.float32)
    return state
