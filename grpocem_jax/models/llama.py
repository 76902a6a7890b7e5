"""Llama (Touvron et al. 2023, arXiv 2302.13971), Qwen2, Qwen3 and Mistral in Flax Linen.

One network: RMS norms, rotary positions, grouped-query attention, SwiGLU.  Qwen2 has biases on
queries, keys and values; Qwen3 has norms of each head's queries and keys in their place.  Attention
within a sliding window is that of the whole text as long as the text fits into the window, so the
window bounds the context.  Parameter names mirror the Hugging Face checkpoint, whose linear maps,
``[out, in]``, are transposed at load.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.models import conversion, decoder, rope
from grpocem_jax.models.base import Model, Params, SiteFunction, attend, keep, remat
from grpocem_jax.models.conversion import Tensor
from grpocem_jax.models.rope import rotary_angles, rotate
from grpocem_jax.utils.errors import InputError

NAMES: Mapping[str, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
"""What is served, by ``model_type`` of a config.json."""

BIASES = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
"""The fields of a config.json that say whether maps have a bias, and who has them."""

MISTRAL_WINDOW = 4096
QWEN3_HEAD_DIM = 128
MAX_WINDOW_LAYERS = 28
"""What transformers takes where a config.json does not say: Mistral's window, the size of Qwen3's
heads, and how many of the first layers of a Qwen with a window have none."""

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of one of `NAMES`; the defaults are Qwen2 0.5B's.

    Attributes:
      model_type: one of `NAMES`.
      vocab_size: rows of the embedding.
      context_length: the largest number of positions.
      width: of the residual stream.
      inner: width inside the MLP.
      num_layers: blocks.
      num_heads: heads of queries.
      num_kv_heads: heads of keys and values, a divisor of ``num_heads``.
      head_dim: size of a head, even.
      rms_norm_epsilon: in the square root of the norms.
      rope_theta: base of the rotary frequencies.
      rope_scaling: what stretches them for long texts, or None.
      window: how many tokens, its own among them, a token attends to; None for all before it.
      layer_types: of each layer, transformers' name of its attention, where not all are alike.
      qkv_bias: whether queries, keys and values have a bias.
      out_bias: whether the attention's output has one.
      mlp_bias: whether the maps of the MLP have one.
      qk_norm: whether each head's queries and keys have an RMS norm.
      tied: whether the head is the embedding.
    """

    model_type: str = "qwen2"
    vocab_size: int = 151936
    context_length: int = 32768
    width: int = 896
    inner: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    head_dim: int = 64
    rms_norm_epsilon: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: rope.Llama3Scaling | None = None
    window: int | None = None
    layer_types: tuple[str, ...] = ()
    qkv_bias: bool = True
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True


Config = LlamaConfig
"""The config record under the name every architecture's module gives it."""

SHAPES = {
    "qwen2-0.5b": LlamaConfig(),
    "qwen2-1.5b": LlamaConfig(width=1536, inner=8960, num_layers=28, num_heads=12, head_dim=128),
    "qwen2-7b": LlamaConfig(
        vocab_size=152064,
        width=3584,
        inner=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        tied=False,
    ),
    "qwen3-0.6b": LlamaConfig(
        model_type="qwen3",
        context_length=40960,
        width=1024,
        inner=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
    ),
}
"""Some published sizes, for ``random:NAME``."""


def _linears(config: LlamaConfig) -> dict[str, tuple[int, int, bool]]:
    """Of each linear map of a block, by path: features in and out, and whether it has a bias."""
    width, inner = config.width, config.inner
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (width, queries, config.qkv_bias),
        "self_attn.k_proj": (width, keys, config.qkv_bias),
        "self_attn.v_proj": (width, keys, config.qkv_bias),
        "self_attn.o_proj": (queries, width, config.out_bias),
        "mlp.gate_proj": (width, inner, config.mlp_bias),
        "mlp.up_proj": (width, inner, config.mlp_bias),
        "mlp.down_proj": (inner, width, config.mlp_bias),
    }


class Block(nn.Module):
    """One pre-norm transformer block."""

    config: LlamaConfig
    site_fn: SiteFunction | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, offsets, allowed, past, cache, index, places, cos, sin):
        """Returns the block's output ``[T, D]``, or ``[M, D]``, and its keys and values.

        The arguments are those that `decoder.run_layers` gives to a layer, and `rotary_angles`.
        """
        config = self.config
        linears = _linears(config)

        def linear(path: str, x: jax.Array) -> jax.Array:
            _, features, bias = linears[path]
            name = path.replace(".", "_")
            return decoder.Linear(features, path, self.site_fn, bias, name=name)(x, offsets)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.RMSNorm(config.rms_norm_epsilon, name=name)(x)

        def heads(x: jax.Array) -> jax.Array:
            return jnp.swapaxes(x.reshape(len(x), -1, config.head_dim), 0, 1)

        normed = norm("input_layernorm", x)
        query, key, value = (
            heads(keep(linear(f"self_attn.{part}_proj", normed))) for part in ("q", "k", "v")
        )
        if config.qk_norm:
            query, key = norm("self_attn_q_norm", query), norm("self_attn_k_norm", key)
        query, key = (rotate(part, cos, sin).astype(self.dtype) for part in (query, key))
        keys, values = decoder.extend(cache, key, value.astype(self.dtype), index)
        segments = [] if past is None else [past]
        segments.append((keys, values, allowed))
        x, query, segments = decoder.narrow(places, x, query, segments)
        mixed = jnp.swapaxes(attend(query, segments), 0, 1)
        x = keep(x + linear("self_attn.o_proj", mixed.reshape(len(x), -1)))

        normed = norm("post_attention_layernorm", x)
        gate, up = (keep(linear(f"mlp.{part}_proj", normed)) for part in ("gate", "up"))
        return x + linear("mlp.down_proj", nn.silu(gate) * up), keys, values


class Llama(nn.Module):
    """The network up to the final norm, on one sequence; the head is `Model.logits`.

    Attributes:
      config: the shape.
      site_fn: the ``apply`` of the adapter.
      run_block: `Block` as a function of its parameters and arguments, for all layers; without it
        every layer is a module of its own, as to make parameters or to look inside.
    """

    config: LlamaConfig
    site_fn: SiteFunction | None = None
    run_block: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, tokens, positions, allowed, offsets, context, cache, index, places):
        """Hidden states float32 ``[T, D]``, or ``[M, D]``, and the own keys and values.

        ``tokens`` and ``positions`` are int32 ``[T]``; the other arguments and the results are
        those of `decoder.run_layers`.
        """
        config = self.config
        rows, init = (config.vocab_size, config.width), nn.initializers.normal(0.02)
        embedding = self.param("embed_tokens", init, rows)
        if not config.tied:
            self.param("lm_head", init, rows)
        x = jnp.take(embedding, tokens, axis=0).astype(jnp.float32)

        def run(layer: int, *arguments: Any) -> Any:
            name = f"layers_{layer}"
            if self.run_block is not None:
                return self.run_block(self.variables["params"][name], *arguments)
            return Block(config, self.site_fn, embedding.dtype, name=name)(*arguments)

        angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        arguments = (context, cache, index, places, *angles)
        x, own = decoder.run_layers(
            run, config.num_layers, "layers", x, allowed, offsets, *arguments
        )
        return nn.RMSNorm(config.rms_norm_epsilon, name="norm")(x), own


def layout(config: LlamaConfig) -> conversion.Layout:
    """The tensors of its checkpoints, and where each goes in the parameters."""
    rows = (config.vocab_size, config.width)
    tensors = {"model.embed_tokens.weight": Tensor(("embed_tokens",), rows)}
    for i in range(config.num_layers):
        prefix, block = f"model.layers.{i}", f"layers_{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = Tensor((block, norm, "scale"), rows[1:])
        for path, (size_in, size_out, bias) in _linears(config).items():
            module = path.replace(".", "_")
            kernel = Tensor((block, module, "kernel"), (size_out, size_in), transposed=True)
            tensors[f"{prefix}.{path}.weight"] = kernel
            if bias:
                tensors[f"{prefix}.{path}.bias"] = Tensor((block, module, "bias"), (size_out,))
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            scale = Tensor((block, f"self_attn_{norm}", "scale"), (config.head_dim,))
            tensors[f"{prefix}.self_attn.{norm}.weight"] = scale
    tensors["model.norm.weight"] = Tensor(("norm", "scale"), rows[1:])
    if not config.tied:
        tensors[conversion.HEAD] = Tensor(("lm_head",), rows)
    return conversion.Layout(
        name=NAMES[config.model_type],
        prefix="model.",
        tensors=tensors,
        tied="model.embed_tokens.weight" if config.tied else None,
        # The rotary frequencies of old checkpoints.
        passed_over=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        switches=dict.fromkeys((conversion.HEAD, "embed_tokens.*"), "tie_word_embeddings")
        | {
            rf"{part}.*\.bias": field
            for part, field in (("self_attn", "attention_bias"), ("mlp", "mlp_bias"))
            if config.model_type in BIASES[field]
        },
    )


def build(config: LlamaConfig, site_fn: SiteFunction | None = None) -> Model:
    """The model's pure functions; ``site_fn`` is the ``apply`` of the adapter it will carry."""

    def network(dtype: jnp.dtype) -> Llama:
        block = Block(config, site_fn, dtype)
        return Llama(config, site_fn, remat(lambda params, *x: block.apply({"params": params}, *x)))

    return decoder.make_model(
        network,
        lambda params: params["embed_tokens" if config.tied else "lm_head"],
        vocab_size=config.vocab_size,
        context_length=min(config.context_length, config.window or config.context_length),
        window=config.window,
        num_layers=config.num_layers,
        cache_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        sites=layout(config).sites(),
    )


def init_params(key: jax.Array, config: LlamaConfig) -> Params:
    """Random float32 parameters as transformers makes them: normal(0.02), norms 1, biases 0."""
    return decoder.init_params(key, Llama(config))


def config_from_hf(fields: Mapping[str, Any], where: str) -> LlamaConfig:
    """Reads the fields of a ``config.json``; ``where`` names the file in errors.

    Raises:
      InputError: a field is missing, or asks for something that is not implemented.
    """
    kind = fields["model_type"]
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    sizes += ["num_attention_heads", "max_position_embeddings"]
    # A field that is missing means as many as heads of queries in Llama, and 8 or 32 in the others.
    if kind != "llama" or fields.get("num_key_value_heads") is not None:
        sizes.append("num_key_value_heads")
    if fields.get("head_dim") is not None:
        sizes.append("head_dim")
    conversion.check_positive(fields, sizes, where)
    implemented = {"hidden_act": "silu", "is_causal": True, "quantization_config": None}
    conversion.check_implemented(fields, implemented, where)
    width, num_heads = fields["hidden_size"], fields["num_attention_heads"]
    num_kv_heads = fields.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise InputError(
            f"{where}: num_key_value_heads={num_kv_heads} does not divide "
            f"num_attention_heads={num_heads}."
        )
    head_dim = fields.get("head_dim") or (QWEN3_HEAD_DIM if kind == "qwen3" else None)
    if head_dim is None and width % num_heads:
        raise InputError(
            f"{where}: num_attention_heads={num_heads} does not divide hidden_size={width}."
        )
    head_dim = head_dim or width // num_heads
    if head_dim % 2:
        raise InputError(
            f"{where}: head_dim={head_dim} is odd, and rotary positions turn pairs of entries."
        )
    theta, scaling = rope.from_hf(fields, where)
    window, layer_types = _attention(fields, fields["num_hidden_layers"], where)
    bias, mlp_bias = (
        kind in BIASES[field] and _flag(fields, field, where)
        for field in ("attention_bias", "mlp_bias")
    )
    return LlamaConfig(
        model_type=kind,
        vocab_size=fields["vocab_size"],
        context_length=fields["max_position_embeddings"],
        width=width,
        inner=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_epsilon=conversion.positive(
            fields.get("rms_norm_eps", 1e-6), "rms_norm_eps", where
        ),
        rope_theta=theta,
        rope_scaling=scaling,
        window=window,
        layer_types=layer_types,
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=mlp_bias,
        qk_norm=kind == "qwen3",
        tied=_flag(fields, "tie_word_embeddings", where),
    )


def _attention(
    fields: Mapping[str, Any], num_layers: int, where: str
) -> tuple[int | None, tuple[str, ...]]:
    """The sliding window, None where no layer has one, and the layers' types where they differ.

    Raises:
      InputError: a window that is none, or a type that is not implemented.
    """
    kind, field = fields["model_type"], "sliding_window"
    switched = kind in ("qwen2", "qwen3")
    # Qwen has the field whether it is used or not; a Mistral without it has a window.
    window = fields.get(field, MISTRAL_WINDOW if kind == "mistral" else None)
    if switched and not _flag(fields, "use_sliding_window", where):
        window = None
    if window is not None:
        conversion.check_positive({field: window}, [field], where)
    types = fields.get("layer_types") or ()
    types = tuple(map(str, types)) if isinstance(types, list | tuple) else (str(types),)
    known = (FULL,) if window is None else (FULL, SLIDING)
    others = sorted(set(types).difference(known))
    if others:
        raise InputError(
            f"{where}: layer_types has {', '.join(map(repr, others))}, which is not implemented "
            f"(only {' and '.join(map(repr, known))}); use another checkpoint."
        )
    if window is None or not switched:
        return window, ()
    if types and len(types) != num_layers:
        raise InputError(
            f"{where}: layer_types has {len(types)} entries, but num_hidden_layers={num_layers}; "
            "use the checkpoint's own config.json."
        )
    first = fields.get("max_window_layers", MAX_WINDOW_LAYERS)
    if type(first) is not int:
        raise InputError(f"{where}: max_window_layers={first!r}: must be an integer.")
    types = types or tuple(SLIDING if i >= first else FULL for i in range(num_layers))
    return (window, types) if SLIDING in types else (None, ())


def _flag(fields: Mapping[str, Any], field: str, where: str) -> bool:
    value = fields.get(field, False)
    if type(value) is not bool:
        raise InputError(f"{where}: {field}={value!r}: must be true or false.")
    return value


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers reads, without token ids."""
    fields = {
        "model_type": config.model_type,
        "architectures": [f"{NAMES[config.model_type]}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_epsilon,
        "tie_word_embeddings": config.tied,
        **rope.to_hf(config.rope_theta, config.rope_scaling),
    }
    biases = {"attention_bias": config.out_bias, "mlp_bias": config.mlp_bias}
    fields |= {name: value for name, value in biases.items() if config.model_type in BIASES[name]}
    if config.model_type != "llama" or config.window:
        fields["sliding_window"] = config.window
    if config.layer_types:
        fields |= {
            "use_sliding_window": True,
            "max_window_layers": config.layer_types.index(SLIDING),
            "layer_types": list(config.layer_types),
        }
    return fields


def params_from_state(
    state: Mapping[str, np.ndarray], config: LlamaConfig, where: str
) -> dict[str, Any]:
    """Parameters float32 from a checkpoint's tensors; see `conversion.params_from_state`."""
    return conversion.params_from_state(state, layout(config), where)


def params_to_state(params: Params, config: LlamaConfig) -> dict[str, np.ndarray]:
    """The inverse of `params_from_state`, with the names transformers writes; tied head once."""
    return conversion.params_to_state(params, layout(config))
